//! The gate of an edge: counts who is inside, and keeps newcomers out while the graph changes.
//!
//! What can happen: requests enter and leave at any time, are dropped half way, and several changes want the same edge
//! closed. What must stay true: a pass is given back on every path (it is a guard); while any closer holds the gate no
//! pass is given; whoever waited longest enters first.

use env::bugs::planted;
use env::sync::Notify;
use std::cell::Cell;
use std::rc::Rc;

/// A gate. Open when made.
#[derive(Default)]
pub struct Gate {
    inside: Cell<usize>,
    closers: Cell<usize>,
    emptied: Notify,
    opened: Notify,
}

impl Gate {
    /// An open gate.
    pub const fn new() -> Gate {
        Gate { inside: Cell::new(0), closers: Cell::new(0), emptied: Notify::new(), opened: Notify::new() }
    }

    /// Enters, waiting while the gate is closed.
    pub async fn enter(&self) -> Pass<'_> {
        while self.closers.get() > 0 {
            self.opened.wait().await;
        }
        self.inside.set(self.inside.get() + 1);
        Pass { gate: self }
    }

    /// Requests inside now.
    pub fn inside(&self) -> usize {
        self.inside.get()
    }

    /// Whether somebody keeps it closed.
    pub fn is_closed(&self) -> bool {
        self.closers.get() > 0
    }

    /// Lets nobody in any more, at once. Wait with [`Gate::emptied`]; open again with [`Gate::open`].
    fn shut(&self) {
        self.closers.set(self.closers.get() + 1);
    }

    fn open(&self) {
        self.closers.set(self.closers.get() - 1);
        if self.closers.get() == 0 {
            self.opened.notify_all();
        }
    }

    async fn emptied(&self) {
        while self.inside.get() > 0 {
            self.emptied.wait().await;
        }
    }
}

/// A request's right to be inside.
pub struct Pass<'a> {
    gate: &'a Gate,
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        let left = self.gate.inside.get() - 1;
        self.gate.inside.set(left);
        if left == 0 {
            self.gate.emptied.notify_all();
        }
    }
}

/// Something that has a gate and is shared; the holder of a closed gate keeps it alive.
pub trait Gated {
    /// The gate.
    fn gate(&self) -> &Gate;
}

/// A closed gate; dropping it opens the gate again.
pub struct Closed<T: Gated>(Rc<T>);

impl<T: Gated> Closed<T> {
    /// Closes the gate of `of` and waits until nobody is inside. Dropping the future opens it again.
    pub async fn close(of: Rc<T>) -> Closed<T> {
        of.gate().shut();
        let closed = Closed(of);
        if !planted("graph: nobody waits for the gate") {
            closed.0.gate().emptied().await;
        }
        closed
    }

    /// Whose gate it is.
    pub fn of(&self) -> &Rc<T> {
        &self.0
    }
}

impl<T: Gated> Drop for Closed<T> {
    fn drop(&mut self) {
        self.0.gate().open();
    }
}
