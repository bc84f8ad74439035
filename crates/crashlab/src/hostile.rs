//! Hostile images: valid structures with random fields, for whoever opens, checks, repairs, reads and writes them.
//!
//! What must be true of each: nobody panics or spins; an accepted header is written back the same; what a repair says it made
//! clean is clean; work is bounded by the file and not by what its fields claim.

use crate::history::{Ask, History};
use crate::run::{FIRST_STAMP, Setup, run};
use crate::workload;
use block::{ReqFlags, Span};
use env::{Executor, OpenMode};
use graph::{Node, Role};
use qcow2::check::{Fix, check};
use qcow2::header::Header;
use qcow2::storage::{Memory, now};
use qcow2::testing::FileNode;
use qcow2::testing::file::edge_onto;
use qcow2::{Options as Driver, Qcow2};
use sim::{Effect, Host, Image, Machine, Net, NetProfile, Profile, Rng, SimBackend};
use std::path::Path;

/// Turns of the loop that the driver may take for one image.
const MAX_STEPS: u64 = 400_000;
/// Bytes read at one place.
const READ: u64 = 256 * 1024;

/// Sound images of several kinds, with data, zeroes and compressed clusters in them.
pub fn corpus(seed: u64) -> Vec<Vec<u8>> {
    let mut rng = Rng::new(seed);
    let mut out = Vec::new();
    for setup in workload::setups().iter().filter(|s| s.create.data_file.is_none() && !s.backing) {
        let Ok((files, values)) = setup.fresh() else { continue };
        let steps = workload::random(setup, &mut rng, values.len() as u64, 25);
        let steps =
            steps.into_iter().filter(|s| !s.iter().any(|r| matches!(r.ask, Ask::Resize(_)))).collect();
        if let Ok(rec) = run(setup, files, History::new(values, FIRST_STAMP), steps, true, rng.draw()) {
            let mut image = Image::from_bytes(&rec.base.image);
            let effects = rec.entries.iter().filter(|e| e.file == 0).filter_map(|e| e.effect.as_ref());
            effects.for_each(|e: &Effect| image.apply(e));
            out.push(image.to_vec());
        }
    }
    out
}

fn word(b: &[u8], at: usize) -> u64 {
    b.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from_be_bytes(*b))
}

fn half(b: &[u8], at: usize) -> u64 {
    b.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from(u32::from_be_bytes(*b)))
}

/// Fields of the header: (offset, bytes).
const FIELDS: [(usize, usize); 20] = [
    (4, 4),
    (8, 8),
    (16, 4),
    (20, 4),
    (24, 8),
    (32, 4),
    (36, 4),
    (40, 8),
    (48, 8),
    (56, 4),
    (60, 4),
    (64, 8),
    (72, 8),
    (80, 8),
    (88, 8),
    (96, 4),
    (100, 4),
    (104, 1),
    (112, 4),
    (116, 4),
];

/// A value that is likely to hurt, given the one that is there.
fn nasty(rng: &mut Rng, old: u64, len: u64, cluster_bits: u32) -> u64 {
    let place = rng.below((len >> cluster_bits) + 3) << cluster_bits;
    match rng.below(14) {
        0 => 0,
        1 => u64::MAX,
        2 => 1 << rng.below(64),
        3 => old ^ 1 << rng.below(64),
        4 => old.wrapping_add(1),
        5 => old.wrapping_sub(1),
        6 => i64::MAX as u64 - rng.below(3),
        7 => u64::from(u32::MAX) - rng.below(3),
        8 => place,
        9 => place | 1 << 63,
        10 => place | 1 << 62 | rng.below(512),
        11 => rng.draw(),
        12 => old.wrapping_mul(2),
        _ => len.wrapping_add(rng.below(1 << 17)).wrapping_sub(1 << 16),
    }
}

