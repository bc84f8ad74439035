//! Dirty bitmaps.

use super::transaction::{Act, Read};
use super::{Command, Entry, entry};
use crate::Daemon;
use crate::error::{QmpError, Reply};
use block::BlockError;
use graph::NodeCell;
use graph::bitmaps::{self, BitmapChange, NewBitmap, Source};
use jobs::txn::{Action, Doing};
use jobs::{Group, JobError};
use qapi::json;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};
use std::cell::RefCell;
use std::fmt::Write;
use std::rc::Rc;

pub(super) const COMMANDS: &[Entry] = &[
    entry::<BitmapAdd>(),
    entry::<BitmapRemove>(),
    entry::<BitmapClear>(),
    entry::<BitmapEnable>(),
    entry::<BitmapDisable>(),
    entry::<BitmapMerge>(),
    entry::<BitmapSha256>(),
];

/// Bytes of a bitmap hashed at once.
const HASH_STEP: usize = 64 << 10;

/// A command that changes bitmaps, as a change that a transaction can take back.
pub(crate) trait ChangesBitmap {
    /// The node whose bitmaps change.
    fn node(&self) -> &str;
    /// Makes the change.
    async fn change(&self, daemon: &Daemon) -> Result<BitmapChange, QmpError>;
}

fn node(daemon: &Daemon, name: &str) -> Result<Rc<NodeCell>, QmpError> {
    let found = daemon.graph().find(name);
    found.ok_or_else(|| QmpError::generic(format!("Node '{name}' not found")))
}

/// A change as an action of a transaction.
struct BitmapAction<C> {
    daemon: Rc<Daemon>,
    command: C,
    done: RefCell<Option<BitmapChange>>,
}

impl<C: ChangesBitmap> Action for BitmapAction<C> {
    fn nodes(&self) -> Vec<String> {
        vec![self.command.node().to_owned()]
    }

    fn prepare(&self) -> Doing<'_, Result<(), JobError>> {
        Box::pin(async move {
            let change = self.command.change(&self.daemon).await;
            let change = change.map_err(|e| JobError::from(BlockError::invalid(e.desc)))?;
            *self.done.borrow_mut() = Some(change);
            Ok(())
        })
    }

    fn commit(&self) -> Doing<'_> {
        Box::pin(async move {
            let Some(change) = self.done.take() else { return };
            // What cannot be written now is written before the next write that depends on it.
            let _in_memory_it_stands = change.sync().await;
            change.commit();
        })
    }

    fn abort(&self) -> Doing<'_> {
        Box::pin(async move { self.done.take().into_iter().for_each(BitmapChange::undo) })
    }
}

impl<C: ChangesBitmap + DeserializeOwned + 'static> Act for C {
    fn action(self, daemon: &Rc<Daemon>, _: Option<Rc<Group>>) -> Read {
        Ok(Rc::new(BitmapAction { daemon: daemon.clone(), command: self, done: RefCell::default() }))
    }
}

async fn at_once(command: &impl ChangesBitmap, daemon: &Daemon) -> Reply {
    let change = command.change(daemon).await?;
    if let Err(e) = change.sync().await {
        change.undo();
        return Err(e.into());
    }
    change.commit();
    Ok(json!({}))
}

/// Adds a bitmap.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct BitmapAdd {
    node: String,
    name: String,
    granularity: Option<u64>,
    #[serde(default)]
    persistent: bool,
    #[serde(default)]
    disabled: bool,
    /// It begins with everything marked: for a copy that is to be resumable by it. Not in QSD.
    #[serde(default)]
    all_dirty: bool,
}

impl ChangesBitmap for BitmapAdd {
    fn node(&self) -> &str {
        &self.node
    }
    async fn change(&self, daemon: &Daemon) -> Result<BitmapChange, QmpError> {
        if self.name.is_empty() {
            return Err(QmpError::generic("Bitmap name cannot be empty"));
        }
        let cell = daemon.find_node(Some(&self.node), Some(&self.node))?;
        let new = NewBitmap {
            name: self.name.clone(),
            granularity: self.granularity,
            persistent: self.persistent,
            disabled: self.disabled,
        };
        if new.persistent {
            // Where it cannot be begun the bitmap is refused or, if the image keeps it, kept as QSD would.
            if let Err(e) = daemon.opener().bitmap_log(&cell).await
                && cell
                    .node()
                    .check_bitmap(&new.name, graph::bitmaps::default_granularity(&cell).await)
                    .is_err()
            {
                let why = format!("Can't store persistent bitmaps to {}: {}", cell.name(), e.message());
                return Err(QmpError::generic(why));
            }
        }
        let change = bitmaps::add(&cell, &new).await?;
        if self.all_dirty
            && let Some(bitmap) = cell.find_bitmap(&self.name)
        {
            bitmap.bits_mut().set_all();
        }
        Ok(change)
    }
}

impl Command for BitmapAdd {
    const NAME: &'static str = "block-dirty-bitmap-add";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        at_once(&self, &daemon).await
    }
}

/// A bitmap of a node.
#[derive(Deserialize)]
struct Named {
    node: String,
    name: String,
}

/// Removes a bitmap.
#[derive(Deserialize)]
#[serde(transparent)]
pub(crate) struct BitmapRemove(Named);

