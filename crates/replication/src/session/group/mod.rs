//! A group of disks as a manager sees it: made, given a role, taken from it.
//!
//! What must stay true: a group is in one role at a time; a primary is begun only from an image whose history is known, or a new
//! one; a disk's own content is given up (by becoming a secondary) only where that was asked for.

mod hand_over;
mod test;

pub use hand_over::SwitchedOver;
pub use test::Test;

use super::Tell;
use super::activity::Activity;
use super::door::Door;
use super::former::Former;
use super::front::{Front, Mode};
use super::primary::PrimaryGroup;
use super::secondary::SecondaryGroup;
use super::secure::Secure;
use crate::history::History;
use crate::lease::{Fencing, Lease};
use crate::primary::Config;
use crate::store::{EdgeVolume, Engine, MIN_SIZE, NewStore, Role, Store, Volume};
use crate::types::{Generation, GroupId};
use block::{BlockError, ErrorKind, Result, Span};
use drivers::filters::replication::Stage;
use env::{Address, Existing, Listener, OpenMode};
use graph::{Demand, Graph, NodeCell, NodeOptions, Parent, Plan, Role as EdgeRole, Step};
use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

/// Settings of a new group.
#[derive(Clone, Debug)]
pub struct NewGroup {
    /// Its name, the same on all its hosts.
    pub id: String,
    /// Node names of the disks, in an order that is the same on all hosts, and of the nodes that show them.
    pub volumes: Vec<(String, String)>,
    /// Where the group keeps what must survive a crash: this name for a secondary, with `.primary` for a primary.
    pub store: PathBuf,
    /// Bytes of a secondary's store.
    pub size: u64,
    /// A secondary's engine.
    pub engine: Engine,
    /// Checkpoints that a secondary keeps beside the newest.
    pub retain: u64,
    /// TLS between the sides.
    pub secure: Secure,
    /// Whether a promotion needs somebody's word that the old primary cannot write any more.
    pub manual_fencing: bool,
    /// Who grants the group to its owner, if anybody does.
    pub fencing: Option<Fencing>,
}

/// What a group does.
#[derive(Clone)]
pub enum Acting {
    /// Nothing: the fronts pass through.
    Unprotected,
    /// It forwards.
    Primary(Rc<PrimaryGroup>),
    /// It follows, or has taken over.
    Secondary(Rc<SecondaryGroup>),
}

/// What the files of a group without a role say that it was.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Remembered {
    /// Nothing.
    Nothing,
    /// A primary, or a secondary that has taken over.
    Primary,
    /// A secondary.
    Secondary,
}

/// How long requests of users may take to end when their side is given up.
const GIVING_UP: Duration = Duration::from_secs(30);

/// How a secondary begins.
struct Begin {
    /// What the disks hold may be given up.
    demote: bool,
    /// What they are, where this process knows.
    former: Option<Former>,
    /// It was one before a restart.
    again: bool,
}

/// See above.
pub struct Group {
    new: NewGroup,
    group: GroupId,
    graph: Rc<Graph>,
    fronts: Vec<(Rc<Front>, Rc<NodeCell>)>,
    acting: RefCell<Acting>,
    peers: RefCell<Vec<(String, Address)>>,
    /// Where others come to: primaries to a secondary, other owners to a primary. As it was asked for, and what it became.
    porch: RefCell<Option<(Address, Rc<dyn Listener>)>>,
    closed: RefCell<Option<String>>,
    lease: Option<Rc<Lease>>,
    tell: Tell,
}

/// What [`Address`] shows, read again: a path with a slash in front, or `host:port`.
fn address_of(text: &str) -> Result<Address> {
    match text.rsplit_once(':') {
        Some((host, port)) if !text.starts_with('/') => {
            port.parse().map(|port| Address::tcp(host, port)).map_err(|_| BlockError::invalid("no port"))
        }
        _ => Ok(Address::Unix(text.into())),
    }
}

