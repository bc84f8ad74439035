//! From `BlockdevOptions` (JSON that fits the schema) to what the crate `open` opens.
//!
//! What the schema knows and liveblkd cannot do is refused by name; nothing is silently dropped that would change what a
//! disk does. Options that only tune QEMU's own machinery are accepted and have no effect (docs/compat.md lists them).

use crate::address::SocketAddress;
use crate::blkcolo;
use crate::blockdev_backup;
use crate::blockdev_filters;
use crate::error::QmpError;
use drivers::file::Locking;
use drivers::nbd_client::NbdOptions;
use drivers::null::NullOptions;
use graph::DetectZeroes;
use open::{AsGiven, Backing, Child, Common, DriverSpec, FileSpec, NbdSpec, NodeSpec, Qcow2Spec};
use qapi::{Map, Value};
use qcow2::OverlapCheck;
use std::rc::Rc;
use std::time::Duration;

/// Nodes in one `blockdev-add`: what bounds the recursion. Deeper chains are opened one by one.
const MAX_DEPTH: usize = 64;

/// Options that every driver has: they are not part of a node's `json:{…}` file name.
pub(crate) const COMMON: [&str; 9] = [
    "driver",
    "node-name",
    "discard",
    "cache",
    "active",
    "read-only",
    "auto-read-only",
    "force-share",
    "detect-zeroes",
];

/// Members of one object, read by name.
pub(crate) struct Fields<'a>(pub(crate) &'a Map<String, Value>);

impl<'a> Fields<'a> {
    pub(crate) fn text(&self, key: &str) -> Option<&'a str> {
        self.0.get(key)?.as_str()
    }
    pub(crate) fn flag(&self, key: &str) -> Option<bool> {
        self.0.get(key)?.as_bool()
    }
    pub(crate) fn signed(&self, key: &str) -> Option<i64> {
        self.0.get(key)?.as_i64()
    }
    /// A number of one of the schema's types without a sign.
    pub(crate) fn unsigned(&self, key: &str) -> Option<u64> {
        self.0.get(key)?.as_u64()
    }
    pub(crate) fn object(&self, key: &str) -> Option<Fields<'a>> {
        self.0.get(key)?.as_object().map(Fields)
    }
    pub(crate) fn string(&self, key: &str) -> String {
        self.text(key).unwrap_or_default().to_owned()
    }

    /// A number that must not be negative.
    pub(crate) fn size(&self, key: &str) -> Result<Option<u64>, QmpError> {
        let out_of_range =
            |n: i64| QmpError::generic(format!("Value '{n}' is out of range for parameter '{key}'"));
        match self.unsigned(key) {
            Some(n) => Ok(Some(n)),
            None => self.signed(key).map_or(Ok(None), |n| Err(out_of_range(n))),
        }
    }

    /// Fails if the member is there: it asks for something that we cannot do.
    fn refuse(&self, key: &str) -> Result<(), QmpError> {
        match self.0.get(key) {
            Some(_) => Err(QmpError::generic(format!("Parameter '{key}' is not supported by liveblkd"))),
            None => Ok(()),
        }
    }
}

/// The node that `blockdev-add` is to open.
pub(crate) fn spec(options: &Map<String, Value>) -> Result<NodeSpec, QmpError> {
    read(&Fields(options), 0)
}

fn read(f: &Fields<'_>, depth: usize) -> Result<NodeSpec, QmpError> {
    if depth > MAX_DEPTH {
        return Err(QmpError::generic(format!("Nodes are nested more than {MAX_DEPTH} deep")));
    }
    let driver = match f.text("driver").unwrap_or_default() {
        "file" => DriverSpec::File(file(f)?),
        "host_device" => DriverSpec::HostDevice(file(f)?),
        "raw" => DriverSpec::Raw {
            file: child(f, "file", depth)?,
            offset: f.size("offset")?.unwrap_or(0),
            size: f.size("size")?,
        },
        "null-co" => DriverSpec::NullCo(null(f, "null-co")?),
        "null-aio" => DriverSpec::NullCo(null(f, "null-aio")?),
        "copy-before-write" => blockdev_backup::copy_before_write(f, depth)?,
        "snapshot-access" => DriverSpec::SnapshotAccess { file: child(f, "file", depth)? },
        "blkdebug" | "blklogwrites" | "blkverify" | "compress" | "copy-on-read" | "preallocate"
        | "quorum" | "replication" | "throttle" => blockdev_filters::filter(f, depth)?,
        "blkcolo" => blkcolo::driver(f, depth)?,
        "qcow2" => DriverSpec::Qcow2(Box::new(qcow2_spec(f, depth)?)),
        "nbd" => DriverSpec::Nbd(nbd(f)?),
        other => return Err(QmpError::generic(format!("Unknown driver '{other}'"))),
    };
    Ok(NodeSpec { common: common(f)?, driver })
}

