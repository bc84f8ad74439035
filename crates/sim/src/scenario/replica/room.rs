//! X9: a change of sides that was asked for comes about although the secondaries' stores are full of what stands before the last checkpoint's
//! mark, which they so never hear of; but where the places that were written to do not fit into a store, each once, it is refused with that
//! reason.

use super::turns::{DISK, SWITCHOVER_MS};
use super::{Run, SECOND_LIFE, SECTORS, STORE, Wishes};
use crate::guest::Disk;
use crate::{Value, World, stamped, values_of};
use block::{SECTOR, Span};
use serde_json::json;
use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

/// Sectors of a write, and how many writes there are: more than a store takes.
const LEN: u64 = 256;
const WRITES: u64 = STORE * 3 / 4 / (LEN * SECTOR);

/// What one seed is about.
#[derive(Clone, Copy, Debug)]
struct Case {
    level: &'static str,
    policy: &'static str,
    /// Guests write so many sectors, again and again.
    area: u64,
}

/// A manager makes no checkpoint while guests write more than fits beside one, and then wants to change sides. What came of that.
fn full(seed: u64, case: Case) -> Result<(), String> {
    let told = Rc::new(RefCell::new(None));
    let tell = told.clone();
    let outcome = World::play(seed, false, move |w| async move {
        let wishes = Wishes { disk: DISK, external: true, ..Wishes::NONE };
        let run = Run::with_redo(w, wishes, seed, (case.level, case.policy)).await;
        let (env, old, to) = (run.env().clone(), run.primary(), run.follower());
        let disk = old.disk(&run.world).await.unwrap();
        let writes: Vec<_> = (0..WRITES)
            .map(|n| {
                let (disk, at) = (disk.clone(), n * LEN % case.area);
                let number = u32::try_from(n + 1).unwrap();
                env.spawn("write", async move {
                    let done = disk.write(at * SECTOR, stamped(number, at, LEN), false).await;
                    // what the server had not begun with comes too late
                    done.or_else(|e| if e.to_string().contains("was handed over") { Ok(()) } else { Err(e) })
                        .unwrap();
                })
            })
            .collect();
        env.sleep(Duration::from_millis(500)).await;
        let peer = run.peer_of(&old.info().await.unwrap(), to).unwrap();
        assert!(peer["buffer-fill"].as_u64().unwrap() > 90, "{peer}");
        assert!(peer["in-flight-bytes"].as_u64().unwrap() > 0, "{peer}");
        let m = old.manager().unwrap();
        // else the switchover makes the last checkpoint all the same; but users who wait for a copy need one before that
        if seed.is_multiple_of(2) || case.policy == "suspend" {
            m.must("replication-set", json!({"group": "g", "decision": "auto"})).await.unwrap();
        }
        let switch =
            json!({"group": "g", "to": peer["name"], "listen": old.address(), "timeout-ms": SWITCHOVER_MS});
        let done = m.execute("replication-switchover", switch).await;
        if let Err(e) = done {
            *tell.borrow_mut() = Some(e.to_string());
            assert_eq!(old.info().await.unwrap()["role"], "primary");
            disk.write(0, stamped(SECOND_LIFE, 0, 1), false).await.unwrap();
            return;
        }
        env.sleep(Duration::from_secs(1)).await;
        assert!(writes.iter().all(env::TaskHandle::is_done), "a write waits");
        disk.disconnect();
        let disk = to.disk(&run.world).await.unwrap();
        let found = disk.read(Span::new(0, case.area * SECTOR)).await.unwrap();
        let found = values_of(&found.contiguous(), 0);
        for (n, v) in found.iter().enumerate() {
            // those that were under way at once may have had any order
            let there = |w: u32| u64::from(w - 1) * LEN % case.area == n as u64 / LEN * LEN;
            assert!(matches!(v, Value::Write(w) if there(*w)), "sector {n} is {v:?}");
        }
    });
    assert_eq!(outcome.violation, None, "seed {seed}, {case:?}");
    told.take().map_or(Ok(()), Err)
}

#[test]
fn a_full_store_does_not_keep_the_group_from_being_handed_over() {
    for seed in 0..4 {
        for (level, policy) in
            [("local", "degrade"), ("remote-received", "degrade"), ("remote-durable", "suspend")]
        {
            let case = Case { level, policy, area: SECTORS };
            assert_eq!(full(seed, case), Ok(()), "seed {seed}, {case:?}");
        }
    }
}

#[test]
fn what_does_not_fit_into_a_store_is_why_the_group_is_not_handed_over() {
    for seed in 0..4 {
        let case = Case { level: "local", policy: "degrade", area: WRITES * LEN };
        let refused = full(seed, case).expect_err("it fits");
        assert!(refused.contains("what it missed does not fit into its replication store"), "{refused}");
    }
}
