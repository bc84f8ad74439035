//! Image locks against QEMU's own tools, both ways, and what the file driver does with holes and lengths.

use block::{Data, Kind, Prealloc, ReqFlags, Span};
use drivers::file::{FileNode, FileOptions, create};
use env::Env;
use env::os::{OsConfig, start};
use graph::{Demand, Node, Perms};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;

struct Dir(PathBuf);
impl Dir {
    fn new(name: &str) -> Dir {
        let dir = Path::new("/dev/shm").join(format!("liveblk-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a temporary folder");
        Dir(dir)
    }
    fn file(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }
}
impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn run<F: Future<Output = ()> + 'static>(test: impl FnOnce(Env) -> F) {
    let executor = start(OsConfig::default());
    executor.run(test(executor.env()));
}

async fn open(env: &Env, filename: &str, read_only: bool) -> Rc<FileNode> {
    let options = FileOptions { filename: filename.to_owned(), read_only, ..FileOptions::default() };
    FileNode::open(env, &options).await.expect("it is there").0
}

fn qemu_io(args: &[&str]) -> (bool, String) {
    let out = Command::new("qemu-io").args(args).output().expect("qemu-io is installed (cargo xtask setup)");
    let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    (out.status.success(), text)
}

const CR: Perms = Perms::CONSISTENT_READ;
const WRITER: Demand = Demand { needs: CR.with(Perms::WRITE).with(Perms::RESIZE), shares: CR };
const READER: Demand = Demand { needs: CR, shares: CR.with(Perms::WRITE_UNCHANGED) };

#[test]
fn qemu_is_kept_out_while_we_write_and_let_in_after() {
    run(|env| async move {
        let dir = Dir::new("locks-ours");
        let name = dir.file("d.raw");
        create(&env, &name, 1 << 20, Prealloc::Off).await.expect("made");
        let node = open(&env, &name, false).await;
        node.acquire(WRITER).await.expect("nobody else");
        let (ok, text) = qemu_io(&["-f", "raw", "-c", "write 0 512", &name]);
        assert!(!ok && text.contains("Failed to get \"write\" lock"), "{text}");
        node.release(READER).await.expect("given back");
        node.acquire(READER).await.expect("still alone");
        let (ok, text) = qemu_io(&["-r", "-f", "raw", "-c", "read 0 512", &name]);
        assert!(ok, "readers share: {text}");
        let (ok, text) = qemu_io(&["-f", "raw", "-c", "write 0 512", &name]);
        assert!(!ok, "a reader that does not share writes keeps writers out: {text}");
        node.release(Demand::NOTHING).await.expect("given back");
        let (ok, text) = qemu_io(&["-f", "raw", "-c", "write 0 512", &name]);
        assert!(ok, "{text}");
    });
}

#[test]
fn we_are_kept_out_while_qemu_writes() {
    run(|env| async move {
        let dir = Dir::new("locks-theirs");
        let name = dir.file("d.raw");
        create(&env, &name, 1 << 20, Prealloc::Off).await.expect("made");
        let mut other = Command::new("qemu-io")
            .args(["-f", "raw", &name])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::null())
            .spawn()
            .expect("qemu-io is installed (cargo xtask setup)");
        let node = open(&env, &name, false).await;
        let mut refused = None;
        // qemu-io takes its locks a moment after it starts.
        for _ in 0..500 {
            match node.acquire(WRITER).await {
                Err(e) => {
                    refused = Some(e);
                    break;
                }
                Ok(()) => node.release(Demand::NOTHING).await.expect("given back"),
            }
            env.sleep(std::time::Duration::from_millis(10)).await;
        }
        let e = refused.expect("qemu-io holds the image");
        // qemu-io writes itself and does not mind others who do; we mind.
        assert_eq!(e.message(), "Failed to get shared \"write\" lock");
        assert!(e.hint().is_some_and(|h| h.contains(&name)), "{e:?}");
        drop(other.stdin.take());
        other.wait().expect("qemu-io ends with its input");
        node.acquire(WRITER).await.expect("qemu-io is gone, and the failed try left nothing locked");
    });
}

/// As after a kill: what holds the locks is gone in a moment.
#[test]
fn locks_that_are_given_back_in_a_moment_are_waited_for() {
    run(|env| async move {
        let dir = Dir::new("locks-moment");
        let name = dir.file("d.raw");
        create(&env, &name, 1 << 20, Prealloc::Off).await.expect("made");
        let (first, second) = (open(&env, &name, false).await, open(&env, &name, false).await);
        first.acquire(WRITER).await.expect("nobody else");
        let (later, begun) = (env.clone(), env.now());
        env.spawn("give back", async move {
            later.sleep(std::time::Duration::from_millis(100)).await;
            first.release(Demand::NOTHING).await.expect("given back");
        });
        second.acquire(WRITER).await.expect("it is free soon");
        assert!(env.now() - begun >= std::time::Duration::from_millis(100), "two write");
    });
}

