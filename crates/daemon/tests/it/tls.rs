//! NBD over TLS, both ways, with the peers that people use; objects that go with it.

use crate::common::{Daemon, Dir};
use crate::wire::python;
use serde_json::{Value, json};
use std::process::Command;

/// A directory with certificates of two authorities (`crates/tls/tests/pki.sh` says what is in it).
pub(crate) fn pki(dir: &Dir) -> String {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../tls/tests/pki.sh");
    let out = Command::new("sh").arg(script).arg(dir.path("pki")).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    dir.path("pki")
}

fn creds(c: &mut crate::common::Client, id: &str, dir: &str, endpoint: &str, more: &Value) {
    let mut arguments = json!({"qom-type": "tls-creds-x509", "id": id, "dir": dir, "endpoint": endpoint});
    for (k, v) in more.as_object().unwrap() {
        arguments[k] = v.clone();
    }
    c.command("object-add", arguments).unwrap();
}

/// What libnbd says when it reads the first 4 KiB of the export: their first byte, or the error.
fn libnbd(socket: &str, setup: &str) -> Result<u8, String> {
    let script = format!(
        "import sys, nbd\nh = nbd.NBD()\n{setup}\nh.set_export_name('d')\nh.connect_unix(sys.argv[1])\n\
         print(h.pread(4096, 0)[0], 'tls' if h.get_tls_negotiated() else 'clear')\nh.shutdown()\n"
    );
    let out = python().args(["-c", &script, socket]).output().unwrap();
    if !out.status.success() {
        return Err(String::from_utf8_lossy(&out.stderr).into_owned());
    }
    let said = String::from_utf8(out.stdout).unwrap();
    let (byte, how) = said.trim().split_once(' ').unwrap();
    assert_eq!(how, "tls");
    Ok(byte.parse().unwrap())
}

fn with_certificates(dir: &str) -> String {
    format!(
        "h.set_tls(nbd.TLS_REQUIRE)\nh.set_tls_certificates('{dir}')\nh.set_tls_verify_peer(True)\n\
         h.set_uri_allow_local_file(True)"
    )
}

struct Serving {
    daemon: Daemon,
    client: crate::common::Client,
    pki: String,
    socket: String,
}

/// A daemon with a disk full of 0x5a, exported under TLS.
fn serve(dir: &Dir, server: &Value) -> Serving {
    let pki = pki(dir);
    std::fs::write(dir.path("disk"), vec![0x5a; 8 << 20]).unwrap();
    let daemon =
        Daemon::start(dir, &["--blockdev", &format!("file,node-name=n,filename={}", dir.path("disk"))]);
    let mut client = daemon.client();
    creds(&mut client, "srv", &format!("{pki}/ours"), "server", &json!({}));
    let socket = dir.path("nbd.sock");
    let mut start = json!({"addr": {"type": "unix", "data": {"path": socket}}, "tls-creds": "srv"});
    for (k, v) in server.as_object().unwrap() {
        start[k] = v.clone();
    }
    client.command("nbd-server-start", start).unwrap();
    let export = json!({"type": "nbd", "id": "e", "node-name": "n", "name": "d", "writable": true});
    client.command("block-export-add", export).unwrap();
    Serving { daemon, client, pki, socket }
}

#[test]
fn libnbd_gets_in_with_the_right_certificate_only() {
    let dir = Dir::new();
    let s = serve(&dir, &json!({}));
    assert_eq!(libnbd(&s.socket, &with_certificates(&format!("{}/ours", s.pki))).unwrap(), 0x5a);
    assert!(libnbd(&s.socket, &with_certificates(&format!("{}/other", s.pki))).is_err());
    let e = libnbd(&s.socket, "h.set_tls(nbd.TLS_DISABLE)").unwrap_err();
    assert!(e.contains("TLS") || e.contains("ERR_TLS_REQD"), "{e}");
    drop(s.daemon);
}

#[test]
fn who_may_enter_is_asked_for_each_client() {
    let dir = Dir::new();
    let mut s = serve(&dir, &json!({"tls-authz": "list"}));
    let ours = with_certificates(&format!("{}/ours", s.pki));
    let enters = |socket: &str| libnbd(socket, &ours).is_ok();
    // There is no such list: nobody.
    assert!(!enters(&s.socket));
    let rule = json!({"match": "CN=client.*,O=Disks,C=GB", "policy": "allow", "format": "glob"});
    let list = json!({"qom-type": "authz-list", "id": "list", "policy": "deny", "rules": [rule]});
    s.client.command("object-add", list).unwrap();
    assert!(enters(&s.socket));
    let nobody = json!({"path": "/objects/list", "property": "rules", "value": []});
    s.client.command("qom-set", nobody).unwrap();
    assert!(!enters(&s.socket));
    s.client.command("object-del", json!({"id": "list"})).unwrap();
    let one = json!({"qom-type": "authz-simple", "id": "list", "identity": "CN=client.example,O=Disks,C=GB"});
    s.client.command("object-add", one).unwrap();
    assert!(enters(&s.socket));
    drop(s.daemon);
}

