//! The state machines against the one-page oracle: a primary, two secondaries, connections that break, hosts that crash, changes that
//! are refused, a promotion while the old primary writes on. Storage is a few words of memory here (the store has tests of its own);
//! what is tested are the decisions. A run is a function of its seed: `SEED=n` repeats one.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::type_complexity,
    clippy::collapsible_match,
    clippy::collapsible_if
)]

use block::{Data, Span};
use replication::ack::{AckLevel, Quorum};
use replication::bugs::{Bug, plant};
use replication::dirty::{Dirty, GRANULE};
use replication::history::History;
use replication::primary::{self, Config, PeerState, Primary, Standing};
use replication::secondary::{self, Secondary};
use replication::wire::{Body, Frame, VolumeInfo, crc_of};
use replication::{Epoch, Generation, GroupId, Seq};
use sim::Rng;
use std::collections::{BTreeMap, VecDeque};

const BLOCKS: usize = 5;
type Image = [u8; BLOCKS];

/// The oracle: what the primary's image was at each checkpoint, and after each change.
#[derive(Default)]
struct Model {
    checkpoints: BTreeMap<(u64, u64), Image>,
    after: BTreeMap<u64, Image>,
}

/// What a secondary has on its medium, and what it does with it.
struct Host {
    core: Secondary,
    group: GroupId,
    committed: Image,
    layers: Vec<(Option<Epoch>, Vec<(usize, u8)>)>,
    durable: (Generation, History, bool),
    promoted: bool,
    /// The image with everything received, by number, in this session.
    seen: BTreeMap<u64, Image>,
    next_session: u64,
}

/// A connection, seen from the primary.
#[derive(Default)]
struct Link {
    up: Option<u64>,
    to: VecDeque<Frame>,
    from: VecDeque<Frame>,
}

struct World {
    rng: Rng,
    model: Model,
    image: Image,
    primary: Primary,
    hosts: Vec<Host>,
    links: Vec<Link>,
    sync: Vec<Vec<usize>>,
    /// The persistent record of what was written since everybody committed.
    activity: Vec<usize>,
    floor: Epoch,
    reserved: Epoch,
    acked: u64,
    promotions: u64,
    checkpoints: u64,
    /// How often something goes wrong.
    rough: f64,
}

fn volumes() -> Vec<VolumeInfo> {
    vec![VolumeInfo { len: BLOCKS as u64 * GRANULE }]
}

fn config() -> Config {
    Config { write_level: AckLevel::RemoteDurable, quorum: Quorum::Any(1), ..Config::default() }
}

fn block(at: usize) -> Span {
    Span::new(at as u64 * GRANULE, GRANULE)
}

impl Host {
    fn new(group: GroupId) -> Host {
        let core = Secondary::new(group, volumes(), Generation(0), History::none(), false);
        let durable = (Generation(0), History::none(), false);
        let (committed, layers, seen) = ([0xee; BLOCKS], vec![(None, vec![])], BTreeMap::new());
        Host { core, group, committed, layers, durable, promoted: false, seen, next_session: 1 }
    }

    fn latest(&self) -> Image {
        let mut image = self.committed;
        self.layers.iter().flat_map(|l| &l.1).for_each(|(b, v)| image[*b] = *v);
        image
    }

    fn crash(&mut self) {
        let (highest, history, promoted) = self.durable.clone();
        self.layers = vec![(None, vec![])];
        self.seen.clear();
        self.core = Secondary::new(self.group, volumes(), highest, history, promoted);
    }
}

