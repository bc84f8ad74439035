//! Image locks on the host, as QEMU's tools take and respect them: byte-range locks that belong to the open file.
//!
//! Byte 100 + n is locked (shared) by whoever uses permission n, byte 200 + n by whoever does not share it, with n = 0
//! consistent read, 1 write, 2 write unchanged, 3 resize. Whoever wants permission n looks whether byte 200 + n is locked by
//! somebody else; whoever does not share it looks at byte 100 + n. What must stay true: locks are taken before they are looked
//! for, so that of two processes at least one sees the other; on failure nothing more is held than before.
//!
//! A process that was killed holds its locks for a little longer than it lives: the kernel ends its requests behind it. Who starts a daemon again
//! at once finds them held; so it is tried for a moment.

use block::{BlockError, ErrorKind, Result};
use env::{Env, File, LockRange};
use graph::{Demand, Perms};
use std::cell::Cell;
use std::time::Duration;

/// How long others' locks are waited for, and how often they are looked for meanwhile.
const PATIENCE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_millis(10));

const USED: u64 = 100;
const NOT_SHARED: u64 = 200;
const EACH: [(Perms, u64, &str); 4] = [
    (Perms::CONSISTENT_READ, 0, "consistent read"),
    (Perms::WRITE, 1, "write"),
    (Perms::WRITE_UNCHANGED, 2, "write unchanged"),
    (Perms::RESIZE, 3, "resize"),
];

/// What is locked on one open file.
#[derive(Default)]
pub(crate) struct ImageLocks {
    used: Cell<Perms>,
    not_shared: Cell<Perms>,
}

impl ImageLocks {
    /// Locks what `demand` needs in addition to what is held.
    ///
    /// # Errors
    /// Others hold it, and not only for a moment; of the file.
    pub(crate) async fn acquire(&self, env: &Env, file: &dyn File, demand: Demand, path: &str) -> Result<()> {
        let used = demand.needs.without(self.used.get());
        let not_shared = Perms::ALL.without(demand.shares).without(self.not_shared.get());
        if used.is_empty() && not_shared.is_empty() {
            return Ok(());
        }
        let until = env.now() + PATIENCE.0;
        loop {
            let Err(e) = self.take_and_look(file, used, not_shared).await else {
                self.used.set(self.used.get().with(used));
                self.not_shared.set(self.not_shared.get().with(not_shared));
                return Ok(());
            };
            unlock(file, used, not_shared).await?;
            if e.errno() != BlockError::EAGAIN || env.now() >= until {
                return Err(e.with_hint(format!("Is another process using the image [{path}]?")));
            }
            env.sleep(PATIENCE.1).await;
        }
    }

    async fn take_and_look(&self, file: &dyn File, used: Perms, not_shared: Perms) -> Result<()> {
        for (perm, n, _) in EACH {
            for (set, base) in [(used, USED), (not_shared, NOT_SHARED)] {
                if set.has(perm) {
                    file.lock(LockRange { start: base + n, len: 1, exclusive: false }).await?;
                }
            }
        }
        for (perm, n, name) in EACH {
            if used.has(perm) && !free(file, NOT_SHARED + n).await? {
                return Err(refused(format!("Failed to get \"{name}\" lock")));
            }
            if not_shared.has(perm) && !free(file, USED + n).await? {
                return Err(refused(format!("Failed to get shared \"{name}\" lock")));
            }
        }
        Ok(())
    }

    /// Gives back what `demand` does not need.
    pub(crate) async fn release(&self, file: &dyn File, demand: Demand) -> Result<()> {
        let used = self.used.get().without(demand.needs);
        let not_shared = self.not_shared.get().common(demand.shares);
        if used.is_empty() && not_shared.is_empty() {
            return Ok(());
        }
        self.used.set(self.used.get().without(used));
        self.not_shared.set(self.not_shared.get().without(not_shared));
        unlock(file, used, not_shared).await
    }

    /// Takes everything that is held on another open file of the same image too, without looking: the right to it is ours
    /// already.
    pub(crate) async fn copy_to(&self, file: &dyn File) -> Result<()> {
        for (perm, n, _) in EACH {
            for (set, base) in [(self.used.get(), USED), (self.not_shared.get(), NOT_SHARED)] {
                if set.has(perm) {
                    file.lock(LockRange { start: base + n, len: 1, exclusive: false }).await?;
                }
            }
        }
        Ok(())
    }

    /// Unlocks everything on an open file whose locks another one has now ([`ImageLocks::copy_to`]). Closing alone does not: a
    /// request on its way in the kernel, or a process that was just forked, keeps the file open for a while.
    pub(crate) async fn leave(&self, file: &dyn File) -> Result<()> {
        unlock(file, self.used.get(), self.not_shared.get()).await
    }
}

async fn free(file: &dyn File, byte: u64) -> Result<bool> {
    file.can_lock(LockRange { start: byte, len: 1, exclusive: true }).await
}

async fn unlock(file: &dyn File, used: Perms, not_shared: Perms) -> Result<()> {
    for (perm, n, _) in EACH {
        for (set, base) in [(used, USED), (not_shared, NOT_SHARED)] {
            if set.has(perm) {
                file.unlock(base + n, 1).await?;
            }
        }
    }
    Ok(())
}

fn refused(message: String) -> BlockError {
    BlockError::new(ErrorKind::Busy, message).with_errno(BlockError::EAGAIN)
}
