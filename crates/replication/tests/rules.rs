//! Single rules of the state machines, each with the cases that decide it: who may take a group over, what a former owner is believed, who
//! is fenced when two owners meet, for what a secondary is waited for. (What they do together: `core.rs`.)
#![allow(missing_docs, clippy::unwrap_used)]

mod model;

use block::Span;
use model::{BLOCKS, block, config, hand, volumes};
use replication::ack::AckLevel;
use replication::digest::Digest;
use replication::dirty::{Dirty, GRANULE};
use replication::history::History;
use replication::primary::{self, Primary};
use replication::wire::{Body, Doubt, Frame};
use replication::{Epoch, Generation, GroupId, Seq};
use std::slice;

/// X9: a secondary takes a group over only if it holds exactly the checkpoint that it is given it at.
#[test]
fn a_group_is_taken_over_only_at_the_checkpoint_it_is_handed_over_at() {
    use replication::secondary::{Input, Output, Secondary};
    use replication::wire::{Body, Frame, Hello};
    let group = GroupId::of_name("model");
    let mut history = History::begin(Generation(1));
    history.advance(Epoch(3));
    let hand = hand();
    // what comes behind checkpoint 4, the first of the session, if that comes; who asks then, with which last number
    let ask = |epoch: u64, behind: &[Body], session: u64, lost: u64| {
        let mut s = Secondary::new(group, volumes(BLOCKS), Generation(1), history.clone(), false);
        let mut out = Vec::new();
        let frame =
            |seq, epoch, body| Frame { generation: Generation(1), seq: Seq(seq), epoch: Epoch(epoch), body };
        let hello = Hello { group, history: history.clone(), volumes: volumes(BLOCKS) };
        s.step(Input::Frame(1, &frame(0, 5, Body::Hello(Box::new(hello)))), &mut out);
        s.step(Input::Begun { session: 1, limit: u64::MAX, doubt: Doubt::none() }, &mut out);
        s.step(Input::Frame(1, &frame(7, 4, Body::Flush)), &mut out);
        let mut seq = 7;
        if epoch >= 4 {
            seq += 1;
            s.step(Input::Frame(1, &frame(seq, 4, Body::Mark { digest: Digest::default() })), &mut out);
            s.step(Input::Prepared(Epoch(4), Ok(())), &mut out);
            s.step(Input::Frame(1, &frame(seq, 4, Body::Commit)), &mut out);
            s.step(Input::Decided(Epoch(4)), &mut out);
        }
        for body in behind {
            seq += u64::from(*body != Body::Abort);
            s.step(Input::Frame(1, &frame(seq, 5, body.clone())), &mut out);
            if matches!(body, Body::Mark { .. }) {
                s.step(Input::Prepared(Epoch(5), Ok(())), &mut out);
            }
        }
        s.step(
            Input::Frame(session, &frame(seq + lost, epoch, Body::HandOver(Box::new(hand.clone())))),
            &mut out,
        );
        out.iter().any(|o| matches!(o, Output::TakeOver(h) if **h == hand))
    };
    let change = Body::Zero { volume: 0, at: block(1), unmap: true, catch_up: false };
    let mut digest = Digest::default();
    digest.add(Seq(9), 0, block(1).start, GRANULE as u32, 0);
    let empty = Body::Mark { digest: Digest::default() };
    assert!(ask(4, &[], 1, 0));
    assert!(ask(4, &[empty, Body::Abort], 1, 0), "an epoch without changes that was aborted");
    assert!(!ask(3, &[], 1, 0), "it may have missed something since");
    assert!(!ask(5, &[], 1, 0), "another checkpoint");
    assert!(!ask(4, slice::from_ref(&change), 1, 0), "there is more");
    assert!(!ask(4, &[], 1, 1), "there was more, which never came");
    assert!(
        !ask(4, &[change, Body::Mark { digest }, Body::Abort], 1, 0),
        "what was aborted goes on in the next"
    );
    assert!(!ask(4, &[], 2, 0), "not the primary");
}

