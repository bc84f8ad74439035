//! `blockdev-create` and `x-blockdev-amend`: make an image or change what it is, in the background. Such a job stays until
//! dismissed, so that its result can be read.

use crate::error::JobError;
use crate::event::{Kind, Progress};
use crate::job::{Body, Job, Options};
use crate::registry::Registry;
use block::{Io, Result};
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

struct Create {
    work: RefCell<Option<Io<'static>>>,
    done: Cell<bool>,
}

impl Body for Create {
    fn run<'a>(&'a self, _: &'a Rc<Job>) -> Io<'a> {
        Box::pin(async move {
            let work = self.work.take();
            let result: Result<()> = match work {
                Some(work) => work.await,
                None => Ok(()),
            };
            self.done.set(true); // as the field has it: done, even if it failed
            result
        })
    }
    fn progress(&self) -> Progress {
        Progress { total: 1, current: u64::from(self.done.get()) }
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Starts a job of type `kind` that runs `work`. Whatever `work` finds wrong is the job's error, not the command's.
pub fn start(registry: &Registry, id: &str, kind: Kind, work: Io<'static>) -> Result<Rc<Job>, JobError> {
    let options = Options { auto_dismiss: false, ..Options::default() };
    let job = registry.create(id, kind, options, None)?;
    let body = Rc::new(Create { work: RefCell::new(Some(work)), done: Cell::new(false) });
    registry.start(&job, body);
    Ok(job)
}
