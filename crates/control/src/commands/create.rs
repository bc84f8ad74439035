//! `blockdev-create`, `x-blockdev-amend`: make images and change what they are, as jobs.

use super::{Command, Entry, entry};
use crate::Daemon;
use crate::blockdev;
use crate::error::{QmpError, Reply};
use block::{BlockError, Prealloc, Result};
use graph::NodeCell;
use jobs::Kind;
use open::{Child, Opener};
use qapi::{Map, Value, json};
use qcow2::create::Options as Qcow2Options;
use qcow2::header::Compression;
use serde::Deserialize;
use std::rc::Rc;

pub(super) const COMMANDS: &[Entry] = &[entry::<BlockdevCreate>(), entry::<BlockdevAmend>()];

/// Makes an image in the background. What the schema cannot say about the options is the job's error.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct BlockdevCreate {
    job_id: String,
    options: Map<String, Value>,
}

#[derive(Deserialize, Clone, Copy)]
#[serde(rename_all = "kebab-case")]
enum Preallocation {
    Off,
    Metadata,
    Falloc,
    Full,
}

impl From<Preallocation> for Prealloc {
    fn from(p: Preallocation) -> Prealloc {
        match p {
            Preallocation::Off => Prealloc::Off,
            Preallocation::Metadata => Prealloc::Metadata,
            Preallocation::Falloc => Prealloc::Falloc,
            Preallocation::Full => Prealloc::Full,
        }
    }
}

/// Driver `file`: a raw image is a file.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct FileImage {
    filename: String,
    size: u64,
    preallocation: Option<Preallocation>,
    /// Ours has no use for it.
    extent_size_hint: Option<u64>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Version {
    V2,
    V3,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum CompressionType {
    Zlib,
    Zstd,
}

/// Driver `qcow2`, but for its files, which are read as node references.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Qcow2Image {
    size: u64,
    version: Option<Version>,
    backing_file: Option<String>,
    backing_fmt: Option<String>,
    data_file_raw: Option<bool>,
    encrypt: Option<Map<String, Value>>,
    cluster_size: Option<u64>,
    preallocation: Option<Preallocation>,
    lazy_refcounts: Option<bool>,
    refcount_bits: Option<i64>,
    compression_type: Option<CompressionType>,
    extended_l2: Option<bool>,
}

impl Qcow2Image {
    fn options(self, data_file: Option<String>) -> Qcow2Options {
        let default = Qcow2Options::new(self.size);
        Qcow2Options {
            version: match self.version {
                Some(Version::V2) => 2,
                Some(Version::V3) | None => default.version,
            },
            backing_file: self.backing_file,
            backing_fmt: self.backing_fmt,
            data_file,
            data_file_raw: self.data_file_raw.unwrap_or(false),
            encrypt: self.encrypt.map(|e| e["format"].as_str().unwrap_or_default().to_owned()),
            cluster_size: self.cluster_size.unwrap_or(default.cluster_size),
            preallocation: self.preallocation.map_or(default.preallocation, Prealloc::from),
            lazy_refcounts: self.lazy_refcounts.unwrap_or(false),
            refcount_bits: self.refcount_bits.map_or(default.refcount_bits, i64::cast_unsigned),
            compression_type: match self.compression_type {
                Some(CompressionType::Zstd) => Compression::Zstd,
                Some(CompressionType::Zlib) | None => Compression::Zlib,
            },
            extended_l2: self.extended_l2.unwrap_or(false),
            ..default
        }
    }
}

fn read<T: serde::de::DeserializeOwned>(options: &Map<String, Value>) -> std::result::Result<T, QmpError> {
    qapi::from_value(Value::Object(options.clone())).map_err(|e| QmpError::generic(e.to_string()))
}

impl Command for BlockdevCreate {
    const NAME: &'static str = "blockdev-create";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let opener = daemon.opener().clone();
        let work: block::Io<'static> = match self.options["driver"].as_str().unwrap_or_default() {
            "file" => {
                let o: FileImage = read(&self.options)?;
                Box::pin(async move { file(&opener, o).await })
            }
            "qcow2" => {
                let o: Qcow2Image = read(&self.options)?;
                let file = blockdev::reference(&self.options, "file")?;
                let data = blockdev::reference(&self.options, "data-file")?;
                Box::pin(async move { qcow2(&opener, file, data, o).await })
            }
            other => {
                let desc = format!("Driver '{other}' does not support blockdev-create");
                return Err(QmpError::generic(desc));
            }
        };
        jobs::create::start(daemon.jobs(), &self.job_id, Kind::Create, work)?;
        Ok(json!({}))
    }
}

/// Changes what an image is. Of qcow2 images only the encryption can be changed this way, and encrypted ones are not opened: so
/// there is nothing to do, or what is asked for does not fit the image.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct BlockdevAmend {
    job_id: String,
    node_name: String,
    options: Map<String, Value>,
}

impl Command for BlockdevAmend {
    const NAME: &'static str = "x-blockdev-amend";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let cell = daemon.find_node(None, Some(&self.node_name))?;
        if self.options["driver"] != cell.node().driver() {
            return Err(QmpError::generic("x-blockdev-amend doesn't support changing the block driver"));
        }
        if cell.node().driver() != "qcow2" {
            return Err(QmpError::generic("Driver does not support x-blockdev-amend"));
        }
        let encrypt = self.options.contains_key("encrypt");
        let work = async move {
            match encrypt {
                false => Ok(()),
                true => Err(BlockError::invalid("image is not encrypted, can't amend")),
            }
        };
        jobs::create::start(daemon.jobs(), &self.job_id, Kind::Amend, Box::pin(work))?;
        Ok(json!({}))
    }
}

async fn file(opener: &Opener, o: FileImage) -> Result<()> {
    if o.extent_size_hint.is_some_and(|hint| u32::try_from(hint).is_err()) {
        return Err(BlockError::invalid("Extent size hint is too large"));
    }
    let prealloc = o.preallocation.map_or(Prealloc::Off, Prealloc::from);
    opener.create_file(&o.filename, o.size, prealloc).await
}

async fn qcow2(opener: &Opener, file: Option<Child>, data: Option<Child>, o: Qcow2Image) -> Result<()> {
    let file = hold(opener, file).await?;
    let data = match data {
        Some(d) => Some(hold(opener, Some(d)).await?),
        None => None,
    };
    let name = match &data {
        Some((cell, _)) => Some(cell.node().details().await?.filename),
        None => None,
    };
    let (file_name, data_name) = (file.0.name(), data.as_ref().map(|(d, _)| d.name()));
    let made = opener.create_qcow2(file_name, data_name, &o.options(name)).await;
    for (cell, ours) in [Some(file), data].into_iter().flatten() {
        if ours {
            cell.set_monitor_owned(false);
            opener.graph().remove(&cell).await?;
        }
    }
    made
}

/// The node that is meant; `true` if it was opened for this and goes afterwards.
async fn hold(opener: &Opener, child: Option<Child>) -> Result<(Rc<NodeCell>, bool)> {
    match child {
        Some(Child::Reference(name)) => {
            let found = opener.graph().find(&name);
            let missing =
                || BlockError::invalid(format!("Cannot find device='{name}' nor node-name='{name}'"));
            Ok((found.ok_or_else(missing)?, false))
        }
        Some(Child::Inline(spec)) => Ok((opener.open(&spec).await?, true)),
        None => Err(BlockError::invalid("Parameter 'file' is missing")),
    }
}
