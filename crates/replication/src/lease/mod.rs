//! Ownership of a group for a time: who serves its users, by the word of an arbiter (X4, L2, I7).
//!
//! What can happen: the arbiter is gone, or answers late; this process is stopped and goes on after its time is over; somebody takes the group by
//! force; this side loses its secondaries. What must stay true: a request is answered only at a time for which this side was granted the
//! group, with its generation recorded there; so of two sides at most one answers. Before a request is answered that a
//! secondary lacks for longer than an epoch, the arbiter knows that this secondary may not take over.
//!
//! Time is that since the boot of the host, read at each look: a process that was stopped sees that its time is over. A grant counts from
//! before it was asked for, and a tenth less than it lasts, for clocks that run differently.

mod arbiter;
mod etcd;

pub use arbiter::{Arbiter, Grant, Owner, Seen, State};
pub use etcd::{Endpoint, Etcd, Login};

use crate::types::{Epoch, Generation};
use block::{BlockError, ErrorKind, Result};
use env::Env;
use env::sync::{Notify, Semaphore};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

/// How often a grant is renewed in its time.
const RENEWALS: u32 = 3;
/// How often an arbiter that does not answer is asked again in the time of a grant.
const RETRIES: u32 = 10;

/// How a group is fenced by an arbiter.
#[derive(Clone)]
pub struct Fencing {
    /// Who grants.
    pub arbiter: Rc<dyn Arbiter>,
    /// An owner whose arbiter is silent goes on: the pair's links and people prevent two owners.
    pub advisory: bool,
    /// By which whoever made this makes it again.
    pub named: String,
}

impl std::fmt::Debug for Fencing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fencing").field("named", &self.named).finish_non_exhaustive()
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// This side serves nobody by its word, or replicates nothing.
    Idle,
    /// It is the owner of that generation, or wants to be.
    Owner(Generation),
    /// That generation was promoted elsewhere.
    Fenced(Generation),
    /// The group is gone.
    Over,
}

/// What a manager is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseFacts {
    /// Who owns the group, as far as this side knows.
    pub holder: Option<String>,
    /// How long this side may serve without another word of the arbiter; zero if it may not.
    pub remaining: Duration,
    /// Whether users wait for the arbiter.
    pub suspended: bool,
    /// Why, or what is wrong.
    pub error: Option<String>,
}

/// Who wants to take over, from where.
#[derive(Clone, Copy, Debug)]
pub struct Claim {
    /// Whose checkpoints it has.
    pub generation: Generation,
    /// The newest of them.
    pub epoch: Epoch,
    /// Somebody has said that what is lost may be lost.
    pub force: bool,
}

/// See above.
pub struct Lease {
    env: Env,
    fencing: Fencing,
    holder: String,
    phase: Cell<Phase>,
    grant: Cell<Option<Grant>>,
    /// When this side has to stop answering, since boot.
    until: Cell<Duration>,
    /// The state as this side recorded it last.
    recorded: Cell<Option<State>>,
    /// What has to be recorded before anything is answered.
    needs: Cell<Epoch>,
    /// Somebody renews it.
    kept: Cell<bool>,
    /// Nobody waits for the arbiter: what that would be told.
    impatient: Cell<Option<ErrorKind>>,
    /// One talks to the arbiter at a time.
    line: Semaphore,
    changed: Notify,
    hurry: Notify,
    other: RefCell<Option<String>>,
    error: RefCell<Option<String>>,
    told: RefCell<Option<OnFence>>,
}

/// Is told which generation was promoted elsewhere.
type OnFence = Rc<dyn Fn(Generation)>;

fn busy(why: String) -> BlockError {
    BlockError::new(ErrorKind::Busy, why)
}

fn owned(by: &Owner) -> String {
    format!("{} owns the group by its lease for another {} ms", by.holder, by.left.as_millis())
}

