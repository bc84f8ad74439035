//! etcd as the arbiter: the JSON gateway of its API, version 3 (etcd 3.4 and later), over HTTP.
//!
//! `KEY/owner` is kept by a lease of etcd, `KEY/state` is not. Every change is a transaction that compares revisions. What can happen: an
//! endpoint is gone, hangs, answers nonsense, or loses its quorum: the next one is asked; each question has a time-out. One request is one
//! connection, as HTTP/1.0 has it: it ends with the answer, whose length is bounded. Where etcd knows users, a question carries the token that
//! a name and a password were changed for; one that is not valid any more is changed for another, once for a question.

use super::RENEWALS;
use super::arbiter::{Arbiter, Grant, Owner, Seen, State};
use crate::session::Connect;
use crate::types::{Epoch, Generation};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use block::{BlockError, Data, ErrorKind, Io, Result};
use env::{Address, Env};
use serde_json::{Value, json};
use std::cell::{Cell, RefCell};
use std::time::Duration;

/// Bytes of an answer at most: those asked for here have some hundred.
const MAX_ANSWER: usize = 1 << 20;
const RECV: usize = 64 << 10;

/// Where an etcd answers.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Its place.
    pub address: Address,
    /// Its host: for the certificate and the request.
    pub host: String,
}

/// Who asks, where etcd knows users.
#[derive(Clone)]
pub struct Login {
    /// The user's name.
    pub name: String,
    /// The user's password.
    pub password: String,
}

/// See above.
pub struct Etcd {
    env: Env,
    /// Asked in turn.
    endpoints: Vec<Endpoint>,
    /// The entries are below it.
    key: String,
    ttl: Duration,
    /// TLS to the endpoints.
    connect: Option<Connect>,
    login: Option<Login>,
    /// What the login was changed for.
    token: RefCell<Option<String>>,
    /// How long one question to one endpoint may take.
    limit: Duration,
    /// The endpoint that answered last.
    last: Cell<usize>,
}

fn wrong(why: impl std::fmt::Display) -> BlockError {
    BlockError::new(ErrorKind::Io, format!("etcd: {why}"))
}

fn encoded(text: &str) -> String {
    STANDARD.encode(text)
}

/// A number as the gateway gives it: 64 bits are text in JSON; nothing is 0.
fn number(v: &Value) -> Result<i64> {
    match v {
        Value::Null => Ok(0),
        Value::String(text) => text.parse().map_err(|_| wrong(format!("'{text}' is no number"))),
        other => other.as_i64().ok_or_else(|| wrong(format!("{other} is no number"))),
    }
}

fn revision(v: &Value) -> Result<u64> {
    u64::try_from(number(v)?).map_err(|_| wrong("a negative revision"))
}

fn text(v: &Value) -> Result<String> {
    let bytes =
        STANDARD.decode(v.as_str().unwrap_or_default()).map_err(|e| wrong(format!("a value: {e}")))?;
    String::from_utf8(bytes).map_err(|e| wrong(format!("a value: {e}")))
}

impl Etcd {
    /// With its entries below `key`, and grants of `ttl`: whole seconds, as etcd has them. `endpoints` has at least one; with `connect` they speak TLS,
    /// with `login` they want to know who asks.
    pub fn new(
        env: &Env,
        endpoints: Vec<Endpoint>,
        key: String,
        ttl: Duration,
        connect: Option<Connect>,
        login: Option<Login>,
    ) -> Etcd {
        // all are asked within the time in which a grant is renewed
        let limit = ttl / RENEWALS / u32::try_from(endpoints.len()).unwrap_or(u32::MAX).max(1);
        let (token, last) = (RefCell::default(), Cell::new(0));
        Etcd { env: env.clone(), endpoints, key, ttl, connect, login, token, limit, last }
    }

    fn owner_key(&self) -> String {
        format!("{}/owner", self.key)
    }
    fn state_key(&self) -> String {
        format!("{}/state", self.key)
    }

    /// Asks one endpoint after the other until one answers.
    async fn call(&self, path: &str, body: &Value) -> Result<Value> {
        let body = body.to_string();
        let (first, count) = (self.last.get(), self.endpoints.len());
        let mut failed = wrong("no endpoint");
        for i in 0..count {
            let which = (first + i) % count;
            let Some(endpoint) = self.endpoints.get(which) else { continue };
            let asked = self.env.timeout(self.limit, self.ask_as_user(endpoint, path, &body)).await;
            let late = || Err(wrong("no answer in time"));
            match asked.unwrap_or_else(late) {
                Ok(answer) => {
                    self.last.set(which);
                    return Ok(answer);
                }
                Err(e) => failed = e.context(&endpoint.address),
            }
        }
        Err(failed)
    }

