//! Options take effect: strictly in the order given, each one the command it stands for.

use crate::help;
use crate::options::{Given, Name};
use control::{ChardevSpec, Daemon, QmpError, StartOption};
use env::os::process;
use qapi::{Map, Value, json, keyval};
use state::Store;
use std::borrow::Cow;
use std::path::Path;
use std::rc::Rc;

/// How an option ended.
pub(crate) enum Done {
    /// It took effect.
    Applied,
    /// It asked for this text; the process ends.
    Text(Cow<'static, str>),
}

/// What an option asks for.
pub(crate) enum Asked {
    /// What a command does.
    Command(StartOption),
    /// Something of the command line's own, done by [`apply`].
    Own,
    /// This text.
    Text(Cow<'static, str>),
}

/// Reads one option; nothing is done.
pub(crate) fn read(daemon: &Daemon, given: &Given) -> Result<Asked, QmpError> {
    let value = given.value.as_str();
    let command = |command: &'static str, arguments| Ok(Asked::Command(StartOption { command, arguments }));
    match given.name {
        Name::Blockdev => command("blockdev-add", check(daemon, "--blockdev", Some("driver"), value)?),
        Name::Export => command("block-export-add", check(daemon, "--export", Some("type"), value)?),
        Name::Object => match value {
            "help" | "?" => Ok(Asked::Text(help::objects().into())),
            value
                if !value.starts_with('{')
                    && let Ok(asked) = keyval::parse(value, Some("qom-type"))
                    && asked.help =>
            {
                let kind = asked.values.get("qom-type").and_then(Value::as_str);
                Ok(Asked::Text(kind.and_then(help::object).unwrap_or_else(help::objects).into()))
            }
            value => command("object-add", check(daemon, "--object", Some("qom-type"), value)?),
        },
        Name::NbdServer => {
            let mut arguments = check(daemon, "--nbd-server", None, value)?;
            // the command has its address in an older form
            if let Some(Value::Object(mut addr)) = arguments.shift_remove("addr") {
                let kind = addr.shift_remove("type");
                arguments.insert("addr".into(), json!({"type": kind, "data": addr}));
            }
            command("nbd-server-start", arguments)
        }
        Name::Chardev if value == "help" || value == "?" => Ok(Asked::Text(help::CHARDEVS.into())),
        // there are no trace events to be listed
        Name::Trace if value == "help" || value == "?" => Ok(Asked::Text("".into())),
        _ => Ok(Asked::Own),
    }
}

/// Makes one option take effect. `background`: the process is to leave its terminal.
pub(crate) async fn apply(daemon: &Rc<Daemon>, given: &Given, background: bool) -> Result<Done, QmpError> {
    match read(daemon, given)? {
        Asked::Command(option) => daemon.run_option(&option).await.map(|_| Done::Applied),
        Asked::Text(text) => Ok(Done::Text(text)),
        Asked::Own => own(daemon, given, background).await.map(|()| Done::Applied),
    }
}

/// What the command line alone can ask for.
async fn own(daemon: &Rc<Daemon>, given: &Given, background: bool) -> Result<(), QmpError> {
    let value = given.value.as_str();
    match given.name {
        Name::Argument => Err(QmpError::generic("Unexpected argument")),
        Name::Trace => check_trace(value),
        Name::Chardev => {
            let spec = ChardevSpec::parse(value)?;
            if background && spec.is_stdio() {
                return Err(QmpError::generic("cannot use stdio with -daemonize"));
            }
            if let Some(at) = spec.waits_at() {
                eprintln!("liveblkd: {}: info: waiting for connection on: {at}", given.shown);
            }
            daemon.add_chardev(spec).await
        }
        Name::Monitor => {
            let arguments = check(daemon, "--monitor", Some("chardev"), value)?;
            let chardev = arguments["chardev"].as_str().unwrap_or_default();
            daemon.check_chardev(chardev)?;
            if arguments.get("mode").is_some_and(|m| m == "readline") {
                return Err(QmpError::generic("Only QMP is supported"));
            }
            let pretty = arguments.get("pretty").and_then(Value::as_bool).unwrap_or(false);
            daemon.add_monitor(chardev, pretty)
        }
        _ => Ok(()),
    }
}

/// Whether a value of `--trace` is one, though nothing is traced.
fn check_trace(value: &str) -> Result<(), QmpError> {
    for (i, part) in value.split(',').filter(|p| !p.is_empty()).enumerate() {
        match part.split_once('=') {
            Some(("enable" | "events" | "file", _)) => {}
            None if i == 0 => {}
            _ => {
                let name = part.split('=').next().unwrap_or_default();
                return Err(QmpError::generic(format!("Invalid parameter '{name}'")));
            }
        }
    }
    Ok(())
}

/// The daemon of an earlier life, from the directory that `--state-dir` names, if it is given. Which of the options have
/// taken effect in an earlier life.
pub(crate) async fn restore(daemon: &Rc<Daemon>, given: &[Given]) -> Result<Vec<bool>, QmpError> {
    let mut skip = vec![false; given.len()];
    let Some(dir) = given.iter().rev().find(|g| g.name == Name::StateDir) else { return Ok(skip) };
    let dir = daemon.env().absolute(Path::new(&dir.value));
    process::private_directory(&dir)?;
    let store = Store::open(daemon.env(), &dir).await?;
    process::sync_directory(&dir)?;
    daemon.keep_bitmaps_in(&dir);
    let mut places = Vec::new();
    let mut options = Vec::new();
    for (i, g) in given.iter().enumerate() {
        // what is wrong with it is told when its turn comes
        if let Ok(Asked::Command(option)) = read(daemon, g) {
            places.push(i);
            options.push(option);
        }
    }
    let done = daemon.use_state(store, &options).await?;
    places.into_iter().zip(done).for_each(|(i, done)| skip[i] = done);
    Ok(skip)
}

/// The option's value as checked arguments: a JSON object, or `key=value` pairs.
fn check(
    daemon: &Daemon,
    option: &str,
    implied: Option<&str>,
    value: &str,
) -> Result<Map<String, Value>, QmpError> {
    let checked = if value.starts_with('{') {
        match qapi::json::parse_one(value).map_err(QmpError::generic)? {
            Value::Object(map) => daemon.schema().check_json(option, map),
            _ => Err("a JSON object is expected".to_owned()),
        }
    } else {
        let parsed = keyval::parse(value, implied).map_err(QmpError::generic)?;
        if parsed.help {
            return Err(QmpError::generic("Help is not available for this option"));
        }
        daemon.schema().check_keyval(option, parsed.values)
    };
    checked.map_err(QmpError::generic)
}
