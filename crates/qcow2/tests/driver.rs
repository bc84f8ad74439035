//! The running driver, one behaviour a test.

#![allow(clippy::unwrap_used)] // a test helper that fails fails the test

mod disk;
mod peer;

use block::{Data, ErrorKind, ReqFlags, Span};
use disk::{open, run};
use graph::{Fact, Node, Role};
use peer::TempDir;
use qcow2::testing::file::{LateNode, edge_onto};
use qcow2::testing::history::command;
use qcow2::{Options, Qcow2};
use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;

fn read_only() -> Options {
    Options { writable: false, ..Options::default() }
}

async fn write(image: &Qcow2, at: u64, byte: u8, len: usize) {
    image.write(Span::new(at, len as u64), vec![byte; len].into(), ReqFlags::NONE).await.unwrap();
}

fn check(path: &str) {
    command("qemu-img", &["check", "-f", "qcow2", path]).unwrap();
}

#[test]
fn a_flush_costs_two_barriers_for_new_clusters_one_for_old_none_for_nothing() {
    let dir = TempDir::new("barriers");
    let path = dir.create("a", "cluster_size=64k", "64M");
    let p = path.clone();
    run(|env| async move {
        let image = open(&env, &p, Options::default()).await.unwrap();
        let count = async |work: &dyn Fn() -> block::Io<'static>| {
            let before = image.barriers();
            work().await.unwrap();
            image.flush().await.unwrap();
            image.barriers() - before
        };
        let i = image.clone();
        let write_at = move |at: u64| -> block::Io<'static> {
            let i = i.clone();
            Box::pin(async move { i.write(Span::new(at, 4096), vec![7; 4096].into(), ReqFlags::NONE).await })
        };
        assert_eq!(count(&|| Box::pin(async { Ok(()) })).await, 1, "what a killed process may have left");
        assert_eq!(count(&|| write_at(0)).await, 2, "first write");
        assert_eq!(count(&|| write_at(1 << 20)).await, 2, "another new cluster");
        assert_eq!(count(&|| write_at(4096)).await, 1, "in place");
        assert_eq!(count(&|| Box::pin(async { Ok(()) })).await, 0, "nothing");
        let i = image.clone();
        let discard = move || -> block::Io<'static> {
            let i = i.clone();
            Box::pin(async move { i.discard(Span::new(1 << 20, 65536)).await })
        };
        assert_eq!(count(&discard).await, 1, "only an unmapping");
        image.close().await.unwrap();
    });
    check(&path);
}

#[test]
fn what_qemu_io_writes_is_read() {
    let dir = TempDir::new("qemu-io");
    let options = [
        "compat=0.10",
        "cluster_size=512",
        "extended_l2=on,cluster_size=16k",
        "compression_type=zstd",
        "refcount_bits=1,cluster_size=4k",
    ];
    for (n, o) in options.iter().enumerate() {
        let path = dir.create(&format!("{n}"), o, "4M");
        command(
            "qemu-io",
            &[
                "-f",
                "qcow2",
                "-c",
                "write -P 1 0 1M",
                "-c",
                "write -P 2 5000 777",
                "-c",
                "write -z 64k 64k",
                "-c",
                "write -c -P 3 2M 64k",
                "-c",
                "discard 256k 128k",
                "-c",
                "write -P 4 4194000 304",
                &path,
            ],
        )
        .unwrap();
        let raw = dir.file("raw");
        command("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", &path, &raw]).unwrap();
        let want = std::fs::read(&raw).unwrap();
        let o = o.to_string();
        run(|env| async move {
            let image = open(&env, &path, read_only()).await.unwrap();
            let got = image.read(Span::new(0, 4 << 20)).await.unwrap().to_vec();
            assert!(got == want, "{o}");
            let e = image.write(Span::new(0, 1), vec![1].into(), ReqFlags::NONE).await.unwrap_err();
            assert_eq!(e.kind(), ErrorKind::ReadOnly);
        });
    }
}