impl Lease {
    /// Of a side that calls itself `holder`; it owns nothing yet.
    pub fn new(env: &Env, fencing: Fencing, holder: String) -> Rc<Lease> {
        Rc::new(Lease {
            env: env.clone(),
            fencing,
            holder,
            phase: Cell::new(Phase::Idle),
            grant: Cell::new(None),
            until: Cell::default(),
            recorded: Cell::new(None),
            needs: Cell::default(),
            kept: Cell::new(false),
            impatient: Cell::new(None),
            line: Semaphore::new(1),
            changed: Notify::new(),
            hurry: Notify::new(),
            other: RefCell::default(),
            error: RefCell::default(),
            told: RefCell::default(),
        })
    }

    /// `told` is called when it turns out that another generation was promoted.
    pub fn when_fenced(&self, told: OnFence) {
        *self.told.borrow_mut() = Some(told);
    }

    /// For `query-replication`.
    pub fn facts(&self) -> LeaseFacts {
        let left = self.until.get().saturating_sub(self.env.since_boot());
        let owner = matches!(self.phase.get(), Phase::Owner(_));
        let remaining = if owner && self.grant.get().is_some() { left } else { Duration::ZERO };
        LeaseFacts {
            holder: if remaining.is_zero() { self.other.borrow().clone() } else { Some(self.holder.clone()) },
            remaining,
            suspended: owner && !self.is_good(),
            error: self.error.borrow().clone(),
        }
    }

    /// Whether what this side answers now is answered by its owner.
    fn is_good(&self) -> bool {
        let Phase::Owner(generation) = self.phase.get() else { return true };
        let says = |s: State| s.generation == generation && s.needs >= self.needs.get();
        let timely = self.env.since_boot() < self.until.get()
            || env::bugs::planted("replication: a lease is kept for ever");
        let granted = timely && self.grant.get().is_some();
        self.fencing.advisory || (granted && self.recorded.get().is_some_and(says))
    }

    /// Waits until this side may answer. One that follows, or has no role, always may.
    ///
    /// # Errors
    /// `Io` when another was promoted, or this side has ended; when nobody waits any more, what [`Lease::let_go`] says.
    pub async fn held(&self) -> Result<()> {
        loop {
            let io = |why: String| Err(BlockError::new(ErrorKind::Io, why));
            match (self.phase.get(), self.impatient.get()) {
                (Phase::Fenced(by), _) => {
                    return io(format!("this side is fenced: generation {by} was promoted elsewhere"));
                }
                (Phase::Over, _) => return io("this side of the group has ended".to_owned()),
                _ if self.is_good() => return Ok(()),
                (_, Some(kind)) => {
                    return Err(BlockError::new(kind, "the arbiter has not granted the group to this side"));
                }
                (_, None) => self.changed.wait().await,
            }
        }
    }

    /// From now on nothing is answered before the arbiter knows that only who committed `epoch` may take over.
    pub fn need(&self, epoch: Epoch) {
        if epoch > self.needs.get()
            && !env::bugs::planted("replication: the arbiter is not told who lacks something")
        {
            self.needs.set(epoch);
            self.hurry.notify_all();
        }
    }

    /// This side is the owner of `generation`: it asks for the group, and goes on asking where the arbiter does not answer.
    ///
    /// # Errors
    /// Another owns the group, or a newer generation was promoted: this side is no owner then.
    pub async fn begin(self: &Rc<Self>, generation: Generation) -> Result<()> {
        if self.phase.get() == Phase::Owner(generation) {
            return Ok(());
        }
        self.become_owner(generation);
        if let Err(e) = self.turn().await {
            self.note(&e);
            if e.kind() == ErrorKind::Busy {
                self.phase.set(Phase::Idle);
                return Err(e);
            }
        }
        if let Phase::Fenced(by) = self.phase.get() {
            self.phase.set(Phase::Idle);
            return Err(busy(format!(
                "generation {by} was promoted elsewhere, and this side's is {generation}: let it follow as a secondary (with 'demote': true). If the group is a new one, its name at {} belonged to another",
                self.fencing.arbiter.name()
            )));
        }
        self.keep();
        Ok(())
    }

