//! What a primary does not to serve beside a newer owner: it asks before it serves, and stands at a door where others find it.
//!
//! What can happen: it was succeeded while it was down; whoever succeeded it listens or calls, or is down itself. What must stay true: a primary
//! that comes back serves nobody before each secondary that it knows has said whether it knows a newer owner, or could not be reached
//! within the time-out; then what the group's policy says of a link that is lost holds (L1, L2). Once fenced, it is fenced across restarts.

use super::PrimaryGroup;
use crate::primary::PeerState;
use crate::session::door::Door;
use crate::types::Generation;
use crate::wire::{Hello, Reject};
use block::Result;
use env::TaskHandle;
use env::sync::race;
use std::rc::Rc;

impl PrimaryGroup {
    /// Other owners find this one there from now on, until it is stopped or this is called off.
    pub(in crate::session) fn stand_at(self: &Rc<Self>, door: Door) -> TaskHandle {
        let group = self.clone();
        self.env.spawn("replication door", async move {
            let stop = group.stop.wait();
            if !group.stopped.get() {
                race(door.keep(&group), stop).await;
            }
        })
    }

    /// Another owner came; what it is to be told.
    pub(in crate::session) fn meet(self: &Rc<Self>, hello: &Hello) -> (Reject, String) {
        let mut out = Vec::new();
        let told = self.core.borrow_mut().meet(hello, &mut out);
        out.into_iter().for_each(|o| self.carry_out(o));
        told
    }

    /// Something went wrong.
    pub(in crate::session) fn note(&self, what: String) {
        *self.last_error.borrow_mut() = Some(what);
    }

    /// Users wait until the peers that are known by now have said whether there is a newer owner, within the time-out.
    pub(in crate::session) fn ask_first(self: &Rc<Self>) {
        if env::bugs::planted("replication: who comes back serves at once") {
            return;
        }
        self.uncertain.set(true);
        let group = self.clone();
        self.env.spawn("replication asks", async move {
            let asking = async {
                loop {
                    let progress = group.progress.wait();
                    let peers = group.peers.borrow().iter().all(|p| p.asked.get() || p.removed.get());
                    if peers || group.stopped.get() || group.look(|c| c.fenced().is_some()) {
                        return;
                    }
                    progress.await;
                }
            };
            group.env.timeout(group.timeout.get(), asking).await;
            group.uncertain.set(false);
            group.progress.notify_all();
        });
    }

    /// Whether users wait for what the peers say.
    pub fn is_uncertain(&self) -> bool {
        self.uncertain.get()
    }

    /// A peer has said something, or could not be reached.
    pub(super) fn was_asked(&self, number: usize, reached: bool) {
        let said = |s: PeerState| !matches!(s, PeerState::Down | PeerState::Connecting);
        if let Some(p) = self.peers.borrow().get(number)
            && (!reached || self.look(|c| c.peers().get(number).is_some_and(|p| said(p.state))))
            && !p.asked.replace(true)
        {
            self.progress.notify_all();
        }
    }

    /// Waits until it is known whether there is a newer owner, as far as that can be known.
    ///
    /// # Errors
    /// `Io` when fenced.
    pub(super) async fn may_serve(&self) -> Result<()> {
        while self.uncertain.get() {
            let progress = self.progress.wait();
            if self.uncertain.get() {
                progress.await;
            }
        }
        self.unfenced()
    }

    /// Nobody is served any more, by a later process neither.
    pub(super) fn stays_fenced(self: &Rc<Self>, by: Generation) {
        let group = self.clone();
        self.env.spawn("replication fence", async move {
            if let Err(e) = group.activity.fence(by).await {
                group.note(format!("it is not recorded that this side is fenced: {e}"));
            }
        });
    }
}