/// An image made of `sound` with some fields changed.
pub fn hostile(sound: &[u8], rng: &mut Rng) -> Vec<u8> {
    let mut b = sound.to_vec();
    let bits = (half(&b, 20) as u32).clamp(9, 21);
    let cluster = 1usize << bits;
    let put = |b: &mut Vec<u8>, at: usize, n: usize, v: u64| {
        if let Some(field) = b.get_mut(at..).and_then(|b| b.get_mut(..n)) {
            field.copy_from_slice(&v.to_be_bytes()[8 - n..]);
        }
    };
    for _ in 0..rng.between(1, 4) {
        let (l1, rt) = (word(&b, 40) as usize, word(&b, 48) as usize);
        let l1_len = half(&b, 36).clamp(1, 1024) as usize;
        let len = b.len() as u64;
        match rng.below(10) {
            0..=2 => {
                let (at, n) = *rng.choose(&FIELDS);
                let old = if n == 8 { word(&b, at) } else { half(&b, at) };
                let v = nasty(rng, old, len, bits);
                put(&mut b, at, n, v);
            }
            3 => {
                let at = l1.wrapping_add(8 * rng.index(l1_len));
                let v = nasty(rng, word(&b, at), len, bits);
                put(&mut b, at, 8, v);
            }
            4..=6 => {
                let entry = word(&b, l1.wrapping_add(8 * rng.index(l1_len))) & 0x00ff_ffff_ffff_fe00;
                let at = entry as usize + 8 * rng.index(cluster.min(4096) / 8);
                let v = nasty(rng, word(&b, at), len, bits);
                put(&mut b, at, 8, v);
            }
            7 => {
                let at = if rng.chance(0.5) {
                    rt.wrapping_add(8 * rng.index(4))
                } else {
                    (word(&b, rt) as usize).wrapping_add(rng.index(64))
                };
                let v = nasty(rng, word(&b, at), len, bits);
                put(&mut b, at, 8, v);
            }
            8 => {
                // A snapshot table or a bitmap directory of whatever is there.
                let place = rng.below((len >> bits) + 1) << bits;
                if rng.chance(0.5) {
                    let n = *rng.choose(&[1, 2, 100, 65_536]);
                    put(&mut b, 60, 4, n);
                    put(&mut b, 64, 8, place);
                } else {
                    put(&mut b, 88, 8, 1);
                    put(&mut b, 112, 4, 0x2385_2875);
                    put(&mut b, 116, 4, 24);
                    let count = *rng.choose(&[1, 3, 65_535]);
                    put(&mut b, 120, 4, count);
                    put(&mut b, 124, 4, 0);
                    put(&mut b, 128, 8, *rng.choose(&[24, 1000, 65_535 * 1024]));
                    put(&mut b, 136, 8, place);
                }
            }
            _ => {
                let at = rng.index(b.len());
                if rng.chance(0.3) {
                    b.truncate(at);
                } else {
                    let end = (at + rng.index(600)).min(b.len());
                    b[at..end].iter_mut().for_each(|x| *x = rng.draw() as u8);
                }
            }
        }
    }
    b
}

/// What one image may take in all; most take a millisecond.
const SLOW: std::time::Duration = std::time::Duration::from_secs(5);

/// What a repair may leave.
const HOPELESS: [&str; 5] = ["metadata lies on", "L1 at", "Snapshots at", "snapshot ", "an L1 table"];

/// What became of an image.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Fate {
    /// The header was accepted.
    pub parsed: bool,
    /// The check found nothing.
    pub clean: bool,
    /// The repair made it clean.
    pub repaired: bool,
    /// The driver opened it.
    pub opened: bool,
}

/// Puts an image through everything.
///
/// # Errors
/// What must not be.
pub fn try_all(image: &[u8], seed: u64) -> Result<Fate, String> {
    let mut fate = Fate::default();
    if let Ok(h) = Header::parse(&image[..image.len().min(1 << 21)]) {
        fate.parsed = true;
        if let Ok(out) = h.encode() {
            let again = Header::parse(&out).map_err(|e| format!("written header is refused: {e}"))?;
            if again != h {
                return Err("the header is not written back the same".to_owned());
            }
        }
    }
    if let Ok(report) = now(check(&image, Fix::Nothing)) {
        fate.clean = report.is_clean();
        for fix in [Fix::Leaks, Fix::All] {
            let copy = Memory::new(image.to_vec());
            let Ok(said) = now(check(&copy, fix)) else { continue };
            let bytes = copy.into_bytes();
            let seen = now(check(&&bytes[..], Fix::Nothing)).map_err(|e| format!("after {fix:?}: {e}"))?;
            if (seen.corruptions, seen.leaks) != (said.corruptions, said.leaks) {
                return Err(format!("the repair says {said:?}, the check {seen:?}"));
            }
            if fix == Fix::All {
                fate.repaired = seen.is_clean();
                // Where two tables lie on one another or an L1 table is not in the file, nobody knows what is right.
                let known = seen.messages.iter().any(|m| HOPELESS.iter().any(|h| m.contains(h)));
                if !seen.is_clean() && !known {
                    return Err(format!("the repair leaves {:?}", seen.messages));
                }
            }
        }
    }
    fate.opened = drive(image, seed)?;
    Ok(fate)
}

