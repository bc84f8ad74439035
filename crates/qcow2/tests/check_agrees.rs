//! Our check and `qemu-img check` say the same of images that the reference made, sound and broken.
#![allow(missing_docs, clippy::unwrap_used)]

mod peer;

use peer::{Rng, TempDir, Verdict, ok, qemu_check};
use qcow2::check::{Fix, Report, check};
use qcow2::storage::{Memory, Storage, now};

fn ours(bytes: &[u8]) -> Report {
    now(check(&bytes, Fix::Nothing)).expect("the header is sound")
}

/// Creation options that between them use every field of the format.
const OPTIONS: [&str; 24] = [
    "compat=1.1",
    "compat=0.10",
    "compat=0.10,cluster_size=512",
    "cluster_size=512",
    "cluster_size=4k",
    "cluster_size=2M",
    "refcount_bits=1",
    "refcount_bits=2,cluster_size=4k",
    "refcount_bits=4",
    "refcount_bits=8,cluster_size=512",
    "refcount_bits=32",
    "refcount_bits=64,cluster_size=1k",
    "lazy_refcounts=on",
    "extended_l2=on",
    "extended_l2=on,cluster_size=16k",
    "extended_l2=on,cluster_size=128k,refcount_bits=8",
    "compression_type=zstd",
    "data_file=DATA",
    "data_file=DATA,data_file_raw=on,cluster_size=4k",
    "data_file=DATA,extended_l2=on",
    "preallocation=metadata",
    "preallocation=falloc,cluster_size=16k",
    "preallocation=full,cluster_size=4k",
    "preallocation=metadata,extended_l2=on",
];

/// Makes an image with data, zeroes, discards, compressed clusters and (where possible) a snapshot and a bitmap.
fn make(dir: &TempDir, i: usize, options: &str) -> Vec<u8> {
    let name = "i.qcow2";
    let _ = std::fs::remove_file(dir.path(name));
    let options = options.replace("DATA", "d.raw");
    ok(&dir.0, "qemu-img", &["create", "-q", "-f", "qcow2", "-o", &options, name, "3M"]);
    let mut io = vec!["-f", "qcow2"];
    for c in [
        "write -P 1 0 200k",
        "write -P 2 1M 70k",
        "write -z 1100k 64k",
        "write -P 3 2000k 3k",
        "write -P 4 300k 1k",
    ] {
        io.extend(["-c", c]);
    }
    if !["preallocation", "data_file", "2M", "refcount_bits=1", "refcount_bits=2"]
        .iter()
        .any(|o| options.contains(o))
    {
        io.extend(["-c", "write -c -P 5 2560k 128k", "-c", "write -c -P 6 2816k 128k"]);
    }
    io.push(name);
    ok(&dir.0, "qemu-io", &io);
    let snapshot =
        i.is_multiple_of(2) && !options.contains("data_file") && !options.contains("refcount_bits=1");
    if snapshot {
        ok(&dir.0, "qemu-img", &["snapshot", "-c", "one", name]);
    }
    let again =
        ["-f", "qcow2", "-c", "write -P 7 100k 64k", "-c", "write -z -u 0 64k", "-c", "discard 1M 64k", name];
    ok(&dir.0, "qemu-io", &again);
    if !options.contains("0.10") {
        ok(&dir.0, "qemu-img", &["bitmap", "--add", name, "b0"]);
        ok(&dir.0, "qemu-io", &["-f", "qcow2", "-c", "write -P 8 700k 9k", name]);
    }
    std::fs::read(dir.path(name)).unwrap()
}

#[test]
fn sound_images_of_every_kind_are_clean_and_counted_the_same() {
    let dir = TempDir::new("check-sound");
    for (i, options) in OPTIONS.iter().enumerate() {
        let bytes = make(&dir, i, options);
        let (theirs, ours) = (qemu_check(&dir.0, "i.qcow2"), ours(&bytes));
        assert!(ours.is_clean(), "{options}: {:?}", ours.messages);
        assert_eq!(theirs.status, 0, "{options}: {}", theirs.stderr);
        let counts = (
            ours.allocated_clusters,
            ours.fragmented_clusters,
            ours.compressed_clusters,
            ours.image_end_offset,
        );
        assert_eq!(counts, (theirs.allocated, theirs.fragmented, theirs.compressed, theirs.end), "{options}");
    }
}

/// The places of an image's tables, for aiming.
fn aim(bytes: &[u8], rng: &mut Rng) -> usize {
    let be = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let bits = u32::from_be_bytes(bytes[20..24].try_into().unwrap());
    let (l1, rt, cluster) = (be(40) as usize, be(48) as usize, 1usize << bits);
    let l1_len = u32::from_be_bytes(bytes[36..40].try_into().unwrap()) as usize;
    match rng.below(10) {
        0..=1 => l1 + 8 * rng.below(l1_len as u64) as usize,
        2 => rt + 8 * rng.below(4) as usize,
        3..=4 => {
            let block = be(rt) as usize;
            let used = (bytes.len() / cluster * 2).max(8).min(cluster);
            block + 8 * rng.below(used as u64 / 8) as usize
        }
        _ => {
            let entry = be(l1 + 8 * rng.below(l1_len as u64) as usize) & 0x00ff_ffff_ffff_fe00;
            let table =
                if entry == 0 || entry as usize + cluster > bytes.len() { l1 } else { entry as usize };
            table + 8 * rng.below(cluster.min(2048) as u64 / 8) as usize
        }
    }
}

