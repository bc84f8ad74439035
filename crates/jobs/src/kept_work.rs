//! What a mirror has still to copy, kept so that a later life of the daemon goes on with it (`--state-dir`).
//!
//! What can happen: the daemon is killed at any moment. What must stay true: what is kept contains all that the target may
//! lack on its stable storage; a mirror that was started by a user and not resumed never takes what another one left.

use block::{BlockError, ErrorKind};
use copy::Work;
use dirtylog::{DirtyLog, JobSet};
use env::sync::{Notify, race};
use env::{Env, TaskHandle};
use graph::{Edge, Graph, NodeCell};
use open::BitmapHome;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

/// Bytes copied after which the target is flushed and they are let go: what is copied again after a crash, beside what was
/// dirty.
const STEP: u64 = 64 << 20;
/// The same is done after so long, if anything was copied.
const PERIOD: Duration = Duration::from_secs(2);
/// How often it is looked whether it is time.
const LOOK: Duration = Duration::from_millis(50);

/// See above.
pub(crate) struct KeptWork {
    env: Env,
    home: Rc<BitmapHome>,
    log: Rc<DirtyLog>,
    key: String,
    set: RefCell<Option<Rc<JobSet>>>,
    resumed: bool,
    over: Cell<bool>,
    stop: Notify,
    task: RefCell<Option<TaskHandle>>,
}

impl KeptWork {
    /// For the mirror `id` of `source` onto `target`; nothing where nothing can be kept. What an earlier life left of it is found only
    /// while that is being restored.
    pub(crate) async fn find(
        home: Option<Rc<BitmapHome>>,
        graph: &Graph,
        source: &Rc<NodeCell>,
        target: &NodeCell,
        id: &str,
    ) -> Option<Rc<KeptWork>> {
        let home = home?;
        let log = home.log(graph, source).await.ok()?;
        let key = format!("mirror:{id}:{}", target.name());
        let set = log.take_set(&key).map(Rc::new);
        let set = match set {
            Some(set) if !home.is_resuming() => {
                set.remove().await.ok()?;
                None
            }
            set => set,
        };
        let (resumed, over) = (set.is_some(), Cell::new(false));
        let env = graph.env().clone();
        let (stop, task) = (Notify::new(), RefCell::default());
        Some(Rc::new(KeptWork { env, home, log, key, set: RefCell::new(set), resumed, over, stop, task }))
    }

    /// Whether an earlier life left something.
    pub(crate) fn is_resumed(&self) -> bool {
        self.resumed
    }

    /// Marks what an earlier life left; whether that is all there is to do.
    pub(crate) async fn take_up(&self, work: &Work) -> bool {
        let Some(set) = self.set.borrow().clone() else { return false };
        let left = set.left();
        if left.granularity() > work.granularity() || left.len() != work.len() {
            self.set.take();
            let _begun_anew = set.remove().await;
            return false;
        }
        left.areas(block::Span::new(0, left.len()), 0).for_each(|a| work.mark(a));
        true
    }

    /// From now on what `work` has still to do is kept.
    pub(crate) async fn begin(self: &Rc<Self>, work: &Rc<Work>, source: &Rc<Edge>, target: &Rc<Edge>) {
        if self.set.borrow().is_none() {
            // What was prepared on the target, or written to both, is durable nowhere yet: all counts until the first checkpoint, which
            // comes at once.
            let all = work.everything();
            // The job runs without: it is only after a crash that it has to begin anew.
            let Ok(set) = self.log.add_set(&self.key, &all).await else { return };
            *self.set.borrow_mut() = Some(Rc::new(set));
        }
        let (me, work, source, target) = (self.clone(), work.clone(), source.clone(), target.clone());
        let task = self.env.spawn("mirror-kept", async move { me.keep(&work, &source, &target).await });
        *self.task.borrow_mut() = Some(task);
    }

    async fn keep(&self, work: &Work, source: &Edge, target: &Edge) {
        let (mut done, mut last) = (work.done(), self.env.now());
        let mut first = true;
        loop {
            // ends at once when the job does
            if !first {
                let _ended = race(self.env.sleep(LOOK), self.stop.wait()).await;
            }
            let Some(set) = self.set.borrow().clone().filter(|_| !self.over.get()) else { return };
            let (copied, passed) = (work.done() - done, self.env.now().saturating_sub(last));
            if !first && copied < STEP && (copied == 0 || passed < PERIOD) {
                continue;
            }
            first = false;
            (done, last) = (work.done(), self.env.now());
            // What the target has is durable there before it is let go here, and so is what was read: a write that was copied and
            // then lost by the source would leave them different.
            work.notice_losses();
            let (unfinished, losses) = (work.unfinished(), work.losses());
            let flush = async {
                source.flush().await?;
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
            // A target that cannot be flushed is the job's matter; here it is tried again.
            let _later = set.checkpoint(&unfinished, unless_ended).await;
        }
    }

    /// The job has ended.
    pub(crate) async fn end(&self) {
        self.over.set(true);
        self.stop.notify_all();
        let task = self.task.take();
        if let Some(task) = task {
            // It holds the target.
            task.join().await;
        }
        let set = self.set.take();
        if let Some(set) = set.filter(|_| !self.home.is_resting()) {
            // What stays is too much, and found by nobody.
            let _stays = set.remove().await;
        }
    }
}
