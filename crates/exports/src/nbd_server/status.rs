//! What a client learns of an export beside its bytes: block sizes and metadata contexts.

use super::session::Session;
use crate::export::Export;
use bitmap::Bitmap;
use block::{BlockError, Limits, Result, Span};
use copy::digest::leaf_hash;
use nbd::proto::{MAX_PAYLOAD, MAX_STATUS_EXTENTS, PREFERRED_BLOCK, state};
use nbd::{StatusExtent, leaf};

/// Id of `base:allocation`: always offered.
const ALLOCATION: u32 = 0;

/// Names of the contexts of an export; the index is the id.
pub(super) fn contexts(export: &Export) -> Vec<String> {
    let mut v = vec!["base:allocation".to_owned()];
    if export.options().allocation_depth {
        v.push("qemu:allocation-depth".to_owned());
    }
    v.extend(export.bitmaps().iter().map(|b| format!("qemu:dirty-bitmap:{}", b.name())));
    v.push(leaf::CONTEXT.to_owned());
    v
}

/// Number of the bitmap that the context `id` shows.
fn bitmap_index(export: &Export, id: u32) -> Option<usize> {
    (id as usize).checked_sub(1 + usize::from(export.options().allocation_depth))
}

/// Smallest, preferred and largest request.
pub(super) fn block_sizes(l: &Limits) -> (u32, u32, u32) {
    let min = l.request_alignment.clamp(1, u64::from(PREFERRED_BLOCK)) as u32;
    let max = if l.max_transfer == 0 { MAX_PAYLOAD } else { l.max_transfer.min(MAX_PAYLOAD) };
    (min, PREFERRED_BLOCK.max(min), (max as u32 & !(min - 1)).max(min))
}

/// The extents of `span` in each of `contexts`; one extent each if `one`.
pub(super) async fn query(
    s: &Session,
    span: Span,
    contexts: &[u32],
    one: bool,
) -> Result<Vec<(u32, Vec<StatusExtent>)>> {
    let limit = if one { 1 } else { MAX_STATUS_EXTENTS };
    let export = s.export();
    let of_blocks = |id: &&u32| bitmap_index(export, **id).is_none();
    let blocks: Vec<u32> = contexts.iter().filter(of_blocks).copied().collect();
    let mut lists =
        if blocks.is_empty() { Vec::new() } else { allocation(export, span, &blocks, limit).await? }
            .into_iter();
    let is_leaf = |id: &u32| bitmap_index(export, *id) == Some(export.bitmaps().len());
    let mut hashes = match contexts.iter().any(is_leaf) {
        true => leaves(s, span).await?,
        false => Vec::new(),
    };
    let list = |id: &u32| match bitmap_index(export, *id) {
        Some(_) if is_leaf(id) => Some((*id, std::mem::take(&mut hashes))),
        Some(i) => Some((*id, dirty(&export.bitmaps().get(i)?.bits(), span, limit))),
        None => lists.next(),
    };
    Ok(contexts.iter().filter_map(list).collect())
}

/// The hashes of the leaves that `span` consists of, from its start.
async fn leaves(s: &Session, span: Span) -> Result<Vec<StatusExtent>> {
    let (at, _) = span.split_at(leaf::MOST * leaf::LEN);
    if !leaf::is_whole(at, s.export().size()) {
        return Err(BlockError::invalid(format!(
            "hashes are told of whole leaves of {} bytes only",
            leaf::LEN
        )));
    }
    let data = s.export().edge().read(at).await?;
    let mode = s.mode();
    s.env()
        .offload(move || {
            let mut list = Vec::new();
            for piece in at.pieces(leaf::LEN) {
                let from = (piece.start - at.start) as usize;
                leaf::encode(mode, piece.len, &leaf_hash(&data.slice(from, piece.len as usize)), &mut list);
            }
            list
        })
        .await
}

/// What is dirty in `span`, covering it from its start.
fn dirty(bits: &Bitmap, span: Span, limit: usize) -> Vec<StatusExtent> {
    let mut list = Extents::new(limit);
    let mut at = span.start;
    while at < span.end() && !list.full {
        let is_dirty = bits.get(at);
        let next = if is_dirty { bits.next_clean(at) } else { bits.next_dirty(at) };
        let end = next.unwrap_or(span.end()).min(span.end());
        list.push(end - at, if is_dirty { state::DIRTY } else { 0 });
        at = end;
    }
    list.list
}

/// What the layers of the disk say of `span`, for each of `contexts`.
async fn allocation(
    export: &Export,
    span: Span,
    contexts: &[u32],
    limit: usize,
) -> Result<Vec<(u32, Vec<StatusExtent>)>> {
    let mut lists: Vec<(u32, Extents)> = contexts.iter().map(|id| (*id, Extents::new(limit))).collect();
    let mut left = span;
    while !left.is_empty() && lists.iter().any(|(_, l)| !l.full) {
        let runs = export.edge().status(left).await?;
        let before = left;
        for run in runs {
            let allocation = if run.reads_zero() { state::HOLE | state::ZERO } else { 0 };
            for (id, list) in &mut lists {
                list.push(run.span.len, if *id == ALLOCATION { allocation } else { u64::from(run.depth) });
            }
            left = left.split_at(run.span.len).1;
        }
        if left == before {
            return Err(BlockError::corrupt("a disk says nothing of a part of itself"));
        }
    }
    Ok(lists.into_iter().map(|(id, l)| (id, l.list)).collect())
}

/// A list that joins equal neighbours and takes no more once it is full.
struct Extents {
    list: Vec<StatusExtent>,
    limit: usize,
    full: bool,
}

impl Extents {
    fn new(limit: usize) -> Extents {
        Extents { list: Vec::new(), limit, full: false }
    }
    fn push(&mut self, len: u64, flags: u64) {
        if self.full {
            return;
        }
        let count = self.list.len();
        match self.list.last_mut() {
            Some(last) if last.flags == flags => last.len += len,
            _ if count == self.limit => self.full = true,
            _ => self.list.push(StatusExtent { len, flags }),
        }
    }
}