/// L8: a former owner's disks are brought up to date by what either side has written since the paths parted, if its marks reach back so
/// far; and else by everything.
#[test]
fn a_former_owner_is_believed_only_as_far_as_its_marks_reach_back() {
    use replication::primary::{Input, Output};
    use replication::wire::Welcome;
    let group = GroupId::of_name("model");
    // this side was promoted at checkpoint 4, and has written block 2 since
    let mut history = History::begin(Generation(1));
    history.advance(Epoch(4));
    let mut theirs = history.clone();
    history.promote(Generation(2), Epoch(4));
    theirs.advance(Epoch(9));
    let welcomed = |has: History, former: Option<(History, Epoch)>, places: Option<Vec<(u16, Span)>>| {
        let mut dirty = Dirty::new(vec![BLOCKS as u64 * GRANULE], Epoch(4));
        dirty.mark(Epoch(5), 0, block(2)).unwrap();
        let mut p = Primary::new(group, volumes(BLOCKS), history.clone(), Epoch(4), dirty, config());
        // a growth that did not come about
        p.admit_resize(0, (BLOCKS as u64 + 1) * GRANULE).unwrap();
        assert_eq!(p.cannot_mark(), Some("a disk is being resized"), "one side could commit it alone");
        p.not_resized(0, BLOCKS as u64 * GRANULE);
        p.resize_ends();
        assert_ne!(p.cannot_mark(), Some("a disk is being resized"));
        p.add_peer();
        let mut out = Vec::new();
        p.step(Input::Connected(0), &mut out).unwrap();
        let welcome = Welcome { history: has, limit: 0, doubt: Doubt { former, places } };
        let frame = Frame {
            generation: Generation(2),
            seq: Seq(0),
            epoch: Epoch(0),
            body: Body::Welcome(Box::new(welcome)),
        };
        p.step(Input::Frame(0, &frame), &mut out).unwrap();
        let sync = out.iter().find_map(|o| if let Output::Sync(0, bits) = o { Some(bits) } else { None });
        let bits = &sync.unwrap()[0];
        (0..=BLOCKS).filter(|b| bits.get(block(*b).start)).collect::<Vec<_>>()
    };
    let blocks = |former, places| welcomed(History::none(), former, places);
    let all: Vec<usize> = (0..BLOCKS).collect();
    let its = || Some(vec![(0, block(4))]);
    assert_eq!(blocks(Some((theirs.clone(), Epoch(4))), its()), [2, 4]);
    assert_eq!(blocks(Some((theirs.clone(), Epoch(3))), its()), [2, 4]);
    assert_eq!(
        blocks(Some((theirs.clone(), Epoch(5))), its()),
        all,
        "its marks begin after the paths parted"
    );
    assert_eq!(blocks(Some((theirs.clone(), Epoch(4))), None), all, "it does not know what it wrote");
    assert_eq!(blocks(Some((History::begin(Generation(7)), Epoch(0))), its()), all, "unrelated");
    assert_eq!(blocks(None, its()), all);
    let behind = Some(vec![(0, block(4)), (0, block(BLOCKS))]);
    assert_eq!(blocks(Some((theirs.clone(), Epoch(4))), behind), [2, 4], "its disk was longer");
    // a secondary that had more than the one that took over
    let back = |since, places| welcomed(theirs.clone(), Some((theirs.clone(), Epoch(since))), places);
    assert_eq!(back(4, its()), [2, 4]);
    assert_eq!(back(5, its()), all, "it does not know what it had at checkpoint 4");
    assert_eq!(welcomed(theirs.clone(), None, its()), all);
}

/// I7, L9: two owners of a group meet, and each decides alone. Whatever their paths: who was succeeded is fenced, whichever of the two came
/// to the other; of two that were both promoted neither is; nobody is by somebody else's image.
#[test]
fn owners_that_meet_agree_who_was_left_behind() {
    use replication::primary::Output;
    use replication::wire::{Hello, Reject};
    let group = GroupId::of_name("model");
    let at = |parts: &[(u64, u64)]| {
        let mut parts: Vec<_> = parts.iter().map(|(g, e)| (Generation(*g), Epoch(*e))).collect();
        let now = parts.pop();
        History::from_parts(parts, now).unwrap()
    };
    let owner = |h: &History| {
        let dirty = Dirty::new(vec![BLOCKS as u64 * GRANULE], h.epoch());
        Primary::new(group, volumes(BLOCKS), h.clone(), h.epoch(), dirty, config())
    };
    // what the first does when the second comes
    let meets = |a: &History, b: &History| {
        let (mut p, mut out) = (owner(a), Vec::new());
        let (why, _) = p.meet(&Hello { group, history: b.clone(), volumes: volumes(BLOCKS) }, &mut out);
        let split = out.iter().any(|o| matches!(o, Output::Event(primary::Event::SplitBrain { .. })));
        assert_eq!(split, why == Reject::SplitBrain);
        (p.fenced(), why)
    };
    let old = at(&[(1, 7)]);
    // promoted at its checkpoint, at an older one, at one that its record does not name yet, and once more since
    for new in [&[(1, 7), (9, 8)][..], &[(1, 5), (9, 5)], &[(1, 8), (9, 8)], &[(1, 7), (5, 9), (9, 9)]] {
        let new = at(new);
        assert_eq!(meets(&old, &new), (Some(Generation(9)), Reject::Busy), "{new:?}");
        assert_eq!(meets(&new, &old), (None, Reject::Fenced(Generation(9))), "{new:?}");
    }
    let (a, b) = (at(&[(1, 7), (9, 8)]), at(&[(1, 7), (10, 9)]));
    assert_eq!(meets(&a, &b), (None, Reject::SplitBrain));
    assert_eq!(meets(&b, &a), (None, Reject::SplitBrain));
    assert_eq!(meets(&old, &old), (None, Reject::Busy));
    assert_eq!(meets(&old, &at(&[(2, 7), (9, 8)])), (None, Reject::Unrelated));
    let (mut p, mut out) = (owner(&old), Vec::new());
    let stranger = Hello { group: GroupId::of_name("other"), history: a.clone(), volumes: volumes(BLOCKS) };
    assert_eq!(p.meet(&stranger, &mut out).0, Reject::WrongGroup);
    // while it hands over, only who took over at exactly this checkpoint is the answer
    p.hands_over(true);
    let stray = Hello { group, history: at(&[(1, 5), (9, 5)]), volumes: volumes(BLOCKS) };
    assert_eq!((p.meet(&stray, &mut out).0, p.fenced()), (Reject::Busy, None));
    p.meet(&Hello { group, history: a, volumes: volumes(BLOCKS) }, &mut out);
    assert_eq!(p.fenced(), Some(Generation(9)));
}

