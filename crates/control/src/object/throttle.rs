//! Limits of throttle groups as QMP has them: in `limits`, or one by one in properties `x-…` that only creation takes.

use crate::error::QmpError;
use drivers::filters::throttle_limits::{Config, Limit, NAMES};
use qapi::{Map, Value, json};

/// Longest burst in seconds that QMP can say.
const MAX_LENGTH: i64 = u32::MAX as i64;

/// The limits of a new group. What is in `limits` comes after the properties, as in QSD.
pub(super) fn read(properties: &Map<String, Value>) -> Result<Config, QmpError> {
    let mut config = Config::default();
    for (name, value) in properties {
        if let Some(name) = name.strip_prefix("x-") {
            if value.as_i64().is_some_and(|n| n < 0) {
                return Err(QmpError::generic("Property values cannot be negative"));
            }
            put(&mut config, name, value)?;
        }
    }
    if let Some(limits) = properties.get("limits").and_then(Value::as_object) {
        limits.iter().try_for_each(|(name, value)| put(&mut config, name, value))?;
    }
    config.check()?;
    Ok(config)
}

/// The limits after `qom-set` of a property.
pub(super) fn changed(mut config: Config, property: &str, value: &Value) -> Result<Config, QmpError> {
    let Some(limits) = value.as_object().filter(|_| property == "limits") else {
        return Err(QmpError::generic("Property cannot be set after initialization"));
    };
    limits.iter().try_for_each(|(name, value)| put(&mut config, name, value))?;
    config.check()?;
    Ok(config)
}

/// What `qom-get` says.
pub(super) fn show(config: &Config, property: &str) -> Value {
    let mut all = Map::new();
    for (name, limit) in NAMES.iter().zip(&config.limits) {
        all.insert((*name).to_owned(), json!(limit.avg));
        all.insert(format!("{name}-max"), json!(limit.max));
        all.insert(format!("{name}-max-length"), json!(limit.length));
    }
    all.insert("iops-size".to_owned(), json!(config.iops_size));
    match property.strip_prefix("x-") {
        Some(name) => all.remove(name).unwrap_or_default(),
        None => Value::Object(all),
    }
}

fn put(config: &mut Config, name: &str, value: &Value) -> Result<(), QmpError> {
    let unexpected = || QmpError::generic(format!("Parameter 'limits.{name}' is unexpected"));
    let (place, length) = place(config, name).ok_or_else(unexpected)?;
    let Some(n) = value.as_i64() else {
        let desc = format!("Invalid parameter type for 'limits.{name}', expected: integer");
        return Err(QmpError::generic(desc));
    };
    if length && !(0..=MAX_LENGTH).contains(&n) {
        return Err(QmpError::generic(format!("{name} value must be in the range [0, {MAX_LENGTH}]")));
    }
    *place = n;
    Ok(())
}

/// Where a limit is kept, and whether it is the length of a burst.
fn place<'a>(config: &'a mut Config, name: &str) -> Option<(&'a mut i64, bool)> {
    if name == "iops-size" {
        return Some((&mut config.iops_size, false));
    }
    let (kind, part) = NAMES.iter().enumerate().find_map(|(i, n)| Some((i, name.strip_prefix(n)?)))?;
    let limit: &mut Limit = &mut config.limits[kind];
    match part {
        "" => Some((&mut limit.avg, false)),
        "-max" => Some((&mut limit.max, false)),
        "-max-length" => Some((&mut limit.length, true)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_come_and_go_by_name() {
        let given = json!({"limits": {"iops-total": 5, "iops-total-max": 50}, "x-bps-write": 7});
        let config = read(given.as_object().expect("an object")).expect("good limits");
        assert_eq!(show(&config, "x-bps-write"), json!(7));
        let shown = show(&config, "limits");
        assert_eq!((&shown["iops-total-max"], &shown["iops-total-max-length"]), (&json!(50), &json!(1)));
        let config = changed(config, "limits", &json!({"bps-write": 0, "bps-total": 9})).expect("a change");
        assert_eq!(show(&config, "x-bps-total"), json!(9));
        let e = |value: Value| changed(config, "limits", &value).expect_err("refused").desc;
        assert_eq!(e(json!({"nope": 1})), "Parameter 'limits.nope' is unexpected");
        assert!(e(json!({"bps-read": 1})).contains("cannot be used at the same time"));
        assert_eq!(
            e(json!({"bps-total-max-length": -1})),
            "bps-total-max-length value must be in the range [0, 4294967295]"
        );
    }
}
