//! Changes by users: what the list of bitmaps says becomes durable at once, or not at all.
//!
//! New content goes to an area that no header names, under a new generation; barrier; the header; barrier. What must stay
//! true: from the instant at which the content is taken until the header is durable, nobody writes on the strength of marks that
//! either state lacks; an area is written only if no header that the file may have names it as the one that counts.

use crate::DirtyLog;
use crate::kept::{Kept, area_sectors};
use crate::layout::{AREAS, Entry, Header, Kind, SECTOR, header_slot, sectors_for};
use bitmap::{Bitmap, DirtyBitmap};
use block::{BlockError, Data, ErrorKind, Result, Span};
use env::bugs::planted;
use env::sync::oneshot;
use std::collections::BTreeSet;
use std::future::Future;
use std::rc::Rc;

/// What is to be written for one bitmap.
struct Store {
    id: u32,
    bits: Bitmap,
    /// Its areas hold nothing of it yet.
    fresh: bool,
}

impl DirtyLog {
    /// Makes durable what the node's list of bitmaps says now: which there are, their content, whether they record. All of it or,
    /// after a crash meanwhile, nothing.
    ///
    /// # Errors
    /// The file's; what does not fit. What is kept is what was kept before then, or all of the new, and it is tried again before
    /// the next write that needs a record.
    pub async fn sync(&self) -> Result<()> {
        self.to_its_end(|log| async move {
            let _turn = log.turn.acquire(1).await;
            log.sync_now(None).await
        })
        .await
    }

    /// The disk has `len` bytes from now on, and the bitmaps in the list do. Nobody writes meanwhile.
    ///
    /// # Errors
    /// As [`DirtyLog::sync`].
    pub async fn resize(&self, len: u64) -> Result<()> {
        self.to_its_end(move |log| async move {
            let _turn = log.turn.acquire(1).await;
            log.header.borrow_mut().len = len;
            for set in log.sets.borrow().iter() {
                set.resize(len)?;
            }
            log.uncertain.set(true);
            log.sync_now(None).await
        })
        .await
    }

    /// The end: nobody writes any more. Bitmaps are exact after; `witness` says what is known of the disk now.
    ///
    /// # Errors
    /// As [`DirtyLog::sync`]; what is in doubt stays in doubt then.
    pub async fn close(&self, witness: Vec<u8>) -> Result<()> {
        self.to_its_end(move |log| async move {
            let _turn = log.turn.acquire(1).await;
            if log.closed.get() {
                return Ok(());
            }
            let done = log.sync_now(Some(witness)).await;
            if done.is_ok() {
                log.closed.set(true);
                log.kept.borrow().iter().for_each(|k| k.bitmap.on_edit(None));
            }
            done
        })
        .await
    }

    /// After [`DirtyLog::close`]: it is used again. Nobody writes meanwhile.
    ///
    /// # Errors
    /// As [`DirtyLog::sync`].
    pub async fn reopen(&self) -> Result<()> {
        self.to_its_end(|log| async move {
            let _turn = log.turn.acquire(1).await;
            if !log.closed.replace(false) {
                return Ok(());
            }
            log.uncertain.set(true);
            log.beat();
            log.sync_now(None).await
        })
        .await
    }

    /// Does what writes to the file as a task of its own: whoever waits for it may go away (a job that is cancelled), but a write whose
    /// future is dropped lands all the same, and it could land over the next one of its place.
    pub(crate) async fn to_its_end<F>(&self, work: impl FnOnce(Rc<DirtyLog>) -> F) -> Result<()>
    where
        F: Future<Output = Result<()>> + 'static,
    {
        let over = || BlockError::new(ErrorKind::Cancelled, "the log of changes is closed");
        let Some(me) = self.me.upgrade() else { return Err(over()) };
        let (done, told) = oneshot();
        let work = work(me);
        self.env.spawn("dirtylog write", async move { done.send(work.await) });
        told.await.unwrap_or_else(|| Err(over()))
    }

