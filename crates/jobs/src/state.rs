//! The states of a job and what may be done in each: two tables, pure. The only place that decides this.
//!
//! ```text
//!     created -> running -> (ready) -> waiting -> pending -> concluded -> null
//!     running <-> paused          ready <-> standby
//!     created|running|ready|waiting|pending -> aborting -> concluded
//!     created -> null   (the start failed after the job existed)
//! ```
//! What must stay true: every transition of every job goes through [`State::may_become`]; every verb of every command
//! goes through [`State::accepts`]. Source: observed behaviour of QSD 10.0.2, reference/qmp-semantics.md 3.1 and 3.2.

use std::fmt;

/// Where a job is in its life.
#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord)]
pub enum State {
    /// Not yet a job; never visible.
    Undefined,
    /// It exists and has not begun.
    Created,
    /// At work.
    Running,
    /// Told to rest while running.
    Paused,
    /// In sync: waits for complete or cancel, and follows the source meanwhile.
    Ready,
    /// Told to rest while ready.
    Standby,
    /// Its work is done; waits for the others of its transaction.
    Waiting,
    /// All of the transaction are done; the graph is not yet changed.
    Pending,
    /// Cleaning up after failure or cancellation.
    Aborting,
    /// Over, the result is known.
    Concluded,
    /// Gone; visible only as the last status change.
    Null,
}

/// What a client may ask of a job.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verb {
    /// End it without success (or, softly, end a ready mirror without a pivot).
    Cancel,
    /// Rest.
    Pause,
    /// Go on.
    Resume,
    /// Another limit in bytes per second.
    SetSpeed,
    /// End a ready job: pivot.
    Complete,
    /// Change the graph now.
    Finalize,
    /// Forget a concluded job.
    Dismiss,
    /// Change options of the running job.
    Change,
}

use State::{
    Aborting, Concluded, Created, Null, Paused, Pending, Ready, Running, Standby, Undefined, Waiting,
};

impl State {
    /// All states, in order.
    pub const ALL: [State; 11] =
        [Undefined, Created, Running, Paused, Ready, Standby, Waiting, Pending, Aborting, Concluded, Null];