/// A file, and whether it is a new one.
async fn open_or_create(env: &env::Env, path: &Path) -> Result<(Rc<dyn env::File>, bool)> {
    let write = true;
    match env.open(path, OpenMode { write, ..OpenMode::default() }).await {
        Ok(f) => Ok((f, false)),
        Err(e) if e.kind() == ErrorKind::NotFound => {
            let mode = OpenMode { write, existing: Existing::CreateNew, ..OpenMode::default() };
            Ok((env.open(path, mode).await.map_err(|e| e.context(path.display()))?, true))
        }
        Err(e) => Err(e.context(path.display())),
    }
}

/// What the arbiter knows this side by: the same after a restart, no other side's.
async fn holder(env: &env::Env, new: &NewGroup) -> Result<String> {
    let mut path = new.store.clone().into_os_string();
    path.push(".holder");
    let path = PathBuf::from(path);
    let named = |e: BlockError| e.context(path.display());
    let file = open_or_create(env, &path).await?.0;
    let known = file.read(Span::new(0, HOLDER)).await.map_err(named)?.to_vec();
    if known.iter().all(u8::is_ascii_hexdigit)
        && let Ok(text) = String::from_utf8(known)
    {
        return Ok(text);
    }
    let name = format!("{:016x}{:016x}", env.random(), env.random());
    file.write(0, name.clone().into_bytes().into()).await.map_err(named)?;
    file.barrier().await.map_err(named)?;
    Ok(name)
}

/// Bytes of such a name.
const HOLDER: u64 = 32;

fn refused(why: impl Into<String>) -> BlockError {
    BlockError::new(ErrorKind::Busy, why)
}

impl Group {
    /// Makes the group and the nodes that show its disks.
    ///
    /// # Errors
    /// Unknown disks, names in use, a store that is too small.
    pub async fn add(graph: &Rc<Graph>, new: NewGroup, tell: Tell) -> Result<Rc<Group>> {
        if new.size < MIN_SIZE {
            return Err(BlockError::invalid(format!("a replication store has at least {MIN_SIZE} bytes")));
        }
        if new.volumes.is_empty() || new.volumes.len() > crate::wire::MAX_VOLUMES {
            return Err(BlockError::invalid("a replication group has 1 to 1024 volumes"));
        }
        let lease = match &new.fencing {
            None => None,
            Some(fencing) => Some(Lease::new(graph.env(), fencing.clone(), holder(graph.env(), &new).await?)),
        };
        let mut fronts: Vec<(Rc<Front>, Rc<NodeCell>)> = Vec::new();
        for (number, (node, front)) in new.volumes.iter().enumerate() {
            let made = Group::front(graph, number, node, front, lease.clone()).await;
            match made {
                Ok(f) => fronts.push(f),
                Err(e) => {
                    Group::step_back(graph, &fronts).await;
                    return Err(e);
                }
            }
        }
        // Whoever uses the disks now does so through the fronts from here on, without a gap.
        let mut plan = Plan::new();
        for (front, cell) in &fronts {
            let disk = front.disk().child();
            plan = plan
                .then(Step::MoveParents { from: disk.clone(), to: cell.clone(), except: Vec::new() })
                .then(Step::Cover { node: disk, filter: Some(cell.clone()) });
        }
        if let Err(e) = graph.apply(plan).await {
            Group::step_back(graph, &fronts).await;
            return Err(e);
        }
        // Now nobody may come beside them, even while nobody uses them.
        fronts.iter().for_each(|(front, _)| front.pin(true));
        if let Err(e) = graph.apply(Plan::new()).await {
            // what it was before needed no more than this
            let _ = graph.apply(Group::leave(&fronts)).await;
            Group::step_back(graph, &fronts).await;
            return Err(e);
        }
        let group = Rc::new(Group {
            group: GroupId::of_name(&new.id),
            new,
            graph: graph.clone(),
            fronts,
            acting: RefCell::new(Acting::Unprotected),
            peers: RefCell::default(),
            porch: RefCell::default(),
            closed: RefCell::default(),
            lease,
            tell,
        });
        if let Some(lease) = &group.lease {
            let weak = Rc::downgrade(&group);
            lease.when_fenced(Rc::new(move |by| weak.upgrade().iter().for_each(|g| g.was_fenced(by))));
        }
        Ok(group)
    }

