//! What users do with the dirty bitmaps of nodes, each as a change that can still be taken back.
//!
//! A command makes its change and commits it at once; a transaction makes several, in order, so that a later one sees what
//! an earlier one did, and commits all or takes all back in reverse order. What can happen in between: guests write.
//! What must stay true: nothing that a guest writes is missing from an enabled bitmap, whether changes are committed or
//! taken back; after taking back, a bitmap holds what it held before plus what was written since, no more.

use crate::NodeCell;
use bitmap::{Bitmap, DirtyBitmap, MAX_GRANULARITY, MIN_GRANULARITY};
use block::{BlockError, ErrorKind, Result};
use std::rc::Rc;

/// Longest name in bytes: what the qcow2 format can hold (its specification, "Bitmap directory").
pub const MAX_BITMAP_NAME: usize = 1023;
/// Most named bitmaps of a node: as many as a qcow2 image can hold.
pub const MAX_BITMAPS: usize = 65_535;
/// Granularity for nodes without clusters, and the most that clusters give.
const DEFAULT_GRANULARITY: u64 = 64 << 10;
/// The least that clusters give.
const LEAST_DEFAULT_GRANULARITY: u64 = 4 << 10;

/// What is asked of a new bitmap; names as in QMP's `block-dirty-bitmap-add`.
#[derive(Clone, Debug)]
pub struct NewBitmap {
    /// Its name.
    pub name: String,
    /// Bytes per bit; `None` for the node's default.
    pub granularity: Option<u64>,
    /// Whether the image keeps it.
    pub persistent: bool,
    /// Whether it does not record.
    pub disabled: bool,
}

/// A bitmap that is to be merged into another.
pub type Source = (Rc<NodeCell>, Rc<DirtyBitmap>);

/// A change that has been made and can be taken back.
#[must_use = "a change is committed or taken back"]
pub struct BitmapChange {
    cell: Rc<NodeCell>,
    bitmap: Rc<DirtyBitmap>,
    what: What,
}

enum What {
    Added,
    /// Nobody may use it any more; it goes when the change is committed.
    Removing {
        persistent: bool,
    },
    Cleared {
        before: Bitmap,
    },
    /// Records now and did not; it had these bits.
    Enabled {
        before: Bitmap,
    },
    /// Does not record and did; `since` does, in case the change is taken back.
    Disabled {
        since: Rc<DirtyBitmap>,
    },
    /// Nothing changed.
    Nothing,
    /// `since` records what is written after the merge, so that it is known if the merge is taken back.
    Merged {
        before: Bitmap,
        since: Option<Rc<DirtyBitmap>>,
    },
}

/// The bitmap of that name, fit for nothing in particular.
pub fn find_bitmap(cell: &NodeCell, name: &str) -> Result<Rc<DirtyBitmap>> {
    cell.find_bitmap(name)
        .ok_or_else(|| BlockError::new(ErrorKind::NotFound, format!("Dirty bitmap '{name}' not found")))
}

/// Fails if the bitmap cannot be used: others are using it, or it may lack changes.
pub fn check_usable(bitmap: &DirtyBitmap) -> Result<()> {
    check_not_busy(bitmap)?;
    check_consistent(bitmap)
}

/// Fails if the bitmap may lack changes.
pub fn check_consistent(bitmap: &DirtyBitmap) -> Result<()> {
    if bitmap.inconsistent() {
        let name = bitmap.name().unwrap_or_default();
        return Err(BlockError::invalid(format!("Bitmap '{name}' is inconsistent and cannot be used"))
            .with_hint(format!("Try block-dirty-bitmap-remove to delete this bitmap from disk: '{name}'")));
    }
    Ok(())
}

pub(crate) fn check_not_busy(bitmap: &DirtyBitmap) -> Result<()> {
    if bitmap.busy() {
        let name = bitmap.name().unwrap_or_default();
        let why = format!("Bitmap '{name}' is currently in use by another operation and cannot be used");
        return Err(BlockError::new(ErrorKind::Busy, why));
    }
    Ok(())
}