/// Opens an image whose bytes were changed, writes to it, and gives what was told of corruption and the error.
fn corrupted(
    name: &str,
    at: u64,
    bytes: &[u8],
    write_at: u64,
) -> (Vec<qcow2::Corruption>, block::BlockError, bool) {
    let dir = TempDir::new(name);
    let path = dir.create("a", "cluster_size=64k", "8M");
    command("qemu-io", &["-f", "qcow2", "-c", "write 0 64k", &path]).unwrap();
    let mut image = std::fs::read(&path).unwrap();
    image[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    std::fs::write(&path, &image).unwrap();
    let p = path.clone();
    let (told, error) = run(|env| async move {
        let image = open(&env, &p, Options::default()).await.unwrap();
        let told = Rc::new(RefCell::new(Vec::new()));
        let out = told.clone();
        image.on_corruption(move |c| out.borrow_mut().push(c.clone()));
        let error = image
            .write(Span::new(write_at, 4096), vec![1; 4096].into(), ReqFlags::NONE)
            .await
            .expect_err("the write must be refused");
        let again = image.write(Span::new(0, 1), vec![1].into(), ReqFlags::NONE).await.unwrap_err();
        assert_eq!(again.errno(), block::BlockError::ENOMEDIUM);
        assert!(image.flush().await.is_err());
        image.close().await.unwrap();
        (told.take(), error)
    });
    let marked = std::fs::read(&path).unwrap()[79] & 2 != 0;
    (told, error, marked)
}

#[test]
fn a_write_over_metadata_is_refused_and_the_image_marked() {
    // As in the recorded conversation: the entry of cluster 0 points at the L1 table.
    let entry = (1u64 << 63 | 0x30000).to_be_bytes();
    let (told, error, marked) = corrupted("overlap", 0x40000, &entry, 0);
    assert_eq!(told.len(), 1);
    assert_eq!(told[0].message, "Preventing invalid write on metadata (overlaps with active L1 table)");
    assert_eq!((told[0].offset, told[0].size, told[0].fatal), (Some(196608), Some(4096), true));
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.message().contains("0x30000"), "{error}");
    assert!(marked);
}

#[test]
fn entries_that_break_the_format_are_corruption() {
    let unaligned = (1u64 << 63 | 0x50200).to_be_bytes();
    let (told, _, marked) = corrupted("unaligned", 0x40000, &unaligned, 0);
    assert!(told[0].message.contains("unaligned (L2 offset: 0x40000, L2 index: 0x0)"), "{:?}", told[0]);
    assert!(marked);
    // An L1 entry that points to the L1 table itself.
    let loops = (1u64 << 63 | 0x30000).to_be_bytes();
    let (told, _, _) = corrupted("l1-loop", 0x30000, &loops, 0);
    assert!(told[0].message.contains("overlaps with active L1 table"), "{:?}", told[0]);
    // A refcount of 0 for the L2 table: an allocation would take it.
    let (told, _, _) = corrupted("refcount", 0x20008, &[0, 0], 1 << 20);
    assert!(told[0].message.contains("active L2 table"), "{told:?}");
}

#[test]
fn a_marked_image_is_not_written_but_read() {
    let dir = TempDir::new("marked");
    let path = dir.create("a", "compat=1.1", "1M");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[79] |= 2;
    std::fs::write(&path, &bytes).unwrap();
    run(|env| async move {
        let e = open(&env, &path, Options::default()).await.err().unwrap();
        assert!(e.message().contains("Image is corrupt; cannot be opened read/write"), "{e}");
        let image = open(&env, &path, read_only()).await.unwrap();
        assert!(image.read(Span::new(0, 512)).await.unwrap().is_zero());
    });
}

