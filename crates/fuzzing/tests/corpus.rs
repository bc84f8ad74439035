//! The committed inputs of every target: what was found once stays found, and what led far still does.
#![allow(missing_docs, clippy::unwrap_used)]

use sim::Rng;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

/// Each input is also tried so many times with a few bytes changed.
const VARIANTS: u64 = 2;

fn inputs(target: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target);
    let mut all: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|f| f.unwrap().path()).collect();
    all.sort();
    all
}

fn varied(bytes: &[u8], rng: &mut Rng) -> Vec<u8> {
    let mut out = bytes.to_vec();
    for _ in 0..rng.between(1, 3) {
        let at = rng.index(out.len() + 1);
        match rng.below(4) {
            0 => out.insert(at, rng.draw() as u8),
            1 => out.truncate(at),
            _ if at < out.len() => out[at] ^= 1 << rng.below(8),
            _ => out.push(rng.draw() as u8),
        }
    }
    out
}

#[test]
fn every_target_holds_for_its_inputs_and_for_others_like_them() {
    for (target, _) in fuzzing::TARGETS.iter().filter(|(name, _)| *name != "canary") {
        let inputs = inputs(target);
        assert!(!inputs.is_empty(), "{target} has no inputs");
        for path in inputs {
            let bytes = std::fs::read(&path).unwrap();
            let mut rng = Rng::new(bytes.len() as u64);
            for n in 0..=VARIANTS {
                let input = if n == 0 { bytes.clone() } else { varied(&bytes, &mut rng) };
                if catch_unwind(AssertUnwindSafe(|| fuzzing::run(target, &input))).is_err() {
                    let kept = std::env::temp_dir().join(format!("liveblk-fuzz-{target}"));
                    std::fs::write(&kept, &input).unwrap();
                    panic!(
                        "{target}: {} in variant {n}, which is kept in {}",
                        path.display(),
                        kept.display()
                    );
                }
            }
        }
    }
}

#[test]
fn libfuzzer_has_every_target() {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz");
    let manifest = std::fs::read_to_string(fuzz.join("Cargo.toml")).unwrap();
    let mut files = std::fs::read_dir(fuzz.join("fuzz_targets")).unwrap().count();
    for (target, _) in fuzzing::TARGETS {
        let file = format!("fuzz_targets/{target}.rs");
        assert!(manifest.contains(&format!("name = \"{target}\"\npath = \"{file}\"")), "{target}");
        assert!(std::fs::read_to_string(fuzz.join(file)).unwrap().contains(&format!("run(\"{target}\", ")));
        files -= 1;
    }
    assert_eq!(files, 0, "files that are no targets");
}

#[test]
fn the_canary_dies_only_of_its_word() {
    fuzzing::run("canary", b"dis");
    assert!(catch_unwind(|| fuzzing::run("canary", b"disk")).is_err());
}
