//! A real etcd for tests, which ends with its value. The command line's tests use this file as well.

use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::TcpStream;
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
        while TcpStream::connect(address).is_err() {
            assert!(begun.elapsed() < Duration::from_secs(60), "etcd does not listen at {address}");
            std::thread::sleep(Duration::from_millis(20));
        }
        Server { process, url: url.to_owned(), log }
    }

    /// From now on whoever asks is to be `user` with this password, who may use all below `/liveblk/`.
    pub(crate) fn asks_who(&self, user: &str, password: &str) {
        // base64 of "/liveblk/" and of what comes after all that begins so
        let perm = json!({"permType": "READWRITE", "key": "L2xpdmVibGsv", "range_end": "L2xpdmVibGsw"});
        self.change("user/add", &json!({"name": "root", "password": "r"}));
        self.change("user/grant", &json!({"user": "root", "role": "root"}));
        self.change("user/add", &json!({"name": user, "password": password}));
        self.change("role/add", &json!({"name": "pairs"}));
        self.change("role/grant", &json!({"name": "pairs", "perm": perm}));
        self.change("user/grant", &json!({"user": user, "role": "pairs"}));
        self.change("enable", &json!({}));
    }

    fn change(&self, path: &str, body: &Value) {
        let mut stream = TcpStream::connect(self.url.split_once("://").unwrap().1).unwrap();
        let (body, mut answer) = (body.to_string(), String::new());
        let head = format!("POST /v3/auth/{path} HTTP/1.0\r\nContent-Length: {}\r\n\r\n", body.len());
        stream.write_all((head + &body).as_bytes()).unwrap();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.contains(" 200 OK"), "{path}: {answer}");
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