#[test]
fn encryption_is_refused_by_name() {
    let dir = TempDir::new("luks");
    let path = dir.file("a");
    let secret = ["--object", "secret,id=s,data=abc"];
    let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    let all = [&["create"][..], &secret, &["-q", "-f", "qcow2", "-o", options, &path, "1M"]].concat();
    command("qemu-img", &all).unwrap();
    run(|env| async move {
        let e = open(&env, &path, read_only()).await.err().unwrap();
        assert!(e.message().contains("luks"), "{e}");
        assert_eq!(e.kind(), ErrorKind::Unsupported);
    });
}

#[test]
fn bitmaps_are_marked_while_the_image_may_be_written() {
    let dir = TempDir::new("bitmaps");
    let path = dir.create("a", "compat=1.1", "1M");
    command("qemu-img", &["bitmap", "--add", "-f", "qcow2", &path, "b"]).unwrap();
    let marked = |path: &str| {
        let said = std::process::Command::new("qemu-img").args(["info", "-U", path]).output().unwrap();
        let said = String::from_utf8(said.stdout).unwrap();
        assert!(said.contains("name: b"), "{said}");
        said.contains("in-use")
    };
    let p = path.clone();
    run(|env| async move {
        let image = open(&env, &p, read_only()).await.unwrap();
        assert!(!marked(&p), "reading changes nothing");
        image.close().await.unwrap();
        let image = open(&env, &p, Options::default()).await.unwrap();
        assert!(marked(&p), "what the file has may lack changes");
        image.set_writable(false).await.unwrap();
        assert!(!marked(&p), "stored");
        image.set_writable(true).await.unwrap();
        assert!(marked(&p));
        image.close().await.unwrap();
    });
    assert!(!marked(&path));
    command("qemu-img", &["check", "-q", &path]).unwrap();
}

/// A bitmap is stored when the image is closed: that its directory has no place in the header must be known when it is added.
#[test]
fn a_bitmap_has_its_place_in_the_header_beforehand() {
    let dir = TempDir::new("bitmap-room");
    let path = dir.create("a", "compat=1.1,cluster_size=512", "1M");
    // 512 bytes are 112 of header, 16 of the format's name, 32 of the directory's place, 8 of the end, and the name
    let (fits, long) = ("x".repeat(344), "x".repeat(345));
    let p = path.clone();
    run(|env| async move {
        let image = open(&env, &p, Options::default()).await.unwrap();
        image.write_backing_name(Some(&long), Some("qcow2")).await.unwrap();
        let e = image.check_bitmap("b", 65536).unwrap_err();
        assert!(e.message().contains("header"), "{e}");
        image.write_backing_name(Some(&fits), Some("qcow2")).await.unwrap();
        image.check_bitmap("b", 65536).unwrap();
        image.close().await.unwrap();
    });
    command("qemu-img", &["rebase", "-u", "-f", "qcow2", "-b", "", &path]).unwrap();
    command("qemu-img", &["bitmap", "--add", "-f", "qcow2", &path, "b"]).unwrap();
    run(|env| async move {
        let image = open(&env, &path, Options::default()).await.unwrap();
        let e = image.write_backing_name(Some(&"x".repeat(345)), Some("qcow2")).await.unwrap_err();
        assert!(e.message().contains("header"), "{e}");
        image.write_backing_name(Some(&"x".repeat(344)), Some("qcow2")).await.unwrap();
        image.close().await.unwrap();
        let image = open(&env, &path, Options::default()).await.unwrap();
        assert_eq!(image.backing_name().0.map(|n| n.len()), Some(344));
        image.close().await.unwrap();
        assert!(command("qemu-img", &["info", &path]).unwrap().contains("name: b"));
    });
}

