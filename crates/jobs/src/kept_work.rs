//! What a mirror or a backup has still to copy, kept so that a later life of the daemon goes on with it (`--state-dir`).
//!
//! What can happen: the daemon is killed, or the power fails, at any moment; the link to the target is lost; the target is another
//! file when the daemon comes back, or somebody else has written to it. What must stay true:
//! * What is kept contains all that source and target may not both have on their stable storage. So it begins as everything: what
//!   need not be copied is let go by the first flush of both, like what has been.
//! * A synchronous write reaches the target only after the log of the source's writes says so ([`copy::Work`]).
//! * Nothing is let go once clients' writes pass the job by (its instant has come, it ends): it may be restored from before that.
//! * A backup copies the disk as of one instant. Where that is lost with the daemon, the target lacks of the disk as of the restart what
//!   had not been copied, and all that clients wrote since the instant, also where the old bytes were copied.
//! * A job that was started by a user and not resumed never takes what another one left; nor does one onto another file, or a file
//!   that was changed since ([`BitmapHome::is_as_left`]), nor one onto a disk that differs in any of some places where it need not be
//!   copied to (devices and peers do not tell whether they are the same).
//! * Nothing is kept where flushes do not reach the disk (`cache.no-flush`).

use crate::event::Kind;
use bitmap::Bitmap;
use block::{BlockError, ErrorKind, Result, Span};
use copy::Work;
use dirtylog::{DirtyLog, JobSet};
use env::bugs::planted;
use env::sync::{Notify, race};
use env::{Env, FileKind, TaskHandle};
use graph::{Edge, Graph, NodeCell};
use open::BitmapHome;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

/// Bytes copied after which the target is flushed and they are let go: what is copied again after a crash, beside what was
/// dirty.
const STEP: u64 = 64 << 20;
/// Bytes of copied data that may not be let go yet, at least, and as a part of the disk: then copying waits until they are. (Copies into
/// the page cache are made many times faster than they are flushed.)
const MOST: u64 = 2 * STEP;
/// See [`MOST`]: 160 MiB of 10 GiB, as much as the log of changes may have in doubt.
const MOST_SHARE: u64 = 64;
/// The same is done after so long, if anything was copied.
const PERIOD: Duration = Duration::from_secs(2);
/// Places that are compared before a target is believed to be as it was left.
const SAMPLES: u64 = 32;
/// Bytes of each.
const SAMPLE: u64 = 4096;
/// How far from where chance has it the source is asked for data to be compared.
const SEARCH: u64 = 1 << 30;
/// A place that differs is looked at again after so long, so often: clients may be writing there.
const AGAIN: (Duration, u32) = (Duration::from_millis(50), 4);
/// How often it is looked whether it is time.
const LOOK: Duration = Duration::from_millis(50);

/// See above.
pub(crate) struct KeptWork {
    env: Env,
    home: Rc<BitmapHome>,
    log: Rc<DirtyLog>,
    key: String,
    set: RefCell<Option<Rc<JobSet>>>,
    /// The job copies the disk as of one instant.
    of_instant: bool,
    resumed: Cell<bool>,
    over: Cell<bool>,
    stop: Notify,
    task: RefCell<Option<TaskHandle>>,
}

impl KeptWork {
    /// For the job `id` of this kind, of `source` onto `target`; nothing where nothing can be kept. What an earlier life left of it is found only
    /// while that is being restored.
    ///
    /// # Errors
    /// What an earlier job left could not be given up: after a crash it would be taken for what this one has to do.
    pub(crate) async fn find(
        home: Option<Rc<BitmapHome>>,
        graph: &Graph,
        source: &Rc<NodeCell>,
        target: &NodeCell,
        (kind, id): (Kind, &str),
    ) -> Result<Option<Rc<KeptWork>>> {
        let Some(home) = home.filter(|_| is_flushed(source) && is_flushed(target)) else { return Ok(None) };
        let Ok(log) = home.log(graph, source).await else { return Ok(None) };
        let ours = format!("{}:{id}:", kind.name());
        let key = format!("{ours}{}:{}", target.name(), identity(target).await);
        let as_left = home.is_resuming() && home.is_as_left(source, target).await;
        for other in log.set_keys() {
            let ends = || other.starts_with(&ours) && !(as_left && other == key);
            let foreign = !home.is_resuming() || ends();
            // one that a job has taken is not given
            let stale = if foreign { log.take_set(&other) } else { None };
            if let Some(stale) = stale {
                stale.remove().await?;
            }
        }
        // also what an earlier attempt to give up left in the file
        log.sync().await?;
        let set = log.take_set(&key).map(Rc::new);
        let (resumed, over) = (Cell::new(set.is_some()), Cell::new(false));
        let env = graph.env().clone();
        let (stop, task) = (Notify::new(), RefCell::default());
        let of_instant = kind == Kind::Backup;
        let set = RefCell::new(set);
        Ok(Some(Rc::new(KeptWork { env, home, log, key, set, of_instant, resumed, over, stop, task })))
    }

