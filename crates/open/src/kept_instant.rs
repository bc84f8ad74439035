//! How much of a disk as of one instant is on its target, written down so that a later life of the daemon goes on with the
//! same instant (`--state-dir`).
//!
//! A backup copies old bytes to its target before a client overwrites them. What is not on the target yet is only in the source.
//! So the instant outlives the daemon if, for each cluster, a later life knows which of the two it is. What must stay true:
//! * A cluster that is not written down as copied has not been overwritten in the source: a client's write to it waits
//!   until that is written down ([`Ledger`]).
//! * A cluster that is written down as copied is on the target, for all that can have happened since.
//!
//! What can have happened, and what is kept for it:
//! * The daemon was killed. What it had given to the host is still there, nothing had to be flushed. That holds if the target keeps
//!   nothing in memory of its own (raw files and devices, not qcow2), and if the source had flushed what it held at the instant. The
//!   file is written as the copy goes on (*live*).
//! * The host has been started anew, which the number of its start shows: nothing is believed.
//! * The daemon ended in order: both disks are flushed, and what is on the target is written down then, durably, for every
//!   format. The host may have been started anew since.
//! * Somebody else wrote to the source or the target meanwhile: told as for bitmaps (`bitmap_home.rs`). Disks behind a link are not
//!   kept at all: nobody knows what became of the peer.
//!
//! If the file cannot be written it is removed: the backup goes on, and a later life begins it anew and says so.

use crate::bitmap_home::{BitmapHome, GRACE, Witness};
use bitmap::Bitmap;
use block::{BlockError, Data, ErrorKind, Io, Result, Span};
use copy::{Ledger, Work};
use env::sync::{Notify, Semaphore, race};
use env::{Env, Existing, File, OpenMode, TaskHandle};
use graph::{Edge, NodeCell, links_below};
use std::cell::{Cell, RefCell};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

/// Bytes of the header; sectors of bits follow.
const HEADER: u64 = 4096;
/// Bytes of a sector: a checksum, four bytes that are nothing, bits.
const SECTOR: u64 = 512;
const SECTOR_HEAD: usize = 8;
/// Bytes of bits in a sector, and clusters.
const SECTOR_BITS: u64 = SECTOR - SECTOR_HEAD as u64;
const CLUSTERS: u64 = SECTOR_BITS * 8;
/// Sectors that are written or read at once.
const CHUNK: u64 = 256 * SECTOR;
const MAGIC: u64 = u64::from_le_bytes(*b"lbInst_1");
/// Longest identity of the two disks: it has to fit into the header.
const MAX_IDENTITY: usize = 3072;
/// How often what has been copied is written down, and that the source may have been changed since.
const PERIOD: Duration = Duration::from_secs(2);

/// What the header says.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Header {
    len: u64,
    granularity: u64,
    /// Seconds since 1970 when it was written.
    wall: u64,
    /// The host's start; `None`: it was closed in order, and all is durable.
    boot: Option<[u8; 16]>,
    source: Witness,
    target: Witness,
    identity: Vec<u8>,
}

impl Header {
    fn encode(&self) -> Option<Vec<u8>> {
        let mut b = Vec::new();
        for n in [MAGIC, self.len, self.granularity, self.wall, u64::from(self.boot.is_some())] {
            b.extend_from_slice(&n.to_le_bytes());
        }
        b.extend_from_slice(&self.boot.unwrap_or_default());
        b.extend_from_slice(&self.source.encode());
        b.extend_from_slice(&self.target.encode());
        b.extend_from_slice(&(self.identity.len() as u64).to_le_bytes());
        b.extend_from_slice(&self.identity);
        let sum = crc32c::crc32c(&b);
        b.extend_from_slice(&sum.to_le_bytes());
        (self.identity.len() <= MAX_IDENTITY).then_some(b)
    }

