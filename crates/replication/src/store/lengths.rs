//! Volumes that change their length (D5): a record in the order of the changes, which counts with the checkpoint of its epoch.
//!
//! What can happen: a crash or a broken session between the disks' having grown and the checkpoint, or after a failover to one before it; a
//! disk that does not grow. What must stay true: a disk is never shorter than any length that is recorded, and has durably grown before the
//! record is written; what is new reads as zero, whatever an earlier session left there; after a merge the disk has the image's length.

use super::record::{Kind, Record};
use super::{Change, Layer, State, Store};
use crate::types::Epoch;
use block::{Data, Result, Span};

/// The lengths after these layers.
fn after<'a>(mut lens: Vec<u64>, layers: impl IntoIterator<Item = &'a Layer>) -> Vec<u64> {
    for (volume, len) in layers.into_iter().flat_map(|l| &l.lens) {
        if let Some(l) = lens.get_mut(usize::from(*volume)) {
            *l = *len;
        }
    }
    lens
}

impl State {
    /// The primary's, as far as it has come.
    pub(super) fn open_lens(&self) -> Vec<u64> {
        after(self.lens.clone(), self.layers.iter().filter(|l| !l.committed))
    }

    /// Of the checkpoint that layer number `at` ends with, as soon as it is decided.
    pub(super) fn lens_once_committed(&self, at: usize) -> Vec<u64> {
        after(self.lens.clone(), self.layers.iter().take(at + 1).filter(|l| !l.committed))
    }

    /// Of the checkpoint to which these layers lead from the oldest that there is.
    pub(super) fn lens_after<'a>(&self, layers: impl IntoIterator<Item = &'a Layer>) -> Vec<u64> {
        after(self.base_lens.clone(), layers)
    }

    /// Up to where a checkpoint that can be had, or may be decided, reaches: behind it nothing has to be preserved.
    pub(super) fn reach(&self, volume: usize) -> u64 {
        let sealed = self.layers.len().saturating_sub(1);
        let layers = self.retained.iter().chain(self.layers.iter().take(sealed));
        let told = layers.flat_map(|l| &l.lens).filter(|l| usize::from(*l.0) == volume).map(|l| *l.1);
        let known = [&self.base_lens, &self.lens].into_iter().filter_map(|l| l.get(volume).copied());
        told.chain(known).max().unwrap_or(u64::MAX)
    }
}

impl Store {
    /// Lengths of the volumes, as this side's users see them.
    pub fn lens(&self) -> Vec<u64> {
        self.state.borrow().lens.clone()
    }

    /// Those of the disks beneath.
    pub(crate) fn disk_lens(&self) -> Vec<u64> {
        self.volumes.iter().map(|v| v.len()).collect()
    }

    /// Those of a checkpoint that is kept.
    pub fn lens_at(&self, epoch: Epoch) -> Vec<u64> {
        let s = self.state.borrow();
        s.lens_after(s.committed_through(self.engine, epoch))
    }

    /// A volume has another length from here on in the order of the changes; the disk can take it when this is done.
    ///
    /// # Errors
    /// Of the log or a disk; the open epoch must not be decided then.
    pub async fn resize(&self, volume: u16, len: u64) -> Result<()> {
        let _one = self.intake.acquire(1).await;
        self.still_secondary()?;
        self.resize_next(volume, len).await
    }

    /// The caller keeps changes out.
    pub(super) async fn resize_next(&self, volume: u16, len: u64) -> Result<()> {
        let v = self.volume(volume)?;
        let (before, disk) = (self.state.borrow().open_lens()[usize::from(volume)], v.len());
        if len > disk {
            v.resize(len).await?;
            v.flush().await?;
        }
        let left = Span::between(before.min(len), len.min(disk).max(before.min(len)));
        if !left.is_empty() && !env::bugs::planted("replication: what was left behind the end is shown") {
            self.keep_next(&[Change { volume, at: left, data: Data::empty() }]).await?;
        }
        let turn = self.log.turn().await;
        let record =
            Record { kind: Kind::Resize, volume, at: Span::default(), number: len, payload: Data::empty() };
        self.log.append(&turn, &[record], 0).await?;
        if let Some(open) = self.state.borrow_mut().layers.back_mut() {
            open.lens.insert(volume, len);
        }
        Ok(())
    }

    /// A merge is nearly done: what is behind the image's end is nobody's.
    pub(super) async fn cut_disks(&self) -> Result<()> {
        for (v, len) in self.volumes.iter().zip(self.lens()) {
            if v.len() > len {
                v.resize(len).await?;
            }
        }
        Ok(())
    }
}
