//! The store on disks that crash: at any moment the process is killed or the power fails, and of what was not made durable any part
//! survives. Afterwards the image is exactly a checkpoint (the one acknowledged, or the one being decided), of all volumes the
//! same one and as long as that, with the own writes that were flushed. `SEED=n` repeats a run; `SEEDS=n` runs more.
// Volumes and sectors count through several tables at once.
#![allow(missing_docs, clippy::unwrap_used, clippy::needless_range_loop)]

use block::{Data, Span};
use env::{Env, OpenMode};
use replication::bugs::{Bug, plant};
use replication::digest::Digest;
use replication::history::History;
use replication::store::{Change, Engine, FileVolume, NewStore, Role, Store, Volume};
use replication::{Epoch, Generation, GroupId};
use sim::{Image, Rng, World};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

const SECTOR: u64 = 512;
/// The longest that a volume becomes, and where it begins; what is behind its end counts as zero.
const SECTORS: usize = 96;
const FIRST: usize = 64;
const VOLUMES: usize = 2;
type Content = Vec<[u8; SECTORS]>;

/// What a sector of the front may read as: values in order, and how many of the last ones are still possible.
#[derive(Clone)]
struct Line {
    values: Vec<u8>,
    settled: usize,
}

/// Own writes of a sector since the checkpoint: the values, and from which on they are flushed.
#[derive(Clone, Default)]
struct Own {
    values: Vec<u8>,
    completed: usize,
    flushed: Option<usize>,
}

struct Model {
    primary: Content,
    /// Its lengths in sectors.
    lens: [usize; VOLUMES],
    checkpoints: BTreeMap<u64, Content>,
    lengths: BTreeMap<u64, [usize; VOLUMES]>,
    acked: u64,
    trying: Option<u64>,
    /// Own writes stay or go, and the checkpoint.
    promoting: Option<(bool, u64)>,
    promoted: bool,
    /// Checkpoints that were offered when the last life ended, and how many are kept beside the newest.
    offered: (Vec<u64>, u64),
    own: Vec<Vec<Own>>,
    lines: Vec<Vec<Line>>,
    next: u64,
    /// Counts what took own writes away, and the own write that is under way.
    views: u64,
    writing: Option<(usize, std::ops::Range<usize>, u8)>,
    wrong: Option<String>,
    /// How often it was asked where the image differs from an older checkpoint, and said so.
    went_back: u64,
}

impl Model {
    fn front_is(&mut self, content: &Content) {
        for (v, sectors) in content.iter().enumerate() {
            for (s, b) in sectors.iter().enumerate() {
                self.lines[v][s] = Line { values: vec![*b], settled: 0 };
            }
        }
    }

    /// What users see is this from here on, with the own write over it that is under way, or without.
    fn shows(&mut self, content: &Content) {
        self.views += 1;
        self.own = vec![vec![Own::default(); SECTORS]; VOLUMES];
        for (v, sectors) in content.iter().enumerate() {
            for (s, b) in sectors.iter().enumerate() {
                let line = &mut self.lines[v][s];
                line.values.push(*b);
                line.settled = line.values.len() - 1;
            }
        }
        if let Some((v, at, fill)) = self.writing.clone() {
            for s in at {
                self.own[v][s].values.push(fill);
                self.lines[v][s].values.push(fill);
            }
        }
    }
}

struct Life {
    env: Env,
    store: Rc<Store>,
    model: Rc<RefCell<Model>>,
    rng: RefCell<Rng>,
    /// One decision or promotion at a time.
    quiet: env::sync::Semaphore,
}

fn some_span(rng: &mut Rng, lens: [usize; VOLUMES]) -> (usize, usize, usize) {
    let (v, len) = (rng.index(VOLUMES), 1 + rng.index(12));
    (v, rng.index(lens[v] - len), len)
}

fn bytes_long(lens: [usize; VOLUMES]) -> Vec<u64> {
    lens.iter().map(|n| *n as u64 * SECTOR).collect()
}

fn sectors_long(lens: &[u64]) -> [usize; VOLUMES] {
    [0, 1].map(|v| (lens[v] / SECTOR) as usize)
}

fn bytes_of(values: &[u8]) -> Data {
    Data::from(values.iter().flat_map(|b| [*b; SECTOR as usize]).collect::<Vec<u8>>())
}

