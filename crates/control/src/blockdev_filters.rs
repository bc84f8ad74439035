//! Options of filters and of drivers for tests: from JSON that fits the schema to what the crate `open` opens.

use crate::blockdev::{COMMON, Fields, child, node};
use crate::error::QmpError;
use drivers::filters::Given;
use drivers::filters::preallocate::PreallocateOptions;
use drivers::filters::quorum::{QuorumEvent, QuorumOptions, ReadPattern};
use drivers::filters::replication::{DEFAULT_TIMEOUT, ReplicationOptions, Side};
use drivers::testing::blkdebug::{BlkdebugOptions, offset};
use drivers::testing::blkdebug_rules::{Action, Inject, IoType, Rule};
use drivers::testing::blklogwrites::LogOptions;
use graph::{DebugEvent, Perms};
use open::{DriverSpec, FilterSpec};
use qapi::{Map, Value, json};
use std::time::Duration;

/// What the client said, flat, without common options and children.
fn given(options: &Map<String, Value>, children: &[&str]) -> Given {
    fn flatten(key: &str, value: &Value, out: &mut Vec<(String, String)>) {
        match value {
            Value::Object(members) => {
                members.iter().for_each(|(k, v)| flatten(&format!("{key}.{k}"), v, out))
            }
            Value::Array(list) => {
                list.iter().enumerate().for_each(|(i, v)| flatten(&format!("{key}.{i}"), v, out));
            }
            scalar => out.push((key.to_owned(), scalar.to_string())),
        }
    }
    let own = |key: &&String| !COMMON.contains(&key.as_str()) && !children.contains(&key.as_str());
    let mut out = Vec::new();
    options.keys().filter(own).for_each(|key| flatten(key, &options[key], &mut out));
    Given(out)
}

/// The objects of a list.
fn list<'a>(f: &Fields<'a>, key: &str) -> impl Iterator<Item = Fields<'a>> {
    f.0.get(key).and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_object).map(Fields)
}

/// The filter that the options describe.
pub(crate) fn filter(f: &Fields<'_>, depth: usize) -> Result<DriverSpec, QmpError> {
    let file = || child(f, "file", depth);
    let spec = match f.text("driver").unwrap_or_default() {
        "blkdebug" => blkdebug(f, depth)?,
        "blklogwrites" => FilterSpec::BlkLogWrites {
            file: file()?,
            log: child(f, "log", depth)?,
            options: LogOptions {
                sector_size: f.size("log-sector-size")?,
                append: f.flag("log-append").unwrap_or(false),
                interval: f.size("log-super-update-interval")?,
                given: given(f.0, &["file", "log"]),
            },
        },
        "blkverify" => FilterSpec::Blkverify { raw: child(f, "raw", depth)?, test: child(f, "test", depth)? },
        "compress" => FilterSpec::Compress { file: file()? },
        "copy-on-read" => {
            FilterSpec::CopyOnRead { file: file()?, bottom: f.text("bottom").map(str::to_owned) }
        }
        "preallocate" => FilterSpec::Preallocate { file: file()?, options: preallocate(f)? },
        "quorum" => quorum(f, depth)?,
        "replication" => FilterSpec::Replication { file: file()?, options: replication(f)? },
        "throttle" => FilterSpec::Throttle { file: file()?, group: f.string("throttle-group") },
        other => return Err(QmpError::generic(format!("Unknown driver '{other}'"))),
    };
    Ok(DriverSpec::Filter(Box::new(spec)))
}

fn preallocate(f: &Fields<'_>) -> Result<PreallocateOptions, QmpError> {
    let default = PreallocateOptions::default();
    Ok(PreallocateOptions {
        align: f.size("prealloc-align")?.unwrap_or(default.align),
        size: f.size("prealloc-size")?.unwrap_or(default.size),
    })
}

fn quorum(f: &Fields<'_>, depth: usize) -> Result<FilterSpec, QmpError> {
    let listed = f.0.get("children").and_then(Value::as_array).into_iter().flatten();
    let children = listed.map(|c| node(c, depth)).collect::<Result<_, _>>()?;
    let options = QuorumOptions {
        // What is below 1 is refused with the rest.
        threshold: f.signed("vote-threshold").and_then(|n| usize::try_from(n).ok()).unwrap_or(0),
        blkverify: f.flag("blkverify").unwrap_or(false),
        rewrite: f.flag("rewrite-corrupted").unwrap_or(false),
        pattern: if f.text("read-pattern") == Some("fifo") { ReadPattern::Fifo } else { ReadPattern::Quorum },
        given: given(f.0, &["children"]),
    };
    Ok(FilterSpec::Quorum { children, options })
}

