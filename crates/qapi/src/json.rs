//! JSON as it arrives on a control connection: a stream of values, in pieces of any size.
//!
//! What can happen: a value comes in many pieces, many values come in one piece, and input is broken in every way. What
//! must stay true: after an error the stream goes on at the next structural character or line end; memory is bounded by
//! [`MAX_MESSAGE`], [`MAX_TOKENS`] and [`MAX_DEPTH`]; integers of 64 bits stay exact. The grammar is RFC 8259, plus
//! strings in single quotes, as QMP clients send them. Error texts are those of QSD (observed on the wire).

use serde_json::{Map, Number, Value};

/// Bytes of token text in one message: the limit of QSD; a longer message is refused, not stored.
pub const MAX_MESSAGE: usize = 64 << 20;
/// Tokens in one message: the limit of QSD.
pub const MAX_TOKENS: usize = 2 << 20;
/// Bytes of a broken token that an error message shows.
const MAX_SHOWN: usize = 1024;
/// Nested objects and arrays: the limit of QSD, and what bounds the recursion of the parser.
pub const MAX_DEPTH: i64 = 1024;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    /// One of `{}[],:`.
    Mark(u8),
    /// A whole number.
    Integer,
    /// A number with a fraction or an exponent.
    Float,
    /// Lower-case letters.
    Keyword,
    /// A string with its quotes.
    Text,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Start,
    /// After an error: skip to something that looks like a border.
    Recovery,
    Text(u8),
    TextEscape(u8),
    Keyword,
    Minus,
    Zero,
    Digits,
    Point,
    Fraction,
    Exp,
    ExpSign,
    ExpDigits,
}

#[derive(Clone, Copy, Debug)]
struct Token {
    kind: Kind,
    start: usize,
    len: usize,
}

/// A streaming parser.
#[derive(Debug)]
pub struct Parser {
    state: State,
    /// Text of all tokens of the message, the unfinished one last.
    text: Vec<u8>,
    /// Where the unfinished token begins in `text`.
    begun: usize,
    tokens: Vec<Token>,
    braces: i64,
    brackets: i64,
}

impl Default for Parser {
    fn default() -> Parser {
        Parser::new()
    }
}

impl Parser {
    /// At the start of a stream.
    pub fn new() -> Parser {
        Parser { state: State::Start, text: Vec::new(), begun: 0, tokens: Vec::new(), braces: 0, brackets: 0 }
    }

    /// Takes the next bytes; `out` gets each finished value or error (a sentence).
    pub fn feed(&mut self, bytes: &[u8], mut out: impl FnMut(Result<Value, String>)) {
        for &b in bytes {
            self.byte(b, &mut out);
        }
    }

    /// The stream has ended: an unfinished number or keyword is finished, anything else unfinished is an error.
    pub fn finish(&mut self, mut out: impl FnMut(Result<Value, String>)) {
        match self.state {
            State::Text(_) | State::TextEscape(_) => self.stray(&mut out),
            _ => self.byte(b' ', &mut out),
        }
        if !self.tokens.is_empty() {
            // it lacks its end, and something else may be wrong before that
            let value = Tokens { text: &self.text, tokens: &self.tokens, at: 0 }.value();
            self.reset();
            out(value.map_err(|e| format!("JSON parse error, {e}")));
        }
    }