    fn parse(b: &[u8]) -> Option<Header> {
        const FIXED: usize = 128;
        let word = |at: usize| b.get(at..at.checked_add(8)?)?.try_into().ok().map(u64::from_le_bytes);
        let n = usize::try_from(word(120)?).ok().filter(|n| *n <= MAX_IDENTITY)?;
        let sum = b.get(FIXED + n..FIXED + n + 4)?.try_into().ok().map(u32::from_le_bytes)?;
        if word(0)? != MAGIC || crc32c::crc32c(b.get(..FIXED + n)?) != sum {
            return None;
        }
        Some(Header {
            len: word(8)?,
            granularity: word(16)?,
            wall: word(24)?,
            boot: (word(32)? == 1).then(|| b[40..56].try_into().ok()).flatten(),
            source: Witness::parse(b.get(56..88)?),
            target: Witness::parse(b.get(88..120)?),
            identity: b.get(FIXED..FIXED + n)?.to_vec(),
        })
    }
}

fn encode_sector(index: u64, bits: &[u8]) -> Vec<u8> {
    let mut b = vec![0; SECTOR as usize];
    b[SECTOR_HEAD..].copy_from_slice(bits);
    let sum = crc32c::crc32c_append(crc32c::crc32c(&index.to_le_bytes()), &b[4..]);
    b[..4].copy_from_slice(&sum.to_le_bytes());
    b
}

/// The bits of a sector, of one that was never written, none; of a damaged one nothing is believed either.
fn parse_sector(index: u64, b: &[u8]) -> Option<&[u8]> {
    let sum = u32::from_le_bytes(b.get(..4)?.try_into().ok()?);
    let body = b.get(4..SECTOR as usize)?;
    let whole = crc32c::crc32c_append(crc32c::crc32c(&index.to_le_bytes()), body) == sum;
    whole.then(|| &b[SECTOR_HEAD..SECTOR as usize])
}

#[derive(Clone)]
struct Disks {
    source: Rc<Edge>,
    target: Rc<Edge>,
}

/// See the top of this file.
pub struct KeptInstant {
    env: Env,
    home: Rc<BitmapHome>,
    path: PathBuf,
    /// The disks, until the end.
    disks: RefCell<Option<Disks>>,
    /// The source's node.
    name: String,
    identity: Vec<u8>,
    work: Rc<Work>,
    /// The file, as long as it is written as the copy goes on.
    live: RefCell<Option<Rc<dyn File>>>,
    boot: Option<[u8; 16]>,
    /// Written down as copied.
    noted: RefCell<Bitmap>,
    /// The same, and what is on its way there.
    noting: RefCell<Bitmap>,
    /// Who waits for what.
    wanted: RefCell<Vec<Span>>,
    turn: Semaphore,
    /// What an earlier life left: what is not on the target.
    left: RefCell<Option<Bitmap>>,
    resumed: bool,
    over: Cell<bool>,
    /// It counts no more.
    spoiled: Cell<bool>,
    stop: Notify,
    task: RefCell<Option<TaskHandle>>,
}

impl KeptInstant {
    /// For the backup `job` of `source` onto `target`, whose clusters are those of `work`: nothing where its instant could not be
    /// known again. What an earlier life left of it is found only while that is being restored. Nobody writes to the source yet, or
    /// the instant is not taken yet.
    pub async fn find(
        home: Rc<BitmapHome>,
        source: &Rc<Edge>,
        target: &Rc<Edge>,
        job: &str,
        work: &Rc<Work>,
    ) -> Option<Rc<KeptInstant>> {
        let disks = Disks { source: source.clone(), target: target.clone() };
        let (source, target) = (&source.child(), &target.child());
        let path = home.instant_path(job);
        let local = |cell: &Rc<NodeCell>| links_below(cell, true).is_empty();
        let env = home.env().clone();
        let found = if home.is_resuming() { Self::read(&env, &path).await } else { None };
        let known = local(source) && local(target);
        let (from, to) = (home.first_seen(source).await, home.first_seen(target).await);
        let identity = match (home.disk_name(source).await, home.disk_name(target).await) {
            (Ok(a), Ok(b)) => format!("{a}\n{b}").into_bytes(),
            _ => Vec::new(),
        };
        if !known || from == Witness::default() || to == Witness::default() || identity.is_empty() {
            let _none_there = env.remove(&path).await;
            return None;
        }
        let (len, granularity) = (work.len(), work.granularity());
        let boot = env.boot_id();
        let believed = found.filter(|(h, _)| {
            let same_start = h.boot.is_none() || h.boot == boot;
            let same_disks =
                h.identity == identity && unchanged(h, h.source, from) && unchanged(h, h.target, to);
            same_start && same_disks && (h.len, h.granularity) == (len, granularity)
        });
        let noted = match &believed {
            Some((_, bits)) => bits.clone(),
            None => Bitmap::new(len, granularity).ok()?,
        };
        let left = believed.map(|(_, bits)| {
            let mut left = bits.clone();
            left.set_all();
            bits.areas(Span::new(0, len), 0).for_each(|a| left.clear(a));
            left
        });
        let kept = Rc::new(KeptInstant {
            env,
            home,
            path,
            disks: RefCell::new(Some(disks)),
            name: source.name().to_owned(),
            identity,
            work: work.clone(),
            live: RefCell::default(),
            boot,
            noting: RefCell::new(noted.clone()),
            noted: RefCell::new(noted),
            wanted: RefCell::default(),
            turn: Semaphore::new(1),
            resumed: left.is_some(),
            left: RefCell::new(left),
            over: Cell::new(false),
            spoiled: Cell::new(false),
            stop: Notify::new(),
            task: RefCell::default(),
        });
        kept.ready(target).await.ok()?;
        Some(kept)
    }

