//! Replicated disks as nodes: driver `blkcolo` and the address form `blkcolo:host:port:/path`.
//!
//! The disk is opened here; what makes a replication group of it is a hook, since groups are another crate's. What must stay true:
//! opening is all or nothing, as for other nodes; an address is read as one thing or refused, with what is wrong with it.

use crate::{Child, Inherited, NodeSpec, Opener, Trail};
use block::{BlockError, ErrorKind, Result};
use graph::{DetectZeroes, NodeCell};
use qapi::{Map, Value};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;

/// What an address begins with.
pub(crate) const PREFIX: &str = "blkcolo:";

/// `blkcolo`.
#[derive(Clone, Debug)]
pub struct BlkcoloSpec {
    /// The disk.
    pub file: Child,
    /// All else that was said of the replication, as it was written.
    pub options: Rc<Map<String, Value>>,
}

/// Replicates a disk, shown by a new node of that name, as the options say. On an error nothing is left behind.
pub type BlkcoloHook = Rc<dyn Fn(Rc<NodeCell>, String, Rc<Map<String, Value>>) -> Replicating>;

/// The node that shows the disk, once it is replicated.
pub type Replicating = Pin<Box<dyn Future<Output = Result<Rc<NodeCell>>>>>;

/// Where a replicated disk is, and where its sides meet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BlkcoloAddress {
    /// Host name or address, an IPv6 address without brackets.
    pub host: String,
    /// Port.
    pub port: u16,
    /// The image.
    pub path: String,
}

impl BlkcoloAddress {
    /// Reads `blkcolo:host:port:/path`.
    ///
    /// # Errors
    /// It is none, with what is wrong.
    pub fn parse(name: &str) -> Result<BlkcoloAddress> {
        let wrong =
            |what: &str| BlockError::invalid(format!("'{name}' is no blkcolo:HOST:PORT:/PATH: {what}"));
        let rest = name.strip_prefix(PREFIX).ok_or_else(|| wrong("it does not begin with blkcolo:"))?;
        let (host, rest) = if let Some(inside) = rest.strip_prefix('[') {
            let (host, rest) = inside.split_once(']').ok_or_else(|| wrong("a bracket is not closed"))?;
            if host.parse::<core::net::Ipv6Addr>().is_err() {
                return Err(wrong("there is no IPv6 address between the brackets"));
            }
            (host, rest.strip_prefix(':').ok_or_else(|| wrong("the port is missing"))?)
        } else {
            rest.split_once(':').ok_or_else(|| wrong("the port is missing"))?
        };
        if host.is_empty() {
            return Err(wrong("the host is missing (an IPv6 address goes in brackets)"));
        }
        if host.contains('/') {
            return Err(wrong("the host and the port come before the path"));
        }
        let (port, path) = rest.split_once(':').ok_or_else(|| wrong("the path is missing"))?;
        let port = read_port(port)
            .ok_or_else(|| wrong(&format!("'{port}' is no port (an IPv6 address goes in brackets)")))?;
        if !path.starts_with('/') {
            return Err(wrong("the path does not begin with /"));
        }
        Ok(BlkcoloAddress { host: host.to_owned(), port, path: path.to_owned() })
    }

    /// The disk at `path`, replicated as its address says and nothing else: each side finds out what it is.
    pub fn node(&self) -> NodeSpec {
        let said = [("host", self.host.clone()), ("port", self.port.to_string())];
        let options = said.into_iter().map(|(key, v)| (key.to_owned(), Value::String(v))).collect();
        let file = Child::Inline(Box::new(NodeSpec::file(&self.path)));
        let spec = BlkcoloSpec { file, options: Rc::new(options) };
        NodeSpec { common: Default::default(), driver: crate::DriverSpec::Blkcolo(spec) }
    }
}

/// A port at which somebody can be found.
pub fn read_port(text: &str) -> Option<u16> {
    let digits = text.bytes().all(|b| b.is_ascii_digit());
    text.parse().ok().filter(|port| digits && *port > 0)
}