fn common(f: &Fields<'_>) -> Result<Common, QmpError> {
    let cache = f.object("cache");
    let cached = |key: &str| cache.as_ref().and_then(|c| c.flag(key));
    Ok(Common {
        node_name: f.text("node-name").map(str::to_owned),
        read_only: f.flag("read-only"),
        auto_read_only: f.flag("auto-read-only"),
        force_share: f.flag("force-share").unwrap_or(false),
        active: f.flag("active"),
        detect_zeroes: match f.text("detect-zeroes") {
            Some("on") => DetectZeroes::On,
            Some("unmap") => DetectZeroes::Unmap,
            _ => DetectZeroes::Off,
        },
        discard: f.text("discard").map(|d| d == "unmap"),
        direct: cached("direct"),
        no_flush: cached("no-flush"),
        given: AsGiven(Some(Rc::new(f.0.clone()))),
    })
}

fn file(f: &Fields<'_>) -> Result<FileSpec, QmpError> {
    f.refuse("pr-manager")?;
    Ok(FileSpec {
        filename: f.string("filename"),
        locking: match f.text("locking") {
            Some("on") => Locking::On,
            Some("off") => Locking::Off,
            _ => Locking::Auto,
        },
        threads: f.text("aio") == Some("threads"),
        native: f.text("aio") == Some("native"),
    })
}

fn null(f: &Fields<'_>, driver: &'static str) -> Result<NullOptions, QmpError> {
    let default = NullOptions::default();
    let latency = f.unsigned("latency-ns").unwrap_or(0);
    if i64::try_from(latency).is_err() {
        return Err(QmpError::generic("latency-ns is invalid"));
    }
    Ok(NullOptions {
        driver,
        size: f.size("size")?.unwrap_or(default.size),
        read_zeroes: f.flag("read-zeroes").unwrap_or(default.read_zeroes),
        latency: Duration::from_nanos(latency),
    })
}

fn nbd(f: &Fields<'_>) -> Result<NbdSpec, QmpError> {
    let server = f.0.get("server").cloned().unwrap_or_default();
    let server: SocketAddress = qapi::from_value(server).map_err(|e| QmpError::generic(e.to_string()))?;
    let seconds = |key: &str| f.signed(key).and_then(|n| u32::try_from(n).ok()).unwrap_or(0);
    let default = NbdOptions::new(server.read_to_connect()?, f.text("export").unwrap_or_default());
    let options = NbdOptions {
        reconnect_delay: seconds("reconnect-delay"),
        open_timeout: seconds("open-timeout"),
        x_dirty_bitmap: f.text("x-dirty-bitmap").map(str::to_owned),
        ..default
    };
    let text = |key: &str| f.text(key).map(str::to_owned);
    Ok(NbdSpec { options, tls_creds: text("tls-creds"), tls_hostname: text("tls-hostname") })
}

fn qcow2_spec(f: &Fields<'_>, depth: usize) -> Result<Qcow2Spec, QmpError> {
    f.refuse("encrypt")?;
    // it changes nothing here, but has to be one
    if f.size("cache-clean-interval")?.is_some_and(|s| u32::try_from(s).is_err()) {
        return Err(QmpError::generic("Cache clean interval too big"));
    }
    let default = qcow2::Options::default();
    let options = qcow2::Options {
        cache_size: f.size("cache-size")?,
        l2_cache_size: f.size("l2-cache-size")?,
        l2_cache_entry_size: f.size("l2-cache-entry-size")?,
        refcount_cache_size: f.size("refcount-cache-size")?,
        lazy_refcounts: f.flag("lazy-refcounts"),
        pass_discard_request: f.flag("pass-discard-request").unwrap_or(default.pass_discard_request),
        pass_discard_snapshot: f.flag("pass-discard-snapshot").unwrap_or(default.pass_discard_snapshot),
        pass_discard_other: f.flag("pass-discard-other").unwrap_or(default.pass_discard_other),
        discard_no_unref: f.flag("discard-no-unref").unwrap_or(default.discard_no_unref),
        overlap_check: overlap_check(f.0.get("overlap-check")),
        ..default
    };
    Ok(Qcow2Spec {
        file: child(f, "file", depth)?,
        data_file: f.0.get("data-file").map(|_| child(f, "data-file", depth)).transpose()?,
        backing: match f.0.get("backing") {
            None => Backing::Implicit,
            Some(Value::Null) => Backing::None,
            // the old way to say null
            Some(Value::String(s)) if s.is_empty() => Backing::None,
            Some(_) => Backing::Child(child(f, "backing", depth)?),
        },
        options,
    })
}