    fn byte(&mut self, b: u8, out: &mut impl FnMut(Result<Value, String>)) {
        use State::*;
        let next = match (self.state, b) {
            // a border is looked at like any other byte
            (Recovery, b'{' | b'}' | b'[' | b']' | b',' | b':' | 0xfe | 0xff | 0..=8 | 10..0x20) => {
                self.state = Start;
                return self.byte(b, out);
            }
            (Recovery, _) => return,
            (Start, b' ' | b'\t' | b'\r' | b'\n') => return,
            (Start, b'{' | b'}' | b'[' | b']' | b',' | b':') => {
                self.text.push(b);
                return self.token(Kind::Mark(b), out);
            }
            (Start, b'"' | b'\'') => Some(Text(b)),
            (Start, b'-') => Some(Minus),
            (Start | Minus, b'0') => Some(Zero),
            (Start | Minus, b'1'..=b'9') | (Digits, b'0'..=b'9') => Some(Digits),
            (Start | Keyword, b'a'..=b'z') => Some(Keyword),
            (Text(q), b) if q == b => {
                self.text.push(b);
                return self.token(Kind::Text, out);
            }
            (Text(q), b'\\') => Some(TextEscape(q)),
            (Text(q) | TextEscape(q), 0x20..=0xfd) => Some(Text(q)),
            (Zero | Digits, b'.') => Some(Point),
            (Point | Fraction, b'0'..=b'9') => Some(Fraction),
            (Zero | Digits | Fraction, b'e' | b'E') => Some(Exp),
            (Exp, b'+' | b'-') => Some(ExpSign),
            (Exp | ExpSign | ExpDigits, b'0'..=b'9') => Some(ExpDigits),
            (Zero, b'0'..=b'9') => None,
            (Keyword | Zero | Digits | Fraction | ExpDigits, _) => {
                self.token(self.ended_by_next(), out);
                return self.byte(b, out);
            }
            _ => None,
        };
        match next {
            Some(state) if self.text.len() < MAX_MESSAGE => {
                self.text.push(b);
                self.state = state;
            }
            Some(_) => self.give_up("JSON token size limit exceeded", out),
            None => {
                self.text.push(b);
                self.stray(out);
            }
        }
    }

    /// The unfinished token is none.
    fn stray(&mut self, out: &mut impl FnMut(Result<Value, String>)) {
        let stray = &self.text[self.begun..];
        let end = stray.iter().position(|b| *b == 0).unwrap_or(stray.len());
        let stray = lossy(&stray[..end.min(MAX_SHOWN)]);
        self.give_up(&format!("JSON parse error, stray '{stray}'"), out);
    }

    /// The kind of a token that ends where another begins.
    fn ended_by_next(&self) -> Kind {
        match self.state {
            State::Keyword => Kind::Keyword,
            State::Fraction | State::ExpDigits => Kind::Float,
            _ => Kind::Integer,
        }
    }

    fn reset(&mut self) {
        self.text = Vec::new();
        self.tokens = Vec::new();
        (self.begun, self.braces, self.brackets) = (0, 0, 0);
    }

    fn give_up(&mut self, message: &str, out: &mut impl FnMut(Result<Value, String>)) {
        self.reset();
        self.state = State::Recovery;
        out(Err(message.to_owned()));
    }

    fn token(&mut self, kind: Kind, out: &mut impl FnMut(Result<Value, String>)) {
        self.state = State::Start;
        match kind {
            Kind::Mark(b'{') => self.braces += 1,
            Kind::Mark(b'}') => self.braces -= 1,
            Kind::Mark(b'[') => self.brackets += 1,
            Kind::Mark(b']') => self.brackets -= 1,
            _ => {}
        }
        if self.tokens.len() >= MAX_TOKENS {
            return self.give_up("JSON token count limit exceeded", out);
        }
        if self.braces + self.brackets > MAX_DEPTH {
            return self.give_up("JSON nesting depth limit exceeded", out);
        }
        self.tokens.push(Token { kind, start: self.begun, len: self.text.len() - self.begun });
        self.begun = self.text.len();
        if (self.braces > 0 || self.brackets > 0) && self.braces >= 0 && self.brackets >= 0 {
            return;
        }
        let value = Tokens { text: &self.text, tokens: &self.tokens, at: 0 }.value();
        self.reset();
        out(value.map_err(|e| format!("JSON parse error, {e}")));
    }
}

