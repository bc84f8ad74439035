//! JSON as it leaves on a control connection: one line, or indented for people.
//!
//! Spaces after `:` and `,`, everything that is not printable ASCII escaped (upper-case hexadecimal, surrogate pairs),
//! floating point with 17 significant digits: the form QSD's clients have always seen.

use serde_json::{Number, Value};
use std::fmt::Write;

/// Appends `value` in one line (no line end), or with `pretty` over several lines, four spaces a level.
pub fn print(value: &Value, pretty: bool, out: &mut String) {
    print_at(value, pretty, 0, out);
}

/// `value` in one line.
pub fn to_line(value: &Value) -> String {
    let mut s = String::new();
    print(value, false, &mut s);
    s
}

fn print_at(value: &Value, pretty: bool, depth: usize, out: &mut String) {
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(true) => out.push_str("true"),
        Value::Bool(false) => out.push_str("false"),
        Value::Number(n) => print_number(n, out),
        Value::String(s) => print_string(s, out),
        Value::Array(list) => {
            out.push('[');
            for (i, v) in list.iter().enumerate() {
                between(i, pretty, depth + 1, out);
                print_at(v, pretty, depth + 1, out);
            }
            line_end(pretty, depth, out);
            out.push(']');
        }
        Value::Object(map) => {
            out.push('{');
            for (i, (k, v)) in map.iter().enumerate() {
                between(i, pretty, depth + 1, out);
                print_string(k, out);
                out.push_str(": ");
                print_at(v, pretty, depth + 1, out);
            }
            line_end(pretty, depth, out);
            out.push('}');
        }
    }
}

fn between(index: usize, pretty: bool, depth: usize, out: &mut String) {
    if index > 0 {
        out.push_str(if pretty { "," } else { ", " });
    }
    line_end(pretty, depth, out);
}

fn line_end(pretty: bool, depth: usize, out: &mut String) {
    if pretty {
        out.push('\n');
        (0..depth).for_each(|_| out.push_str("    "));
    }
}

fn print_string(s: &str, out: &mut String) {
    out.push('"');
    for c in s.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            ' '..='~' => out.push(c),
            c => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    // writing to a String cannot fail
                    let _ = write!(out, "\\u{unit:04X}");
                }
            }
        }
    }
    out.push('"');
}

fn print_number(n: &Number, out: &mut String) {
    match (n.is_f64(), n.as_f64()) {
        (true, Some(f)) => out.push_str(&general(f)),
        // writing to a String cannot fail
        _ => drop(write!(out, "{n}")),
    }
}

/// C's `%.17g`.
fn general(f: f64) -> String {
    let exact = format!("{f:.16e}");
    let (mantissa, exponent) = exact.split_once('e').unwrap_or((&exact, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    let trim = |s: &str| -> String {
        if s.contains('.') { s.trim_end_matches('0').trim_end_matches('.').to_owned() } else { s.to_owned() }
    };
    if (-4..17).contains(&exponent) {
        let digits = usize::try_from(16 - exponent).unwrap_or(0);
        trim(&format!("{f:.digits$}"))
    } else {
        let sign = if exponent < 0 { '-' } else { '+' };
        format!("{}e{sign}{:02}", trim(mantissa), exponent.abs())
    }
}
