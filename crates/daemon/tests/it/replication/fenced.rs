//! Who serves a group, by the word of a real etcd: promotions need it, who lost it answers nothing, and who lacks something does not take over.

use super::*;
use crate::common::signal;
use crate::etcd::{Server, own_address};

/// An etcd of its own.
struct Etcd {
    server: Server,
    // where its files are
    _dir: Dir,
}

impl Etcd {
    fn start() -> Etcd {
        let here = own_address();
        Etcd::at(Dir::new(), &format!("http://{here}:2379"), &[])
    }

    fn at(dir: Dir, url: &str, more: &[&str]) -> Etcd {
        Etcd { server: Server::start(&dir.0, url, more), _dir: dir }
    }

    fn signal(&self, name: &str) {
        signal(&self.server.process, name);
    }

    /// Group `g` with this one as its arbiter. The first place does not answer.
    fn fencing(&self) -> Value {
        let nobody = format!("http://{}", own_address());
        json!({"fencing": {"type": "etcd", "endpoints": [nobody, self.server.url], "ttl": 3}})
    }

    fn host(&self) -> Host {
        Host::begin_with(with_disks(1), "redo", 1, 0, &["--state-dir", "state"], &self.fencing())
    }

    fn pair(&self) -> (Host, Host) {
        let (mut p, mut s) = (self.host(), self.host());
        s.secondary();
        p.primary(&[&s], &json!({"timeout-ms": 500}));
        p.until_running(1);
        (p, s)
    }

    /// Such a pair at the checkpoint that is returned, whose primary has gone on alone since: 1 was written before, 2 after. The
    /// secondary is stopped.
    fn parted(&self) -> (Host, Host, u64) {
        let (mut p, s) = self.pair();
        p.io(0, "write -P 1 0 64k").unwrap();
        let epoch = p.checkpoint();
        s.daemon.signal("STOP");
        p.io(0, "write -P 2 0 64k").unwrap();
        until(|| p.state() == "degraded");
        (p, s, epoch)
    }
}

impl Host {
    fn state(&mut self) -> String {
        self.info()["state"].as_str().unwrap().to_owned()
    }

    /// A request of a client that connects again, to whom the daemon may say nothing; it has come.
    fn begins_patiently(&self, command: &str) -> Child {
        let path = self.dir.path("nbd.sock");
        let disk = format!("driver=nbd,reconnect-delay=60,export=disk0,server.type=unix,server.path={path}");
        let io = qemu_io(&["--image-opts", "-c", command, &disk]);
        // nothing tells that it has come
        std::thread::sleep(std::time::Duration::from_millis(500));
        io
    }

    /// Takes over as soon as the lease of the other side is over.
    fn take_over(&mut self) {
        until(|| match self.c.command("replication-failover", json!({"group": "g"})) {
            Ok(_) => true,
            Err(e) => {
                assert!(e.contains("owns the group by its lease"), "{e}");
                false
            }
        });
    }
}

/// F2, with a primary that is stopped and goes on after another took over: what it was asked meanwhile fails, as does all after it.
#[test]
fn an_owner_is_succeeded_when_its_lease_is_over_and_answers_nothing_afterwards() {
    let etcd = Etcd::start();
    let (mut p, mut s) = etcd.pair();
    p.io(0, "write -P 1 0 1M").unwrap();
    p.checkpoint();
    let lease = p.info()["lease"].clone();
    assert!(lease["remaining-ms"].as_u64().unwrap() > 0 && lease["holder"].is_string(), "{lease}");
    let why = s.c.command("replication-failover", json!({"group": "g"})).unwrap_err();
    assert!(why.contains("owns the group by its lease for another"), "{why}");
    s.io(0, "read -P 1 0 1M").unwrap();
    p.io(0, "write -P 2 0 64k").unwrap();
    p.daemon.signal("STOP");
    let (write, read) = (p.begins(0, "write -P 6 0 64k"), p.begins(0, "read 0 64k"));
    s.take_over();
    s.io(0, "read -P 1 0 1M").unwrap();
    s.io(0, "write -P 3 1M 64k").unwrap();
    p.daemon.signal("CONT");
    for answer in [ended(write), ended(read)] {
        let why = answer.unwrap_err();
        assert!(why.contains("Input/output error"), "{why}");
    }
    until(|| p.state() == "fenced");
    assert!(p.io(0, "write -P 6 0 64k").is_err() && p.io(0, "read 0 64k").is_err());
    let held = s.info()["lease"]["holder"].clone();
    assert_ne!(held, lease["holder"]);
    assert!(s.info()["generation"].as_u64() > p.info()["generation"].as_u64());
    // what serves now is not begun a second time by who was succeeded
    let p = p.back();
    assert!(p.io(0, "write -P 6 0 64k").is_err() && p.io(0, "read 0 64k").is_err());
    assert_eq!(s.info()["lease"]["holder"], held);
}

