//! What guests write: 512-byte sectors that say who wrote them, so that any sector found anywhere can be traced.
//!
//! A sector is 32 times 16 bytes: which write (unique in the run), which sector of the disk, the run's salt, and the place
//! within the sector. What must stay true: a sector decodes to one write, to zero, or it is garbage (bytes of two writes
//! mixed, another sector's bytes, rot), which is a violation wherever it is found.

use block::{Data, SECTOR};

/// What a sector holds.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Value {
    /// Zeroes.
    Zero,
    /// What write number so-and-so put there.
    Write(u32),
    /// Nothing that anybody wrote.
    Garbage,
}

const UNIT: usize = 16;
const SALT: u32 = 0x6c69_7665;

fn unit(write: u32, sector: u64, place: u32) -> [u8; UNIT] {
    let mut b = [0; UNIT];
    b[..4].copy_from_slice(&write.to_le_bytes());
    b[4..8].copy_from_slice(&(sector as u32).to_le_bytes());
    b[8..12].copy_from_slice(&SALT.to_le_bytes());
    b[12..].copy_from_slice(&place.to_le_bytes());
    b
}

/// The bytes of `sectors` sectors from sector `first` on, as write number `write`.
pub fn stamped(write: u32, first: u64, sectors: u64) -> Data {
    let mut v = Vec::with_capacity((sectors * SECTOR) as usize);
    for sector in first..first + sectors {
        for place in 0..(SECTOR as usize / UNIT) as u32 {
            v.extend_from_slice(&unit(write, sector, place));
        }
    }
    Data::from(v)
}

/// What one sector (512 bytes) found at sector number `sector` holds.
pub fn value_of(bytes: &[u8], sector: u64) -> Value {
    if block::is_zero(bytes) {
        return Value::Zero;
    }
    let mut id = [0; 4];
    id.copy_from_slice(&bytes[..4]);
    let write = u32::from_le_bytes(id);
    let good = bytes.chunks_exact(UNIT).enumerate().all(|(i, c)| c == unit(write, sector, i as u32));
    if good { Value::Write(write) } else { Value::Garbage }
}

/// The values of consecutive sectors from `first` on.
pub fn values_of(bytes: &[u8], first: u64) -> Vec<Value> {
    bytes.chunks(SECTOR as usize).zip(first..).map(|(c, sector)| value_of(c, sector)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sector_says_who_wrote_it_and_mixtures_are_garbage() {
        let mut bytes = stamped(7, 100, 3).to_vec();
        assert_eq!(values_of(&bytes, 100), [Value::Write(7); 3]);
        assert_eq!(value_of(&bytes[..512], 101), Value::Garbage, "another sector's bytes");
        bytes[512 + 300..1024].fill(0);
        assert_eq!(values_of(&bytes, 100)[1], Value::Garbage);
        assert_eq!(value_of(&[0; 512], 5), Value::Zero);
    }
}