    /// Whether an earlier life left something.
    pub(crate) fn is_resumed(&self) -> bool {
        self.resumed.get()
    }

    /// Marks what an earlier life left; whether that is all there is to do: with `equal` not if the two are found to differ elsewhere.
    /// Clients' writes are marked meanwhile.
    ///
    /// # Errors
    /// A link was lost; to be tried again.
    pub(crate) async fn take_up(
        &self,
        work: &Work,
        source: &Edge,
        target: &Edge,
        equal: bool,
    ) -> Result<bool> {
        let Some(set) = self.believed(work, source, target, equal).await? else { return Ok(false) };
        let left = set.left();
        left.areas(Span::new(0, left.len()), 0).for_each(|a| work.mark(a));
        Ok(true)
    }

    /// What an earlier life left, if that is all there is to do.
    async fn believed(
        &self,
        work: &Work,
        source: &Edge,
        target: &Edge,
        equal: bool,
    ) -> Result<Option<Rc<JobSet>>> {
        let Some(set) = self.set.borrow().clone() else { return Ok(None) };
        let fits = {
            let left = set.left();
            left.granularity() <= work.granularity() && left.len() == work.len()
        };
        if fits && !(equal && self.differs(&set, work, source, target).await?) {
            return Ok(Some(set));
        }
        self.resumed.set(false);
        self.set.take();
        let _begun_anew = set.remove().await;
        Ok(None)
    }

    /// Before the instant of a backup: clients' writes are marked from now on. Whether an earlier life left something that can be believed
    /// ([`KeptWork::lacking`]). If its instant outlived it, the backup `goes_on` with so much. `work` has nothing in it yet.
    pub(crate) async fn before_instant(
        &self,
        work: &Work,
        source: &Edge,
        target: &Edge,
        goes_on: Option<&Bitmap>,
    ) -> bool {
        let believed = self.believed(work, source, target, true).await;
        if let Ok(Some(set)) = believed {
            goes_on.into_iter().for_each(|left| set.counts_as_written(left));
            return true;
        }
        // a link that is down now says nothing of the peer
        self.resumed.set(false);
        let stale = self.set.take();
        if let Some(stale) = stale {
            let _begun_anew = stale.remove().await;
        }
        // what was written since an instant in an earlier life nobody knows any more
        if goes_on.is_none() {
            self.add(&work.everything()).await;
        }
        false
    }

    /// What the target may lack of the disk as it is now.
    pub(crate) fn lacking(&self, work: &Work) -> Bitmap {
        let mut all = work.everything();
        let Some(set) = self.set.borrow().clone() else { return all };
        all.clear_all();
        let left = set.left();
        left.areas(Span::new(0, left.len()), 0).for_each(|a| all.set(a));
        all
    }

    /// Keeps `all` for a beginning. Without, the job runs as well: it is only after a crash that it has to begin anew.
    async fn add(&self, all: &Bitmap) {
        let Ok(set) = self.log.add_set(&self.key, all).await else { return };
        *self.set.borrow_mut() = Some(Rc::new(set));
    }

    /// Whether the two differ in one of some places that the target does not lack, preferably where the source has data.
    async fn differs(&self, set: &JobSet, work: &Work, source: &Edge, target: &Edge) -> Result<bool> {
        let lost = |e: &BlockError| e.kind() == ErrorKind::Disconnected;
        for _ in 0..SAMPLES {
            let left = set.left();
            let from = self.env.random() % left.len().max(1);
            let Some(from) = left.next_clean(from).or_else(|| left.next_clean(0)) else { return Ok(false) };
            let end = left.next_dirty(from).unwrap_or(left.len());
            let area = Span::between(from, end.min(from.saturating_add(SEARCH)));
            let found = source.status(area).await.unwrap_or_default();
            let data = found.iter().find(|e| !e.reads_zero()).map_or(area.start, |e| e.span.start);
            let at = Span::new(data.max(area.start), SAMPLE).intersect(&area);
            let (pause, times) = AGAIN;
            for time in 1.. {
                // what cannot be read is the copy's matter, if it ever has to be
                let both = (source.read(at).await, target.read(at).await);
                let (here, there) = match both {
                    (Ok(here), Ok(there)) => (here, there),
                    (Err(e), _) | (_, Err(e)) if lost(&e) => return Err(e),
                    _ => break,
                };
                let written = |bits: &Bitmap| bits.next_area(at, 0).is_some();
                if here.to_vec() == there.to_vec() || written(&set.left()) || work.with_dirty(written) {
                    break;
                }
                if time == times {
                    return Ok(true);
                }
                self.env.sleep(pause).await;
            }
        }
        Ok(false)
    }

    /// From now on what `work` has still to do is kept.
    pub(crate) async fn begin(self: &Rc<Self>, work: &Rc<Work>, source: &Rc<Edge>, target: &Rc<Edge>) {
        let new = self.set.borrow().is_none();
        if new {
            // What was prepared on the target, or written to both, is durable nowhere yet: all counts until the first checkpoint, which
            // comes at once.
            let all = match planted("mirror: what is not to be copied counts as flushed") {
                true => work.unfinished(),
                false => work.everything(),
            };
            self.add(&all).await;
        }
        self.go_on(work, source, target, new);
    }

