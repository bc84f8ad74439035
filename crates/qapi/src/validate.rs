//! Arguments against the schema, before anything is executed.
//!
//! One walk serves both inputs: JSON (types must match exactly) and `key=value` (all leaves are strings, converted here).
//! The result is a tree that fits the schema: mandatory members are there, nothing unknown is, integers fit their width,
//! enumeration values exist, every union has a known branch. Messages name the place by a dotted path, in QSD's words,
//! because clients show them and tests compare them.

use crate::keyval;
use crate::schema::{Member, Object, Schema, Type};
use serde_json::{Map, Value};

/// How leaves are written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Form {
    Json,
    Keyval,
}

/// Where in the arguments: members from the outside in.
enum Path<'a> {
    Root,
    Key(&'a Path<'a>, &'a str),
    Index(&'a Path<'a>, usize),
}

impl Path<'_> {
    fn full(&self, form: Form) -> String {
        match self {
            Path::Root => String::new(),
            Path::Key(Path::Root, k) => (*k).to_owned(),
            Path::Key(up, k) => format!("{}.{k}", up.full(form)),
            Path::Index(up, i) if form == Form::Json => format!("{}[{i}]", up.full(form)),
            Path::Index(up, i) => format!("{}.{i}", up.full(form)),
        }
    }

    /// The last member alone, as some messages have it; an element of a list has no name.
    fn leaf(&self) -> &str {
        match self {
            Path::Key(_, k) => k,
            _ => "null",
        }
    }
}

/// How QSD keeps an integer. The introspection answer says only "int".
#[derive(Clone, Copy)]
enum Width {
    /// 64 bits with a sign.
    Signed,
    /// The same, of which it takes 32.
    Narrow,
    /// Without a sign, up to a greatest number; what is negative is taken as its two's complement in 64 bits. With the
    /// type's name.
    Unsigned(u64, &'static str),
}

fn width(path: &Path<'_>) -> Width {
    match path.leaf() {
        "granularity"
        | "max-connections"
        | "handshake-max-seconds"
        | "reconnect-delay"
        | "open-timeout"
        | "log-sector-size"
        | "cbw-timeout" => Width::Unsigned(u64::from(u32::MAX), "uint32_t"),
        "num-queues" | "queue-size" | "to" => Width::Unsigned(u64::from(u16::MAX), "uint16_t"),
        "latency-ns"
        | "log-super-update-interval"
        | "min-cluster-size"
        | "write-threshold"
        | "cluster-size"
        | "logical-block-size" => Width::Unsigned(u64::MAX, "uint64"),
        // of `blockdev-create`; the others have a sign
        "size" if matches!(path, Path::Key(Path::Key(Path::Root, "options"), _)) => {
            Width::Unsigned(u64::MAX, "uint64")
        }
        "max-transfer" | "opt-write-zero" | "max-write-zero" | "opt-discard" | "max-discard" => Width::Narrow,
        _ => Width::Signed,
    }
}

impl Schema {
    /// Checks a command's JSON arguments. An unknown command is an error here, too; dispatchers ask before.
    pub fn check_json(
        &self,
        command: &str,
        arguments: Map<String, Value>,
    ) -> Result<Map<String, Value>, String> {
        self.check(command, arguments, Form::Json)
    }

    /// Checks and converts what [`crate::keyval::parse`] gave for a command-line option (`--blockdev`).
    pub fn check_keyval(
        &self,
        option: &str,
        values: Map<String, Value>,
    ) -> Result<Map<String, Value>, String> {
        self.check(option, values, Form::Keyval)
    }

    fn check(
        &self,
        entry: &str,
        arguments: Map<String, Value>,
        form: Form,
    ) -> Result<Map<String, Value>, String> {
        let of =
            self.argument_type(entry).ok_or_else(|| format!("The command {entry} has not been found"))?;
        match self.types.get(of) {
            Some(Type::Object(object)) => Walk { schema: self, form }.object(object, arguments, &Path::Root),
            _ => Err(format!("The arguments of {entry} are no object")),
        }
    }
}

struct Walk<'a> {
    schema: &'a Schema,
    form: Form,
}

