//! The gate of an edge: counts who is inside, and keeps newcomers out while the graph changes.
//!
//! What can happen: requests enter and leave at any time, are dropped half way, and several changes want the same edge
//! closed. What must stay true: a pass is given back on every path (it is a guard); while any closer holds the gate no
//! pass is given; whoever waited longest enters first: at the moment the gate opens, all who wait are inside, in their
//! order, before they run again, so that neither a newcomer nor the next closer overtakes them.
//!
//! A [`Crowd`] counts requests that are inside many gates at once (the gates of a chain, from the top down to some depth), so
//! that a request of a long chain need not enter each. Closing any of the gates disperses it for good: nobody enters it any more,
//! and the closer waits for those in it that are inside its gate.

use env::bugs::planted;
use env::sync::{Notify, Turn};
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::{Rc, Weak};

/// A gate. Open when made.
#[derive(Default)]
pub struct Gate {
    inside: Cell<usize>,
    closers: Cell<usize>,
    emptied: Notify,
    /// Who waits, longest first.
    waiting: RefCell<VecDeque<Rc<Turn>>>,
    /// Crowds of which some are inside, and how many gates such a one is inside of, this one the last.
    crowds: RefCell<Vec<(Weak<Crowd>, usize)>>,
}

impl Gate {
    /// An open gate.
    pub const fn new() -> Gate {
        Gate {
            inside: Cell::new(0),
            closers: Cell::new(0),
            emptied: Notify::new(),
            waiting: RefCell::new(VecDeque::new()),
            crowds: RefCell::new(Vec::new()),
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
        let crowds = self.crowds.borrow();
        let in_crowds = crowds.iter().filter_map(|(c, depth)| Some(c.upgrade()?.inside(*depth)));
        self.inside.get() + in_crowds.sum::<usize>()
    }

    /// From now on those of `crowd` who are at `depth` or deeper are inside.
    pub(crate) fn carry(&self, crowd: &Rc<Crowd>, depth: usize) {
        let mut crowds = self.crowds.borrow_mut();
        // now and then, so that many chains over one image do not look at all others each
        if crowds.len().is_power_of_two() {
            crowds.retain(|(c, depth)| c.upgrade().is_some_and(|c| c.is_open() || c.inside(*depth) > 0));
        }
        crowds.push((Rc::downgrade(crowd), depth));
    }

    /// Disperses the crowds of this gate: nobody enters them any more. Those in them stay until they are through.
    pub(crate) fn disperse(&self) {
        self.crowds.borrow().iter().filter_map(|(c, _)| c.upgrade()).for_each(|c| c.open.set(false));
    }

    /// Whether somebody keeps it closed.
    pub fn is_closed(&self) -> bool {
        self.closers.get() > 0
    }

    /// Lets nobody in any more, at once. Wait with [`Gate::emptied`]; open again with [`Gate::open`].
    fn shut(&self) {
        self.closers.set(self.closers.get() + 1);
        if !planted("graph: shortcuts pass closed gates") {
            self.disperse();
        }
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
        if planted("graph: shortcuts pass closed gates") {
            return;
        }
        loop {
            let inside = |(c, depth): &(Weak<Crowd>, usize)| c.upgrade().filter(|c| c.inside(*depth) > 0);
            let crowd = self.crowds.borrow().iter().find_map(inside);
            match crowd {
                Some(crowd) => crowd.left.wait().await,
                None => return,
            }
        }
    }
}

/// Requests on their way down a chain, each inside the gates from the first to the one at its depth (the first has depth 1).
pub(crate) struct Crowd {
    open: Cell<bool>,
    /// By depth, from 1 on.
    at: Box<[Cell<u32>]>,
    /// Somebody left after it was dispersed.
    left: Notify,
}

impl Crowd {
    /// Nobody, over `gates` gates that are open. Each of them is to [`Gate::carry`] it.
    pub(crate) fn new(gates: usize) -> Rc<Crowd> {
        Rc::new(Crowd { open: Cell::new(true), at: vec![Cell::new(0); gates].into(), left: Notify::new() })
    }

    /// Whether somebody may enter: none of the gates was closed since it was made.
    pub(crate) fn is_open(&self) -> bool {
        self.open.get()
    }

    /// Enters the gates down to `depth`, if all are open.
    pub(crate) fn enter(&self, depth: u16) -> Option<Among<'_>> {
        let at = self.at.get(usize::from(depth).checked_sub(1)?).filter(|_| self.open.get())?;
        at.set(at.get() + 1);
        Some(Among { crowd: self, at })
    }

    /// How many are at `depth` or deeper.
    fn inside(&self, depth: usize) -> usize {
        self.at.iter().skip(depth - 1).map(|n| n.get() as usize).sum()
    }
}

/// A place in a crowd; given back when dropped.
pub(crate) struct Among<'a> {
    crowd: &'a Crowd,
    at: &'a Cell<u32>,
}

impl Drop for Among<'_> {
    fn drop(&mut self) {
        self.at.set(self.at.get() - 1);
        if !self.crowd.open.get() {
            self.crowd.left.notify_all();
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
