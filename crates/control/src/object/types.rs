//! The types of objects that users can create, and their properties: one table, from which come `qom-list-types`,
//! `qom-list-properties`, defaults, and the check of what is set later. Names and defaults are QSD's.

use crate::error::{Class, QmpError, Reply};
use qapi::{Value, json};

/// What a property is when the user has not given it.
#[derive(Clone, Copy)]
pub(super) enum Default {
    Text(&'static str),
    Number(i64),
    Flag(bool),
    /// An empty list.
    List,
    /// Members of its own.
    Object,
}

impl Default {
    pub(super) fn value(self) -> Value {
        match self {
            Default::Text(s) => json!(s),
            Default::Number(n) => json!(n),
            Default::Flag(b) => json!(b),
            Default::List => json!([]),
            Default::Object => json!({}),
        }
    }
}

/// A property: its name, the name of its type, and its default, which also says what kind of value it takes.
#[derive(Clone, Copy)]
pub(super) struct Property {
    pub(super) name: &'static str,
    kind: &'static str,
    pub(super) default: Default,
}

const fn text(name: &'static str) -> Property {
    Property { name, kind: "string", default: Default::Text("") }
}
const fn number(name: &'static str, default: i64) -> Property {
    Property { name, kind: "int", default: Default::Number(default) }
}
const fn flag(name: &'static str) -> Property {
    Property { name, kind: "bool", default: Default::Flag(true) }
}
const fn choice(name: &'static str, kind: &'static str, default: &'static str) -> Property {
    Property { name, kind, default: Default::Text(default) }
}

impl Property {
    /// The values of an enumeration.
    fn choices(&self) -> Option<&'static [&'static str]> {
        match self.kind {
            "QAuthZListPolicy" => Some(&["deny", "allow"]),
            "QCryptoSecretFormat" => Some(&["raw", "base64"]),
            "QCryptoTLSCredsEndpoint" => Some(&["client", "server"]),
            _ => None,
        }
    }

    /// Whether the property takes this value.
    pub(super) fn check(&self, name: &str, value: &Value) -> Result<(), QmpError> {
        let (fits, expected) = match self.default {
            Default::Text(_) => (value.is_string(), "string"),
            Default::Number(_) => (value.is_i64(), "integer"),
            Default::Flag(_) => (value.is_boolean(), "boolean"),
            Default::List => (value.is_array(), "array"),
            Default::Object => (value.is_object(), "object"),
        };
        if let (Value::String(s), Some(choices)) = (value, self.choices())
            && !choices.contains(&s.as_str())
        {
            return Err(QmpError::generic(format!("Parameter '{name}' does not accept value '{s}'")));
        }
        if fits {
            return Ok(());
        }
        let desc = format!("Invalid parameter type for '{name}', expected: {expected}");
        Err(QmpError::generic(desc))
    }
}

/// A type of objects.
pub(super) struct Type {
    pub(super) name: &'static str,
    parent: &'static str,
    /// There can be only one object of it.
    pub(super) alone: bool,
    properties: &'static [Property],
}

const EVENT_LOOP: [Property; 3] =
    [number("thread-pool-min", 0), number("aio-max-batch", 0), number("thread-pool-max", 64)];