fn broken(bytes: &[u8], rng: &mut Rng) -> Vec<u8> {
    let mut b = bytes.to_vec();
    for _ in 0..1 + rng.below(2) {
        let at = aim(bytes, rng);
        if at + 8 > b.len() {
            continue;
        }
        let old = u64::from_be_bytes(b[at..at + 8].try_into().unwrap());
        let bits = u32::from_be_bytes(bytes[20..24].try_into().unwrap());
        let place = rng.below((bytes.len() as u64 >> bits) + 3) << bits;
        let new = match rng.below(8) {
            0 => old ^ 1 << 63,
            1 => old ^ 1 << rng.below(64),
            2 => place,
            3 => place | 1 << 63,
            4 => 0,
            5 => rng.next(),
            6 => old ^ 1,
            _ => old.wrapping_add(1 << bits),
        };
        b[at..at + 8].copy_from_slice(&new.to_be_bytes());
    }
    b
}

/// How bad: 0 clean, 1 leaks only, 2 corrupt or unreadable.
fn class(v: &Verdict) -> u8 {
    match (v.corruptions + v.check_errors > 0 || v.status == 1, v.leaks > 0) {
        (true, _) => 2,
        (false, true) => 1,
        _ => 0,
    }
}

#[test]
fn broken_images_get_the_same_verdict_and_repair_makes_them_clean() {
    let dir = TempDir::new("check-broken");
    let mut rng = Rng::from_env(1);
    let rounds: usize = std::env::var("LIVEBLK_ROUNDS").ok().and_then(|s| s.parse().ok()).unwrap_or(5);
    let (mut same_counts, mut all) = (0, 0);
    for (i, options) in OPTIONS.iter().enumerate().filter(|(_, o)| !o.contains("2M")) {
        let sound = make(&dir, i, options);
        for round in 0..rounds {
            let bytes = broken(&sound, &mut rng);
            std::fs::write(dir.path("i.qcow2"), &bytes).unwrap();
            let theirs = qemu_check(&dir.0, "i.qcow2");
            let report = ours(&bytes);
            let mine =
                if report.corruptions + report.check_errors > 0 { 2 } else { u8::from(report.leaks > 0) };
            let keep = |what: &str| {
                std::fs::write("/tmp/liveblk-check-failure.qcow2", &bytes).unwrap();
                format!(
                    "{options} round {round} {what}: ours {report:?}\ntheirs {theirs:?}\nkept in /tmp/liveblk-check-failure.qcow2"
                )
            };
            // Stricter: metadata on data whose refcount says 2, which the reference takes for sharing; the zero flag where
            // it has no meaning (version 2, extended entries) and impossible subclusters, which it only minds on reading.
            let strict = ["metadata lies on", "reserved bits 0x1 are set", "invalid subcluster bitmap"];
            let stricter = |m: &String| strict.iter().any(|s| m.contains(s));
            let stricter = report.messages.iter().any(stricter);
            assert!(mine == class(&theirs) || mine > class(&theirs) && stricter, "{}", keep("verdict"));
            all += 1;
            same_counts +=
                usize::from((report.corruptions, report.leaks) == (theirs.corruptions, theirs.leaks));
            let fixed = Memory::new(bytes.clone());
            let after = match now(check(&fixed, Fix::All)) {
                Ok(after) => after,
                // Not even the reference can: the width of the refcounts would have to change.
                Err(e) if e.message().contains("bits hold") && theirs.stderr.contains("overflow") => continue,
                Err(e) => panic!("{}: {e}", keep("repair")),
            };
            let fixed = fixed.into_bytes();
            // Data that lies on a snapshot's tables stays: nobody knows which of the two is right.
            let left = ours(&fixed).messages;
            let stays = left.iter().all(|m| m.contains("metadata lies on"));
            assert!(
                after.is_clean() || stays && !left.is_empty(),
                "{}: after repair {after:?}",
                keep("repair")
            );
            std::fs::write(dir.path("i.qcow2"), fixed).unwrap();
            let theirs = qemu_check(&dir.0, "i.qcow2");
            assert_eq!(
                (theirs.status, class(&theirs)),
                (0, 0),
                "{}: {theirs:?}",
                keep("the reference after our repair")
            );
        }
    }
    println!("{all} broken images, {same_counts} with the very same counts");
    assert!(same_counts * 2 > all, "{same_counts} of {all}");
}

#[test]
fn leaks_are_given_back_and_only_where_nothing_is_lost() {
    let dir = TempDir::new("check-leaks");
    let sound = make(&dir, 1, "compat=1.1");
    let be = |b: &[u8], at: usize| u64::from_be_bytes(b[at..at + 8].try_into().unwrap());
    let l1 = be(&sound, 40) as usize;
    let l2 = (be(&sound, l1) & 0x00ff_ffff_ffff_fe00) as usize;
    // An L2 entry dropped: its cluster leaks.
    let mut leaky = sound.clone();
    leaky[l2 + 8..l2 + 16].fill(0);
    let m = Memory::new(leaky);
    let r = now(check(&m, Fix::Leaks)).unwrap();
    assert_eq!((r.leaks_fixed, r.leaks, r.corruptions), (1, 0, 0));
    assert!(m.barriers() >= 1);
    // An L1 entry that cannot be followed: what is behind it must not be given away.
    let mut lost = sound;
    lost[l1 + 6] |= 2;
    let m = Memory::new(lost.clone());
    let r = now(check(&m, Fix::Leaks)).unwrap();
    assert!(r.leaks_fixed == 0 && r.leaks > 0 && r.corruptions > 0, "{r:?}");
    assert_eq!(m.into_bytes(), lost);
    let _ = Memory::default().len();
}