impl World {
    fn new(seed: u64) -> World {
        let mut rng = Rng::new(seed);
        let group = GroupId::of_name("model");
        let history = History::begin(Generation(1));
        let dirty = Dirty::new(vec![BLOCKS as u64 * GRANULE], Epoch(0));
        let mut primary = Primary::new(group, volumes(), history, Epoch(0), dirty, config());
        let peers = 1 + rng.index(2);
        (0..peers).for_each(|_| {
            primary.add_peer();
        });
        World {
            rng,
            model: Model::default(),
            image: [0; BLOCKS],
            primary,
            hosts: (0..peers).map(|_| Host::new(group)).collect(),
            links: (0..peers).map(|_| Link::default()).collect(),
            sync: vec![Vec::new(); peers],
            activity: Vec::new(),
            floor: Epoch(0),
            reserved: Epoch(0),
            acked: 0,
            promotions: 0,
            checkpoints: 0,
            rough: *Rng::new(!seed).choose(&[0.02, 0.1, 0.3, 1.0]),
        }
    }

    fn primary_does(&mut self, input: primary::Input<'_>) {
        let mut out = Vec::new();
        self.primary.step(input, &mut out).unwrap();
        for o in out {
            match o {
                primary::Output::Send(p, f) => {
                    if let Body::Mark { .. } = f.body {
                        let key = (f.generation.0, f.epoch.0);
                        self.model.checkpoints.insert(key, self.image);
                        self.model.after.insert(f.seq.0, self.image);
                    }
                    self.links[p].to.push_back(f);
                }
                primary::Output::Close(p) => self.cut(p),
                primary::Output::Sync(p, bits) => {
                    self.sync[p] = (0..BLOCKS).filter(|b| bits[0].get(*b as u64 * GRANULE)).collect();
                }
                primary::Output::Clean(e) => {
                    // what was written since is in the sets of later epochs
                    let dirty = self.primary.dirty_since(e).unwrap().unwrap();
                    self.activity.retain(|b| dirty[0].get(*b as u64 * GRANULE));
                    self.floor = e;
                }
                primary::Output::Event(primary::Event::Checkpoint { .. }) => self.checkpoints += 1,
                _ => {}
            }
        }
    }

    fn cut(&mut self, p: usize) {
        let Some(id) = self.links[p].up.take() else { return };
        self.links[p].to.clear();
        self.links[p].from.clear();
        self.sync[p].clear();
        self.primary_does(primary::Input::Disconnected(p, "cut".into()));
        self.host_does(p, secondary::Input::Gone(id), None).unwrap();
    }

    fn host_does(
        &mut self,
        p: usize,
        input: secondary::Input<'_>,
        frame: Option<&Frame>,
    ) -> Result<(), String> {
        let mut out = Vec::new();
        self.hosts[p].core.step(input, &mut out);
        let mut i = 0;
        while i < out.len() {
            let o = out[i].clone();
            i += 1;
            let mut again = Vec::new();
            let host = &mut self.hosts[p];
            match o {
                secondary::Output::Send(id, f) => {
                    if self.links[p].up == Some(id) {
                        self.links[p].from.push_back(f);
                    }
                }
                secondary::Output::Close(id) => {
                    if self.links[p].up == Some(id) {
                        // what was sent before may still arrive, then the end
                        self.links[p].to.clear();
                    }
                }
                secondary::Output::Begin { session, generation } => {
                    host.durable.0 = generation;
                    host.layers = vec![(None, vec![])];
                    host.seen.clear();
                    host.core.step(secondary::Input::Begun { session, limit: u64::MAX }, &mut again);
                }
                secondary::Output::Keep => {
                    if host.promoted {
                        return Err("a frame of the old generation reached the medium (I7)".into());
                    }
                    let f = frame.unwrap();
                    let Body::Write { offset, data, .. } = &f.body else { unreachable!() };
                    let refused = self.rng.chance(self.rough * 0.02);
                    if refused {
                        let text = "no space".to_owned();
                        let input = secondary::Input::Refused { volume: 0, offset: *offset, errno: 28, text };
                        host.core.step(input, &mut again);
                    } else {
                        let b = (*offset / GRANULE) as usize;
                        host.layers.last_mut().unwrap().1.push((b, data.to_vec()[0]));
                        host.seen.insert(f.seq.0, host.latest());
                    }
                }
                secondary::Output::Flush(session) => {
                    let k = secondary::Input::Kept {
                        session,
                        durable: true,
                        applied: false,
                        limit: u64::MAX,
                        fill: 0,
                    };
                    host.core.step(k, &mut again);
                }
                secondary::Output::Prepare(e, _, history) => {
                    host.layers.last_mut().unwrap().0 = Some(e);
                    host.layers.push((None, vec![]));
                    host.durable.1 = host.durable.1.clone();
                    host.core.step(secondary::Input::Prepared(e, Ok(())), &mut again);
                    // the history that comes with the decision
                    host.seen.insert(frame.unwrap().seq.0, host.latest());
                    let _ = history;
                }
                secondary::Output::Abort(e) => {
                    if let Some(l) = host.layers.iter_mut().find(|l| l.0 == Some(e)) {
                        l.0 = None;
                    }
                }
                secondary::Output::Commit(e) => {
                    let upto = host.layers.iter().position(|l| l.0 == Some(e)).unwrap();
                    for (_, changes) in host.layers.drain(..=upto) {
                        changes.iter().for_each(|(b, v)| host.committed[*b] = *v);
                    }
                    host.core.step(secondary::Input::Decided(e), &mut again);
                    host.durable.1 = host.core.history().clone();
                }
                secondary::Output::Fenced(_)
                | secondary::Output::Vetoed(..)
                | secondary::Output::TakeOver(_)
                | secondary::Output::Hash { .. }
                | secondary::Output::SplitBrain(_) => {}
            }
            let rest = out.split_off(i);
            out.extend(again);
            out.extend(rest);
        }
        Ok(())
    }

