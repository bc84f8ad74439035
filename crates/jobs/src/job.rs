//! One job: its state, what steers it, and how it ends.
//!
//! What can happen: verbs at any moment, failures that stop or end it, the engine resting or not. What must stay true:
//! the state changes only along the table of [`State`]; each change is told once, in order; a job that was told to
//! rest has nothing in flight before it says so; whatever ends a job, its body is told exactly once how.

use crate::error::JobError;
use crate::event::{Event, Kind, Progress};
use crate::leavers::Leaving;
use crate::outcome::Figures;
use crate::registry::{Group, Shared};
use crate::state::{State, Verb};
use block::{BlockError, Io, Result};
use copy::{Action, Control, Links, Mismatch, OnError, Outage, Report, Side};
use env::sync::Notify;
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

/// Whether failed requests stand out (QMP: io-status).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum IoStatus {
    /// None since the last resume.
    #[default]
    Ok,
    /// One failed.
    Failed,
    /// One failed for want of space.
    NoSpace,
}

/// What a kind of job does; the rest is common to all.
pub trait Body {
    /// The work, up to where the graph may change. Dropped when the job is cancelled: it must leave nothing behind that
    /// [`Body::finish`] does not clean up.
    fn run<'a>(&'a self, job: &'a Rc<Job>) -> Io<'a>;
    /// Changes the graph for success. An error makes the job fail.
    fn prepare(&self) -> Io<'_> {
        Box::pin(async { Ok(()) })
    }
    /// Whether the change of the graph for success has been made: whatever happens now, the job has done its work.
    fn has_changed(&self) -> bool {
        false
    }
    /// Once the graph has changed: files that are to be deleted and may still be there.
    fn leaving(&self) -> Vec<Leaving> {
        Vec::new()
    }
    /// The last call: everything is given back. `success` says whether [`Body::prepare`] took effect.
    fn finish(&self, success: bool) -> Pin<Box<dyn Future<Output = ()> + '_>> {
        let _ = success;
        Box::pin(async {})
    }
    /// What stays with the job until it is dismissed, taken when it concludes.
    fn keep(&self) -> Option<Box<dyn Any>> {
        None
    }
    /// How far the work is.
    fn progress(&self) -> Progress;
    /// Whether it was told to complete, and will as soon as it can.
    fn is_completing(&self) -> bool {
        false
    }
    /// Verb `complete`.
    fn complete(&self, job: &Job) -> Result<()> {
        Err(BlockError::invalid(format!("The active block job '{}' cannot be completed", job.id())))
    }
    /// Asked to end without a pivot but as a success; `false` if this job cannot do that now.
    fn soft_cancel(&self) -> bool {
        false
    }
    /// What the comparison of source and target has come to, if one was asked for.
    fn verified(&self) -> Option<Report> {
        None
    }
    /// What the record of finished jobs tells of it, beside what all jobs have.
    fn figures(&self) -> Figures {
        Figures::default()
    }
    /// For queries and `change`.
    fn as_any(&self) -> &dyn Any;
}

/// A rate limit as a client gives it, in bytes per second, 0 for none.
pub(crate) fn rate_limit(speed: i64) -> Result<u64> {
    u64::try_from(speed).map_err(|_| BlockError::invalid("Parameter 'speed' expects a non-negative value"))
}

/// Options that all jobs have.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Change the graph without waiting for `finalize`.
    pub auto_finalize: bool,
    /// Vanish once concluded.
    pub auto_dismiss: bool,
    /// Rate limit in bytes per second, 0 for none.
    pub speed: u64,
    /// What to do about failed reads.
    pub on_source_error: OnError,
    /// What to do about failed writes.
    pub on_target_error: OnError,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            auto_finalize: true,
            auto_dismiss: true,
            speed: 0,
            on_source_error: OnError::Report,
            on_target_error: OnError::Report,
        }
    }
}