/// Exactly one JSON value from a whole text (a command-line argument).
pub fn parse_one(text: &str) -> Result<Value, String> {
    let mut parser = Parser::new();
    let mut found: Option<Result<Value, String>> = None;
    let mut several = false;
    let mut take = |v: Result<Value, String>| match &found {
        None => found = Some(v),
        Some(Ok(_)) => several = true,
        Some(Err(_)) => {}
    };
    parser.feed(text.as_bytes(), &mut take);
    parser.finish(&mut take);
    match found {
        Some(Ok(_)) if several => Err("Expecting at most one JSON value".to_owned()),
        Some(found) => found,
        None => Err("Expecting a JSON value".to_owned()),
    }
}

struct Tokens<'a> {
    text: &'a [u8],
    tokens: &'a [Token],
    at: usize,
}

impl<'a> Tokens<'a> {
    fn peek(&self) -> Result<Token, String> {
        self.tokens.get(self.at).copied().ok_or_else(|| "premature EOI".to_owned())
    }

    fn next(&mut self) -> Result<Token, String> {
        let t = self.peek()?;
        self.at += 1;
        Ok(t)
    }

    fn bytes(&self, t: Token) -> &'a [u8] {
        &self.text[t.start..t.start + t.len]
    }

    fn value(&mut self) -> Result<Value, String> {
        let t = self.next()?;
        let bytes = self.bytes(t);
        match t.kind {
            Kind::Mark(b'{') => self.object(),
            Kind::Mark(b'[') => self.array(),
            Kind::Mark(_) => Err("expecting value".to_owned()),
            Kind::Integer | Kind::Float => number(&String::from_utf8_lossy(bytes), t.kind),
            Kind::Text => text(bytes).map(Value::String),
            Kind::Keyword => match bytes {
                b"true" => Ok(Value::Bool(true)),
                b"false" => Ok(Value::Bool(false)),
                b"null" => Ok(Value::Null),
                other => Err(format!("invalid keyword '{}'", lossy(other))),
            },
        }
    }

    fn object(&mut self) -> Result<Value, String> {
        let mut map = Map::new();
        if self.peek()?.kind == Kind::Mark(b'}') {
            self.at += 1;
            return Ok(Value::Object(map));
        }
        loop {
            let Value::String(key) = self.value()? else {
                return Err("key is not a string in object".to_owned());
            };
            if self.next()?.kind != Kind::Mark(b':') {
                return Err("missing : in object pair".to_owned());
            }
            let value = self.value()?;
            if map.insert(key, value).is_some() {
                return Err("duplicate key".to_owned());
            }
            match self.next()?.kind {
                Kind::Mark(b'}') => return Ok(Value::Object(map)),
                Kind::Mark(b',') => {}
                _ => return Err("expected separator in dict".to_owned()),
            }
        }
    }

    fn array(&mut self) -> Result<Value, String> {
        let mut list = Vec::new();
        if self.peek()?.kind == Kind::Mark(b']') {
            self.at += 1;
            return Ok(Value::Array(list));
        }
        loop {
            list.push(self.value()?);
            match self.next()?.kind {
                Kind::Mark(b']') => return Ok(Value::Array(list)),
                Kind::Mark(b',') => {}
                _ => return Err("expected separator in list".to_owned()),
            }
        }
    }
}

/// Integers stay integers as far as 64 bits reach, with or without sign; larger ones become floating point.
fn number(text: &str, kind: Kind) -> Result<Value, String> {
    if kind == Kind::Integer {
        if let Ok(n) = text.parse::<i64>() {
            return Ok(n.into());
        }
        if let Ok(n) = text.parse::<u64>() {
            return Ok(n.into());
        }
    }
    text.parse::<f64>()
        .ok()
        .and_then(Number::from_f64)
        .map(Value::Number)
        .ok_or_else(|| format!("number '{text}' is out of range"))
}

/// A string token (with its quotes) decoded.
fn text(token: &[u8]) -> Result<String, String> {
    let mut out = String::with_capacity(token.len());
    // the last byte is the quote; the lexer let no other unescaped one in
    let body = &token[1..token.len() - 1];
    let mut at = 0;
    while at < body.len() {
        if body[at] == b'\\' {
            at += escape(&token[1..], at, &mut out)?;
            continue;
        }
        let run = body[at..].iter().position(|b| *b == b'\\').map_or(body.len(), |n| at + n);
        push_utf8(&body[at..run], &mut out)?;
        at = run;
    }
    Ok(out)
}