    fn write(&mut self) {
        let b = self.rng.index(BLOCKS);
        let data = Data::copy_from(&[self.rng.draw() as u8]);
        let crc = crc_of(&data);
        let at = Span::new(block(b).start, 1);
        if !self.activity.contains(&b) {
            self.activity.push(b);
        }
        let (seq, epoch) = self.primary.admit(0, at, crc).unwrap();
        self.image[b] = data.to_vec()[0];
        self.model.after.insert(seq.0, self.image);
        let body = Body::Write { volume: 0, offset: at.start, data, crc, catch_up: false, fua: true };
        let frame = self.primary.frame(seq, epoch, body);
        for (p, link) in self.links.iter_mut().enumerate() {
            if self.primary.peers()[p].state.gets_changes() {
                link.to.push_back(frame.clone());
            }
        }
    }

    fn catch_up(&mut self, p: usize) {
        if self.primary.peers()[p].state != PeerState::Syncing {
            return;
        }
        match self.sync[p].pop() {
            Some(b) => {
                let data = Data::copy_from(&[self.image[b]]);
                let (crc, at) = (crc_of(&data), Span::new(block(b).start, 1));
                if self.primary.admit_catch_up(p, 0, at, crc) {
                    let body =
                        Body::Write { volume: 0, offset: at.start, data, crc, catch_up: true, fua: true };
                    let frame = self.primary.frame(self.primary.last(), self.primary.open_epoch(), body);
                    self.links[p].to.push_back(frame);
                }
            }
            None => self.primary_does(primary::Input::SyncDone(p)),
        }
    }

    fn restart_primary(&mut self) {
        (0..self.links.len()).for_each(|p| self.cut(p));
        let mut dirty = Dirty::new(vec![BLOCKS as u64 * GRANULE], self.floor);
        // the history on its disk may be old: only a promotion writes it
        let history = History::begin(Generation(1));
        if !replication::bugs::planted(Bug::NoActivityLog) {
            self.activity.iter().for_each(|b| dirty.mark(Epoch(u64::MAX), 0, block(*b)).unwrap());
        }
        let fenced = self.primary.fenced().is_some();
        self.primary =
            Primary::new(GroupId::of_name("model"), volumes(), history, self.reserved, dirty, config());
        self.links.iter().for_each(|_| {
            self.primary.add_peer();
        });
        assert!(!fenced || self.promotions > 0);
        self.model.after.clear();
    }