#[test]
fn hostile_bitmap_directories_are_refused_by_name() {
    let dir = TempDir::new("hostile-bitmaps");
    let path = dir.create("a", "compat=1.1", "1M");
    command("qemu-img", &["bitmap", "--add", "-f", "qcow2", "-g", "512", &path, "b"]).unwrap();
    let good = std::fs::read(&path).unwrap();
    let word = |b: &[u8], at: usize| u64::from_be_bytes(b[at..at + 8].try_into().unwrap());
    // The extension says where the directory is.
    let extension = good.windows(4).position(|w| w == [0x23, 0x85, 0x28, 0x75]).unwrap() + 8;
    let directory = word(&good, extension + 16) as usize;
    let table = word(&good, directory) as usize;
    let spoil = |at: usize, bytes: &[u8], why: &str| {
        let mut bad = good.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        std::fs::write(&path, bad).unwrap();
        let (p, why) = (path.clone(), why.to_owned());
        run(|env| async move {
            for options in [read_only(), Options::default()] {
                let e = open(&env, &p, options).await.err().unwrap_or_else(|| panic!("accepted: {why}"));
                assert!(e.message().contains(&why), "{e} instead of {why}");
            }
        });
    };
    spoil(extension + 8, &(1u64 << 20).to_be_bytes(), "bitmap directory");
    spoil(extension, &2u32.to_be_bytes(), "the directory ends before it");
    spoil(directory + 8, &2u32.to_be_bytes(), "bitmap 'b'");
    spoil(directory + 8, &u32::MAX.to_be_bytes(), "invalid table size");
    spoil(directory + 12, &[1, 0, 0, 0], "flags");
    spoil(directory + 17, &[63], "granularity 2^63");
    spoil(directory + 20, &[0, 0, 0, 8], "extra data");
    spoil(directory, &(table as u64 + 512).to_be_bytes(), "invalid table offset");
    spoil(directory, &(1u64 << 50).to_be_bytes(), "behind the end of the file");
    spoil(table, &3u64.to_be_bytes(), "table entry 0x3");
}

#[test]
fn lazy_refcounts_mark_the_image_and_a_dirty_image_is_repaired() {
    let dir = TempDir::new("lazy");
    let path = dir.create("a", "compat=1.1,lazy_refcounts=on", "8M");
    let dirty = |path: &str| std::fs::read(path).unwrap()[79] & 1 != 0;
    let p = path.clone();
    run(|env| async move {
        let image = open(&env, &p, Options::default()).await.unwrap();
        assert!(!dirty(&p));
        write(&image, 0, 5, 70000).await;
        image.flush().await.unwrap();
        assert!(dirty(&p), "refcounts are stale");
        // Not closed: as after a kill.
    });
    let p = path.clone();
    run(|env| async move {
        let image = open(&env, &p, Options::default()).await.unwrap();
        assert!(!dirty(&p), "repaired");
        assert_eq!(image.read(Span::new(69999, 2)).await.unwrap().to_vec(), [5, 0]);
        write(&image, 1 << 20, 6, 4096).await;
        image.flush().await.unwrap();
        assert!(dirty(&p));
        image.close().await.unwrap();
        assert!(!dirty(&p));
    });
    check(&path);
}

#[test]
fn backing_names_and_facts() {
    let dir = TempDir::new("facts");
    let path = dir.create("a", "compat=1.1,cluster_size=4k", "1M");
    let p = path.clone();
    run(|env| async move {
        let image = open(&env, &p, Options::default()).await.unwrap();
        image.write_backing_name(Some("base.img"), Some("raw")).await.unwrap();
        assert_eq!(image.backing_name(), (Some("base.img".into()), Some("raw".into())));
        let d = image.details().await.unwrap();
        assert_eq!(d.cluster_size, Some(4096));
        let names: Vec<_> = d.specific.iter().map(|(n, _)| *n).collect();
        assert_eq!(
            names,
            ["compat", "compression-type", "lazy-refcounts", "refcount-bits", "corrupt", "extended-l2"]
        );
        assert_eq!(d.specific[3].1, Fact::Number(16));
        image.close().await.unwrap();
    });
    let info = command("qemu-img", &["info", "-U", &path]).unwrap();
    assert!(info.contains("backing file: base.img") && info.contains("backing file format: raw"), "{info}");
    let p = path.clone();
    run(|env| async move {
        let image = open(&env, &p, Options::default()).await.unwrap();
        image.write_backing_name(None, None).await.unwrap();
        image.close().await.unwrap();
    });
    assert!(!command("qemu-img", &["info", &path]).unwrap().contains("backing"));
    check(&path);
}