/// The arbiter is gone for a while: the pair goes on for as long as the lease lasts, and then waits for it.
#[test]
fn without_the_arbiter_a_pair_goes_on_until_the_lease_is_over() {
    let etcd = Etcd::start();
    let (mut p, s) = etcd.pair();
    p.io(0, "write -P 1 0 64k").unwrap();
    etcd.signal("STOP");
    p.io(0, "write -P 2 0 64k").unwrap();
    until(|| p.state() == "suspended");
    let mut waits = p.begins(0, "write -P 3 0 64k");
    p.checkpoint();
    s.io(0, "read -P 2 0 64k").unwrap();
    assert!(waits.try_wait().unwrap().is_none(), "it was answered without a lease");
    etcd.signal("CONT");
    let answer = ended(waits).unwrap();
    assert!(answer.contains("wrote"), "{answer}");
    until(|| p.state() == "running");
    p.io(0, "read -P 3 0 64k").unwrap();
}

/// X4, L2: the primary has gone on alone, so its secondary has not all that was acknowledged. It takes over only if somebody says what is lost.
#[test]
fn who_lacks_what_was_acknowledged_takes_over_by_force_alone() {
    let etcd = Etcd::start();
    let (mut p, mut s, epoch) = etcd.parted();
    p.daemon.signal("KILL");
    p.daemon.wait();
    s.daemon.signal("CONT");
    until(|| {
        let why = s.c.command("replication-failover", json!({"group": "g"})).unwrap_err();
        why.contains("the primary has acknowledged writes that this side has not")
    });
    let forced = |loss: Option<u64>| json!({"group": "g", "force": true, "acknowledge-loss": loss});
    let mut unsaid = forced(None);
    unsaid.as_object_mut().unwrap().remove("acknowledge-loss");
    for arguments in [unsaid, forced(Some(epoch + 1))] {
        let why = s.c.command("replication-failover", arguments).unwrap_err();
        assert!(why.contains(&format!("give 'acknowledge-loss': {epoch}")), "{why}");
    }
    s.c.command("replication-failover", forced(Some(epoch))).unwrap();
    s.io(0, "read -P 1 0 64k").unwrap();
    s.io(0, "write -P 3 0 64k").unwrap();
}

/// A secondary that was away and has caught up since may take over, without force; an owner that is started again has its lease at once.
#[test]
fn who_has_caught_up_takes_over() {
    let etcd = Etcd::start();
    let (mut p, mut s, _) = etcd.parted();
    s.daemon.signal("CONT");
    p.until_running(1);
    let holder = p.info()["lease"]["holder"].clone();
    let mut p = p.back();
    p.io(0, "write -P 4 64k 64k").unwrap();
    assert_eq!(p.info()["lease"]["holder"], holder);
    p.until_running(1);
    p.checkpoint();
    p.daemon.signal("KILL");
    p.daemon.wait();
    s.take_over();
    s.io(0, "read -P 2 0 64k").unwrap();
    s.io(0, "read -P 4 64k 64k").unwrap();
}

/// X9 with an arbiter: the group changes sides, and its lease with it, without waiting for an end.
#[test]
fn a_lease_changes_sides_with_its_group() {
    let etcd = Etcd::start();
    let (mut p, mut s) = etcd.pair();
    p.io(0, "write -P 1 0 64k").unwrap();
    p.switch_over().unwrap();
    s.until_running(1);
    s.io(0, "write -P 2 0 64k").unwrap();
    s.checkpoint();
    p.io(0, "read -P 2 0 64k").unwrap();
    assert!(s.info()["lease"]["remaining-ms"].as_u64().unwrap() > 0);
    assert_eq!(p.info()["lease"]["remaining-ms"], 0);
    // a group that replicates no more is forgotten: other images may take its name
    s.c.command("replication-stop", json!({"group": "g"})).unwrap();
    s.io(0, "write -P 5 0 64k").unwrap();
    let mut other = etcd.host();
    other.primary(&[], &json!({}));
    other.io(0, "write -P 7 0 64k").unwrap();
    let mut late = etcd.host();
    let why = late.c.command("replication-start", json!({"group": "g", "role": "primary"})).unwrap_err();
    // its generation is a random one: above that of the other or not
    let refused = ["owns the group by its lease", "was promoted elsewhere"];
    assert!(refused.iter().any(|r| why.contains(r)), "{why}");
    late.io(0, "write -P 8 0 64k").unwrap();
}

