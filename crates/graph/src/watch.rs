//! Who is told that what lies below an edge may have another length.
//!
//! What must stay true: it is told after the change, with nothing of the graph held, and does not wait for the graph.

use crate::Graph;
use std::cell::RefCell;
use std::rc::Rc;

/// Called when a node's length may be another.
#[derive(Default)]
pub(crate) struct Watcher(RefCell<Option<Rc<dyn Fn()>>>);

impl Watcher {
    pub(crate) fn tell(&self) {
        let watcher = self.0.borrow().clone();
        if let Some(watcher) = watcher {
            watcher();
        }
    }
}

impl Graph {
    /// From now on `watcher` is called after each plan that was carried out and each change of a node's length.
    pub fn set_watcher(&self, watcher: Rc<dyn Fn()>) {
        *self.watcher.0.borrow_mut() = Some(watcher);
    }
}