/// A job.
pub struct Job {
    id: String,
    kind: Kind,
    options: Options,
    /// When it was made: as time since 1970, and by the clock that is never set.
    pub(crate) created_at: (Duration, Duration),
    state: Cell<State>,
    body: RefCell<Option<Rc<dyn Body>>>,
    pub(crate) group: RefCell<Rc<Group>>,
    pub(crate) shared: Rc<Shared>,
    user_paused: Cell<bool>,
    idle: Cell<bool>,
    /// At a pause point, with nothing in flight.
    parked: Cell<bool>,
    pub(crate) cancelled: Cell<bool>,
    ending: Cell<bool>,
    /// See [`Job::is_over`].
    over: Cell<bool>,
    speed: Cell<u64>,
    io_status: Cell<IoStatus>,
    error: RefCell<Option<BlockError>>,
    changed: Notify,
    /// Whose losses are bridged.
    links: RefCell<Option<Rc<Links>>>,
    /// The link that was waited for in vain, until the job goes on.
    given_up: RefCell<Option<(Side, BlockError)>>,
    last_progress: Cell<Progress>,
    last_verified: Cell<Option<Report>>,
    pub(crate) resumed: Cell<Option<&'static str>>,
    /// What a concluded job still holds.
    kept: RefCell<Option<Box<dyn Any>>>,
}

impl Job {
    /// See [`Registry::dissolve`](crate::Registry::dissolve).
    pub(crate) fn dissolve(&self) {
        self.body.take();
        self.kept.take();
        self.links.take();
    }

    pub(crate) fn new(
        id: String,
        kind: Kind,
        options: Options,
        group: Rc<Group>,
        shared: Rc<Shared>,
    ) -> Rc<Job> {
        Rc::new(Job {
            id,
            kind,
            options,
            created_at: (shared.env.wall(), shared.env.now()),
            state: Cell::new(State::Undefined),
            body: RefCell::new(None),
            group: RefCell::new(group),
            shared,
            user_paused: Cell::new(false),
            idle: Cell::new(false),
            parked: Cell::new(false),
            cancelled: Cell::new(false),
            ending: Cell::new(false),
            over: Cell::new(false),
            speed: Cell::new(options.speed),
            io_status: Cell::new(IoStatus::Ok),
            error: RefCell::new(None),
            changed: Notify::new(),
            links: RefCell::default(),
            given_up: RefCell::default(),
            last_progress: Cell::default(),
            last_verified: Cell::new(None),
            resumed: Cell::new(None),
            kept: RefCell::new(None),
        })
    }

    /// Job id.
    pub fn id(&self) -> &str {
        &self.id
    }
    /// Kind of job.
    pub fn kind(&self) -> Kind {
        self.kind
    }
    /// Its options.
    pub fn options(&self) -> &Options {
        &self.options
    }
    /// Where it is in its life.
    pub fn state(&self) -> State {
        self.state.get()
    }
    /// Why it failed (or that it was cancelled), once it is over.
    pub fn error(&self) -> Option<BlockError> {
        self.error.borrow().clone()
    }
    /// Rate limit in bytes per second, 0 for none.
    pub fn speed(&self) -> u64 {
        self.speed.get()
    }
    /// See [`IoStatus`]. Reset when the job ends.
    pub fn io_status(&self) -> IoStatus {
        self.io_status.get()
    }
    /// Whether a pause is in force: asked for by the user or after an error.
    pub fn is_paused(&self) -> bool {
        self.user_paused.get() && self.state.get() < State::Waiting
    }
    /// Whether the job is at work right now (racy by nature).
    pub fn is_busy(&self) -> bool {
        matches!(self.state.get(), State::Running | State::Ready) && !self.idle.get() && !self.parked.get()
    }
    /// How far the work is.
    pub fn progress(&self) -> Progress {
        let body = self.body.borrow().clone();
        body.map_or(self.last_progress.get(), |b| b.progress())
    }
    /// Whether a later life of the process has nothing left to do for it: it has done its work, or has failed.
    pub fn is_over(&self) -> bool {
        self.over.get() || self.body().is_some_and(|b| b.has_changed())
    }
    pub(crate) fn set_over(&self) {
        self.over.set(true);
    }
    /// What the comparison of source and target has come to, if one was asked for; also once the job is over.
    pub fn verified(&self) -> Option<Report> {
        let body = self.body.borrow().clone();
        body.map_or(self.last_verified.get(), |b| b.verified())
    }
    /// What this kind of job does; gone once it is over.
    pub fn body(&self) -> Option<Rc<dyn Body>> {
        self.body.borrow().clone()
    }
    pub(crate) fn set_body(&self, body: Rc<dyn Body>) {
        *self.body.borrow_mut() = Some(body);
    }

    pub(crate) fn accept(&self, verb: Verb) -> Result<(), JobError> {
        if self.state.get().accepts(verb) {
            return Ok(());
        }
        Err(JobError::refused(format!(
            "Job '{}' in state '{}' cannot accept command verb '{}'",
            self.id,
            self.state.get(),
            verb.name()
        )))
    }

