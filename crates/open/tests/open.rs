//! Opening trees: chains as qemu-img makes them, loops, formats, errors that leave nothing behind, and creation.

use block::{Data, ErrorKind, Prealloc, ReqFlags, Span};
use env::Env;
use env::os::{OsConfig, start};
use graph::{Demand, Graph, NodeCell, Parent, Perms, Role, walk};
use open::{Child, DriverSpec, NodeSpec, Opener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;

struct Dir(PathBuf);
impl Dir {
    fn new(name: &str) -> Dir {
        let dir = Path::new("/dev/shm").join(format!("liveblk-open-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a temporary folder");
        Dir(dir)
    }
    fn file(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }
    fn qemu_img(&self, args: &[&str]) {
        let out = Command::new("qemu-img").args(args).current_dir(&self.0).output();
        let out = out.expect("qemu-img is installed (cargo xtask setup)");
        assert!(out.status.success(), "qemu-img {args:?}: {}", String::from_utf8_lossy(&out.stderr));
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

const READ: Demand = Demand { needs: Perms::CONSISTENT_READ, shares: Perms::ALL };
const WRITE: Demand = Demand { needs: Perms::CONSISTENT_READ.with(Perms::WRITE), shares: Perms::ALL };

async fn root(graph: &Graph, cell: &Rc<NodeCell>, demand: Demand) -> Rc<graph::Edge> {
    graph.attach(cell, "root", Role::Root, Parent::Backend("test".into()), demand).await.expect("nobody else")
}

#[test]
fn a_chain_opens_as_the_headers_say_with_stated_and_probed_formats() {
    run(|env| async move {
        let dir = Dir::new("chain");
        std::fs::write(dir.file("base.raw"), vec![1u8; 1 << 20]).expect("written");
        dir.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "mid.qcow2"]);
        dir.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2", "2M"]);
        let graph = Graph::new(&env);
        let opener = Opener::new(&graph);
        let top =
            opener.open(&NodeSpec::file(&dir.file("top.qcow2")).qcow2().named("top")).await.expect("opens");
        let drivers: Vec<_> =
            walk::chain(&top).iter().map(|c| (c.node().driver(), c.is_writable())).collect();
        assert_eq!(drivers, [("qcow2", true), ("qcow2", false), ("raw", false)]);
        let edge = root(&graph, &top, WRITE).await;
        assert_eq!(edge.read(Span::new(0, 3)).await.expect("read").to_vec(), [1, 1, 1]);
        assert!(
            edge.read(Span::new(1 << 20, 1 << 20)).await.expect("read").is_zero(),
            "past the end of the base"
        );
        edge.write(65536, Data::copy_from(b"new"), ReqFlags::NONE).await.expect("written");
        let status = edge.status(Span::new(0, 2 << 20)).await.expect("asked");
        let depths: Vec<_> = status.iter().map(|e| (e.span.start, e.depth)).collect();
        assert_eq!(&depths[..3], [(0, 3), (65536, 1), (131_072, 3)], "{status:?}");
        drop(edge);
        graph.remove(&top).await.expect("closed");
        assert!(graph.nodes().is_empty(), "children go with the last parent");
        dir.qemu_img(&["check", "-q", "top.qcow2"]);
    });
}

#[test]
fn a_backing_file_without_a_stated_format_is_looked_at() {
    run(|env| async move {
        let dir = Dir::new("probe");
        dir.qemu_img(&["create", "-q", "-f", "qcow2", "base.qcow2", "1M"]);
        dir.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2"]);
        // Take the format out of the header: as old tools wrote it.
        dir.qemu_img(&["rebase", "-q", "-u", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2"]);
        let mut bytes = std::fs::read(dir.file("top.qcow2")).expect("read");
        let at = bytes.windows(4).position(|w| w == [0xe2, 0x79, 0x2a, 0xca]).expect("the extension");
        bytes[at..at + 4].copy_from_slice(&[0x12, 0x34, 0x56, 0x78]);
        std::fs::write(dir.file("top.qcow2"), bytes).expect("written");
        let graph = Graph::new(&env);
        let spec = NodeSpec::file(&dir.file("top.qcow2")).qcow2().named("top");
        let top = Opener::new(&graph).open(&spec).await.expect("opens");
        assert_eq!(walk::chain(&top)[1].node().driver(), "qcow2");
    });
}

#[test]
fn a_chain_that_loops_is_refused_and_names_the_file() {
    run(|env| async move {
        let dir = Dir::new("loop");
        dir.qemu_img(&["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]);
        dir.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", "b.qcow2"]);
        dir.qemu_img(&["rebase", "-q", "-u", "-b", "b.qcow2", "-F", "qcow2", "a.qcow2"]);
        let graph = Graph::new(&env);
        let spec = NodeSpec::file(&dir.file("a.qcow2")).qcow2().named("a");
        let e = Opener::new(&graph).open(&spec).await.expect_err("a loop");
        assert!(e.message().contains("loops") && e.message().contains("a.qcow2"), "{e}");
        assert!(graph.nodes().is_empty(), "{:?} left behind", graph.nodes().len());
    });
}

#[test]
fn a_loop_that_the_caller_spells_out_leaves_nothing_behind() {
    run(|env| async move {
        let dir = Dir::new("spelled");
        dir.qemu_img(&["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]);
        let graph = Graph::new(&env);
        let mut spec = NodeSpec::file(&dir.file("a.qcow2")).qcow2().named("a");
        let below = Box::new(NodeSpec::file(&dir.file("a.qcow2")).qcow2());
        let DriverSpec::Qcow2(image) = &mut spec.driver else { unreachable!("made above") };
        image.backing = open::Backing::Child(Child::Inline(below));
        let e = Opener::new(&graph).open(&spec).await.expect_err("a loop");
        assert!(e.message().contains("loops") && e.message().contains("a.qcow2"), "{e}");
        let left: Vec<String> = graph.nodes().iter().map(|c| c.name().to_owned()).collect();
        assert!(left.is_empty(), "{left:?} left behind");
    });
}

#[test]
fn errors_name_the_file_and_leave_nothing_behind() {
    run(|env| async move {
        let dir = Dir::new("errors");
        let graph = Graph::new(&env);
        let opener = Opener::new(&graph);
        let missing = dir.file("missing.img");
        let e = opener.open(&NodeSpec::file(&missing).named("x")).await.expect_err("missing");
        assert_eq!(e.message(), format!("Could not open '{missing}': No such file or directory"));
        let folder = dir.0.display().to_string();
        let e = opener.open(&NodeSpec::file(&folder).named("x")).await.expect_err("a folder");
        assert_eq!(e.message(), format!("Could not open '{folder}': Is a directory"));
        std::fs::write(dir.file("plain"), vec![0u8; 65536]).expect("written");
        let e =
            opener.open(&NodeSpec::file(&dir.file("plain")).qcow2().named("x")).await.expect_err("not qcow2");
        assert_eq!(e.message(), "Image is not in qcow2 format");
        let raw = DriverSpec::Raw { file: Child::Reference("nofile".into()), offset: 0, size: None };
        let e = opener
            .open(&NodeSpec { common: Default::default(), driver: raw }.named("x"))
            .await
            .expect_err("no node");
        assert_eq!(e.message(), "Cannot find device='nofile' nor node-name='nofile'");
        dir.qemu_img(&["create", "-q", "-f", "qcow2", "-u", "-b", "gone", "-F", "qcow2", "top.qcow2", "1M"]);
        let e = opener
            .open(&NodeSpec::file(&dir.file("top.qcow2")).qcow2().named("x"))
            .await
            .expect_err("no base");
        assert!(e.message().starts_with("Could not open backing file: Could not open"), "{e}");
        assert!(graph.nodes().is_empty());
        opener
            .open(&NodeSpec::file(&dir.file("plain")).raw().named("x"))
            .await
            .expect("nothing is locked any more");
    });
}

#[test]
fn two_writers_of_one_file_conflict_and_readers_do_not() {
    run(|env| async move {
        let dir = Dir::new("twice");
        std::fs::write(dir.file("d"), vec![0u8; 65536]).expect("written");
        let graph = Graph::new(&env);
        let opener = Opener::new(&graph);
        let spec = |name: &str, ro| NodeSpec::file(&dir.file("d")).raw().named(name).read_only(ro);
        let one = opener.open(&spec("one", false)).await.expect("alone");
        let _writer = graph
            .attach(
                &one,
                "root",
                Role::Root,
                Parent::Backend("t".into()),
                Demand { shares: Perms::CONSISTENT_READ, ..WRITE },
            )
            .await
            .expect("alone");
        let two = opener.open(&spec("two", false)).await.expect("opening asks for nothing yet");
        let e = graph
            .attach(&two, "root", Role::Root, Parent::Backend("t".into()), WRITE)
            .await
            .expect_err("taken");
        assert_eq!((e.kind(), e.message()), (ErrorKind::Busy, "Failed to get \"write\" lock"));
        root(&graph, &two, READ).await;
    });
}

#[test]
fn images_are_made_and_opened() {
    run(|env| async move {
        let dir = Dir::new("create");
        let graph = Graph::new(&env);
        let opener = Opener::new(&graph);
        let name = dir.file("new.qcow2");
        opener.create_file(&name, 0, Prealloc::Off).await.expect("made");
        let file = opener.open(&NodeSpec::file(&name).named("f")).await.expect("opens");
        opener.create_qcow2("f", None, &qcow2::create::Options::new(1 << 20)).await.expect("made");
        let spec = DriverSpec::Qcow2(Box::new(open::Qcow2Spec {
            file: Child::Reference("f".into()),
            data_file: None,
            backing: open::Backing::Implicit,
            options: qcow2::Options::default(),
        }));
        let disk = opener
            .open(&NodeSpec { common: Default::default(), driver: spec }.named("d"))
            .await
            .expect("opens");
        assert_eq!(disk.node().len(), 1 << 20);
        let e =
            opener.create_qcow2("f", None, &qcow2::create::Options::new(1 << 20)).await.expect_err("in use");
        assert!(e.message().starts_with("Permission conflict on node 'f'"), "{e}");
        graph.remove(&disk).await.expect("closed");
        assert!(graph.find("f").is_some(), "a node of the monitor's own stays");
        graph.remove(&file).await.expect("closed");
        dir.qemu_img(&["check", "-q", "new.qcow2"]);
    });
}