/// Every type, by name.
const TYPES: &[Type] = &[
    Type {
        name: "authz-list",
        parent: "authz",
        alone: false,
        properties: &[
            choice("policy", "QAuthZListPolicy", "deny"),
            Property { name: "rules", kind: "QAuthZListRule", default: Default::List },
        ],
    },
    Type { name: "authz-simple", parent: "authz", alone: false, properties: &[text("identity")] },
    Type {
        name: "iothread",
        parent: "event-loop-base",
        alone: false,
        properties: &[
            EVENT_LOOP[0],
            EVENT_LOOP[1],
            EVENT_LOOP[2],
            number("poll-max-ns", 32768),
            number("poll-grow", 0),
            number("poll-shrink", 0),
        ],
    },
    Type { name: "main-loop", parent: "event-loop-base", alone: true, properties: &EVENT_LOOP },
    Type {
        name: "secret",
        parent: "secret_common",
        alone: false,
        properties: &[
            text("iv"),
            text("keyid"),
            choice("format", "QCryptoSecretFormat", "raw"),
            text("file"),
            text("data"),
        ],
    },
    Type {
        name: "throttle-group",
        parent: "object",
        alone: false,
        properties: &[
            Property { name: "limits", kind: "ThrottleLimits", default: Default::Object },
            number("x-iops-total", 0),
            number("x-iops-total-max", 0),
            number("x-iops-total-max-length", 1),
            number("x-iops-read", 0),
            number("x-iops-read-max", 0),
            number("x-iops-read-max-length", 1),
            number("x-iops-write", 0),
            number("x-iops-write-max", 0),
            number("x-iops-write-max-length", 1),
            number("x-bps-total", 0),
            number("x-bps-total-max", 0),
            number("x-bps-total-max-length", 1),
            number("x-bps-read", 0),
            number("x-bps-read-max", 0),
            number("x-bps-read-max-length", 1),
            number("x-bps-write", 0),
            number("x-bps-write-max", 0),
            number("x-bps-write-max-length", 1),
            number("x-iops-size", 0),
        ],
    },
    Type {
        name: "tls-creds-x509",
        parent: "tls-creds",
        alone: false,
        properties: &[
            choice("endpoint", "QCryptoTLSCredsEndpoint", "client"),
            text("dir"),
            flag("verify-peer"),
            text("priority"),
            flag("sanity-check"),
            text("passwordid"),
        ],
    },
];

/// The types above those: they have no objects.
const ABSTRACT: &[(&str, &str)] =
    &[("event-loop-base", "object"), ("secret_common", "object"), ("user-creatable", "interface")];

pub(super) fn find(name: &str) -> Option<&'static Type> {
    TYPES.iter().find(|t| t.name == name)
}

pub(super) fn property(of: &'static Type, name: &str) -> Result<&'static Property, QmpError> {
    of.properties
        .iter()
        .find(|p| p.name == name)
        .ok_or_else(|| QmpError::generic(format!("Property '{}.{name}' not found", of.name)))
}

/// The properties of a type as `qom-list` tells them.
pub(super) fn list(of: &Type) -> Vec<Value> {
    let mut out = vec![json!({"name": "type", "type": "string"})];
    out.extend(of.properties.iter().map(|p| json!({"name": p.name, "type": p.kind})));
    out
}

/// The types and their properties, for a user who asks on the command line.
pub fn object_types() -> impl Iterator<Item = (&'static str, Vec<(&'static str, &'static str)>)> {
    TYPES.iter().map(|t| (t.name, t.properties.iter().map(|p| (p.name, p.kind)).collect()))
}

/// `qom-list-properties`.
pub(crate) fn list_properties(name: &str) -> Reply {
    // what everything else is made of
    if matches!(name, "container" | "object") {
        return Ok(json!([{"name": "type", "type": "string"}]));
    }
    let found =
        find(name).ok_or_else(|| QmpError::of(Class::DeviceNotFound, format!("Class '{name}' not found")))?;
    Ok(Value::Array(list(found)))
}

/// `qom-list-types`.
pub(crate) fn list_types(implements: Option<&str>, with_abstract: bool) -> Value {
    let fits = |name: &str, parent: &str| match implements {
        None | Some("object" | "user-creatable") => true,
        Some(wanted) => wanted == name || wanted == parent,
    };
    let real = TYPES.iter().filter(|t| fits(t.name, t.parent));
    let mut out: Vec<Value> = real.map(|t| json!({"name": t.name, "parent": t.parent})).collect();
    if with_abstract {
        let above = ABSTRACT.iter().filter(|(name, parent)| fits(name, parent));
        out.extend(above.map(|(name, parent)| json!({"abstract": true, "name": name, "parent": parent})));
    }
    Value::Array(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn properties_take_values_of_their_kind_only() {
        let iothread = find("iothread").unwrap();
        let p = property(iothread, "poll-max-ns").unwrap();
        assert!(p.check("poll-max-ns", &json!(5)).is_ok());
        let e = p.check("poll-max-ns", &json!("5")).unwrap_err();
        assert_eq!(e.desc, "Invalid parameter type for 'poll-max-ns', expected: integer");
        let e = property(iothread, "nope").err().unwrap();
        assert_eq!(e.desc, "Property 'iothread.nope' not found");
    }
}
