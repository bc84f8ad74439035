//! Compressed clusters: reading them, and writing them.
//!
//! A compressed cluster is a stream that lies anywhere in the file, packed with others; its L2 entry says where it starts
//! and how many 512-byte sectors it touches. What must stay true: never more than one cluster comes out of a stream, whatever it
//! says (a bomb is an error); a write is a whole cluster (or the end of the disk), so nothing is read for it; the
//! stream is written, with its refcounts taken, before the entry names it; data that does not shrink is stored plainly.

use crate::core::Core;
use crate::header::Compression;
use crate::types::{Compressed, L2Entry};
use block::{BlockError, Data, Result, Span};
use bytes::Bytes;
use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};
use graph::DebugEvent;
use std::rc::Rc;

/// Clusters of at least this size are (de)compressed on a helper thread: about 100 µs of work against a hop of about 20.
const OFFLOAD_MIN: u64 = 16 * 1024;
/// deflate's window in the format: 2^12 bytes.
const WINDOW_BITS: u8 = 12;
/// Largest window a zstd stream may ask memory for: 8 MiB. Writers need no more than a cluster (2 MiB at most).
const ZSTD_WINDOW_MAX: u32 = 23;
/// zstd's level for writing: its own default.
const ZSTD_LEVEL: i32 = 3;

/// Unpacks one cluster of `len` bytes. Bytes after the end of the stream are ignored.
pub(crate) fn unpack(how: Compression, packed: &[u8], len: usize) -> Result<Vec<u8>, String> {
    let mut out = vec![0; len];
    match how {
        Compression::Zlib => {
            let mut d = Decompress::new_with_window_bits(false, WINDOW_BITS);
            let r = d.decompress(packed, &mut out, FlushDecompress::Finish).map_err(|e| e.to_string())?;
            // A full cluster came out: whether the stream would go on does not matter.
            if d.total_out() != len as u64 || r == Status::Ok && d.total_out() < len as u64 {
                return Err(format!("{} of {len} bytes came out of the stream", d.total_out()));
            }
        }
        Compression::Zstd => {
            let mut d = zstd::stream::raw::Decoder::new().map_err(|e| e.to_string())?;
            d.set_parameter(zstd::stream::raw::DParameter::WindowLogMax(ZSTD_WINDOW_MAX))
                .map_err(|e| e.to_string())?;
            let mut input = zstd::stream::raw::InBuffer::around(packed);
            let mut output = zstd::stream::raw::OutBuffer::around(out.as_mut_slice());
            while output.pos() < len {
                let before = (input.pos(), output.pos());
                let left = zstd::stream::raw::Operation::run(&mut d, &mut input, &mut output)
                    .map_err(|e| e.to_string())?;
                if output.pos() < len
                    && (left == 0 && input.pos() == packed.len() || before == (input.pos(), output.pos()))
                {
                    return Err(format!("{} of {len} bytes came out of the stream", output.pos()));
                }
            }
        }
    }
    Ok(out)
}

/// Packs one cluster; `None` if it does not get smaller.
pub(crate) fn pack(how: Compression, plain: &[u8]) -> Result<Option<Vec<u8>>, String> {
    let limit = plain.len() - 1;
    match how {
        Compression::Zlib => {
            let mut out = vec![0; limit];
            let mut c = Compress::new_with_window_bits(flate2::Compression::default(), false, WINDOW_BITS);
            match c.compress(plain, &mut out, FlushCompress::Finish) {
                Ok(Status::StreamEnd) => {
                    out.truncate(c.total_out() as usize);
                    Ok(Some(out))
                }
                Ok(_) => Ok(None),
                Err(e) => Err(e.to_string()),
            }
        }
        Compression::Zstd => {
            let out = zstd::bulk::compress(plain, ZSTD_LEVEL).map_err(|e| e.to_string())?;
            Ok((out.len() <= limit).then_some(out))
        }
    }
}

impl Core {
    /// Reads `at`, which is inside one compressed cluster.
    pub(crate) async fn read_packed(self: &Rc<Self>, from: Compressed, at: Span) -> Result<Data> {
        let cluster = self.geo.cluster_size();
        let start = self.geo.in_cluster(at.start) as usize;
        let piece = |plain: &Bytes| Data::from(plain.slice(start..start + at.len as usize));
        if let Some((_, plain)) = self.unpacked.borrow().as_ref().filter(|(c, _)| *c == from) {
            return Ok(piece(plain));
        }
        self.file.tell(DebugEvent::ReadCompressed);
        let packed = self.file.read(Span::new(from.at.0, from.len)).await?.contiguous();
        let how = self.header.borrow().compression;
        let plain = if cluster >= OFFLOAD_MIN {
            self.env.offload(move || unpack(how, &packed, cluster as usize)).await?
        } else {
            unpack(how, &packed, cluster as usize)
        };
        let plain = plain.map_err(|text| {
            BlockError::corrupt(format!(
                "image '{}': compressed cluster at {} ({} bytes, guest offset {:#x}): {text}",
                self.name(),
                from.at,
                from.len,
                at.start
            ))
        })?;
        let plain = Bytes::from(plain);
        let data = piece(&plain);
        *self.unpacked.borrow_mut() = Some((from, plain));
        Ok(data)
    }