    pub(crate) fn set_state(&self, next: State) {
        debug_assert!(self.state.get().may_become(next), "{}: {} -> {next}", self.id, self.state.get());
        if next != self.state.replace(next) {
            self.shared.tell(Event::Status { id: self.id.clone(), state: next });
        }
        self.changed.notify_all();
    }

    /// Announces READY: in sync for the first time.
    pub(crate) fn set_ready(&self) {
        self.set_state(State::Ready);
        self.shared.tell(Event::Ready {
            id: self.id.clone(),
            kind: self.kind,
            progress: self.progress(),
            speed: self.speed.get(),
        });
    }

    /// Losses of these links are bridged from now on.
    pub(crate) fn set_links(&self, links: Option<Rc<Links>>) {
        *self.links.borrow_mut() = links;
    }

    /// It was begun by an earlier life of the daemon, and goes on in this way.
    pub fn note_resumed(&self, how: &'static str) {
        self.resumed.set(Some(how));
    }

    /// See [`Job::note_resumed`].
    pub fn resumed(&self) -> Option<&'static str> {
        self.resumed.get()
    }

    /// The lost link that is waited for.
    pub fn outage(&self) -> Option<Outage> {
        self.links.borrow().as_ref()?.outage()
    }

    /// The link that was waited for in vain, why, until the job is told to go on.
    pub fn given_up(&self) -> Option<(Side, BlockError)> {
        self.given_up.borrow().clone()
    }

    /// How often links were lost and waited for; `None` where losses are not bridged.
    pub fn outages(&self) -> Option<u64> {
        self.links.borrow().as_ref().map(|l| l.outages())
    }

    pub(crate) fn set_error(&self, error: BlockError) {
        self.error.borrow_mut().get_or_insert(error);
    }

    /// Tells how it ended, drops the body, and goes to `concluded` (and on, if it is to vanish by itself).
    pub(crate) fn conclude(self: &Rc<Job>) {
        let progress = self.progress();
        self.last_progress.set(progress);
        let verified = self.verified();
        self.last_verified.set(verified);
        self.io_status.set(IoStatus::Ok);
        self.user_paused.set(false);
        self.shared.record(self.finished(progress));
        self.links.take();
        self.given_up.take();
        let body = self.body.take();
        if !self.options.auto_dismiss {
            *self.kept.borrow_mut() = body.as_ref().and_then(|b| b.keep());
        }
        let (id, kind, speed) = (self.id.clone(), self.kind, self.speed.get());
        if kind.is_block_job() {
            let error = self.error.borrow().as_ref().map(|e| e.message().to_owned());
            self.shared.tell(if self.cancelled.get() {
                Event::Cancelled { id, kind, progress, speed }
            } else {
                Event::Completed { id, kind, progress, speed, error, verified }
            });
        }
        drop(body);
        self.set_state(State::Concluded);
        if self.options.auto_dismiss {
            self.shared.forget(self);
        }
    }

    /// The job was concluded in an earlier life of the process.
    pub(crate) fn was_concluded(&self, progress: Progress, error: Option<BlockError>) {
        self.last_progress.set(progress);
        *self.error.borrow_mut() = error;
        self.ending.set(true);
        self.over.set(true);
        self.state.set(State::Concluded);
    }

    pub(crate) fn pause(&self) -> Result<(), JobError> {
        self.accept(Verb::Pause)?;
        if self.user_paused.get() {
            return Err(JobError::refused("Job is already paused"));
        }
        self.user_paused.set(true);
        if self.idle.get()
            && let Some(resting) = self.state.get().resting()
        {
            self.set_state(resting);
        }
        self.changed.notify_all();
        Ok(())
    }

    pub(crate) fn resume(&self) -> Result<(), JobError> {
        if !self.user_paused.get() {
            return Err(JobError::refused("Can't resume a job that was not paused"));
        }
        self.accept(Verb::Resume)?;
        self.user_paused.set(false);
        self.io_status.set(IoStatus::Ok);
        self.given_up.take();
        self.leave_rest();
        self.changed.notify_all();
        Ok(())
    }

    /// Back from `paused` or `standby`, if it is there.
    pub(crate) fn leave_rest(&self) {
        if let Some(woken) = self.state.get().woken() {
            self.set_state(woken);
        }
    }

    pub(crate) fn set_speed(&self, speed: i64) -> Result<(), JobError> {
        self.accept(Verb::SetSpeed)?;
        self.speed.set(rate_limit(speed)?);
        self.changed.notify_all();
        Ok(())
    }

    /// A hard cancel: the work is dropped as soon as its task runs.
    pub(crate) fn cancel_hard(&self) {
        self.cancelled.set(true);
        self.changed.notify_all();
    }

    /// Lets go of what was kept beyond the conclusion.
    pub(crate) fn let_go(&self) {
        let kept = self.kept.take();
        drop(kept);
    }

    /// Announces a failed request and what is done about it.
    fn act(&self, side: Side, error: &BlockError, action: Action) -> Action {
        self.shared.tell(Event::Error { id: self.id.clone(), side, action });
        if action == Action::Stop {
            if self.io_status.get() == IoStatus::Ok {
                let full = error.errno() == BlockError::ENOSPC;
                self.io_status.set(if full { IoStatus::NoSpace } else { IoStatus::Failed });
            }
            self.user_paused.set(true);
            self.changed.notify_all();
        }
        action
    }

    pub(crate) fn user_paused(&self) -> bool {
        self.user_paused.get()
    }

    /// Wakes the job to look at what it was told.
    pub(crate) fn nudge(&self) {
        self.changed.notify_all();
    }

    /// The first caller gets to end the job.
    pub(crate) fn begin_end(&self) -> bool {
        !self.ending.replace(true)
    }

    pub(crate) async fn hard_cancelled(&self) {
        loop {
            let again = self.changed.wait();
            if self.cancelled.get() {
                return;
            }
            again.await;
        }
    }

    /// Ends once the job has reached `concluded`.
    pub async fn concluded(&self) {
        loop {
            let again = self.changed.wait();
            if self.state.get() >= State::Concluded {
                return;
            }
            again.await;
        }
    }

    /// Ends once the job is in `state` or beyond any state of work.
    pub async fn reached(&self, state: State) {
        loop {
            let again = self.changed.wait();
            if self.state.get() == state || self.state.get() >= State::Concluded {
                return;
            }
            again.await;
        }
    }
}