/// L1: what a user waits for, and is for a secondary to do, is told from what waits for somebody else.
#[test]
fn a_secondary_owes_what_is_for_it_to_do() {
    use AckLevel::{RemoteApplied, RemoteDurable, RemoteReceived};
    use replication::primary::Input;
    use replication::wire::{Ack, Welcome};
    let group = GroupId::of_name("model");
    let history = History::begin(Generation(1));
    let dirty = Dirty::new(vec![BLOCKS as u64 * GRANULE], Epoch(0));
    let mut p = Primary::new(group, volumes(BLOCKS), history, Epoch(0), dirty, config());
    p.add_peer();
    p.reserve(Epoch(10));
    let says = |p: &mut Primary, epoch: u64, body: Body| {
        let frame = Frame { generation: Generation(1), seq: Seq(0), epoch: Epoch(epoch), body };
        p.step(Input::Frame(0, &frame), &mut Vec::new()).unwrap();
    };
    let committed = Body::Committed { epoch_digest: Digest::default() };
    let ack = |n: [u64; 4]| {
        let [received, written, durable, applied] = n.map(Seq);
        Body::Ack(Ack { received, written, durable, applied, limit: 0, fill: 0 })
    };
    p.step(Input::Connected(0), &mut Vec::new()).unwrap();
    let welcome = Welcome { history: History::none(), limit: 0, doubt: Doubt::none() };
    says(&mut p, 0, Body::Welcome(Box::new(welcome)));
    p.step(Input::SyncDone(0), &mut Vec::new()).unwrap();
    assert_eq!(p.owes(0, Seq(1), RemoteReceived), None, "it is no copy yet");
    p.step(Input::Mark { external: false }, &mut Vec::new()).unwrap();
    says(&mut p, 1, Body::Prepared);
    says(&mut p, 1, committed.clone());
    let (seq, _) = p.admit(0, block(0), 0).unwrap();
    for level in [RemoteReceived, RemoteDurable, RemoteApplied] {
        assert!(p.owes(0, seq, level).is_some(), "{level:?}");
    }
    says(&mut p, 0, ack([seq.0, seq.0, 0, 0]));
    assert_eq!(p.owes(0, seq, RemoteReceived), None);
    let stuck = p.owes(0, seq, RemoteDurable);
    // more that it receives does not bring the first further
    let (next, _) = p.admit(0, block(1), 0).unwrap();
    says(&mut p, 0, ack([next.0, next.0, 0, 0]));
    assert!(stuck.is_some() && p.owes(0, seq, RemoteDurable) == stuck);
    assert_eq!(p.owes(0, seq, RemoteApplied), None, "nobody has asked for a checkpoint");
    p.step(Input::Mark { external: true }, &mut Vec::new()).unwrap();
    let marked = p.owes(0, seq, RemoteApplied);
    assert!(marked.is_some(), "it has to prepare it");
    says(&mut p, 2, Body::Prepared);
    assert_eq!(p.owes(0, seq, RemoteApplied), None, "the manager has to decide");
    p.step(Input::Decide(Epoch(2), Ok(())), &mut Vec::new()).unwrap();
    let decided = p.owes(0, seq, RemoteApplied);
    assert!(decided.is_some() && decided != marked);
    says(&mut p, 2, committed);
    let behind = p.owes(0, seq, RemoteApplied);
    assert!(behind.is_some() && behind != decided, "it has to bring it to its disk");
    says(&mut p, 0, ack([next.0, next.0, next.0, next.0]));
    assert_eq!(p.owes(0, seq, RemoteApplied), None);
}

