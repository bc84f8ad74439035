//! `vhostload`: keeps a number of requests in flight against a vhost-user-blk back end, as a guest does, and reports rates and
//! latencies as JSON.
//!
//! One queue, one thread; never two requests on one block at a time, so that `--verify` can know what every block must contain.
//! All answers that are there are taken, and as many new requests shown with at most one ring of the bell. With `--file`
//! there is no back end: each request is one plain read or write of that file, which is what it costs at least to let the
//! kernel carry it out.

use clap::{Parser, ValueEnum};
use nbdload::content::Expected;
use nbdload::guest::Guest;
use nbdload::latency::Histogram;
use nbdload::random::Random;
use nbdload::report;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use std::time::{Duration, Instant};

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Op {
    Randread,
    Randwrite,
    Randrw,
}

#[derive(Parser)]
#[command(about = "Load generator for vhost-user-blk back ends")]
struct Options {
    /// Unix socket of the back end
    #[arg(long, required_unless_present = "file")]
    socket: Option<String>,
    /// A file instead, read and written directly
    #[arg(long, conflicts_with = "socket")]
    file: Option<String>,
    #[arg(long, value_enum, default_value = "randread")]
    op: Op,
    /// Bytes of a request
    #[arg(long, default_value_t = 4096)]
    bs: u32,
    /// Requests in flight
    #[arg(long, default_value_t = 16)]
    depth: usize,
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Stamp what is written and check what is read
    #[arg(long)]
    verify: bool,
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Deepest load: a ring of 512 descriptors, half of what any back end takes.
const MAX_DEPTH: usize = 512;

/// One place in the window.
#[derive(Clone)]
struct Slot {
    block: u64,
    write: bool,
    busy: bool,
    start: Instant,
}

/// Which blocks are read and written, and what must be in them.
struct Blocks {
    op: Op,
    bs: u64,
    random: Random,
    busy: Vec<bool>,
    expected: Option<Expected>,
    data: Vec<u8>,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(json) => {
            println!("{json}");
            ExitCode::SUCCESS
        }
        Err(why) => {
            eprintln!("vhostload: {why}");
            ExitCode::FAILURE
        }
    }
}

fn run(o: &Options) -> Result<String, String> {
    let sane = (512..=1 << 20).contains(&o.bs) && o.bs.is_multiple_of(512);
    if !sane || o.depth == 0 || o.depth > MAX_DEPTH {
        return Err("block size or depth makes no sense".to_owned());
    }
    let mut latencies = Histogram::default();
    let took = match (&o.socket, &o.file) {
        (Some(socket), _) => {
            let mut guest = Guest::connect(socket, o.depth, o.bs as usize)?;
            let mut blocks = Blocks::new(o, guest.disk_len())?;
            load(o, &mut guest, &mut blocks, &mut latencies)?
        }
        (None, path) => plain(o, path.as_deref().unwrap_or_default(), &mut latencies)?,
    };
    Ok(report::json(&latencies, o.bs, took, o.verify))
}

impl Blocks {
    fn new(o: &Options, len: u64) -> Result<Blocks, String> {
        let count = len / u64::from(o.bs);
        if count <= o.depth as u64 {
            return Err(format!("a disk of {len} bytes is too small for this load"));
        }
        Ok(Blocks {
            op: o.op,
            bs: u64::from(o.bs),
            random: Random::new((o.seed << 20) | 1),
            busy: vec![false; count as usize],
            expected: o.verify.then(|| Expected::new(count, o.seed << 8)),
            data: vec![0; o.bs as usize],
        })
    }

    /// The next block that nobody uses, whether it is to be written; what, is in `data` then.
    fn pick(&mut self) -> (u64, bool) {
        let block = loop {
            let block = self.random.below(self.busy.len() as u64);
            if !self.busy[block as usize] {
                break block;
            }
        };
        self.busy[block as usize] = true;
        let write = match self.op {
            Op::Randwrite => true,
            Op::Randread => false,
            Op::Randrw => self.random.coin(),
        };
        if write && let Some(e) = &mut self.expected {
            e.stamp(block, &mut self.data);
        }
        (block, write)
    }

    /// A request has ended; what a read read is in `data`.
    fn ended(&mut self, block: u64, write: bool) -> Result<(), String> {
        self.busy[block as usize] = false;
        if !write && self.expected.as_mut().is_some_and(|e| !e.check(block, &self.data)) {
            return Err(format!("block {block} does not contain what it must"));
        }
        Ok(())
    }
}

fn load(
    o: &Options,
    guest: &mut Guest,
    blocks: &mut Blocks,
    all: &mut Histogram,
) -> Result<Duration, String> {
    let begin = Instant::now();
    let end = begin + Duration::from_secs_f64(o.seconds);
    let mut slots = vec![Slot { block: 0, write: false, busy: false, start: begin }; o.depth];
    let mut free: Vec<usize> = (0..o.depth).collect();
    let mut over = false;
    loop {
        let now = Instant::now();
        over |= now >= end;
        while !over && let Some(i) = free.pop() {
            let (block, write) = blocks.pick();
            slots[i] = Slot { block, write, busy: true, start: now };
            guest.submit(i, block * blocks.bs, write.then_some(&blocks.data[..]));
        }
        guest.publish()?;
        if over && free.len() == o.depth {
            return Ok(begin.elapsed());
        }
        let before = free.len();
        while let Some(i) = guest.ended()? {
            let Some(slot) = slots.get_mut(i).filter(|s| s.busy) else {
                return Err(format!("a second answer to request {i}"));
            };
            slot.busy = false;
            if !slot.write {
                guest.data(i, &mut blocks.data);
            }
            blocks.ended(slot.block, slot.write)?;
            all.add(slot.start.elapsed().as_nanos() as u64);
            free.push(i);
        }
        if free.len() == before {
            guest.sleep()?;
        }
    }
}

/// The same requests, one after the other, straight to a file.
fn plain(o: &Options, path: &str, all: &mut Histogram) -> Result<Duration, String> {
    let named = |e: std::io::Error| format!("{path}: {e}");
    let file = File::options().read(true).write(true).open(path).map_err(named)?;
    let mut blocks = Blocks::new(o, file.metadata().map_err(named)?.len())?;
    let begin = Instant::now();
    let end = begin + Duration::from_secs_f64(o.seconds);
    loop {
        let start = Instant::now();
        if start >= end {
            return Ok(begin.elapsed());
        }
        let (block, write) = blocks.pick();
        let at = block * blocks.bs;
        let done = if write {
            file.write_all_at(&blocks.data, at)
        } else {
            file.read_exact_at(&mut blocks.data, at)
        };
        done.map_err(named)?;
        blocks.ended(block, write)?;
        all.add(start.elapsed().as_nanos() as u64);
    }
}
