//! Files of the real backend, in both modes, on tmpfs and on a disk.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;
use block::{BlockError, Data, ErrorKind, Kind, Span};
use common::{Dir, each, pattern};
use env::{Env, Existing, File, Io, LockRange, OpenMode, Punch};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

const CREATE: OpenMode =
    OpenMode { write: true, direct: false, existing: Existing::CreateTruncate, threads: false };

async fn create(env: &Env, dir: &Dir, name: &str) -> Rc<dyn File> {
    env.open(&dir.path(name), CREATE).await.unwrap()
}

#[test]
fn what_is_written_is_read_and_past_the_end_is_zero() {
    each(|env, dir| async move {
        let f = create(&env, &dir, "a").await;
        for (offset, len) in [(0u64, 1usize), (5, 4096), (10_000, 70_000), (100_000, 3 << 20)] {
            let data = pattern(offset, len);
            f.write(offset, Data::from(data.clone())).await.unwrap();
            assert_eq!(f.len_hint(), offset + len as u64);
            let back = f.read(Span::new(offset, len as u64)).await.unwrap();
            assert_eq!(back.to_vec(), data);
            // half of it lies past the end
            let back = f.read(Span::new(offset, 2 * len as u64)).await.unwrap();
            assert_eq!(back.len(), 2 * len);
            assert_eq!(back.slice(0, len).to_vec(), data);
            assert!(back.slice(len, len).is_zero());
        }
        assert!(f.read(Span::new(1 << 40, 5000)).await.unwrap().is_zero());
        assert!(f.read(Span::new(3, 0)).await.unwrap().is_empty());
        f.write(1 << 41, Data::empty()).await.unwrap();
        f.barrier().await.unwrap();
        let info = f.info().await.unwrap();
        assert_eq!(info.len, 100_000 + (3 << 20));
        assert!(info.writable && info.allocated > 0 && info.alignment == 1);
        // whether the file on the host agrees
        let raw = std::fs::read(dir.path("a")).unwrap();
        assert_eq!(raw[100_000..], pattern(100_000, 3 << 20));
    });
}

#[test]
fn pool_threads_can_be_asked_for() {
    each(|env, dir| async move {
        let f = env.open(&dir.path("t"), OpenMode { threads: true, ..CREATE }).await.unwrap();
        for direct in [false, true] {
            let f = match direct {
                false => f.clone(),
                true => {
                    let mode = OpenMode { threads: true, direct, write: true, ..OpenMode::default() };
                    env.open(&dir.path("t"), mode).await.unwrap()
                }
            };
            let rope: Data = pattern(1, 2 << 20).chunks(8192).map(Data::copy_from).collect();
            f.write(8192, rope.clone()).await.unwrap();
            f.barrier().await.unwrap();
            assert_eq!(f.read(Span::new(8192, 2 << 20)).await.unwrap(), rope);
        }
    });
}

#[test]
fn a_rope_of_thousands_of_parts_is_written_in_order() {
    each(|env, dir| async move {
        let f = create(&env, &dir, "rope").await;
        let whole = pattern(7, 3000 * 37);
        let data: Data = whole.chunks(37).map(Data::copy_from).collect();
        assert_eq!(data.parts().len(), 3000);
        f.write(11, data).await.unwrap();
        assert_eq!(f.read(Span::new(11, whole.len() as u64)).await.unwrap().to_vec(), whole);
        // larger than what is written at once on this thread
        let big: Data = std::iter::repeat_n(Data::from(pattern(1, 1 << 20)), 5).collect();
        f.write(1 << 20, big.clone()).await.unwrap();
        assert_eq!(f.read(Span::new(1 << 20, 5 << 20)).await.unwrap(), big);
    });
}

#[test]
fn opening_says_what_is_wrong() {
    each(|env, dir| async move {
        let missing = env.open(&dir.path("none"), OpenMode::default()).await.err().unwrap();
        assert_eq!(missing.kind(), ErrorKind::NotFound);
        let new = OpenMode { existing: Existing::CreateNew, ..CREATE };
        env.open(&dir.path("x"), new).await.unwrap();
        let there = env.open(&dir.path("x"), new).await.err().unwrap();
        assert_eq!((there.kind(), there.errno()), (ErrorKind::Busy, BlockError::EEXIST));
        let folder = env.open(&dir.path(""), OpenMode::default()).await.err().unwrap();
        assert_eq!(folder.errno(), BlockError::EISDIR);
        let reader = env.open(&dir.path("x"), OpenMode::default()).await.unwrap();
        assert_eq!(reader.write(0, Data::zeroes(1)).await.unwrap_err().errno(), BlockError::EBADF);
        assert_eq!(reader.set_len(1).await.unwrap_err().errno(), BlockError::EBADF);
        env.remove(&dir.path("x")).await.unwrap();
        assert_eq!(env.remove(&dir.path("x")).await.unwrap_err().kind(), ErrorKind::NotFound);
        let huge = reader.read(Span::new(0, 1 << 50)).await.err().unwrap();
        assert_eq!(huge.kind(), ErrorKind::Invalid);
    });
}

