//! Random histories of one image, compared with a byte array while they run and judged by `qemu-img` at the end.
//!
//! A history is a function of its seed: geometry, options, layer below, operations. Operations of one batch run concurrently on
//! disjoint bytes (often of the same cluster), so the array says exactly what must be read after. The runner knows nothing of
//! how the driver works; what it demands is: each read gives the array's bytes, `qemu-img check` finds nothing after
//! closing, and `qemu-img convert` gives the array.

use crate::testing::file::{FileNode, LateNode, edge_onto};
use crate::{Options, Qcow2};
use block::{Data, ReqFlags, Span};
use env::Env;
use graph::{Node, Role};
use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;
use std::task::Poll;

/// A repeatable source of numbers (splitmix64).
#[derive(Clone)]
pub struct Rng(pub u64);

impl Rng {
    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
    /// A number below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        if n == 0 { 0 } else { self.next_u64() % n }
    }
    /// True once in `n`.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
    /// One of these.
    pub fn of<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len() as u64) as usize]
    }
}

/// What a history is about.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Its seed.
    pub seed: u64,
    /// Arguments of `qemu-img create -o`.
    pub create: String,
    /// Bytes of the disk.
    pub size: u64,
    /// log2 of the cluster size.
    pub cluster_bits: u32,
    /// Bytes of a raw layer below, if there is one.
    pub backing: Option<u64>,
    /// Data in an external file.
    pub data_file: bool,
    /// Version 2.
    pub old: bool,
    /// An internal snapshot is taken after the first half.
    pub snapshot: bool,
    /// Operations on the files take random time; some requests are dropped before they end.
    pub late: bool,
    /// Options of opening.
    pub options: Options,
    /// Batches.
    pub batches: u64,
}

impl Plan {
    /// The plan of a seed.
    pub fn new(seed: u64) -> Plan {
        let mut r = Rng(seed);
        let old = r.one_in(6);
        let extended = !old && r.one_in(4);
        let cluster_bits =
            if extended { r.of(&[14, 16, 17]) } else { r.of(&[9, 10, 12, 12, 14, 16, 16, 18, 21]) };
        let order = if old { 4 } else { r.of(&[0, 1, 2, 3, 4, 4, 4, 5, 6]) };
        let data_file = !old && r.one_in(8);
        let raw = data_file && r.one_in(2);
        let zstd = !old && r.one_in(2);
        let lazy = !old && r.one_in(6);
        let cluster = 1u64 << cluster_bits;
        let max = (cluster * 400).clamp(256 << 10, 8 << 20);
        let size = (r.below(max) + 512) & !511;
        let backing = (!raw && r.one_in(2)).then(|| ((r.below(size * 3 / 2) + 512) & !511).max(512));
        let mut create = format!("compat={},cluster_size={cluster}", if old { "0.10" } else { "1.1" });
        if !old {
            create +=
                &format!(",refcount_bits={},extended_l2={}", 1 << order, if extended { "on" } else { "off" });
            create += if zstd { ",compression_type=zstd" } else { "" };
            create += if lazy { ",lazy_refcounts=on" } else { "" };
        }
        let options = Options {
            l2_cache_size: r.one_in(2).then_some(1),
            refcount_cache_size: r.one_in(2).then_some(1),
            l2_cache_entry_size: r.one_in(3).then_some(512),
            discard_no_unref: r.one_in(8) && !old,
            pass_discard_other: r.one_in(2),
            ..Options::default()
        };
        let snapshot = r.one_in(4) && order >= 4 && !data_file;
        Plan {
            seed,
            create,
            size,
            cluster_bits,
            backing,
            data_file,
            old,
            snapshot,
            late: r.one_in(2),
            options,
            batches: 30,
        }
        .with_raw(raw)
    }

    fn with_raw(mut self, raw: bool) -> Plan {
        if raw {
            self.create += ",data_file_raw=on";
        }
        self
    }
}