/// L6: who catches up goes on while others make checkpoints: the number of a mark that is not for it is not missing. What was lost is.
#[test]
fn checkpoints_of_others_do_not_set_back_who_catches_up() {
    use replication::primary::{Input, Output, PeerState};
    use replication::secondary::{self, Secondary};
    use replication::wire::Welcome;
    use std::collections::VecDeque;
    let group = GroupId::of_name("model");
    // which of the changes never comes, if one does not; what the second secondary says last
    let run = |lost: Option<usize>| {
        let dirty = Dirty::new(vec![BLOCKS as u64 * GRANULE], Epoch(0));
        let history = History::begin(Generation(1));
        let mut p = Primary::new(group, volumes(BLOCKS), history, Epoch(0), dirty, config());
        let mut s = Secondary::new(group, volumes(BLOCKS), Generation(0), History::none(), false);
        let (copy, late) = (p.add_peer(), p.add_peer());
        p.reserve(Epoch(10));
        let says = |p: &mut Primary, peer, epoch, body| {
            let (generation, seq, epoch) = (Generation(1), Seq(0), Epoch(epoch));
            let mut out = Vec::new();
            p.step(Input::Frame(peer, &Frame { generation, seq, epoch, body }), &mut out).unwrap();
            out
        };
        let committed = || Body::Committed { epoch_digest: Digest::default() };
        p.step(Input::Connected(copy), &mut Vec::new()).unwrap();
        let welcome = Welcome { history: History::none(), limit: 0, doubt: Doubt::none() };
        says(&mut p, copy, 0, Body::Welcome(Box::new(welcome)));
        p.step(Input::SyncDone(copy), &mut Vec::new()).unwrap();
        p.step(Input::Mark { external: false }, &mut Vec::new()).unwrap();
        says(&mut p, copy, 1, Body::Prepared);
        says(&mut p, copy, 1, committed());
        // the second one does what it is told, until there is nothing more, or it ends the session
        let goes_on = |p: &mut Primary, s: &mut Secondary, out: Vec<Output>| {
            let mut to: VecDeque<Output> = out.into();
            while let Some(o) = to.pop_front() {
                let Output::Send(1, frame) = o else { continue };
                let mut all = Vec::new();
                s.step(secondary::Input::Frame(1, &frame), &mut all);
                let mut all: VecDeque<_> = all.into();
                while let Some(o) = all.pop_front() {
                    let mut more = Vec::new();
                    match o {
                        secondary::Output::Begin { session, .. } => {
                            let doubt = Doubt::none();
                            s.step(secondary::Input::Begun { session, limit: 0, doubt }, &mut more);
                        }
                        secondary::Output::Prepare(e, ..) => {
                            s.step(secondary::Input::Prepared(e, Ok(())), &mut more);
                        }
                        secondary::Output::Commit(e) => s.step(secondary::Input::Decided(e), &mut more),
                        secondary::Output::Send(_, f) => {
                            let mut out = Vec::new();
                            p.step(Input::Frame(late, &f), &mut out).unwrap();
                            to.extend(out);
                        }
                        _ => {}
                    }
                    all.extend(more);
                }
            }
        };
        let step = |p: &mut Primary, s: &mut Secondary, input: Input<'_>| {
            let mut out = Vec::new();
            p.step(input, &mut out).unwrap();
            goes_on(p, s, out);
        };
        step(&mut p, &mut s, Input::Connected(late));
        assert_eq!(p.peers()[late].state, PeerState::Syncing);
        for i in 0..4 {
            let (seq, epoch) = p.admit(0, block(i), 0).unwrap();
            let change = Body::Zero { volume: 0, at: block(i), unmap: true, catch_up: false };
            if p.peers()[late].state.gets_changes() && lost != Some(i) {
                let frame = p.frame(seq, epoch, change);
                goes_on(&mut p, &mut s, vec![Output::Send(late, frame)]);
            }
            // a guest's flush
            let flush = p.frame(p.last(), p.open_epoch(), Body::Flush);
            goes_on(&mut p, &mut s, vec![Output::Send(late, flush)]);
            let epoch = p.open_epoch().0;
            step(&mut p, &mut s, Input::Mark { external: false });
            says(&mut p, copy, epoch, Body::Prepared);
            says(&mut p, copy, epoch, committed());
        }
        assert_eq!(p.last_checkpoint().map(|c| c.0), Some(Epoch(5)), "the others go on");
        step(&mut p, &mut s, Input::SyncDone(late));
        let epoch = p.open_epoch().0;
        step(&mut p, &mut s, Input::Mark { external: false });
        let out = says(&mut p, copy, epoch, Body::Prepared);
        goes_on(&mut p, &mut s, out);
        (p.peers()[late].state, s.history().epoch())
    };
    assert_eq!(run(None), (PeerState::Running, Epoch(6)));
    for lost in 0..4 {
        assert_eq!(run(Some(lost)), (PeerState::Down, Epoch(0)), "{lost}");
    }
}
