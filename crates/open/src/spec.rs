//! What to open: plain structs, one for each driver, as `blockdev-add` knows them. `control` makes them from JSON.

use crate::blkcolo::BlkcoloSpec;
use crate::filters::FilterSpec;
use graph::DetectZeroes;
use qapi::{Map, Value};
use std::rc::Rc;

/// A node's options as the user wrote them, with those of nodes inside; nothing for nodes that nobody described. What they
/// say is in the other members; this is for whoever has to write it down.
#[derive(Clone, Default)]
pub struct AsGiven(pub Option<Rc<Map<String, Value>>>);

impl std::fmt::Debug for AsGiven {
    /// Nothing: two ways to write the same are the same.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("_")
    }
}

/// Options that every driver takes. `None`: as the parent has it, or the driver's default.
#[derive(Clone, Debug, Default)]
pub struct Common {
    /// Node name.
    pub node_name: Option<String>,
    /// `read-only`.
    pub read_only: Option<bool>,
    /// `auto-read-only`.
    pub auto_read_only: Option<bool>,
    /// `force-share`.
    pub force_share: bool,
    /// `active`.
    pub active: Option<bool>,
    /// `detect-zeroes`.
    pub detect_zeroes: DetectZeroes,
    /// `discard`: `Some(true)` is `unmap`.
    pub discard: Option<bool>,
    /// `cache.direct`.
    pub direct: Option<bool>,
    /// `cache.no-flush`.
    pub no_flush: Option<bool>,
    /// As it was written.
    pub given: AsGiven,
}

/// A child: a node that is there, or one to be opened for this parent.
#[derive(Clone, Debug)]
pub enum Child {
    /// A node by name.
    Reference(String),
    /// A node of its own.
    Inline(Box<NodeSpec>),
}

/// The layer below a copy-on-write format.
#[derive(Clone, Debug, Default)]
pub enum Backing {
    /// What the image header names, if it names something.
    #[default]
    Implicit,
    /// None, whatever the header says.
    None,
    /// This node.
    Child(Child),
}

/// A node to be opened.
#[derive(Clone, Debug)]
pub struct NodeSpec {
    /// What every driver takes.
    pub common: Common,
    /// The driver and its own options.
    pub driver: DriverSpec,
}

/// `file` and `host_device`.
#[derive(Clone, Debug, Default)]
pub struct FileSpec {
    /// Path.
    pub filename: String,
    /// Image locks.
    pub locking: drivers::file::Locking,
    /// `aio=threads`.
    pub threads: bool,
    /// `aio=native`: it changes nothing, but is refused without `cache.direct`, as in QSD.
    pub native: bool,
}

/// `qcow2`.
#[derive(Clone, Debug)]
pub struct Qcow2Spec {
    /// Where the image is.
    pub file: Child,
    /// The external data file; what the header names where missing.
    pub data_file: Option<Child>,
    /// The layer below.
    pub backing: Backing,
    /// Run-time options; `writable` and `node_name` are filled in by the opener.
    pub options: qcow2::Options,
}

/// `nbd`.
#[derive(Clone, Debug)]
pub struct NbdSpec {
    /// Where the export is and how it is reached; `tls` is filled in when the node is opened.
    pub options: drivers::nbd_client::NbdOptions,
    /// Id of TLS credentials.
    pub tls_creds: Option<String>,
    /// The name that the server's certificate must be for; for TCP the host that is connected to, if not given.
    pub tls_hostname: Option<String>,
}

/// `copy-before-write`.
#[derive(Clone, Debug)]
pub struct CopyBeforeWriteSpec {
    /// The disk.
    pub file: Child,
    /// Where old bytes go.
    pub target: Child,
    /// A node and its bitmap: only what that marks is kept.
    pub bitmap: Option<(String, String)>,
    /// How old bytes are kept.
    pub rules: copy::KeepRules,
    /// Smallest unit of copying, 0: default.
    pub min_cluster_size: u64,
}

/// A driver with its options.
#[derive(Clone, Debug)]
pub enum DriverSpec {
    /// A filter, or a driver for tests.
    Filter(Box<FilterSpec>),
    /// A replicated disk.
    Blkcolo(BlkcoloSpec),
    /// Keeps what a disk contains now.
    CopyBeforeWrite(Box<CopyBeforeWriteSpec>),
    /// Shows what such a filter keeps.
    SnapshotAccess {
        /// The filter.
        file: Child,
    },
    /// A regular file.
    File(FileSpec),
    /// A device of the host.
    HostDevice(FileSpec),
    /// The bytes of another node.
    Raw {
        /// Which node.
        file: Child,
        /// First byte.
        offset: u64,
        /// Number of bytes; to the end where missing.
        size: Option<u64>,
    },
    /// A disk that holds nothing.
    NullCo(drivers::null::NullOptions),
    /// A qcow2 image.
    Qcow2(Box<Qcow2Spec>),
    /// An export of an NBD server; `read_only` and `auto_read_only` are filled in by the opener.
    Nbd(NbdSpec),
}

impl DriverSpec {
    /// The child called `file`, which is opened before the node itself.
    pub(crate) fn file(&self) -> Option<&Child> {
        match self {
            DriverSpec::Raw { file, .. } | DriverSpec::SnapshotAccess { file } => Some(file),
            DriverSpec::Qcow2(q) => Some(&q.file),
            DriverSpec::CopyBeforeWrite(c) => Some(&c.file),
            DriverSpec::Filter(filter) => filter.file(),
            DriverSpec::Blkcolo(b) => Some(&b.file),
            DriverSpec::File(_) | DriverSpec::HostDevice(_) | DriverSpec::NullCo(_) | DriverSpec::Nbd(_) => {
                None
            }
        }
    }
}

impl NodeSpec {
    /// A file of the host with everything else as by default.
    pub fn file(filename: &str) -> NodeSpec {
        let file = FileSpec { filename: filename.to_owned(), ..FileSpec::default() };
        NodeSpec { common: Common::default(), driver: DriverSpec::File(file) }
    }

    /// A raw disk over this node.
    #[must_use]
    pub fn raw(self) -> NodeSpec {
        let file = Child::Inline(Box::new(self));
        NodeSpec { common: Common::default(), driver: DriverSpec::Raw { file, offset: 0, size: None } }
    }

    /// A qcow2 image in this node, its backing chain as the header names it.
    #[must_use]
    pub fn qcow2(self) -> NodeSpec {
        let spec = Qcow2Spec {
            file: Child::Inline(Box::new(self)),
            data_file: None,
            backing: Backing::Implicit,
            options: qcow2::Options::default(),
        };
        NodeSpec { common: Common::default(), driver: DriverSpec::Qcow2(Box::new(spec)) }
    }

    /// The same with a node name.
    #[must_use]
    pub fn named(mut self, name: &str) -> NodeSpec {
        self.common.node_name = Some(name.to_owned());
        self
    }

    /// The same, read-only or not.
    #[must_use]
    pub fn read_only(mut self, on: bool) -> NodeSpec {
        self.common.read_only = Some(on);
        self
    }
}
