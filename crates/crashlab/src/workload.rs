//! What is done to the images: all short histories, and long random ones.

use crate::history::Ask;
use crate::run::{Request, Setup, Step};
use qcow2::create::Options;
use qcow2::header::Compression;
use sim::Rng;

/// The kinds of image. Disks are small, so that tables and refcount blocks run out of room often.
pub fn setups() -> Vec<Setup> {
    let o = |size: u64, cluster_size: u64| Options { cluster_size, ..Options::new(size) };
    let setup = |name: &str, create: Options| Setup {
        name: name.to_owned(),
        create,
        backing: false,
        l2_cache: None,
        bitmap: false,
    };
    let data_file = |o: Options| Options { data_file: Some("data.raw".into()), ..o };
    vec![
        setup("64k", o(2 << 20, 65536)),
        setup("4k", o(3 << 20, 4096)),
        setup("512", o(256 << 10, 512)),
        setup("v2 4k", Options { version: 2, ..o(2 << 20, 4096) }),
        setup("subclusters 16k", Options { extended_l2: true, ..o(1 << 20, 16384) }),
        setup("refcounts 1 bit", Options { refcount_bits: 1, ..o(1 << 20, 1024) }),
        setup("refcounts 64 bits", Options { refcount_bits: 64, ..o(1 << 20, 1024) }),
        setup("lazy", Options { lazy_refcounts: true, ..o(1 << 20, 4096) }),
        setup("data file", data_file(o(1 << 20, 4096))),
        setup("zstd", Options { compression_type: Compression::Zstd, ..o(1 << 20, 4096) }),
        Setup { backing: true, ..setup("backing 4k", o(1 << 20, 4096)) },
        Setup {
            backing: true,
            ..setup("backing subclusters", Options { extended_l2: true, ..o(1 << 20, 16384) })
        },
        Setup { l2_cache: Some(8192), ..setup("512, small cache", o(512 << 10, 512)) },
        Setup { bitmap: true, ..setup("bitmap 4k", o(1 << 20, 4096)) },
        Setup { bitmap: true, ..setup("bitmap 1k", o(256 << 10, 1024)) },
        Setup { bitmap: true, backing: true, ..setup("bitmap over backing 64k", o(1 << 20, 65536)) },
    ]
}

/// Whether the kind of image can do it.
fn allowed(setup: &Setup, ask: Ask) -> bool {
    match ask {
        // Packed clusters share host clusters, so they need a refcount above 1.
        Ask::WritePacked => setup.create.data_file.is_none() && setup.create.refcount_bits > 1,
        // What a new length does to a bitmap is the graph's business, which is not here.
        Ask::Resize(_) => !setup.bitmap,
        Ask::Take | Ask::Drop(_) => setup.create.data_file.is_none() && setup.create.refcount_bits > 1,
        _ => true,
    }
}

/// A request on sectors `[first, first + n)`.
fn request(ask: Ask, first: u64, n: u64) -> Request {
    Request { ask, sectors: first..first + n }
}

/// The operations of the exhaustive part.
pub const SHORT_OPS: usize = 12;

/// Operation number `i` of the exhaustive part, for clusters of `c` sectors on a disk of `size` sectors.
fn short_op(i: usize, c: u64, size: u64) -> Request {
    match i {
        0 => request(Ask::Write, 8 * c, c),
        1 => request(Ask::Write, 0, c),
        2 => request(Ask::Write, c - 1, 2),
        3 => request(Ask::Zero { unmap: true }, 0, c),
        4 => request(Ask::Zero { unmap: false }, 8 * c, 1),
        5 => request(Ask::Discard, c, 2 * c),
        6 => request(Ask::Resize(size * 3), 0, 0),
        7 => request(Ask::Resize(2 * c), 0, 0),
        8 => request(Ask::WritePacked, 4 * c, c),
        9 => request(Ask::WritePacked, 5 * c, 2 * c),
        10 => request(Ask::Flush, 0, 0),
        _ => request(Ask::Write, size - 2 * c, 2 * c),
    }
}