#[test]
fn creating_over_a_disk_in_use_is_refused_and_leaves_it_alone() {
    run(|env| async move {
        let dir = Dir::new("locks-create");
        let name = dir.file("d.raw");
        create(&env, &name, 1 << 20, Prealloc::Off).await.expect("made");
        let node = open(&env, &name, false).await;
        node.acquire(WRITER).await.expect("nobody else");
        node.write(Span::new(0, 3), Data::copy_from(b"abc"), ReqFlags::NONE).await.expect("written");
        create(&env, &name, 512, Prealloc::Off).await.expect_err("in use");
        assert_eq!(node.read(Span::new(0, 3)).await.expect("read").to_vec(), b"abc");
        assert_eq!(std::fs::metadata(&name).expect("there").len(), 1 << 20);
    });
}

#[test]
fn the_locks_stay_when_the_mode_changes() {
    run(|env| async move {
        let dir = Dir::new("locks-mode");
        let name = dir.file("d.raw");
        create(&env, &name, 1 << 20, Prealloc::Off).await.expect("made");
        let node = open(&env, &name, true).await;
        node.acquire(READER).await.expect("nobody else");
        node.set_writable(true).await.expect("the file can be written");
        node.acquire(WRITER).await.expect("nobody else");
        node.write(Span::new(0, 1), Data::copy_from(b"x"), ReqFlags::NONE).await.expect("writable now");
        let (ok, _) = qemu_io(&["-f", "raw", "-c", "write 0 512", &name]);
        assert!(!ok, "still locked");
    });
}

#[test]
fn zeroes_become_holes_where_asked_and_lengths_follow() {
    run(|env| async move {
        let dir = Dir::new("holes");
        let name = dir.file("d.raw");
        create(&env, &name, 1 << 20, Prealloc::Full).await.expect("made");
        let node = open(&env, &name, false).await;
        let data = Data::from(vec![7u8; 1 << 20]);
        node.write(Span::new(0, 1 << 20), data, ReqFlags::NONE).await.expect("written");
        let hole = Span::new(256 << 10, 512 << 10);
        node.zero(hole, ReqFlags { may_unmap: true, ..ReqFlags::NONE }).await.expect("punched");
        node.zero(Span::new(0, 4096), ReqFlags::NONE).await.expect("zeroed");
        assert!(node.read(Span::new(0, 4096)).await.expect("read").is_zero());
        let extents = node.extents(Span::new(0, 1 << 20)).await.expect("asked");
        assert!(extents.iter().any(|e| e.kind == Kind::Zero && e.span.contains(&hole)), "{extents:?}");
        node.resize(2 << 20, Prealloc::Falloc).await.expect("grown");
        assert_eq!((node.len(), std::fs::metadata(&name).expect("there").len()), (2 << 20, 2 << 20));
        assert!(node.read(Span::new(1 << 20, 1 << 20)).await.expect("read").is_zero());
        node.resize(4096, Prealloc::Off).await.expect("cut");
        assert_eq!(std::fs::metadata(&name).expect("there").len(), 4096);
    });
}

#[test]
fn direct_access_to_a_file_that_ends_inside_a_block_neither_fails_nor_lengthens_it() {
    run(|env| async move {
        // On a disk: tmpfs has no direct I/O with blocks.
        let dir = Dir(Path::new("/var/tmp").join(format!("liveblk-tail-{}", std::process::id())));
        std::fs::create_dir_all(&dir.0).expect("a temporary folder");
        let name = dir.file("d.raw");
        let len = 3 * 4096 + 700u64;
        std::fs::write(&name, vec![7u8; len as usize]).expect("written");
        let options = FileOptions { filename: name.clone(), direct: true, ..FileOptions::default() };
        let (node, _) = FileNode::open(&env, &options).await.expect("direct I/O works here");
        assert!(node.limits().request_alignment >= 512, "not direct: {:?}", node.limits());
        let graph = graph::Graph::new(&env);
        let cell = graph.add(graph::NodeOptions::default(), node.clone()).await.expect("added");
        let demand = Demand { needs: WRITER.needs, shares: Perms::ALL };
        let parent = graph::Parent::Backend("test".into());
        let edge = graph.attach(&cell, "root", graph::Role::Root, parent, demand).await.expect("nobody else");
        assert_eq!(edge.read(Span::new(len - 5, 5)).await.expect("read").to_vec(), [7; 5]);
        edge.write(len - 3, Data::copy_from(b"end"), ReqFlags::NONE).await.expect("written");
        edge.zero(Span::new(len - 600, 500), ReqFlags::NONE).await.expect("zeroed");
        edge.write(4000, Data::copy_from(&[9; 5000]), ReqFlags::NONE).await.expect("written");
        edge.write(len, Data::copy_from(b"x"), ReqFlags::NONE).await.expect_err("past the end");
        assert_eq!(
            (edge.len(), edge.read(Span::new(len - 4, 4)).await.expect("read").to_vec()),
            (len, b"\x07end".to_vec())
        );
        edge.flush().await.expect("flushed");
        let mut want = vec![7u8; len as usize];
        want[4000..9000].fill(9);
        want[len as usize - 600..len as usize - 100].fill(0);
        want[len as usize - 3..].copy_from_slice(b"end");
        assert!(std::fs::read(&name).expect("read") == want, "other bytes or another length on the host");
    });
}
