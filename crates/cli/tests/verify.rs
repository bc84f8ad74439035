//! `liveblk verify`: of images in any format and of exports, by word and by exit status.

#![allow(clippy::unwrap_used)] // a test helper that fails fails the test

mod common;

use common::Dir;
use std::process::{Child, Command};

/// Whether it ended well, what it printed, what it complained of.
fn liveblk(dir: &Dir, line: &str) -> (bool, String, String) {
    let out = dir.liveblk(line);
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    (out.status.success(), text(&out.stdout), text(&out.stderr))
}

/// A qemu-nbd at `nbd.sock`, which takes clients.
fn served(dir: &Dir, arguments: &[&str]) -> Child {
    let socket = dir.0.join("nbd.sock");
    let mut command = Command::new("qemu-nbd");
    let mut server = command
        .args(["-t", "-e", "8", "-k"])
        .arg(&socket)
        .args(arguments)
        .current_dir(&dir.0)
        .spawn()
        .unwrap();
    while std::os::unix::net::UnixStream::connect(&socket).is_err() {
        assert_eq!(server.try_wait().unwrap(), None, "qemu-nbd ended");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    server
}

#[test]
fn images_and_exports() {
    let dir = Dir::new("verify");
    dir.tool("qemu-img", "create|-q|-f|qcow2|a.qcow2|64M");
    dir.tool("qemu-io", "-f|qcow2|-c|write -P 9 0 5M|-c|write -P 7 63M 1000k|a.qcow2");
    dir.tool("qemu-img", "convert|-f|qcow2|-O|raw|a.qcow2|b.raw");
    dir.tool("qemu-img", "convert|-c|-f|qcow2|-O|qcow2|a.qcow2|c.qcow2");
    let (good, said, why) = liveblk(&dir, "verify|a.qcow2|b.raw");
    assert!(good, "{why}");
    let digest = said.lines().last().unwrap().to_owned();
    assert!(digest.starts_with("equal, digest lbd1:"), "{said}");
    let (good, said, _) = liveblk(&dir, "verify|c.qcow2|b.raw");
    assert!(good && said.ends_with(&format!("{digest}\n")), "{said}");
    // another server's export
    let mut server = served(&dir, &["-r", "-f", "qcow2", "a.qcow2"]);
    let (good, said, why) = liveblk(&dir, "verify|c.qcow2|nbd+unix:///?socket=nbd.sock");
    assert!(good && said.ends_with(&format!("{digest}\n")), "{said}{why}");
    let _ = server.kill();
    let _ = server.wait();

    dir.tool("qemu-io", "-f|raw|-c|write -P 1 3M 1|-c|write -P 1 40M 1|b.raw");
    let (good, said, why) = liveblk(&dir, "verify|c.qcow2|b.raw");
    assert!(!good && why.contains("c.qcow2 and b.raw differ: 2 places, 2 bytes"), "{why}");
    for place in ["differ at offset 3145728, 1 bytes", "differ at offset 41943040, 1 bytes"] {
        assert!(said.contains(place), "{said}");
    }
    let (good, said, why) = liveblk(&dir, "verify|c.qcow2|b.raw|--repair");
    assert!(
        good && said.contains(&digest.replace("equal,", "equal (2 regions of 64 KiB repaired),")),
        "{said}{why}"
    );
    let (good, said, _) = liveblk(&dir, "verify|c.qcow2|b.raw|--sample|10|--seed|7");
    assert!(good && said.contains("equal in the sample") && said.contains("share 10 %, seed 7"), "{said}");
    let (good, _, why) = liveblk(&dir, "verify|c.qcow2|missing");
    assert!(!good && why.contains("missing"), "{why}");
}

#[test]
fn a_mirror_is_proven() {
    let dir = Dir::new("proven");
    dir.tool("qemu-img", "create|-q|-f|qcow2|a.qcow2|64M");
    dir.tool("qemu-io", "-f|qcow2|-c|write -P 9 0 5M|a.qcow2");
    let (good, said, why) = liveblk(&dir, "mirror|a.qcow2|b.qcow2");
    assert!(good && said.contains("b.qcow2 is a copy of a.qcow2\nproven equal, digest lbd1:"), "{said}{why}");
    let digest = said.lines().last().unwrap();
    let (good, said, why) = liveblk(&dir, "convert|a.qcow2|c.qcow2|-c");
    assert!(good && said.ends_with(&format!("c.qcow2 is a.qcow2 as qcow2\n{digest}\n")), "{said}{why}");
    let (good, said, why) = liveblk(&dir, "convert|a.qcow2|d.raw|-O|raw|--verify|off");
    assert!(good && !said.contains("digest"), "{said}{why}");
}

/// The recipe in docs/digest.md, run as it stands there.
fn by_the_recipe(dir: &Dir, disk: &str) -> String {
    let doc = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/digest.md");
    let doc = std::fs::read_to_string(doc).unwrap();
    let code: Vec<&str> = doc.lines().filter_map(|l| l.strip_prefix("    ")).collect();
    assert!(code[0].starts_with("import blake3"), "{code:?}");
    std::fs::write(dir.0.join("digest.py"), code.join("\n")).unwrap();
    let python = std::env::var_os("XDG_CACHE_HOME").map(std::path::PathBuf::from);
    let cache =
        python.unwrap_or_else(|| std::path::PathBuf::from(std::env::var_os("HOME").unwrap()).join(".cache"));
    let python = cache.join("liveblk/python/bin/python").display().to_string();
    dir.tool(&python, &format!("digest.py|{disk}")).trim().to_owned()
}

#[test]
fn a_digest_is_what_the_recipe_of_the_document_gives() {
    let dir = Dir::new("digest");
    dir.tool("qemu-img", "create|-q|-f|qcow2|a.qcow2|70M");
    dir.tool("qemu-io", "-f|qcow2|-c|write -P 9 0 5M|-c|write -P 7 69M 777k|a.qcow2");
    dir.tool("qemu-img", "convert|-f|qcow2|-O|raw|a.qcow2|b.raw");
    // nothing of it is a whole leaf
    std::fs::write(dir.0.join("short.raw"), [5u8; 1000]).unwrap();
    let digest = |line: &str| {
        let (good, said, why) = liveblk(&dir, line);
        assert!(good, "{line}: {why}");
        said.lines().last().unwrap().to_owned()
    };
    let expected = by_the_recipe(&dir, "b.raw");
    assert!(expected.starts_with("lbd1:"), "{expected}");
    assert_eq!(digest("digest|b.raw"), format!("{expected}  b.raw"));
    assert_eq!(digest("digest|a.qcow2"), format!("{expected}  a.qcow2"));
    assert_eq!(digest("verify|a.qcow2|b.raw"), format!("equal, digest {expected}"));
    // the image as a file, not what is in it
    assert_eq!(digest("digest|-f|raw|a.qcow2"), format!("{}  a.qcow2", by_the_recipe(&dir, "a.qcow2")));
    assert_eq!(digest("digest|short.raw"), format!("{}  short.raw", by_the_recipe(&dir, "short.raw")));
    let (good, said, why) = liveblk(&dir, "digest|missing");
    assert!(!good && said.is_empty() && why.contains("missing"), "{said}{why}");
}

#[test]
fn a_lost_link_is_waited_for_if_asked() {
    let dir = Dir::new("link");
    dir.tool("qemu-img", "create|-q|-f|raw|a.raw|64M");
    dir.tool("qemu-io", "-f|raw|-c|write -P 9 0 5M|a.raw");
    dir.tool("qemu-img", "create|-q|-f|raw|b.raw|64M");
    let mut server = served(&dir, &["-f", "raw", "b.raw"]);
    let to = "mirror|a.raw|nbd+unix:///?socket=nbd.sock|--verify|off|--on-link-loss";
    let (good, _, why) = liveblk(&dir, &format!("{to}|report|--link-wait|7"));
    assert!(good, "{why}");
    dir.tool("qemu-img", "compare|-f|raw|-F|raw|-U|a.raw|b.raw");
    // nobody could tell it to go on
    let (good, _, why) = liveblk(&dir, &format!("{to}|stop"));
    assert!(!good && why.contains("needs --socket"), "{why}");
    let (good, _, why) = liveblk(&dir, "mirror|a.raw|c.raw|--link-wait|7");
    assert!(!good && why.contains("--on-link-loss"), "{why}");
    let _ = server.kill();
    let _ = server.wait();
}
