//! The configuration file of `blkdebug`: sections `[inject-error]` and `[set-state]` with lines `key = "value"`, and
//! comments that begin with `#`.
//!
//! Anything else is an error that names it. The file is bounded before it comes here.

use super::blkdebug_rules::{Action, Inject, IoType, Rule};
use block::{BlockError, Result};
use graph::DebugEvent;
use std::collections::BTreeMap;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Group {
    InjectError,
    SetState,
}

type Values<'a> = BTreeMap<&'a str, &'a str>;

/// The rules of a file: all of `inject-error` before those of `set-state`, as they are looked at.
pub(super) fn parse(text: &str) -> Result<Vec<Rule>> {
    let mut sections: Vec<(Group, Values<'_>)> = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(header) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
            sections.push((group(header)?, Values::new()));
            continue;
        }
        let value = line.split_once('=').map(|(k, v)| (k.trim(), v.trim()));
        let quoted = value.and_then(|(k, v)| Some((k, v.strip_prefix('"')?.strip_suffix('"')?)));
        let (Some((key, value)), Some((group, values))) = (quoted, sections.last_mut()) else {
            return Err(BlockError::invalid(format!("parse error in line {}: '{line}'", number + 1)));
        };
        if !keys(*group).contains(&key) {
            return Err(BlockError::invalid(format!("Invalid parameter '{key}'")));
        }
        values.insert(key, value);
    }
    let of = |wanted| sections.iter().filter(move |(g, _)| *g == wanted).map(|(g, v)| rule(*g, v));
    of(Group::InjectError).chain(of(Group::SetState)).collect()
}

fn group(header: &str) -> Result<Group> {
    // a name in quotes may follow
    match header.split_whitespace().next().unwrap_or_default() {
        "inject-error" => Ok(Group::InjectError),
        "set-state" => Ok(Group::SetState),
        other => Err(BlockError::invalid(format!("There is no option group '{other}'"))),
    }
}

fn keys(group: Group) -> &'static [&'static str] {
    match group {
        Group::InjectError => &["event", "state", "iotype", "errno", "sector", "once", "immediately"],
        Group::SetState => &["event", "state", "new_state"],
    }
}

fn rule(group: Group, values: &Values<'_>) -> Result<Rule> {
    let unknown = |v: &str| BlockError::invalid(format!("invalid parameter value: {v}"));
    let number = |key: &str| -> Result<Option<i64>> {
        let parse = |v: &&str| {
            v.parse().map_err(|_| BlockError::invalid(format!("Parameter '{key}' expects a number")))
        };
        values.get(key).map(parse).transpose()
    };
    let flag = |key: &str| match values.get(key).copied() {
        None | Some("off") => Ok(false),
        Some("on") => Ok(true),
        Some(_) => Err(BlockError::invalid(format!("Parameter '{key}' expects 'on' or 'off'"))),
    };
    let name = values.get("event").ok_or_else(|| BlockError::invalid("Missing event name for rule"))?;
    let event = DebugEvent::named(name).ok_or_else(|| unknown(name))?;
    let state = number("state")?.unwrap_or(0);
    let action = match group {
        Group::SetState => Action::SetState(number("new_state")?.unwrap_or(0)),
        Group::InjectError => {
            let io = values.get("iotype").map(|v| IoType::named(v).ok_or_else(|| unknown(v))).transpose()?;
            let errno = number("errno")?.unwrap_or(i64::from(BlockError::EIO));
            let errno = i32::try_from(errno).map_err(|_| unknown(&errno.to_string()))?;
            let offset = offset(number("sector")?.unwrap_or(-1));
            let (once, immediately) = (flag("once")?, flag("immediately")?);
            Action::Inject(Inject { io, errno, offset, once, immediately })
        }
    };
    Ok(Rule { event, state, action })
}

/// The byte that `sector` stands for; -1 is any, and other sectors outside of every disk fit nothing.
pub fn offset(sector: i64) -> Option<u64> {
    match sector {
        -1 => None,
        s => Some(u64::try_from(s).ok().and_then(|s| s.checked_mul(block::SECTOR)).unwrap_or(u64::MAX)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read() {
        let text = "# c\n[set-state]\nevent = \"read_aio\"\nstate=\"1\"\nnew_state = \"2\"\n\n[inject-error \"x\"]\n  \
                    event = \"write_aio\"\n once = \"on\"\n sector = \"3\"\n iotype = \"write\"\n errno = \"28\"\n";
        let rules = parse(text).expect("a good file");
        let r =
            Inject { io: Some(IoType::Write), errno: 28, offset: Some(1536), once: true, immediately: false };
        let inject = Rule { event: DebugEvent::WriteAio, state: 0, action: Action::Inject(r) };
        let set = Rule { event: DebugEvent::ReadAio, state: 1, action: Action::SetState(2) };
        assert_eq!(rules, [inject, set]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, want) in [
            ("[inject-err]\n", "There is no option group 'inject-err'"),
            ("[inject-error]\nevnt = \"x\"\n", "Invalid parameter 'evnt'"),
            ("[inject-error]\nevent = \"x\"\n", "invalid parameter value: x"),
            ("[inject-error]\nerrno = \"5\"\n", "Missing event name for rule"),
            ("[inject-error]\nevent = \"none\"\nerrno = \"x\"\n", "Parameter 'errno' expects a number"),
            ("[inject-error]\nevent = \"none\"\nonce = \"x\"\n", "Parameter 'once' expects 'on' or 'off'"),
            ("[inject-error]\nevent \"none\"\n", "parse error in line 2: 'event \"none\"'"),
            ("event = \"none\"\n", "parse error in line 1: 'event = \"none\"'"),
        ] {
            assert_eq!(parse(text).expect_err(text).message(), want);
        }
        assert_eq!([offset(-1), offset(0), offset(-2)], [None, Some(0), Some(u64::MAX)]);
    }
}
