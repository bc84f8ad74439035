//! Internal snapshots, ours and QEMU's in the same images: each side finds what the other made, and every state passes
//! `qemu-img check`.

#![allow(clippy::unwrap_used)] // a test helper that fails fails the test

mod disk;
mod peer;

use block::{ReqFlags, Span};
use disk::{open, run};
use env::Env;
use graph::Node;
use peer::TempDir;
use qcow2::testing::history::{Rng, command};
use qcow2::{Options, Qcow2};
use std::collections::BTreeMap;

async fn contents(image: &Qcow2) -> Vec<u8> {
    image.read(Span::new(0, image.len())).await.unwrap().to_vec()
}

/// What the disk is and what its snapshots are, by name.
struct Model {
    disk: Vec<u8>,
    snapshots: BTreeMap<String, Vec<u8>>,
}

/// Both sides show what the model says, and the image is sound.
async fn compare(env: &Env, dir: &TempDir, path: &str, model: &Model, what: &str) {
    command("qemu-img", &["check", "-q", "-f", "qcow2", path]).unwrap_or_else(|e| panic!("{what}: {e}"));
    let out = dir.file("out.raw");
    for (name, want) in &model.snapshots {
        let options = Options { writable: false, snapshot: Some(name.clone()), ..Options::default() };
        let image = open(env, path, options).await.unwrap();
        assert!(contents(&image).await == *want, "{what}: ours shows '{name}' wrong");
        image.close().await.unwrap();
        let by_name = format!("snapshot.name={name}");
        command("qemu-img", &["convert", "-l", &by_name, "-f", "qcow2", "-O", "raw", path, &out]).unwrap();
        assert!(std::fs::read(&out).unwrap() == *want, "{what}: QEMU shows '{name}' wrong");
    }
    command("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", path, &out]).unwrap();
    assert!(std::fs::read(&out).unwrap() == model.disk, "{what}: QEMU shows the disk wrong");
}

async fn change(image: &Qcow2, rng: &mut Rng, model: &mut Model) {
    let size = model.disk.len() as u64;
    let cluster = image.limits().cluster_size;
    for _ in 0..rng.below(12) + 1 {
        let start = rng.below(size / 512) * 512;
        let len = ((rng.below(3 * cluster / 512) + 1) * 512).min(size - start);
        let at = Span::new(start, len);
        let byte = (rng.below(255) + 1) as u8;
        let range = start as usize..(start + len) as usize;
        match rng.below(8) {
            0 => {
                image.zero(at, ReqFlags { may_unmap: rng.below(2) == 0, ..ReqFlags::NONE }).await.unwrap();
                model.disk[range].fill(0);
            }
            1 => {
                image.discard(at).await.unwrap();
                // a discard may do nothing to parts of clusters: what it did is asked
                let now = image.read(at).await.unwrap().to_vec();
                let old = model.disk[range.clone()].to_vec();
                assert!(now.iter().zip(&old).all(|(n, o)| *n == 0 || n == o));
                model.disk[range].copy_from_slice(&now);
            }
            2 => {
                let start = start / cluster * cluster;
                let len = cluster.min(size - start);
                let flags = ReqFlags { compressed: true, ..ReqFlags::NONE };
                image.write(Span::new(start, len), vec![byte; len as usize].into(), flags).await.unwrap();
                model.disk[start as usize..(start + len) as usize].fill(byte);
            }
            _ => {
                image.write(at, vec![byte; len as usize].into(), ReqFlags::NONE).await.unwrap();
                model.disk[range].fill(byte);
            }
        }
    }
}

