//! The digest of a disk: a hash tree over its content, defined in docs/digest.md for other tools to compute it.
//!
//! What must stay true: it depends on length and content alone, not on how the disk was read, in which order, what of it is
//! allocated, nor on any format. Regions of zeroes have a known hash and cost neither reading nor memory.

use block::{Data, Span};
use std::sync::OnceLock;

/// Bytes of a leaf of the tree.
pub const LEAF: u64 = 64 << 10;
/// Hashes below one node of the tree.
pub const FAN: usize = 16;
/// Up to this length the hash of each leaf is remembered (32 bytes for 64 KiB that are not zero: at most 128 MiB); of longer
/// disks that of each [`FAN`] leaves (32 MiB for a TiB), so that what a client writes is compared anew in larger pieces.
const FINE: u64 = 256 << 30;
/// Hashes that are allocated together.
const CHUNK: usize = 1024;
/// What the last hash begins with, so that no other use of the same hash function gives the same.
const NAME: &[u8] = b"liveblk disk 1\n";

/// One hash of the tree: BLAKE3.
pub type Hash = [u8; 32];

/// The digest of a whole disk. Its text form begins with the definition's name.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct DiskDigest(pub Hash);

impl std::fmt::Display for DiskDigest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("lbd1:")?;
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl std::fmt::Debug for DiskDigest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

/// The unit in which a disk of `len` bytes is compared and its hashes are remembered.
pub fn unit_for(len: u64) -> u64 {
    if len <= FINE { LEAF } else { LEAF * FAN as u64 }
}

/// Hash of one leaf.
pub fn leaf_hash(data: &Data) -> Hash {
    let mut hasher = blake3::Hasher::new();
    data.parts().iter().for_each(|p| {
        hasher.update(p);
    });
    hasher.finalize().into()
}

/// Hash of up to [`FAN`] hashes.
pub fn node_hash(below: &[Hash]) -> Hash {
    blake3::hash(below.as_flattened()).into()
}

/// Hash of one unit (of `unit` bytes; the last of a disk may be shorter).
pub fn unit_hash(data: &Data, unit: u64) -> Hash {
    if unit == LEAF {
        return leaf_hash(data);
    }
    let (mut below, mut left) = (Vec::with_capacity(FAN), data.clone());
    while !left.is_empty() {
        below.push(leaf_hash(&left.split_to(left.len().min(LEAF as usize))));
    }
    node_hash(&below)
}

/// The hash of a whole unit of zeroes, and that of [`FAN`] of them.
fn of_zeroes(unit: u64) -> (Hash, Hash) {
    static FINE_ONES: OnceLock<(Hash, Hash)> = OnceLock::new();
    static LARGE_ONES: OnceLock<(Hash, Hash)> = OnceLock::new();
    let known = if unit == LEAF { &FINE_ONES } else { &LARGE_ONES };
    *known.get_or_init(|| {
        let one = unit_hash(&Data::zeroes(unit as usize), unit);
        (one, node_hash(&[one; FAN]))
    })
}

/// What a part of the hashes of a disk is.
#[derive(Clone)]
enum Chunk {
    Zeroes,
    Hashes(Box<[Hash; CHUNK]>),
}

/// The hashes of a disk's units. All are those of zeroes at first.
#[derive(Clone)]
pub struct Leaves {
    len: u64,
    unit: u64,
    chunks: Vec<Chunk>,
}

impl Leaves {
    /// For a disk of `len` bytes.
    pub fn new(len: u64) -> Leaves {
        let unit = unit_for(len);
        let units = len.div_ceil(unit) as usize;
        let mut leaves = Leaves { len, unit, chunks: vec![Chunk::Zeroes; units.div_ceil(CHUNK)] };
        let tail = len % unit;
        if tail != 0 {
            // shorter than the others: not the hash that goes without saying
            leaves.set(len - tail, unit_hash(&Data::zeroes(tail as usize), unit));
        }
        leaves
    }

    /// The hash of the unit that begins at `offset`.
    pub fn set(&mut self, offset: u64, hash: Hash) {
        let index = (offset / self.unit) as usize;
        let zero = of_zeroes(self.unit).0;
        let Some(chunk) = self.chunks.get_mut(index / CHUNK) else { return };
        if let Chunk::Zeroes = chunk {
            if hash == zero {
                return;
            }
            *chunk = Chunk::Hashes(Box::new([zero; CHUNK]));
        }
        if let Chunk::Hashes(hashes) = chunk {
            hashes[index % CHUNK] = hash;
        }
    }

    /// The hash of the unit that begins at `offset`.
    pub fn get(&self, offset: u64) -> Hash {
        let index = (offset / self.unit) as usize;
        match self.chunks.get(index / CHUNK) {
            Some(Chunk::Hashes(hashes)) => hashes[index % CHUNK],
            _ => of_zeroes(self.unit).0,
        }
    }

    /// Whether the hashes of all units of `at` are those of zeroes.
    pub fn is_zero(&self, at: Span) -> bool {
        let zero = of_zeroes(self.unit).0;
        at.pieces(self.unit).all(|s| match s.len == self.unit {
            true => self.get(s.start) == zero,
            false => self.get(s.start) == unit_hash(&Data::zeroes(s.len as usize), self.unit),
        })
    }

