//! Images we create are what the reference makes of the same options: clean, same features, same content, and usable.
#![allow(missing_docs, clippy::unwrap_used)]

mod peer;

use block::Prealloc;
use peer::{TempDir, ok, qemu_check, run};
use qcow2::check::{Fix, check};
use qcow2::create::{Options, create};
use qcow2::header::Compression;
use qcow2::storage::{Memory, now};

fn info(dir: &TempDir, file: &str) -> serde_json::Value {
    let out = run(&dir.0, "qemu-img", &["info", "--output", "json", file]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

fn map(dir: &TempDir, file: &str) -> Vec<(bool, bool, bool, u64)> {
    let out = run(&dir.0, "qemu-img", &["map", "--output", "json", file]);
    let v: Vec<serde_json::Value> = serde_json::from_slice(&out.stdout).unwrap();
    let flag = |e: &serde_json::Value, k: &str| e[k].as_bool().unwrap_or(false);
    v.iter()
        .map(|e| (flag(e, "present"), flag(e, "zero"), flag(e, "data"), e["length"].as_u64().unwrap()))
        .collect()
}

#[test]
fn every_option_gives_an_image_the_reference_takes_for_its_own() {
    let dir = TempDir::new("create");
    ok(&dir.0, "qemu-img", &["create", "-q", "-f", "raw", "b.raw", "1M"]);
    let o = || Options::new(5 << 20);
    let data = |raw: bool| Options { data_file: Some("d.raw".into()), data_file_raw: raw, ..o() };
    let mut cases = vec![
        (o(), ""),
        (Options { version: 2, ..o() }, "compat=0.10"),
        (Options { lazy_refcounts: true, ..o() }, "lazy_refcounts=on"),
        (Options { extended_l2: true, ..o() }, "extended_l2=on"),
        (Options { compression_type: Compression::Zstd, ..o() }, "compression_type=zstd"),
        (
            Options { backing_file: Some("b.raw".into()), backing_fmt: Some("raw".into()), ..o() },
            "backing_file=b.raw,backing_fmt=raw",
        ),
        (data(false), "data_file=d.raw"),
        (data(true), "data_file=d.raw,data_file_raw=on"),
        (
            Options { preallocation: Prealloc::Metadata, ..data(false) },
            "data_file=d.raw,preallocation=metadata",
        ),
        (Options { preallocation: Prealloc::Metadata, ..o() }, "preallocation=metadata"),
        (Options { preallocation: Prealloc::Falloc, ..o() }, "preallocation=falloc"),
        (Options { preallocation: Prealloc::Full, ..o() }, "preallocation=full"),
        (
            Options { preallocation: Prealloc::Metadata, extended_l2: true, ..o() },
            "preallocation=metadata,extended_l2=on",
        ),
        (Options::new(0), ""),
    ];
    let texts: Vec<String> = (0..=6).map(|n| format!("refcount_bits={}", 1 << n)).collect();
    cases.extend((0..=6).map(|n| (Options { refcount_bits: 1 << n, ..o() }, texts[n as usize].as_str())));
    let sizes: Vec<(u64, String)> =
        (9..=21).map(|b| (1 << b, format!("cluster_size={}", 1u64 << b))).collect();
    cases.extend(sizes.iter().map(|(n, t)| (Options { cluster_size: *n, ..o() }, t.as_str())));
    let dense: Vec<(u64, String)> =
        (9..=16).map(|b| (1 << b, format!("cluster_size={},preallocation=metadata", 1u64 << b))).collect();
    cases.extend(
        dense.iter().map(|(n, t)| {
            (Options { cluster_size: *n, preallocation: Prealloc::Metadata, ..o() }, t.as_str())
        }),
    );
    for (options, text) in cases {
        let (ours, outside) = (Memory::default(), Memory::default());
        now(create(&ours, options.data_file.is_some().then_some(&outside), &options)).unwrap();
        assert_eq!(ours.barriers(), 2, "the tables, then the header");
        let bytes = ours.into_bytes();
        let report = now(check(&&bytes[..], Fix::Nothing)).unwrap();
        assert!(report.is_clean(), "{text}: {:?}", report.messages);
        let size = options.size.to_string();
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        args.extend(if text.is_empty() { vec![] } else { vec!["-o", text] });
        ok(&dir.0, "qemu-img", &[&args[..], &["theirs.qcow2", &size]].concat());
        let theirs = (info(&dir, "theirs.qcow2"), map(&dir, "theirs.qcow2"));
        std::fs::write(dir.path("ours.qcow2"), bytes).unwrap();
        if options.data_file.is_some() {
            std::fs::write(dir.path("d.raw"), outside.into_bytes()).unwrap();
        }
        let verdict = qemu_check(&dir.0, "ours.qcow2");
        assert_eq!(verdict.status, 0, "{text}: {verdict:?}");
        let mine = info(&dir, "ours.qcow2");
        for key in
            ["virtual-size", "cluster-size", "format-specific", "backing-filename", "backing-filename-format"]
        {
            assert_eq!(mine[key], theirs.0[key], "{text}: {key}");
        }
        // Whether preallocated data reads as zero depends on holes in the file, and ours was written from memory.
        let sparse = options.preallocation == Prealloc::Off && !options.data_file_raw;
        let known = |m: Vec<(bool, bool, bool, u64)>| {
            let mut out = Vec::<(bool, bool, bool, u64)>::new();
            for (p, z, d, n) in m {
                match out.last_mut() {
                    Some(last) if (last.0, last.1, last.2) == (p, z && sparse, d) => last.3 += n,
                    _ => out.push((p, z && sparse, d, n)),
                }
            }
            out
        };
        let (a, b) = (known(map(&dir, "ours.qcow2")), known(theirs.1));
        assert_eq!(a, b, "{text}");
        if options.size > 0 {
            let io = [
                "-f",
                "qcow2",
                "-c",
                "write -P 9 1M 100k",
                "-c",
                "read -P 9 1M 100k",
                "-c",
                "read -P 0 2M 1M",
            ];
            ok(&dir.0, "qemu-io", &[&io[..], &["ours.qcow2"]].concat());
            assert_eq!(qemu_check(&dir.0, "ours.qcow2").status, 0, "{text} after writes");
        }
    }
}

#[test]
fn an_interrupted_creation_leaves_no_image() {
    // Whatever part of the writes before the last barrier is there, there is no header.
    let full = Memory::default();
    now(create(&full, None::<&Memory>, &Options::new(1 << 20))).unwrap();
    let mut bytes = full.into_bytes();
    bytes[..65536].fill(0);
    let e = now(check(&&bytes[..], Fix::Nothing)).unwrap_err();
    assert_eq!(e.message(), "Image is not in qcow2 format");
}