    /// Nothing is answered for it yet.
    fn become_owner(&self, generation: Generation) {
        self.phase.set(Phase::Owner(generation));
        self.recorded.set(None);
        self.needs.set(Epoch(0));
        self.until.set(Duration::ZERO);
        self.impatient.set(None);
    }

    /// This side is the owner of `generation` still: nothing is answered before the arbiter says so, too.
    pub fn insist(self: &Rc<Self>, generation: Generation) {
        self.phase.set(Phase::Owner(generation));
        self.until.set(Duration::ZERO);
        self.keep();
    }

    /// Asks for the group in order to take over; the newest generation that the arbiter knows. Nothing is answered by it yet: see
    /// [`Lease::own`].
    ///
    /// # Errors
    /// `Busy` where `claim` has no right to it: another owns it, or what it has is not all that was acknowledged. Of the arbiter.
    pub async fn claim(&self, claim: &Claim) -> Result<Generation> {
        let _line = self.line.acquire(1).await;
        if let Phase::Owner(generation) = self.phase.get() {
            return Err(busy(format!("this side is the owner of generation {generation} already")));
        }
        let seen = self.fencing.arbiter.look().await?;
        let known = seen.state.map_or(State::default(), |s| s.0);
        let other = self.other_owner(&seen);
        let lost = |why: String| {
            busy(format!(
                "{why}. To take over nevertheless, from checkpoint {} on, give 'force': true and 'acknowledge-loss': {}",
                claim.epoch.0, claim.epoch.0
            ))
        };
        if !claim.force {
            if let Some(o) = other {
                return Err(lost(owned(o)));
            }
            if known.generation > claim.generation {
                let why = format!(
                    "generation {} was promoted elsewhere, this side follows {}",
                    known.generation, claim.generation
                );
                return Err(lost(why));
            }
            let outdated = known.generation == claim.generation && claim.epoch < known.needs;
            if outdated && !env::bugs::planted("replication: who lacks something may take over") {
                return Err(lost("the primary has acknowledged writes that this side has not".to_owned()));
            }
        }
        let grant = self.take(&seen).await?;
        if let Some(o) = other {
            // it may answer until then: its next renewal fails
            self.env.sleep(o.left).await;
        }
        self.grant.set(Some(grant));
        Ok(known.generation)
    }

    /// What was claimed is owned as `generation`, which is durable here.
    pub async fn own(self: &Rc<Self>, generation: Generation) {
        self.become_owner(generation);
        if let Err(e) = self.turn().await {
            self.note(&e);
        }
        self.keep();
    }

    /// A claim that came to nothing, or an owner that is none any more; whoever waits goes on. With `forget` the arbiter forgets the group.
    pub async fn release(&self, forget: bool) {
        self.phase.set(Phase::Idle);
        self.changed.notify_all();
        self.hurry.notify_all();
        let _line = self.line.acquire(1).await;
        let grant = self.grant.take();
        if let Some(grant) = grant
            && let Err(e) = self.fencing.arbiter.release(&grant, forget).await
        {
            // it ends by itself
            self.note(&e);
        }
    }

    /// From now on nobody waits for the arbiter: what may not be answered fails so, and what may be is answered as before, until this side becomes
    /// an owner anew.
    pub fn let_go(&self, kind: ErrorKind) {
        self.impatient.set(Some(kind));
        self.changed.notify_all();
    }

    /// The group goes, and nothing is answered any more. The arbiter hears nothing of it: the grant ends by itself, and a daemon that is started
    /// again soon goes on with it.
    pub fn abandon(&self) {
        self.phase.set(Phase::Over);
        self.changed.notify_all();
        self.hurry.notify_all();
    }