#[test]
fn emptied_images_hold_nothing_and_space_comes_back() {
    let dir = TempDir::new("empty");
    let path = dir.create("a", "cluster_size=64k", "8M");
    let p = path.clone();
    run(|env| async move {
        let image = open(&env, &p, Options::default()).await.unwrap();
        write(&image, 0, 1, 4 << 20).await;
        image.flush().await.unwrap();
        image.make_empty().await.unwrap();
        assert!(image.read(Span::new(0, 8 << 20)).await.unwrap().is_zero());
        let extents = image.extents(Span::new(0, 8 << 20)).await.unwrap();
        assert!(extents.iter().all(|e| e.kind == block::Kind::Unallocated), "{extents:?}");
        image.flush().await.unwrap();
        write(&image, 0, 2, 4 << 20).await;
        image.close().await.unwrap();
    });
    check(&path);
    assert!(std::fs::metadata(&path).unwrap().len() < 6 << 20, "freed clusters were used again");
}

#[test]
fn a_cluster_under_a_slow_read_is_not_reused() {
    let dir = TempDir::new("epoch");
    let path = dir.create("a", "cluster_size=64k", "8M");
    run(|env| async move {
        let mode = env::OpenMode { write: true, ..Default::default() };
        let file = env.open(Path::new(&path), mode).await.unwrap();
        let late = LateNode::new(&env, file, 1, &Rc::default());
        let edge = edge_onto(&env, late.clone(), true, Role::Primary).await.unwrap();
        let image = Qcow2::open(env.clone(), edge, None, Options::default()).await.unwrap();
        write(&image, 0, 1, 65536).await;
        image.flush().await.unwrap();
        let place = async |at: u64| image.extents(Span::new(at, 65536)).await.unwrap()[0].host;
        let host = place(0).await;
        // A read that has looked its place up, and whose bytes come late.
        late.hold_reads.set(true);
        let mut slow = image.read(Span::new(0, 65536));
        let first = std::future::poll_fn(|cx| std::task::Poll::Ready(slow.as_mut().poll(cx))).await;
        assert!(first.is_pending());
        image.discard(Span::new(0, 65536)).await.unwrap();
        image.flush().await.unwrap();
        // What a commit frees it gives back after the flush is answered.
        for _ in 0..100 {
            env.yield_now().await;
        }
        write(&image, 1 << 20, 2, 65536).await;
        assert_ne!(place(1 << 20).await, host, "the cluster is still being read");
        late.hold_reads.set(false);
        assert_eq!(slow.await.unwrap().to_vec(), vec![1; 65536]);
        // Now it is free: at the next commit it is given back, and found.
        image.flush().await.unwrap();
        write(&image, 2 << 20, 3, 65536).await;
        image.flush().await.unwrap();
        write(&image, 3 << 20, 3, 65536).await;
        let places = [place(2 << 20).await, place(3 << 20).await];
        assert!(places.contains(&host), "{places:?} {host:?}");
        image.close().await.unwrap();
    });
}

