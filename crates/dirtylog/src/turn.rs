//! Turns: what is written when, so that those who wait can go.
//!
//! A turn takes all who wait (as many as there is room for), writes one record that names their regions, and with it the
//! marks of the hot regions if there are many, and makes both durable with one barrier. So an idle region's marks are mostly
//! durable when its place is wanted, and a turn has one barrier. What must stay true: a record without a region is
//! written only after all marks of that region are durable; nobody goes before the record is.

use crate::DirtyLog;
use crate::kept::Write;
use crate::layout::{Hot, hot_slot};
use crate::log::{Durable, Ticket};
use block::{BlockError, Data, Result, Span};
use env::bugs::planted;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

/// Regions that nobody wrote to for so long leave the hot set: a crash puts in doubt what was written lately.
const IDLE: Duration = Duration::from_secs(5);
/// While somebody writes, or a job is at work on a set, a record is made at least every so many of these: it has the time.
const BEATS: u32 = 6;
/// See [`BEATS`].
pub const BEAT: Duration = Duration::from_secs(IDLE.as_secs() * BEATS as u64);
/// Bytes of adjoining sectors that are written at once.
const CHUNK: usize = 1 << 20;

impl DirtyLog {
    /// Works until there is nothing left that can be done now.
    pub(crate) async fn pump(self: Rc<Self>) {
        loop {
            let _turn = self.turn.acquire(1).await;
            let turn = match self.settled().await {
                Ok(()) => self.one_turn().await,
                Err(e) => Err(e),
            };
            match turn {
                Ok(true) => {}
                Ok(false) => break,
                Err(e) => {
                    self.fail(&e);
                    break;
                }
            }
        }
        // Nothing came in between: this is one step.
        self.pumping.set(false);
    }

    /// What users changed is durable, and the file has the header that we know: marks may be written in place.
    async fn settled(&self) -> Result<()> {
        while self.edited.get() || self.uncertain.get() {
            self.sync_now(None).await?;
        }
        Ok(())
    }

    /// Those who wait get the error.
    fn fail(&self, e: &BlockError) {
        let all = std::mem::take(&mut *self.waiting.borrow_mut());
        for t in all {
            *t.answer.borrow_mut() = Some(Err(e.clone()));
        }
        self.answered.notify_all();
    }

    fn grant(&self, ticket: &Ticket) -> bool {
        match self.admit(ticket.at) {
            Some(pass) => {
                *ticket.answer.borrow_mut() = Some(Ok(pass));
                true
            }
            None => false,
        }
    }

    /// Lets those go who can, in order.
    fn grant_first(&self) {
        let mut any = false;
        self.crowded.set(false);
        loop {
            let first = self.waiting.borrow().front().cloned();
            let Some(first) = first else { break };
            if !first.gone.get() && !self.grant(&first) {
                break;
            }
            any = true;
            self.waiting.borrow_mut().pop_front();
        }
        if any {
            self.answered.notify_all();
        }
    }

    async fn one_turn(&self) -> Result<bool> {
        self.grant_first();
        let waiting: Vec<Rc<Ticket>> =
            self.waiting.borrow().iter().filter(|t| !t.gone.get()).cloned().collect();
        let Some(first) = waiting.first() else {
            let shrunk = self.shrunk.take();
            if shrunk {
                self.shrink().await?;
            }
            // whoever came meanwhile has to be looked at
            return Ok(shrunk);
        };
        let mut wash: Vec<Span> = Vec::new();
        if self.regions.borrow().is_wide(first.at) {
            // Marked before it is written, whatever becomes of it; then it relies on durable marks.
            for k in self.kept.borrow().iter() {
                k.bitmap.record(first.at);
                k.bitmap.successor().iter().for_each(|s| s.record(first.at));
            }
            wash.push(first.at);
        }
        let choice = {
            let (r, kept) = (self.regions.borrow(), self.kept.borrow());
            let narrow = waiting.iter().map(|t| t.at).take_while(|at| !r.is_wide(*at));
            let durable = Durable(&kept);
            r.choose(narrow, &durable, durable.extra())
        };
        if choice.granted == 0 && wash.is_empty() && !choice.wash {
            // a write that ends goes on from here
            self.crowded.set(true);
            return Ok(false);
        }
        {
            let r = self.regions.borrow();
            if choice.wash || r.count() * 2 > r.geometry().most {
                wash.extend(r.hot().filter(|n| !choice.leave.contains(n)).map(|n| r.span(n)));
            }
        }
        self.regions.borrow_mut().retire(&choice.leave);
        if planted("dirtylog: writes go before the record") {
            self.regions.borrow_mut().join(&choice.join);
            self.grant_first();
        }
        let writes = self.sectors(&wash);
        let written: Result<()> = async {
            self.write_sectors(&writes).await?;
            match choice.granted {
                0 => self.barrier().await,
                _ => self.write_record(choice.join.clone()).await,
            }
        }
        .await;
        self.finish(&writes, written)?;
        self.regions.borrow_mut().join(&choice.join);
        self.grant_first();
        Ok(true)
    }

    /// The sectors that lack marks of `spans`, or have marks that are to go, as they are now.
    pub(crate) fn sectors(&self, spans: &[Span]) -> Vec<Write> {
        let marked = self.regions.borrow().marked();
        let mut out = Vec::new();
        for k in self.kept.borrow_mut().iter_mut() {
            let mut all = k.lossy.clone();
            spans.iter().for_each(|s| k.stale_sectors(*s, &mut all));
            out.extend(all.into_iter().filter_map(|i| k.write(i, &marked)));
        }
        out
    }

    pub(crate) async fn write_sectors(&self, writes: &[Write]) -> Result<()> {
        let pieces = writes.iter().map(|w| (w.at, w.bytes.as_slice()));
        self.write_pieces(pieces).await
    }

