//! `fencing` of `replication-group-add`: who grants a group to its owner, and what is told of that.

use super::replication::client_tls;
use crate::Daemon;
use crate::error::QmpError;
use crate::jobinfo::millis;
use env::Address;
use qapi::{Map, Value, json};
use replication::lease::{Endpoint, Etcd, Fencing, Lease, Login};
use serde::Deserialize;
use std::rc::Rc;
use std::time::Duration;

/// Seconds that a grant lasts where nothing else is said.
const DEFAULT_TTL: u64 = 10;
/// etcd grants nothing shorter than its own time-out for elections, rounded up.
const TTL: std::ops::RangeInclusive<u64> = 2..=3600;
/// The port of etcd's clients.
const PORT: u16 = 2379;

/// As in QMP, and as a group is recorded.
#[derive(Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct FencingArg {
    #[serde(rename = "type")]
    kind: String,
    endpoints: Option<Vec<String>>,
    key: Option<String>,
    ttl: Option<u64>,
    advisory: Option<bool>,
    tls_creds: Option<String>,
    username: Option<String>,
    password_secret: Option<String>,
}

impl FencingArg {
    /// Whether somebody's word is needed for a promotion.
    pub(crate) fn by_hand(&self) -> bool {
        self.kind == "manual"
    }

    /// The arbiter of the group `id`, if there is one.
    ///
    /// # Errors
    /// Arguments that are missing, out of range, or belong to another type; no such credentials.
    pub(crate) fn arbiter(self, daemon: &Daemon, id: &str) -> Result<Option<Fencing>, QmpError> {
        if self.kind != "etcd" {
            let given = [
                ("endpoints", self.endpoints.is_some()),
                ("key", self.key.is_some()),
                ("ttl", self.ttl.is_some()),
                ("advisory", self.advisory.is_some()),
                ("tls-creds", self.tls_creds.is_some()),
                ("username", self.username.is_some()),
                ("password-secret", self.password_secret.is_some()),
            ];
            return match given.into_iter().find(|g| g.1) {
                Some((name, _)) => {
                    Err(QmpError::generic(format!("Parameter '{name}' is for fencing of type 'etcd'")))
                }
                None => Ok(None),
            };
        }
        let Some(places) = self.endpoints.filter(|e| !e.is_empty()) else {
            return Err(QmpError::generic("Parameter 'endpoints' is missing"));
        };
        let ttl = self.ttl.unwrap_or(DEFAULT_TTL);
        if !TTL.contains(&ttl) {
            let (least, most) = TTL.into_inner();
            return Err(QmpError::generic(format!("Parameter 'ttl' expects {least} to {most} (seconds)")));
        }
        let secure = self.tls_creds.is_some();
        let endpoints = places.iter().map(|p| endpoint(p, secure)).collect::<Result<Vec<_>, _>>()?;
        let key = self.key.unwrap_or_else(|| format!("/liveblk/replication/{id}"));
        if key.is_empty() || key.ends_with('/') {
            return Err(QmpError::generic("Parameter 'key' expects a name that does not end with '/'"));
        }
        let connect = self.tls_creds.as_deref().map(|id| client_tls(daemon, id, None)).transpose()?;
        let advisory = self.advisory.unwrap_or(false);
        let named = json!({
            "type": "etcd", "endpoints": places, "key": key, "ttl": ttl, "advisory": advisory, "tls-creds": self.tls_creds,
            "username": self.username, "password-secret": self.password_secret,
        });
        let login = match (self.username, self.password_secret) {
            (Some(name), Some(id)) => {
                let password = String::from_utf8(daemon.objects().secret(&id)?.to_vec())
                    .map_err(|_| QmpError::generic(format!("Secret '{id}' is not valid UTF-8")))?;
                Some(Login { name, password })
            }
            (None, None) => None,
            (Some(_), None) => return Err(QmpError::generic("Parameter 'password-secret' is missing")),
            (None, Some(_)) => return Err(QmpError::generic("Parameter 'username' is missing")),
        };
        let etcd = Etcd::new(daemon.env(), endpoints, key, Duration::from_secs(ttl), connect, login);
        Ok(Some(Fencing { arbiter: Rc::new(etcd), advisory, named: named.to_string() }))
    }
}

/// `[http[s]://]HOST[:PORT][/]`.
fn endpoint(text: &str, secure: bool) -> Result<Endpoint, QmpError> {
    let wrong = |why: &str| Err(QmpError::generic(format!("Parameter 'endpoints': '{text}': {why}")));
    let rest = match text.split_once("://") {
        Some(("http", rest)) if !secure => rest,
        Some(("https", rest)) if secure => rest,
        Some(("http", _)) => return wrong("'tls-creds' needs https"),
        Some(("https", _)) => return wrong("https needs 'tls-creds'"),
        Some(_) => return wrong("only http and https are known"),
        None => text,
    };
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    let (host, port) = match rest.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => match port.parse() {
            Ok(port) => (host, port),
            Err(_) => return wrong("the port is no number"),
        },
        _ => (rest, PORT),
    };
    let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    if host.is_empty() || host.contains('/') {
        return wrong("expected HOST:PORT");
    }
    Ok(Endpoint { address: Address::tcp(host, port), host: host.to_owned() })
}

/// `lease` of `query-replication`.
pub(super) fn describe(lease: &Lease, out: &mut Map<String, Value>) {
    let facts = lease.facts();
    let mut shown = json!({"remaining-ms": millis(facts.remaining)});
    if let Some(holder) = facts.holder {
        shown["holder"] = json!(holder);
    }
    if let Some(e) = facts.error {
        shown["last-error"] = json!(e);
    }
    out.insert("lease".into(), shown);
    let serves = |s: &Value| matches!(s.as_str(), Some("running" | "degraded" | "failover" | "done"));
    if facts.suspended && out.get("state").is_some_and(serves) {
        out.insert("state".into(), json!("suspended"));
    }
}

#[cfg(test)]
mod tests {
    use super::{Address, endpoint};

    #[test]
    fn endpoints_are_named_in_several_ways() {
        for (text, secure, address) in [
            ("etcd1", false, "etcd1:2379"),
            ("etcd1:23", false, "etcd1:23"),
            ("http://10.0.0.1:2379/", false, "10.0.0.1:2379"),
            ("https://etcd1", true, "etcd1:2379"),
            ("http://[::1]:5", false, "::1:5"),
            ("[::1]", false, "::1:2379"),
        ] {
            let (host, port) = address.rsplit_once(':').unwrap();
            let expected = Address::tcp(host, port.parse().unwrap());
            assert_eq!(endpoint(text, secure).unwrap().address, expected, "{text}");
        }
        for (text, secure, why) in [
            ("", false, "expected HOST"),
            ("etcd1:x", false, "no number"),
            ("etcd1:70000", false, "no number"),
            ("ftp://etcd1", false, "only http"),
            ("https://etcd1", false, "needs 'tls-creds'"),
            ("http://etcd1", true, "needs https"),
            ("http://etcd1/v3", false, "expected HOST"),
        ] {
            let e = endpoint(text, secure).unwrap_err().desc;
            assert!(e.contains(why), "{text}: {e}");
        }
    }
}