    fn note(&self, e: &BlockError) {
        *self.error.borrow_mut() = Some(e.to_string());
    }

    fn keep(self: &Rc<Self>) {
        if self.kept.replace(true) {
            self.hurry.notify_all();
            return;
        }
        let lease = self.clone();
        self.env.spawn("replication lease", async move {
            while matches!(lease.phase.get(), Phase::Owner(_)) {
                // what is asked for during a turn is in the next
                let hurry = lease.hurry.wait();
                let ttl = lease.fencing.arbiter.ttl();
                let pause = match lease.turn().await {
                    Ok(()) => ttl / RENEWALS,
                    Err(e) => {
                        lease.note(&e);
                        ttl / RETRIES
                    }
                };
                lease.env.timeout(pause, hurry).await;
            }
            lease.kept.set(false);
            let told = lease.told.borrow().clone();
            if let (Phase::Fenced(by), Some(told)) = (lease.phase.get(), told) {
                told(by);
            }
        });
    }

    /// Renews the grant, or asks for one; records what has to be.
    async fn turn(&self) -> Result<()> {
        let _line = self.line.acquire(1).await;
        let Phase::Owner(generation) = self.phase.get() else { return Ok(()) };
        let asked = self.env.since_boot();
        if let Some(grant) = self.grant.get()
            && !self.fencing.arbiter.renew(&grant).await?
        {
            self.grant.set(None);
        }
        let grant = match self.grant.get() {
            Some(grant) => grant,
            None => match self.ask(generation).await? {
                Some(grant) => grant,
                None => return Ok(()),
            },
        };
        // kept where a release that came meanwhile finds it
        self.grant.set(Some(grant));
        if self.phase.get() != Phase::Owner(generation) {
            return Ok(());
        }
        let known = self.recorded.get().filter(|s| s.generation == generation);
        let needs = self.needs.get().max(known.map_or(Epoch(0), |s| s.needs));
        let state = State { generation, needs };
        if known != Some(state) {
            if !self.fencing.arbiter.record(&grant, state).await? {
                self.grant.set(None);
                return Err(BlockError::new(
                    ErrorKind::Io,
                    "the lease was lost while its owner was recorded",
                ));
            }
            self.recorded.set(Some(state));
        }
        let ttl = self.fencing.arbiter.ttl();
        let time = ttl - ttl / 10;
        let late = env::bugs::planted("replication: a grant counts from its answer");
        let asked = if late { self.env.since_boot() } else { asked };
        self.until.set(asked.saturating_add(time));
        self.error.take();
        self.changed.notify_all();
        Ok(())
    }

    /// Asks for the group as its owner of `generation`, new or again; `None` if a newer one was promoted.
    async fn ask(&self, generation: Generation) -> Result<Option<Grant>> {
        let seen = self.fencing.arbiter.look().await?;
        let known = seen.state.map(|s| s.0);
        if let Some(newer) = known.filter(|s| s.generation > generation) {
            self.fence(newer.generation);
            return Ok(None);
        }
        if let Some(o) = self.other_owner(&seen) {
            return Err(busy(owned(o)));
        }
        self.recorded.set(known);
        self.take(&seen).await.map(Some)
    }

    /// Who else owns the group.
    fn other_owner<'a>(&self, seen: &'a Seen) -> Option<&'a Owner> {
        let other = seen.owner.as_ref().filter(|o| o.holder != self.holder);
        *self.other.borrow_mut() = other.map(|o| o.holder.clone());
        other
    }

    async fn take(&self, seen: &Seen) -> Result<Grant> {
        let quicker = || busy("somebody else asked the arbiter for the group at the same time".to_owned());
        self.fencing.arbiter.take(&self.holder, seen).await?.ok_or_else(quicker)
    }

    fn fence(&self, by: Generation) {
        self.phase.set(Phase::Fenced(by));
        self.grant.set(None);
        self.changed.notify_all();
    }
}
