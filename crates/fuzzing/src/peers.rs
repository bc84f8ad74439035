//! What two daemons tell each other, and what one keeps for its next life: frames and stores of replication, logs of changes.
//!
//! What must stay true: damage is refused or made good, never a panic, and never something that only half works; what was accepted can
//! be written again and means the same.

use crate::{choice, judge};
use ::dirtylog::{DirtyLog, Settings};
use bitmap::{BitmapList, DirtyBitmap};
use block::{Data, Span};
use bytes::Bytes;
use env::{Env, OpenMode};
use replication::digest::Digest;
use replication::history::History;
use replication::store::{Change, Engine, FileVolume, MIN_SIZE, NewStore, Store};
use replication::wire::{Decoder, Frame, HEADER};
use replication::{Epoch, Generation, GroupId};
use sim::{Image, Rng, World};
use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;

/// Bytes of the disks.
const LEN: u64 = 1 << 20;
const DISK: &str = "/disk";
const KEPT: &str = "/kept";

fn write() -> OpenMode {
    OpenMode { write: true, ..OpenMode::default() }
}

/// Makes frames of a header and its payload each out of any bytes: magic, version, lengths and checksums are put right, so that the rest is looked at.
fn framed(mut rest: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let sound = Frame {
        generation: Generation(1),
        seq: replication::Seq(1),
        epoch: Epoch(1),
        body: replication::wire::Body::Ping { sent: 0 },
    };
    let sound = sound.encode().to_vec();
    while rest.len() >= HEADER {
        let (head, behind) = rest.split_at(HEADER);
        let len = (usize::from(head[12]) | usize::from(head[13]) << 8).min(behind.len());
        let (payload, behind) = behind.split_at(len);
        let mut h = head.to_vec();
        h[..5].copy_from_slice(&sound[..5]);
        h[8..12].fill(0);
        h[12..16].copy_from_slice(&(len as u32).to_le_bytes());
        h[16..20].copy_from_slice(&crc32c::crc32c(payload).to_le_bytes());
        let crc = crc32c::crc32c(&h);
        h[8..12].copy_from_slice(&crc.to_le_bytes());
        out.extend(h);
        out.extend(payload);
        rest = behind;
    }
    out.extend(rest);
    out
}

/// All frames of a stream, and how it ended.
fn decode(stream: &[u8], cut: usize) -> (Vec<Frame>, Option<String>) {
    let (mut decoder, mut frames) = (Decoder::new(), Vec::new());
    for piece in stream.chunks(cut.max(1)) {
        decoder.push(Bytes::copy_from_slice(piece));
        loop {
            match decoder.next_frame() {
                Ok(Some(f)) => frames.push(f),
                Ok(None) => break,
                Err(e) => {
                    assert!(decoder.next_frame().is_err(), "it goes on behind an error");
                    return (frames, Some(e.to_string()));
                }
            }
        }
    }
    (frames, None)
}

/// A stream of frames.
pub(crate) fn frames(bytes: &[u8]) {
    let Some((first, rest)) = choice(bytes) else { return };
    let stream = if first & 1 == 0 { framed(rest) } else { rest.to_vec() };
    let whole = decode(&stream, stream.len());
    assert_eq!(whole, decode(&stream, first / 2 + 1), "cut into pieces");
    for frame in whole.0 {
        let again = frame.encode();
        assert_eq!(again.len() as u64, frame.wire_len());
        assert_eq!(decode(&again.to_vec(), usize::MAX), (vec![frame], None), "written again");
    }
}

/// Changes a sound file as told: bits, fields, its length.
fn damage(file: &mut Vec<u8>, rng: &mut Rng) {
    for _ in 0..rng.between(1, 4) {
        // what is looked at lies at the beginning, and where a record ends
        let within = *rng.choose(&[4096, 65536, file.len() as u64]);
        let at = rng.below(within.min(file.len() as u64)) as usize;
        match rng.below(6) {
            0 => file[at] ^= 1 << rng.below(8),
            1 => file[at] = rng.draw() as u8,
            2 => {
                let value = *rng.choose(&[0, 1, u64::MAX, i64::MAX as u64, 1 << 32, 1 << 20]);
                file[at..].iter_mut().zip(value.to_le_bytes()).for_each(|(b, v)| *b = v);
            }
            3 => file.truncate(at.max(1)),
            4 => {
                let from = rng.below(file.len() as u64) as usize;
                let piece: Vec<u8> = file[from..].iter().copied().take(512).collect();
                file[at..].iter_mut().zip(piece).for_each(|(b, v)| *b = v);
            }
            _ => file[at..].iter_mut().take(512).for_each(|b| *b = 0),
        }
    }
}

