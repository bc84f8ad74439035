//! The rules of `blkdebug`: which request fails with which error, and when. Pure.
//!
//! What can happen: a moment in a parent's work ([`DebugEvent`]) makes rules hold or changes the state; a request is
//! checked against the rules that hold. What must stay true, as clients know it from QEMU: a rule speaks only in its state (0:
//! in any); an event that makes at least one rule of errors hold ends all that held before; of several that fit a request
//! the first given decides; a rule that is to work once is forgotten when it has worked; the state changes after all rules of
//! an event were looked at. Rules for the event `none` hold from the start, when the state is 1.

use block::Span;
use graph::DebugEvent;

/// Kinds of requests a rule may be for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IoType {
    /// Reads.
    Read,
    /// Writes of data.
    Write,
    /// Writes of zeroes.
    WriteZeroes,
    /// Discards.
    Discard,
    /// Flushes.
    Flush,
    /// Block status.
    BlockStatus,
}

impl IoType {
    const ALL: [(IoType, &'static str); 6] = [
        (IoType::Read, "read"),
        (IoType::Write, "write"),
        (IoType::WriteZeroes, "write-zeroes"),
        (IoType::Discard, "discard"),
        (IoType::Flush, "flush"),
        (IoType::BlockStatus, "block-status"),
    ];

    /// The kind with this name in QMP.
    pub fn named(name: &str) -> Option<IoType> {
        Self::ALL.iter().find(|(_, n)| *n == name).map(|(t, _)| *t)
    }
}

/// An error for requests (`inject-error`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Inject {
    /// The only kind of request it is for; missing: all but block status.
    pub io: Option<IoType>,
    /// The errno; 0: requests that fit succeed whatever later rules say.
    pub errno: i32,
    /// Only requests that contain this byte (so no flush).
    pub offset: Option<u64>,
    /// Forgotten after it has worked.
    pub once: bool,
    /// The request fails before others had a chance to run.
    pub immediately: bool,
}

/// What a rule does when its event comes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// From now on requests fail.
    Inject(Inject),
    /// The state becomes this.
    SetState(i64),
}

/// A rule.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rule {
    /// When it speaks.
    pub event: DebugEvent,
    /// In which state; 0: in any.
    pub state: i64,
    /// What it does.
    pub action: Action,
}

/// All rules, and which hold.
pub struct Rules {
    all: Vec<Option<Rule>>,
    /// Positions in `all` of those that hold, first to be asked first.
    holding: Vec<usize>,
    state: i64,
}

impl Rules {
    /// Rules in the order given; those for `none` hold.
    pub fn new(rules: &[Rule]) -> Rules {
        let all = rules.iter().copied().map(Some).collect();
        let mut rules = Rules { all, holding: Vec::new(), state: 1 };
        rules.event(DebugEvent::None);
        rules
    }

    /// Something happens.
    pub fn event(&mut self, event: DebugEvent) {
        let (mut holding, mut state) = (Vec::new(), None);
        for (i, rule) in self.all.iter().enumerate() {
            let Some(rule) = rule.filter(|r| r.event == event && (r.state == 0 || r.state == self.state))
            else {
                continue;
            };
            match rule.action {
                Action::Inject(_) => holding.push(i),
                Action::SetState(new) => state = state.or(Some(new)),
            }
        }
        if !holding.is_empty() {
            self.holding = holding;
        }
        self.state = state.unwrap_or(self.state);
    }

    /// The rule that makes this request fail, if one does. `at` is empty for a flush.
    pub fn check(&mut self, io: IoType, at: Span) -> Option<Inject> {
        let fits = |r: &Inject| {
            r.io.map_or(io != IoType::BlockStatus, |only| only == io)
                && r.offset.is_none_or(|o| at.contains_offset(o))
        };
        let found =
            self.holding.iter().copied().enumerate().find_map(|(place, i)| match self.all[i]?.action {
                Action::Inject(r) if fits(&r) => Some((place, i, r)),
                _ => None,
            });
        let (place, i, rule) = found.filter(|(_, _, r)| r.errno != 0)?;
        if rule.once {
            self.holding.remove(place);
            self.all[i] = None;
        }
        Some(rule)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inject(event: DebugEvent, state: i64, errno: i32, once: bool) -> Rule {
        let r = Inject { io: None, errno, offset: None, once, immediately: false };
        Rule { event, state, action: Action::Inject(r) }
    }
    fn goto(event: DebugEvent, state: i64, new: i64) -> Rule {
        Rule { event, state, action: Action::SetState(new) }
    }
    fn errno(r: &mut Rules, io: IoType) -> i32 {
        r.check(io, Span::new(0, 512)).map_or(0, |r| r.errno)
    }

    #[test]
    fn names_are_found() {
        assert_eq!(DebugEvent::named("l2_update"), Some(DebugEvent::L2Update));
        assert_eq!(DebugEvent::named("none"), Some(DebugEvent::None));
        assert_eq!(DebugEvent::ALL.len(), 48);
        assert_eq!(IoType::named("write-zeroes"), Some(IoType::WriteZeroes));
    }

    #[test]
    fn without_an_event_it_holds_from_the_start_and_the_first_given_decides() {
        let mut r =
            Rules::new(&[inject(DebugEvent::None, 0, 5, true), inject(DebugEvent::None, 1, 28, false)]);
        assert_eq!([errno(&mut r, IoType::Write), errno(&mut r, IoType::Read)], [5, 28]);
        assert_eq!([errno(&mut r, IoType::Flush), errno(&mut r, IoType::BlockStatus)], [28, 0]);
    }

    #[test]
    fn an_event_ends_what_held_before_only_if_it_brings_errors() {
        let mut r = Rules::new(&[
            inject(DebugEvent::None, 0, 5, false),
            goto(DebugEvent::ReadAio, 0, 2),
            inject(DebugEvent::WriteAio, 2, 28, false),
        ]);
        r.event(DebugEvent::WriteAio);
        assert_eq!(errno(&mut r, IoType::Write), 5, "the state is 1");
        r.event(DebugEvent::ReadAio);
        assert_eq!(errno(&mut r, IoType::Write), 5);
        r.event(DebugEvent::WriteAio);
        assert_eq!(errno(&mut r, IoType::Write), 28);
    }

    #[test]
    fn a_place_is_met_by_requests_that_contain_it() {
        let at =
            Inject { io: Some(IoType::Read), errno: 5, offset: Some(1024), once: false, immediately: true };
        let mut r = Rules::new(&[Rule { event: DebugEvent::None, state: 0, action: Action::Inject(at) }]);
        for (io, at, want) in [
            (IoType::Read, Span::new(0, 1024), false),
            (IoType::Read, Span::new(0, 1025), true),
            (IoType::Read, Span::new(1024, 1), true),
            (IoType::Write, Span::new(1024, 1), false),
            (IoType::Flush, Span::new(0, 0), false),
        ] {
            assert_eq!(r.check(io, at).is_some(), want, "{io:?} {at}");
        }
    }
}
