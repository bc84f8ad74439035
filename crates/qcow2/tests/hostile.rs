//! Images with wrong bytes in their metadata: whatever they say, the driver answers or refuses, in bounded time, without panic.
//! `LIVEBLK_SEED` and `LIVEBLK_HISTORIES` as in `histories.rs`.

use block::{ReqFlags, Span};
use graph::{Node, Role};
use qcow2::testing::FileNode;
use qcow2::testing::history::{Rng, command};
use qcow2::{Options, Qcow2};
use std::path::{Path, PathBuf};
use std::time::Duration;

const BASES: [&str; 5] = [
    "cluster_size=64k",
    "cluster_size=4k,refcount_bits=1",
    "cluster_size=16k,extended_l2=on",
    "compat=0.10,cluster_size=512",
    "cluster_size=4k,compression_type=zstd",
];

fn base(dir: &Path, n: usize) -> Result<Vec<u8>, String> {
    let path = dir.join(format!("base{n}"));
    let text = path.to_str().ok_or("path")?;
    command("qemu-img", &["create", "-q", "-f", "qcow2", "-o", BASES[n], text, "1M"])?;
    let writes = ["-c", "write -P 1 0 200k", "-c", "write -z 300k 64k", "-c", "write -c 512k 64k"];
    command("qemu-io", &[&["-f", "qcow2"][..], &writes, &[text]].concat())?;
    std::fs::read(&path).map_err(|e| e.to_string())
}

/// Changes a few words of the metadata.
fn spoil(image: &mut [u8], r: &mut Rng, cluster: u64) {
    for _ in 0..1 + r.below(4) {
        // Most of the metadata is in the first clusters; the header's checks have their own tests.
        let at = match r.below(8) {
            0 => r.below(14) * 8,
            _ => cluster + r.below(cluster * 5),
        };
        let at = (at.min(image.len() as u64 - 8) & !7) as usize;
        let old = u64::from_be_bytes(image[at..at + 8].try_into().unwrap_or_default());
        let cluster_at = r.below(12) * cluster;
        let new = match r.below(8) {
            0 => 0,
            1 => u64::MAX,
            2 => 1 << 63 | cluster_at,
            3 => cluster_at | r.below(2),
            4 => old ^ 1 << r.below(64),
            5 => 1 << 62 | r.below(1 << 20),
            6 => 1 << 63 | r.next_u64() >> 9 & !(cluster - 1),
            _ => r.next_u64(),
        };
        image[at..at + 8].copy_from_slice(&new.to_be_bytes());
    }
}

async fn use_it(env: env::Env, path: PathBuf, mut r: Rng) {
    let options = Options { l2_cache_size: r.one_in(2).then_some(1), ..Options::default() };
    let Ok(file) = FileNode::edge(&env, &path, true, Role::Primary).await else { return };
    let Ok(image) = Qcow2::open(env.clone(), file, None, options).await else { return };
    let size = image.len().min(4 << 20);
    for _ in 0..25 {
        let at = Span::new(r.below(size), r.below(100_000) + 1).intersect(&Span::new(0, size));
        let flags = ReqFlags { may_unmap: r.one_in(2), ..ReqFlags::NONE };
        // Any of these may fail; none may panic or wait for ever.
        let _outcome = match r.below(6) {
            0 => image.read(at).await.map(|_| ()),
            1 => image.zero(at, flags).await,
            2 => image.discard(at).await,
            3 => image.extents(at).await.map(|_| ()),
            4 => image.flush().await,
            _ => image.write(at, vec![7; at.len as usize].into(), ReqFlags::NONE).await,
        };
    }
    let _outcome = image.close().await;
}

#[test]
fn wrong_metadata_never_panics_or_hangs() {
    let number =
        |name: &str, default: u64| std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default);
    let (first, n) = (number("LIVEBLK_SEED", 1), number("LIVEBLK_HISTORIES", 1000));
    let dir = Path::new("/dev/shm").join(format!("liveblk-hostile-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a directory");
    let bases: Vec<Vec<u8>> = (0..BASES.len()).map(|n| base(&dir, n).expect("a base image")).collect();
    let clusters = [65536, 4096, 16384, 512, 4096];
    for seed in first..first + n {
        let mut r = Rng(seed);
        let which = r.below(bases.len() as u64) as usize;
        let mut image = bases[which].clone();
        spoil(&mut image, &mut r, clusters[which]);
        let path = dir.join("image");
        std::fs::write(&path, &image).expect("an image");
        let executor = env::os::start(env::os::OsConfig::default());
        let env = executor.env();
        let ended = executor.run(async move {
            env.timeout(Duration::from_secs(20), Box::pin(use_it(env.clone(), path, r))).await
        });
        assert!(ended.is_some(), "seed {seed} did not end; left: {:?}", executor.waiting());
    }
    std::fs::remove_dir_all(&dir).expect("removed");
}