fn check_not_readonly(bitmap: &DirtyBitmap) -> Result<()> {
    if bitmap.readonly() {
        let name = bitmap.name().unwrap_or_default();
        let why = format!("Bitmap '{name}' is readonly and cannot be modified");
        return Err(BlockError::new(ErrorKind::Permission, why));
    }
    Ok(())
}

/// Fails if the bitmap cannot be used and changed.
pub fn check_changeable(bitmap: &DirtyBitmap) -> Result<()> {
    check_not_busy(bitmap)?;
    check_not_readonly(bitmap)?;
    check_usable(bitmap)
}

/// Granularity of bitmaps of this node where the user gives none: its cluster size within bounds.
pub async fn default_granularity(cell: &NodeCell) -> u64 {
    let clusters = cell.node().details().await.ok().and_then(|d| d.cluster_size);
    clusters.map_or(DEFAULT_GRANULARITY, |c| c.clamp(LEAST_DEFAULT_GRANULARITY, DEFAULT_GRANULARITY))
}

/// Adds a bitmap, clean, recording unless asked otherwise.
pub async fn add(cell: &Rc<NodeCell>, new: &NewBitmap) -> Result<BitmapChange> {
    let name = &new.name;
    if name.is_empty() {
        return Err(BlockError::invalid("Bitmap name cannot be empty"));
    }
    let fits = |g: &u64| g.is_power_of_two() && (MIN_GRANULARITY..=MAX_GRANULARITY).contains(g);
    if new.granularity.is_some_and(|g| !fits(&g)) {
        let least = MIN_GRANULARITY;
        return Err(BlockError::invalid(format!("Granularity must be power of 2 and at least {least}")));
    }
    let granularity = match new.granularity {
        Some(g) => g,
        None => default_granularity(cell).await,
    };
    if new.persistent {
        check_storable(cell, name, granularity)?;
    }
    if cell.find_bitmap(name).is_some() {
        return Err(BlockError::new(ErrorKind::Busy, format!("Bitmap already exists: {name}")));
    }
    if name.len() > MAX_BITMAP_NAME {
        return Err(BlockError::invalid(format!("Bitmap name too long: {name}")));
    }
    if cell.bitmaps().len() >= MAX_BITMAPS {
        return Err(BlockError::invalid(format!("There are {MAX_BITMAPS} bitmaps already")));
    }
    let bitmap = Rc::new(DirtyBitmap::new(Some(name.clone()), cell.node().len(), granularity)?);
    bitmap.set_enabled(!new.disabled);
    bitmap.set_persistent(new.persistent);
    cell.add_bitmap(bitmap.clone());
    Ok(BitmapChange { cell: cell.clone(), bitmap, what: What::Added })
}

fn check_storable(cell: &NodeCell, name: &str, granularity: u64) -> Result<()> {
    let node = cell.name();
    let stored = match cell.node().check_bitmap(name, granularity) {
        // the driver keeps none, but somebody does
        Err(e) if e.kind() == ErrorKind::Unsupported && cell.write_ahead().is_some() => Ok(()),
        other => other,
    };
    stored.map_err(|e| {
        let said = e.message().to_owned();
        let message = match e.kind() {
            ErrorKind::Unsupported => format!("Can't store persistent bitmaps to {node}: {said}"),
            _ => format!("Can't make bitmap '{name}' persistent in '{node}': {said}"),
        };
        e.with_message(message)
    })
}

/// Removes a bitmap; from the image at once, from the node when the change is committed. Nobody can use it meanwhile.
pub async fn remove(cell: &Rc<NodeCell>, name: &str) -> Result<BitmapChange> {
    let bitmap = find_bitmap(cell, name)?;
    check_not_busy(&bitmap)?;
    check_not_readonly(&bitmap)?;
    let persistent = bitmap.persistent();
    if persistent {
        bitmap.set_busy(true);
        let gone = cell.node().forget_bitmap(name).await;
        bitmap.set_busy(false);
        gone?;
    }
    // It is not stored again when the node is closed before the end of the transaction.
    bitmap.set_persistent(false);
    bitmap.set_busy(true);
    Ok(BitmapChange { cell: cell.clone(), bitmap, what: What::Removing { persistent } })
}

