//! Another length of a disk (D5): the secondaries grow first, then this side; their users see it with the next checkpoint.
//!
//! What can happen: a secondary is away, refuses, or goes in the middle; this side's disk does not grow; a crash between. What must stay
//! true: no checkpoint is made before it is known whether it comes about; this side is never longer than a secondary that it counts on can
//! be; where it does not come about, what was prepared is given up with the session, and a disk is at most longer than what is shown of it.

use super::PrimaryGroup;
use crate::primary::{Output, PeerState};
use crate::types::Seq;
use block::{BlockError, ErrorKind, Prealloc, Result};
use std::rc::Rc;

fn refused(why: impl Into<String>) -> BlockError {
    BlockError::new(ErrorKind::Busy, why)
}

/// A resize whose end is not known.
struct Undecided<'a>(&'a Rc<PrimaryGroup>);

impl Drop for Undecided<'_> {
    fn drop(&mut self) {
        self.0.core.borrow_mut().resize_ends();
        // a catch-up may have ended meanwhile, and waits to be committed
        if self.0.look(|c| c.peers().iter().any(|p| p.state == PeerState::Synced)) {
            self.0.carry_out(Output::WantCheckpoint);
        }
    }
}

impl PrimaryGroup {
    /// Makes a disk longer, on all sides. The caller keeps requests of users out.
    ///
    /// # Errors
    /// A shorter length; a secondary that is not connected, or cannot have that length; of the disk here. All is as before then.
    pub async fn resize(self: &Rc<Self>, volume: u16, len: u64) -> Result<()> {
        self.may_serve().await?;
        let disk = self.disk(volume)?;
        let before = disk.len();
        if len == before {
            return Ok(());
        }
        if len < before {
            let why =
                "a replicated disk is not made shorter: remove the group, resize all sides, and add it again";
            return Err(BlockError::unsupported(why));
        }
        if let Err(away) = self.look(|c| c.all_have(Seq(0))) {
            return Err(refused(format!(
                "secondary '{}' is not connected, and could not follow",
                self.name_of(away)
            )));
        }
        self.activity.grow(volume, len)?;
        // no wait between the number and the queues
        let frame = self.core.borrow_mut().admit_resize(volume, len)?;
        let _undecided = Undecided(self);
        self.each_session(|s| s.push(&frame));
        self.ask_durable();
        let grown = match self.until_all_have(frame.seq).await {
            Ok(()) => disk.resize(len, Prealloc::Off).await,
            Err(e) => Err(e),
        };
        if let Err(e) = grown {
            self.core.borrow_mut().not_resized(volume, before);
            self.break_sessions(&format!("the disk was not resized: {e}"));
            return Err(e);
        }
        // a power loss does not make it shorter than a checkpoint of it
        disk.flush().await
    }

    fn name_of(&self, peer: usize) -> String {
        self.peers.borrow().get(peer).map_or_else(String::new, |p| p.name.clone())
    }

    async fn until_all_have(&self, seq: Seq) -> Result<()> {
        if env::bugs::planted("replication: the primary's disk grows first") {
            return Ok(());
        }
        let wait = async {
            loop {
                let progress = self.progress.wait();
                self.unfenced()?;
                match self.look(|c| c.all_have(seq)) {
                    Ok(true) => return Ok(()),
                    // one that refused is gone, as is one whose connection broke
                    Err(gone) => {
                        let why = self.last_error().unwrap_or_default();
                        return Err(refused(format!(
                            "secondary '{}' does not follow: {why}",
                            self.name_of(gone)
                        )));
                    }
                    Ok(false) => progress.await,
                }
            }
        };
        let late = || refused("the secondaries have not followed in time");
        self.env.timeout(self.timeout.get(), wait).await.unwrap_or_else(|| Err(late()))
    }
}