/// Runs a command; its output, or what went wrong.
pub fn command(program: &str, args: &[&str]) -> Result<String, String> {
    let out = Command::new(program).args(args).output().map_err(|e| format!("{program}: {e}"))?;
    let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    if out.status.success() { Ok(text) } else { Err(format!("{program} {args:?}: {}\n{text}", out.status)) }
}

fn s(p: &Path) -> &str {
    p.to_str().expect("temporary paths are text")
}

/// The files of a history.
struct Files {
    image: PathBuf,
    data: Option<PathBuf>,
    backing: Option<PathBuf>,
}

fn prepare(plan: &Plan, dir: &Path, rng: &mut Rng) -> Result<(Files, Vec<u8>), String> {
    let mut model = vec![0; plan.size as usize];
    let image = dir.join("image.qcow2");
    let size = plan.size.to_string();
    let mut create = plan.create.clone();
    let data = plan.data_file.then(|| dir.join("data.raw"));
    if let Some(d) = &data {
        create += &format!(",data_file={}", s(d));
    }
    let backing = match plan.backing {
        None => None,
        Some(len) => {
            let path = dir.join("backing.raw");
            let bytes: Vec<u8> = pattern(rng.next_u64(), len as usize, true);
            std::fs::write(&path, &bytes).map_err(|e| e.to_string())?;
            let n = bytes.len().min(model.len());
            model[..n].copy_from_slice(&bytes[..n]);
            Some(path)
        }
    };
    let mut args = vec!["create", "-q", "-f", "qcow2", "-o", &create];
    if let Some(b) = &backing {
        args.extend(["-b", s(b), "-F", "raw"]);
    }
    args.extend([s(&image), &size]);
    command("qemu-img", &args)?;
    Ok((Files { image, data, backing }, model))
}

/// Bytes that differ everywhere, with holes of zeroes if asked.
pub fn pattern(seed: u64, len: usize, holes: bool) -> Vec<u8> {
    let mut r = Rng(seed);
    let mut v = vec![0u8; len];
    for chunk in v.chunks_mut(2048) {
        if holes && r.one_in(3) {
            continue;
        }
        // Half of it shrinks well when compressed.
        let word = r.next_u64();
        let dull = r.one_in(2);
        for (i, b) in chunk.iter_mut().enumerate() {
            *b = if dull { (word >> (8 * (i / 512 % 8))) as u8 } else { r.next_u64() as u8 };
        }
    }
    v
}

async fn open(
    env: &Env,
    files: &Files,
    plan: &Plan,
    under_way: &Rc<Cell<usize>>,
) -> Result<Rc<Qcow2>, String> {
    let text = |e: block::BlockError| e.to_string();
    let edge = |path: PathBuf, role| async move {
        let write = role != Role::Backing;
        let file = env.open(&path, env::OpenMode { write, ..Default::default() }).await?;
        let node: Rc<dyn Node> =
            if plan.late { LateNode::new(env, file, plan.seed, under_way) } else { FileNode::new(file) };
        edge_onto(env, node, write, role).await
    };
    let file = edge(files.image.clone(), Role::Primary).await.map_err(text)?;
    let data = match &files.data {
        Some(p) => Some(edge(p.clone(), Role::Data).await.map_err(text)?),
        None => None,
    };
    let image = Qcow2::open(env.clone(), file, data, plan.options.clone()).await.map_err(text)?;
    if let Some(b) = &files.backing {
        image.set_backing(Some(edge(b.clone(), Role::Backing).await.map_err(text)?));
    }
    Ok(image)
}

/// One operation on a span.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Op {
    Write,
    Zero { unmap: bool },
    Discard,
    Compressed,
    Read,
}

