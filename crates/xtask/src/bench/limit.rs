//! What the machine itself allows: a copy of one file to another by a loop of plain calls, and memory that is there.
//!
//! A virtual machine gives memory that nobody uses back to its host after some seconds, and gets it again page by page at
//! a tenth of the speed. Whoever fills a new file then measures the host. So memory is filled and freed right before.

use crate::shell::Outcome;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Threads of the loop: more than two only wait for one another where the target is one file.
const THREADS: usize = 2;
/// Bytes read and written at a time.
const STEP: u64 = 1 << 20;
/// Memory that is made ready for each MiB of an image: the image itself, twice for buffers and metadata, and what other
/// processes take meanwhile.
const MEMORY: u64 = 4;

/// Uses as much memory as a job with images of `mib` MiB may need, and frees it.
pub(super) fn warm(mib: u64) {
    let mut all = vec![0u8; (mib * MEMORY) as usize * (1 << 20)];
    all.iter_mut().step_by(4096).for_each(|b| *b = 1);
    std::hint::black_box(&all);
}

/// MiB/s of copying the file `from`, all of it data, to a new file `to`, stored at the end as a mirror is when it is ready.
pub(super) fn copy(from: &str, to: &str) -> Outcome<f64> {
    let _ = std::fs::remove_file(to);
    let open = |e: std::io::Error| format!("limit of copying {from} to {to}: {e}");
    let (source, target) = (File::open(from).map_err(open)?, File::create_new(to).map_err(open)?);
    let len = source.metadata().map_err(open)?.len();
    target.set_len(len).map_err(open)?;
    let next = AtomicU64::new(0);
    let begin = Instant::now();
    let ended: Vec<std::io::Result<()>> = std::thread::scope(|s| {
        let one = || -> std::io::Result<()> {
            let mut buf = vec![0; STEP as usize];
            loop {
                let at = next.fetch_add(STEP, Ordering::Relaxed);
                if at >= len {
                    return Ok(());
                }
                let part = &mut buf[..STEP.min(len - at) as usize];
                source.read_exact_at(part, at)?;
                target.write_all_at(part, at)?;
            }
        };
        let threads: Vec<_> = (0..THREADS).map(|_| s.spawn(one)).collect();
        threads
            .into_iter()
            .map(|t| t.join().unwrap_or_else(|_| Err(std::io::ErrorKind::Other.into())))
            .collect()
    });
    ended.into_iter().collect::<Result<Vec<_>, _>>().map_err(open)?;
    target.sync_data().map_err(open)?;
    let seconds = begin.elapsed().as_secs_f64();
    drop(target);
    let _ = std::fs::remove_file(to);
    Ok(len as f64 / f64::from(1 << 20) / seconds)
}
