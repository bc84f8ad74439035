//! The main job, end to end, for someone who has just cloned this: a qcow2 disk is served over NBD, fio writes to it and
//! checks every block it wrote, the disk is mirrored live to a second image and the client is moved there without
//! noticing; then it is mirrored back the same way. When fio has ended, qemu-img compares the two images byte for byte.
//!
//! What must stay true: real programs on both sides, nothing prepared, and a failure of any of them fails the demo.

use crate::setup;
use crate::shell::{self, Outcome, fail};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const DISK: &str = "512M";
/// Seconds that fio writes; both mirrors must fit in.
const CLIENT_SECONDS: u32 = 20;
const CLIENT_IOPS: u32 = 3000;

/// The folder of the run, and the processes that must not outlive it.
struct Stage {
    dir: PathBuf,
    running: Vec<(&'static str, Child)>,
}

impl Drop for Stage {
    fn drop(&mut self) {
        for (_, child) in &mut self.running {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

impl Stage {
    fn path(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }

    fn end_of(&mut self, name: &str) -> Outcome {
        let Some(at) = self.running.iter().position(|(n, _)| *n == name) else { return Ok(()) };
        let (_, mut child) = self.running.remove(at);
        match child.wait() {
            Ok(s) if s.success() => Ok(()),
            Ok(s) => fail(format!("{name} ended with {s}")),
            Err(e) => fail(format!("waiting for {name}: {e}")),
        }
    }
}

fn say(text: &str) {
    println!("\n== {text}");
}

pub(crate) fn run(_args: &[String]) -> Outcome {
    say("setting up (packages, release build)");
    setup::ready()?;
    shell::cargo(&["build", "--release", "--package", "daemon", "--package", "cli"])?;
    let bin = shell::target().join("release");
    let dir = std::env::temp_dir().join(format!("liveblk-demo-{}", std::process::id()));
    std::fs::create_dir_all(&dir).map_err(|e| format!("cannot make {}: {e}", dir.display()))?;
    let mut stage = Stage { dir, running: Vec::new() };

    say("a qcow2 disk with 128 MiB of random data, served over NBD");
    let (source, target) = (stage.path("source.qcow2"), stage.path("target.qcow2"));
    shell::run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2", &source, DISK]))?;
    serve(&mut stage, &bin, &source)?;
    let uri = format!("nbd+unix:///disk?socket={}", stage.path("nbd.sock"));
    let random = stage.path("random");
    shell::run(Command::new("dd").args([
        "if=/dev/urandom",
        &format!("of={random}"),
        "bs=1M",
        "count=128",
        "status=none",
    ]))?;
    shell::run(Command::new("nbdcopy").args(["--no-extents", &random, &uri]))?;

    say(&format!("fio writes random blocks for {CLIENT_SECONDS} s, and reads back and checks what it wrote"));
    client(&mut stage, &uri)?;
    std::thread::sleep(Duration::from_secs(1));

    let qmp = stage.path("qmp.sock");
    let liveblk =
        |args: &[&str]| shell::run(Command::new(bin.join("liveblk")).args(args).args(["--socket", &qmp]));
    say("the disk is mirrored live to a new image, and the client moved there");
    liveblk(&[
        "mirror",
        "disk",
        &target,
        "--job",
        "there",
        "--copy-mode",
        "write-blocking",
        "--then",
        "pivot",
    ])?;
    liveblk(&["status"])?;

    say("and back onto the first image, while fio goes on");
    liveblk(&[
        "mirror",
        "liveblk-target",
        "disk",
        "--job",
        "back",
        "--copy-mode",
        "write-blocking",
        "--then",
        "stay",
    ])?;
    if let Some((_, fio)) = stage.running.iter_mut().find(|(n, _)| *n == "fio")
        && !matches!(fio.try_wait(), Ok(None))
    {
        return fail(
            "fio ended before the second mirror was in sync: this machine is too slow for the demo's times",
        );
    }

    say("fio ends; it has found every block as it wrote it");
    stage.end_of("fio")?;
    print!("{}", fio_summary(&stage.dir.join("fio.txt")));
    liveblk(&["complete", "back"])?;
    // SIGTERM is the daemon's orderly end: jobs finished, metadata written, locks given back.
    shell::run(&mut shell::kill(stage.running[0].1.id()))?;
    stage.end_of("liveblkd")?;

    say("the proof: both images are read again and compared, and QEMU's own tools look at them");
    shell::run(Command::new(bin.join("liveblk")).args(["verify", &source, &target]))?;
    for image in [&source, &target] {
        shell::run(Command::new("qemu-img").args(["check", "-q", "-f", "qcow2", image]))?;
    }
    shell::run(Command::new("qemu-img").args(["compare", "-f", "qcow2", "-F", "qcow2", &source, &target]))?;
    println!("\nThe disk moved twice under a writing client: 0 errors, both images clean and equal.");
    Ok(())
}

fn serve(stage: &mut Stage, bin: &Path, source: &str) -> Outcome {
    let blockdev = format!(
        "driver=qcow2,node-name=disk,discard=unmap,file.driver=file,file.filename={source},file.discard=unmap"
    );
    let mut child = Command::new(bin.join("liveblkd"))
        .args(["--blockdev", &blockdev])
        .args(["--nbd-server", &format!("addr.type=unix,addr.path={}", stage.path("nbd.sock"))])
        .args(["--export", "type=nbd,id=export,node-name=disk,name=disk,writable=on"])
        .args(["--chardev", &format!("socket,id=qmp,path={},server=on,wait=off", stage.path("qmp.sock"))])
        .args(["--monitor", "chardev=qmp"])
        .spawn()
        .map_err(|e| format!("cannot start liveblkd: {e}"))?;
    let listening =
        ["qmp.sock", "nbd.sock"].map(|s| qmpclient::until_listening(&mut child, &stage.dir.join(s)));
    stage.running.push(("liveblkd", child));
    listening.into_iter().collect::<Outcome>().map_err(|e| format!("liveblkd: {e}"))
}

fn client(stage: &mut Stage, uri: &str) -> Outcome {
    let log = std::fs::File::create(stage.dir.join("fio.txt")).map_err(|e| format!("fio.txt: {e}"))?;
    let child = Command::new("fio")
        .args([
            "--name=client",
            "--ioengine=nbd",
            &format!("--uri={uri}"),
            "--rw=randwrite",
            "--bs=4k",
            "--iodepth=16",
        ])
        .args(["--size=512m", "--verify=crc32c", "--verify_backlog=1024", "--verify_fatal=1", "--time_based"])
        .args([&format!("--runtime={CLIENT_SECONDS}"), &format!("--rate_iops={CLIENT_IOPS}")])
        .current_dir(&stage.dir)
        .stdin(Stdio::null())
        .stdout(log)
        .spawn()
        .map_err(|e| format!("cannot start fio: {e}"))?;
    stage.running.push(("fio", child));
    Ok(())
}

fn fio_summary(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    text.lines()
        .filter(|l| l.contains("err=") || l.contains("IOPS="))
        .map(|l| format!("{}\n", l.trim()))
        .collect()
}