#[test]
fn holes_are_punched_seen_and_kept() {
    each(|env, dir| async move {
        let f = create(&env, &dir, "holes").await;
        f.write(0, Data::from(pattern(0, 1 << 20))).await.unwrap();
        f.zero(Span::new(65536, 65536), Punch::Release).await.unwrap();
        f.zero(Span::new(262_144, 65536), Punch::Keep).await.unwrap();
        f.zero(Span::new(1 << 20, 65536), Punch::Keep).await.unwrap();
        assert_eq!(f.info().await.unwrap().len, 1 << 20, "zeroing does not grow a file");
        assert!(f.read(Span::new(65536, 65536)).await.unwrap().is_zero());
        assert!(f.read(Span::new(262_144, 65536)).await.unwrap().is_zero());
        assert_eq!(f.read(Span::new(131_072, 4096)).await.unwrap().to_vec(), pattern(131_072, 4096));
        let all = f.extents(Span::new(0, 2 << 20)).await.unwrap();
        assert_eq!(all[0].span, Span::new(0, 65536));
        assert_eq!((all[1].span, all[1].kind), (Span::new(65536, 65536), Kind::Zero));
        assert_eq!(all[2].kind, Kind::Data);
        let last = all.last().unwrap();
        assert_eq!((last.kind, last.span.end()), (Kind::Zero, 2 << 20));
        f.discard(Span::new(524_288, 65536)).await.unwrap();
        assert!(f.read(Span::new(524_288, 65536)).await.unwrap().is_zero());
        f.allocate(Span::new(2 << 20, 65536)).await.unwrap();
        assert_eq!(f.len_hint(), (2 << 20) + 65536);
        f.set_len(1000).await.unwrap();
        assert_eq!((f.len_hint(), f.info().await.unwrap().len), (1000, 1000));
        f.set_len(5 << 20).await.unwrap();
        assert!(f.read(Span::new(1000, 5000)).await.unwrap().is_zero());
    });
}

#[test]
fn extents_of_a_shredded_file_come_in_bounded_pieces() {
    each(|env, dir| async move {
        let f = create(&env, &dir, "shreds").await;
        for i in 0..1500u64 {
            f.write(i * 8192, Data::copy_from(&[1; 4096])).await.unwrap();
        }
        let whole = Span::new(0, 1500 * 8192);
        let (mut pos, mut data) = (0, 0);
        while pos < whole.end() {
            let list = f.extents(Span::between(pos, whole.end())).await.unwrap();
            assert!(!list.is_empty() && list.len() <= 1100);
            for e in list {
                assert_eq!(e.span.start, pos);
                pos = e.span.end();
                data += if e.kind == Kind::Data { e.span.len } else { 0 };
            }
        }
        assert_eq!((pos, data), (whole.end(), 1500 * 4096));
    });
}

#[test]
fn copies_inside_the_host() {
    each(|env, dir| async move {
        let a = create(&env, &dir, "a").await;
        let b = create(&env, &dir, "b").await;
        a.write(0, Data::from(pattern(0, 300_000))).await.unwrap();
        let (mut done, len) = (0u64, 200_000u64);
        while done < len {
            match a.copy_to(Span::new(1000 + done, len - done), &b, 50_000 + done).await {
                Ok(n) => {
                    assert!(n > 0);
                    done += n;
                }
                Err(e) => {
                    assert_eq!(e.kind(), ErrorKind::Unsupported);
                    return;
                }
            }
        }
        assert_eq!(b.read(Span::new(50_000, len)).await.unwrap().to_vec(), pattern(1000, len as usize));
        assert_eq!(b.len_hint(), 50_000 + len);
        assert_eq!(a.copy_to(Span::new(300_000, 10), &b, 0).await.unwrap(), 0, "nothing past the end");
        let other = Dir::new(if dir.path("").starts_with("/dev/shm") { "/var/tmp" } else { "/dev/shm" });
        let c = create(&env, &other, "c").await;
        match a.copy_to(Span::new(1000, len), &c, 77).await {
            Ok(n) => {
                assert_eq!(c.len_hint(), 77 + n);
                assert_eq!(c.read(Span::new(77, n)).await.unwrap().to_vec(), pattern(1000, n as usize));
            }
            Err(e) => {
                assert_eq!(e.kind(), ErrorKind::Unsupported, "across file systems that know nothing better")
            }
        }
        let writable_not = env.open(&dir.path("b"), OpenMode::default()).await.unwrap();
        let e = a.copy_to(Span::new(0, 10), &writable_not, 0).await.unwrap_err();
        assert_eq!(e.errno(), libc::EBADF, "the target is not open for writing");
    });
}

