//! Transactions: several changes that happen together or not at all.
//!
//! While a transaction runs, nobody who uses one of its nodes gets a request through, on any of them: what it does happens
//! for all its disks between the same requests of their users. Actions are prepared in order, each seeing what those before
//! it did; the first failure undoes them in reverse order. What cannot be undone (a bitmap that goes, a job that starts, an
//! image that is closed for writing) happens at the commit, which cannot fail.
//!
//! What must stay true: after a failure everything is as it was, but for image files that were created on the way.

use crate::JobError;
use graph::{Graph, NodeCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;

/// A step of an action.
pub type Doing<'a, T = ()> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// Most actions in one transaction: far more than disks of a machine times what is done to each, and a bound for how long
/// the machine stands still.
pub const MAX_ACTIONS: usize = 1024;

/// One of the changes of a transaction.
pub trait Action {
    /// Names of the nodes whose users must stand still meanwhile.
    fn nodes(&self) -> Vec<String>;
    /// Does everything that can fail, in a way that can be undone. After an error nothing is left of it.
    fn prepare(&self) -> Doing<'_, Result<(), JobError>>;
    /// Makes it final: everything of the transaction has been prepared.
    fn commit(&self) -> Doing<'_> {
        Box::pin(async {})
    }
    /// Undoes what [`Action::prepare`] did.
    fn abort(&self) -> Doing<'_> {
        Box::pin(async {})
    }
}

/// The action that always fails.
pub struct Abort;

impl Action for Abort {
    fn nodes(&self) -> Vec<String> {
        Vec::new()
    }
    fn prepare(&self) -> Doing<'_, Result<(), JobError>> {
        Box::pin(async { Err(JobError::refused("Transaction aborted using Abort action")) })
    }
}

/// Carries out all of `actions`, or none: then the error of the first that failed.
pub async fn run(graph: &Rc<Graph>, actions: &[Rc<dyn Action>]) -> Result<(), JobError> {
    if actions.len() > MAX_ACTIONS {
        let message = format!("A transaction of {} actions: there may be {MAX_ACTIONS}", actions.len());
        return Err(JobError::refused(message));
    }
    let names = actions.iter().flat_map(|a| a.nodes());
    let nodes: Vec<Rc<NodeCell>> = names.filter_map(|name| graph.find(&name)).collect();
    let frozen = graph.freeze(&nodes).await;
    let mut prepared: Vec<&Rc<dyn Action>> = Vec::with_capacity(actions.len());
    let mut outcome = Ok(());
    for action in actions {
        outcome = action.prepare().await;
        if outcome.is_err() {
            break;
        }
        prepared.push(action);
    }
    if outcome.is_ok() {
        // all of it, before anybody who stood still goes on
        outcome = graph.keep().await.map_err(JobError::from);
    }
    // Newest first either way: jobs start in that order, too.
    for action in prepared.into_iter().rev() {
        match outcome {
            Ok(()) => action.commit().await,
            Err(_) => action.abort().await,
        }
    }
    drop((nodes, frozen));
    outcome
}
