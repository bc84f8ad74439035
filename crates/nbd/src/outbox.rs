//! Bytes to be sent: small headers written one after another, payload parts between them by reference.

use block::Data;
use bytes::{BufMut, Bytes, BytesMut};

/// Room that is made for headers at once: about a hundred replies.
const HEADER_ROOM: usize = 4096;

/// A rope being built. Headers that follow each other directly share one part.
#[derive(Default)]
pub struct Outbox {
    done: Data,
    head: BytesMut,
}

impl Outbox {
    /// Nothing to send.
    pub fn new() -> Outbox {
        Outbox::default()
    }

    /// Bytes to send.
    pub fn len(&self) -> usize {
        self.done.len() + self.head.len()
    }

    /// Whether there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Appends bytes by copy.
    pub fn put(&mut self, bytes: &[u8]) {
        if self.head.capacity() - self.head.len() < bytes.len() {
            self.head.reserve(bytes.len().max(HEADER_ROOM));
        }
        self.head.put_slice(bytes);
    }

    fn close_head(&mut self) {
        if !self.head.is_empty() {
            self.done.push(self.head.split().freeze());
        }
    }

    /// Appends one part by reference.
    pub fn push(&mut self, part: Bytes) {
        self.close_head();
        self.done.push(part);
    }

    /// Appends a rope by reference.
    pub fn append(&mut self, data: Data) {
        if data.is_empty() {
            return;
        }
        self.close_head();
        self.done.append(data);
    }

    /// Takes everything.
    pub fn take(&mut self) -> Data {
        self.close_head();
        std::mem::take(&mut self.done)
    }
}

/// Headers are built in an array on the stack with this, then [`Outbox::put`] at once.
pub(crate) struct Fields<const N: usize> {
    pub(crate) bytes: [u8; N],
    at: usize,
}

impl<const N: usize> Fields<N> {
    pub(crate) fn new() -> Fields<N> {
        Fields { bytes: [0; N], at: 0 }
    }
    fn add<const M: usize>(mut self, b: [u8; M]) -> Fields<N> {
        self.bytes[self.at..self.at + M].copy_from_slice(&b);
        self.at += M;
        self
    }
    pub(crate) fn u16(self, v: u16) -> Fields<N> {
        self.add(v.to_be_bytes())
    }
    pub(crate) fn u32(self, v: u32) -> Fields<N> {
        self.add(v.to_be_bytes())
    }
    pub(crate) fn u64(self, v: u64) -> Fields<N> {
        self.add(v.to_be_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbouring_headers_share_a_part_and_payload_is_not_copied() {
        let payload = Bytes::from(vec![1; 5000]);
        let mut o = Outbox::new();
        o.put(b"ab");
        o.put(b"cd");
        o.push(payload.clone());
        o.put(b"ef");
        assert_eq!(o.len(), 5006);
        let d = o.take();
        assert_eq!(d.parts().len(), 3);
        assert_eq!(&d.parts()[0][..], b"abcd");
        assert_eq!(d.parts()[1].as_ptr(), payload.as_ptr());
        assert!(o.is_empty());
    }
}
