//! The stream parser against what QSD 10.0.2 answered on the wire (recorded by sending the left column to it).

use qapi::json::{MAX_DEPTH, MAX_TOKENS, Parser, parse_one};
use qapi::{Value, json, print};

/// Everything that comes out of `input`, followed by a line end; errors without their common beginning.
fn run(input: &[u8]) -> Vec<String> {
    run_in(input, usize::MAX)
}

fn run_in(input: &[u8], piece: usize) -> Vec<String> {
    let mut parser = Parser::new();
    let mut out = Vec::new();
    let mut all = input.to_vec();
    all.push(b'\n');
    for bytes in all.chunks(piece.min(all.len())) {
        parser.feed(bytes, |v| {
            out.push(match v {
                Ok(v) => print::to_line(&v),
                Err(e) => e.strip_prefix("JSON parse error, ").unwrap_or(&e).to_owned(),
            });
        });
    }
    out
}

const CASES: &[(&[u8], &[&str])] = &[
    (b"true", &["true"]),
    (b"nul", &["invalid keyword 'nul'"]),
    (b"12", &["12"]),
    (b"-", &["stray '-\n'"]),
    (b"- ", &["stray '- '"]),
    (b"01", &["stray '01'"]),
    (b"0x", &["0", "invalid keyword 'x'"]),
    (b"1.", &["stray '1.\n'"]),
    (b"1.5e", &["stray '1.5e\n'"]),
    (b"1e+x", &["stray '1e+x'"]),
    (b"\"abc", &["stray '\"abc\n'"]),
    (b"\"str\"", &["\"str\""]),
    (b"\x01", &["stray '\u{1}'"]),
    (b"\x00", &["stray ''"]),
    (b"\"a\x01b\"", &["stray '\"a\u{1}'"]),
    (b"'a\"b'", &["\"a\\\"b\""]),
    (b"'it\\'s'", &["\"it's\""]),
    (b"\"\\x\"", &["invalid escape sequence in string"]),
    (b"\"\\u12\"", &["\\u12\" is not a valid Unicode character"]),
    (b"\"\\u12G4\"", &["\\u12G4 is not a valid Unicode character"]),
    (b"\"\\ud800\\udc00\"", &["\"\\uD800\\uDC00\""]),
    (b"\"\\udc00\"", &["\\udc00 is not a valid Unicode character"]),
    (b"\"\\ud83d\"", &["\\ud83d is not a valid Unicode character"]),
    (b"\"\\ud83d\\u0041\"", &["\\ud83d is not a valid Unicode character"]),
    (b"\"\\uffff\"", &["\\uffff is not a valid Unicode character"]),
    (b"\"\\ufdd0\"", &["\\ufdd0 is not a valid Unicode character"]),
    (b"\"\\u0000\"", &["\"\\u0000\""]),
    (b"\"\xc0\x80\"", &["\"\\u0000\""]),
    (b"\"\xc0\xaf\"", &["invalid UTF-8 sequence in string"]),
    (b"\"\xed\xa0\x80\"", &["invalid UTF-8 sequence in string"]),
    (b"\"\xef\xbf\xbf\"", &["invalid UTF-8 sequence in string"]),
    (b"\"\xf0\x9f\"", &["invalid UTF-8 sequence in string"]),
    (b"\"\xf5\"", &["invalid UTF-8 sequence in string"]),
    (b"\"\xff\"", &["stray '\"\u{fffd}'"]),
    (b"{'a':\"\xff\"}", &["stray '\"\u{fffd}'", "expecting value"]),
    (b"%d x", &["stray '%'"]),
    (b"[%d]", &["stray '%'", "expecting value"]),
    (b"1a", &["1", "invalid keyword 'a'"]),
    (b"\"a\tb\"", &["stray '\"a\t'"]),
    (b"[}", &["expecting value"]),
    (b"{]", &["expecting value"]),
    (b"{\"a\":[1}", &[]),
    (b"[1,", &[]),
    (b"1,2", &["1", "expecting value", "2"]),
    (b"[1.5.5]", &["stray '.'", "expecting value"]),
    (b"[--1]", &["stray '--'", "expecting value"]),
    (b"[-]", &["stray '-]'"]),
    (b"[nan]", &["invalid keyword 'nan'"]),
    (b"{\"a\":1]", &["expected separator in dict"]),
    (b"[1}", &["expected separator in list"]),
    (b"[1 2]", &["expected separator in list"]),
    (b"{\"a\" 1}", &["missing : in object pair"]),
    (b"{\"a\"}", &["missing : in object pair"]),
    (b"{1:2}", &["key is not a string in object"]),
    (b"{\"a\":1 \"b\":2}", &["expected separator in dict"]),
    (b"{\"a\":1,}", &["expecting value"]),
    (b"{,}", &["expecting value"]),
    (b"[1,]", &["expecting value"]),
    (b"}", &["expecting value"]),
    (b"a_b", &["invalid keyword 'a'", "stray '_'"]),
    (b"{execute:1}", &["invalid keyword 'execute'"]),
    (b"{'a':1,'a':2}", &["duplicate key"]),
    (b"{'a':{'x':1,'x':2}}", &["duplicate key"]),
    // what ends the skipping after an error is wrong itself
    (b";\xff", &["stray ';'", "stray '\u{fffd}'"]),
    (b"'\xed\xa0\x80\xc3\xa4\xc0\x80\xe2\x82\xff", &["stray ''\u{fffd}\u{e4}\u{0}\u{fffd}\u{fffd}'"]),
    (b"; \x01\x02x", &["stray ';'", "stray '\u{1}'", "stray '\u{2}'"]),
    (b";\t\x7f{}", &["stray ';'", "{}"]),
    (b"{}\x00{}", &["{}", "stray ''", "{}"]),
    (b"18446744073709551615", &["18446744073709551615"]),
    (b"18446744073709551616", &["1.8446744073709552e+19"]),
    (b"-9223372036854775808", &["-9223372036854775808"]),
    (b"-9223372036854775809", &["-9.2233720368547758e+18"]),
    (
        b"[1.5e300,1e-7,0.00001,1e16,123456789012345678.0,1e17,-1.5,-0.0,0.1,1e3,1.0]",
        &["[1.5000000000000001e+300, 9.9999999999999995e-08, 1.0000000000000001e-05, 10000000000000000, \
             1.2345678901234568e+17, 1e+17, -1.5, -0, 0.10000000000000001, 1000, 1]"],
    ),
    (b"'\\\"\\\\\\/\\b\\f\\n\\r\\t\\u0001\x7f<>'", &["\"\\\"\\\\/\\b\\f\\n\\r\\t\\u0001\\u007F<>\""]),
];