    /// As whoever the login says.
    async fn ask_as_user(&self, to: &Endpoint, path: &str, body: &str) -> Result<Value> {
        let Some(login) = &self.login else { return self.ask(to, path, body, None).await };
        let known = self.token.borrow().clone();
        if let Some(token) = known {
            match self.ask(to, path, body, Some(&token)).await {
                Err(e) if is_of_token(e.message()) => drop(self.token.take()),
                done => return done,
            }
        }
        let who = json!({"name": login.name, "password": login.password}).to_string();
        let answer = self.ask(to, "auth/authenticate", &who, None).await?;
        let token = answer["token"].as_str().unwrap_or_default();
        if token.is_empty() || !token.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(wrong("a token that is none"));
        }
        *self.token.borrow_mut() = Some(token.to_owned());
        self.ask(to, path, body, Some(token)).await
    }

    async fn ask(&self, to: &Endpoint, path: &str, body: &str, token: Option<&str>) -> Result<Value> {
        let mut stream = self.env.connect(&to.address).await?;
        if let Some(connect) = &self.connect {
            stream = connect(stream, Some(to.host.clone())).await?;
        }
        let token = token.map_or_else(String::new, |t| format!("Authorization: {t}\r\n"));
        let request = format!(
            "POST /v3/{path} HTTP/1.0\r\nHost: {}\r\n{token}Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            to.host,
            body.len()
        );
        stream.send(Data::from(request.into_bytes())).await?;
        let mut answer = Vec::new();
        loop {
            let got = stream.recv(RECV).await?;
            if got.is_empty() {
                break;
            }
            answer.extend_from_slice(&got);
            if answer.len() > MAX_ANSWER {
                return Err(wrong("an answer that is too long"));
            }
        }
        read(&answer)
    }

    /// A transaction; whether its comparisons held, and its revision.
    async fn transact(&self, compare: Vec<Value>, then: Vec<Value>) -> Result<(bool, u64)> {
        let answer = self.call("kv/txn", &json!({"compare": compare, "success": then})).await?;
        let done = answer["succeeded"].as_bool().unwrap_or(false);
        Ok((done, revision(&answer["header"]["revision"])?))
    }

    /// That an entry is as it was; revision 0: that there is none.
    fn unchanged(key: &str, at: u64) -> Value {
        json!({"key": encoded(key), "target": "MOD", "result": "EQUAL", "mod_revision": at.to_string()})
    }

    /// How long a lease lasts if it is not renewed.
    async fn left(&self, lease: i64) -> Result<Duration> {
        let answer = self.call("lease/timetolive", &json!({"ID": lease.to_string()})).await?;
        // whole seconds, rounded down
        Ok(Duration::from_secs(u64::try_from(number(&answer["TTL"])?.saturating_add(1)).unwrap_or(0)))
    }

    async fn seen(&self) -> Result<Seen> {
        let (from, end) = (encoded(&format!("{}/", self.key)), encoded(&format!("{}0", self.key)));
        let answer = self.call("kv/range", &json!({"key": from, "range_end": end})).await?;
        let mut seen = Seen::default();
        for entry in answer["kvs"].as_array().into_iter().flatten() {
            let (key, value, at) =
                (text(&entry["key"])?, text(&entry["value"])?, revision(&entry["mod_revision"])?);
            if key == self.owner_key() {
                let left = self.left(number(&entry["lease"])?).await?;
                seen.owner = Some(Owner { holder: value, revision: at, left });
            } else if key == self.state_key() {
                let state: Value = serde_json::from_str(&value).map_err(|e| wrong(format!("{key}: {e}")))?;
                let known = |name: &str| {
                    state[name].as_u64().ok_or_else(|| wrong(format!("{key} has no number '{name}'")))
                };
                let state =
                    State { generation: Generation(known("generation")?), needs: Epoch(known("needs")?) };
                seen.state = Some((state, at));
            }
        }
        Ok(seen)
    }

    async fn granted(&self, holder: &str, seen: &Seen) -> Result<Option<Grant>> {
        let grant =
            self.call("lease/grant", &json!({"TTL": self.ttl.as_secs().to_string(), "ID": "0"})).await?;
        let lease = number(&grant["ID"])?;
        if lease == 0 {
            return Err(wrong(format!("no lease was granted: {grant}")));
        }
        let (owner, state) = (self.owner_key(), self.state_key());
        let compare = vec![
            Etcd::unchanged(&owner, seen.owner.as_ref().map_or(0, |o| o.revision)),
            Etcd::unchanged(&state, seen.state.map_or(0, |s| s.1)),
        ];
        let put = json!({"requestPut": {"key": encoded(&owner), "value": encoded(holder), "lease": lease.to_string()}});
        let (done, revision) = self.transact(compare, vec![put]).await?;
        Ok(done.then_some(Grant { lease, revision }))
    }

    async fn renewed(&self, grant: &Grant) -> Result<bool> {
        let answer = self.call("lease/keepalive", &json!({"ID": grant.lease.to_string()})).await?;
        if number(&answer["result"]["TTL"])? <= 0 {
            return Ok(false);
        }
        Ok(self.transact(vec![Etcd::unchanged(&self.owner_key(), grant.revision)], Vec::new()).await?.0)
    }
}

