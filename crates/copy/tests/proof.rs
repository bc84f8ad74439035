//! Comparing source and target: a flipped byte is found wherever it is, a proof made under writing clients is one, and what is not
//! equal is repaired if asked. `SEED=n cargo test -p copy --test proof` repeats one random run.
#![allow(missing_docs, clippy::unwrap_used)]

mod world;

use block::{Data, ReqFlags, Span};
use copy::{CopyTap, Coverage, Engine, LastChange, Proof, ProofRules, Work, first};
use drivers::filters::mirror_top::MirrorTop;
use env::Env;
use graph::{Graph, Node};
use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;
use world::{Desk, Follow, Mem, Mode, Rng, digest_of, edge, simulate};

struct Pair {
    _graph: Rc<Graph>,
    env: Env,
    source: Rc<Mem>,
    target: Rc<Mem>,
    top: Rc<MirrorTop>,
    work: Rc<Work>,
    proof: Rc<Proof>,
    desk: Rc<Desk>,
    policy: Rc<Follow>,
    engine: Engine,
}

/// A source with data and holes, and an empty target.
async fn pair(env: &Env, len: u64, rules: ProofRules, mode: Mode) -> Pair {
    let graph = Graph::new(env);
    let (source, target) = (Mem::new(env, len), Mem::new(env, len));
    for b in (0..len / 4096).filter(|b| b % 37 < 20) {
        source.put(b * 4096, &[(b % 251 + 1) as u8; 4096], true);
    }
    let work = Work::new(env.clone(), len, 65536).unwrap();
    let proof = Rc::new(Proof::new(len, rules).unwrap());
    work.set_proof(proof.clone());
    let top = MirrorTop::new(edge(&graph, "source", source.clone()).await);
    let (desk, policy) = (Desk::new(), Follow::new(mode));
    let to = edge(&graph, "target", target.clone()).await;
    top.set_tap(Some(CopyTap::new(work.clone(), to.clone(), policy.clone(), desk.clone())));
    let from = edge(&graph, "source", source.clone()).await;
    assert!(first::reads_as_zero(&work, &to).await.unwrap());
    work.assume_target_zero().unwrap();
    first::mark_data(&work, &from).await.unwrap();
    let engine = Engine::new(work.clone(), from, to, policy.clone(), desk.clone(), 4 << 20);
    Pair { _graph: graph, env: env.clone(), source, target, top, work, proof, desk, policy, engine }
}

impl Pair {
    /// Copies without comparing, until clean.
    async fn copy(&mut self) {
        self.policy.compares.set(false);
        self.engine.run().await.unwrap();
        assert!(*self.source.bytes.borrow() == *self.target.bytes.borrow());
        self.policy.compares.set(true);
    }

    fn flip(&self, at: u64) {
        let byte = self.target.bytes.borrow()[at as usize] ^ 0x10;
        self.target.put(at, &[byte], true);
    }
}

#[test]
fn a_flipped_byte_is_found_wherever_it_is() {
    let len: u64 = (3 << 20) + 512;
    // data, the first byte, a hole of both, the edges of units, the last partial unit, the last byte
    for at in [5000, 0, 90_000, 65_535, 65_536, (2 << 20) - 1, 3 << 20, len - 1] {
        simulate(1, move |env, _| async move {
            let mut p = pair(&env, len, ProofRules::default(), Mode::Background).await;
            p.copy().await;
            p.flip(at);
            p.engine.run().await.unwrap();
            let named: Vec<Span> = p.desk.mismatches.borrow().iter().map(|m| m.at).collect();
            assert_eq!(named, [Span::new(at, 1)]);
            let why = p.proof.verdict().unwrap_err();
            assert!(why.message().contains(&format!("offset {at} (1 bytes)")), "{why}");
            p.proof.seal(&env).await.unwrap();
            assert_eq!(p.proof.report().digest, None);
        });
    }
}

#[test]
fn what_differs_is_repaired_if_asked_and_the_digest_is_that_of_both() {
    simulate(2, |env, _| async move {
        let rules = ProofRules { repair: true, ..ProofRules::default() };
        let mut p = pair(&env, 2 << 20, rules, Mode::Background).await;
        p.copy().await;
        [100, 90_000, 1 << 20].iter().for_each(|at| p.flip(*at));
        p.engine.run().await.unwrap();
        assert!(*p.source.bytes.borrow() == *p.target.bytes.borrow());
        p.proof.verdict().unwrap();
        p.proof.seal(&env).await.unwrap();
        let report = p.proof.report();
        assert_eq!((report.mismatches, report.repaired, report.remaining), (3, 3, 0));
        assert_eq!(report.digest, Some(digest_of(&p.source.bytes.borrow())));
        let last: Vec<LastChange> = p.desk.mismatches.borrow().iter().map(|m| m.last).collect();
        // copied by us, copied by us in part of the unit, zero since before we came... all in units that were copied
        assert_eq!(last, [LastChange::Target; 3]);
    });
}

