//! When a client may be held for the rest of a comparison: once that is short, and it is made short if it does not become so.

use copy::Work;
use env::Env;
use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

/// Bytes left to be compared at which clients are held: what two processors read of both sides and hash in some 20 ms, and
/// a link of 10 Gbit/s brings in as much again.
const HOLD_STALE: u64 = 16 << 20;
/// How long it is waited for that before clients are slowed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(2);
/// Share of the rate of comparing that slowed clients may change.
const GUEST_SHARE: f64 = 0.5;

/// The end of a comparison under writing clients.
pub(crate) struct Rest {
    env: Env,
    work: Rc<Work>,
    since: Cell<Duration>,
    compared_then: Cell<u64>,
}

impl Rest {
    pub(crate) fn new(env: Env, work: Rc<Work>) -> Rest {
        Rest { env, work, since: Cell::new(Duration::ZERO), compared_then: Cell::new(0) }
    }

    /// From now on the rest is waited for.
    pub(crate) fn begin(&self) {
        self.since.set(self.env.now());
        self.compared_then.set(self.work.proof().map_or(0, |p| p.compared()));
    }

    /// Whether `stale` bytes can be compared while clients are held. If they change more than can be compared they are slowed until
    /// that is so: to half of what is compared, so that each pass leaves less than the one before.
    pub(crate) fn is_short(&self, stale: u64) -> bool {
        if stale <= HOLD_STALE {
            return true;
        }
        let waited = self.env.now().saturating_sub(self.since.get());
        if waited > PATIENCE
            && let Some(proof) = self.work.proof()
        {
            let compared = proof.compared().saturating_sub(self.compared_then.get());
            let limit = compared as f64 / waited.as_secs_f64() * GUEST_SHARE;
            self.work.limit_guest((limit as u64).max(proof.unit()));
        }
        false
    }
}
