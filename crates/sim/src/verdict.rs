//! The first thing that went wrong in a run.

use std::cell::RefCell;
use std::rc::Rc;

/// Where everyone who watches a run reports; clones are the same.
#[derive(Clone, Default)]
pub struct Verdict(Rc<RefCell<Option<String>>>);

impl Verdict {
    /// Nothing is wrong yet.
    pub fn new() -> Verdict {
        Verdict::default()
    }

    /// Something is wrong. The first report stays: what follows it is often its consequence.
    pub fn violation(&self, what: impl Into<String>) {
        self.0.borrow_mut().get_or_insert_with(|| what.into());
    }

    /// As [`Verdict::violation`], if `result` is an error.
    pub fn check(&self, where_from: &str, result: Result<(), String>) {
        if let Err(e) = result {
            self.violation(format!("{where_from}: {e}"));
        }
    }

    /// Whether something is wrong.
    pub fn is_bad(&self) -> bool {
        self.0.borrow().is_some()
    }

    /// What was wrong, if anything.
    pub fn result(&self) -> Result<(), String> {
        self.0.borrow().clone().map_or(Ok(()), Err)
    }
}