fn span_of(at: usize, len: usize) -> Span {
    Span::new(at as u64 * SECTOR, len as u64 * SECTOR)
}

impl Life {
    fn draw<T>(&self, f: impl FnOnce(&mut Rng) -> T) -> T {
        f(&mut self.rng.borrow_mut())
    }

    /// A decision that is shown is durable.
    fn learn(&self) {
        let now = self.store.history().epoch().0;
        let m = &mut *self.model.borrow_mut();
        if self.store.role() == Role::Secondary && m.trying == Some(now) {
            (m.acked, m.trying) = (now, None);
            let content = m.checkpoints[&now].clone();
            m.shows(&content);
        }
    }

    fn shown(&self) -> [usize; VOLUMES] {
        sectors_long(&self.store.lens())
    }

    /// The primary: a session, changes, checkpoints.
    async fn primary(self: Rc<Life>) {
        let lens = self.model.borrow().lens;
        let begun = self.store.role() == Role::Secondary;
        if !begun || self.store.begin(Generation(1), &bytes_long(lens)).await.is_err() {
            return;
        }
        // the catch-up
        let all = self.model.borrow().primary.clone();
        for (v, sectors) in all.iter().enumerate() {
            let data = bytes_of(&sectors[..lens[v]]);
            let c = Change { volume: v as u16, at: span_of(0, lens[v]), data };
            if self.store.keep(&[c]).await.is_err() {
                return;
            }
        }
        loop {
            if self.draw(|r| r.chance(0.1)) {
                let v = self.draw(|r| r.index(VOLUMES));
                let now = self.model.borrow().lens[v];
                let to = now + self.draw(|r| r.index(SECTORS - now + 1));
                if to > now && self.store.resize(v as u16, to as u64 * SECTOR).await.is_err() {
                    return;
                }
                self.model.borrow_mut().lens[v] = to;
            }
            let lens = self.model.borrow().lens;
            let mut batch = Vec::new();
            for _ in 0..1 + self.draw(|r| r.below(4)) {
                let ((v, at, len), fill) = self.draw(|r| (some_span(r, lens), r.draw() as u8));
                let zero = fill < 40;
                let fill = if zero { 0 } else { fill };
                self.model.borrow_mut().primary[v][at..at + len].fill(fill);
                let data = if zero { Data::empty() } else { bytes_of(&vec![fill; len]) };
                batch.push(Change { volume: v as u16, at: span_of(at, len), data });
            }
            if self.store.keep(&batch).await.is_err() {
                return;
            }
            if self.draw(|r| r.chance(0.4)) {
                self.clone().checkpoint().await;
            }
        }
    }

    /// The epoch ends; what follows waits for stable storage, while the primary goes on.
    async fn checkpoint(self: Rc<Life>) {
        let (epoch, content) = {
            let mut m = self.model.borrow_mut();
            m.next += 1;
            let (next, lens) = (m.next, m.lens);
            m.lengths.insert(next, lens);
            (next, m.primary.clone())
        };
        let mut history = History::begin(Generation(1));
        history.advance(Epoch(epoch));
        self.model.borrow_mut().checkpoints.insert(epoch, content.clone());
        if self.store.seal(Epoch(epoch), Digest::default(), history).await.is_err() {
            return;
        }
        if self.draw(|r| r.chance(0.3)) {
            return self.decide(epoch, content).await;
        }
        let life = self.clone();
        self.env.spawn("decision", async move { life.decide(epoch, content).await });
    }

    async fn decide(self: Rc<Life>, epoch: u64, content: Content) {
        self.store.harden().await;
        if self.draw(|r| r.chance(0.2)) {
            let _ = self.store.abort(Epoch(epoch)).await;
            return;
        }
        let _quiet = self.quiet.acquire(1).await;
        if !self.store.prepared().iter().any(|p| p.0 == Epoch(epoch)) {
            // a later one was decided, and this one with it; or this side has taken over
            return;
        }
        {
            let mut m = self.model.borrow_mut();
            m.trying = Some(epoch);
            for v in 0..VOLUMES {
                for s in 0..SECTORS {
                    m.lines[v][s].values.push(content[v][s]);
                }
            }
        }
        if self.store.decide(Epoch(epoch)).await.is_err() {
            self.model.borrow_mut().trying = None;
            return;
        }
        while self.store.is_deciding() {
            self.store.harden().await;
        }
        self.learn();
    }

