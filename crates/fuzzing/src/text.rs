//! What users and managers write: JSON on a monitor, key=value on the command line.
//!
//! What must stay true: the way a stream is cut into pieces changes nothing; what was understood and is written again means the same.

use qapi::json::{Parser, parse_one};
use qapi::{Value, keyval as pairs, print};

/// All that a stream of JSON says, and its mistakes.
fn parse(bytes: &[u8], cut: usize) -> Vec<Result<Value, String>> {
    let (mut parser, mut all) = (Parser::new(), Vec::new());
    bytes.chunks(cut.max(1)).for_each(|piece| parser.feed(piece, |v| all.push(v)));
    parser.finish(|v| all.push(v));
    all
}

/// The same, but that a number with a point may come back without one, as from the reference.
fn alike(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => a == b || a.as_f64() == b.as_f64(),
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| alike(a, b)),
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|((k, a), (l, b))| k == l && alike(a, b))
        }
        _ => a == b,
    }
}

/// A stream of JSON.
pub(crate) fn json(bytes: &[u8]) {
    let all = parse(bytes, bytes.len());
    assert_eq!(all, parse(bytes, 1), "byte by byte");
    for value in all.iter().flatten() {
        for pretty in [false, true] {
            let mut text = String::new();
            print::print(value, pretty, &mut text);
            let again = parse_one(&text);
            assert!(
                again.as_ref().is_ok_and(|again| alike(again, value)),
                "{value} is written as {text}: {again:?}"
            );
        }
    }
}

/// The leaves of a tree, each with its key, as they would be written on a command line.
fn leaves(key: &str, value: &Value, out: &mut Vec<String>) {
    match value {
        Value::Object(all) => all.iter().for_each(|(k, v)| leaves(&format!("{key}.{k}"), v, out)),
        Value::Array(all) => all.iter().enumerate().for_each(|(k, v)| leaves(&format!("{key}.{k}"), v, out)),
        Value::String(text) => out.push(format!("{}={}", &key[1..], text.replace(',', ",,"))),
        other => panic!("{other} on a command line"),
    }
}

/// An argument of the command line.
pub(crate) fn keyval(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    for implied in [None, Some("driver")] {
        let Ok(said) = pairs::parse(text, implied) else { continue };
        let mut again = Vec::new();
        leaves("", &Value::Object(said.values.clone()), &mut again);
        let again = again.join(",");
        assert_eq!(pairs::parse(&again, None).map(|k| k.values), Ok(said.values), "written as {again}");
    }
}
