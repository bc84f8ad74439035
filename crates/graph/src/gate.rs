//! The gate of an edge: counts who is inside, and keeps newcomers out while the graph changes.
//!
//! What can happen: requests enter and leave at any time, are dropped half way, and several changes want the same edge
//! closed. What must stay true: a pass is given back on every path (it is a guard); while any closer holds the gate no
//! pass is given; whoever waited longest enters first: at the moment the gate opens, all who wait are inside, in their
//! order, before they run again, so that neither a newcomer nor the next closer overtakes them.

use crate::turn::Turn;
use env::bugs::planted;
use env::sync::Notify;
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

/// A gate. Open when made.
#[derive(Default)]
pub struct Gate {
    inside: Cell<usize>,
    closers: Cell<usize>,
    emptied: Notify,
    /// Who waits, longest first.
    waiting: RefCell<VecDeque<Rc<Turn>>>,
}

impl Gate {
    /// An open gate.
    pub const fn new() -> Gate {
        Gate {
            inside: Cell::new(0),
            closers: Cell::new(0),
            emptied: Notify::new(),
            waiting: RefCell::new(VecDeque::new()),
        }
    }

    /// Enters, waiting while the gate is closed.
    pub async fn enter(&self) -> Pass<'_> {
        if self.closers.get() == 0 {
            self.inside.set(self.inside.get() + 1);
            return Pass { gate: self };
        }
        let turn = Rc::new(Turn::default());
        self.waiting.borrow_mut().push_back(turn.clone());
        let mut place = Place { gate: self, turn, taken: false };
        place.turn.wait().await;
        place.taken = true;
        Pass { gate: self }
    }

    fn leave(&self) {
        let left = self.inside.get() - 1;
        self.inside.set(left);
        if left == 0 {
            self.emptied.notify_all();
        }
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
            let waiting = std::mem::take(&mut *self.waiting.borrow_mut());
            self.inside.set(self.inside.get() + waiting.len());
            waiting.iter().for_each(|turn| turn.give());
        }
    }

    async fn emptied(&self) {
        while self.inside.get() > 0 {
            self.emptied.wait().await;
        }
    }
}

/// A place among those who wait; given back if the waiter is dropped before it entered.
struct Place<'a> {
    gate: &'a Gate,
    turn: Rc<Turn>,
    taken: bool,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if self.taken {
            return;
        }
        if self.turn.is_given() {
            self.gate.leave();
        } else {
            self.gate.waiting.borrow_mut().retain(|t| !Rc::ptr_eq(t, &self.turn));
        }
    }
}

/// A request's right to be inside.
pub struct Pass<'a> {
    gate: &'a Gate,
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        self.gate.leave();
    }
}

/// Something that has a gate and is shared; the holder of a closed gate keeps it alive.
pub trait Gated {
    /// The gate.
    fn gate(&self) -> &Gate;
    /// Lets those inside hurry until the returned values are dropped.
    fn hurry(&self) -> Vec<Box<dyn Any>> {
        Vec::new()
    }
}

/// A closed gate; dropping it opens the gate again.
pub struct Closed<T: Gated> {
    of: Rc<T>,
    _hurry: Vec<Box<dyn Any>>,
}

impl<T: Gated> Closed<T> {
    /// Closes the gate of `of` and waits until nobody is inside. Dropping the future opens it again.
    pub async fn close(of: Rc<T>) -> Closed<T> {
        of.gate().shut();
        let hurry = if of.gate().inside() > 0 { of.hurry() } else { Vec::new() };
        let closed = Closed { of, _hurry: hurry };
        if !planted("graph: nobody waits for the gate") {
            closed.of.gate().emptied().await;
        }
        closed
    }

    /// Whose gate it is.
    pub fn of(&self) -> &Rc<T> {
        &self.of
    }
}

impl<T: Gated> Drop for Closed<T> {
    fn drop(&mut self) {
        self.of.gate().open();
    }
}
