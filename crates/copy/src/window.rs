//! How much is in flight, in what pieces, and how fast.
//!
//! Pieces tune themselves: large while much is dirty, down to one granule when nearly in sync; short while a guest is
//! active, so that its requests find the thread free. A rate limit works as a debt: each piece started adds the time
//! it may take at the limit, and no piece starts before the debt is paid.

use std::time::Duration;

/// Largest piece copied at once: with [`MAX_IN_FLIGHT`] of them a window of 16 MiB is full, and a larger one gains nothing
/// where both sides are in the page cache.
pub const MAX_PIECE: u64 = 1 << 20;
/// Largest piece while a guest is active and copies are quick: some 50 µs of copying into new pages, the most that a guest's
/// request waits for the thread because of one copy.
pub const MAX_PIECE_GUEST: u64 = 64 << 10;
/// The same where copies are not quick: they wait for something else than this thread, and more of them for each byte would
/// only make the wait longer.
const MAX_SLOW_PIECE_GUEST: u64 = 256 << 10;
/// Smaller pieces pass through the thread: what a guest changes in a disk that is nearly in sync is copied sooner without the
/// hop to another thread, and seen to be zero if it is.
pub(crate) const OFFLOAD_LEAST: u64 = 256 << 10;
/// Most copies in flight.
pub const MAX_IN_FLIGHT: u32 = 16;
/// Most copies in flight while a guest is active and copies are quick, that is: cost the thread and not waiting.
pub(crate) const MAX_IN_FLIGHT_GUEST: u32 = 8;
/// Most copies in flight that are left to the host while a guest is active ([`crate::Policy::hurries`]), beside those above. More of them
/// gain nothing, and hold the locks of files that the guest's requests need, too.
pub(crate) const MAX_BESIDE_GUEST: u32 = 1;
/// Most comparisons in flight, and copies beside them, where they are quick: what is compared passes through memory three times, and
/// few buffers, used again and again, stay near the processor.
pub(crate) const MAX_CHECKS: u32 = 4;
/// Copies that take at least so long wait for a device or network, not for this thread.
const SLOW_COPY: Duration = Duration::from_millis(2);
/// Most bytes known to be zero that are made zero on the target as one piece.
pub(crate) const MAX_ZERO_PIECE: u64 = 1 << 30;
/// A rate limit is met over slices of this length.
const SLICE: Duration = Duration::from_millis(100);

/// The window of one engine.
pub(crate) struct Window {
    limit: u64,
    max_piece: u64,
    granularity: u64,
    average: Duration,
    owes_until: Duration,
    speed: u64,
    chunk: u64,
    max_copies: u32,
}

impl Window {
    /// For `limit` bytes in flight; no piece is larger than `max_transfer` (0: no limit).
    pub(crate) fn new(limit: u64, granularity: u64, max_transfer: u64) -> Window {
        let most = if max_transfer == 0 { MAX_PIECE } else { max_transfer.min(MAX_PIECE) };
        let max_piece = most.min(limit.max(granularity)).max(granularity) & !(granularity - 1);
        let limit = limit.max(max_piece);
        Window {
            limit,
            max_piece,
            granularity,
            average: Duration::ZERO,
            owes_until: Duration::ZERO,
            speed: 0,
            chunk: 0,
            max_copies: MAX_IN_FLIGHT,
        }
    }

    /// At most `copies` in flight, in pieces of at most `piece` bytes; 0 leaves each as it is.
    pub(crate) fn set_most(&mut self, copies: u32, piece: u64) {
        if copies > 0 {
            self.max_copies = copies.min(MAX_IN_FLIGHT);
        }
        if piece > 0 {
            self.max_piece = self.max_piece.min(piece).max(self.granularity) & !(self.granularity - 1);
        }
    }

    /// Pieces under a rate limit are so long, and none is shortened because little is left.
    pub(crate) fn set_chunk(&mut self, bytes: u64) {
        self.chunk = bytes;
    }

    /// Largest piece now.
    pub(crate) fn piece(&self, dirty: u64, guest_active: bool) -> u64 {
        let mut most = self.max_piece;
        if guest_active {
            most = most.min(self.guest_piece());
        }
        if self.chunk > 0 {
            let most = if self.speed > 0 { most.min(self.chunk) } else { most };
            return (most & !(self.granularity - 1)).max(self.granularity);
        }
        if self.speed > 0 {
            most = most.min(self.speed / 10);
        }
        (most.min(dirty / 16) & !(self.granularity - 1)).max(self.granularity)
    }