/// The files of a run in the simulated world.
fn left(w: &World) -> Vec<u8> {
    w.host().image(KEPT).unwrap_or_default().to_vec()
}

thread_local! {
    static STORES: RefCell<Option<Rc<[Vec<u8>; 2]>>> = const { RefCell::new(None) };
    static LOG: RefCell<Option<Rc<Vec<u8>>>> = const { RefCell::new(None) };
}

/// What is kept at first use.
fn once<T>(place: &RefCell<Option<Rc<T>>>, make: impl FnOnce() -> T) -> Rc<T> {
    place.borrow_mut().get_or_insert_with(|| Rc::new(make())).clone()
}

async fn open_store(env: &Env) -> block::Result<Rc<Store>> {
    let disk = env.open(Path::new(DISK), write()).await?;
    let file = env.open(Path::new(KEPT), write()).await?;
    Store::open(env, file, vec![Rc::new(FileVolume(disk))]).await
}

/// A few changes, and a checkpoint of them.
async fn checkpoint(store: &Rc<Store>, epoch: u64) -> block::Result<()> {
    let mut history = store.history();
    if history.now().is_none() {
        history = History::begin(store.highest());
    }
    for place in 0..3 {
        let data = Data::from(vec![epoch as u8; 3000]);
        store.keep(&[Change { volume: 0, at: Span::new(place * 8192 + epoch * 512, 3000), data }]).await?;
    }
    history.advance(Epoch(epoch));
    store.seal(Epoch(epoch), Digest::default(), history).await?;
    store.harden().await.kept?;
    store.decide(Epoch(epoch)).await?;
    store.harden().await.kept
}

fn sound_store(engine: Engine) -> Vec<u8> {
    let out = Rc::new(RefCell::new(Vec::new()));
    let result = out.clone();
    judge(World::play(1, false, |w| async move {
        w.host().install(DISK, Image::from_bytes(&vec![9; LEN as usize]));
        w.host().install(KEPT, Image::from_bytes(&[]));
        let (env, process) = w.start();
        let made = async {
            let file = env.open(Path::new(KEPT), write()).await?;
            let new = NewStore { group: GroupId::of_name("g"), engine, size: MIN_SIZE };
            Store::create(&file, &new, History::none()).await?;
            let store = open_store(&env).await?;
            store.begin(Generation(1), &[LEN]).await?;
            for epoch in 1..=3 {
                checkpoint(&store, epoch).await?;
            }
            Ok::<(), block::BlockError>(())
        };
        w.verdict().check("a store cannot be made", made.await.map_err(|e| e.to_string()));
        process.kill();
        // what lies behind the records is zero and need not be carried about
        let mut bytes = left(&w);
        bytes.truncate(bytes.iter().rposition(|b| *b != 0).map_or(0, |n| n + 4096));
        *result.borrow_mut() = bytes;
    }));
    out.take()
}

/// A secondary's store, damaged: refused, or it works.
pub(crate) fn store(bytes: &[u8]) {
    let Some((first, rest)) = choice(bytes) else { return };
    let sound = STORES.with(|s| once(s, || [sound_store(Engine::Redo), sound_store(Engine::Undo)]));
    let mut file = sound[first & 1].clone();
    damage(&mut file, &mut Rng::told(rest));
    judge(World::play(1, false, |w| async move {
        w.host().install(DISK, Image::from_bytes(&vec![9; LEN as usize]));
        w.host().install(KEPT, Image::from_bytes(&file));
        let (env, process) = w.start();
        let Ok(store) = open_store(&env).await else { return };
        let (epoch, lens) = (store.history().epoch(), store.lens());
        for (volume, len) in (0..).zip(lens) {
            let _may_fail = store.read(volume, Span::new(0, len.min(LEN))).await;
        }
        let went_on = async {
            store.begin(store.highest(), &store.lens()).await?;
            checkpoint(&store, epoch.0.saturating_add(1)).await
        };
        let went_on = went_on.await.is_ok();
        drop(store);
        process.kill();
        let (env, _process) = w.start();
        match open_store(&env).await {
            Ok(again) if went_on && again.history().epoch() <= epoch => {
                w.verdict().violation(format!("a checkpoint behind {epoch:?} is lost"));
            }
            Ok(_) => {}
            Err(e) if went_on => w.verdict().violation(format!("it worked, and cannot be opened again: {e}")),
            Err(_) => {}
        }
    }));
}