fn overlap_check(value: Option<&Value>) -> OverlapCheck {
    let template = |name: Option<&str>| match name {
        Some("none") => OverlapCheck::NONE,
        Some("constant") => OverlapCheck::CONSTANT,
        // `all` adds the L2 tables of snapshots, which would have to be read for every write; see docs/compat.md
        _ => OverlapCheck::CACHED,
    };
    match value {
        Some(Value::String(s)) => template(Some(s)),
        Some(Value::Object(map)) => {
            let f = Fields(map);
            let mut check = template(f.text("template"));
            let members = [
                ("main-header", &mut check.main_header),
                ("active-l1", &mut check.active_l1),
                ("active-l2", &mut check.active_l2),
                ("refcount-table", &mut check.refcount_table),
                ("refcount-block", &mut check.refcount_block),
                ("snapshot-table", &mut check.snapshot_table),
                ("inactive-l1", &mut check.inactive_l1),
                ("bitmap-directory", &mut check.bitmap_directory),
            ];
            for (name, on) in members {
                *on = f.flag(name).unwrap_or(*on);
            }
            check
        }
        _ => OverlapCheck::CACHED,
    }
}

pub(crate) fn child(f: &Fields<'_>, key: &str, depth: usize) -> Result<Child, QmpError> {
    match f.0.get(key) {
        Some(value) => node(value, depth),
        None => Err(QmpError::generic(format!("Parameter '{key}' is missing"))),
    }
}

/// A node by name or by description.
pub(crate) fn node(value: &Value, depth: usize) -> Result<Child, QmpError> {
    match value {
        Value::String(name) => Ok(Child::Reference(name.clone())),
        Value::Object(map) => Ok(Child::Inline(Box::new(read(&Fields(map), depth + 1)?))),
        _ => Err(QmpError::generic("A node is a name or an object")),
    }
}

/// A node reference of `blockdev-create`: a name, or a node to be opened for it.
pub(crate) fn reference(options: &Map<String, Value>, key: &str) -> Result<Option<Child>, QmpError> {
    options.get(key).map(|_| child(&Fields(options), key, 0)).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;
    use qapi::json;

    #[allow(clippy::needless_pass_by_value)] // called with what json! makes
    fn of(v: Value) -> Result<NodeSpec, String> {
        spec(v.as_object().unwrap()).map_err(|e| e.desc)
    }

    #[test]
    fn everything_finds_its_place() {
        let v = json!({"driver": "qcow2", "node-name": "q", "discard": "unmap", "detect-zeroes": "unmap",
            "cache": {"direct": true}, "l2-cache-size": 1 << 20, "overlap-check": {"template": "none", "active-l1": true},
            "backing": null, "read-only": true,
            "file": {"driver": "raw", "offset": 512, "size": 1024, "file": {"driver": "file", "filename": "x",
                "locking": "off", "aio": "threads", "force-share": true}}});
        let s = of(v).unwrap();
        assert_eq!(s.common.node_name.as_deref(), Some("q"));
        assert_eq!((s.common.discard, s.common.direct, s.common.no_flush), (Some(true), Some(true), None));
        assert_eq!((s.common.detect_zeroes, s.common.read_only), (DetectZeroes::Unmap, Some(true)));
        let DriverSpec::Qcow2(q) = s.driver else { panic!() };
        assert!(matches!(q.backing, Backing::None));
        assert_eq!(q.options.l2_cache_size, Some(1 << 20));
        assert_eq!(q.options.overlap_check, OverlapCheck { active_l1: true, ..OverlapCheck::NONE });
        let Child::Inline(raw) = q.file else { panic!() };
        let DriverSpec::Raw { file, offset: 512, size: Some(1024) } = raw.driver else { panic!() };
        let Child::Inline(file) = file else { panic!() };
        assert!(file.common.force_share);
        let DriverSpec::File(f) = file.driver else { panic!() };
        assert_eq!((f.filename.as_str(), f.locking, f.threads), ("x", Locking::Off, true));
    }

    #[test]
    fn backing_forms() {
        let backing = |v: Value| {
            let s = of(json!({"driver": "qcow2", "file": "f", "backing": v})).unwrap();
            let DriverSpec::Qcow2(q) = s.driver else { panic!() };
            q.backing
        };
        assert!(matches!(backing(json!("")), Backing::None));
        assert!(matches!(backing(json!("b")), Backing::Child(Child::Reference(b)) if b == "b"));
        assert!(matches!(backing(json!({"driver": "null-co"})), Backing::Child(Child::Inline(_))));
    }

    #[test]
    fn what_cannot_be_done_is_refused_by_name() {
        for (v, want) in [
            (
                json!({"driver": "raw", "file": "f", "size": -5}),
                "Value '-5' is out of range for parameter 'size'",
            ),
            (
                json!({"driver": "qcow2", "file": "f", "encrypt": {}}),
                "Parameter 'encrypt' is not supported by liveblkd",
            ),
            (
                json!({"driver": "file", "filename": "f", "pr-manager": "p"}),
                "Parameter 'pr-manager' is not supported by liveblkd",
            ),
        ] {
            assert_eq!(of(v).unwrap_err(), want);
        }
        let mut deep = json!("f");
        for _ in 0..=MAX_DEPTH {
            deep = json!({"driver": "raw", "file": deep});
        }
        assert!(of(json!({"driver": "raw", "file": deep})).unwrap_err().contains("nested"));
    }
}