/// A random history in which both sides write, take and delete.
async fn history(env: Env, options: &'static str, size: u64, seed: u64) {
    let dir = TempDir::new(&format!("{seed}-{}", options.replace([',', '='], "-")));
    let path = dir.create("i.qcow2", options, &size.to_string());
    let mut rng = Rng(seed);
    let mut model = Model { disk: vec![0; size as usize], snapshots: BTreeMap::new() };
    let mut number = 0;
    for round in 0..8 {
        let image = open(&env, &path, Options::default()).await.unwrap();
        for _ in 0..4 {
            change(&image, &mut rng, &mut model).await;
            if rng.below(2) == 0 {
                number += 1;
                let name = format!("own{number}");
                image.take_snapshot(&name, (1_700_000_000 + number, 7), 5).await.unwrap();
                model.snapshots.insert(name, model.disk.clone());
            }
            if rng.below(3) == 0 && !model.snapshots.is_empty() {
                let list = image.snapshots();
                let gone = image.delete_snapshot(rng.below(list.len() as u64) as usize).await.unwrap();
                model.snapshots.remove(&gone.name).unwrap();
            }
            assert!(contents(&image).await == model.disk, "seed {seed}, round {round}, {options}");
        }
        image.close().await.unwrap();
        let what = format!("seed {seed}, round {round}, {options}");
        compare(&env, &dir, &path, &model, &what).await;
        number += 1;
        let name = format!("qemu{number}");
        command("qemu-img", &["snapshot", "-c", &name, &path]).unwrap();
        model.snapshots.insert(name, model.disk.clone());
        let names: Vec<String> = model.snapshots.keys().cloned().collect();
        let any = &names[rng.below(names.len() as u64) as usize];
        match rng.below(3) {
            0 => {
                command("qemu-img", &["snapshot", "-d", any, &path]).unwrap();
                model.snapshots.remove(any);
            }
            1 => {
                command("qemu-img", &["snapshot", "-a", any, &path]).unwrap();
                model.disk.copy_from_slice(&model.snapshots[any]);
            }
            _ => (),
        }
        compare(&env, &dir, &path, &model, &what).await;
    }
}

#[test]
fn both_sides_agree_through_random_histories() {
    let seed = std::env::var("LIVEBLK_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    let kinds: [(&str, u64); 6] = [
        ("compat=1.1", 2 << 20),
        ("compat=1.1,cluster_size=4k", 3 << 20),
        ("compat=1.1,cluster_size=512", 256 << 10),
        ("compat=0.10,cluster_size=4k", 1 << 20),
        ("compat=1.1,extended_l2=on,cluster_size=16k", 1 << 20),
        ("compat=1.1,lazy_refcounts=on,cluster_size=2k,refcount_bits=32", 1 << 20),
    ];
    for (options, size) in kinds {
        run(move |env| history(env, options, size, seed));
    }
}

/// Refcounts of two bits count three users: the disk and two snapshots. The third is refused, and leaves no trace.
#[test]
fn what_cannot_be_counted_is_refused_and_undone() {
    run(|env| async move {
        let dir = TempDir::new("count");
        let path = dir.create("i.qcow2", "compat=1.1,cluster_size=4k,refcount_bits=2", "1M");
        let image = open(&env, &path, Options::default()).await.unwrap();
        let mut model = Model { disk: vec![0; 1 << 20], snapshots: BTreeMap::new() };
        let mut rng = Rng(7);
        change(&image, &mut rng, &mut model).await;
        for name in ["a", "b"] {
            image.take_snapshot(name, (1, 2), 3).await.unwrap();
            model.snapshots.insert(name.into(), model.disk.clone());
        }
        let error = image.take_snapshot("c", (1, 2), 3).await.unwrap_err();
        assert!(error.message().contains("refcounts of 2 bits"), "{error}");
        assert_eq!(image.snapshots().len(), 2);
        change(&image, &mut rng, &mut model).await;
        image.close().await.unwrap();
        compare(&env, &dir, &path, &model, "after the refusal").await;
        let image = open(&env, &path, Options::default()).await.unwrap();
        for _ in 0..2 {
            image.delete_snapshot(0).await.unwrap();
        }
        image.close().await.unwrap();
        model.snapshots.clear();
        compare(&env, &dir, &path, &model, "without snapshots").await;
    });
}

/// Tables that make no sense: the image opens, its snapshots are left alone, and the error says why.
#[test]
fn damaged_tables_are_left_alone() {
    run(|env| async move {
        // (offset in the entry, bytes put there, what is said)
        let hostile: [(u64, &[u8], &str); 3] = [
            (36, &[0xff; 4], "too much extra data"),
            (8, &[0xff; 4], "too large or badly placed"),
            (12, &[0xff; 4], "past the end"),
        ];
        for (at, bytes, want) in hostile {
            let dir = TempDir::new(&format!("damaged-{at}"));
            let path = dir.create("i.qcow2", "compat=1.1", "1M");
            command("qemu-img", &["snapshot", "-c", "one", &path]).unwrap();
            let mut file = std::fs::read(&path).unwrap();
            let table = u64::from_be_bytes(file[64..72].try_into().unwrap());
            let start = (table + at) as usize;
            file[start..start + bytes.len()].copy_from_slice(bytes);
            std::fs::write(&path, file).unwrap();
            let image = open(&env, &path, Options::default()).await.unwrap();
            image.write(Span::new(0, 512), vec![1; 512].into(), ReqFlags::NONE).await.unwrap();
            let error = image.take_snapshot("two", (0, 0), 0).await.unwrap_err();
            assert!(error.message().contains(want), "{error}");
            image.close().await.unwrap();
        }
    });
}