    /// The user of this side writes and flushes.
    async fn own(self: Rc<Life>) {
        loop {
            let pause = self.draw(|r| r.duration(Duration::from_micros(20), Duration::from_millis(5)));
            self.env.sleep(pause).await;
            self.learn();
            let view = self.model.borrow().views;
            if self.draw(|r| r.chance(0.3)) {
                let marks: Vec<Vec<usize>> =
                    self.model.borrow().own.iter().map(|v| v.iter().map(|o| o.completed).collect()).collect();
                if self.store.own_flush().await.is_err() {
                    continue;
                }
                self.learn();
                let mut m = self.model.borrow_mut();
                if m.views != view {
                    continue;
                }
                for (v, marks) in marks.iter().enumerate() {
                    for (s, done) in marks.iter().enumerate().filter(|x| *x.1 > 0) {
                        m.own[v][s].flushed = Some(done - 1);
                    }
                }
                continue;
            }
            let shown = self.shown();
            let ((v, at, len), fill) = self.draw(|r| (some_span(r, shown), r.draw() as u8));
            {
                let m = &mut *self.model.borrow_mut();
                m.writing = Some((v, at..at + len, fill));
                for s in at..at + len {
                    m.own[v][s].values.push(fill);
                    m.lines[v][s].values.push(fill);
                }
            }
            let done = self.store.own_write(v as u16, span_of(at, len), bytes_of(&vec![fill; len])).await;
            self.learn();
            let m = &mut *self.model.borrow_mut();
            m.writing = None;
            // else it may be of the view before
            if done.is_err() || m.views != view {
                continue;
            }
            for s in at..at + len {
                m.own[v][s].completed = m.own[v][s].values.len();
                if m.trying.is_none() && m.promoting.is_none() {
                    m.lines[v][s].settled = m.lines[v][s].values.len() - 1;
                }
            }
        }
    }

    /// The user of this side reads, all the time (I2).
    async fn reader(self: Rc<Life>) {
        loop {
            self.learn();
            let shown = self.shown();
            let (v, at, len) = self.draw(|r| some_span(r, shown));
            let before: Vec<usize> =
                self.model.borrow().lines[v][at..at + len].iter().map(|l| l.settled).collect();
            let data = self.store.read(v as u16, span_of(at, len)).await.unwrap().to_vec();
            // where the end has come nearer meanwhile nobody looks
            if at + len <= self.shown()[v] {
                let mut m = self.model.borrow_mut();
                for (i, from) in before.iter().enumerate() {
                    let sector = &data[i * SECTOR as usize..(i + 1) * SECTOR as usize];
                    let allowed = &m.lines[v][at + i].values[*from..];
                    let ok = allowed.contains(&sector[0]) && sector.iter().all(|b| *b == sector[0]);
                    if !ok {
                        let text = format!(
                            "I2: sector {} of {v} read as {}, allowed {allowed:?}",
                            at + i,
                            sector[0]
                        );
                        m.wrong.get_or_insert(text);
                    }
                }
            }
            // zeroes take no time at all; time has to pass nevertheless
            self.env.sleep(Duration::from_micros(1)).await;
        }
    }

    async fn background(self: Rc<Life>) {
        loop {
            let pause = self.draw(|r| r.duration(Duration::from_micros(20), Duration::from_millis(10)));
            self.env.sleep(pause).await;
            let _ = self.store.tidy().await;
        }
    }