    /// Writes pieces, those that adjoin at once.
    pub(crate) async fn write_pieces<'a>(&self, pieces: impl Iterator<Item = (u64, &'a [u8])>) -> Result<()> {
        let mut run: Option<(u64, Vec<u8>)> = None;
        for (at, bytes) in pieces {
            match &mut run {
                Some((start, all)) if *start + all.len() as u64 == at && all.len() < CHUNK => {
                    all.extend_from_slice(bytes);
                }
                _ => {
                    if let Some((at, all)) = run.replace((at, bytes.to_vec())) {
                        self.file.write(at, Data::from(all)).await?;
                    }
                }
            }
        }
        match run {
            Some((at, all)) => self.file.write(at, Data::from(all)).await,
            None => Ok(()),
        }
    }

    /// The sectors are durable, or are to be written again.
    pub(crate) fn finish(&self, writes: &[Write], done: Result<()>) -> Result<()> {
        let mut kept = self.kept.borrow_mut();
        for w in writes {
            if let Some(k) = kept.iter_mut().find(|k| k.entry.id == w.id) {
                match done {
                    Ok(()) => k.written(w),
                    Err(_) => k.failed(w),
                }
            }
        }
        done
    }

    /// Records the hot regions and `more`, durably, with all that was written before.
    pub(crate) async fn write_record(&self, more: BTreeSet<u64>) -> Result<()> {
        let mut regions: BTreeSet<u64> = self.regions.borrow().hot().collect();
        regions.extend(more);
        let hot = Hot {
            sequence: self.hot_sequence.get(),
            opening: self.header.borrow().opening,
            wall: self.env.wall().as_secs(),
            regions: regions.into_iter().collect(),
        };
        // Whatever becomes of it, the next one is newer; it goes to the other slot only if this one is whole.
        self.hot_sequence.set(hot.sequence + 1);
        let slot = self.hot_slot.get();
        self.count(|f| f.records += 1);
        self.turns.set(self.turns.get() + 1);
        self.file.write(hot_slot(slot), Data::from(hot.encode())).await?;
        self.barrier().await?;
        self.hot_slot.set(slot + 1);
        Ok(())
    }

    /// Makes what is hot durable, with a turn taken.
    async fn wash(&self) -> Result<()> {
        let all: Vec<Span> = self.hot_regions();
        let writes = self.sectors(&all);
        let written: Result<()> = async {
            self.write_sectors(&writes).await?;
            if writes.is_empty() { Ok(()) } else { self.barrier().await }
        }
        .await;
        self.finish(&writes, written)
    }

    /// Marks have gone, by a user's hand: no more stays hot than what is left allows. With a turn taken.
    async fn shrink(&self) -> Result<()> {
        let few = self.regions.borrow().count() <= self.regions.borrow().geometry().most;
        if few || self.closed.get() {
            return Ok(());
        }
        self.wash().await?;
        let surplus = {
            let kept = self.kept.borrow();
            let durable = Durable(&kept);
            self.regions.borrow().surplus(&durable, durable.extra())
        };
        if !surplus.is_empty() {
            self.regions.borrow_mut().retire(&surplus);
            self.write_record(BTreeSet::new()).await?;
        }
        Ok(())
    }

    /// Makes everything durable that can be, so that as few regions as possible stay hot.
    async fn cool(&self) -> Result<()> {
        let _turn = self.turn.acquire(1).await;
        if self.closed.get() {
            return Ok(());
        }
        self.settled().await?;
        self.wash().await?;
        let spare = self.regions.borrow().spare(&Durable(&self.kept.borrow()));
        if !spare.is_empty() {
            self.regions.borrow_mut().retire(&spare);
            self.write_record(BTreeSet::new()).await?;
        }
        Ok(())
    }

    /// From now on, until the end: regions that nobody writes to leave, and while somebody writes the record says so.
    pub(crate) fn beat(&self) {
        if self.beating.replace(true) {
            return;
        }
        let (me, env) = (self.me.clone(), self.env.clone());
        self.env.spawn("dirtylog-beat", async move {
            let (mut turns, mut begun, mut beats) = (0, 0, 0u32);
            loop {
                env.sleep(IDLE).await;
                let Some(log) = me.upgrade() else { return };
                if log.closed.get() {
                    log.beating.set(false);
                    return;
                }
                beats += 1;
                let idle = log.turns.get() == turns && log.regions.borrow().count() > 0;
                // What cannot be written now is tried again at the next beat.
                if idle {
                    let _later = log.cool().await;
                }
                let busy =
                    log.regions.borrow().begun() != begun || log.sets.borrow().iter().any(|s| s.is_taken());
                if beats >= BEATS && busy {
                    if log.turns.get() == turns {
                        let _later = log.say_alive().await;
                    }
                    (beats, begun) = (0, log.regions.borrow().begun());
                }
                turns = log.turns.get();
            }
        });
    }

    async fn say_alive(&self) -> Result<()> {
        let _turn = self.turn.acquire(1).await;
        if self.closed.get() { Ok(()) } else { self.write_record(BTreeSet::new()).await }
    }
}

impl DirtyLog {
    /// Makes the marks of `at` durable now; for tests and for those who are about to rely on them.
    ///
    /// # Errors
    /// The file's.
    pub async fn harden(&self, at: Span) -> Result<()> {
        self.to_its_end(move |log| async move {
            let _turn = log.turn.acquire(1).await;
            log.settled().await?;
            let writes = log.sectors(&[at]);
            if writes.is_empty() {
                return Ok(());
            }
            let written: Result<()> = async {
                log.write_sectors(&writes).await?;
                log.barrier().await
            }
            .await;
            log.finish(&writes, written)
        })
        .await
    }
}
