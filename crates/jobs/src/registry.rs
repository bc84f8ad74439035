//! All jobs, the transactions they belong to, and the verbs of the commands.
//!
//! What must stay true: ids are one namespace; the members of a transaction pass `waiting` and `pending` together, are
//! finalized together, and if one fails or is cancelled the others are cancelled; each job is ended by one caller.

use crate::error::JobError;
use crate::event::{Event, Kind, Progress, Sink};
use crate::job::{Body, Job, Options};
use crate::outcome::Finished;
use crate::state::{State, Verb};
use block::{BlockError, Result};
use env::Env;
use env::sync::race;
use open::BitmapHome;
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;

/// Most jobs at once, concluded ones included: far beyond what managers start, and a bound for their memory.
pub const MAX_JOBS: usize = 4096;

/// Writes down what a later life of the process has to know of jobs.
pub trait JobKeeper {
    /// A job is about to change what that life finds (headers of images, the graph): it has to know that the job runs.
    fn keep_running(&self) -> block::Io<'_>;
    /// The state of a job has changed in a way that a later life of the process has to know.
    fn keep(&self) -> Pin<Box<dyn Future<Output = ()> + '_>>;
}

pub(crate) struct Shared {
    pub(crate) env: Env,
    sink: Rc<dyn Sink>,
    jobs: RefCell<Vec<Rc<Job>>>,
    keeper: RefCell<Option<Rc<dyn JobKeeper>>>,
    /// The daemon ends: work that is done from now on changes nothing any more.
    closing: Cell<bool>,
}

impl Shared {
    pub(crate) fn tell(&self, event: Event) {
        self.sink.event(event);
    }

    /// Whether anything is written down for a later life.
    pub(crate) fn is_kept(&self) -> bool {
        self.keeper.borrow().is_some()
    }

    /// Before a job changes what a later life finds.
    async fn keep_running(&self) -> block::Result<()> {
        let keeper = self.keeper.borrow().clone();
        match keeper {
            Some(keeper) => keeper.keep_running().await,
            None => Ok(()),
        }
    }

    /// The job is over; that is written down before it is told.
    pub(crate) async fn keep_end(&self, job: &Job) {
        job.set_over();
        let keeper = self.keeper.borrow().clone();
        if let Some(keeper) = keeper {
            keeper.keep().await;
        }
    }

    /// A job is over.
    pub(crate) fn record(&self, job: Finished) {
        self.sink.finished(job);
    }

    /// The job vanishes.
    pub(crate) fn forget(&self, job: &Rc<Job>) {
        job.let_go();
        job.set_state(State::Null);
        self.jobs.borrow_mut().retain(|j| !Rc::ptr_eq(j, job));
        // the two hold each other
        let group = job.group.borrow().clone();
        group.members.borrow_mut().retain(|j| !Rc::ptr_eq(j, job));
    }
}

/// Jobs that end together.
#[derive(Default)]
pub struct Group {
    members: RefCell<Vec<Rc<Job>>>,
    finalizing: Cell<bool>,
}

impl Group {
    /// A group without members.
    pub fn new() -> Rc<Group> {
        Rc::default()
    }

    fn members(&self) -> Vec<Rc<Job>> {
        self.members.borrow().clone()
    }

    /// A member has done its work: if it was the last, all become pending, and final unless somebody has to say so.
    async fn arrived(&self) {
        let members = self.members();
        if members.iter().any(|m| m.state() != State::Waiting) {
            return;
        }
        members.iter().for_each(|m| m.set_state(State::Pending));
        if members.iter().all(|m| m.options().auto_finalize) {
            self.finalize().await;
            return;
        }
        for m in members.iter().filter(|m| !m.options().auto_finalize && m.kind().is_block_job()) {
            m.shared.tell(Event::Pending { id: m.id().to_owned(), kind: m.kind() });
        }
    }