    fn act(&mut self) -> Result<(), String> {
        let p = self.rng.index(self.hosts.len());
        let trouble = self.rng.chance(self.rough);
        match self.rng.below(100) {
            94.. if !trouble => self.write(),
            0..20 => self.write(),
            20..48 => {
                if let Some(frame) = self.links[p].to.pop_front() {
                    // a defect below may lose a frame; the session must not go on as if nothing had happened
                    let lost = frame.body.is_change() && trouble && self.rng.chance(0.03);
                    if !lost {
                        let id = self.links[p].up.unwrap();
                        self.host_does(p, secondary::Input::Frame(id, &frame), Some(&frame))?;
                    }
                }
            }
            48..76 => {
                if let Some(frame) = self.links[p].from.pop_front() {
                    self.primary_does(primary::Input::Frame(p, &frame));
                }
            }
            76..86 => self.catch_up(p),
            86..90 => {
                if self.primary.open_epoch() > self.reserved {
                    self.reserved = Epoch(self.primary.open_epoch().0 + 3);
                    self.primary.reserve(self.reserved);
                }
                self.primary_does(primary::Input::Mark);
            }
            90..94 => {
                if self.links[p].up.is_none() && self.primary.peers()[p].state != PeerState::Refused {
                    let id = self.hosts[p].next_session;
                    self.hosts[p].next_session += 1;
                    self.links[p].up = Some(id);
                    self.primary_does(primary::Input::Connected(p));
                }
            }
            94..96 => self.cut(p),
            96 => {
                self.cut(p);
                self.hosts[p].crash();
            }
            97 => {
                if self.rng.chance(0.5) {
                    self.restart_primary();
                }
            }
            98 => {
                // A promotion, while the old primary knows nothing and writes on.
                let host = &mut self.hosts[p];
                if host.core.history().now().is_some() && !host.promoted && self.rng.chance(0.6) {
                    let g = Generation(host.core.highest().0 + 1 + p as u64);
                    let c = host.core.history().epoch();
                    host.promoted = true;
                    host.layers = vec![(None, vec![])];
                    self.promotions += 1;
                    self.host_does(p, secondary::Input::Promoted(g, c), None)?;
                    let host = &mut self.hosts[p];
                    host.durable = (g, host.core.history().clone(), true);
                }
            }
            _ => {}
        }
        self.check()
    }

    fn check(&mut self) -> Result<(), String> {
        for (p, host) in self.hosts.iter().enumerate() {
            let Some((g, c)) = host.core.history().now() else { continue };
            let was = if host.promoted { host.durable.1.past().last().map_or(g, |x| x.0) } else { g };
            let expected =
                self.model.checkpoints.get(&(was.0, c.0)).ok_or(format!("no checkpoint {was} {c}"))?;
            if host.committed != *expected {
                return Err(format!(
                    "I1: host {p} is not at checkpoint {c}: {:?}, not {expected:?}",
                    host.committed
                ));
            }
            if self.promotions > 0 {
                continue;
            }
            // I8, as soon as the primary knows where the peer is
            let Some(known) = self.primary.peers()[p].committed else { continue };
            if let Some(dirty) = self.primary.dirty_since(known).unwrap() {
                for b in 0..BLOCKS {
                    if self.image[b] != host.committed[b] && !dirty[0].get(block(b).start) {
                        return Err(format!("I8: block {b} differs on host {p} and is not dirty"));
                    }
                }
            }
        }
        // I5 and I10: what counts as done is somewhere else as well, or everybody was told
        let last = self.primary.last();
        for seq in (self.acked + 1)..=last.0 {
            if self.primary.standing(Seq(seq), AckLevel::RemoteDurable) != Standing::Done
                || self.primary.fenced().is_some()
            {
                break;
            }
            self.acked = seq;
            if self.primary.degraded() || self.promotions > 0 {
                continue;
            }
            let held = self.hosts.iter().any(|h| {
                h.seen.range(seq..).next().is_some_and(|(n, image)| self.model.after.get(n) == Some(image))
            });
            let any_counts = self.primary.peers().iter().any(|p| p.state.gets_changes());
            if !held && any_counts && self.model.after.contains_key(&seq) {
                return Err(format!("I5: change {seq} is done and no secondary could be brought to it"));
            }
        }
        if last.0 < self.acked {
            self.acked = last.0; // a restarted primary counts anew
        }
        Ok(())
    }
}

