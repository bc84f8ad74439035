//! What a peer missed is sent to it as it is now, in the order of addresses, once (L6), inside one open epoch (L5).
//!
//! What must stay true: a piece is read and queued under the lock of its range, so it never overtakes a newer change.

use super::super::link::Outgoing;
use super::{PrimaryGroup, change};
use crate::primary::Input;
use crate::wire::crc_of;
use bitmap::Bitmap;
use block::{Data, Kind, Result, Span};
use copy::Owner;
use graph::Edge;
use std::rc::Rc;

/// Bytes of one piece.
const PIECE: u64 = 256 * 1024;
/// It waits while so much is queued, so that the guest's own changes do not wait behind it.
const SYNC_AHEAD: u64 = 4 << 20;

impl PrimaryGroup {
    /// Sends what a peer missed, as it is now, in the order of addresses, once (L6).
    pub(super) async fn sync(self: &Rc<Self>, number: usize, session: Rc<Outgoing>, work: Vec<Bitmap>) {
        for (volume, bits) in work.iter().enumerate() {
            let (Some(disk), Some(locks)) = (self.disks.get(volume), self.locks.get(volume)) else {
                continue;
            };
            let volume = u16::try_from(volume).unwrap_or(u16::MAX);
            for at in bits.areas(Span::new(0, disk.len()), PIECE) {
                self.until_queued(number, &session, SYNC_AHEAD).await;
                let mut ticket = locks.request(at, Owner::Copy { bulk: true });
                ticket.held().await;
                let same = self.session(number).is_some_and(|s| Rc::ptr_eq(&s, &session));
                if !same || session.is_closing() {
                    return;
                }
                let data = match current(disk, at).await {
                    Ok(data) => data,
                    Err(e) => {
                        return self.break_sessions(&format!("reading {at} for a catch-up failed: {e}"));
                    }
                };
                let crc = data.as_ref().map_or(0, crc_of);
                let same = self.session(number).is_some_and(|s| Rc::ptr_eq(&s, &session));
                if !same || !self.core.borrow_mut().admit_catch_up(number, volume, at, crc) {
                    return;
                }
                let body = change(volume, at, data, crc, true);
                if let Some(p) = self.peers.borrow().get(number) {
                    p.caught_up.set(p.caught_up.get() + at.len);
                }
                session.push(&self.look(|c| c.frame(c.last(), c.open_epoch(), body)));
                drop(ticket);
                // A disk in the host's cache answers at once: others have their turn nevertheless.
                self.env.yield_now().await;
            }
        }
        if self.session(number).is_some_and(|s| Rc::ptr_eq(&s, &session)) {
            self.step(Input::SyncDone(number));
        }
    }
}

/// What is at `at` now; nothing if it reads as zeroes. What the disk knows to be zero is not read.
pub(super) async fn current(disk: &Edge, at: Span) -> Result<Option<Data>> {
    let known = disk.extents(at).await?;
    if !known.is_empty() && known.iter().all(|e| e.kind == Kind::Zero) {
        return Ok(None);
    }
    let data = disk.read(at).await?;
    Ok((!data.is_zero()).then_some(data))
}