    /// Largest piece while a guest is active.
    pub(crate) fn guest_piece(&self) -> u64 {
        if self.is_quick() { MAX_PIECE_GUEST } else { MAX_SLOW_PIECE_GUEST }
    }

    /// Whether one more piece may start; with `few` no more than so many in all as long as copies are quick.
    pub(crate) fn has_room(&self, copies: u32, copying: u64, few: Option<u32>) -> bool {
        let most = few.filter(|_| self.is_quick()).unwrap_or(MAX_IN_FLIGHT);
        copies < most.min(self.max_copies) && (copies == 0 || copying + self.granularity <= self.limit)
    }

    /// Whether copies cost this thread, and do not wait for a device or network.
    fn is_quick(&self) -> bool {
        self.average < SLOW_COPY
    }

    /// A piece has taken so long.
    pub(crate) fn took(&mut self, time: Duration) {
        self.average = (self.average * 7 + time) / 8;
    }

    /// Follows the limit that applies now; a changed one starts without debt.
    pub(crate) fn set_speed(&mut self, speed: u64, now: Duration) {
        if speed != self.speed {
            self.speed = speed;
            self.owes_until = now;
        }
    }

    /// When the next piece may start, if not now.
    pub(crate) fn not_before(&self, now: Duration) -> Option<Duration> {
        (self.speed > 0 && self.owes_until > now).then_some(self.owes_until)
    }

    /// A piece of `bytes` has started.
    pub(crate) fn pay(&mut self, bytes: u64, now: Duration) {
        if self.speed > 0 {
            let cost = Duration::from_secs_f64((bytes as f64 / self.speed as f64).min(1e9));
            // time not used is lost, but for what rounding to slices would give back
            self.owes_until = self.owes_until.max(now.saturating_sub(SLICE)) + cost;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_shrink_towards_the_end_and_for_the_guest() {
        let w = Window::new(16 << 20, 65536, 0);
        assert_eq!(w.piece(1 << 40, false), MAX_PIECE);
        assert_eq!(w.piece(1 << 40, true), MAX_PIECE_GUEST);
        let mut slow = Window::new(16 << 20, 65536, 0);
        (0..8).for_each(|_| slow.took(2 * SLOW_COPY));
        assert_eq!((slow.piece(1 << 40, true), slow.has_room(15, 0, Some(4))), (MAX_SLOW_PIECE_GUEST, true));
        assert_eq!(w.piece(4 << 20, false), 256 << 10);
        assert_eq!(w.piece(65536, false), 65536);
        assert_eq!(Window::new(0, 65536, 0).piece(1 << 40, false), 65536);
        assert_eq!(Window::new(16 << 20, 4 << 20, 0).piece(1 << 40, false), 4 << 20);
        assert_eq!(Window::new(16 << 20, 4096, 100_000).piece(1 << 40, false), 98304);
    }

    #[test]
    fn window_counts_pieces_and_bytes() {
        let w = Window::new(1 << 20, 65536, 0);
        assert!(w.has_room(0, 0, None) && w.has_room(15, 15 * 65536, None));
        assert!(!w.has_room(16, 0, None));
        assert!(!w.has_room(1, 1 << 20, None));
        assert!(!w.has_room(MAX_IN_FLIGHT_GUEST, 0, Some(MAX_IN_FLIGHT_GUEST)));
    }

    #[test]
    fn rate_holds_over_time_and_a_change_wakes() {
        let ms = Duration::from_millis;
        let mut w = Window::new(16 << 20, 65536, 0);
        let mut now = ms(1000);
        w.set_speed(1 << 20, now);
        let mut copied = 0;
        while now < ms(11_000) {
            match w.not_before(now) {
                Some(t) => now = t,
                None => {
                    let n = w.piece(1 << 40, false);
                    w.pay(n, now);
                    copied += n;
                }
            }
        }
        assert!((10 << 20..=(10 << 20) + (1 << 18)).contains(&copied), "{copied} in 10 s at 1 MiB/s");
        w.pay(100 << 20, now);
        assert!(w.not_before(now).is_some());
        w.set_speed(2 << 20, now);
        assert!(w.not_before(now).is_none());
    }
}