/// One escape at `rest[at]`; `rest` goes to the end of the token, closing quote included. How many bytes it took.
fn escape(rest: &[u8], at: usize, out: &mut String) -> Result<usize, String> {
    let plain = match rest[at + 1] {
        c @ (b'"' | b'\'' | b'\\' | b'/') => c,
        b'b' => 8,
        b'f' => 12,
        b'n' => b'\n',
        b'r' => b'\r',
        b't' => b'\t',
        b'u' => return unicode(rest, at, out),
        _ => return Err("invalid escape sequence in string".to_owned()),
    };
    out.push(char::from(plain));
    Ok(2)
}

fn unicode(rest: &[u8], at: usize, out: &mut String) -> Result<usize, String> {
    let digits = |at: usize| -> Option<u32> {
        let four = rest.get(at..at + 4)?;
        four.iter().try_fold(0, |n, b| Some(n * 16 + char::from(*b).to_digit(16)?))
    };
    let bad = || {
        let shown = &rest[at + 2..rest.len().min(at + 6)];
        Err(format!("\\u{} is not a valid Unicode character", lossy(shown)))
    };
    let Some(mut code) = digits(at + 2) else { return bad() };
    let mut used = 6;
    if (0xd800..0xdc00).contains(&code) && rest.get(at + 6..at + 8) == Some(b"\\u") {
        match digits(at + 8) {
            Some(low) if (0xdc00..0xe000).contains(&low) => {
                code = 0x10000 + ((code & 0x3ff) << 10) + (low & 0x3ff);
                used = 12;
            }
            _ => return bad(),
        }
    }
    match char::from_u32(code) {
        Some(c) if !is_noncharacter(c) => {
            out.push(c);
            Ok(used)
        }
        _ => bad(),
    }
}

fn is_noncharacter(c: char) -> bool {
    let n = u32::from(c);
    n & 0xfffe == 0xfffe || (0xfdd0..=0xfdef).contains(&n)
}

/// Appends raw bytes: UTF-8 without non-characters; `C0 80` stands for NUL, as QSD has it.
fn push_utf8(bytes: &[u8], out: &mut String) -> Result<(), String> {
    let bad = || "invalid UTF-8 sequence in string".to_owned();
    let mut rest = bytes;
    loop {
        match std::str::from_utf8(rest) {
            Ok(s) => return push_checked(s, out).ok_or_else(bad),
            Err(e) => {
                let (good, broken) = rest.split_at(e.valid_up_to());
                let good = std::str::from_utf8(good).map_err(|_| bad())?;
                push_checked(good, out).ok_or_else(bad)?;
                rest = broken.strip_prefix(&[0xc0, 0x80]).ok_or_else(bad)?;
                out.push('\0');
            }
        }
    }
}

fn push_checked(s: &str, out: &mut String) -> Option<()> {
    if s.chars().any(is_noncharacter) {
        return None;
    }
    out.push_str(s);
    Some(())
}

/// Bytes for a message: what is no character is shown as U+FFFD, a sequence that is long enough for one but means none (a
/// surrogate, something longer than needed) as one of them.
fn lossy(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    let mut rest = bytes;
    while let [first, after @ ..] = rest {
        let wanted = match first {
            0xc0..=0xdf => 1,
            0xe0..=0xef => 2,
            0xf0..=0xf7 => 3,
            0xf8..=0xfb => 4,
            0xfc..=0xfd => 5,
            _ => 0,
        };
        let there = after.iter().take(wanted).take_while(|b| matches!(b, 0x80..=0xbf)).count();
        let (sequence, left) = rest.split_at(1 + there);
        let mut one = String::new();
        match push_utf8(sequence, &mut one) {
            Ok(()) => out.push_str(&one),
            Err(_) => out.push(char::REPLACEMENT_CHARACTER),
        }
        rest = left;
    }
    out
}