    /// All graph changes, then all conclusions; the first failure ends all.
    async fn finalize(&self) {
        if self.finalizing.replace(true) {
            return;
        }
        let members = self.members();
        if let Err((culprit, error)) = prepare_all(&members).await {
            culprit.set_error(error);
            self.abort(culprit).await;
            return;
        }
        for m in &members {
            if m.begin_end() {
                if let Some(body) = m.body() {
                    body.finish(true).await;
                }
                m.shared.keep_end(m).await;
                m.conclude();
            }
        }
    }

    /// `culprit` failed or was cancelled: all end without success. Members that still work are told and end by
    /// themselves.
    async fn abort(&self, culprit: &Rc<Job>) {
        self.finalizing.set(true);
        end_badly(culprit).await;
        for m in self.members() {
            if Rc::ptr_eq(&m, culprit) {
                continue;
            }
            match m.state() {
                State::Waiting | State::Pending => {
                    m.cancelled.set(true);
                    end_badly(&m).await;
                }
                s if s.is_live() => m.cancel_hard(),
                _ => {}
            }
        }
    }
}

/// The graph changes of all; the error of the first that fails, and whose it is.
async fn prepare_all(members: &[Rc<Job>]) -> std::result::Result<(), (&Rc<Job>, BlockError)> {
    if let Some(any) = members.first() {
        // a job that has nothing to copy may be here before its command was recorded
        any.shared.keep_running().await.map_err(|e| (any, e))?;
    }
    for m in members {
        if let Some(body) = m.body() {
            body.prepare().await.map_err(|e| (m, e))?;
        }
    }
    Ok(())
}

/// Clean-up and conclusion of a job that failed (its error is set) or was cancelled.
async fn end_badly(job: &Rc<Job>) {
    if !job.begin_end() {
        return;
    }
    if job.cancelled.get() {
        job.set_error(BlockError::from_errno(BlockError::ECANCELED));
    }
    job.leave_rest();
    job.set_state(State::Aborting);
    if let Some(body) = job.body() {
        body.finish(false).await;
    }
    job.shared.keep_end(job).await;
    job.conclude();
}

/// All jobs of a home thread.
pub struct Registry {
    env: Env,
    pub(crate) shared: Rc<Shared>,
    home: RefCell<Option<Rc<BitmapHome>>>,
}

impl Registry {
    /// No jobs. Events go to `sink`.
    pub fn new(env: &Env, sink: Rc<dyn Sink>) -> Rc<Registry> {
        let (jobs, keeper) = (RefCell::default(), RefCell::default());
        let shared = Rc::new(Shared { env: env.clone(), sink, jobs, keeper, closing: Cell::new(false) });
        Rc::new(Registry { env: env.clone(), shared, home: RefCell::default() })
    }

    /// From now on `keeper` is told of jobs that are over before anybody else is.
    pub fn set_keeper(&self, keeper: Rc<dyn JobKeeper>) {
        *self.shared.keeper.borrow_mut() = Some(keeper);
    }

    /// Takes apart what holds itself, for a process that ends without freeing it: the simulator kills many. Nothing runs any more.
    pub fn dissolve(&self) {
        self.shared.keeper.take();
        for job in self.shared.jobs.take() {
            job.group.borrow().members.take();
            job.dissolve();
        }
    }

    /// From now on jobs keep what they have still to do in `home`.
    pub fn set_bitmap_home(&self, home: Option<Rc<BitmapHome>>) {
        *self.home.borrow_mut() = home;
    }

    pub(crate) fn bitmap_home(&self) -> Option<Rc<BitmapHome>> {
        self.home.borrow().clone()
    }

    /// All jobs, newest first.
    pub fn list(&self) -> Vec<Rc<Job>> {
        self.shared.jobs.borrow().iter().rev().cloned().collect()
    }

    /// The job `id`, for `job-*` commands.
    pub fn find(&self, id: &str) -> Result<Rc<Job>, JobError> {
        self.shared.jobs.borrow().iter().find(|j| j.id() == id).cloned().ok_or(JobError::NotFound)
    }