    /// The instant has been taken for which [`KeptWork::before_instant`] was called.
    pub(crate) fn begin_instant(self: &Rc<Self>, work: &Rc<Work>, source: &Rc<Edge>, target: &Rc<Edge>) {
        self.go_on(work, source, target, !self.is_resumed());
    }

    fn go_on(self: &Rc<Self>, work: &Rc<Work>, source: &Rc<Edge>, target: &Rc<Edge>, new: bool) {
        if self.set.borrow().is_none() {
            return;
        }
        let (me, work, source, target) = (self.clone(), work.clone(), source.clone(), target.clone());
        let task = self.env.spawn("work-kept", async move { me.keep(&work, &source, &target, new).await });
        *self.task.borrow_mut() = Some(task);
    }

    /// With `new` all is kept so far, of which most may go as soon as both sides are flushed.
    async fn keep(&self, work: &Work, source: &Edge, target: &Edge, mut new: bool) {
        let (mut done, mut last) = (work.done(), self.env.now());
        let mut wait = if new { Duration::ZERO } else { LOOK };
        let most = MOST.max(work.len() / MOST_SHARE);
        work.set_ceiling(done.saturating_add(most));
        loop {
            // ends at once when the job does
            let sooner = async {
                let _either = race(work.held_up(), self.stop.wait()).await;
            };
            let held = race(self.env.sleep(wait), sooner).await.is_none();
            let Some(set) = self.set.borrow().clone().filter(|_| !self.over.get()) else { break };
            let (copied, passed) = (work.done() - done, self.env.now().saturating_sub(last));
            let due = copied >= STEP || (passed >= PERIOD && (copied > 0 || new)) || wait.is_zero();
            let due = due || held && copied > 0;
            wait = LOOK;
            if !due {
                continue;
            }
            (done, last) = (work.done(), self.env.now());
            // What the target has is durable there before it is let go here, and so is what was read: a write that was copied and
            // then lost by the source would leave them different.
            work.notice_losses();
            let (unfinished, losses) = (unfinished(work), work.losses());
            let flush = async {
                // an option may have been changed since
                if !is_flushed(&source.child()) || !is_flushed(&target.child()) {
                    return Err(BlockError::unsupported("what is flushed is not durable"));
                }
                if !planted("mirror: the source is not flushed before work is forgotten") {
                    source.flush().await?;
                }
                target.flush().await?;
                match work.losses() == losses {
                    true => Ok(()),
                    false => Err(BlockError::new(ErrorKind::Cancelled, "a link was lost meanwhile")),
                }
            };
            // A target that hangs does not hold up the end.
            let unless_ended = async {
                let ended = || BlockError::new(ErrorKind::Cancelled, "the job has ended");
                race(flush, self.stop.wait()).await.unwrap_or_else(|| Err(ended()))
            };
            let kept = match self.of_instant {
                true => set.checkpoint_of_instant(&unfinished, unless_ended).await,
                false => set.checkpoint(&unfinished, unless_ended).await,
            };
            let kept = kept.is_ok();
            new &= !kept;
            // A target that cannot be flushed is the job's matter; here it is tried again, and what a crash costs then has no bound.
            work.set_ceiling(if kept { done.saturating_add(most) } else { u64::MAX });
        }
        work.set_ceiling(u64::MAX);
    }

    /// From now on nothing is let go. What is being flushed may be, without what is written meanwhile.
    pub(crate) fn keep_all(&self) {
        self.over.set(true);
    }

    /// The job has ended, with so much to do.
    pub(crate) async fn end(&self, work: &Work) {
        self.keep_all();
        self.stop.notify_all();
        let task = self.task.take();
        if let Some(task) = task {
            // It holds the target.
            task.join().await;
        }
        let Some(set) = self.set.take() else { return };
        if self.home.is_resting() {
            // written when the source is closed
            set.also(&work.unfinished());
        } else {
            // What stays is too much; the next job gives it up before it begins.
            let _stays = set.remove().await;
        }
    }
}

/// Whether a flush of `cell` makes durable what was written to it: not where the user said that it need not.
fn is_flushed(cell: &NodeCell) -> bool {
    let lies = cell.is_writable() && cell.options().cache_no_flush;
    !lies && cell.node().edges().iter().all(|e| is_flushed(&e.child()))
}

/// What the target may lack at this instant.
fn unfinished(work: &Work) -> Bitmap {
    match planted("mirror: what is being copied counts as copied") {
        true => work.with_dirty(Bitmap::clone),
        false => work.unfinished(),
    }
}

/// What tells the target's file from another one of its name, also one that has the number of a deleted one; nothing does for devices
/// and links.
async fn identity(target: &NodeCell) -> String {
    match target.node().host_file().await {
        Ok(Some(file)) if file.kind == FileKind::Regular => {
            format!("{:x}.{:x}.{:x}", file.device, file.inode, file.born)
        }
        _ => "-".to_owned(),
    }
}