fn random_span(plan: &Plan, rng: &mut Rng) -> Span {
    let cluster = 1u64 << plan.cluster_bits;
    let len = match rng.below(6) {
        0 => 512,
        1 => rng.below(4096) + 1,
        2 => cluster,
        3 => rng.below(cluster * 2) + 1,
        4 => rng.below(cluster * 12) + 1,
        _ => 4096,
    };
    let align = rng.of(&[1, 512, 512, 4096, cluster]);
    let start = rng.below(plan.size) & !(align - 1);
    let len = if rng.one_in(2) { len.next_multiple_of(align) } else { len };
    Span::new(start, len.min(plan.size - start).max(1))
}

/// Concurrent operations on disjoint spans.
fn batch(plan: &Plan, rng: &mut Rng) -> Vec<(Op, Span, u64)> {
    let n = rng.of(&[1, 1, 2, 4, 16]);
    let mut out: Vec<(Op, Span, u64)> = Vec::new();
    for _ in 0..n {
        let cluster = 1u64 << plan.cluster_bits;
        let mut span = random_span(plan, rng);
        // Near the last one, so that clusters are shared.
        if let (Some((_, last, _)), true) = (out.last(), rng.one_in(2)) {
            let start = last.end().min(plan.size - 1);
            span = Span::new(start, span.len.min(plan.size - start));
        }
        let op = match rng.below(12) {
            0..6 => Op::Write,
            6 => Op::Zero { unmap: false },
            7 => Op::Zero { unmap: true },
            8 => Op::Discard,
            9 if !plan.data_file => Op::Compressed,
            _ => Op::Read,
        };
        if op == Op::Compressed {
            span = span.align_out(cluster);
            span = span.intersect(&Span::new(0, plan.size));
        }
        if span.is_empty() || out.iter().any(|(_, other, _)| other.overlaps(&span)) {
            continue;
        }
        out.push((op, span, rng.next_u64()));
    }
    out
}

async fn run_one(
    image: &Qcow2,
    op: Op,
    at: Span,
    seed: u64,
    before: &[u8],
) -> Result<Option<Vec<u8>>, String> {
    let text = |e: block::BlockError| format!("{op:?} {at}: {e:?}");
    let data = || Data::from(pattern(seed, at.len as usize, seed.is_multiple_of(5)));
    match op {
        Op::Write => {
            let d = data();
            image
                .write(at, d.clone(), ReqFlags { fua: seed.is_multiple_of(11), ..ReqFlags::NONE })
                .await
                .map_err(text)?;
            Ok(Some(d.to_vec()))
        }
        Op::Compressed => {
            let d = data();
            image
                .write(at, d.clone(), ReqFlags { compressed: true, ..ReqFlags::NONE })
                .await
                .map_err(text)?;
            Ok(Some(d.to_vec()))
        }
        Op::Zero { unmap } => {
            image.zero(at, ReqFlags { may_unmap: unmap, ..ReqFlags::NONE }).await.map_err(text)?;
            Ok(Some(vec![0; at.len as usize]))
        }
        Op::Discard => {
            image.discard(at).await.map_err(text)?;
            let now = image.read(at).await.map_err(text)?.to_vec();
            // Each byte is what it was, or zero.
            match now.iter().zip(before).position(|(n, b)| n != b && *n != 0) {
                Some(i) => Err(format!("discard {at} left other bytes at {i}")),
                None => Ok(Some(now)),
            }
        }
        Op::Read => {
            let now = image.read(at).await.map_err(text)?.to_vec();
            compare(at.start, &now, before).map_err(|e| format!("read {at}: {e}"))?;
            Ok(None)
        }
    }
}

fn compare(base: u64, got: &[u8], want: &[u8]) -> Result<(), String> {
    if got.len() != want.len() {
        return Err(format!("{} bytes instead of {}", got.len(), want.len()));
    }
    match got.iter().zip(want).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(i) => Err(format!("byte {:#x} is {:#04x}, should be {:#04x}", base + i as u64, got[i], want[i])),
    }
}