/// Makes a bitmap clean.
pub fn clear(cell: &Rc<NodeCell>, name: &str) -> Result<BitmapChange> {
    let bitmap = find_bitmap(cell, name)?;
    check_changeable(&bitmap)?;
    let before = bitmap.bits_mut().take();
    Ok(BitmapChange { cell: cell.clone(), bitmap, what: What::Cleared { before } })
}

/// A bitmap without name that records from now on what `like` would.
fn recorder(cell: &NodeCell, like: &DirtyBitmap) -> Result<Rc<DirtyBitmap>> {
    let (len, granularity) = (like.bits().len(), like.bits().granularity());
    let new = Rc::new(DirtyBitmap::new(None, len, granularity)?);
    cell.add_bitmap(new.clone());
    Ok(new)
}

/// Starts or stops recording.
pub fn set_enabled(cell: &Rc<NodeCell>, name: &str, on: bool) -> Result<BitmapChange> {
    let bitmap = find_bitmap(cell, name)?;
    check_usable(&bitmap)?;
    let what = match (bitmap.enabled(), on) {
        (false, true) => What::Enabled { before: bitmap.bits().clone() },
        (true, false) => What::Disabled { since: recorder(cell, &bitmap)? },
        _ => What::Nothing,
    };
    bitmap.set_enabled(on);
    Ok(BitmapChange { cell: cell.clone(), bitmap, what })
}

/// Marks in `target` what any of `sources` marks, rounded outwards to its granularity.
pub fn merge(cell: &Rc<NodeCell>, target: &str, sources: &[Source]) -> Result<BitmapChange> {
    let target = find_bitmap(cell, target)?;
    check_changeable(&target)?;
    for (_, source) in sources {
        check_usable(source)?;
        let (theirs, ours) = (source.bits().len(), target.bits().len());
        if theirs != ours {
            let why = format!(
                "Bitmaps are of different sizes (destination size is {ours}, source size is {theirs}) and can't be merged"
            );
            return Err(BlockError::invalid(why));
        }
    }
    let before = target.bits().clone();
    let since = if target.enabled() { Some(recorder(cell, &target)?) } else { None };
    for (_, source) in sources.iter().filter(|(_, s)| !Rc::ptr_eq(s, &target)) {
        target.bits_mut().merge(&source.bits());
    }
    Ok(BitmapChange { cell: cell.clone(), bitmap: target, what: What::Merged { before, since } })
}

impl BitmapChange {
    /// Makes it durable, where something keeps bitmaps that can.
    ///
    /// # Errors
    /// It could not be written; it stands, and may be undone.
    pub async fn sync(&self) -> Result<()> {
        self.cell.sync_bitmaps().await
    }

    /// It is final.
    pub fn commit(self) {
        match self.what {
            What::Removing { .. } => {
                self.cell.remove_bitmap(&self.bitmap);
                self.bitmap.set_busy(false);
            }
            What::Merged { since: Some(since), .. } | What::Disabled { since } => {
                self.cell.remove_bitmap(&since);
            }
            _ => {}
        }
    }

    /// It is taken back.
    pub fn undo(self) {
        match self.what {
            What::Added => self.cell.remove_bitmap(&self.bitmap),
            What::Removing { persistent } => {
                self.bitmap.set_persistent(persistent);
                self.bitmap.set_busy(false);
            }
            What::Cleared { before } => self.bitmap.bits_mut().merge(&before),
            What::Enabled { before } => {
                self.bitmap.set_enabled(false);
                *self.bitmap.bits_mut() = before;
            }
            What::Disabled { since } => {
                self.cell.remove_bitmap(&since);
                self.bitmap.bits_mut().merge(&since.bits());
                self.bitmap.set_enabled(true);
            }
            What::Nothing => {}
            What::Merged { before, since } => {
                let mut bits = before;
                if let Some(since) = since {
                    self.cell.remove_bitmap(&since);
                    bits.merge(&since.bits());
                }
                *self.bitmap.bits_mut() = bits;
            }
        }
    }
}