#[test]
fn qemu_reads_and_writes_ours() {
    let dir = Dir::new();
    let s = serve(&dir, &json!({}));
    let image = format!(
        "driver=nbd,server.type=unix,server.path={},export=d,tls-creds=t,tls-hostname=localhost",
        s.socket
    );
    let io = |pki: &str| {
        let object = format!("tls-creds-x509,id=t,dir={pki},endpoint=client");
        let out = Command::new("qemu-io")
            .args(["--object", &object, "--image-opts", &image])
            .args(["-c", "read -P 0x5a 0 4M", "-c", "write -P 0x11 1M 3M", "-c", "read -P 0x11 1M 3M"])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
        (out.status.success() && !said.contains("verification failed"), said)
    };
    let (ok, said) = io(&format!("{}/ours", s.pki));
    assert!(ok && said.contains("wrote 3145728"), "{said}");
    let (ok, said) = io(&format!("{}/other", s.pki));
    assert!(!ok, "{said}");
    drop(s.daemon);
    let disk = std::fs::read(dir.path("disk")).unwrap();
    assert!(disk[1 << 20..4 << 20].iter().all(|b| *b == 0x11) && disk[..1 << 20].iter().all(|b| *b == 0x5a));
}

#[test]
fn we_read_and_write_qemus_and_mirror_there() {
    let dir = Dir::new();
    let pki = pki(&dir);
    let (socket, target) = (dir.path("qemu.sock"), dir.path("target"));
    std::fs::write(&target, vec![0; 8 << 20]).unwrap();
    std::fs::write(dir.path("disk"), vec![0x77; 8 << 20]).unwrap();
    let object = format!("tls-creds-x509,id=t,dir={pki}/ours,endpoint=server");
    let mut qemu = Command::new("qemu-nbd")
        .args([
            "-k",
            &socket,
            "-x",
            "d",
            "-f",
            "raw",
            "-e",
            "4",
            "-t",
            "--tls-creds",
            "t",
            "--object",
            &object,
            &target,
        ])
        .spawn()
        .unwrap();
    crate::common::until(|| std::os::unix::net::UnixStream::connect(&socket).is_ok());
    let daemon =
        Daemon::start(&dir, &["--blockdev", &format!("file,node-name=n,filename={}", dir.path("disk"))]);
    let mut c = daemon.client();
    creds(&mut c, "cli", &format!("{pki}/ours"), "client", &json!({}));
    creds(&mut c, "stranger", &format!("{pki}/other"), "client", &json!({}));
    creds(&mut c, "srv", &format!("{pki}/ours"), "server", &json!({}));
    let mut add = |more: Value| {
        let server = json!({"type": "unix", "path": socket});
        let mut options = json!({"driver": "nbd", "node-name": "t", "server": server, "export": "d"});
        for (k, v) in more.as_object().unwrap() {
            options[k] = v.clone();
        }
        c.command("blockdev-add", options)
    };
    for (more, why) in [
        (json!({}), "TLS"),
        (json!({"tls-creds": "nope"}), "No TLS credentials with id 'nope'"),
        (json!({"tls-creds": "srv"}), "Expected TLS credentials for a client endpoint"),
        (json!({"tls-creds": "stranger"}), "not signed by an authority"),
        (json!({"tls-creds": "cli", "tls-hostname": "elsewhere"}), "elsewhere"),
        (json!({"tls-creds": "cli", "tls-hostname": "no name"}), "is no host name"),
    ] {
        let e = add(more.clone()).unwrap_err();
        assert!(e.contains(why), "{more}: {e}");
    }
    add(json!({"tls-creds": "cli", "tls-hostname": "localhost"})).unwrap();
    let mirror = json!({"job-id": "j", "device": "n", "target": "t", "sync": "full"});
    c.command("blockdev-mirror", mirror).unwrap();
    c.event("BLOCK_JOB_READY");
    c.command("block-job-cancel", json!({"device": "j"})).unwrap();
    c.event("BLOCK_JOB_COMPLETED");
    c.command("quit", json!({})).unwrap();
    drop(daemon);
    qemu.kill().unwrap();
    qemu.wait().unwrap();
    assert!(std::fs::read(&target).unwrap().iter().all(|b| *b == 0x77));
}

