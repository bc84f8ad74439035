//! The command line: what QSD 10.0.2 printed for the same arguments (recorded by running it), less the program's name.

use crate::common::{Dir, run};

fn fails(arguments: &[&str], want: &str) {
    let dir = Dir::new();
    let out = run(&dir, arguments);
    let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(stderr, format!("liveblkd: {want}\n"), "{arguments:?}");
    assert_eq!(out.status.code(), Some(1));
    assert!(!dir.0.join("q.sock").exists(), "a socket is left behind");
}

const CHARDEV: &str = "socket,id=c,path=q.sock,server=on,wait=off";

#[test]
fn syntax() {
    fails(&["--bogus"], "unrecognized option '--bogus'");
    fails(&["positional"], "positional: Unexpected argument");
    fails(&["--", "positional"], "positional: Unexpected argument");
    fails(&["--blockdev"], "option '--blockdev' requires an argument");
    fails(&["-x"], "invalid option -- 'x'");
    // its turn comes after what is before it, and after what no option is at all
    fails(
        &["--blockdev", "nodriver", "positional"],
        "--blockdev nodriver: Parameter 'driver' does not accept value 'nodriver'",
    );
    fails(&["positional", "-x"], "invalid option -- 'x'");
    fails(&["--version=3"], "option '--version' doesn't allow an argument");
}

#[test]
fn values() {
    for (option, value, want) in [
        ("--blockdev", "file", "Parameter 'filename' is missing"),
        ("--blockdev", "nodriver", "Parameter 'driver' does not accept value 'nodriver'"),
        ("--blockdev", "file,node-name=f,filename", "Expected '=' after parameter 'filename'"),
        (
            "--blockdev",
            "file,node-name=f,filename=r,read-only=1",
            "Parameter 'read-only' expects 'on' or 'off'",
        ),
        ("--blockdev", "raw,node-name=f,file.driver=file", "Parameter 'file.filename' is missing"),
        ("--blockdev", "help", "Help is not available for this option"),
        ("--blockdev", "{\"driver\":\"file\"", "JSON parse error, premature EOI"),
        ("--blockdev", "{\"driver\":\"file\"} x", "Expecting at most one JSON value"),
        ("--blockdev", "[]", "Parameter 'driver' does not accept value '[]'"),
        ("--export", "foo,id=e,node-name=x", "Parameter 'type' does not accept value 'foo'"),
        ("--export", "nbd,id=1e,node-name=x", "Invalid block export id"),
        ("--export", "nbd,id=e,node-name=zz", "Cannot find device='' nor node-name='zz'"),
        ("--nbd-server", "foo", "Expected '=' after parameter 'foo'"),
        (
            "--nbd-server",
            "addr.type=unix,addr.path=/nonexistent/x",
            "Failed to bind socket to /nonexistent/x: No such file or directory",
        ),
        (
            "--nbd-server",
            "addr.type=inet,addr.host=127.0.0.1,addr.port=zz",
            "address resolution failed for 127.0.0.1:zz: Servname not supported for ai_socktype",
        ),
        ("--chardev", "foo,id=c", "'foo' is not a valid char driver name"),
        (
            "--chardev",
            "socket,id=c,path=nonexist.sock",
            "Failed to connect to 'nonexist.sock': No such file or directory",
        ),
        ("--chardev", "null,bogus=1,id=1c", "Parameter 'id' expects an identifier"),
        ("--object", "iothread,0=on,help", "Invalid parameter '0'"),
        ("--trace", "bogus=1", "Invalid parameter 'bogus'"),
        ("--export", "{\"id\":\"e", "JSON parse error, stray '\"e'"),
        ("--monitor", "zz", "chardev \"zz\" not found"),
        ("--monitor", "zz,mode=readline", "chardev \"zz\" not found"),
        ("--object", "iothread", "Parameter 'id' is missing"),
        ("--object", "foo,id=x", "Parameter 'qom-type' does not accept value 'foo'"),
        ("--object", "iothread,id=i0,bogus=3", "Parameter 'bogus' is unexpected"),
        ("--object", "iothread,id=i0,poll-max-ns=x", "Parameter 'poll-max-ns' expects integer"),
        (
            "--object",
            "iothread,id=i0,poll-max-ns=-4",
            "poll-max-ns value must be in range [0, 9223372036854775807]",
        ),
    ] {
        fails(&[option, value], &format!("{option} {value}: {want}"));
    }
    fails(
        &["--chardev", CHARDEV, "--monitor", "c,mode=readline"],
        "--monitor c,mode=readline: Only QMP is supported",
    );
    fails(
        &["--chardev", CHARDEV, "--monitor", "chardev=c", "--monitor", "chardev=c"],
        "--monitor chardev=c: chardev 'c' is already in use",
    );
    fails(
        &["--object", "iothread,id=i0", "--object", "iothread,id=i0"],
        "--object iothread,id=i0: attempt to add duplicate property 'i0' to object (type 'container')",
    );
    fails(
        &["--daemonize", "--chardev", "stdio,id=c"],
        "--chardev stdio,id=c: cannot use stdio with -daemonize",
    );
    fails(
        &["--pidfile", "/nonexistent/pid"],
        "cannot create PID file: Could not create '/nonexistent/pid': No such file or directory",
    );
    fails(
        &["--nbd-server", "addr.type=unix,addr.path=n", "--nbd-server", "addr.type=unix,addr.path=n"],
        "--nbd-server addr.type=unix,addr.path=n: NBD server already running",
    );
}

#[test]
fn texts() {
    let dir = Dir::new();
    for (arguments, want) in [
        (vec!["--version"], "liveblkd version 10.0.2 (liveblk "),
        (vec!["--help"], "Usage: liveblkd [options]\n"),
        (vec!["-V", "--bogus-is-not-reached"], "liveblkd version 10.0.2 (liveblk "),
        (vec!["-x", "-V"], ""),
        (vec!["--object", "nope,help"], "List of user creatable objects:\n  authz-list\n"),
        (vec!["--object", "help"], "List of user creatable objects:\n  authz-list\n"),
        (vec!["--object", "iothread,help"], "iothread options:\n  aio-max-batch=<int>\n"),
        (vec!["--chardev", "help"], "Available chardev backend types: \n"),
    ] {
        let out = run(&dir, &arguments);
        let stdout = String::from_utf8_lossy(&out.stdout);
        assert!(stdout.starts_with(want), "{arguments:?}: {stdout}");
        assert_eq!(out.status.success(), !want.is_empty());
    }
}