    /// Somebody looks at checkpoints, old ones and the newest, while replication goes on: each stays what it was.
    async fn looker(self: Rc<Life>) {
        loop {
            let pause = self.draw(|r| r.duration(Duration::from_micros(20), Duration::from_millis(5)));
            self.env.sleep(pause).await;
            let all = self.store.checkpoints();
            if all.is_empty() || self.store.role() != Role::Secondary {
                continue;
            }
            if let Err(e) = check_back(&self.store, &self.model) {
                self.model.borrow_mut().wrong.get_or_insert(e);
            }
            let epoch = self.draw(|r| *r.choose(&all));
            let hold = self.store.hold(Some(epoch)).unwrap();
            for _ in 0..self.draw(|r| r.below(6)) {
                let lens = sectors_long(&hold.lens());
                let (v, at, len) = self.draw(|r| some_span(r, lens));
                let got = hold.read(v as u16, span_of(at, len)).await;
                self.compare(epoch, (v, at, len), got);
                let pause = self.draw(|r| r.duration(Duration::from_micros(1), Duration::from_millis(8)));
                self.env.sleep(pause).await;
            }
        }
    }

    /// What somebody who looks at a checkpoint read.
    fn compare(&self, epoch: Epoch, (v, at, len): (usize, usize, usize), got: block::Result<Data>) {
        let m = &mut *self.model.borrow_mut();
        let was = &m.checkpoints[&epoch.0][v][at..at + len];
        match got {
            Ok(data) if data.to_vec() != bytes_of(was).to_vec() => {
                m.wrong.get_or_insert(format!("checkpoint {epoch} has changed: sectors {at}.. of {v}"));
            }
            Err(e) if self.store.role() == Role::Secondary => {
                m.wrong.get_or_insert(format!("checkpoint {epoch} cannot be read: {e}"));
            }
            _ => {}
        }
    }

    /// A promotion some time, to any checkpoint that is there, and the merge.
    async fn takeover(self: Rc<Life>) {
        let pause = self.draw(|r| r.duration(Duration::from_micros(200), Duration::from_millis(60)));
        self.env.sleep(pause).await;
        if self.store.role() == Role::Secondary {
            let quiet = self.quiet.acquire(1).await;
            let keep = self.draw(|r| r.chance(0.7));
            let all = self.store.checkpoints();
            if all.is_empty() {
                return;
            }
            let at = if self.draw(|r| r.chance(0.5)) { None } else { Some(self.draw(|r| *r.choose(&all))) };
            let epoch = at.or(all.last().copied()).unwrap();
            let keep = keep && Some(&epoch) == all.last();
            {
                let mut m = self.model.borrow_mut();
                m.promoting = Some((keep, epoch.0));
                if !keep {
                    let ck = m.checkpoints[&epoch.0].clone();
                    for v in 0..VOLUMES {
                        for s in 0..SECTORS {
                            m.lines[v][s].values.push(ck[v][s]);
                        }
                    }
                }
            }
            self.store.promote_at(Generation(2), keep, at).await.unwrap();
            let mut m = self.model.borrow_mut();
            m.promoted = true;
            m.promoting = None;
            m.acked = epoch.0;
            if !keep {
                let content = m.checkpoints[&epoch.0].clone();
                m.shows(&content);
            }
            drop(m);
            drop(quiet);
        }
        self.store.merge().await.unwrap();
    }
}

async fn open(env: &Env) -> Rc<Store> {
    let mode = OpenMode { write: true, ..OpenMode::default() };
    let mut volumes: Vec<Rc<dyn Volume>> = Vec::new();
    for v in 0..VOLUMES {
        let f = env.open(Path::new(&format!("/disk{v}")), mode).await.unwrap();
        volumes.push(Rc::new(FileVolume(f)));
    }
    let file = env.open(Path::new("/store"), mode).await.unwrap();
    Store::open(env, file, volumes).await.unwrap()
}

