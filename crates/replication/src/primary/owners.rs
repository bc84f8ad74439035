//! Two owners of one group meet: which of them was left behind.
//!
//! What can happen: a primary was succeeded while it was down, and comes back as primary; two were promoted. What must stay true (I7, L9): the
//! paths alone decide; who was succeeded is fenced, whichever of the two called the other; of two that were both promoted neither is.

use super::{Event, Output, Primary};
use crate::history::Relation;
use crate::wire::{Hello, Reject};

impl Primary {
    /// Another owner came and says who it is; what it is to be told.
    pub fn meet(&mut self, hello: &Hello, out: &mut Vec<Output>) -> (Reject, String) {
        let (mine, theirs) = (self.history.generation(), hello.history.generation());
        if hello.group != self.group {
            return (Reject::WrongGroup, format!("this is group {}", self.group));
        }
        if env::bugs::planted("replication: owners do not compare their paths") {
            return (Reject::Busy, "this side is the primary".to_owned());
        }
        match self.history.compare(&hello.history) {
            // Who is asked to take over does so at exactly this checkpoint; somebody else's promotion is not the answer.
            Relation::Outdated(e) if self.handing && e != self.history.epoch() => {
                (Reject::Busy, "this side is handing its group over".to_owned())
            }
            Relation::Outdated(_) => {
                if !(self.handing && env::bugs::planted("replication: nobody is at the door")) {
                    self.fence(theirs, out);
                }
                (Reject::Busy, "this side was a primary until now, and is none of the group's yet".to_owned())
            }
            Relation::SplitBrain(e) => {
                // which generation is higher says nothing about whose writes are wanted (L9)
                out.push(Output::Event(Event::SplitBrain { peer: None }));
                (Reject::SplitBrain, format!("both sides were promoted after checkpoint {e}"))
            }
            Relation::Behind(_) | Relation::Ahead(_) if theirs < mine => {
                out.push(Output::Event(Event::LeftBehind { generation: theirs }));
                (Reject::Fenced(mine), format!("generation {mine} exists"))
            }
            Relation::Same | Relation::Behind(_) | Relation::Ahead(_) => {
                (Reject::Busy, "this side is the primary".to_owned())
            }
            Relation::Fresh | Relation::Unrelated => {
                (Reject::Unrelated, "the images have no common history".to_owned())
            }
        }
    }
}