/// Whether etcd refused because of the token: it forgets one after some minutes, with a restart, and when users or roles change.
fn is_of_token(why: &str) -> bool {
    ["invalid auth token", "revision of auth store is old"].iter().any(|w| why.contains(w))
}

/// The body of an answer.
fn read(answer: &[u8]) -> Result<Value> {
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut response = httparse::Response::new(&mut headers);
    let head = match response.parse(answer) {
        Ok(httparse::Status::Complete(n)) => n,
        Ok(httparse::Status::Partial) => return Err(wrong("the answer ends in its head")),
        Err(e) => return Err(wrong(format!("no answer of HTTP: {e}"))),
    };
    let body = answer.get(head..).unwrap_or_default();
    let code = response.code.unwrap_or(0);
    let value: Value = serde_json::from_slice(body)
        .map_err(|e| wrong(format!("status {code} with a body that is no JSON: {e}")))?;
    if code != 200 {
        let why = value["message"].as_str().or(value["error"].as_str()).unwrap_or("no reason");
        return Err(wrong(format!("status {code}: {why}")));
    }
    if let Some(e) = value.get("error") {
        return Err(wrong(e));
    }
    Ok(value)
}

impl Arbiter for Etcd {
    fn look(&self) -> Io<'_, Seen> {
        Box::pin(self.seen())
    }
    fn take<'a>(&'a self, holder: &'a str, seen: &'a Seen) -> Io<'a, Option<Grant>> {
        Box::pin(self.granted(holder, seen))
    }
    fn renew<'a>(&'a self, grant: &'a Grant) -> Io<'a, bool> {
        Box::pin(self.renewed(grant))
    }
    fn record<'a>(&'a self, grant: &'a Grant, state: State) -> Io<'a, bool> {
        Box::pin(async move {
            let value = json!({"generation": state.generation.0, "needs": state.needs.0}).to_string();
            let put = json!({"requestPut": {"key": encoded(&self.state_key()), "value": encoded(&value)}});
            let mine = Etcd::unchanged(&self.owner_key(), grant.revision);
            Ok(self.transact(vec![mine], vec![put]).await?.0)
        })
    }
    fn release<'a>(&'a self, grant: &'a Grant, forget: bool) -> Io<'a> {
        Box::pin(async move {
            if forget {
                let gone = json!({"requestDeleteRange": {"key": encoded(&self.state_key())}});
                self.transact(vec![Etcd::unchanged(&self.owner_key(), grant.revision)], vec![gone]).await?;
            }
            self.call("lease/revoke", &json!({"ID": grant.lease.to_string()})).await.map(drop)
        })
    }
    fn ttl(&self) -> Duration {
        self.ttl
    }
    fn name(&self) -> String {
        let at: Vec<String> = self.endpoints.iter().map(|e| e.address.to_string()).collect();
        format!("etcd ({}), key {}", at.join(", "), self.key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_read_or_refused_with_a_reason() {
        let good = b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n{\"succeeded\":true}";
        assert_eq!(read(good).unwrap()["succeeded"], true);
        for (bytes, why) in [
            (
                &b"HTTP/1.0 503 Service Unavailable\r\n\r\n{\"error\":\"no leader\",\"code\":14}"[..],
                "no leader",
            ),
            (b"HTTP/1.0 200 OK\r\n\r\n{\"error\":{\"message\":\"x\"}}", "message"),
            (b"HTTP/1.0 200 OK\r\n\r\nhello", "no JSON"),
            (b"HTTP/1.0 200 OK\r\nContent-", "ends in its head"),
            (b"SSH-2.0-OpenSSH\r\n", "no answer of HTTP"),
            (b"", "ends in its head"),
        ] {
            let e = read(bytes).unwrap_err().to_string();
            assert!(e.contains(why), "{e}");
        }
    }

    #[test]
    fn numbers_are_text_or_numbers_or_nothing() {
        assert_eq!(number(&json!("12")).unwrap(), 12);
        assert_eq!(number(&json!(12)).unwrap(), 12);
        assert_eq!(number(&Value::Null).unwrap(), 0);
        assert!(number(&json!("x")).is_err() && number(&json!([])).is_err());
        assert!(revision(&json!("-1")).is_err());
    }
}
