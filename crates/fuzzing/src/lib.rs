//! The bodies of the fuzz targets: each takes any bytes and panics if something is not true that must be.
//!
//! `fuzz/` at the root gives them to libFuzzer, one by one (`cargo xtask fuzz`); the test of this crate gives them the committed
//! inputs of `fuzz/corpus/`, so that what was once found stays found. What must stay true: a target's result is a function of its
//! bytes alone, so that an input repeats what it showed.
//!
//! | to change | open |
//! |---|---|
//! | NBD handshakes, requests, replies | `nbd.rs` |
//! | JSON, key=value | `text.rs` |
//! | images, their tables, what is done to them, packed clusters | `images.rs` |
//! | frames and stores of replication, logs of changes | `peers.rs` |
//! | a guest's rings | `guest.rs` |
//! | the whole daemon: a monitor's bytes, commands, an NBD client, an NBD server | `daemon.rs`, `scene.rs` |
#![forbid(unsafe_code)]

mod daemon;
mod guest;
mod images;
mod nbd;
mod peers;
mod scene;
mod text;

/// A target: its name, that of its binary and of its folder in `fuzz/corpus/`; and what it does.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: &[Target] = &[
    ("canary", canary),
    ("compressed", images::compressed),
    ("dirty_log", peers::dirty_log),
    ("guest_rings", guest::rings),
    ("image_fields", images::fields),
    ("image_operations", images::operations),
    ("json", text::json),
    ("keyval", text::keyval),
    ("monitor", daemon::monitor),
    ("nbd_client", nbd::client),
    ("nbd_export", daemon::export),
    ("nbd_far", daemon::far_server),
    ("nbd_server", nbd::server),
    ("replication_frames", peers::frames),
    ("replication_store", peers::store),
    ("scene", scene::scene),
];

/// Gives `bytes` to the target of that name.
///
/// # Panics
/// If there is none, or if something is not true that must be.
pub fn run(name: &str, bytes: &[u8]) {
    let Some((_, target)) = TARGETS.iter().find(|(n, _)| *n == name) else { panic!("no target '{name}'") };
    target(bytes);
}

/// Fails for some bytes that only coverage leads to, one at a time: where it is not found, the machinery finds nothing.
fn canary(bytes: &[u8]) {
    let mut rest = bytes.iter();
    if rest.next() == Some(&b'd')
        && rest.next() == Some(&b'i')
        && rest.next() == Some(&b's')
        && rest.next() == Some(&b'k')
    {
        panic!("the canary is dead, as it has to be");
    }
}

/// The first byte, to choose with; and the rest.
fn choice(bytes: &[u8]) -> Option<(usize, &[u8])> {
    bytes.split_first().map(|(first, rest)| (usize::from(*first), rest))
}

/// Panics with what a run in the simulated world found.
fn judge(outcome: sim::runner::Outcome) {
    if let Some(v) = outcome.violation {
        panic!("{v}");
    }
}
