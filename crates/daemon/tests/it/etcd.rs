//! A real etcd for tests, which ends with its value. The command line's tests use this file as well.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

/// A running one.
pub(crate) struct Server {
    pub(crate) process: Child,
    /// Where its clients find it.
    pub(crate) url: String,
    log: PathBuf,
}

/// An address of this machine that nobody else uses: no port that is free now and taken in a moment.
pub(crate) fn own_address() -> String {
    static USED: AtomicU8 = AtomicU8::new(1);
    let [.., a, b] = std::process::id().to_be_bytes();
    format!("127.{}.{b}.{}", a.max(1), USED.fetch_add(1, Ordering::Relaxed))
}

impl Server {
    /// Its files are in `dir`; `more` arguments than it needs.
    pub(crate) fn start(dir: &Path, url: &str, more: &[&str]) -> Server {
        let peers = format!("http://{}:2380", own_address());
        let cluster = format!("default={peers}");
        let log = dir.join("etcd.log");
        let mut etcd = Command::new("etcd");
        etcd.arg("--data-dir").arg(dir.join("etcd")).args(["--listen-client-urls", url]);
        etcd.args(["--advertise-client-urls", url, "--listen-peer-urls", &peers]);
        etcd.args(["--initial-advertise-peer-urls", &peers, "--initial-cluster", &cluster]);
        etcd.args(["--heartbeat-interval", "50", "--election-timeout", "500"]).args(more);
        etcd.stdout(Stdio::null()).stderr(std::fs::File::create(&log).unwrap());
        let process = etcd.spawn().expect("etcd (cargo xtask setup)");
        let (begun, address) = (Instant::now(), url.split_once("://").unwrap().1);
        while std::net::TcpStream::connect(address).is_err() {
            assert!(begun.elapsed() < Duration::from_secs(60), "etcd does not listen at {address}");
            std::thread::sleep(Duration::from_millis(20));
        }
        Server { process, url: url.to_owned(), log }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Ok(Some(ended)) = self.process.try_wait() {
            let log = std::fs::read_to_string(&self.log).unwrap_or_default();
            let last: Vec<&str> = log.lines().rev().take(20).collect();
            eprintln!("etcd ended with {ended}: {}", last.join("\n"));
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