    async fn read(env: &Env, path: &std::path::Path) -> Option<(Header, Bitmap)> {
        let file = env.open(path, OpenMode::default()).await.ok()?;
        let header = Header::parse(&file.read(Span::new(0, HEADER)).await.ok()?.contiguous())?;
        let mut bits = Bitmap::new(header.len, header.granularity).ok()?;
        let end = file.len_hint().max(HEADER);
        for piece in Span::between(HEADER, end).pieces(CHUNK) {
            let bytes = file.read(piece).await.ok()?.contiguous();
            for (b, i) in bytes.chunks_exact(SECTOR as usize).zip((piece.start - HEADER) / SECTOR..) {
                if let Some(found) = parse_sector(i, b) {
                    bits.import_bits(i * SECTOR_BITS, found);
                }
            }
        }
        Some((header, bits))
    }

    /// Before the first write of a client: the file is as the instant needs it to be.
    async fn ready(&self, target: &Rc<NodeCell>) -> Result<()> {
        let live = self.boot.is_some() && keeps_nothing_in_memory(target);
        if !live {
            // What was written down is right only as long as nobody writes.
            return self.remove().await;
        }
        let existing = if self.resumed { Existing::Open } else { Existing::CreateTruncate };
        let mode = OpenMode { write: true, existing, ..OpenMode::default() };
        let file = self.env.open(&self.path, mode).await?;
        if self.resumed {
            // Durably: after a power cut it must not say any more that it was closed in order.
            self.write_header(&file, self.boot).await?;
            file.barrier().await?;
        }
        *self.live.borrow_mut() = Some(file);
        Ok(())
    }

    /// What is not on the target, where an earlier life left it; asked once.
    pub fn take_left(&self) -> Option<Bitmap> {
        self.left.take()
    }

    /// Whether an earlier life left something.
    pub fn is_resumed(&self) -> bool {
        self.resumed
    }

    /// Whether the daemon is ending, and the instant can outlive it: nobody writes to the source any more, or nothing of it is
    /// wanted any more.
    pub fn outlives(&self) -> bool {
        self.home.is_resting() && (self.home.is_deserted() || self.is_complete())
    }

    /// Whether all is on the target.
    pub fn is_complete(&self) -> bool {
        self.work.unfinished().is_empty()
    }

    /// Whether clients' writes have to be written down.
    pub fn is_live(&self) -> bool {
        self.live.borrow().is_some()
    }

    /// The instant has been taken: from now on what is copied is written down.
    pub fn begin(self: &Rc<Self>) {
        if !self.is_live() {
            return;
        }
        let me = self.clone();
        let task = self.env.spawn("instant-kept", async move {
            if let Err(e) = me.keep().await {
                me.fail(&e).await;
            }
        });
        *self.task.borrow_mut() = Some(task);
    }