#[test]
fn who_changed_last_is_known_as_far_as_it_was_seen() {
    simulate(3, |env, _| async move {
        let len = 8 << 16;
        let mut p = pair(&env, len, ProofRules::default(), Mode::WriteBlocking).await;
        p.copy().await;
        // a synchronous write; and a write of the client after which somebody else changes the target
        p.top.write(Span::new(3 << 16, 4096), Data::from(vec![5; 4096]), ReqFlags::NONE).await.unwrap();
        p.flip(3 << 16);
        p.flip(1 << 16);
        p.engine.run().await.unwrap();
        let mut found: Vec<_> = p.desk.mismatches.borrow().iter().map(|m| (m.at.start, m.last)).collect();
        // two pieces are compared at the same time
        found.sort_by_key(|m| m.0);
        assert_eq!(found, [(1 << 16, LastChange::Target), (3 << 16, LastChange::Both)]);
    });
}

#[test]
fn a_sample_is_compared_and_nothing_else() {
    simulate(4, |env, _| async move {
        let coverage = Coverage::Sampled { one_of: 4, seed: 7 };
        let mut p = pair(&env, 64 << 16, ProofRules { coverage, repair: false }, Mode::Background).await;
        p.copy().await;
        let share = p.proof.stale_bytes() >> 16;
        assert!((16..=17).contains(&share), "{share} of 64");
        (0..64).for_each(|u| p.flip((u << 16) + 9));
        p.engine.run().await.unwrap();
        assert_eq!(p.desk.mismatches.borrow().len() as u64, share);
        p.proof.seal(&env).await.unwrap();
        assert_eq!(p.proof.report().digest, None, "a sample is no proof of the whole");
    });
}

/// Clients write all the time, in all modes; somebody flips bytes of the target where no client writes, before they are compared:
/// all are named (or repaired), and nothing else is.
#[test]
fn a_proof_under_writing_clients_is_one() {
    for seed in 0..60 {
        simulate(seed, |env, mut rng| async move {
            let mode = *rng.choose(&[Mode::Background, Mode::WriteBlocking, Mode::ReadWriteBlocking]);
            let repair = rng.chance(0.5);
            let rules = ProofRules { repair, ..ProofRules::default() };
            let mut p = pair(&env, 40 << 16, rules, mode).await;
            p.copy().await;
            let flipped: Vec<u64> =
                (0..rng.below(4)).map(|i| ((20 + 5 * i) << 16) + rng.below(65536)).collect();
            flipped.iter().for_each(|at| p.flip(*at));
            let quit = Rc::new(Cell::new(false));
            let mut clients = Vec::new();
            for _ in 0..3 {
                let (top, env2, quit) = (p.top.clone(), p.env.clone(), quit.clone());
                let mut rng: Rng = rng.fork("client");
                clients.push(env.spawn("client", async move {
                    while !quit.get() {
                        // clear of the flipped units
                        let at = Span::new(rng.below(18 << 16), rng.between(1, 100_000));
                        let fill = vec![rng.draw() as u8; at.len as usize];
                        top.write(at, Data::from(fill), ReqFlags::NONE).await.unwrap();
                        env2.sleep(Duration::from_micros(rng.below(400))).await;
                    }
                }));
            }
            let (stop, env2) = (quit.clone(), env.clone());
            let after = Duration::from_millis(rng.between(1, 80));
            env.spawn("end", async move {
                env2.sleep(after).await;
                stop.set(true);
            });
            p.engine.run().await.unwrap();
            quit.set(true);
            for c in &clients {
                c.join().await;
            }
            // no client any more: what is left is copied and compared
            p.engine.run().await.unwrap();
            let mut named: Vec<u64> = p.desk.mismatches.borrow().iter().map(|m| m.at.start).collect();
            named.sort_unstable();
            assert_eq!(named, flipped, "repair: {repair}, {mode:?}");
            assert_eq!(p.proof.verdict().is_ok(), repair || flipped.is_empty());
            assert!(p.proof.is_settled() && p.work.in_sync());
            p.proof.seal(&env).await.unwrap();
            let equal = *p.source.bytes.borrow() == *p.target.bytes.borrow();
            assert_eq!(equal, repair || flipped.is_empty());
            let digest = equal.then(|| digest_of(&p.source.bytes.borrow()));
            assert_eq!(p.proof.report().digest, digest);
        });
    }
}

#[test]
fn zeroes_of_both_are_not_read() {
    simulate(5, |env, _| async move {
        let len = 64 << 20;
        let mut p = pair(&env, len, ProofRules::default(), Mode::Background).await;
        p.source.bytes.borrow_mut().fill(0);
        p.source.data.borrow_mut().fill(false);
        p.work.begin(&bitmap::Bitmap::new(len, 65536).unwrap());
        p.source.put(5 << 20, &[1; 4096], true);
        p.target.put(5 << 20, &[1; 4096], true);
        let before = p.target.read_bytes.get();
        p.engine.run().await.unwrap();
        let read = p.target.read_bytes.get() - before;
        assert!(read <= 2 << 20, "{read} bytes read of 4096 that are not zero");
        p.proof.seal(&env).await.unwrap();
        assert_eq!(p.proof.report().digest, Some(digest_of(&p.source.bytes.borrow())));
    });
}