/// After a crash: what is there is allowed, and the model learns it.
async fn check(store: &Store, model: &Rc<RefCell<Model>>) -> Result<(), String> {
    let mut found: Content = Vec::new();
    let lens = sectors_long(&store.lens());
    for v in 0..VOLUMES {
        let data = store.read(v as u16, span_of(0, lens[v])).await.unwrap().to_vec();
        let mut sectors = [0; SECTORS];
        for (s, b) in sectors.iter_mut().enumerate().take(lens[v]) {
            *b = data[s * SECTOR as usize];
        }
        found.push(sectors);
    }
    let m = &mut *model.borrow_mut();
    let c = store.history().epoch().0;
    let promoted = store.role() != Role::Secondary;
    let promoting = m.promoting.filter(|_| promoted && !m.promoted);
    let may_be = [Some(m.acked), m.trying, promoting.map(|p| p.1)];
    if !may_be.contains(&Some(c)) || promoting.is_some_and(|p| p.1 != c) {
        return Err(format!("I4: at checkpoint {c}, of {may_be:?}"));
    }
    if promoted != m.promoted && m.promoting.is_none() {
        return Err(format!("promoted: {promoted}, acknowledged: {}", m.promoted));
    }
    if c != m.acked || promoting.is_some_and(|p| !p.0) {
        m.own = vec![vec![Own::default(); SECTORS]; VOLUMES];
    }
    if lens != m.lengths[&c] {
        return Err(format!("D5: at checkpoint {c} it is {lens:?} long, not {:?}", m.lengths[&c]));
    }
    if c > 0 {
        let ck = &m.checkpoints[&c];
        for v in 0..VOLUMES {
            for s in 0..SECTORS {
                let own = &m.own[v][s];
                let from = own.flushed.unwrap_or(0);
                let ok = own.values[from..].contains(&found[v][s])
                    || (own.flushed.is_none() && ck[v][s] == found[v][s]);
                if !ok {
                    return Err(format!(
                        "I1: sector {s} of volume {v} is {}, checkpoint {c} has {}, own writes {:?} (flushed from {:?}); role {:?}",
                        found[v][s],
                        ck[v][s],
                        own.values,
                        own.flushed,
                        store.role()
                    ));
                }
            }
        }
    }
    // What was lost in the crash is not there to be flushed later.
    for v in 0..VOLUMES {
        for s in 0..SECTORS {
            let is_checkpoint = c > 0 && m.checkpoints[&c][v][s] == found[v][s];
            let own = &mut m.own[v][s];
            let from = own.flushed.unwrap_or(0);
            let at = |i: Option<usize>| i.map_or(0, |i| i + from + 1);
            let first = own.values[from.min(own.values.len())..].iter().position(|b| *b == found[v][s]);
            let last = own.values[from.min(own.values.len())..].iter().rposition(|b| *b == found[v][s]);
            own.values.truncate(at(last));
            own.completed = if is_checkpoint && own.flushed.is_none() { 0 } else { at(first) };
        }
    }
    (m.acked, m.trying, m.promoting, m.promoted) = (c, None, None, promoted);
    m.front_is(&found);
    if promoted {
        return Ok(());
    }
    // What was kept is there still, and is what it was.
    let retain = m.offered.1;
    let mut expected = std::mem::take(&mut m.offered.0);
    let there = store.checkpoints();
    // a decision is about those before it, too
    let last = expected.last().copied().unwrap_or(0);
    expected.extend(there.iter().map(|e| e.0).filter(|e| *e > last && *e < c));
    if c > 0 && !expected.contains(&c) {
        expected.push(c);
    }
    for e in expected.iter().rev().take(retain as usize + 1) {
        if !there.contains(&Epoch(*e)) {
            return Err(format!(
                "checkpoint {e} was kept ({retain} beside the newest), and is gone: {there:?}"
            ));
        }
    }
    Ok(())
}

/// Every checkpoint that is offered is what it was.
async fn check_kept(store: &Rc<Store>, model: &Rc<RefCell<Model>>) -> Result<(), String> {
    for e in store.checkpoints() {
        if store.role() != Role::Secondary {
            return Ok(());
        }
        let hold = store.hold(Some(e)).unwrap();
        let lens = sectors_long(&hold.lens());
        if lens != model.borrow().lengths[&e.0] {
            return Err(format!("D5: checkpoint {e} is {lens:?} long"));
        }
        for v in 0..VOLUMES {
            let data = hold.read(v as u16, span_of(0, lens[v])).await.unwrap().to_vec();
            if data != bytes_of(&model.borrow().checkpoints[&e.0][v][..lens[v]]).to_vec() {
                return Err(format!("checkpoint {e} is not what it was"));
            }
        }
    }
    Ok(())
}