/// All histories of up to three operations, by number; `None` past the last.
pub fn short(setup: &Setup, number: usize) -> Option<Vec<Step>> {
    let n = SHORT_OPS;
    let ops = match number {
        i if i < n => vec![i],
        i if i < n + n * n => vec![(i - n) / n, (i - n) % n],
        i if i < n + n * n + n * n * n => {
            let i = i - n - n * n;
            vec![i / n / n, i / n % n, i % n]
        }
        _ => return None,
    };
    let (c, size) = (setup.create.cluster_size / 512, setup.create.size / 512);
    // Something is there before: data, a packed cluster, a zero cluster.
    let mut steps = vec![
        vec![request(Ask::Write, 0, 3 * c)],
        vec![request(Ask::WritePacked, 4 * c, c)],
        vec![request(Ask::Zero { unmap: false }, 6 * c, c)],
        vec![request(Ask::Flush, 0, 0)],
    ];
    steps.extend(ops.into_iter().map(|i| vec![short_op(i, c, size)]));
    steps.push(vec![request(Ask::Flush, 0, 0)]);
    Some(clean(setup, steps))
}

/// How many histories [`short`] has.
pub const SHORT: usize = SHORT_OPS + SHORT_OPS * SHORT_OPS + SHORT_OPS * SHORT_OPS * SHORT_OPS;

fn clean(setup: &Setup, steps: Vec<Step>) -> Vec<Step> {
    let keep = |s: Step| s.into_iter().filter(|r| allowed(setup, r.ask)).collect::<Step>();
    steps.into_iter().map(keep).filter(|s| !s.is_empty()).collect()
}

/// A random history of about `n` requests, some of them at once, on a disk of `size` sectors.
pub fn random(setup: &Setup, rng: &mut Rng, size: u64, n: usize) -> Vec<Step> {
    let c = setup.create.cluster_size / 512;
    // Few places, so that things meet.
    let places = rng.between(2, 12).min((size / c).max(1));
    let wide = rng.chance(0.3);
    let resizes = rng.chance(0.4);
    let snapshots = rng.chance(0.4);
    let flush = *rng.choose(&[0.05, 0.15, 0.3]);
    let most = *rng.choose(&[1, 1, 3, 8]);
    let mut steps = Vec::new();
    let mut left = n;
    while left > 0 {
        let many = rng.between(1, most).min(left as u64);
        left -= many as usize;
        if snapshots && rng.chance(0.15) {
            let ask = if rng.chance(0.6) { Ask::Take } else { Ask::Drop(rng.draw()) };
            steps.push(vec![request(ask, 0, 0)]);
        }
        let step: Step = (0..many).map(|_| one(setup, rng, size, c, places, wide, flush)).collect();
        steps.push(step);
        if resizes && rng.chance(0.1) {
            let to = match rng.below(4) {
                0 => rng.below(size) + 1,
                1 => size * 2,
                2 => size * 8,
                _ => size,
            };
            steps.push(vec![request(Ask::Resize(to), 0, 0)]);
        }
    }
    clean(setup, steps)
}

fn one(setup: &Setup, rng: &mut Rng, size: u64, c: u64, places: u64, wide: bool, flush: f64) -> Request {
    if rng.chance(flush) {
        return request(Ask::Flush, 0, 0);
    }
    let cluster =
        if wide { rng.below((size / c).max(1)) } else { rng.below(places) * (size / c / places).max(1) };
    let first = cluster * c;
    let aligned = rng.chance(0.5);
    let (first, n) = if aligned {
        (first, c * rng.between(1, 3))
    } else {
        (first + rng.below(c), rng.between(1, c.min(40) + 1))
    };
    let ask = match rng.below(12) {
        0..=4 => Ask::Write,
        5..=6 => Ask::Zero { unmap: rng.chance(0.5) },
        7..=8 => Ask::Discard,
        _ => Ask::WritePacked,
    };
    if ask == Ask::WritePacked {
        // Whole clusters only; anything else is not compressed.
        return if allowed(setup, ask) {
            request(ask, cluster * c, c)
        } else {
            request(Ask::Write, first, n)
        };
    }
    request(ask, first, n)
}