fn settings() -> Settings {
    Settings { len: LEN, identity: b"disk".to_vec(), witness: Vec::new(), geometry: None }
}

async fn kept(env: &Env) -> block::Result<Rc<dyn env::File>> {
    env.open(Path::new(KEPT), write()).await
}

fn sound_log() -> Vec<u8> {
    let out = Rc::new(RefCell::new(Vec::new()));
    let result = out.clone();
    judge(World::play(1, false, |w| async move {
        w.host().install(KEPT, Image::from_bytes(&[]));
        let (env, process) = w.start();
        let made = async {
            let list = BitmapList::default();
            for (name, granularity) in [("a", 512), ("b", 65536)] {
                let b = DirtyBitmap::new(Some(name.to_owned()), LEN, granularity)?;
                b.set_persistent(true);
                list.borrow_mut().push(Rc::new(b));
            }
            let log = DirtyLog::begin(&env, kept(&env).await?, settings(), list.clone(), None).await?;
            for n in 0..6 {
                let at = Span::new(n * 70_000 / 512 * 512, 1024);
                let pass = log.enter(at).await?;
                list.borrow().iter().for_each(|b| b.record(at));
                log.leave(pass);
            }
            Ok::<(), block::BlockError>(())
        };
        w.verdict().check("a log cannot be made", made.await.map_err(|e| e.to_string()));
        process.kill();
        *result.borrow_mut() = left(&w);
    }));
    out.take()
}

/// A log of changes, damaged: what it is said to have is still there when it has gone on and been closed.
pub(crate) fn dirty_log(bytes: &[u8]) {
    let sound = LOG.with(|s| once(s, sound_log));
    let mut file = (*sound).clone();
    damage(&mut file, &mut Rng::told(bytes));
    judge(World::play(1, false, |w| async move {
        w.host().install(KEPT, Image::from_bytes(&file));
        let (env, _process) = w.start();
        let lived = async {
            let Ok(file) = kept(&env).await else { return Ok(()) };
            // what nobody can make anything of is begun anew
            let Ok(Some(found)) = ::dirtylog::read(&file).await else { return Ok(()) };
            let list = BitmapList::default();
            let mut marks = Vec::new();
            for f in found.bitmaps.iter().filter(|b| !b.job && b.inconsistent.is_none()) {
                let b = DirtyBitmap::new(Some(f.name.clone()), found.len, f.bits.granularity())?;
                b.set_persistent(true);
                b.set_enabled(f.enabled);
                b.bits_mut().merge(&f.bits);
                marks.push((f.name.clone(), f.bits.count()));
                list.borrow_mut().push(Rc::new(b));
            }
            let settings = Settings { len: found.len, ..settings() };
            let log = DirtyLog::begin(&env, file.clone(), settings, list, Some(found)).await?;
            log.close(Vec::new()).await?;
            let Some(again) = ::dirtylog::read(&file).await? else {
                w.verdict().violation("it is gone after it went on");
                return Ok(());
            };
            for (name, count) in marks {
                let now = again.bitmaps.iter().find(|b| !b.job && b.name == name);
                match now {
                    Some(b) if b.bits.count() == count && b.inconsistent.is_none() => {}
                    other => w.verdict().violation(format!(
                        "'{name}' had {count} marks and has {:?}",
                        other.map(|b| (b.bits.count(), b.inconsistent.clone()))
                    )),
                }
            }
            Ok::<(), block::BlockError>(())
        };
        if let Err(e) = lived.await {
            w.verdict().violation(format!("it cannot go on with what it found: {e}"));
        }
    }));
}