impl Control for Job {
    fn pause_wanted(&self) -> bool {
        self.user_paused.get()
    }

    fn park(&self) -> Pin<Box<dyn Future<Output = ()> + '_>> {
        Box::pin(async {
            if let Some(resting) = self.state.get().resting() {
                self.set_state(resting);
            }
            self.parked.set(true);
            loop {
                let again = self.changed.wait();
                if !self.user_paused.get() {
                    break;
                }
                again.await;
            }
            self.parked.set(false);
            self.leave_rest();
        })
    }

    fn speed(&self) -> u64 {
        self.speed.get()
    }

    fn failed(&self, side: Side, error: &BlockError) -> Action {
        // what a stream writes it was asked to fetch: to its user all failures are failures to read
        let side = if self.kind == Kind::Stream { Side::Source } else { side };
        if self.links.borrow().as_ref().is_some_and(|l| l.explain(side, error)) {
            // told when it is waited for
            return Action::Ignore;
        }
        let rule = match side {
            Side::Source => self.options.on_source_error,
            Side::Target => self.options.on_target_error,
        };
        self.act(side, error, rule.action(error))
    }

    fn links(&self) -> Option<Rc<Links>> {
        self.links.borrow().clone()
    }

    fn link_lost(&self, side: Side, why: &BlockError) {
        let Some(rule) = self.links.borrow().as_ref().map(|l| l.rule()) else { return };
        let (id, reason) = (self.id.clone(), why.message().to_owned());
        self.shared.tell(Event::LinkLost { id, side, reason, wait: rule.wait, then: rule.then });
    }

    fn link_back(&self, side: Side, down: Duration, again: u64) {
        self.shared.tell(Event::LinkBack { id: self.id.clone(), side, down, again });
    }

    fn link_given_up(&self, side: Side, why: &BlockError) -> Action {
        let then = self.links.borrow().as_ref().map_or(Action::Report, |l| l.rule().then);
        if then == Action::Stop {
            *self.given_up.borrow_mut() = Some((side, why.clone()));
        }
        self.act(side, why, then)
    }

    fn mismatch(&self, found: &Mismatch) {
        self.shared.tell(Event::Mismatch { id: self.id.clone(), found: *found });
    }

    fn changed(&self) -> &Notify {
        &self.changed
    }

    fn set_idle(&self, idle: bool) {
        self.idle.set(idle);
    }
}
