//! What a group needs of an arbiter: one place that grants ownership for a while, and remembers who may take over.
//!
//! Two entries, both changed only if nobody else did meanwhile. The *owner* goes away by itself when it is not renewed; the *state* outlives
//! all owners. What must stay true of an implementation: at most one grant is good at any time, and what an answer said was so
//! between the question and the answer. An error says nothing: the change may have been made.

use crate::types::{Epoch, Generation};
use block::Io;
use std::time::Duration;

/// What outlives an owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct State {
    /// The newest that owned the group.
    pub generation: Generation,
    /// Only who committed this checkpoint of that generation may take over: the owner has acknowledged writes without the others.
    pub needs: Epoch,
}

/// Who owns the group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Its name: the same after a restart, no other side's.
    pub holder: String,
    /// Of the entry, as the arbiter counts.
    pub revision: u64,
    /// How long its ownership lasts if it is not renewed.
    pub left: Duration,
}

/// What an arbiter knows of a group.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Seen {
    /// Nobody, if there is none.
    pub owner: Option<Owner>,
    /// With the revision of the entry; none if the group never had an owner.
    pub state: Option<(State, u64)>,
}

/// Ownership that was granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// What keeps it.
    pub lease: i64,
    /// Of the owner's entry.
    pub revision: u64,
}

/// See above. Every call ends within a time-out of the implementation's own.
pub trait Arbiter {
    /// What is known.
    fn look(&self) -> Io<'_, Seen>;
    /// Makes `holder` the owner, if all is as it was `seen`; otherwise `None`.
    fn take<'a>(&'a self, holder: &'a str, seen: &'a Seen) -> Io<'a, Option<Grant>>;
    /// Begins the time of a grant anew. `false`: it is over, or somebody took the group by force.
    fn renew<'a>(&'a self, grant: &'a Grant) -> Io<'a, bool>;
    /// Sets the state. `false`: the grant is over, nothing was set.
    fn record<'a>(&'a self, grant: &'a Grant, state: State) -> Io<'a, bool>;
    /// Gives a grant back, with `forget` the state as well: the group's name may be used for other images.
    fn release<'a>(&'a self, grant: &'a Grant, forget: bool) -> Io<'a>;
    /// How long a grant lasts that is not renewed.
    fn ttl(&self) -> Duration;
    /// Where it is, for humans.
    fn name(&self) -> String;
}
