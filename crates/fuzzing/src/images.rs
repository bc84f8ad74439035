//! qcow2 images: wrong fields in sound images, new images under any work, packed clusters.

use crate::choice;
use crashlab::states::{Choice, Lab, Stats};
use crashlab::workload::{self, random};
use crashlab::{hostile, record};
use qcow2::header::Compression;
use qcow2::testing::{pack, unpack};
use sim::Rng;
use std::sync::OnceLock;

/// The seed of the sound images.
const SOUND: u64 = 3;
/// Requests of one history: few, since all its crash states are looked at.
const REQUESTS: usize = 10;
/// Of these, a sample; the fuzzer asks nobody else.
const CHOICE: Choice = Choice { exhaustive: 3, sample: 3, torn: 1, qemu: 0.0 };

fn sound() -> &'static [Vec<u8>] {
    static IMAGES: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
    IMAGES.get_or_init(|| hostile::corpus(SOUND))
}

/// Wrong fields in a sound image: checked, repaired, opened, read, written.
pub(crate) fn fields(bytes: &[u8]) {
    let Some((first, rest)) = choice(bytes) else { return };
    let image = hostile::hostile(&sound()[first % sound().len()], &mut Rng::told(rest));
    if let Err(e) = hostile::try_all(&image, 1) {
        panic!("{e}");
    }
}

/// Any work on a new image: whatever moment it crashes at, the image is sound and has what was flushed (see `crashlab`).
pub(crate) fn operations(bytes: &[u8]) {
    let Some((first, rest)) = choice(bytes) else { return };
    let setups = workload::setups();
    let setup = &setups[first % setups.len()];
    let steps = random(setup, &mut Rng::told(rest), setup.create.size / 512, REQUESTS);
    let (_, recording) = match record(setup, steps, 1) {
        Ok(recorded) => recorded,
        Err(e) => panic!("{}: {e}", setup.name),
    };
    let scratch = std::env::temp_dir();
    let mut lab = Lab { stats: Stats::default(), rng: Rng::new(1), choice: CHOICE, scratch };
    if let Err(e) = lab.explore(setup, &recording, 0) {
        panic!("{}: {}", e.kind, e.text);
    }
}

/// Packed clusters: any bytes are unpacked or refused, and what was packed comes back.
pub(crate) fn compressed(bytes: &[u8]) {
    let Some((first, rest)) = choice(bytes) else { return };
    let how = [Compression::Zlib, Compression::Zstd][first & 1];
    let cluster = 512 << (first >> 1 & 7);
    if let Ok(out) = unpack(how, rest, cluster) {
        assert_eq!(out.len(), cluster);
    }
    let mut plain: Vec<u8> =
        rest.iter().copied().cycle().take(if rest.is_empty() { 0 } else { cluster }).collect();
    plain.resize(cluster, 0);
    match pack(how, &plain) {
        Ok(Some(packed)) => {
            assert!(packed.len() < cluster, "{} bytes of {cluster}", packed.len());
            assert_eq!(unpack(how, &packed, cluster).as_ref(), Ok(&plain));
        }
        Ok(None) => {}
        Err(e) => panic!("{cluster} bytes cannot be packed: {e}"),
    }
}