    /// All units of `at` (whole ones, or up to the disk's end) are zeroes.
    pub fn set_zero(&mut self, at: Span) {
        let whole = CHUNK as u64 * self.unit;
        let mut left = at;
        while !left.is_empty() {
            let index = (left.start / self.unit) as usize;
            if index.is_multiple_of(CHUNK)
                && left.len >= whole
                && let Some(chunk) = self.chunks.get_mut(index / CHUNK)
            {
                *chunk = Chunk::Zeroes;
                left = left.split_at(whole).1;
                continue;
            }
            let (one, rest) = left.split_at(self.unit);
            let hash = match one.len == self.unit {
                true => of_zeroes(self.unit).0,
                false => unit_hash(&Data::zeroes(one.len as usize), self.unit),
            };
            self.set(one.start, hash);
            left = rest;
        }
    }

    /// The digest of the disk that has these hashes. Takes about a second for 64 TiB of data; a helper's work.
    pub fn digest(&self) -> DiskDigest {
        let units = self.len.div_ceil(self.unit) as usize;
        let (zero, zeroes) = of_zeroes(self.unit);
        let mut hashes: Vec<Hash> = Vec::new();
        for (i, chunk) in self.chunks.iter().enumerate() {
            let here = (units - i * CHUNK).min(CHUNK);
            if units == 1 {
                hashes.push(if let Chunk::Hashes(h) = chunk { h[0] } else { zero });
                continue;
            }
            match chunk {
                Chunk::Hashes(h) => hashes.extend(h[..here].chunks(FAN).map(node_hash)),
                Chunk::Zeroes => {
                    hashes.extend(std::iter::repeat_n(zeroes, here / FAN));
                    hashes.extend(
                        [&[zero; FAN][..here % FAN]].into_iter().filter(|r| !r.is_empty()).map(node_hash),
                    );
                }
            }
        }
        while hashes.len() > 1 {
            hashes = hashes.chunks(FAN).map(node_hash).collect();
        }
        let mut last = blake3::Hasher::new();
        last.update(NAME).update(&self.len.to_le_bytes());
        hashes.first().into_iter().for_each(|h| {
            last.update(h);
        });
        DiskDigest(last.finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition in docs/digest.md, word by word.
    fn by_definition(disk: &[u8]) -> DiskDigest {
        let mut level: Vec<Hash> = disk.chunks(65536).map(|c| blake3::hash(c).into()).collect();
        while level.len() > 1 {
            level = level.chunks(16).map(|c| blake3::hash(&c.concat()).into()).collect();
        }
        let all = [b"liveblk disk 1\n".to_vec(), (disk.len() as u64).to_le_bytes().to_vec(), level.concat()];
        DiskDigest(blake3::hash(&all.concat()).into())
    }

    fn disk(len: usize, data: &[usize]) -> Vec<u8> {
        let mut bytes = vec![0; len];
        for at in data {
            bytes[*at] = (*at % 250 + 1) as u8;
        }
        bytes
    }

    fn leaves_of(bytes: &[u8]) -> Leaves {
        let mut leaves = Leaves::new(bytes.len() as u64);
        for (i, unit) in bytes.chunks(LEAF as usize).enumerate() {
            leaves.set(i as u64 * LEAF, unit_hash(&Data::copy_from(unit), LEAF));
        }
        leaves
    }

    #[test]
    fn the_tree_is_what_its_definition_says() {
        for len in [
            0usize,
            1,
            512,
            65535,
            65536,
            65537,
            1 << 20,
            (1 << 20) + 512,
            (17 << 20) + 77,
            (70 << 20) + 4096,
        ] {
            for data in [vec![], vec![0], vec![len / 2], vec![0, len / 3, len.saturating_sub(1)]] {
                let bytes = disk(len, if len == 0 { &[] } else { &data });
                assert_eq!(leaves_of(&bytes).digest(), by_definition(&bytes), "{len} with {data:?}");
            }
        }
    }

    #[test]
    fn zeroes_need_not_be_said_and_can_be_said_again() {
        for len in [1 << 20, (130 << 20) + 512, 64 << 20, (64 << 20) - 512] {
            let empty = Leaves::new(len as u64).digest();
            assert_eq!(empty, by_definition(&vec![0; len]), "{len}");
            let full = vec![7; len];
            for from in [0, 1 << 16, 1 << 19] {
                let mut leaves = leaves_of(&full);
                leaves.set_zero(Span::between(from, len as u64));
                let mut expected = full.clone();
                expected[from as usize..].fill(0);
                assert_eq!(leaves.digest(), by_definition(&expected), "{len} from {from}");
            }
        }
    }

    #[test]
    fn a_known_value_stays() {
        let text = Leaves::new(0).digest().to_string();
        assert_eq!(text, by_definition(&[]).to_string());
        assert!(text.starts_with("lbd1:") && text.len() == 69, "{text}");
    }

    #[test]
    fn larger_units_give_the_same_tree() {
        let bytes = disk((5 << 20) + 777, &[3, 70_000, 5 << 20]);
        let mut large = Leaves { len: bytes.len() as u64, unit: 1 << 20, chunks: vec![Chunk::Zeroes] };
        for (i, unit) in bytes.chunks(1 << 20).enumerate() {
            large.set((i as u64) << 20, unit_hash(&Data::copy_from(unit), 1 << 20));
        }
        assert_eq!(large.digest(), by_definition(&bytes));
    }
}
