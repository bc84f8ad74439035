//! `nbdload`: keeps a number of requests in flight against an NBD server and reports rates and latencies as JSON.
//!
//! One thread and one connection each for `--conns`; each connection has blocks of its own, and never two requests on one
//! block at a time, so that `--verify` can know what every block must contain. All requests that replies made room for
//! are sent with one write. With `--steered` whoever started this says over stdin when it begins and ends.

use clap::{Parser, ValueEnum};
use nbd::Mode;
use nbd::proto::{REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, chunk};
use nbdload::content::Expected;
use nbdload::latency::Histogram;
use nbdload::random::Random;
use nbdload::report;
use nbdload::steering::Steering;
use nbdload::{Socket, connect, enter, parse_uri};
use std::io::{Read, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Op {
    Randread,
    Randwrite,
    Randrw,
    Seqread,
    Seqwrite,
}

#[derive(Clone, Copy, ValueEnum)]
enum Framing {
    Simple,
    Structured,
}

#[derive(Parser, Clone)]
#[command(about = "Load generator for NBD servers")]
struct Options {
    /// nbd+unix:///EXPORT?socket=PATH or nbd://HOST:PORT/EXPORT
    #[arg(long)]
    uri: Option<String>,
    /// Unix socket of the server
    #[arg(long)]
    socket: Option<String>,
    /// HOST:PORT of the server
    #[arg(long)]
    tcp: Option<String>,
    /// Export name
    #[arg(long, default_value = "")]
    export: String,
    #[arg(long, value_enum, default_value = "randread")]
    op: Op,
    /// Bytes of a request
    #[arg(long, default_value_t = 4096)]
    bs: u32,
    /// Requests in flight on each connection
    #[arg(long, default_value_t = 16)]
    depth: usize,
    /// Connections
    #[arg(long, default_value_t = 1)]
    conns: u64,
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Most requests a second in all (0: as many as possible)
    #[arg(long, default_value_t = 0.0)]
    rate: f64,
    /// Stamp what is written and check what is read
    #[arg(long)]
    verify: bool,
    /// Afterwards read all that was written and check it; not in the figures
    #[arg(long, requires = "verify")]
    reread: bool,
    /// Connects, begins with a line on stdin, and ends with the end of stdin
    #[arg(long)]
    steered: bool,
    #[arg(long, value_enum, default_value = "simple")]
    framing: Framing,
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// One place in the window.
struct Slot {
    block: u64,
    write: bool,
    start: Instant,
    busy: bool,
    /// Bytes of a structured read that have come.
    got: usize,
    data: Vec<u8>,
}

struct Connection {
    socket: Socket,
    options: Options,
    steering: Option<Arc<Steering>>,
    index: u64,
    /// Blocks of this connection.
    blocks: u64,
    next: u64,
    random: Random,
    slots: Vec<Slot>,
    busy_blocks: std::collections::HashSet<u64>,
    expected: Option<Expected>,
    latencies: Histogram,
    input: Vec<u8>,
    filled: usize,
    parsed: usize,
    output: Vec<u8>,
}

fn main() -> ExitCode {
    match run(Options::parse()) {
        Ok(json) => {
            println!("{json}");
            ExitCode::SUCCESS
        }
        Err(why) => {
            eprintln!("nbdload: {why}");
            ExitCode::FAILURE
        }
    }
}

fn run(mut o: Options) -> Result<String, String> {
    if let Some(uri) = &o.uri {
        let (unix, tcp, export) = parse_uri(uri)?;
        (o.socket, o.tcp, o.export) = (unix, tcp, export);
    }
    if o.bs == 0 || o.bs > 32 << 20 || !o.bs.is_multiple_of(8) || o.depth == 0 || o.conns == 0 {
        return Err("block size, depth or number of connections makes no sense".to_owned());
    }
    let mut connections = (0..o.conns).map(|i| Connection::open(&o, i)).collect::<Result<Vec<_>, _>>()?;
    let steering = o.steered.then(Steering::by_stdin);
    connections.iter_mut().for_each(|c| c.steering = steering.clone());
    let begin = Instant::now();
    let threads: Vec<_> =
        connections.into_iter().map(|mut c| std::thread::spawn(move || c.run(begin))).collect();
    let (mut all, mut took) = (Histogram::default(), Duration::ZERO);
    for t in threads {
        let (latencies, time) = t.join().map_err(|_| "a connection's thread panicked".to_owned())??;
        all.merge(&latencies);
        took = took.max(time);
    }
    Ok(report::json(&all, o.bs, took, o.verify))
}

impl Connection {
    fn open(o: &Options, index: u64) -> Result<Connection, String> {
        let mut socket = connect(o.socket.as_deref(), o.tcp.as_deref())?;
        let mode = match o.framing {
            Framing::Simple => Mode::Simple,
            Framing::Structured => Mode::Structured,
        };
        let n = enter(&mut socket, &o.export, mode)?;
        let blocks = n.size / u64::from(o.bs) / o.conns;
        if blocks <= o.depth as u64 {
            return Err(format!("an export of {} bytes is too small for this load", n.size));
        }
        let bs = o.bs as usize;
        let slot =
            || Slot { block: 0, write: false, start: Instant::now(), busy: false, got: 0, data: vec![0; bs] };
        Ok(Connection {
            socket,
            options: o.clone(),
            steering: None,
            index,
            blocks,
            next: 0,
            random: Random::new((o.seed ^ (index + 1) << 32) | 1),
            slots: (0..o.depth).map(|_| slot()).collect(),
            busy_blocks: std::collections::HashSet::new(),
            expected: o.verify.then(|| Expected::new(blocks, o.seed << 8 ^ index)),
            latencies: Histogram::default(),
            input: vec![0; (1 << 20) + 2 * bs],
            filled: 0,
            parsed: 0,
            output: Vec::with_capacity(o.depth * (bs + 28)),
        })
    }

    /// The load, and what is to be read afterwards; the figures, and how long the load took.
    fn run(&mut self, begin: Instant) -> Result<(Histogram, Duration), String> {
        self.load(begin)?;
        let (figures, took) = (std::mem::take(&mut self.latencies), begin.elapsed());
        if self.options.reread {
            self.reread()?;
        }
        Ok((figures, took))
    }

    /// Reads every block that was written, and checks it.
    fn reread(&mut self) -> Result<(), String> {
        self.options.op = Op::Seqread;
        let mut written = self.expected.as_ref().map(Expected::written).unwrap_or_default().into_iter();
        let mut in_flight = 0;
        loop {
            while in_flight < self.slots.len()
                && let Some(block) = written.next()
            {
                self.issue(block);
                in_flight += 1;
            }
            self.send()?;
            if in_flight == 0 {
                return Ok(());
            }
            in_flight -= self.receive()?;
        }
    }

    fn send(&mut self) -> Result<(), String> {
        if !self.output.is_empty() {
            self.socket.write_all(&self.output).map_err(|e| format!("send: {e}"))?;
            self.output.clear();
        }
        Ok(())
    }

    fn load(&mut self, begin: Instant) -> Result<(), String> {
        let end = begin + Duration::from_secs_f64(self.options.seconds);
        let pause = match self.options.rate {
            r if r > 0.0 => Some(Duration::from_secs_f64(self.options.conns as f64 / r)),
            _ => None,
        };
        let mut due = begin;
        let mut in_flight = 0;
        loop {
            let now = Instant::now();
            let over = now >= end || self.steering.as_ref().is_some_and(|s| s.is_over());
            while in_flight < self.slots.len() && !over && pause.is_none_or(|_| due <= now) {
                let block = self.pick();
                self.issue(block);
                in_flight += 1;
                due += pause.unwrap_or_default();
            }
            self.send()?;
            if in_flight == 0 {
                if over {
                    return Ok(());
                }
                std::thread::sleep(due.saturating_duration_since(now));
                continue;
            }
            in_flight -= self.receive()?;
        }
    }

    fn pick(&mut self) -> u64 {
        if matches!(self.options.op, Op::Seqread | Op::Seqwrite) {
            self.next = (self.next + 1) % self.blocks;
            return self.next;
        }
        loop {
            let block = self.random.below(self.blocks);
            if !self.busy_blocks.contains(&block) {
                return block;
            }
        }
    }

    fn issue(&mut self, block: u64) {
        let Some(i) = self.slots.iter().position(|s| !s.busy) else { return };
        self.busy_blocks.insert(block);
        let write = match self.options.op {
            Op::Randwrite | Op::Seqwrite => true,
            Op::Randread | Op::Seqread => false,
            Op::Randrw => self.random.coin(),
        };
        let slot = &mut self.slots[i];
        (slot.block, slot.write, slot.busy, slot.got, slot.start) = (block, write, true, 0, Instant::now());
        let bs = self.options.bs;
        let offset = (self.index * self.blocks + block) * u64::from(bs);
        let out = &mut self.output;
        out.extend_from_slice(&REQUEST_MAGIC.to_be_bytes());
        out.extend_from_slice(&[0, 0, 0, u8::from(write)]);
        out.extend_from_slice(&(i as u64).to_be_bytes());
        out.extend_from_slice(&offset.to_be_bytes());
        out.extend_from_slice(&bs.to_be_bytes());
        if write {
            if let Some(e) = &mut self.expected {
                e.stamp(block, &mut slot.data);
            }
            out.extend_from_slice(&slot.data);
        }
    }

    /// Takes one receive; the number of requests that ended.
    fn receive(&mut self) -> Result<usize, String> {
        if self.parsed > 0 && self.input.len() - self.filled < self.input.len() / 2 {
            self.input.copy_within(self.parsed..self.filled, 0);
            self.filled -= self.parsed;
            self.parsed = 0;
        }
        let n = self.socket.read(&mut self.input[self.filled..]).map_err(|e| format!("receive: {e}"))?;
        if n == 0 {
            return Err("the server hung up".to_owned());
        }
        self.filled += n;
        let mut ended = 0;
        let now = Instant::now();
        while let Some(done) = self.reply(now)? {
            ended += usize::from(done);
        }
        if self.parsed == self.filled {
            (self.parsed, self.filled) = (0, 0);
        }
        Ok(ended)
    }

    /// Handles one reply or chunk if it is complete: whether it was the last of its request.
    fn reply(&mut self, now: Instant) -> Result<Option<bool>, String> {
        let input = &self.input[self.parsed..self.filled];
        let u32_at = |i: usize| u32::from_be_bytes([input[i], input[i + 1], input[i + 2], input[i + 3]]);
        let u64_at = |i: usize| u64::from(u32_at(i)) << 32 | u64::from(u32_at(i + 4));
        if input.len() < 16 {
            return Ok(None);
        }
        let bs = self.options.bs as usize;
        match u32_at(0) {
            SIMPLE_REPLY_MAGIC => {
                if u32_at(4) != 0 {
                    return Err(format!("a request failed with error {}", u32_at(4)));
                }
                let i = u64_at(8) as usize;
                let slot = self.slots.get_mut(i).filter(|s| s.busy).ok_or("a reply to nothing")?;
                let len = if slot.write { 0 } else { bs };
                if input.len() < 16 + len {
                    return Ok(None);
                }
                let good = len == 0
                    || self.expected.as_mut().is_none_or(|e| e.check(slot.block, &input[16..16 + len]));
                self.parsed += 16 + len;
                self.end(i, good, now)
            }
            STRUCTURED_REPLY_MAGIC => {
                if input.len() < 20 {
                    return Ok(None);
                }
                let (flags, kind) = (u32_at(4) >> 16, (u32_at(4) & 0xffff) as u16);
                let (i, len) = (u64_at(8) as usize, u32_at(16) as usize);
                if input.len() < 20 + len {
                    return Ok(None);
                }
                let slot = self.slots.get_mut(i).filter(|s| s.busy).ok_or("a chunk for nothing")?;
                let base = (self.index * self.blocks + slot.block) * bs as u64;
                let (at, size) = match kind {
                    chunk::OFFSET_DATA => ((u64_at(20) - base) as usize, len - 8),
                    chunk::OFFSET_HOLE => ((u64_at(20) - base) as usize, u32_at(28) as usize),
                    chunk::NONE => (0, 0),
                    _ => return Err(format!("a request failed with chunk {kind:#x}")),
                };
                let to = slot.data.get_mut(at..at + size).ok_or("a chunk outside of its read")?;
                if kind == chunk::OFFSET_DATA {
                    to.copy_from_slice(&input[28..28 + size]);
                } else {
                    to.fill(0);
                }
                slot.got += size;
                self.parsed += 20 + len;
                if flags & u32::from(chunk::DONE) == 0 {
                    return Ok(Some(false));
                }
                let slot = &self.slots[i];
                let good = slot.write
                    || (slot.got == bs
                        && self.expected.as_mut().is_none_or(|e| e.check(slot.block, &slot.data)));
                self.end(i, good, now)
            }
            magic => Err(format!("a reply starts with {magic:#x}")),
        }
    }

    fn end(&mut self, i: usize, good: bool, now: Instant) -> Result<Option<bool>, String> {
        let slot = &mut self.slots[i];
        if !good {
            let block = self.index * self.blocks + slot.block;
            return Err(format!("block {block} does not contain what it must"));
        }
        slot.busy = false;
        self.busy_blocks.remove(&slot.block);
        self.latencies.add(now.duration_since(slot.start).as_nanos() as u64);
        Ok(Some(true))
    }
}