    /// With a turn taken.
    pub(crate) async fn sync_now(&self, close: Option<Vec<u8>>) -> Result<()> {
        self.edited.set(false);
        let planned = self.plan(close);
        if !matches!(planned, Ok(None)) {
            // If it fails, or whoever waits for it goes away, nobody knows what the file has: all of it is stored anew the
            // next time.
            self.uncertain.set(true);
        }
        let Some((stores, header)) = planned? else { return Ok(()) };
        self.carry_out(&stores, &header).await?;
        self.uncertain.set(false);
        if self.regions.borrow().count() > self.regions.borrow().geometry().most {
            self.shrunk.set(true);
            self.kick();
        }
        self.ghosts.borrow_mut().clear();
        self.header_slot.set(self.header_slot.get() + 1);
        let mut kept = self.kept.borrow_mut();
        for s in stores {
            if let Some(k) = kept.iter_mut().find(|k| k.entry.id == s.id) {
                k.durable = s.bits;
            }
        }
        Ok(())
    }

    /// What has to be written, as of this instant; nothing if all is as the file has it.
    fn plan(&self, close: Option<Vec<u8>>) -> Result<Option<(Vec<Store>, Header)>> {
        let (wanted, closing) = (self.wanted(), close.is_some());
        let mut header = self.header.borrow().clone();
        let old = std::mem::take(&mut *self.kept.borrow_mut());
        let (mut kept, mut gone): (Vec<_>, Vec<_>) =
            old.into_iter().partition(|k| wanted.iter().any(|(_, _, b)| Rc::ptr_eq(b, &k.bitmap)));
        let mut ghosts = self.ghosts.borrow_mut();
        gone.iter().for_each(|k| ghosts.push(k.entry.places(k.durable.len())));
        let mut changed = self.uncertain.get() || closing || !gone.is_empty();
        gone.drain(..).for_each(|k| k.bitmap.on_edit(None));
        let mut stores = Vec::new();
        let mut failed = Ok(());
        for (name, kind, bitmap) in wanted {
            let found = kept.iter().position(|k| Rc::ptr_eq(&k.bitmap, &bitmap));
            if let Some(k) = found.and_then(|i| kept.get(i))
                && !self.uncertain.get()
                && k.is_stored(closing)
            {
                continue;
            }
            changed = true;
            let reuse = if self.uncertain.get() { None } else { found };
            let made = match reuse.filter(|i| kept[*i].durable.len() == bitmap.bits().len()) {
                Some(i) => Ok((kept.remove(i).turned(self.generation()), false)),
                None => {
                    if let Some(i) = found {
                        let k = kept.remove(i);
                        ghosts.push(k.entry.places(k.durable.len()));
                    }
                    self.fresh(name, kind, &bitmap, &mut header, &kept, &ghosts).map(|k| (k, true))
                }
            };
            let (mut k, fresh) = match made {
                Ok(made) => made,
                Err(e) => {
                    failed = Err(e);
                    break;
                }
            };
            let bits = k.instant(&self.regions.borrow().marked());
            k.durable = common(&k.durable, &bits);
            k.edits = bitmap.edits();
            k.lossy = BTreeSet::new();
            stores.push(Store { id: k.entry.id, bits, fresh });
            if kind == Kind::User {
                self.watch(&bitmap);
            }
            kept.push(k);
        }
        header.sequence += 1;
        header.clean = closing && failed.is_ok();
        header.wall = self.env.wall().as_secs();
        if let Some(witness) = close {
            header.witness = witness;
        }
        header.entries = kept.iter().map(|k| k.entry.clone()).collect();
        *self.kept.borrow_mut() = kept;
        *self.header.borrow_mut() = header.clone();
        failed?;
        Ok(changed.then_some((stores, header)))
    }