    /// The arbiter knows a newer owner.
    fn was_fenced(&self, by: Generation) {
        match self.acting() {
            Acting::Primary(p) => p.fence(by),
            Acting::Secondary(_) => (self.tell)("REPLICATION_FENCED", vec![("generation", by.0.into())]),
            Acting::Unprotected => {}
        }
    }

    /// Ownership by an arbiter's word, if the group has an arbiter.
    pub fn lease(&self) -> Option<&Rc<Lease>> {
        self.lease.as_ref()
    }

    /// This side gives the group up. With `forget` the arbiter knows nothing of it afterwards.
    async fn release(&self, forget: bool) {
        if let Some(lease) = &self.lease {
            lease.release(forget).await;
        }
    }

    /// Users of the fronts go on with the disks themselves.
    fn leave(fronts: &[(Rc<Front>, Rc<NodeCell>)]) -> Plan {
        fronts.iter().fold(Plan::new(), |plan, (front, cell)| {
            front.pin(false);
            let disk = front.disk().child();
            plan.then(Step::MoveParents { from: cell.clone(), to: disk.clone(), except: Vec::new() })
                .then(Step::Cover { node: disk, filter: None })
        })
    }

    /// Removes fronts that have no users.
    async fn step_back(graph: &Rc<Graph>, fronts: &[(Rc<Front>, Rc<NodeCell>)]) {
        for (_, cell) in fronts {
            // they have just been made
            let _ = graph.remove(cell).await;
        }
    }

    async fn front(
        graph: &Rc<Graph>,
        number: usize,
        node: &str,
        name: &str,
        lease: Option<Rc<Lease>>,
    ) -> Result<(Rc<Front>, Rc<NodeCell>)> {
        let cell = graph.find(node).ok_or_else(|| {
            BlockError::new(ErrorKind::NotFound, format!("Cannot find device='' nor node-name='{node}'"))
        })?;
        let edge =
            graph.attach(&cell, "file", EdgeRole::Filtered, Parent::opening(), Demand::NOTHING).await?;
        let front = Front::new(edge, u16::try_from(number).unwrap_or(u16::MAX), lease);
        let options = NodeOptions {
            name: Some(name.to_owned()),
            discard: true,
            monitor_owned: true,
            read_only: !cell.is_writable(),
            ..NodeOptions::default()
        };
        let cell = graph.add(options, front.clone()).await?;
        Ok((front, cell))
    }

    /// Settings.
    pub fn settings(&self) -> &NewGroup {
        &self.new
    }

    /// What it does.
    pub fn acting(&self) -> Acting {
        self.acting.borrow().clone()
    }

    /// Where others may connect: primaries to a secondary, other owners to a primary.
    pub fn listening(&self) -> Option<Address> {
        self.porch.borrow().as_ref().map(|p| p.1.address())
    }

    /// Listens there, unless this side does so already.
    async fn listen(&self, at: &Address) -> Result<Rc<dyn Listener>> {
        let there = self.porch.borrow().as_ref().filter(|p| p.0 == *at || p.1.address() == *at).cloned();
        match there {
            Some((_, listener)) => Ok(listener),
            None => self.graph.env().listen(at).await,
        }
    }

    fn is_porch(&self, listener: &Rc<dyn Listener>) -> bool {
        self.porch.borrow().as_ref().is_some_and(|p| Rc::ptr_eq(&p.1, listener))
    }

    fn door(&self, listener: &Rc<dyn Listener>) -> Door {
        let accept = self.new.secure.accept.clone();
        Door { env: self.graph.env().clone(), listener: listener.clone(), accept }
    }

    /// Nothing is served as long as the group has no role, for this reason: it could not be given back the one it had.
    pub fn close_with(&self, why: Option<&str>) {
        *self.closed.borrow_mut() = why.map(str::to_owned);
        self.fronts.iter().for_each(|(f, _)| f.close_with(why.map(str::to_owned)));
    }