fn run(seed: u64) -> Result<(u64, u64), String> {
    let mut w = World::new(seed);
    w.primary_does(primary::Input::Configure(config()));
    for _ in 0..700 {
        w.act()?;
    }
    Ok((w.checkpoints, w.promotions))
}

fn seeds() -> (u64, u64) {
    let one = std::env::var("SEED").ok().and_then(|s| s.parse().ok());
    let many = std::env::var("SEEDS").ok().and_then(|s| s.parse().ok()).unwrap_or(1000);
    one.map_or((1, many), |s| (s, 1))
}

#[test]
fn the_secondary_is_always_at_a_checkpoint_and_nothing_owed_is_forgotten() {
    let (from, count) = seeds();
    let (mut checkpoints, mut promotions) = (0, 0);
    for seed in from..from + count {
        match run(seed) {
            Ok((c, p)) => (checkpoints, promotions) = (checkpoints + c, promotions + p),
            Err(e) => panic!("SEED={seed}: {e}"),
        }
    }
    println!("seeds {from}..{}: {checkpoints} checkpoints, {promotions} promotions", from + count);
    assert!(
        count == 1 || (checkpoints > count && promotions > count / 20),
        "the runs must reach what they test"
    );
}

#[test]
fn every_removed_rule_is_found() {
    for bug in Bug::CORE {
        plant(Some(bug));
        let found = (1..20_000).find_map(|seed| run(seed).err().map(|e| (seed, e)));
        plant(None);
        let (seed, e) = found.unwrap_or_else(|| panic!("{bug:?} was not found"));
        println!("{bug:?}: seed {seed}: {e}");
    }
}

/// X9: a secondary takes a group over only if it holds exactly the checkpoint that it is given it at.
#[test]
fn a_group_is_taken_over_only_at_the_checkpoint_it_is_handed_over_at() {
    use replication::secondary::{Input, Output, Secondary};
    use replication::wire::{Body, Frame, HandOver, Hello};
    let group = GroupId::of_name("model");
    let mut history = History::begin(Generation(1));
    history.advance(Epoch(4));
    let hand = HandOver {
        name: "a".into(),
        address: "a:1".into(),
        write_level: AckLevel::Local,
        flush_level: AckLevel::RemoteDurable,
        min_acks: 1,
        policy: primary::LinkPolicy::Degrade,
        interval_ms: 0,
        timeout_ms: 1000,
    };
    let ask = |epoch: u64, change: bool, session: u64| {
        let mut s = Secondary::new(group, volumes(), Generation(1), history.clone(), false);
        let mut out = Vec::new();
        let frame =
            |seq, epoch, body| Frame { generation: Generation(1), seq: Seq(seq), epoch: Epoch(epoch), body };
        let hello = Hello { group, history: history.clone(), volumes: volumes() };
        s.step(Input::Frame(1, &frame(0, 5, Body::Hello(Box::new(hello)))), &mut out);
        s.step(Input::Begun { session: 1, limit: u64::MAX }, &mut out);
        s.step(Input::Frame(1, &frame(7, 5, Body::Flush)), &mut out);
        if change {
            let body = Body::Zero { volume: 0, at: block(1), unmap: true, catch_up: false };
            s.step(Input::Frame(1, &frame(8, 5, body)), &mut out);
        }
        let asked = frame(7 + u64::from(change), epoch, Body::HandOver(Box::new(hand.clone())));
        s.step(Input::Frame(session, &asked), &mut out);
        out.iter().any(|o| matches!(o, Output::TakeOver(h) if **h == hand))
    };
    assert!(ask(4, false, 1));
    assert!(!ask(3, false, 1) && !ask(5, false, 1), "another checkpoint");
    assert!(!ask(4, true, 1), "there is more");
    assert!(!ask(4, false, 2), "not the primary");
}