    /// A bitmap that the file does not have, with areas that no header names.
    fn fresh(
        &self,
        name: String,
        kind: Kind,
        bitmap: &Rc<DirtyBitmap>,
        header: &mut Header,
        kept: &[Kept],
        ghosts: &[Span],
    ) -> Result<Kept> {
        let (len, granularity) = (bitmap.bits().len(), bitmap.bits().granularity());
        let mut used: Vec<Span> = kept.iter().map(|k| k.entry.places(k.durable.len())).collect();
        used.extend(ghosts);
        let bytes = 2 * SECTOR * sectors_for(len, granularity);
        let entry = Entry {
            name,
            kind,
            id: header.next_id,
            generation: self.generation(),
            area: first_fit(used, bytes),
            second: false,
            granularity,
            enabled: false,
            inconsistent: None,
        };
        header.next_id = header.next_id.wrapping_add(1).max(1);
        let durable = Bitmap::new(len, granularity)?;
        Ok(Kept { bitmap: bitmap.clone(), entry, durable, edits: 0, lossy: BTreeSet::new() })
    }

    /// A number that no sector of the file has; 0 is what blank sectors have.
    fn generation(&self) -> u64 {
        self.env.random().max(1)
    }

    async fn carry_out(&self, stores: &[Store], header: &Header) -> Result<()> {
        // checked before anything is written
        let bytes = header.encode()?;
        for s in stores {
            let entry = match self.kept.borrow().iter().find(|k| k.entry.id == s.id) {
                Some(k) => k.entry.clone(),
                None => continue,
            };
            if s.fresh {
                let blank = Entry { generation: 0, ..entry.clone() };
                let none = Bitmap::new(s.bits.len(), s.bits.granularity())?;
                let other = area_sectors(&blank, &none, !entry.second, true)?;
                self.write_pieces(other.iter().map(|(at, b)| (*at, b.as_slice()))).await?;
            }
            let sectors = area_sectors(&entry, &s.bits, entry.second, s.fresh)?;
            self.write_pieces(sectors.iter().map(|(at, b)| (*at, b.as_slice()))).await?;
        }
        if !stores.is_empty() && !planted("dirtylog: header before the bits") {
            self.barrier().await?;
        }
        for at in header_slot(self.header_slot.get()) {
            self.file.write(at, Data::copy_from(&bytes)).await?;
        }
        self.barrier().await
    }
}

impl Kept {
    /// Whether the file says of it what is true now.
    fn is_stored(&self, exactly: bool) -> bool {
        let b = &self.bitmap;
        let user = self.entry.kind == Kind::User;
        let same = self.entry.enabled == b.enabled()
            && self.entry.inconsistent.is_some() == b.inconsistent()
            && self.durable.len() == b.bits().len()
            && (!user || self.edits == b.edits());
        let whole = Span::new(0, self.durable.len());
        same && (!exactly || self.is_clean(whole) && self.current().count() == self.durable.count())
    }

    /// To be stored in its other area.
    fn turned(mut self, generation: u64) -> Kept {
        self.entry.second = !self.entry.second;
        self.entry.generation = generation;
        self
    }

    /// What it holds at this instant, with what those have under way who rely on marks that are durable.
    fn instant(&mut self, inflight: &[Span]) -> Bitmap {
        let mut bits = self.current();
        let b = &self.bitmap;
        self.entry.enabled = b.enabled();
        self.entry.inconsistent = b.inconsistent().then(|| b.why_inconsistent());
        if b.enabled() {
            inflight.iter().for_each(|s| bits.set(*s));
        }
        bits
    }
}

/// What both have; `new` is of the length that counts.
fn common(old: &Bitmap, new: &Bitmap) -> Bitmap {
    let mut out = new.clone();
    out.clear_all();
    for a in old.areas(Span::new(0, new.len()), 0) {
        new.areas(a, 0).for_each(|b| out.set(b));
    }
    out
}

/// Where `bytes` are free.
fn first_fit(mut used: Vec<Span>, bytes: u64) -> u64 {
    used.sort_unstable();
    let mut at = AREAS;
    for s in used {
        if s.start >= at.saturating_add(bytes) {
            break;
        }
        at = at.max(s.end());
    }
    at
}