/// Whoever goes back to a checkpoint is sent every place that differs from it.
fn check_back(store: &Rc<Store>, model: &Rc<RefCell<Model>>) -> Result<(), String> {
    let m = &mut *model.borrow_mut();
    let newest = store.history().epoch();
    for (epoch, then) in m.checkpoints.range(..newest.0) {
        let Some(places) = store.changed_since(Epoch(*epoch)) else { continue };
        for v in 0..VOLUMES {
            let lens = (m.lengths[epoch][v], m.lengths[&newest.0][v]);
            let named = |s: usize| {
                let at = span_of(s, 1);
                places.iter().any(|(of, p)| usize::from(*of) == v && p.intersect(&at) == at)
            };
            let differ = |s: &usize| then[v][*s] != m.checkpoints[&newest.0][v][*s];
            if lens.0 != lens.1 || (0..lens.1).filter(differ).any(|s| !named(s)) {
                return Err(format!(
                    "it does not say all that was changed in volume {v} since {epoch}: {places:?}"
                ));
            }
            m.went_back += 1;
        }
    }
    Ok(())
}

/// A manager decides about what was prepared before the crash.
async fn decided_late(store: &Rc<Store>, model: &Rc<RefCell<Model>>, rng: &mut Rng) -> Result<(), String> {
    let prepared = store.prepared();
    if prepared.is_empty() {
        return Ok(());
    }
    let epoch = rng.choose(&prepared).0;
    store.decide(epoch).await.unwrap();
    while store.is_deciding() {
        store.harden().await;
    }
    let lens = sectors_long(&store.lens());
    let content = model.borrow().checkpoints[&epoch.0].clone();
    {
        let mut m = model.borrow_mut();
        m.acked = epoch.0;
        m.shows(&content);
    }
    if lens != model.borrow().lengths[&epoch.0] {
        return Err(format!("D5: decided after a restart, checkpoint {epoch} is {lens:?} long"));
    }
    for v in 0..VOLUMES {
        let data = store.read(v as u16, span_of(0, lens[v])).await.unwrap().to_vec();
        if data != bytes_of(&content[v][..lens[v]]).to_vec() {
            return Err(format!(
                "C3: checkpoint {epoch} was prepared, and is something else after a restart"
            ));
        }
    }
    Ok(())
}