    /// The QMP name.
    pub const fn name(self) -> &'static str {
        match self {
            Undefined => "undefined",
            Created => "created",
            Running => "running",
            Paused => "paused",
            Ready => "ready",
            Standby => "standby",
            Waiting => "waiting",
            Pending => "pending",
            Aborting => "aborting",
            Concluded => "concluded",
            Null => "null",
        }
    }

    /// Whether `next` may follow. A state does not follow itself, but for `aborting` (a second member of a failing
    /// transaction finds it so).
    pub const fn may_become(self, next: State) -> bool {
        matches!(
            (self, next),
            (Undefined, Created)
                | (Created, Running | Aborting | Null)
                | (Running, Paused | Ready | Waiting | Aborting)
                | (Paused, Running)
                | (Ready, Standby | Waiting | Aborting)
                | (Standby, Ready)
                | (Waiting, Pending | Aborting)
                | (Pending, Aborting | Concluded)
                | (Aborting, Aborting | Concluded)
                | (Concluded, Null)
        )
    }

    /// Whether `verb` is allowed.
    pub const fn accepts(self, verb: Verb) -> bool {
        match verb {
            Verb::Cancel => {
                matches!(self, Created | Running | Paused | Ready | Standby | Waiting | Pending)
            }
            Verb::Pause | Verb::Resume | Verb::SetSpeed | Verb::Change => {
                matches!(self, Created | Running | Paused | Ready | Standby)
            }
            Verb::Complete => matches!(self, Ready | Standby),
            Verb::Finalize => matches!(self, Pending),
            Verb::Dismiss => matches!(self, Concluded),
        }
    }

    /// Whether the job still works or may work again (so: is neither over nor on its way out).
    pub const fn is_live(self) -> bool {
        matches!(self, Created | Running | Paused | Ready | Standby | Waiting | Pending)
    }

    /// The state in which a job of this state rests, and the other way round.
    pub const fn resting(self) -> Option<State> {
        match self {
            Running => Some(Paused),
            Ready => Some(Standby),
            _ => None,
        }
    }

    /// The state that a resting job goes back to.
    pub const fn woken(self) -> Option<State> {
        match self {
            Paused => Some(Running),
            Standby => Some(Ready),
            _ => None,
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Verb {
    /// All verbs.
    pub const ALL: [Verb; 8] = [
        Verb::Cancel,
        Verb::Pause,
        Verb::Resume,
        Verb::SetSpeed,
        Verb::Complete,
        Verb::Finalize,
        Verb::Dismiss,
        Verb::Change,
    ];

    /// The name in messages.
    pub const fn name(self) -> &'static str {
        match self {
            Verb::Cancel => "cancel",
            Verb::Pause => "pause",
            Verb::Resume => "resume",
            Verb::SetSpeed => "set-speed",
            Verb::Complete => "complete",
            Verb::Finalize => "finalize",
            Verb::Dismiss => "dismiss",
            Verb::Change => "change",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 121 cells; a row a state, a column the next, in the order of `State::ALL`. Written from the drawing and the
    /// transcripts, not from the code above.
    const NEXT: [(&str, &str); 11] = [
        //             U C R P Y S W D A E N
        ("undefined", ". x . . . . . . . . ."),
        ("created", ". . x . . . . . x . x"),
        ("running", ". . . x x . x . x . ."),
        ("paused", ". . x . . . . . . . ."),
        ("ready", ". . . . . x x . x . ."),
        ("standby", ". . . . x . . . . . ."),
        ("waiting", ". . . . . . . x x . ."),
        ("pending", ". . . . . . . . x x ."),
        ("aborting", ". . . . . . . . x x ."),
        ("concluded", ". . . . . . . . . . x"),
        ("null", ". . . . . . . . . . ."),
    ];

    /// 88 cells (77 of the seven verbs, and `change`).
    const VERBS: [(&str, &str); 8] = [
        //             U C R P Y S W D A E N
        ("cancel", ". x x x x x x x . . ."),
        ("pause", ". x x x x x . . . . ."),
        ("resume", ". x x x x x . . . . ."),
        ("set-speed", ". x x x x x . . . . ."),
        ("complete", ". . . . x x . . . . ."),
        ("finalize", ". . . . . . . x . . ."),
        ("dismiss", ". . . . . . . . . x ."),
        ("change", ". x x x x x . . . . ."),
    ];

    fn row(text: &str) -> Vec<bool> {
        text.split(' ').map(|c| c == "x").collect()
    }

    #[test]
    fn every_transition_cell() {
        let mut cells = 0;
        for (from, (name, cols)) in State::ALL.into_iter().zip(NEXT) {
            assert_eq!(from.name(), name);
            for (to, want) in State::ALL.into_iter().zip(row(cols)) {
                assert_eq!(from.may_become(to), want, "{from} -> {to}");
                cells += 1;
            }
        }
        assert_eq!(cells, 121);
    }

    #[test]
    fn every_verb_cell() {
        let mut cells = 0;
        for (verb, (name, cols)) in Verb::ALL.into_iter().zip(VERBS) {
            assert_eq!(verb.name(), name);
            for (state, want) in State::ALL.into_iter().zip(row(cols)) {
                assert_eq!(state.accepts(verb), want, "{name} in {state}");
                cells += 1;
            }
        }
        assert_eq!(cells, 88);
    }

    #[test]
    fn resting_and_waking_are_legal_and_inverse() {
        for s in State::ALL {
            if let Some(r) = s.resting() {
                assert!(s.may_become(r) && r.may_become(s));
                assert_eq!(r.woken(), Some(s));
            }
        }
        assert!(State::ALL.iter().all(|s| !State::Null.may_become(*s)));
    }
}