/// A change of sides that the arbiter cannot grant: this side is the primary still, and serves when the arbiter says so.
#[test]
fn who_is_not_granted_the_group_does_not_take_over() {
    let etcd = Etcd::start();
    let (mut p, mut s) = etcd.pair();
    p.io(0, "write -P 1 0 64k").unwrap();
    p.checkpoint();
    etcd.signal("STOP");
    let why = p.switch_over().unwrap_err();
    assert!(why.contains("did not take over"), "{why}");
    let waits = p.begins(0, "write -P 2 0 64k");
    etcd.signal("CONT");
    let answer = ended(waits).unwrap();
    assert!(answer.contains("wrote"), "{answer}");
    assert_eq!(s.info()["role"], "secondary");
    p.until_running(1);
    p.checkpoint();
    s.io(0, "read -P 2 0 64k").unwrap();
}

/// Users that wait for an arbiter that is gone do not keep a daemon from its end.
#[test]
fn who_waits_for_the_arbiter_keeps_nobody_from_ending() {
    let etcd = Etcd::start();
    let (mut p, _s) = etcd.pair();
    etcd.signal("STOP");
    until(|| p.state() == "suspended");
    let waits = p.begins_patiently("write -P 3 0 64k");
    p.c.command("quit", json!({})).unwrap();
    p.daemon.wait();
    // the next daemon answers it, when the arbiter is there
    let mut p = p.started_again();
    etcd.signal("CONT");
    assert!(ended(waits).unwrap().contains("wrote"));
    p.io(0, "read -P 3 0 64k").unwrap();
    p.c.command("quit", json!({})).unwrap();
    p.daemon.wait();
}

/// Nor do those who wait for a secondary.
#[test]
fn who_waits_for_a_secondary_keeps_nobody_from_ending() {
    let (mut p, mut s) = (Host::recorded("redo"), Host::new("redo", 1));
    s.secondary();
    p.primary(&[&s], &json!({"on-link-loss": "suspend", "timeout-ms": 500}));
    p.until_running(1);
    s.daemon.signal("STOP");
    until(|| p.state() == "suspended");
    let waits = p.begins_patiently("write -P 3 0 64k");
    p.c.command("quit", json!({})).unwrap();
    p.daemon.wait();
    s.daemon.signal("CONT");
    let mut p = p.started_again();
    assert!(ended(waits).unwrap().contains("wrote"));
    p.until_running(1);
    p.checkpoint();
    s.io(0, "read -P 3 0 64k").unwrap();
}

/// An owner that is to follow: what waits for the arbiter is not answered as if it had spoken. Another may have been promoted.
#[test]
fn who_gives_the_group_up_answers_nothing_that_waited() {
    let etcd = Etcd::start();
    let (mut p, s) = etcd.pair();
    p.io(0, "write -P 1 0 64k").unwrap();
    p.checkpoint();
    etcd.signal("STOP");
    until(|| p.state() == "suspended");
    let waits = p.begins(0, "write -P 6 0 64k");
    std::thread::sleep(std::time::Duration::from_millis(500));
    let listen = unix(&p.dir.path("back.sock"));
    let follow = json!({"group": "g", "role": "secondary", "demote": true, "listen": listen});
    p.c.command("replication-start", follow).unwrap();
    assert!(ended(waits).is_err());
    assert_eq!(p.info()["role"], "secondary");
    s.io(0, "read -P 1 0 64k").unwrap();
}

/// Over TLS, to an etcd whose certificate is the right one.
#[test]
fn an_arbiter_proves_who_it_is() {
    let dir = Dir::new();
    let pki = crate::tls::pki(&dir);
    let ours = |name: &str| format!("{pki}/ours/{name}.pem");
    let url = format!("https://localhost:{}", 21_000 + std::process::id() % 9000);
    let (cert, key) = (ours("server-cert"), ours("server-key"));
    let etcd = Etcd::at(
        Dir::new(),
        &url.replace("localhost", "127.0.0.1"),
        &["--cert-file", &cert, "--key-file", &key],
    );
    for (authority, good) in [("ours", true), ("other", false)] {
        let object = format!("tls-creds-x509,id=t,dir={pki}/{authority},endpoint=client");
        let key = format!("/tests/{authority}");
        let fencing =
            json!({"fencing": {"type": "etcd", "endpoints": [url], "key": key, "tls-creds": "t", "ttl": 3}});
        let mut h = Host::begin_with(with_disks(1), "redo", 1, 0, &["--object", &object], &fencing);
        h.primary(&[], &json!({}));
        let lease = h.info()["lease"].clone();
        if good {
            h.io(0, "write -P 1 0 64k").unwrap();
            assert!(lease["remaining-ms"].as_u64().unwrap() > 0, "{lease}");
        } else {
            assert_eq!(h.state(), "suspended");
            assert!(lease["last-error"].as_str().unwrap().contains("certificate"), "{lease}");
        }
    }
    drop(etcd);
}

