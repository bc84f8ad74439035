//! Internal snapshots as an action of a transaction, and their deletion. What is in the image is `qcow2`'s business.
//!
//! What must stay true: nobody's request runs while an image takes or deletes a snapshot (see [`crate::txn`]).

use crate::JobError;
use crate::chain;
use crate::txn::{Action, Doing};
use block::BlockError;
use graph::{Graph, NodeCell, SnapshotDetails};
use qcow2::Qcow2;
use std::cell::RefCell;
use std::rc::Rc;

/// A new internal snapshot.
pub struct InternalSnapshot {
    graph: Rc<Graph>,
    device: String,
    name: String,
    done: RefCell<Option<Rc<NodeCell>>>,
}

fn find(graph: &Graph, device: &str) -> Result<Rc<NodeCell>, JobError> {
    let cell = chain::find_device(graph, device)?;
    chain::check_root(&cell)?;
    cell.check_not_blocked()?;
    Ok(cell)
}

fn image<'a>(cell: &'a Rc<NodeCell>, device: &str) -> Result<&'a Qcow2, JobError> {
    let found = cell.node().as_any().downcast_ref::<Qcow2>().filter(|_| cell.is_active());
    found.ok_or_else(|| {
        let driver = cell.node().driver();
        JobError::refused(format!(
            "Block format '{driver}' used by device '{device}' does not support internal snapshots"
        ))
    })
}

impl InternalSnapshot {
    /// A snapshot `name` of the disk `device`.
    pub fn new(graph: &Rc<Graph>, device: String, name: String) -> Rc<InternalSnapshot> {
        Rc::new(InternalSnapshot { graph: graph.clone(), device, name, done: RefCell::default() })
    }

    async fn take(&self) -> Result<(), JobError> {
        let (device, name) = (&self.device, &self.name);
        let cell = find(&self.graph, device)?;
        if !cell.is_writable() {
            return Err(JobError::refused(format!("Device '{device}' is read only")));
        }
        let qcow2 = image(&cell, device)?;
        if name.is_empty() {
            return Err(JobError::refused("Name is empty"));
        }
        if qcow2.snapshots().iter().any(|s| s.name == *name) {
            let message = format!("Snapshot with name '{name}' already exists on device '{device}'");
            return Err(JobError::refused(message));
        }
        let now = self.graph.env().wall();
        let date = (u32::try_from(now.as_secs()).unwrap_or(u32::MAX), now.subsec_nanos());
        let clock = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        qcow2.take_snapshot(name, date, clock).await.map_err(|e| {
            e.context(format_args!("Failed to create snapshot '{name}' on device '{device}'"))
        })?;
        *self.done.borrow_mut() = Some(cell);
        Ok(())
    }
}

impl Action for InternalSnapshot {
    fn nodes(&self) -> Vec<String> {
        vec![self.device.clone()]
    }

    fn prepare(&self) -> Doing<'_, Result<(), JobError>> {
        Box::pin(self.take())
    }

    fn abort(&self) -> Doing<'_> {
        Box::pin(async move {
            let done = self.done.take();
            let Some(cell) = done else { return };
            let Ok(qcow2) = image(&cell, &self.device) else { return };
            if let Some(at) = qcow2.snapshots().iter().position(|s| s.name == self.name) {
                // If the file fails now there is a snapshot more than wanted; the error that is told is the first one.
                let _ = qcow2.delete_snapshot(at).await;
            }
        })
    }
}

/// Deletes an internal snapshot of `device`, which `id` and `name` both mean, as far as they are given.
pub async fn delete(
    graph: &Rc<Graph>,
    device: &str,
    id: Option<&str>,
    name: Option<&str>,
) -> Result<SnapshotDetails, JobError> {
    let cell = find(graph, device)?;
    let frozen = graph.freeze(std::slice::from_ref(&cell)).await;
    if id.is_none() && name.is_none() {
        return Err(JobError::refused("Name or id must be provided"));
    }
    // in other words than the command that takes them
    let qcow2 = cell.node().clone();
    let qcow2 = qcow2
        .as_any()
        .downcast_ref::<Qcow2>()
        .filter(|_| cell.is_active())
        .ok_or_else(|| JobError::refused("Failed to get a snapshot list: Operation not supported"))?;
    let fits = |s: &qcow2::Snapshot| id.is_none_or(|i| s.id == i) && name.is_none_or(|n| s.name == n);
    let Some(at) = qcow2.snapshots().iter().position(fits) else {
        let (id, name) = (id.unwrap_or("null"), name.unwrap_or("null"));
        return Err(JobError::refused(format!(
            "Snapshot with id '{id}' and name '{name}' does not exist on device '{device}'"
        )));
    };
    let gone: Result<_, BlockError> = qcow2.delete_snapshot(at).await;
    drop(frozen);
    Ok(gone?.details())
}