/// Turns without a file operation under way after which nothing more comes of a dropped request.
const QUIET_TURNS: u32 = 32;

/// `work`, or `None` if it did not end in `polls` polls: it is dropped then.
async fn within<T>(work: impl Future<Output = T>, polls: u64) -> Option<T> {
    let mut work = Box::pin(work);
    let mut left = polls;
    poll_fn(|cx| match work.as_mut().poll(cx) {
        Poll::Ready(v) => Poll::Ready(Some(v)),
        Poll::Pending if left == 0 => Poll::Ready(None),
        Poll::Pending => {
            left -= 1;
            Poll::Pending
        }
    })
    .await
}

async fn run_batch(
    env: &Env,
    image: &Qcow2,
    late: Option<&Rc<Cell<usize>>>,
    ops: &[(Op, Span, u64)],
    model: &mut [u8],
) -> Result<(), String> {
    let range = |s: &Span| s.start as usize..s.end() as usize;
    let results = {
        let view: &[u8] = model;
        let runs = ops.iter().map(|(op, at, seed)| {
            let polls = if late.is_some() && seed.is_multiple_of(7) { seed / 7 % 8 } else { u64::MAX };
            within(run_one(image, *op, *at, *seed, &view[range(at)]), polls)
        });
        futures_util::future::join_all(runs).await
    };
    // What dropped requests left under way lands before anybody looks: file operations, and what follows from them.
    let mut quiet = 0;
    while let Some(n) = late.filter(|_| quiet < QUIET_TURNS) {
        quiet = if n.get() > 0 { 0 } else { quiet + 1 };
        env.yield_now().await;
    }
    for ((op, at, seed), r) in ops.iter().zip(results) {
        let bytes = match r {
            Some(r) => r?,
            None => Some(after_drop(image, *op, *at, *seed, &model[range(at)]).await?),
        };
        if let Some(bytes) = bytes {
            model[range(at)].copy_from_slice(&bytes);
        }
    }
    Ok(())
}

/// What is read after a request was dropped: each byte as before, or as the request would have left it.
async fn after_drop(image: &Qcow2, op: Op, at: Span, seed: u64, before: &[u8]) -> Result<Vec<u8>, String> {
    let now = image.read(at).await.map_err(|e| e.to_string())?.to_vec();
    let wanted = match op {
        Op::Write | Op::Compressed => pattern(seed, at.len as usize, seed.is_multiple_of(5)),
        Op::Zero { .. } | Op::Discard => vec![0; at.len as usize],
        Op::Read => before.to_vec(),
    };
    match (0..now.len()).find(|i| now[*i] != before[*i] && now[*i] != wanted[*i]) {
        Some(i) => Err(format!("dropped {op:?} {at} left another byte at {:#x}", at.start + i as u64)),
        None => Ok(now),
    }
}

async fn check_extents(image: &Qcow2, model: &[u8], backed: bool) -> Result<(), String> {
    let mut pos = 0;
    while pos < image.len() {
        let list = image.extents(Span::between(pos, image.len())).await.map_err(|e| e.to_string())?;
        if list.is_empty() || list[0].span.start != pos {
            return Err(format!("extents at {pos:#x}: {list:?}"));
        }
        for e in list {
            if e.span.start != pos {
                return Err(format!("a gap in extents at {pos:#x}"));
            }
            let zero = e.kind == block::Kind::Zero || e.kind == block::Kind::Unallocated && !backed;
            if zero && !block::is_zero(&model[e.span.start as usize..e.span.end() as usize]) {
                return Err(format!("{e:?} is not zero"));
            }
            pos = e.span.end();
        }
    }
    Ok(())
}