impl Walk<'_> {
    fn wrong(&self, path: &Path<'_>, expected: &str) -> String {
        format!("Invalid parameter type for '{}', expected: {expected}", path.full(self.form))
    }

    fn value(&self, of: &str, value: Value, path: &Path<'_>) -> Result<Value, String> {
        match (self.schema.types.get(of), value) {
            (Some(Type::Object(object)), Value::Object(map)) => {
                self.object(object, map, path).map(Value::Object)
            }
            (Some(Type::Object(_)), _) => Err(self.wrong(path, "object")),
            (Some(Type::Array(of)), Value::Array(list)) => {
                let one = |(i, v)| self.value(of, v, &Path::Index(path, i));
                list.into_iter().enumerate().map(one).collect::<Result<Vec<_>, _>>().map(Value::Array)
            }
            (Some(Type::Array(_)), _) => Err(self.wrong(path, "array")),
            (Some(Type::Enum(values)), Value::String(s)) => {
                if values.contains(&s) {
                    return Ok(Value::String(s));
                }
                Err(format!("Parameter '{}' does not accept value '{s}'", path.leaf()))
            }
            (Some(Type::Enum(_)), _) => Err(self.wrong(path, "string")),
            (Some(Type::Alternate(of, name)), value) => match of.iter().find(|t| self.fits(t, &value)) {
                Some(of) => self.value(of, value, path),
                // these are named without the way to them
                None => Err(format!("Invalid parameter type for '{}', expected: {name}", path.leaf())),
            },
            (Some(Type::Builtin(json)), value) => self.scalar(json, value, path),
            (None, _) => Err(format!("type {of} is not in the schema")),
        }
    }

    /// Whether a branch of an alternate takes values of this JSON type.
    fn fits(&self, of: &str, value: &Value) -> bool {
        match self.schema.types.get(of) {
            Some(Type::Object(_)) => value.is_object(),
            Some(Type::Array(_)) => value.is_array(),
            Some(Type::Enum(_)) => value.is_string(),
            Some(Type::Builtin(json)) => match json.as_str() {
                "string" => value.is_string(),
                "null" => value.is_null(),
                "boolean" => value.is_boolean(),
                "int" | "number" => value.is_number(),
                _ => false,
            },
            _ => false,
        }
    }

    fn object(
        &self,
        of: &Object,
        mut map: Map<String, Value>,
        path: &Path<'_>,
    ) -> Result<Map<String, Value>, String> {
        let mut out = Map::new();
        self.members(&of.members, &mut map, &mut out, path)?;
        let branch =
            of.tag.as_ref().and_then(|tag| out.get(tag)?.as_str().and_then(|case| of.variants.get(case)));
        if let Some(Type::Object(branch)) = branch.and_then(|b| self.schema.types.get(b)) {
            self.branch(branch, &mut map, &mut out, path)?;
        }
        match map.keys().next() {
            Some(key) => Err(format!("Parameter '{}' is unexpected", Path::Key(path, key).full(self.form))),
            None => Ok(out),
        }
    }

    /// The members of a union's branch; a branch may be a union itself.
    fn branch(
        &self,
        of: &Object,
        map: &mut Map<String, Value>,
        out: &mut Map<String, Value>,
        path: &Path<'_>,
    ) -> Result<(), String> {
        self.members(&of.members, map, out, path)?;
        let inner =
            of.tag.as_ref().and_then(|tag| out.get(tag)?.as_str().and_then(|case| of.variants.get(case)));
        match inner.and_then(|b| self.schema.types.get(b)) {
            Some(Type::Object(inner)) => self.members(&inner.members, map, out, path),
            _ => Ok(()),
        }
    }

    fn members(
        &self,
        members: &[Member],
        map: &mut Map<String, Value>,
        out: &mut Map<String, Value>,
        path: &Path<'_>,
    ) -> Result<(), String> {
        for m in members {
            let here = Path::Key(path, &m.name);
            match map.shift_remove(&m.name) {
                Some(v) => {
                    out.insert(m.name.clone(), self.value(&m.of, v, &here)?);
                }
                None if m.optional => {}
                None => return Err(format!("Parameter '{}' is missing", here.full(self.form))),
            }
        }
        Ok(())
    }

    fn scalar(&self, json: &str, value: Value, path: &Path<'_>) -> Result<Value, String> {
        match (json, value) {
            ("value", value) => Ok(value),
            ("string", Value::String(s)) => Ok(Value::String(s)),
            ("string", _) => Err(self.wrong(path, "string")),
            ("null", Value::Null) => Ok(Value::Null),
            ("null", _) => Err(self.wrong(path, "null")),
            ("boolean", value) => self.boolean(value, path),
            ("int", value) => self.integer(&value, path),
            ("number", value) => self.number(value, path),
            (other, _) => Err(self.wrong(path, other)),
        }
    }

    fn boolean(&self, value: Value, path: &Path<'_>) -> Result<Value, String> {
        match value {
            Value::Bool(b) if self.form == Form::Json => Ok(Value::Bool(b)),
            Value::String(s) if self.form == Form::Keyval => {
                keyval::flag(&path.full(self.form), &s).map(Value::Bool)
            }
            _ => Err(self.wrong(path, "boolean")),
        }
    }

    fn integer(&self, value: &Value, path: &Path<'_>) -> Result<Value, String> {
        let width = width(path);
        let n = match (value, self.form) {
            (Value::Number(n), Form::Json) => n.as_i64().map(i128::from).or(n.as_u64().map(i128::from)),
            (Value::String(s), Form::Keyval) => match c_integer(s) {
                Some(n) => Some(n),
                None => return Err(format!("Parameter '{}' expects integer", path.full(self.form))),
            },
            _ => None,
        };
        match (n, width) {
            (Some(n), Width::Signed | Width::Narrow) => match i64::try_from(n) {
                Ok(n) if matches!(width, Width::Narrow) && i32::try_from(n).is_err() => {
                    Err(format!("Parameter '{}' expects int32_t", path.leaf()))
                }
                Ok(n) => Ok(n.into()),
                Err(_) if self.form == Form::Keyval => {
                    Err(format!("Parameter '{}' expects integer", path.full(self.form)))
                }
                Err(_) => Err(self.wrong(path, "integer")),
            },
            (None, Width::Signed | Width::Narrow) => Err(self.wrong(path, "integer")),
            (Some(n), Width::Unsigned(most, name)) => {
                match u64::try_from(n).or_else(|_| i64::try_from(n).map(|n| n as u64)) {
                    Ok(n) if n <= most => Ok(n.into()),
                    _ => Err(format!("Parameter '{}' expects {name}", path.leaf())),
                }
            }
            (None, Width::Unsigned(..)) => {
                Err(format!("Parameter '{}' expects uint64", path.full(self.form)))
            }
        }
    }

    fn number(&self, value: Value, path: &Path<'_>) -> Result<Value, String> {
        match (value, self.form) {
            (Value::Number(n), Form::Json) => Ok(Value::Number(n)),
            (Value::String(s), Form::Keyval) => {
                let parsed = s.parse::<f64>().ok().and_then(serde_json::Number::from_f64);
                parsed.map(Value::Number).ok_or_else(|| {
                    format!("Invalid parameter type for '{}', expected: number", path.full(self.form))
                })
            }
            _ => Err(self.wrong(path, "number")),
        }
    }
}

/// An integer as C's `strtoll` or `strtoull` with base 0 takes it: decimal, `0x` hexadecimal or `0` octal, with a sign.
fn c_integer(s: &str) -> Option<i128> {
    let (negative, digits) = match s.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, s.strip_prefix('+').unwrap_or(s)),
    };
    let (digits, radix) = match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        Some(hex) => (hex, 16),
        None if digits.len() > 1 && digits.starts_with('0') => (&digits[1..], 8),
        None => (digits, 10),
    };
    if !digits.starts_with(|c: char| c.is_digit(radix)) {
        return None;
    }
    let n = i128::from(u64::from_str_radix(digits, radix).ok()?);
    Some(if negative { -n } else { n })
}