/// An etcd that knows users: one with the right password may use the keys that are his, also when etcd has forgotten him meanwhile.
#[test]
fn an_arbiter_wants_to_know_who_asks() {
    const PASSWORD: &str = "sec\"ret";
    let url = format!("http://{}:2379", own_address());
    let more = ["--auth-token-ttl", "60", "--bcrypt-cost", "4"];
    let dir = Dir::new();
    let mut server = Server::start(&dir.0, &url, &more);
    server.asks_who("host", PASSWORD);
    let secret = |id: &str, data: &str| json!({"qom-type": "secret", "id": id, "data": data}).to_string();
    let objects = [secret("pw", PASSWORD), secret("other", "x")];
    let objects = ["--state-dir", "state", "--object", &objects[0], "--object", &objects[1]];
    let host = |secret: &str, key: &str| {
        let fencing = json!({"fencing": {"type": "etcd", "endpoints": [url], "key": key, "username": "host",
            "password-secret": secret, "ttl": 3}});
        Host::begin_with(with_disks(1), "redo", 1, 0, &objects, &fencing)
    };
    for (secret, key, why) in
        [("other", "/liveblk/a", "authentication failed"), ("pw", "/elsewhere/a", "permission denied")]
    {
        let mut h = host(secret, key);
        h.primary(&[], &json!({}));
        assert_eq!(h.state(), "suspended");
        let lease = h.info()["lease"].clone();
        assert!(lease["last-error"].as_str().unwrap().contains(why), "{lease}");
    }
    let (mut p, mut s) = (host("pw", "/liveblk/g"), host("pw", "/liveblk/g"));
    s.secondary();
    p.primary(&[&s], &json!({"timeout-ms": 500}));
    p.until_running(1);
    p.io(0, "write -P 1 0 64k").unwrap();
    // its tokens go with it
    server.process.kill().unwrap();
    server.process.wait().unwrap();
    until(|| p.state() == "suspended");
    drop(server);
    let _server = Server::start(&dir.0, &url, &more);
    until(|| p.state() == "running");
    p.io(0, "write -P 2 0 64k").unwrap();
    p.checkpoint();
    // a daemon that comes back knows the password as well
    let p = p.back();
    p.io(0, "read -P 2 0 64k").unwrap();
    drop(p);
    s.take_over();
    s.io(0, "read -P 2 0 64k").unwrap();
}

/// What is not as it has to be is named.
#[test]
fn an_arbiter_is_described_with_care() {
    let mut h = Host::new("redo", 1);
    for (fencing, why) in [
        (json!({"type": "etcd"}), "Parameter 'endpoints' is missing"),
        (json!({"type": "etcd", "endpoints": ["x"], "ttl": 1}), "Parameter 'ttl' expects 2 to 3600"),
        (json!({"type": "etcd", "endpoints": ["x"], "key": "a/"}), "Parameter 'key'"),
        (json!({"type": "etcd", "endpoints": ["https://x"]}), "https needs 'tls-creds'"),
        (
            json!({"type": "etcd", "endpoints": ["x"], "username": "u"}),
            "Parameter 'password-secret' is missing",
        ),
        (
            json!({"type": "etcd", "endpoints": ["x"], "password-secret": "u"}),
            "Parameter 'username' is missing",
        ),
        (
            json!({"type": "etcd", "endpoints": ["x"], "username": "u", "password-secret": "none"}),
            "No secret with id 'none'",
        ),
        (json!({"type": "manual", "ttl": 3}), "Parameter 'ttl' is for fencing of type 'etcd'"),
        (json!({"type": "zookeeper"}), "does not accept value 'zookeeper'"),
    ] {
        let mut arguments =
            json!({"id": "g2", "volumes": [{"node-name": "f0"}], "store": {"path": h.dir.path("s2")}});
        arguments["fencing"] = fencing;
        let said = h.c.command("replication-group-add", arguments).unwrap_err();
        assert!(said.contains(why), "{said}");
    }
}
