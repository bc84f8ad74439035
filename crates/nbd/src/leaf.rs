//! Hashes over NBD: a metadata context of ours, by which a client learns what an export holds without its bytes crossing the link.
//!
//! The server cuts the export into leaves of 64 KiB (the last may be shorter) and answers a block status request for whole ones with
//! the BLAKE3 hash of each, in place of flags: 4 extents of 64 bits (8 of 32 bits in compact mode), which together are as long as the leaf.
//! Another server does not know the context and says so in the handshake, as the protocol asks of it.

use crate::{Mode, StatusExtent};
use block::Span;

/// Name of the context.
pub const CONTEXT: &str = "liveblk:blake3-65536";
/// Bytes of a leaf.
pub const LEN: u64 = 65536;
/// Most leaves of one answer: what a server reads and hashes for one request.
pub const MOST: u64 = 16;
/// A leaf at the end of an export that is shorter than this has no hash: it cannot be cut into as many extents.
pub const SHORTEST: u64 = 8;

const fn words(mode: Mode) -> usize {
    if matches!(mode, Mode::Extended) { 4 } else { 8 }
}

/// Whether `at` consists of leaves, of an export of `size` bytes, and all have hashes.
pub fn is_whole(at: Span, size: u64) -> bool {
    let tail = at.end() % LEN;
    !at.is_empty()
        && at.start.is_multiple_of(LEN)
        && at.end() <= size
        && (tail == 0 || (at.end() == size && tail >= SHORTEST))
}

/// How long the extents of a leaf of `len` bytes are.
fn lengths(len: u64, words: usize) -> impl Iterator<Item = u64> {
    let each = len / words as u64;
    (0..words).map(move |i| if i + 1 == words { len - each * (words as u64 - 1) } else { each })
}

/// Appends the hash of a leaf of `len` bytes.
pub fn encode(mode: Mode, len: u64, hash: &[u8; 32], out: &mut Vec<StatusExtent>) {
    let words = words(mode);
    let word = |bytes: &[u8]| bytes.iter().fold(0, |w, b| w << 8 | u64::from(*b));
    let flags = hash.chunks(32 / words).map(word);
    out.extend(lengths(len, words).zip(flags).map(|(len, flags)| StatusExtent { len, flags }));
}

/// The hashes of the first leaves of `at`, as many as the answer has; nothing if it is no answer of this kind.
pub fn decode(mode: Mode, at: Span, answer: &[StatusExtent]) -> Option<Vec<[u8; 32]>> {
    let words = words(mode);
    let mut hashes = Vec::new();
    for (leaf, extents) in at.pieces(LEN).zip(answer.chunks(words)) {
        let fits = extents.len() == words && lengths(leaf.len, words).eq(extents.iter().map(|e| e.len));
        if !fits {
            return None;
        }
        let mut hash = [0; 32];
        for (bytes, e) in hash.chunks_mut(32 / words).zip(extents) {
            let word = e.flags.to_be_bytes();
            bytes.copy_from_slice(&word[8 - bytes.len()..]);
        }
        hashes.push(hash);
    }
    (!hashes.is_empty() && hashes.len() * words == answer.len()).then_some(hashes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encoded_is_decoded_and_nothing_else_is() {
        for mode in [Mode::Structured, Mode::Extended] {
            let at = Span::new(LEN, 2 * LEN + 13);
            let hashes: Vec<[u8; 32]> = (0..3u8).map(|n| std::array::from_fn(|i| n * 80 + i as u8)).collect();
            let mut answer = Vec::new();
            for (leaf, hash) in at.pieces(LEN).zip(&hashes) {
                encode(mode, leaf.len, hash, &mut answer);
            }
            assert_eq!(answer.iter().map(|e| e.len).sum::<u64>(), at.len);
            assert_eq!(decode(mode, at, &answer), Some(hashes.clone()));
            let first = words(mode);
            assert_eq!(decode(mode, at, &answer[..first]), Some(vec![hashes[0]]));
            assert_eq!(decode(mode, at, &answer[..first + 1]), None);
            assert_eq!(decode(mode, at, &[StatusExtent { len: at.len, flags: 0 }]), None);
            assert_eq!(decode(mode, at, &[]), None);
            answer[1].len += 1;
            assert_eq!(decode(mode, at, &answer), None);
        }
    }

    #[test]
    fn only_whole_leaves_have_hashes() {
        let size = 3 * LEN + 100;
        assert!(is_whole(Span::new(0, LEN), size) && is_whole(Span::between(LEN, size), size));
        for at in [Span::new(1, LEN), Span::new(0, 100), Span::between(3 * LEN, size - 1), Span::new(0, 0)] {
            assert!(!is_whole(at, size), "{at}");
        }
        assert!(!is_whole(Span::between(3 * LEN, 3 * LEN + 7), 3 * LEN + 7));
    }
}