fn replication(f: &Fields<'_>) -> Result<ReplicationOptions, QmpError> {
    let seconds = f.size("forward-timeout")?.map_or(DEFAULT_TIMEOUT, Duration::from_secs);
    Ok(ReplicationOptions {
        side: if f.text("mode") == Some("primary") { Side::Primary } else { Side::Secondary },
        top: f.text("top-id").map(str::to_owned),
        timeout: seconds,
        durable: f.flag("durable").unwrap_or(false),
        given: given(f.0, &["file"]),
    })
}

/// `QUORUM_REPORT_BAD` or `QUORUM_FAILURE`: its name and data. Places are in sectors.
pub(crate) fn quorum_event(event: QuorumEvent) -> (&'static str, Value) {
    let sectors = |at: block::Span| {
        let first = at.start / block::SECTOR;
        (first, at.end().div_ceil(block::SECTOR) - first)
    };
    match event {
        QuorumEvent::Bad { operation, node, error, at } => {
            let (first, count) = sectors(at);
            let mut data =
                json!({"type": operation, "node-name": node, "sector-num": first, "sectors-count": count});
            if let (Some(error), Some(members)) = (error, data.as_object_mut()) {
                members.insert("error".to_owned(), json!(error));
            }
            ("QUORUM_REPORT_BAD", data)
        }
        QuorumEvent::Failure { node, at } => {
            let (first, count) = sectors(at);
            ("QUORUM_FAILURE", json!({"reference": node, "sector-num": first, "sectors-count": count}))
        }
    }
}

fn blkdebug(f: &Fields<'_>, depth: usize) -> Result<FilterSpec, QmpError> {
    let errors = list(f, "inject-error").map(|r| inject(&r));
    let states =
        list(f, "set-state").map(|r| Ok(rule(&r, Action::SetState(r.signed("new_state").unwrap_or(0)))));
    let options = BlkdebugOptions {
        config: f.text("config").map(str::to_owned),
        align: small(f, "align")?,
        max_transfer: small(f, "max-transfer")?,
        opt_write_zero: small(f, "opt-write-zero")?,
        max_write_zero: small(f, "max-write-zero")?,
        opt_discard: small(f, "opt-discard")?,
        max_discard: small(f, "max-discard")?,
        rules: errors.chain(states).collect::<Result<_, QmpError>>()?,
        take: permissions(f, "take-child-perms"),
        unshare: permissions(f, "unshare-child-perms"),
        given: given(f.0, &["image"]),
    };
    Ok(FilterSpec::Blkdebug { image: child(f, "image", depth)?, options })
}

/// A size that QMP keeps in 32 bits; 0 where missing.
fn small(f: &Fields<'_>, key: &str) -> Result<u64, QmpError> {
    let size = f.size(key)?.unwrap_or(0);
    if key != "align" && i32::try_from(size).is_err() {
        return Err(QmpError::generic(format!("Parameter '{key}' expects int32_t")));
    }
    Ok(size)
}

fn inject(r: &Fields<'_>) -> Result<Rule, QmpError> {
    let errno = r.signed("errno").unwrap_or(i64::from(block::BlockError::EIO));
    let Some(errno) = i32::try_from(errno).ok().filter(|n| *n >= 0) else {
        return Err(QmpError::generic(format!("Value '{errno}' is out of range for parameter 'errno'")));
    };
    let inject = Inject {
        io: r.text("iotype").and_then(IoType::named),
        errno,
        offset: offset(r.signed("sector").unwrap_or(-1)),
        once: r.flag("once").unwrap_or(false),
        immediately: r.flag("immediately").unwrap_or(false),
    };
    Ok(rule(r, Action::Inject(inject)))
}

fn rule(r: &Fields<'_>, action: Action) -> Rule {
    // The schema has checked the name.
    let event = r.text("event").and_then(DebugEvent::named).unwrap_or(DebugEvent::None);
    Rule { event, state: r.signed("state").unwrap_or(0), action }
}

fn permissions(f: &Fields<'_>, key: &str) -> Perms {
    let named = |name: &str| {
        [Perms::CONSISTENT_READ, Perms::WRITE, Perms::WRITE_UNCHANGED, Perms::RESIZE]
            .into_iter()
            .find(|p| p.names().eq([name]))
            .unwrap_or(Perms::NONE)
    };
    let names = f.0.get(key).and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
    names.fold(Perms::NONE, |all, name| all.with(named(name)))
}