/// Runs a history in `dir` (emptied by the caller). The error says what went wrong first.
///
/// # Errors
/// See the module.
pub async fn run(env: Env, dir: PathBuf, plan: Plan) -> Result<(), String> {
    let mut rng = Rng(plan.seed ^ 0xabcd);
    let (files, mut model) = prepare(&plan, &dir, &mut rng)?;
    let under_way = Rc::new(Cell::new(0));
    let late = plan.late.then_some(&under_way);
    let mut image = open(&env, &files, &plan, &under_way).await?;
    let mut kept: Option<Vec<u8>> = None;
    for n in 0..plan.batches {
        let ops = batch(&plan, &mut rng);
        if std::env::var_os("LIVEBLK_TRACE").is_some() {
            eprintln!("batch {n}: {ops:?}");
        }
        run_batch(&env, &image, late, &ops, &mut model)
            .await
            .map_err(|e| format!("batch {n} {ops:?}: {e}"))?;
        if rng.one_in(3) {
            image.flush().await.map_err(|e| format!("flush: {e:?}"))?;
        }
        let snapshot_now = plan.snapshot && n == plan.batches / 2;
        if rng.one_in(12) || snapshot_now {
            image.close().await.map_err(|e| format!("close: {e:?}"))?;
            drop(image);
            if snapshot_now {
                command("qemu-img", &["snapshot", "-c", "s1", s(&files.image)])?;
                kept = Some(model.clone());
            }
            image = open(&env, &files, &plan, &under_way).await?;
        }
        if rng.one_in(6) {
            let all = Span::new(0, plan.size);
            let now = image.read(all).await.map_err(|e| e.to_string())?.to_vec();
            compare(0, &now, &model).map_err(|e| format!("batch {n} {ops:?}: whole disk: {e}"))?;
            check_extents(&image, &model, plan.backing.is_some())
                .await
                .map_err(|e| format!("batch {n}: {e}"))?;
        }
    }
    image.close().await.map_err(|e| format!("close: {e:?}"))?;
    drop(image);
    judge(&files, &dir, &model)?;
    if let Some(kept) = kept {
        command("qemu-img", &["snapshot", "-a", "s1", s(&files.image)])?;
        judge(&files, &dir, &kept).map_err(|e| format!("snapshot: {e}"))?;
    }
    Ok(())
}

fn judge(files: &Files, dir: &Path, model: &[u8]) -> Result<(), String> {
    command("qemu-img", &["check", "-q", "-f", "qcow2", s(&files.image)])?;
    let raw = dir.join("out.raw");
    command("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", s(&files.image), s(&raw)])?;
    let bytes = std::fs::read(&raw).map_err(|e| e.to_string())?;
    compare(0, &bytes, model).map_err(|e| format!("qemu-img reads: {e}"))
}

/// A history that takes longer hangs; usual are milliseconds.
const LONGEST: std::time::Duration = std::time::Duration::from_secs(30);

async fn timed(env: Env, dir: PathBuf, plan: Plan) -> Result<(), String> {
    let history = Box::pin(run(env.clone(), dir, plan));
    env.timeout(LONGEST, history).await.unwrap_or_else(|| Err(format!("no end after {LONGEST:?}")))
}

/// Runs the histories of `seeds`, each in a directory of its own below `dir`, and stops at the first that fails.
///
/// # Errors
/// The seed, its plan and what went wrong.
pub fn run_seeds(dir: &Path, seeds: impl Iterator<Item = u64>) -> Result<u64, String> {
    let mut done = 0;
    for seed in seeds {
        let here = dir.join(format!("{seed}"));
        std::fs::create_dir_all(&here).map_err(|e| e.to_string())?;
        let plan = Plan::new(seed);
        let executor = env::os::start(env::os::OsConfig::default());
        executor.run(timed(executor.env(), here.clone(), plan.clone())).map_err(|e| {
            let left = executor.waiting();
            format!("seed {seed}: {e}\n{plan:?}\nin {}\ntasks left: {left:?}", here.display())
        })?;
        std::fs::remove_dir_all(&here).map_err(|e| e.to_string())?;
        done += 1;
    }
    Ok(done)
}
