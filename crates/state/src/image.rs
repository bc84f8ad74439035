//! The store's file as the database sees it: bytes in memory, and a record of what was done to them.
//!
//! The database (redb) is synchronous, and everything else here is not: it works on a copy of its file in memory, and the
//! calls it made are carried out on the real file afterwards, in the same order and with the same barriers
//! (`store.rs`). So a crash finds the file as it would find it had the database written there itself, in the simulator as
//! in the real world, and no thread ever blocks. Stores are small: some kilobytes for each node, export and job.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A call of the database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    /// These bytes at this offset.
    Write(u64, Vec<u8>),
    /// The file has this length.
    SetLen(u64),
    /// All calls before are durable before any call after it.
    Sync,
}

/// Largest store: far above what thousands of nodes take, and what is held in memory at most.
pub(crate) const MAX_STORE: u64 = 256 << 20;

#[derive(Debug, Default)]
struct Inner {
    bytes: Vec<u8>,
    calls: Vec<Call>,
}

/// The file in memory; clones are the same.
#[derive(Clone, Debug, Default)]
pub(crate) struct Image(Arc<Mutex<Inner>>);

impl Image {
    pub(crate) fn new(bytes: Vec<u8>) -> Image {
        Image(Arc::new(Mutex::new(Inner { bytes, calls: Vec::new() })))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The calls since the last time.
    pub(crate) fn take_calls(&self) -> Vec<Call> {
        std::mem::take(&mut self.inner().calls)
    }

    /// All of it, as calls that write it anew: blocks that hold something, and the length.
    pub(crate) fn whole(&self) -> Vec<Call> {
        const BLOCK: usize = 64 << 10;
        let inner = self.inner();
        let mut calls = vec![Call::SetLen(inner.bytes.len() as u64)];
        for (i, block) in inner.bytes.chunks(BLOCK).enumerate() {
            if !block::is_zero(block) {
                calls.push(Call::Write((i * BLOCK) as u64, block.to_vec()));
            }
        }
        calls.push(Call::Sync);
        calls
    }

    fn range(inner: &Inner, offset: u64, len: usize) -> io::Result<std::ops::Range<usize>> {
        let start = usize::try_from(offset).ok();
        let range = start.and_then(|s| Some(s..s.checked_add(len)?));
        range
            .filter(|r| r.end <= inner.bytes.len())
            .ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))
    }
}

impl redb::StorageBackend for Image {
    fn len(&self) -> io::Result<u64> {
        Ok(self.inner().bytes.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let inner = self.inner();
        let range = Image::range(&inner, offset, out.len())?;
        out.copy_from_slice(&inner.bytes[range]);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if len > MAX_STORE {
            return Err(io::Error::other(format!("the store would be larger than {} MiB", MAX_STORE >> 20)));
        }
        let mut inner = self.inner();
        // bounded by MAX_STORE
        inner.bytes.resize(usize::try_from(len).unwrap_or(usize::MAX), 0);
        inner.calls.push(Call::SetLen(len));
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.inner().calls.push(Call::Sync);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut inner = self.inner();
        let range = Image::range(&inner, offset, data.len())?;
        inner.bytes[range].copy_from_slice(data);
        inner.calls.push(Call::Write(offset, data.to_vec()));
        Ok(())
    }
}