#[test]
fn locks_belong_to_the_open_file() {
    each(|env, dir| async move {
        let a = create(&env, &dir, "locked").await;
        let b = env.open(&dir.path("locked"), OpenMode { write: true, ..OpenMode::default() }).await.unwrap();
        let shared = LockRange { start: 100, len: 1, exclusive: false };
        let exclusive = LockRange { exclusive: true, ..shared };
        a.lock(shared).await.unwrap();
        b.lock(shared).await.unwrap();
        assert!(b.can_lock(shared).await.unwrap());
        assert!(!b.can_lock(exclusive).await.unwrap());
        let e = b.lock(exclusive).await.unwrap_err();
        assert_eq!((e.kind(), e.errno()), (ErrorKind::Busy, BlockError::EAGAIN));
        a.unlock(100, 1).await.unwrap();
        b.lock(exclusive).await.unwrap();
        assert!(!a.can_lock(shared).await.unwrap());
        drop(b);
        a.lock(exclusive).await.unwrap();
    });
}

#[test]
fn direct_io_bounces_memory_that_is_not_aligned() {
    each(|env, dir| async move {
        let mode = OpenMode { direct: true, ..CREATE };
        let f = match env.open(&dir.path("direct"), mode).await {
            Ok(f) => f,
            // tmpfs before Linux 6.6
            Err(e) => return assert_eq!(e.errno(), BlockError::EINVAL),
        };
        let unit = f.info().await.unwrap().alignment;
        assert!(unit.is_power_of_two() && (512..=4096).contains(&unit) || unit == 1, "{unit}");
        let whole = pattern(3, 65536 + 1);
        let odd = bytes::Bytes::from(whole.clone()).slice(1..);
        f.write(0, Data::from(odd)).await.unwrap();
        let rope: Data = pattern(9, 8192).chunks(1000).map(Data::copy_from).collect();
        f.write(65536, rope).await.unwrap();
        assert_eq!(f.read(Span::new(0, 65536)).await.unwrap().to_vec(), whole[1..]);
        assert_eq!(f.read(Span::new(65536, 8192)).await.unwrap().to_vec(), pattern(9, 8192));
        f.set_len(65536 + 100).await.unwrap();
        let tail = f.read(Span::new(65536, 8192)).await.unwrap();
        assert_eq!(tail.slice(0, 100).to_vec(), pattern(9, 100));
        assert!(tail.slice(100, 8092).is_zero());
    });
}

/// What `io` has to say at once.
fn at_once<T>(io: &mut Io<'_, T>) -> Option<block::Result<T>> {
    match io.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => Some(result),
        Poll::Pending => None,
    }
}

#[test]
fn a_read_and_a_change_of_the_same_bytes_take_turns() {
    const LEN: usize = 2 << 20;
    each(|env, dir| async move {
        let f = create(&env, &dir, "f").await;
        let (old, new) = (pattern(1, LEN), pattern(2, LEN));
        f.write(0, Data::from(pattern(1, 2 * LEN))).await.unwrap();
        let mut change = f.write(0, Data::from(new.clone()));
        if at_once(&mut change).is_none() {
            let (mut same, mut next) =
                (f.read(Span::new(LEN as u64 - 512, 512)), f.read(Span::new(LEN as u64, 512)));
            assert!(at_once(&mut same).is_none(), "somebody else may be writing there");
            if dir.path("").starts_with("/dev/shm") {
                assert!(at_once(&mut next).is_some(), "nobody has anything to do with these");
            }
            change.await.unwrap();
            assert_eq!(same.await.unwrap().to_vec(), new[LEN - 512..]);
        }
        f.write(0, Data::from(old.clone())).await.unwrap();
        let mut large = f.read(Span::new(0, LEN as u64));
        if at_once(&mut large).is_none() {
            let mut zero = f.zero(Span::new(4096, 4096), Punch::Release);
            let mut change = f.write(512, Data::from(pattern(3, 512)));
            assert!(at_once(&mut change).is_none() && at_once(&mut zero).is_none(), "it is being read");
            assert_eq!(large.await.unwrap().to_vec(), old);
            change.await.unwrap();
            zero.await.unwrap();
            assert_eq!(f.read(Span::new(512, 512)).await.unwrap().to_vec(), pattern(3, 512));
        }
    });
}

#[test]
fn a_sector_is_never_seen_half_written() {
    const LEN: usize = 128 << 10;
    each(|env, dir| async move {
        let f = create(&env, &dir, "f").await;
        f.write(0, Data::zeroes(LEN)).await.unwrap();
        for round in 0..200u32 {
            let writes = (0..4).map(|i| {
                let f = f.clone();
                let data = Data::from(vec![(round * 4 + i) as u8; LEN]);
                env.spawn("writer", async move { f.write(0, data).await.unwrap() })
            });
            let reads = (0..4).map(|_| {
                let f = f.clone();
                env.spawn("reader", async move {
                    let seen = f.read(Span::new(0, LEN as u64)).await.unwrap().to_vec();
                    for sector in seen.chunks(512) {
                        assert!(sector.iter().all(|b| *b == sector[0]), "a mixture");
                    }
                })
            });
            let all: Vec<_> = writes.zip(reads).flat_map(|(w, r)| [w, r]).collect();
            for task in &all {
                task.join().await;
            }
        }
    });
}