    async fn keep(&self) -> Result<()> {
        if !self.resumed {
            // What clients wrote before the instant and the source holds in memory would be lost when the daemon is killed.
            let Some(disks) = self.disks.borrow().clone() else { return Ok(()) };
            match race(disks.source.flush(), self.stop.wait()).await {
                Some(flushed) => flushed?,
                None => return Ok(()),
            }
        }
        let mut done = u64::MAX;
        loop {
            {
                let _turn = self.turn.acquire(1).await;
                let live = self.live.borrow().clone().filter(|_| !self.over.get());
                let Some(file) = live else { return Ok(()) };
                self.write_header(&file, self.boot).await?;
            }
            let _ended = race(self.env.sleep(PERIOD), self.stop.wait()).await;
            if std::mem::replace(&mut done, self.work.done()) != self.work.done() {
                self.sweep().await?;
            }
        }
    }

    /// Writes down all that is on the target now.
    async fn sweep(&self) -> Result<()> {
        let _turn = self.turn.acquire(1).await;
        let unfinished = self.work.unfinished();
        let (mut at, len) = (0, self.work.len());
        let mut all = Vec::new();
        while let Some(start) = unfinished.next_clean(at) {
            at = unfinished.next_dirty(start).unwrap_or(len);
            all.push(Span::between(start, at));
        }
        self.write(&all).await
    }

    /// Writes down that `all` is on the target, with the turn taken. Without a file it counts as written.
    async fn write(&self, all: &[Span]) -> Result<()> {
        let Some(file) = self.live.borrow().clone() else { return Ok(()) };
        let mut sectors: Vec<u64> = Vec::new();
        {
            let (mut noting, noted) = (self.noting.borrow_mut(), self.noted.borrow());
            let shift = noting.granularity().trailing_zeros();
            for at in all.iter().filter(|s| !s.is_empty()) {
                noting.set(*at);
                let (mut from, end) = (at.start, at.end());
                while let Some(c) = noted.next_clean(from).filter(|c| *c < end) {
                    let sector = (c >> shift) / CLUSTERS;
                    sectors.push(sector);
                    from = ((sector + 1) * CLUSTERS) << shift;
                }
            }
        }
        sectors.sort_unstable();
        sectors.dedup();
        let mut run: Vec<u8> = Vec::new();
        let mut buffer = vec![0; SECTOR_BITS as usize];
        for (i, index) in sectors.iter().enumerate() {
            self.noting.borrow().export_bits(index * SECTOR_BITS, &mut buffer);
            run.extend_from_slice(&encode_sector(*index, &buffer));
            let next = sectors.get(i + 1);
            if next != Some(&(index + 1)) || run.len() as u64 >= CHUNK {
                let first = index + 1 - run.len() as u64 / SECTOR;
                file.write(HEADER + first * SECTOR, Data::from(std::mem::take(&mut run))).await?;
            }
        }
        let mut noted = self.noted.borrow_mut();
        all.iter().for_each(|at| noted.set(*at));
        Ok(())
    }

    async fn write_header(&self, file: &Rc<dyn File>, boot: Option<[u8; 16]>) -> Result<()> {
        let Some(disks) = self.disks.borrow().clone() else { return Ok(()) };
        let header = Header {
            len: self.work.len(),
            granularity: self.work.granularity(),
            wall: self.env.wall().as_secs(),
            boot,
            source: Witness::of(&disks.source.child()).await,
            target: Witness::of(&disks.target.child()).await,
            identity: self.identity.clone(),
        };
        let bytes = header.encode().ok_or_else(|| BlockError::invalid("names too long to be kept"))?;
        file.write(0, Data::from(bytes)).await
    }

    async fn remove(&self) -> Result<()> {
        match self.env.remove(&self.path).await {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(e),
            _ => self.home.sync(),
        }
    }

    /// The file cannot be kept: there shall be none.
    async fn fail(&self, why: &BlockError) {
        self.spoiled.set(true);
        let Some(file) = self.live.take() else { return };
        let gone = match self.env.remove(&self.path).await {
            // a header that says nothing is as good
            Err(e) if e.kind() != ErrorKind::NotFound => {
                file.write(0, Data::zeroes(HEADER as usize)).await.err()
            }
            _ => None,
        };
        let and = gone.map_or(String::new(), |e| format!(" (and its file cannot be removed: {e})"));
        self.home.say_trouble(&format!(
            "node '{}': a restart will not know how far its backup has come: {why}{and}",
            self.name
        ));
    }