impl ChangesBitmap for BitmapRemove {
    fn node(&self) -> &str {
        &self.0.node
    }
    async fn change(&self, daemon: &Daemon) -> Result<BitmapChange, QmpError> {
        Ok(bitmaps::remove(&node(daemon, &self.0.node)?, &self.0.name).await?)
    }
}

impl Command for BitmapRemove {
    const NAME: &'static str = "block-dirty-bitmap-remove";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        at_once(&self, &daemon).await
    }
}

/// Makes a bitmap clean.
#[derive(Deserialize)]
#[serde(transparent)]
pub(crate) struct BitmapClear(Named);

impl ChangesBitmap for BitmapClear {
    fn node(&self) -> &str {
        &self.0.node
    }
    async fn change(&self, daemon: &Daemon) -> Result<BitmapChange, QmpError> {
        Ok(bitmaps::clear(&node(daemon, &self.0.node)?, &self.0.name)?)
    }
}

impl Command for BitmapClear {
    const NAME: &'static str = "block-dirty-bitmap-clear";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        at_once(&self, &daemon).await
    }
}

/// Lets a bitmap record.
#[derive(Deserialize)]
#[serde(transparent)]
pub(crate) struct BitmapEnable(Named);

impl ChangesBitmap for BitmapEnable {
    fn node(&self) -> &str {
        &self.0.node
    }
    async fn change(&self, daemon: &Daemon) -> Result<BitmapChange, QmpError> {
        Ok(bitmaps::set_enabled(&node(daemon, &self.0.node)?, &self.0.name, true)?)
    }
}

impl Command for BitmapEnable {
    const NAME: &'static str = "block-dirty-bitmap-enable";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        at_once(&self, &daemon).await
    }
}

/// Lets a bitmap record no more.
#[derive(Deserialize)]
#[serde(transparent)]
pub(crate) struct BitmapDisable(Named);

impl ChangesBitmap for BitmapDisable {
    fn node(&self) -> &str {
        &self.0.node
    }
    async fn change(&self, daemon: &Daemon) -> Result<BitmapChange, QmpError> {
        Ok(bitmaps::set_enabled(&node(daemon, &self.0.node)?, &self.0.name, false)?)
    }
}

impl Command for BitmapDisable {
    const NAME: &'static str = "block-dirty-bitmap-disable";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        at_once(&self, &daemon).await
    }
}

/// A bitmap of this node, or of another.
#[derive(Deserialize)]
#[serde(untagged)]
enum MergeSource {
    Here(String),
    There(Named),
}

/// Merges bitmaps into one: all of them or, if one cannot be used, none.
#[derive(Deserialize)]
pub(crate) struct BitmapMerge {
    node: String,
    target: String,
    bitmaps: Vec<MergeSource>,
}

impl ChangesBitmap for BitmapMerge {
    fn node(&self) -> &str {
        &self.node
    }
    async fn change(&self, daemon: &Daemon) -> Result<BitmapChange, QmpError> {
        let cell = node(daemon, &self.node)?;
        bitmaps::find_bitmap(&cell, &self.target)?;
        let source = |s: &MergeSource| -> Result<Source, QmpError> {
            let (of, name) = match s {
                MergeSource::Here(name) => (cell.clone(), name),
                MergeSource::There(n) => (node(daemon, &n.node)?, &n.name),
            };
            let found = bitmaps::find_bitmap(&of, name)?;
            Ok((of, found))
        };
        let sources: Vec<Source> = self.bitmaps.iter().map(source).collect::<Result<_, _>>()?;
        Ok(bitmaps::merge(&cell, &self.target, &sources)?)
    }
}

impl Command for BitmapMerge {
    const NAME: &'static str = "block-dirty-bitmap-merge";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        at_once(&self, &daemon).await
    }
}

/// A hash of a bitmap's bits, to compare bitmaps in tests: over the bits in order, least significant first, padded with
/// zeroes to whole 64-bit words, at least one, as QEMU does.
#[derive(Deserialize)]
#[serde(transparent)]
struct BitmapSha256(Named);

impl Command for BitmapSha256 {
    const NAME: &'static str = "x-debug-block-dirty-bitmap-sha256";
    async fn run(self, daemon: Rc<Daemon>) -> Reply {
        let cell = node(&daemon, &self.0.node)?;
        let bitmap = bitmaps::find_bitmap(&cell, &self.0.name)?;
        let (len, granularity) = (bitmap.bits().len(), bitmap.bits().granularity());
        let bytes = len.div_ceil(granularity).div_ceil(64).max(1) * 8;
        let (mut hash, mut at) = (Sha256::new(), 0);
        let mut buffer = vec![0; HASH_STEP];
        while at < bytes {
            let step = HASH_STEP.min(usize::try_from(bytes - at).unwrap_or(HASH_STEP));
            bitmap.bits().export_bits(at, &mut buffer[..step]);
            hash.update(&buffer[..step]);
            at += step as u64;
            daemon.env().yield_now().await;
        }
        let mut hex = String::new();
        for byte in hash.finalize() {
            let _ = write!(hex, "{byte:02x}");
        }
        Ok(json!({"sha256": hex}))
    }
}