#[test]
fn closing_waits_for_what_dropped_writes_began() {
    let dir = TempDir::new("closing");
    for seed in 1..30 {
        // small clusters: each write needs an L2 table of its own, and the file grows
        let path = dir.create("a", "cluster_size=512", "8M");
        let p = path.clone();
        run(|env| async move {
            let mode = env::OpenMode { write: true, ..Default::default() };
            let file = env.open(Path::new(&p), mode).await.unwrap();
            let late = LateNode::new(&env, file, seed, &Rc::default());
            let edge = edge_onto(&env, late, true, Role::Primary).await.unwrap();
            let image = Qcow2::open(env.clone(), edge, None, Options::default()).await.unwrap();
            let data = Data::from(vec![1; 65536]);
            let mut writes: Vec<_> = (0..8)
                .map(|i| image.write(Span::new(i << 20, 65536), data.clone(), ReqFlags::NONE))
                .collect();
            for turn in 0..seed {
                let i = turn as usize % writes.len();
                let w = &mut writes[i];
                let _ended_or_not =
                    std::future::poll_fn(|cx| std::task::Poll::Ready(w.as_mut().poll(cx))).await;
                if turn % 3 == 0 {
                    env.yield_now().await;
                }
                if turn as usize >= writes.len() {
                    break;
                }
            }
            drop(writes);
            image.close().await.unwrap();
        });
        check(&path); // leaks fail it, too
    }
}

#[test]
fn independent_allocating_writes_run_side_by_side() {
    let dir = TempDir::new("parallel");
    let path = dir.create("a", "cluster_size=64k", "64M");
    let p = path.clone();
    run(|env| async move {
        let image = open(&env, &p, Options::default()).await.unwrap();
        let all = (0..256u64).map(|i| {
            // Two writers per cluster.
            let at = i / 2 * 65536 * 3 + i % 2 * 8192;
            let data = Data::from(vec![i as u8; 4096]);
            image.write(Span::new(at, 4096), data, ReqFlags::NONE)
        });
        for r in futures_util::future::join_all(all).await {
            r.unwrap();
        }
        for i in 0..256u64 {
            let at = i / 2 * 65536 * 3 + i % 2 * 8192;
            assert_eq!(image.read(Span::new(at, 4096)).await.unwrap().to_vec(), vec![i as u8; 4096]);
        }
        image.close().await.unwrap();
    });
    check(&path);
}

/// Not a test of behaviour: `LIVEBLK_BENCH=1 cargo test --release -p qcow2 --test driver bench -- --nocapture` prints what
/// an allocating 4 KiB write costs.
#[test]
fn bench_allocating_writes() {
    let Some(n) = std::env::var("LIVEBLK_BENCH").ok().and_then(|v| v.parse::<u64>().ok()) else { return };
    let cpu = || {
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
        let f: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        (f[11].parse::<f64>().unwrap(), f[12].parse::<f64>().unwrap())
    };
    for depth in [1u64, 16] {
        let dir = TempDir::new("bench");
        let path = dir.create("a", "cluster_size=64k", "64G");
        run(move |env| async move {
            let image = open(&env, &path, Options::default()).await.unwrap();
            let data = Data::from(vec![7u8; 4096]);
            let (t, c) = (std::time::Instant::now(), cpu());
            let writers = (0..depth).map(|w| {
                let (image, data) = (image.clone(), data.clone());
                async move {
                    for i in (w..n).step_by(depth as usize) {
                        // Scattered, each in a new cluster.
                        let c = (i * 7919) % (1 << 19);
                        let at = Span::new(c << 16, 4096);
                        image.write(at, data.clone(), ReqFlags::NONE).await.unwrap();
                    }
                }
            });
            futures_util::future::join_all(writers).await;
            let (wall, d) = (t.elapsed(), cpu());
            let us = |v: f64| v * 10_000.0 / n as f64;
            println!(
                "depth {depth}: {:.0} writes/s, {:.2} us user + {:.2} us system per write",
                n as f64 / wall.as_secs_f64(),
                us(d.0 - c.0),
                us(d.1 - c.1)
            );
            let t = std::time::Instant::now();
            for i in 0..n {
                let c = (i * 7919) % (1 << 19);
                image.write(Span::new(c << 16, 4096), data.clone(), ReqFlags::NONE).await.unwrap();
            }
            println!("overwrite, depth 1: {:.2} us", t.elapsed().as_secs_f64() * 1e6 / n as f64);
            image.close().await.unwrap();
        });
        drop(dir);
    }
}