/// The driver over the image: reads, writes, flush, close. Errors are fine.
fn drive(image: &[u8], seed: u64) -> Result<bool, String> {
    let machine = Machine::new(seed);
    machine.limit_steps(MAX_STEPS);
    let net = Net::new(&machine, NetProfile::calm());
    let profile = Profile { inline: 1.0, ..Profile::calm() };
    let host = Host::new("lab", &machine, &net, profile);
    host.install("image", Image::from_bytes(image));
    let executor = Executor::new(SimBackend::root(&host));
    let env = executor.env();
    let done = executor.try_run(async move {
        let mode = OpenMode { write: true, ..OpenMode::default() };
        let Ok(file) = env.open(Path::new("image"), mode).await else { return false };
        let Ok(file) = edge_onto(&env, FileNode::new(file), true, Role::Primary).await else { return false };
        let Ok(node) = Qcow2::open(env.clone(), file, None, Driver::default()).await else { return false };
        let mut rng = Rng::new(seed);
        let len = node.len();
        for at in [0, len / 2, len.saturating_sub(READ), rng.below(len.max(1))] {
            let at = Span::new(at & !511, READ).intersect(&Span::new(0, len));
            if at.is_empty() {
                continue;
            }
            let _ = node.extents(at).await;
            let _ = node.read(at).await;
            let part = Span::new(at.start, at.len.min(1 + rng.below(4096)));
            let _ = node.write(part, block::Data::zeroes(part.len as usize), ReqFlags::NONE).await;
            let _ = node.zero(at, ReqFlags { may_unmap: true, ..ReqFlags::NONE }).await;
            let _ = node.discard(part).await;
            let _ = node.flush().await;
        }
        let _ = node.close().await;
        true
    });
    done.map_err(|_| "the driver hangs".to_owned())
}

/// Tries `count` hostile images; gives (parsed, found clean, repaired, opened).
///
/// # Errors
/// The first that must not be, with the number that makes it again.
pub fn many(count: u64, seed: u64) -> Result<[u64; 4], String> {
    let sound = corpus(seed);
    if sound.is_empty() {
        return Err("no sound images".to_owned());
    }
    let mut sums = [0; 4];
    for n in 0..count {
        let mut rng = Rng::new(seed.wrapping_mul(0x9e37_79b9).wrapping_add(n));
        let image = hostile(rng.choose(&sound).as_slice(), &mut rng);
        let began = std::time::Instant::now();
        let tried =
            std::panic::catch_unwind(|| try_all(&image, n)).unwrap_or_else(|_| Err("panic".to_owned()));
        let tried =
            if began.elapsed() > SLOW { Err(format!("it took {:?}", began.elapsed())) } else { tried };
        let fate = tried.map_err(|e| {
            let path = std::env::temp_dir().join("liveblk-hostile.qcow2");
            let _ = std::fs::write(&path, &image);
            format!("image {n} of seed {seed}: {e}; kept in {}", path.display())
        })?;
        for (sum, yes) in sums.iter_mut().zip([fate.parsed, fate.clean, fate.repaired, fate.opened]) {
            *sum += u64::from(yes);
        }
    }
    Ok(sums)
}

/// The kind of image by name, for tests.
pub fn kind(name: &str) -> Option<Setup> {
    workload::setups().into_iter().find(|s| s.name == name)
}
