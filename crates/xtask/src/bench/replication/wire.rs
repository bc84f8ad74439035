//! A client of one NBD export, one request at a time (or many writes at once), for what `nbdload` has no words for.

use crate::shell::Outcome;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

const READ: u16 = 0;
const WRITE: u16 = 1;
const FLUSH: u16 = 3;
/// Requests in flight while a buffer is filled.
const DEPTH: usize = 16;
/// A request that takes longer hangs; nothing here is to take a tenth of it.
const PATIENCE: Duration = Duration::from_secs(60);

pub(super) struct Disk {
    stream: UnixStream,
}

impl Disk {
    pub(super) fn open(socket: &str, export: &str) -> Outcome<Disk> {
        let fail = |e: std::io::Error| format!("{export} at {socket}: {e}");
        let stream = UnixStream::connect(socket).map_err(fail)?;
        stream.set_read_timeout(Some(PATIENCE)).map_err(fail)?;
        let mut disk = Disk { stream };
        disk.take(18)?;
        let mut hello = 3u32.to_be_bytes().to_vec();
        hello.extend_from_slice(b"IHAVEOPT");
        hello.extend_from_slice(&1u32.to_be_bytes());
        hello.extend_from_slice(&(export.len() as u32).to_be_bytes());
        hello.extend_from_slice(export.as_bytes());
        disk.put(&hello)?;
        disk.take(10)?;
        Ok(disk)
    }

    fn put(&mut self, bytes: &[u8]) -> Outcome {
        self.stream.write_all(bytes).map_err(|e| format!("sending a request: {e}"))
    }

    fn take(&mut self, n: usize) -> Outcome<Vec<u8>> {
        let mut bytes = vec![0; n];
        self.stream.read_exact(&mut bytes).map_err(|e| format!("waiting for an answer: {e}"))?;
        Ok(bytes)
    }

    fn ask(&mut self, kind: u16, offset: u64, len: u32, data: &[u8]) -> Outcome {
        let mut request = Vec::with_capacity(28 + data.len());
        request.extend_from_slice(&0x2560_9513u32.to_be_bytes());
        request.extend_from_slice(&0u16.to_be_bytes());
        request.extend_from_slice(&kind.to_be_bytes());
        request.extend_from_slice(&1u64.to_be_bytes());
        request.extend_from_slice(&offset.to_be_bytes());
        request.extend_from_slice(&len.to_be_bytes());
        request.extend_from_slice(data);
        self.put(&request)
    }

    fn answer(&mut self) -> Outcome {
        let reply = self.take(16)?;
        match reply.get(4..8) {
            Some([0, 0, 0, 0]) => Ok(()),
            other => Err(format!("a request failed: {other:?}")),
        }
    }

    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> Outcome {
        self.ask(WRITE, offset, data.len() as u32, data)?;
        self.answer()
    }

    pub(super) fn read(&mut self, offset: u64, len: u32) -> Outcome<Vec<u8>> {
        self.ask(READ, offset, len, &[])?;
        self.answer()?;
        self.take(len as usize)
    }

    pub(super) fn flush(&mut self) -> Outcome {
        self.ask(FLUSH, 0, 0, &[])?;
        self.answer()
    }

    /// Writes `data` at each place, several at a time.
    pub(super) fn fill(&mut self, places: impl Iterator<Item = u64>, data: &[u8]) -> Outcome {
        let mut open = 0;
        for at in places {
            if open == DEPTH {
                self.answer()?;
                open -= 1;
            }
            self.ask(WRITE, at, data.len() as u32, data)?;
            open += 1;
        }
        (0..open).try_for_each(|_| self.answer())
    }
}

/// Runs `each` on a thread over and over, one call a request, until told to stop; the longest call in a window.
pub(super) struct Watch {
    stop: std::sync::Arc<std::sync::atomic::AtomicBool>,
    thread: std::thread::JoinHandle<Outcome<Vec<(Instant, Duration)>>>,
}

impl Watch {
    pub(super) fn start(mut each: impl FnMut() -> Outcome + Send + 'static) -> Watch {
        let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let told = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut calls = Vec::new();
            while !told.load(std::sync::atomic::Ordering::Relaxed) {
                let begin = Instant::now();
                each()?;
                calls.push((begin, begin.elapsed()));
                // a client that leaves the processor to the servers now and then
                std::thread::sleep(Duration::from_micros(50));
            }
            Ok(calls)
        });
        Watch { stop, thread }
    }

    pub(super) fn end(self) -> Outcome<Vec<(Instant, Duration)>> {
        self.stop.store(true, std::sync::atomic::Ordering::Relaxed);
        self.thread.join().map_err(|_| "a client panicked".to_owned())?
    }
}

/// The longest call that was under way between two instants, in milliseconds.
pub(super) fn longest(calls: &[(Instant, Duration)], from: Instant, to: Instant) -> f64 {
    let inside = calls.iter().filter(|(begin, took)| *begin < to && *begin + *took > from);
    inside.map(|c| c.1.as_secs_f64() * 1e3).fold(0.0, f64::max)
}

/// Places for `count` pieces of `piece` bytes on a disk of `size` bytes, each once, in an order like chance (a stride that has no
/// factor in common with the number of places).
pub(super) fn scattered(count: u64, piece: u64, size: u64) -> impl Iterator<Item = u64> {
    let places = (size / piece).max(1);
    (0..count).map(move |i| (i.wrapping_mul(0x9e37_79b1) % places) * piece)
}

/// Places for `count` pieces by chance, the same ones each time.
pub(super) fn random(count: u64, piece: u64, size: u64) -> impl Iterator<Item = u64> {
    let mut x = 0x1234_5678_9abc_def0u64;
    (0..count).map(move |_| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 11) % (size / piece).max(1) * piece
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scattered_places_are_different() {
        let mut all: Vec<u64> = scattered(1000, 4096, 64 << 20).collect();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 1000);
        assert!(all.iter().all(|at| at % 4096 == 0 && *at < 64 << 20));
    }

    #[test]
    fn the_longest_call_of_a_window() {
        let begin = Instant::now();
        let ms = Duration::from_millis;
        let calls = [(begin, ms(5)), (begin + ms(10), ms(3)), (begin + ms(100), ms(50))];
        assert_eq!(longest(&calls, begin + ms(8), begin + ms(20)), 3.0);
        assert_eq!(longest(&calls, begin + ms(4), begin + ms(20)), 5.0);
    }
}