    /// The block job `id`, for `block-job-*` commands.
    pub fn find_block_job(&self, id: &str) -> Result<Rc<Job>, JobError> {
        let job = self.find(id).ok().filter(|j| j.kind().is_block_job());
        job.ok_or_else(|| JobError::NotActive(id.to_owned()))
    }

    /// Makes a job that does not run yet. The id must be free: a letter, then letters, digits, `-`, `.`, `_`.
    pub fn create(
        &self,
        id: &str,
        kind: Kind,
        options: Options,
        group: Option<Rc<Group>>,
    ) -> Result<Rc<Job>, JobError> {
        let rest = id.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'));
        if !id.starts_with(|c: char| c.is_ascii_alphabetic()) || !rest {
            return Err(JobError::refused(format!("Invalid job ID '{id}'")));
        }
        if self.find(id).is_ok() {
            return Err(JobError::refused(format!("Job ID '{id}' already in use")));
        }
        if self.shared.jobs.borrow().len() >= MAX_JOBS {
            return Err(JobError::refused(format!("There are {MAX_JOBS} jobs already; dismiss some")));
        }
        let group = group.unwrap_or_default();
        let job = Job::new(id.to_owned(), kind, options, group.clone(), self.shared.clone());
        group.members.borrow_mut().push(job.clone());
        self.shared.jobs.borrow_mut().push(job.clone());
        job.set_state(State::Created);
        Ok(job)
    }

    /// A job that was concluded in an earlier life of the process, until it is dismissed.
    ///
    /// # Errors
    /// Its id is taken.
    pub fn remember(
        &self,
        id: &str,
        kind: Kind,
        options: Options,
        progress: Progress,
        error: Option<BlockError>,
    ) -> Result<(), JobError> {
        if self.find(id).is_ok() {
            return Err(JobError::refused(format!("Job ID '{id}' already in use")));
        }
        let job = Job::new(id.to_owned(), kind, options, Rc::default(), self.shared.clone());
        job.was_concluded(progress, error);
        self.shared.jobs.borrow_mut().push(job);
        Ok(())
    }

    /// The start of a created job failed: it was never there.
    pub fn discard(&self, job: &Rc<Job>) {
        self.shared.forget(job);
    }

    /// A created job with all that `body` has done is given up before it runs (its transaction failed).
    pub async fn give_up(&self, job: &Rc<Job>, body: Rc<dyn Body>) {
        job.set_state(State::Aborting);
        body.finish(false).await;
        job.set_state(State::Concluded);
        self.shared.forget(job);
    }

    /// Starts a created job.
    pub fn start(&self, job: &Rc<Job>, body: Rc<dyn Body>) {
        job.set_body(body);
        job.set_state(State::Running);
        self.env.spawn("job", drive(job.clone()));
    }