/// The protocol node for `name`, which the user gave to a command: whatever an image may name, and `blkcolo:` as well.
///
/// # Errors
/// As [`crate::ImplicitOpenGate::protocol`]; a bad address.
pub fn named(name: &str) -> Result<NodeSpec> {
    use crate::ImplicitOpenGate;
    match name.starts_with(PREFIX) {
        true => Ok(BlkcoloAddress::parse(name)?.node()),
        false => crate::DefaultGate.protocol("", name),
    }
}

impl Opener {
    /// `hook` replicates disks that are opened from now on.
    pub fn replicate_with(&self, hook: BlkcoloHook) {
        *self.blkcolo.borrow_mut() = Some(hook);
    }

    /// Opens the disk and has it replicated.
    pub(crate) async fn blkcolo(
        &self,
        spec: &NodeSpec,
        blkcolo: &BlkcoloSpec,
        from: Inherited,
        trail: &Trail,
    ) -> Result<Rc<NodeCell>> {
        let c = &spec.common;
        if c.detect_zeroes != DetectZeroes::Off || c.force_share || c.active == Some(false) {
            return Err(BlockError::unsupported(
                "'detect-zeroes', 'force-share' and 'active' are not supported by driver 'blkcolo': give them to its 'file'",
            ));
        }
        let hook = self.blkcolo.borrow().clone();
        let hook = hook.ok_or_else(|| BlockError::unsupported("Nothing replicates disks here"))?;
        let now = from.with(c);
        let disk = self.child(&blkcolo.file, now.to_file(), trail).await?;
        let name = c.node_name.clone().unwrap_or_else(|| self.graph.invent_name());
        let shown = if now.read_only || !disk.is_writable() {
            let why = format!("Node '{}' is read-only: it cannot be replicated", disk.name());
            Err(BlockError::new(ErrorKind::ReadOnly, why))
        } else {
            hook(disk.clone(), name, blkcolo.options.clone()).await
        };
        match shown {
            Ok(shown) => {
                shown.set_monitor_owned(from.monitor_owned);
                Ok(shown)
            }
            Err(e) => {
                if !disk.is_monitor_owned() && disk.parents().is_empty() {
                    // The first error is the one that matters.
                    let _ = self.graph.remove(&disk).await;
                }
                Err(e)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read_as_one_thing() {
        let read = |name: &str| {
            let a = BlkcoloAddress::parse(name).expect("a good address");
            (a.host, a.port, a.path)
        };
        assert_eq!(read("blkcolo:b:7000:/d/x.raw"), ("b".into(), 7000, "/d/x.raw".into()));
        assert_eq!(read("blkcolo:[fe80::1]:7000:/x"), ("fe80::1".into(), 7000, "/x".into()));
        assert_eq!(read("blkcolo:10.0.0.1:1:/odd:name"), ("10.0.0.1".into(), 1, "/odd:name".into()));
    }

    #[test]
    fn what_is_wrong_with_an_address_is_told() {
        for (name, want) in [
            ("nbd:b:7000:/x", "does not begin with blkcolo:"),
            ("blkcolo:", "the port is missing"),
            ("blkcolo:b", "the port is missing"),
            ("blkcolo::7000:/x", "the host is missing"),
            ("blkcolo:/x:7000:/x", "come before the path"),
            ("blkcolo:b:7000", "the path is missing"),
            ("blkcolo:b::/x", "'' is no port"),
            ("blkcolo:b:0:/x", "'0' is no port"),
            ("blkcolo:b:+7:/x", "'+7' is no port"),
            ("blkcolo:b:70000:/x", "'70000' is no port"),
            ("blkcolo:fe80::1:7000:/x", "IPv6 address goes in brackets"),
            ("blkcolo:[fe80::1:7000:/x", "a bracket is not closed"),
            ("blkcolo:[b]:7000:/x", "no IPv6 address between the brackets"),
            ("blkcolo:[::1]7000:/x", "the port is missing"),
            ("blkcolo:b:7000:x", "the path does not begin with /"),
            ("blkcolo:b:7000:", "the path does not begin with /"),
        ] {
            let e = BlkcoloAddress::parse(name).expect_err(name);
            assert!(e.message().contains(want) && e.message().contains(name), "{e}");
        }
    }
}
