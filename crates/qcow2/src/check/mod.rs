//! Consistency check of an image, and its repair.
//!
//! The check follows every reference from the header (active L1, snapshots, bitmaps, the refcount structures themselves), counts
//! how often each cluster is used, and compares with the refcounts in the image. *Corruption*: a cluster is used more often
//! than it is counted (it may be given away and overwritten), an entry cannot be right, a COPIED flag lies, metadata lies on
//! something else. *Leak*: it is counted more often than used; space is lost, nothing else.
//!
//! What must stay true: time and memory depend on the metadata that is really there, not on what the fields claim (tables
//! used many times are read once and counted many times; counters exist only where references are); a repair never makes
//! things worse when it is cut off: references are mended first, then refcounts, then COPIED flags, with barriers between,
//! and the dirty and corrupt marks go last.

mod refs;
mod repair;
mod walk;

use crate::header::Header;
use crate::storage::Storage;
use block::{Result, Span};
use std::fmt;

/// Messages kept in a [`Report`]; more are only counted. A broken table can give one a cluster.
pub const MAX_MESSAGES: usize = 1000;

/// What to repair.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Fix {
    /// Look only.
    #[default]
    Nothing,
    /// Give leaked clusters back. Done only where every reference could be followed, since clusters behind a broken
    /// reference look leaked.
    Leaks,
    /// Everything: entries that cannot be right are mended or dropped, refcounts and flags set right.
    All,
}

/// What was found. Counts as in the reference's `check` output.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Report {
    /// Things that are wrong now.
    pub corruptions: u64,
    /// Of these, COPIED flags that disagree with the count of a cluster that has one user: nothing can come of it but a copy
    /// too many. A crash while a version 2 image gets or loses a snapshot leaves such.
    pub idle_flags: u64,
    /// Clusters counted more often than used, now.
    pub leaks: u64,
    /// Places that could not be read.
    pub check_errors: u64,
    /// Wrong things that were repaired.
    pub corruptions_fixed: u64,
    /// Leaks that were repaired.
    pub leaks_fixed: u64,
    /// Clusters of the guest's disk.
    pub total_clusters: u64,
    /// Of these, how many have a place.
    pub allocated_clusters: u64,
    /// Of these, how many do not follow the one before.
    pub fragmented_clusters: u64,
    /// Of these, how many are compressed.
    pub compressed_clusters: u64,
    /// End of the last cluster in use.
    pub image_end_offset: u64,
    /// What exactly; at most [`MAX_MESSAGES`].
    pub messages: Vec<String>,
}

impl Report {
    /// Nothing wrong, nothing leaked, everything readable.
    pub fn is_clean(&self) -> bool {
        self.corruptions == 0 && self.leaks == 0 && self.check_errors == 0
    }

    fn say(&mut self, text: fmt::Arguments<'_>) {
        if self.messages.len() < MAX_MESSAGES {
            self.messages.push(text.to_string());
        }
    }

    fn corrupt(&mut self, text: fmt::Arguments<'_>) {
        self.corruptions += 1;
        self.say(text);
    }

    fn leak(&mut self, text: fmt::Arguments<'_>) {
        self.leaks += 1;
        self.say(text);
    }

    fn unreadable(&mut self, text: fmt::Arguments<'_>) {
        self.check_errors += 1;
        self.say(text);
    }
}

/// Reads and parses the header of an image.
///
/// # Errors
/// As [`Header::parse`], or the storage's.
pub async fn read_header<S: Storage>(storage: &S) -> Result<Header> {
    let probe = storage.read(Span::new(0, crate::header::PROBE_LEN.min(storage.len()))).await?;
    let len = crate::header::first_cluster_len(&probe)?.min(storage.len());
    Header::parse(&storage.read(Span::new(0, len)).await?)
}

/// Checks an image that nobody else is using, and repairs it as `fix` says.
///
/// # Errors
/// If the header cannot be read or parsed, or a repair cannot be written. What is wrong further in is counted in the report.
pub async fn check<S: Storage>(storage: &S, fix: Fix) -> Result<Report> {
    match fix {
        Fix::Nothing => Ok(walk::inspect(storage).await?.report),
        fix => repair::repair(storage, fix).await,
    }
}
