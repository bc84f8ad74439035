//! Growing with every way of setting space aside, and shrinking: what is added reads as zeroes, and the reference agrees.
#![allow(clippy::unwrap_used)]

use block::{Data, Prealloc, ReqFlags, Span};
use crashlab::run::Setup;
use env::{Executor, OpenMode};
use graph::{Node, Role};
use qcow2::Qcow2;
use qcow2::check::{Fix, check};
use qcow2::storage::now;
use qcow2::testing::FileNode;
use qcow2::testing::file::edge_onto;
use sim::{Host, Image, Machine, Net, NetProfile, Profile, SimBackend};
use std::path::Path;
use std::process::Command;

/// Resizes an image of this kind in turn to `sizes`, with data at its end each time; the files after.
fn resized(setup: &Setup, sizes: &[(u64, Prealloc)]) -> (Vec<u8>, Vec<u8>) {
    let (files, _) = setup.fresh().unwrap();
    let machine = Machine::new(5);
    let net = Net::new(&machine, NetProfile::calm());
    let host = Host::new("lab", &machine, &net, Profile::calm());
    host.install("image", Image::from_bytes(&files.image));
    host.install("data", Image::from_bytes(&files.data));
    let executor = Executor::new(SimBackend::root(&host));
    let (env, sizes) = (executor.env(), sizes.to_vec());
    let has_data = setup.create.data_file.is_some();
    let name = setup.name.clone();
    executor.run(async move {
        let mode = OpenMode { write: true, ..OpenMode::default() };
        let file = FileNode::new(env.open(Path::new("image"), mode).await.unwrap());
        let data = FileNode::new(env.open(Path::new("data"), mode).await.unwrap());
        let file = edge_onto(&env, file, true, Role::Primary).await.unwrap();
        let data = edge_onto(&env, data, true, Role::Data).await.unwrap();
        let node = Qcow2::open(env.clone(), file, has_data.then_some(data), qcow2::Options::default())
            .await
            .unwrap();
        for (to, prealloc) in sizes {
            let old = node.len();
            let tail = Span::between(old.saturating_sub(5000), old);
            node.write(tail, Data::from(vec![7; tail.len as usize]), ReqFlags::NONE).await.unwrap();
            node.resize(to, prealloc).await.unwrap();
            assert_eq!(node.len(), to, "{name}");
            let kept = tail.intersect(&Span::new(0, to));
            assert!(
                kept.is_empty() || node.read(kept).await.unwrap().to_vec().iter().all(|b| *b == 7),
                "{name}"
            );
            let added = Span::between(old, to.min(old + (4 << 20)));
            assert!(
                added.is_empty() || node.read(added).await.unwrap().is_zero(),
                "{name} {old} to {to} {prealloc:?}"
            );
        }
        node.close().await.unwrap();
    });
    (host.image("image").unwrap().to_vec(), host.image("data").unwrap().to_vec())
}

#[test]
fn every_kind_grows_and_shrinks() {
    let dir = std::env::temp_dir().join(format!("liveblk-resize-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    for setup in crashlab::workload::setups().into_iter().filter(|s| !s.backing) {
        let size = setup.create.size;
        for prealloc in [Prealloc::Off, Prealloc::Metadata, Prealloc::Falloc, Prealloc::Full] {
            let sizes = [
                (size + 512, prealloc),
                (size * 3 + 1536, prealloc),
                (size / 2 + 512, Prealloc::Off),
                (size, prealloc),
                (size * 40, Prealloc::Off),
            ];
            let (image, data) = resized(&setup, &sizes);
            let report = now(check(&&image[..], Fix::Nothing)).unwrap();
            assert!(report.is_clean(), "{} {prealloc:?}: {:?}", setup.name, report.messages);
            std::fs::write(dir.join("i.qcow2"), image).unwrap();
            std::fs::write(dir.join("data.raw"), data).unwrap();
            let out = Command::new("qemu-img")
                .args(["check", "-f", "qcow2", "i.qcow2"])
                .current_dir(&dir)
                .output()
                .unwrap();
            assert!(
                out.status.success(),
                "{} {prealloc:?}: {}",
                setup.name,
                String::from_utf8_lossy(&out.stderr)
            );
        }
    }
    std::fs::remove_dir_all(&dir).unwrap();
}