    /// Starts a created job with what was built for it. If that failed the job was never there.
    pub(crate) fn launch<B: Body + 'static>(
        &self,
        job: Rc<Job>,
        built: Result<Rc<B>>,
    ) -> std::result::Result<Rc<Job>, JobError> {
        match built {
            Ok(body) => {
                self.start(&job, body);
                Ok(job)
            }
            Err(e) => {
                self.discard(&job);
                Err(e.into())
            }
        }
    }

    /// `job-pause`, `block-job-pause`.
    pub fn pause(&self, job: &Rc<Job>) -> Result<(), JobError> {
        job.pause()
    }

    /// `job-resume`, `block-job-resume`.
    pub fn resume(&self, job: &Rc<Job>) -> Result<(), JobError> {
        job.resume()
    }

    /// `block-job-set-speed`; bytes per second.
    pub fn set_speed(&self, job: &Rc<Job>, speed: i64) -> Result<(), JobError> {
        job.set_speed(speed)
    }

    /// `job-complete`, `block-job-complete`.
    pub fn complete(&self, job: &Rc<Job>) -> Result<(), JobError> {
        job.accept(Verb::Complete)?;
        if let Some(body) = job.body() {
            body.complete(job)?;
        }
        job.nudge();
        Ok(())
    }

    /// `job-cancel`, and `block-job-cancel` with `force`: ends without success. Returns when that is certain, not when it is done
    /// (but for jobs that have done their work: those have ended).
    pub async fn cancel(&self, job: &Rc<Job>) -> Result<(), JobError> {
        job.accept(Verb::Cancel)?;
        self.cancel_now(job).await;
        Ok(())
    }

    async fn cancel_now(&self, job: &Rc<Job>) {
        match job.state() {
            State::Waiting | State::Pending => {
                let group = job.group.borrow().clone();
                if !group.finalizing.get() {
                    job.cancelled.set(true);
                    group.abort(job).await;
                }
            }
            _ => job.cancel_hard(),
        }
    }

    /// `block-job-cancel` without `force`: a ready mirror ends as a success without a pivot, anything else is cancelled.
    pub async fn cancel_softly(&self, job: &Rc<Job>) -> Result<(), JobError> {
        if job.user_paused()
            && matches!(
                job.state(),
                State::Created | State::Running | State::Paused | State::Ready | State::Standby
            )
        {
            return Err(JobError::refused(format!(
                "The block job for device '{}' is currently paused",
                job.id()
            )));
        }
        job.accept(Verb::Cancel)?;
        let soft = job.state() == State::Ready && job.body().is_some_and(|b| b.soft_cancel());
        if soft {
            job.nudge();
        } else {
            self.cancel_now(job).await;
        }
        Ok(())
    }

    /// `job-finalize`, `block-job-finalize`: all of the transaction. Returns when the jobs are concluded.
    pub async fn finalize(&self, job: &Rc<Job>) -> Result<(), JobError> {
        job.accept(Verb::Finalize)?;
        let group = job.group.borrow().clone();
        group.finalize().await;
        Ok(())
    }

    /// `job-dismiss`, `block-job-dismiss`.
    pub fn dismiss(&self, job: &Rc<Job>) -> Result<(), JobError> {
        job.accept(Verb::Dismiss)?;
        self.shared.forget(job);
        Ok(())
    }

    /// For the end of the daemon: waits until no job is changing the graph, so that what was changed is written down.
    pub async fn finalized(&self) {
        let finalizing = |j: &Rc<Job>| j.group.borrow().finalizing.get() && j.state() != State::Concluded;
        loop {
            let next = self.list().into_iter().find(finalizing);
            match next {
                Some(job) => job.concluded().await,
                None => return,
            }
        }
    }

    /// For the end of the daemon: cancels jobs that have done their work and wait for their end, and those that are about to: they
    /// hold clients' requests. What comes to its end later changes nothing.
    pub async fn cancel_resting(&self) {
        self.shared.closing.set(true);
        for job in self.list() {
            let completing = || job.state().is_live() && job.body().is_some_and(|b| b.is_completing());
            if matches!(job.state(), State::Waiting | State::Pending) || completing() {
                self.cancel_now(&job).await;
            }
        }
    }

    /// For the end of the daemon: cancels all jobs, waits until they have ended, forgets them.
    pub async fn cancel_all(&self) {
        for job in self.list() {
            if job.state().is_live() {
                self.cancel_now(&job).await;
            }
        }
        for job in self.list() {
            job.concluded().await;
            if job.state() == State::Concluded {
                self.shared.forget(&job);
            }
        }
    }
}

/// A job's task: its work, and what follows from how that ended.
async fn drive(job: Rc<Job>) {
    let Some(body) = job.body() else { return };
    let outcome = if job.cancelled.get() { None } else { race(body.run(&job), job.hard_cancelled()).await };
    drop(body);
    let group = job.group.borrow().clone();
    match outcome {
        Some(Ok(())) if !job.cancelled.get() && !job.shared.closing.get() => {
            // a pause that came after the last piece of work has nothing to hold back
            job.leave_rest();
            job.set_state(State::Waiting);
            group.arrived().await;
        }
        Some(Err(error)) if !job.cancelled.get() => {
            job.set_error(error);
            group.abort(&job).await;
        }
        _ => {
            job.cancelled.set(true);
            group.abort(&job).await;
        }
    }
}
