//! Options take effect: strictly in the order given, each one the command it stands for.

use crate::help;
use crate::options::{Given, Name};
use control::{ChardevSpec, Daemon, QmpError};
use qapi::{Map, Value, json, keyval};
use std::borrow::Cow;
use std::rc::Rc;

/// How an option ended.
pub(crate) enum Done {
    /// It took effect.
    Applied,
    /// It asked for this text; the process ends.
    Text(Cow<'static, str>),
}

/// Makes one option take effect.
pub(crate) async fn apply(daemon: &Rc<Daemon>, given: &Given) -> Result<Done, QmpError> {
    let value = given.value.as_str();
    match given.name {
        Name::Blockdev => run(daemon, "--blockdev", Some("driver"), "blockdev-add", value).await?,
        Name::Export => run(daemon, "--export", Some("type"), "block-export-add", value).await?,
        Name::Object => match value {
            "help" | "?" => return Ok(Done::Text(help::objects().into())),
            value
                if let Some(text) =
                    value.strip_suffix(",help").or(value.strip_suffix(",?")).and_then(help::object) =>
            {
                return Ok(Done::Text(text.into()));
            }
            value => run(daemon, "--object", Some("qom-type"), "object-add", value).await?,
        },
        Name::NbdServer => {
            let mut arguments = check(daemon, "--nbd-server", None, value)?;
            // the command has its address in an older form
            if let Some(Value::Object(mut addr)) = arguments.shift_remove("addr") {
                let kind = addr.shift_remove("type");
                arguments.insert("addr".into(), json!({"type": kind, "data": addr}));
            }
            daemon.run("nbd-server-start", arguments).await?;
        }
        Name::Chardev if value == "help" || value == "?" => return Ok(Done::Text(help::CHARDEVS.into())),
        Name::Chardev => {
            let spec = ChardevSpec::parse(value)?;
            if let Some(at) = spec.waits_at() {
                eprintln!("liveblkd: {}: info: waiting for connection on: {at}", given.shown);
            }
            daemon.add_chardev(spec).await?;
        }
        Name::Monitor => {
            let arguments = check(daemon, "--monitor", Some("chardev"), value)?;
            let chardev = arguments["chardev"].as_str().unwrap_or_default();
            daemon.check_chardev(chardev)?;
            if arguments.get("mode").is_some_and(|m| m == "readline") {
                return Err(QmpError::generic("Only QMP is supported"));
            }
            let pretty = arguments.get("pretty").and_then(Value::as_bool).unwrap_or(false);
            daemon.add_monitor(chardev, pretty)?;
        }
        Name::Trace | Name::Daemonize | Name::Pidfile | Name::Help | Name::Version => {}
    }
    Ok(Done::Applied)
}

async fn run(
    daemon: &Rc<Daemon>,
    option: &str,
    implied: Option<&str>,
    command: &str,
    value: &str,
) -> Result<(), QmpError> {
    let arguments = check(daemon, option, implied, value)?;
    daemon.run(command, arguments).await.map(|_| ())
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