    /// Writes `data` compressed. The span is whole clusters, or ends at the end of the disk.
    pub(crate) async fn write_compressed(self: &Rc<Self>, at: Span, data: Data) -> Result<()> {
        self.check_writable()?;
        if self.data_file.is_some() {
            return Err(BlockError::unsupported(format!(
                "image '{}': no compressed clusters with an external data file",
                self.name()
            )));
        }
        let cluster = self.geo.cluster_size();
        let whole_end = at.end() == self.size.get() || self.geo.in_cluster(at.end()) == 0;
        if self.geo.in_cluster(at.start) != 0 || !whole_end {
            return Err(BlockError::invalid(format!(
                "image '{}': a compressed write must be whole clusters ({at})",
                self.name()
            )));
        }
        let mut pos = at.start;
        while pos < at.end() {
            let span = Span::between(pos, at.end().min(pos + cluster));
            let part = data.slice((pos - at.start) as usize, span.len as usize);
            self.write_packed(span, part).await?;
            pos = span.end();
        }
        Ok(())
    }

    async fn write_packed(self: &Rc<Self>, at: Span, data: Data) -> Result<()> {
        let cluster = self.geo.cluster_size();
        let how = self.header.borrow().compression;
        let mut full = data.clone();
        full.append(Data::zeroes((cluster - at.len) as usize));
        let plain = full.contiguous();
        let packed = if cluster >= OFFLOAD_MIN {
            self.env.offload(move || pack(how, &plain)).await?
        } else {
            pack(how, &plain)
        };
        let packed = packed.map_err(|text| {
            BlockError::new(
                block::ErrorKind::Io,
                format!("image '{}': compressing {at}: {text}", self.name()),
            )
        })?;
        let Some(packed) = packed else { return self.write(at, data).await };
        self.store_packed(at.start >> self.geo.cluster_bits(), packed).await
    }

    async fn store_packed(self: &Rc<Self>, c: u64, packed: Vec<u8>) -> Result<()> {
        let _ticket = self.epochs.enter();
        let _busy = loop {
            match self.inflight.conflict(c, c + 1) {
                Some(other) => other.wait().await,
                None => break self.inflight.begin(c, c + 1),
            }
        };
        self.writable_slice(c).await?;
        let len = packed.len() as u64;
        let at = self.alloc_packed(len).await?;
        *self.unpacked.borrow_mut() = None;
        let place = Compressed { at, len };
        let mut taken = TakenBytes { core: self, place: Some(place) };
        if !self.geo.can_describe_compressed(at, len) {
            return Err(BlockError::from_errno(BlockError::EFBIG).with_message(format!(
                "image '{}': compressed data at {at} is too far behind",
                self.name()
            )));
        }
        let landing = self.landing(at, len);
        self.file.tell(DebugEvent::WriteCompressed);
        let written = self.file.write(at.0, packed.into()).await;
        landing.landed();
        written?;
        let slot = self.writable_slice(c).await?;
        let old = self.entry(slot, c)?;
        self.set_entry(slot, c, L2Entry::Compressed(place));
        taken.place = None;
        self.order.data_before_mapping();
        self.free_entry(old, false);
        self.order.crowded_check(self);
        Ok(())
    }
}

/// Bytes for compressed data; given back unless an entry names them.
struct TakenBytes<'a> {
    core: &'a Rc<Core>,
    place: Option<Compressed>,
}

impl Drop for TakenBytes<'_> {
    fn drop(&mut self) {
        if let Some(place) = self.place {
            self.core.free_packed(place, false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i / 7 % 250) as u8).collect()
    }

    #[test]
    fn streams_round_trip_and_ignore_what_follows() {
        for how in [Compression::Zlib, Compression::Zstd] {
            for len in [512usize, 4096, 65536, 2 << 20] {
                let plain = sample(len);
                let mut packed = pack(how, &plain).unwrap().unwrap();
                assert!(packed.len() < len);
                packed.extend_from_slice(&[0xaa; 300]);
                assert_eq!(unpack(how, &packed, len).unwrap(), plain, "{how:?} {len}");
                assert!(unpack(how, &packed[..(packed.len() - 300) / 2], len).is_err(), "{how:?} {len}");
            }
        }
    }

    #[test]
    fn what_does_not_shrink_is_left() {
        let mut x = 1u64;
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (x >> 33) as u8
        })
        .take(4096)
        .collect();
        assert_eq!(pack(Compression::Zlib, &noise).unwrap(), None);
        assert_eq!(pack(Compression::Zstd, &noise).unwrap(), None);
        assert!(unpack(Compression::Zlib, &noise, 4096).is_err());
        assert!(unpack(Compression::Zstd, &noise, 4096).is_err());
    }

    #[test]
    fn a_bomb_gives_one_cluster_at_most() {
        for how in [Compression::Zlib, Compression::Zstd] {
            let packed = pack(how, &vec![7; 4 << 20]).unwrap().unwrap();
            assert_eq!(unpack(how, &packed, 65536).unwrap(), vec![7; 65536]);
        }
    }
}