/// How many checkpoints there were, and answers about older ones.
fn run(seed: u64, engine: Engine) -> Result<(u64, u64), String> {
    let checkpoints = Rc::new(Cell::default());
    let seen = checkpoints.clone();
    let outcome = World::play(seed, false, move |w| async move {
        let mut rng = w.rng("store");
        let zero = Content::from([[0; SECTORS]; VOLUMES]);
        (0..VOLUMES).for_each(|v| {
            w.host().install(&format!("/disk{v}"), Image::from_bytes(&vec![0; FIRST * SECTOR as usize]))
        });
        w.host().install("/store", Image::from_bytes(&[]));
        w.host().adjust(|p| p.inline = *rng.choose(&[0.0, 0.5, 0.9]));
        let model = Rc::new(RefCell::new(Model {
            primary: zero.clone(),
            lens: [FIRST; VOLUMES],
            lengths: [(0, [FIRST; VOLUMES])].into(),
            // what is before the first is in tests/first.rs
            checkpoints: [(0, zero.clone())].into(),
            acked: 0,
            trying: None,
            promoting: None,
            promoted: false,
            offered: Default::default(),
            own: vec![vec![Own::default(); SECTORS]; VOLUMES],
            lines: vec![vec![Line { values: vec![0], settled: 0 }; SECTORS]; VOLUMES],
            next: 0,
            views: 0,
            writing: None,
            wrong: None,
            went_back: 0,
        }));
        {
            let (env, process) = w.start();
            let mode = OpenMode { write: true, ..OpenMode::default() };
            let file = env.open(Path::new("/store"), mode).await.unwrap();
            let new = NewStore { group: GroupId::of_name("g"), engine, size: replication::store::MIN_SIZE };
            Store::create(&file, &new, History::begin(Generation(1))).await.unwrap();
            process.kill();
        }
        let lives = 2 + rng.below(5);
        let promote_in = if rng.chance(0.6) { rng.below(lives) } else { u64::MAX };
        for number in 0..lives {
            let (env, process) = w.start();
            let store = open(&env).await;
            let mut checked = check(&store, &model).await;
            let retain = *rng.choose(&[0, 0, 1, 3]);
            if checked.is_ok() && store.role() == Role::Secondary && rng.chance(0.7) {
                store.set_retain(retain).await.unwrap();
                model.borrow_mut().offered.1 = retain;
            }
            if checked.is_ok() {
                checked = check_kept(&store, &model).await;
            }
            if let Err(e) = checked {
                w.verdict().violation(e);
                return;
            }
            if store.role() == Role::Secondary
                && rng.chance(0.5)
                && let Err(e) = decided_late(&store, &model, &mut rng).await
            {
                w.verdict().violation(e);
                return;
            }
            let life = Rc::new(Life {
                env: env.clone(),
                store: store.clone(),
                model: model.clone(),
                rng: RefCell::new(rng.fork("life")),
                quiet: env::sync::Semaphore::new(1),
            });
            env.spawn("primary", life.clone().primary());
            env.spawn("own", life.clone().own());
            env.spawn("reader", life.clone().reader());
            env.spawn("background", life.clone().background());
            env.spawn("looker", life.clone().looker());
            if number >= promote_in {
                env.spawn("takeover", life.clone().takeover());
            }
            let long = rng.duration(Duration::from_micros(100), Duration::from_millis(150));
            env::sync::race(std::future::pending::<()>(), w.executor().env().sleep(long)).await;
            life.learn();
            if rng.chance(0.6) {
                w.host().power_loss(&[&process]);
            } else {
                process.kill();
            }
            model.borrow_mut().offered.0 = store.checkpoints().iter().map(|e| e.0).collect();
            let wrong = model.borrow_mut().wrong.take();
            if let Some(e) = wrong {
                w.verdict().violation(e);
                return;
            }
        }
        // I3: when the merge has ended, the disks alone are the image
        let (env, _process) = w.start();
        let store = open(&env).await;
        if let Err(e) = check(&store, &model).await {
            w.verdict().violation(e);
            return;
        }
        if store.role() != Role::Secondary {
            store.merge().await.unwrap();
            for v in 0..VOLUMES {
                let all = span_of(0, sectors_long(&store.lens())[v]);
                let front = store.read(v as u16, all).await.unwrap().to_vec();
                let image = w.host().image(&format!("/disk{v}")).unwrap();
                if front != image.read(all) || image.len() != all.len {
                    w.verdict().violation("I3: the merged disk is not the image".to_owned());
                }
                let m = model.borrow();
                for (s, b) in front.chunks(SECTOR as usize).map(|c| c[0]).enumerate() {
                    if m.lines[v][s].values.last() != Some(&b) {
                        w.verdict().violation(format!("I3: sector {s} of {v} changed in the merge"));
                    }
                }
            }
        }
        seen.set((model.borrow().acked, model.borrow().went_back));
    });
    outcome.violation.map_or(Ok(checkpoints.get()), Err)
}

fn seeds(many: u64) -> (u64, u64) {
    let number = |name: &str| std::env::var(name).ok().and_then(|s| s.parse().ok());
    number("SEED").map_or((1, number("SEEDS").unwrap_or(many)), |s| (s, 1))
}

#[test]
fn after_any_crash_the_image_is_a_checkpoint() {
    for engine in [Engine::Redo, Engine::Undo] {
        let (from, count) = seeds(250);
        let (mut checkpoints, mut went_back) = (0, 0);
        for seed in from..from + count {
            match run(seed, engine) {
                Ok((c, back)) => (checkpoints, went_back) = (checkpoints + c, went_back + back),
                Err(e) => panic!("SEED={seed} {engine:?}: {e}"),
            }
        }
        println!(
            "{engine:?}: seeds {from}..{}: {checkpoints} checkpoints, {went_back} ways back",
            from + count
        );
        let reached = checkpoints > count && went_back > count;
        assert!(count == 1 || reached, "the runs must reach what they test");
    }
}

#[test]
fn every_removed_rule_of_the_store_is_found() {
    for bug in Bug::STORE {
        plant(Some(bug));
        let engines = [Engine::Redo, Engine::Undo];
        let found = (1..4000)
            .find_map(|seed| engines.iter().find_map(|e| run(seed, *e).err().map(|x| (seed, *e, x))));
        plant(None);
        let (seed, engine, e) = found.unwrap_or_else(|| panic!("{bug:?} was not found"));
        println!("{bug:?}: {engine:?} seed {seed}: {e}");
    }
}
