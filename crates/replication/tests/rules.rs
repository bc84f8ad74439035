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

/// X9: a secondary takes a group over only if it holds exactly the checkpoint that it is given it at.
#[test]
fn a_group_is_taken_over_only_at_the_checkpoint_it_is_handed_over_at() {
    use replication::secondary::{Input, Output, Secondary};
    use replication::wire::{Body, Frame, Hello};
    let group = GroupId::of_name("model");
    let mut history = History::begin(Generation(1));
    history.advance(Epoch(3));
    let hand = hand();
    let ask = |epoch: u64, change: bool, session: u64| {
        let mut s = Secondary::new(group, volumes(BLOCKS), Generation(1), history.clone(), false);
        let mut out = Vec::new();
        let frame =
            |seq, epoch, body| Frame { generation: Generation(1), seq: Seq(seq), epoch: Epoch(epoch), body };
        let hello = Hello { group, history: history.clone(), volumes: volumes(BLOCKS) };
        s.step(Input::Frame(1, &frame(0, 5, Body::Hello(Box::new(hello)))), &mut out);
        s.step(Input::Begun { session: 1, limit: u64::MAX, doubt: Doubt::none() }, &mut out);
        s.step(Input::Frame(1, &frame(7, 4, Body::Flush)), &mut out);
        if epoch >= 4 {
            s.step(Input::Frame(1, &frame(8, 4, Body::Mark { digest: Digest::default() })), &mut out);
            s.step(Input::Prepared(Epoch(4), Ok(())), &mut out);
            s.step(Input::Frame(1, &frame(8, 4, Body::Commit)), &mut out);
            s.step(Input::Decided(Epoch(4)), &mut out);
        }
        if change {
            let body = Body::Zero { volume: 0, at: block(1), unmap: true, catch_up: false };
            s.step(Input::Frame(1, &frame(9, 5, body)), &mut out);
        }
        let asked = frame(8 + u64::from(change), epoch, Body::HandOver(Box::new(hand.clone())));
        s.step(Input::Frame(session, &asked), &mut out);
        out.iter().any(|o| matches!(o, Output::TakeOver(h) if **h == hand))
    };
    assert!(ask(4, false, 1));
    assert!(!ask(3, false, 1), "it may have missed something since");
    assert!(!ask(5, false, 1), "another checkpoint");
    assert!(!ask(4, true, 1), "there is more");
    assert!(!ask(4, false, 2), "not the primary");
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
    let blocks = |former: Option<(History, Epoch)>, places: Option<Vec<(u16, Span)>>| {
        let mut dirty = Dirty::new(vec![BLOCKS as u64 * GRANULE], Epoch(4));
        dirty.mark(Epoch(5), 0, block(2)).unwrap();
        let mut p = Primary::new(group, volumes(BLOCKS), history.clone(), Epoch(4), dirty, config());
        p.add_peer();
        let mut out = Vec::new();
        p.step(Input::Connected(0), &mut out).unwrap();
        let welcome = Welcome { history: History::none(), limit: 0, doubt: Doubt { former, places } };
        let frame = Frame {
            generation: Generation(2),
            seq: Seq(0),
            epoch: Epoch(0),
            body: Body::Welcome(Box::new(welcome)),
        };
        p.step(Input::Frame(0, &frame), &mut out).unwrap();
        let sync = out.iter().find_map(|o| if let Output::Sync(0, bits) = o { Some(bits) } else { None });
        let bits = &sync.unwrap()[0];
        (0..BLOCKS).filter(|b| bits.get(block(*b).start)).collect::<Vec<_>>()
    };
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
