//! C7: while a secondary makes an epoch durable, however long that takes, its primary's users and its own are served.

use super::turns::DISK;
use super::{Run, Wishes};
use crate::guest::Disk;
use crate::{Fault, Op, Rule, World, stamped};
use block::{SECTOR, Span};
use env::Env;
use std::time::Duration;

/// What a request takes that waits for nothing.
const SOON: Duration = Duration::from_millis(50);

async fn soon<T>(env: &Env, what: &str, request: impl Future<Output = block::Result<T>>) {
    match env.timeout(SOON, request).await {
        None => panic!("{what} waits for the secondary's disk"),
        Some(Err(e)) => panic!("{what}: {e}"),
        Some(Ok(_)) => {}
    }
}

#[test]
fn nobody_waits_for_the_flush_of_an_epoch() {
    for seed in 0..8 {
        let outcome = World::play(seed, false, move |w| async move {
            let wishes = Wishes { disk: DISK, ..Wishes::NONE };
            let run = Run::with_redo(w, wishes, seed, ("remote-written", "suspend")).await;
            let (env, follower) = (run.env().clone(), run.follower());
            let primary = run.primary().disk(&run.world).await.unwrap();
            let view = follower.disk(&run.world).await.unwrap();
            for s in run.followers() {
                s.host.fault(Rule::always("/store", Op::Barrier, Fault::Hang));
            }
            soon(&env, "a write before the mark", primary.write(0, stamped(1, 0, 1), false)).await;
            let marking = run.clone();
            let mark = env.spawn("checkpoint", async move { marking.checkpoint().await.unwrap() });
            env.sleep(SOON).await;
            for n in 1..20 {
                soon(&env, "a write behind the mark", primary.write(n * SECTOR, stamped(2, n, 1), false))
                    .await;
                soon(&env, "a read there", view.read(Span::new(0, SECTOR))).await;
                soon(&env, "a write there", view.write(n * SECTOR, stamped(3, n, 1), false)).await;
            }
            assert!(!mark.is_done(), "nothing was flushed");
            run.calm();
            env.sleep(SOON).await;
            assert!(mark.is_done());
            let info = run.primary().info().await.unwrap();
            assert_eq!(info["peers"][0]["committed-epoch"], info["committed-epoch"]);
        });
        assert_eq!(outcome.violation, None, "seed {seed}");
    }
}