    /// Why nothing is served, if so.
    pub fn closed(&self) -> Option<String> {
        self.closed.borrow().clone()
    }

    /// The peers given so far.
    pub fn peers(&self) -> Vec<(String, Address)> {
        self.peers.borrow().clone()
    }

    fn act(&self, acting: Acting) {
        for (front, _) in &self.fronts {
            front.set_mode(match &acting {
                Acting::Unprotected => Mode::Unprotected,
                Acting::Primary(p) => Mode::Primary(p.clone()),
                Acting::Secondary(s) => Mode::Secondary(s.clone()),
            });
        }
        if matches!(acting, Acting::Unprotected) {
            self.porch.take();
        } else {
            self.fronts.iter().for_each(|(front, _)| front.begin_tracking());
            self.close_with(None);
        }
        *self.acting.borrow_mut() = acting;
        self.lengths_changed();
    }

    fn idle(&self) -> Result<()> {
        match &*self.acting.borrow() {
            Acting::Unprotected => Ok(()),
            Acting::Primary(_) => Err(refused(format!("group '{}' is a primary already", self.new.id))),
            Acting::Secondary(_) => Err(refused(format!("group '{}' is a secondary already", self.new.id))),
        }
    }

    /// A secondary to forward to, from now on.
    ///
    /// # Errors
    /// A name in use, or an address: of two callers of one secondary each would end the other's session, for ever.
    pub fn add_peer(&self, name: &str, address: Address) -> Result<()> {
        if let Some((known, _)) = self.peers.borrow().iter().find(|p| p.0 == name || p.1 == address) {
            let place = if known == name { String::new() } else { format!(" at {address}") };
            return Err(refused(format!("group '{}' has a peer '{known}'{place} already", self.new.id)));
        }
        self.peers.borrow_mut().push((name.to_owned(), address.clone()));
        if let Acting::Primary(p) = self.acting() {
            p.add_peer(name, address);
        }
        Ok(())
    }