    /// The job has ended, and nobody will want its instant again; or the daemon ends in order, and the instant is to *outlive* it:
    /// clients write no more where anything is left to be copied, nothing is being copied, and all that was copied is to be flushed.
    pub async fn end(&self, outlives: bool) {
        self.over.set(true);
        self.stop.notify_all();
        let task = self.task.take();
        if let Some(task) = task {
            task.join().await;
        }
        let done = if outlives && !self.spoiled.get() { self.close().await } else { self.remove().await };
        self.live.take();
        self.disks.take();
        if let Err(e) = done {
            let _gone = self.remove().await;
            let name = &self.name;
            self.home.say_trouble(&format!("node '{name}': how far its backup has come is not kept: {e}"));
        }
    }

    async fn close(&self) -> Result<()> {
        let Some(disks) = self.disks.borrow().clone() else { return Ok(()) };
        disks.source.flush().await?;
        disks.target.flush().await?;
        if self.live.borrow().is_none() {
            let mode = OpenMode { write: true, existing: Existing::CreateTruncate, ..OpenMode::default() };
            *self.live.borrow_mut() = Some(self.env.open(&self.path, mode).await?);
            // nothing of it is there
            self.noted.borrow_mut().clear_all();
            let known = self.noting.borrow().clone();
            self.write(&known.areas(Span::new(0, known.len()), 0).collect::<Vec<_>>()).await?;
        }
        self.sweep().await?;
        let Some(file) = self.live.borrow().clone() else { return Ok(()) };
        // The bits first: a header must not vouch for what is not there.
        file.barrier().await?;
        self.write_header(&file, None).await?;
        file.barrier().await?;
        self.home.sync()
    }
}

impl Ledger for KeptInstant {
    fn has(&self, at: Span) -> bool {
        let noted = self.noted.borrow();
        !self.is_live() || noted.next_clean(at.start).is_none_or(|c| c >= at.end())
    }

    fn note(&self, at: Span) -> Io<'_> {
        Box::pin(async move {
            self.wanted.borrow_mut().push(at);
            let _turn = self.turn.acquire(1).await;
            if self.has(at) {
                return Ok(());
            }
            // all who wait, with one write
            let mut all = self.wanted.take();
            all.push(at);
            if let Err(e) = self.write(&all).await {
                self.fail(&e).await;
            }
            Ok(())
        })
    }

    fn give_up(&self, why: &BlockError) -> Io<'_> {
        let why = why.clone();
        Box::pin(async move {
            let _turn = self.turn.acquire(1).await;
            self.fail(&why).await;
            Ok(())
        })
    }
}

/// Whether what the node has taken is with the host as soon as it says so.
fn keeps_nothing_in_memory(cell: &Rc<NodeCell>) -> bool {
    let mut at = cell.clone();
    loop {
        match at.node().driver() {
            "file" | "host_device" => return true,
            "raw" => match at.node().primary() {
                Some(edge) => at = edge.child(),
                None => return false,
            },
            _ => return false,
        }
    }
}

/// Whether nobody else can have written to a disk since.
fn unchanged(h: &Header, then: Witness, now: Witness) -> bool {
    then.is_same_file(now) && now.modified() <= Duration::from_secs(h.wall).saturating_add(GRACE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_read_as_it_was_written_and_no_damaged_one() {
        for boot in [None, Some([7; 16])] {
            let identity = b"raw:/a\nraw:/b".to_vec();
            let (source, target) = (Witness::parse(&[1; 32]), Witness::parse(&[2; 32]));
            let h = Header { len: 10 << 30, granularity: 65536, wall: 99, boot, source, target, identity };
            let bytes = h.encode().expect("fits");
            assert_eq!(Header::parse(&bytes), Some(h));
            for bit in 0..bytes.len() * 8 {
                let mut bytes = bytes.clone();
                bytes[bit / 8] ^= 1 << (bit % 8);
                assert_eq!(Header::parse(&bytes), None, "bit {bit}");
            }
        }
    }

    #[test]
    fn a_sector_counts_in_its_place_only() {
        let bits = vec![0x5a; SECTOR_BITS as usize];
        let b = encode_sector(3, &bits);
        assert_eq!(parse_sector(3, &b), Some(&bits[..]));
        assert_eq!(parse_sector(4, &b), None);
        assert_eq!(parse_sector(3, &[0; SECTOR as usize]), None, "never written");
    }
}