/// What there is at paths of the tree of objects, next to what the reference says in the same place
/// (tests/compat/twin.py compares more).
#[test]
fn objects_show_and_change_their_properties() {
    let dir = Dir::new();
    let daemon = Daemon::start(&dir, &["--object", "secret,id=s,data=aGk=,format=base64"]);
    let mut c = daemon.client();
    let get = |c: &mut crate::common::Client, path: &str, property: &str| {
        c.command("qom-get", json!({"path": path, "property": property}))
    };
    assert_eq!(get(&mut c, "/objects/s", "format").unwrap(), "base64");
    assert_eq!(get(&mut c, "/objects/s", "iv").unwrap(), "");
    assert_eq!(get(&mut c, "/objects/s", "type").unwrap(), "secret");
    assert_eq!(get(&mut c, "/objects/s", "nope").unwrap_err(), "Property 'secret.nope' not found");
    assert_eq!(get(&mut c, "/objects/t", "nope").unwrap_err(), "Device '/objects/t' not found");
    let set = |c: &mut crate::common::Client, value: Value| {
        c.command("qom-set", json!({"path": "/objects/s", "property": "data", "value": value}))
    };
    assert_eq!(set(&mut c, json!("!")).unwrap_err(), "Base64 data contains invalid characters");
    assert_eq!(get(&mut c, "/objects/s", "data").unwrap(), "aGk=", "a refused change changed something");
    set(&mut c, json!("aGkh")).unwrap();
    assert_eq!(get(&mut c, "/objects/s", "data").unwrap(), "aGkh");
    let types = c.command("qom-list-types", json!({"implements": "user-creatable"})).unwrap();
    assert!(types.as_array().unwrap().contains(&json!({"name": "secret", "parent": "secret_common"})));
    let e = c.command("object-add", json!({"qom-type": "tls-creds-psk", "id": "p"})).unwrap_err();
    assert!(e.contains("tls-creds-psk"), "{e}");
}

#[test]
fn a_monitor_over_tls() {
    let dir = Dir::new();
    let pki = pki(&dir);
    let (tcp, creds) =
        (dir.path("tls.sock"), format!("tls-creds-x509,id=srv,dir={pki}/ours,endpoint=server"));
    let chardev = format!("socket,id=c1,path={tcp},server=on,wait=off,tls-creds=srv,tls-authz=who");
    let who = "authz-simple,id=who,identity=CN=client.example,,O=Disks,,C=GB";
    let daemon =
        Daemon::start(&dir, &["--object", &creds, "--object", who, "--chardev", &chardev, "--monitor", "c1"]);
    let ask = |pki: &str| {
        let script = "
import socket, ssl, sys
c = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
c.load_verify_locations(sys.argv[2] + '/ca-cert.pem')
c.load_cert_chain(sys.argv[2] + '/client-cert.pem', sys.argv[2] + '/client-key.pem')
s = socket.socket(socket.AF_UNIX); s.settimeout(20); s.connect(sys.argv[1])
f = c.wrap_socket(s, server_hostname='localhost').makefile('rw')
print(f.readline()); f.write('{\"execute\": \"qmp_capabilities\"}'); f.flush(); print(f.readline())
";
        let out = python().args(["-c", script, &tcp, pki]).output().unwrap();
        (out.status.success(), String::from_utf8_lossy(&out.stdout).into_owned())
    };
    assert!(!ask(&format!("{pki}/other")).0);
    let (ok, said) = ask(&format!("{pki}/ours"));
    assert!(ok && said.contains("QMP") && said.contains("return"), "{said}");
    // In the clear: no greeting.
    use std::io::{Read, Write};
    let mut clear = std::os::unix::net::UnixStream::connect(&tcp).unwrap();
    clear.write_all(b"{\"execute\": \"qmp_capabilities\"}\n").unwrap();
    let mut said = Vec::new();
    let _ = clear.read_to_end(&mut said);
    assert!(!String::from_utf8_lossy(&said).contains("QMP"), "{said:?}");
    drop(daemon);
}

#[test]
fn chardevs_come_and_go_at_run_time() {
    let dir = Dir::new();
    let daemon = Daemon::start(&dir, &[]);
    let mut c = daemon.client();
    let all = c.command("query-chardev", json!({})).unwrap();
    let busy = all[0]["label"].clone();
    assert!(c.command("chardev-remove", json!({"id": busy})).unwrap_err().ends_with("is busy"));
    let socket = |path: &str| json!({"type": "socket", "data": {"addr": {"type": "unix", "data": {"path": path}}, "wait": false}});
    let (a, b) = (dir.path("a.sock"), dir.path("b.sock"));
    c.command("chardev-add", json!({"id": "s", "backend": socket(&a)})).unwrap();
    assert!(std::path::Path::new(&a).exists());
    c.command("chardev-change", json!({"id": "s", "backend": socket(&b)})).unwrap();
    assert!(!std::path::Path::new(&a).exists() && std::path::Path::new(&b).exists());
    // Its own place is taken, by itself: it stays what it was.
    assert!(c.command("chardev-change", json!({"id": "s", "backend": socket(&b)})).is_err());
    assert!(std::path::Path::new(&b).exists());
    c.command("chardev-remove", json!({"id": "s"})).unwrap();
    assert!(!std::path::Path::new(&b).exists());
}
