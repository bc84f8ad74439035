//! Random requests against a byte array.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, missing_docs)]

use block::{Data, ReqFlags, Span};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use graph::Node;
use std::rc::Rc;

/// Pseudo-random numbers.
pub struct Random(pub u64);
impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// Random requests, 64 deep and never two overlapping, against a byte array; the disk's content afterwards.
pub async fn storm(client: Rc<dyn Node>, mut disk: Vec<u8>, seed: u64, rounds: usize) -> Vec<u8> {
    let mut r = Random(seed | 1);
    let size = disk.len() as u64;
    let align = client.limits().request_alignment;
    let mut busy: Vec<Span> = Vec::new();
    let mut flying = FuturesUnordered::new();
    let mut issued = 0;
    while issued < rounds || !flying.is_empty() {
        while issued < rounds && flying.len() < 64 {
            issued += 1;
            let len = [512, 4096, 8192, 65536, 200 * 1024][r.below(5) as usize];
            let start = r.below(size - len) / align * align;
            let span = Span::new(start, len);
            if busy.iter().any(|b| b.overlaps(&span)) {
                continue;
            }
            busy.push(span);
            let range = start as usize..(start + len) as usize;
            let c = client.clone();
            let what = r.below(10);
            let (mut data, mut want) = (Data::empty(), Vec::new());
            match what {
                0..4 => want = disk[range].to_vec(),
                4..8 => {
                    let v: Vec<u8> = (0..len / 8).flat_map(|_| r.next().to_le_bytes()).collect();
                    disk[range].copy_from_slice(&v);
                    data = v.into();
                }
                8 => disk[range].fill(0),
                _ => {}
            }
            let flags = ReqFlags { fua: r.below(4) == 0, may_unmap: r.below(2) == 0, ..ReqFlags::NONE };
            flying.push(async move {
                match what {
                    0..4 => {
                        let got = c.read(span).await.unwrap();
                        assert!(got.to_vec() == want, "seed {seed}: {span} differs");
                    }
                    4..8 => c.write(span, data, flags).await.unwrap(),
                    8 => c.zero(span, flags).await.unwrap(),
                    _ => c.flush().await.unwrap(),
                }
                span
            });
        }
        if let Some(done) = flying.next().await {
            busy.retain(|b| *b != done);
        }
    }
    disk
}

pub fn seed() -> u64 {
    let s = std::env::var("LIVEBLK_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(20_261_121);
    println!("LIVEBLK_SEED={s}");
    s
}