#[test]
fn answers_as_recorded() {
    for (input, want) in CASES {
        assert_eq!(run(input), *want, "{}", String::from_utf8_lossy(input));
    }
}

#[test]
fn pieces_do_not_matter() {
    for (input, want) in CASES {
        for piece in [1, 2, 3] {
            assert_eq!(run_in(input, piece), *want, "{}", String::from_utf8_lossy(input));
        }
    }
}

#[test]
fn limits() {
    let deep = |n: usize| [vec![b'['; n], vec![b']'; n]].concat();
    let max = usize::try_from(MAX_DEPTH).unwrap();
    assert!(run(&deep(max))[0].starts_with("[["));
    assert_eq!(run(&deep(max + 1))[0], "JSON nesting depth limit exceeded");
    let many = [b"[".as_slice(), &b"1,".repeat(MAX_TOKENS / 2), b"1]"].concat();
    assert_eq!(run(&many)[0], "JSON token count limit exceeded");
}

#[test]
fn one_value_from_an_argument() {
    assert_eq!(parse_one("{\"a\": 1}"), Ok(json!({"a": 1})));
    assert_eq!(parse_one("{\"a\": 1").unwrap_err(), "JSON parse error, premature EOI");
    assert_eq!(parse_one("{\"a\": 1} x").unwrap_err(), "Expecting at most one JSON value");
}

#[test]
fn pretty_form() {
    let mut s = String::new();
    print::print(&json!({"id": [1, {"a": []}], "b": {}}), true, &mut s);
    let want = "{\n    \"id\": [\n        1,\n        {\n            \"a\": [\n            ]\n        }\n    ],\n    \"b\": {\n    }\n}";
    assert_eq!(s, want);
}

proptest::proptest! {
    #[test]
    fn nothing_panics(bytes: Vec<u8>) {
        run(&bytes);
    }

    #[test]
    fn what_is_printed_reads_back(s: String, n: i64, f in -1e300..1e300f64) {
        let v = json!({"s": s, "n": n, "f": [f], "t": true, "z": null});
        let noncharacter = s.chars().any(|c| u32::from(c) & 0xfffe == 0xfffe || ('\u{fdd0}'..='\u{fdef}').contains(&c));
        let mut pretty = String::new();
        print::print(&v, true, &mut pretty);
        for text in [print::to_line(&v), pretty] {
            let back = parse_one(&text);
            if noncharacter {
                assert!(back.is_err());
            } else {
                let back: Value = back.unwrap();
                assert_eq!(back["f"][0].as_f64(), Some(f));
                assert_eq!(back["s"], v["s"]);
                assert_eq!(back["n"], v["n"]);
            }
        }
    }
}