    /// That secondary is none any more.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn remove_peer(&self, name: &str) -> Result<()> {
        let before = self.peers.borrow().len();
        self.peers.borrow_mut().retain(|p| p.0 != name);
        if self.peers.borrow().len() == before {
            let why = format!("group '{}' has no peer '{name}'", self.new.id);
            return Err(BlockError::new(ErrorKind::NotFound, why));
        }
        if let Acting::Primary(p) = self.acting() {
            p.remove_peer(name);
        }
        Ok(())
    }

    fn record_path(&self) -> PathBuf {
        let mut name = self.new.store.clone().into_os_string();
        name.push(".primary");
        name.into()
    }

    async fn file(&self, path: &Path) -> Result<(Rc<dyn env::File>, bool)> {
        open_or_create(self.graph.env(), path).await
    }

    fn volumes(&self) -> Vec<Rc<dyn Volume>> {
        self.fronts.iter().map(|(f, _)| Rc::new(EdgeVolume(f.disk().clone())) as Rc<dyn Volume>).collect()
    }

    /// Begins as primary. Other owners of the group find it at `listen`; where that is not said, at the place at which it listens as a
    /// secondary, or its record says that it did. One that comes back asks its peers first whether it was succeeded: see
    /// [`PrimaryGroup::ask_first`].
    ///
    /// # Errors
    /// The group has a role (a secondary that has taken over may become one); the disks are a secondary's that has not taken
    /// over; of the files; the address cannot be used.
    pub async fn start_primary(
        &self,
        config: Config,
        timeout: Duration,
        listen: Option<&Address>,
    ) -> Result<()> {
        let from = match self.acting() {
            Acting::Secondary(s) if s.stage() == Stage::Done => Some(s),
            _ => {
                self.idle()?;
                None
            }
        };
        let env = self.graph.env().clone();
        // before anything is given up
        let asked_for = match listen {
            Some(at) => Some((at.clone(), self.listen(at).await?)),
            None => None,
        };
        let disks: Vec<_> = self.fronts.iter().map(|(f, _)| f.disk().clone()).collect();
        let lens: Vec<u64> = disks.iter().map(|d| d.len()).collect();
        // What is under way ends first: it would be written behind the back of a catch-up.
        let _still = self.graph.freeze(&self.cells()).await;
        // Did these disks come from another primary?
        let (followed, tracked) = match &from {
            Some(s) => (Some(s.history()), s.activity()),
            None => (self.taken_over().await?, None),
        };
        let file = self.file(&self.record_path()).await?.0;
        let known = match tracked {
            Some(known) => Some(known),
            None => Activity::open(file.clone(), self.group, &lens).await?,
        };
        let known =
            known.filter(|a| followed.as_ref().is_none_or(|h| h.generation() <= a.history().generation()));
        // In this process it has served since its promotion, and whoever came was told.
        let comes_back = from.is_none() && (known.is_some() || followed.is_some());
        let is_new = known.is_none();
        let activity = match known {
            Some(known) => {
                if self.fronts.iter().any(|(f, _)| f.is_untracked()) {
                    // written to without a role: where, nobody knows
                    for (volume, len) in lens.iter().enumerate() {
                        let volume = u16::try_from(volume).unwrap_or(u16::MAX);
                        known.cover(volume, Span::new(0, *len)).await?;
                    }
                }
                known
            }
            None => {
                // A new line of images takes a number that no other has: two hosts that begin under one name are unrelated.
                let fresh = || History::begin(Generation((1 << 32) | (env.random() & 0xffff_ffff)));
                // Of what was written to a promoted disk since, nothing is known.
                let marks: Option<&[_]> = if followed.is_some() { None } else { Some(&[]) };
                Activity::create(file, self.group, &lens, followed.unwrap_or_else(fresh), marks).await?
            }
        };
        let tell = self.tell.clone();
        let (fenced, place) = (activity.fenced(), activity.place());
        if let (Some(lease), None) = (&self.lease, fenced)
            && let Err(e) = lease.begin(activity.history().generation()).await
        {
            if is_new {
                // it is nobody's record: nothing was written under it
                let _ = env.remove(&self.record_path()).await;
            }
            return Err(e);
        }
        let primary = PrimaryGroup::new(&env, self.group, disks, activity.clone(), config, timeout, tell)?;
        primary.protect(self.new.secure.connect.clone());
        primary.owned_by(self.lease.clone());
        if let Some(s) = from {
            s.stop();
        }
        if let Some(by) = fenced {
            primary.fence(by);
        }
        // From here on every change is remembered, whether or not anybody is there.
        self.act(Acting::Primary(primary.clone()));
        if asked_for.is_some() {
            *self.porch.borrow_mut() = asked_for;
        } else if let Some(at) = place.filter(|_| self.listening().is_none()) {
            self.listen_again(&at).await;
        }
        let porch = self.porch.borrow().as_ref().map(|p| p.1.clone());
        if let Some(listener) = porch {
            primary.stand_at(self.door(&listener));
            activity.found_at(&listener.address().to_string()).await?;
        }
        self.peers.borrow().iter().for_each(|(name, address)| primary.add_peer(name, address.clone()));
        if comes_back {
            primary.ask_first();
        }
        Ok(())
    }

    /// Where it listened in an earlier life. It serves without that, too: whoever it knows is asked.
    async fn listen_again(&self, at: &str) {
        let begun = async {
            let at = address_of(at)?;
            let listener = self.graph.env().listen(&at).await?;
            Ok::<_, BlockError>((at, listener))
        };
        match begun.await {
            Ok(porch) => *self.porch.borrow_mut() = Some(porch),
            Err(e) => (self.tell)(
                "REPLICATION_ERROR",
                vec![
                    ("operation", "listen".into()),
                    ("offset", 0.into()),
                    ("reason", format!("other owners of the group do not find this one at {at}: {e}").into()),
                ],
            ),
        }
    }

    fn cells(&self) -> Vec<Rc<NodeCell>> {
        self.fronts.iter().map(|(_, cell)| cell.clone()).collect()
    }

    /// Where the disks' image comes from, if they were a secondary's and are merged.
    async fn taken_over(&self) -> Result<Option<History>> {
        let Some(store) = self.store().await? else { return Ok(None) };
        if store.role() != Role::Done {
            return Err(refused(format!(
                "the disks of group '{}' are a secondary's: fail over first",
                self.new.id
            )));
        }
        Ok(Some(store.history()))
    }

    /// A secondary's store, if there is one.
    async fn store(&self) -> Result<Option<Rc<Store>>> {
        let env = self.graph.env();
        match env.open(&self.new.store, OpenMode { write: true, ..OpenMode::default() }).await {
            Ok(file) if Store::is_made(&file).await? => {
                Ok(Some(Store::open(env, file, self.volumes()).await.map_err(|e| self.of_store(e))?))
            }
            Ok(_) => Ok(None),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// What a primary remembers of its own, if there is something.
    async fn record(&self, lens: &[u64]) -> Result<Option<Rc<Activity>>> {
        let mode = OpenMode { write: true, ..OpenMode::default() };
        match self.graph.env().open(&self.record_path(), mode).await {
            Ok(record) => Activity::open(record, self.group, lens).await,
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// What its disks were before, as its files say.
    ///
    /// # Errors
    /// The group has a role; of the files.
    pub async fn remembered(&self) -> Result<Remembered> {
        self.idle()?;
        if let Some(store) = self.store().await? {
            let owner = store.role() == Role::Done;
            return Ok(if owner { Remembered::Primary } else { Remembered::Secondary });
        }
        let lens: Vec<u64> = self.fronts.iter().map(|(f, _)| f.disk().len()).collect();
        Ok(self.record(&lens).await?.map_or(Remembered::Nothing, |_| Remembered::Primary))
    }

    fn of_store(&self, e: BlockError) -> BlockError {
        e.context(self.new.store.display())
    }

    /// Begins as secondary. The disks' own content is given up with the first checkpoint; where they have been a primary's or have
    /// been promoted, `demote` must say that this is meant. They need not be sent everything then: see [`Former`].
    ///
    /// # Errors
    /// The group has a role, and `demote` is missing or it is a secondary's that has not taken over; `demote` is missing; of the files;
    /// the address cannot be used.
    pub async fn start_secondary(self: &Rc<Self>, listen: &Address, demote: bool) -> Result<Address> {
        let acting = self.acting();
        let done = |s: &SecondaryGroup| s.stage() == Stage::Done;
        match &acting {
            Acting::Unprotected => {}
            Acting::Primary(_) if demote => {}
            Acting::Secondary(s) if demote && done(s) => {}
            _ => self.idle()?,
        }
        if let Acting::Secondary(s) = &acting {
            // its disks are served on
            s.stop_listening().await;
        }
        // before anything is given up
        let listener = self.listen(listen).await?;
        if let Acting::Primary(p) = &acting {
            // nobody waits for a secondary any more
            p.stop();
        }
        // nor for the arbiter
        self.lease.iter().for_each(|l| l.let_go(ErrorKind::Io));
        let still = self.graph.env().timeout(GIVING_UP, self.graph.freeze(&self.cells())).await;
        let still = still.ok_or_else(|| refused("requests under way do not end"))?;
        let former = match &acting {
            Acting::Unprotected => None,
            // what a power loss could still take from these disks alone is in no place that is named
            Acting::Primary(p) if self.flush().await.is_ok() => p.former()?,
            Acting::Primary(_) => None,
            Acting::Secondary(s) => s.activity().map(|a| Former::recorded(&a)),
        };
        let address = self.begin_secondary(listener, Begin { demote, former, again: false }).await?;
        drop(still);
        // whoever is promoted does not wait for its end; until here this side's users needed it
        self.release(false).await;
        Ok(address)
    }

    async fn flush(&self) -> Result<()> {
        for (front, _) in &self.fronts {
            front.disk().flush().await?;
        }
        Ok(())
    }

    /// Begins again as the secondary that it was before a restart, taken over or not.
    ///
    /// # Errors
    /// As [`Group::start_secondary`]; its store is gone.
    pub async fn resume_secondary(self: &Rc<Self>, listen: &Address) -> Result<Address> {
        self.idle()?;
        let listener = self.graph.env().listen(listen).await?;
        let _still = self.graph.freeze(&self.cells()).await;
        self.begin_secondary(listener, Begin { demote: false, former: None, again: true }).await
    }

    async fn begin_secondary(self: &Rc<Self>, listener: Rc<dyn Listener>, begin: Begin) -> Result<Address> {
        let env = self.graph.env().clone();
        let lens: Vec<u64> = self.fronts.iter().map(|(f, _)| f.disk().len()).collect();
        let known = self.record(&lens).await?;
        let there = self.store().await?;
        if there.as_ref().is_some_and(|s| s.group() != self.group) {
            return Err(BlockError::invalid(format!(
                "{} is another group's store",
                self.new.store.display()
            )));
        }
        if begin.again && there.is_none() {
            return Err(BlockError::invalid(format!("{} is gone", self.new.store.display())));
        }
        let owner = match &there {
            _ if begin.again => false,
            Some(store) => store.role() == Role::Done || begin.former.is_some(),
            None => known.is_some(),
        };
        if owner && !begin.demote {
            return Err(refused(format!(
                "the disks of group '{}' were a primary's; what they hold will be overwritten: give 'demote': true",
                self.new.id
            )));
        }
        let store = match there.filter(|_| !owner) {
            Some(store) => store,
            None => self.new_store(History::none()).await?,
        };
        store.set_retain(self.new.retain).await.map_err(|e| self.of_store(e))?;
        let promoted = store.role() != Role::Secondary;
        let recorded = known.as_ref().map(|k| Former::recorded(k));
        let former = begin.former.or(recorded).filter(|_| !promoted && store.history().now().is_none());
        let untracked = self.fronts.iter().any(|(f, _)| f.is_untracked());
        let former = former.filter(|_| !untracked);
        // Of a promotion that never came about, or of the time before this one; else it is needed until the first checkpoint.
        if !promoted && known.is_some() && former.is_none() {
            let _ = env.remove(&self.record_path()).await;
        }
        let secondary = SecondaryGroup::new(&env, store, self.record_path(), self.tell.clone());
        secondary.protect(self.new.secure.accept.clone());
        former.into_iter().for_each(|f| secondary.follows(f, known.clone()));
        if promoted {
            secondary.resume_promoted(known).await.inspect_err(|_| secondary.stop())?;
            if let Some(lease) = &self.lease {
                lease.begin(secondary.history().generation()).await.inspect_err(|_| secondary.stop())?;
            }
        }
        let address = listener.address();
        self.follow(&secondary, listener).await;
        Ok(address)
    }

    /// A new store, over whatever is there.
    async fn new_store(&self, history: History) -> Result<Rc<Store>> {
        let file = self.file(&self.new.store).await?.0;
        let settings = NewStore { group: self.group, engine: self.new.engine, size: self.new.size };
        Store::create(&file, &settings, history).await.map_err(|e| self.of_store(e))?;
        let store =
            Store::open(self.graph.env(), file, self.volumes()).await.map_err(|e| self.of_store(e))?;
        store.set_retain(self.new.retain).await.map_err(|e| self.of_store(e))?;
        Ok(store)
    }

    /// Users of the fronts see other lengths.
    fn lengths_changed(&self) {
        for cell in self.cells() {
            self.graph.length_changed(&cell);
        }
    }

    /// The node that shows the disk `name`, which may be its own name.
    pub fn front_of(&self, name: &str) -> Option<Rc<NodeCell>> {
        let i = self.new.volumes.iter().position(|(disk, front)| disk == name || front == name)?;
        self.fronts.get(i).map(|f| f.1.clone())
    }

    /// The group is `secondary` from now on, which listens there, and a primary when it is handed over.
    async fn follow(self: &Rc<Self>, secondary: &Rc<SecondaryGroup>, listener: Rc<dyn Listener>) {
        secondary.owned_by(self.lease.clone());
        secondary.serve(listener.clone());
        let group = Rc::downgrade(self);
        secondary.when_resized(Rc::new(move || group.upgrade().iter().for_each(|g| g.lengths_changed())));
        self.act(Acting::Secondary(secondary.clone()));
        if !self.is_porch(&listener) {
            *self.porch.borrow_mut() = Some((listener.address(), listener));
        }
        let (group, secondary) = (self.clone(), secondary.clone());
        self.graph.env().spawn("replication hand-over", async move {
            if let Some(hand) = secondary.handed_over().await {
                group.take_place(hand).await;
            }
        });
    }

    /// Gives the role up. A primary's disks go on unprotected, and what is written then is not remembered. A secondary that has not taken
    /// over cannot: its disks alone are no checkpoint under the undo engine, and may lack one under redo.
    ///
    /// # Errors
    /// A secondary that has not taken over, or is still merging.
    pub async fn stop(&self) -> Result<()> {
        match self.acting() {
            Acting::Unprotected => Err(refused(format!("group '{}' does not replicate", self.new.id))),
            Acting::Primary(p) => {
                p.stop();
                self.release(true).await;
                // Nobody may take these disks for the ones that were followed.
                let _ = self.graph.env().remove(&self.record_path()).await;
                self.act(Acting::Unprotected);
                Ok(())
            }
            Acting::Secondary(s) => {
                if s.stage() != Stage::Done {
                    return Err(refused(format!(
                        "group '{}' is a secondary at a checkpoint: fail over first ({})",
                        self.new.id,
                        s.stage().name()
                    )));
                }
                s.stop();
                self.release(true).await;
                // what is written from now on is not remembered
                let _ = self.graph.env().remove(&self.record_path()).await;
                self.act(Acting::Unprotected);
                Ok(())
            }
        }
    }

    /// After a split brain: this side gives up what it holds and follows the other, which finds it at `listen` (L9).
    ///
    /// # Errors
    /// It is a secondary already; as [`Group::start_secondary`].
    pub async fn give_up(self: &Rc<Self>, listen: &Address) -> Result<Address> {
        let address = self.start_secondary(listen, true).await?;
        self.peers.borrow_mut().clear();
        Ok(address)
    }

    /// Removes the nodes of a group without a role. Their users go on with the disks themselves.
    ///
    /// # Errors
    /// It has a role; a user of a front that may not use the disk instead.
    pub async fn remove(&self) -> Result<()> {
        self.idle()?;
        self.graph.apply(Group::leave(&self.fronts)).await.inspect_err(|_| {
            self.fronts.iter().for_each(|(front, _)| front.pin(true));
        })?;
        for (_, cell) in &self.fronts {
            self.graph.remove(cell).await?;
        }
        Ok(())
    }

    /// `told` is called when a node that shows a disk goes.
    pub fn when_closed(&self, told: &Rc<dyn Fn()>) {
        self.fronts.iter().for_each(|(front, _)| front.when_closed(told.clone()));
    }

    /// The daemon ends: no request of a user waits any longer for what may never come, secondaries or the arbiter, and would keep the
    /// daemon from its end. It fails as one that is to be asked again ([`ErrorKind::Ending`]).
    pub fn let_go(&self) {
        self.lease.iter().for_each(|l| l.let_go(ErrorKind::Ending));
        if let Acting::Primary(p) = self.acting() {
            p.let_go();
        }
    }

    /// The daemon ends: connections are closed, nothing is given up.
    pub fn shut_down(&self) {
        self.let_go();
        self.lease.iter().for_each(|l| l.abandon());
        match self.acting() {
            Acting::Unprotected => {}
            Acting::Primary(p) => p.stop(),
            Acting::Secondary(s) => s.stop(),
        }
    }
}
