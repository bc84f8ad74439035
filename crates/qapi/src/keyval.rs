//! `a.b.0=x,,y` on the command line: dotted keys become nested objects and lists, all leaves are strings.
//!
//! A key is fragments joined by `.`; a fragment is a name (letter first, then letters, digits, `-`, `_`) or a number (list
//! index). `,,` in a value is one comma. The last of equal keys wins. An object whose keys are all numbers becomes a list
//! and must have every index from 0. Types come later, from the schema ([`crate::Schema::check_keyval`]).

use serde_json::{Map, Value};

/// Longest fragment of a key, as in QSD.
const MAX_FRAGMENT: usize = 127;
/// Deepest key: what bounds the recursion over the result.
const MAX_FRAGMENTS: usize = 128;

/// What an argument says.
#[derive(Clone, PartialEq, Debug)]
pub struct Keyval {
    /// The tree; leaves are strings.
    pub values: Map<String, Value>,
    /// Whether `help` or `?` was among the parameters.
    pub help: bool,
}

/// Parses `text`. With `implied`, a first parameter without `=` is that key's value.
pub fn parse(text: &str, implied: Option<&str>) -> Result<Keyval, String> {
    let mut out = Keyval { values: Map::new(), help: false };
    let mut rest = text;
    let mut first = true;
    while !rest.is_empty() {
        let end = rest.find(['=', ',']).unwrap_or(rest.len());
        let (key, after) = rest.split_at(end);
        if let Some(value) = after.strip_prefix('=') {
            let (value, left) = value_of(value);
            put(&mut out.values, key, value)?;
            rest = left;
        } else {
            if key == "help" || key == "?" {
                out.help = true;
            } else if let (true, Some(implied)) = (first && !key.is_empty(), implied) {
                put(&mut out.values, implied, key.to_owned())?;
            } else if key.is_empty() {
                return Err("Invalid parameter ''".to_owned());
            } else {
                check_key(key)?;
                return Err(format!("Expected '=' after parameter '{key}'"));
            }
            rest = after.strip_prefix(',').unwrap_or(after);
        }
        first = false;
    }
    let values = std::mem::take(&mut out.values);
    out.values = values
        .into_iter()
        .map(|(k, v)| {
            let v = lists(v, &k)?;
            Ok((k, v))
        })
        .collect::<Result<_, String>>()?;
    Ok(out)
}

/// A parameter that is on or off.
///
/// # Errors
/// It is neither.
pub fn flag(name: &str, value: &str) -> Result<bool, String> {
    match value {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => Err(format!("Parameter '{name}' expects 'on' or 'off'")),
    }
}

/// The value up to the next single comma, `,,` in it being one, and what is left behind it.
pub fn value_of(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut rest = text;
    loop {
        let Some(comma) = rest.find(',') else {
            value.push_str(rest);
            return (value, "");
        };
        value.push_str(&rest[..comma]);
        rest = &rest[comma + 1..];
        match rest.strip_prefix(',') {
            Some(left) => {
                value.push(',');
                rest = left;
            }
            None => return (value, rest),
        }
    }
}

fn check_key(key: &str) -> Result<(), String> {
    let good = |f: &str| {
        let name = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        let number = f.bytes().all(|b| b.is_ascii_digit());
        !f.is_empty()
            && f.len() <= MAX_FRAGMENT
            && (number || (f.starts_with(|c: char| c.is_ascii_alphabetic()) && f.chars().all(name)))
    };
    let fragments = key.split('.').count();
    let first_is_name = key.starts_with(|c: char| c.is_ascii_alphabetic());
    if first_is_name && fragments <= MAX_FRAGMENTS && key.split('.').all(good) {
        Ok(())
    } else {
        Err(format!("Invalid parameter '{key}'"))
    }
}

fn put(tree: &mut Map<String, Value>, key: &str, value: String) -> Result<(), String> {
    check_key(key)?;
    let mixed = |upto: usize| Err(format!("Parameters '{}.*' used inconsistently", &key[..upto]));
    let mut at = tree;
    let mut upto = 0;
    let mut fragments = key.split('.').peekable();
    while let Some(f) = fragments.next() {
        upto += f.len();
        if fragments.peek().is_none() {
            if matches!(at.get(f), Some(Value::Object(_))) {
                return mixed(upto);
            }
            at.insert(f.to_owned(), Value::String(value));
            return Ok(());
        }
        match at.entry(f).or_insert_with(|| Value::Object(Map::new())) {
            Value::Object(next) => at = next,
            _ => return mixed(upto),
        }
        upto += 1;
    }
    Ok(())
}

/// Turns objects with numbers for keys into lists, from the leaves up.
fn lists(value: Value, path: &str) -> Result<Value, String> {
    let Value::Object(map) = value else { return Ok(value) };
    let numbers = map.keys().filter(|k| k.starts_with(|c: char| c.is_ascii_digit())).count();
    if numbers != 0 && numbers != map.len() {
        return Err(format!("Parameters '{path}.*' used inconsistently"));
    }
    let map = map
        .into_iter()
        .map(|(k, v)| {
            let v = lists(v, &format!("{path}.{k}"))?;
            Ok((k, v))
        })
        .collect::<Result<Map<_, _>, String>>()?;
    if numbers == 0 {
        return Ok(Value::Object(map));
    }
    let mut slots: Vec<Option<Value>> = vec![None; map.len()];
    for (k, v) in map {
        // an index beyond the number of elements leaves a gap, which is reported below
        if let Some(slot) = k.parse::<usize>().ok().and_then(|i| slots.get_mut(i)) {
            *slot = Some(v);
        }
    }
    slots
        .into_iter()
        .enumerate()
        .map(|(i, v)| v.ok_or_else(|| format!("Parameter '{path}.{i}' missing")))
        .collect::<Result<Vec<_>, _>>()
        .map(Value::Array)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn trees_and_lists() {
        let k = parse("file,a.b=1,a.c.1=y,a.c.0=x,,z,a.b=2,", Some("driver")).unwrap();
        assert_eq!(Value::Object(k.values), json!({"driver": "file", "a": {"b": "2", "c": ["x,z", "y"]}}));
        assert!(!k.help);
        assert!(parse("", Some("driver")).unwrap().values.is_empty());
        assert!(parse("file,help", Some("driver")).unwrap().help);
    }

    /// Texts as QSD 10.0.2 prints them.
    #[test]
    fn errors() {
        for (text, implied, want) in [
            ("file,,x", Some("driver"), "Invalid parameter ''"),
            ("=x", Some("driver"), "Invalid parameter ''"),
            ("a..b=x", None, "Invalid parameter 'a..b'"),
            (".a=x", None, "Invalid parameter '.a'"),
            ("a.=x", None, "Invalid parameter 'a.'"),
            ("foo", None, "Expected '=' after parameter 'foo'"),
            ("file,foo", Some("driver"), "Expected '=' after parameter 'foo'"),
            ("c.direct=on,c=5", None, "Parameters 'c.*' used inconsistently"),
            ("c=5,c.direct=on", None, "Parameters 'c.*' used inconsistently"),
            ("q.0=a,q.x=b", None, "Parameters 'q.*' used inconsistently"),
            ("q.0=a,q.2=b", None, "Parameter 'q.1' missing"),
        ] {
            assert_eq!(parse(text, implied), Err(want.to_owned()), "{text}");
        }
    }
}
