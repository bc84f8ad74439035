//! Installs what the tests and the demonstration need.
//!
//! What can happen: a fresh Debian or Ubuntu, root or not, with or without some of the programs. Nothing is installed
//! that is there already. Debian 12 has QEMU 7.2, too old to compare with: there all QEMU packages come from backports,
//! together, since a mix removes qemu-storage-daemon. `qemu.qmp` comes from PyPI into an environment of its own,
//! which also sees Debian's libnbd module; [`python`] is its interpreter.

use crate::shell::{self, Outcome, fail, have, output};
use std::path::PathBuf;
use std::process::Command;

/// Program, and the Debian package that has it.
const PROGRAMS: &[(&str, &str)] = &[
    ("qemu-img", "qemu-utils"),
    ("qemu-io", "qemu-utils"),
    ("qemu-nbd", "qemu-utils"),
    ("qemu-storage-daemon", "qemu-utils"),
    ("nbdcopy", "libnbd-bin"),
    ("nbdinfo", "libnbd-bin"),
    ("nbdsh", "python3-libnbd"),
    ("nbdkit", "nbdkit"),
    ("fio", "fio"),
    ("fusermount3", "fuse3"),
    ("openssl", "openssl"),
    // the arbiter of replicating groups
    ("etcd", "etcd-server"),
    ("cc", "build-essential"),
    ("python3", "python3"),
    // the guest that boots from a vhost-user-blk disk (tests/vhost/guest.py)
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("busybox", "busybox-static"),
    ("cpio", "cpio"),
    ("mke2fs", "e2fsprogs"),
];

/// Packages of QEMU: all of one version.
const QEMU: &[&str] = &["qemu-utils", "qemu-system-x86"];
/// The guest's kernel and its modules.
const KERNEL: &str = "linux-image-cloud-amd64";

fn kernel_is_here() -> bool {
    let boot = std::fs::read_dir("/boot").into_iter().flatten().flatten();
    boot.into_iter().any(|f| f.file_name().to_string_lossy().starts_with("vmlinuz-"))
}

/// The interpreter that has `nbd` (libnbd), `qemu.qmp` and `blake3`.
pub(crate) fn python() -> PathBuf {
    environment().join("bin/python")
}

fn environment() -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(|| {
        let home = std::env::var_os("HOME").map(PathBuf::from)?;
        Some(home.join(".cache"))
    });
    cache.unwrap_or_else(|| PathBuf::from("/var/tmp")).join("liveblk/python")
}

/// Installs what is missing and checks the result.
pub(crate) fn run(_args: &[String]) -> Outcome {
    ready()?;
    println!(
        "everything the tests need is here; python with nbd, qemu.qmp and blake3: {}",
        python().display()
    );
    Ok(())
}

/// The same for other chores: prints only when there is something to do.
pub(crate) fn ready() -> Outcome {
    let missing = missing_packages();
    if !missing.is_empty() {
        install(&missing)?;
    }
    for (program, package) in PROGRAMS {
        if !have(program) {
            return fail(format!("{program} is still missing after installing {package}"));
        }
    }
    python_environment()
}

fn missing_packages() -> Vec<&'static str> {
    let mut packages: Vec<_> = PROGRAMS.iter().filter(|(p, _)| !have(p)).map(|(_, pkg)| *pkg).collect();
    let system_python = |code: &str| {
        Command::new("/usr/bin/python3").args(["-c", code]).output().is_ok_and(|o| o.status.success())
    };
    if !system_python("import ensurepip, venv") {
        packages.push("python3-venv");
    }
    if !system_python("import nbd") {
        packages.push("python3-libnbd");
    }
    if !kernel_is_here() {
        packages.push(KERNEL);
    }
    packages.sort_unstable();
    packages.dedup();
    packages
}

fn install(packages: &[&str]) -> Outcome {
    let bookworm = codename().as_deref() == Some("bookworm");
    let (late, plain): (Vec<&str>, Vec<&str>) =
        packages.iter().copied().partition(|p| bookworm && QEMU.contains(p));
    let qemu_from_backports = !late.is_empty();
    if !is_root()? {
        let backports = if qemu_from_backports {
            format!("echo '{BACKPORTS}' | sudo tee {BACKPORTS_LIST}; ")
        } else {
            String::new()
        };
        let late = if qemu_from_backports {
            let late = late.join(" ");
            format!("; sudo apt-get install -y --no-install-recommends -t bookworm-backports {late}")
        } else {
            String::new()
        };
        return fail(format!(
            "these packages are missing and only root can install them. Type:\n  {backports}sudo apt-get update; \
             sudo apt-get install -y --no-install-recommends {}{late}",
            plain.join(" ")
        ));
    }
    if qemu_from_backports && !std::path::Path::new(BACKPORTS_LIST).exists() {
        std::fs::write(BACKPORTS_LIST, format!("{BACKPORTS}\n"))
            .map_err(|e| format!("cannot write {BACKPORTS_LIST}: {e}"))?;
    }
    shell::run(&mut apt(&["update"]))?;
    if !plain.is_empty() {
        shell::run(apt(&["install", "-y", "--no-install-recommends"]).args(&plain))?;
    }
    if qemu_from_backports {
        shell::run(
            apt(&["install", "-y", "--no-install-recommends", "-t", "bookworm-backports"]).args(&late),
        )?;
    }
    Ok(())
}

const BACKPORTS: &str = "deb http://deb.debian.org/debian bookworm-backports main";
const BACKPORTS_LIST: &str = "/etc/apt/sources.list.d/liveblk-backports.list";

fn apt(args: &[&str]) -> Command {
    let mut c = Command::new("apt-get");
    c.args(["-q"]).args(args).env("DEBIAN_FRONTEND", "noninteractive");
    c
}

fn is_root() -> Outcome<bool> {
    Ok(output(Command::new("id").arg("-u"))?.trim() == "0")
}

fn codename() -> Option<String> {
    let text = std::fs::read_to_string("/etc/os-release").ok()?;
    text.lines().find_map(|l| l.strip_prefix("VERSION_CODENAME=")).map(|v| v.trim_matches('"').to_owned())
}

fn python_environment() -> Outcome {
    let works = |python: &PathBuf| {
        Command::new(python)
            .args(["-c", "import nbd, qemu.qmp, blake3"])
            .output()
            .is_ok_and(|o| o.status.success())
    };
    if works(&python()) {
        return Ok(());
    }
    let at = environment();
    shell::run(
        Command::new("/usr/bin/python3").args(["-m", "venv", "--clear", "--system-site-packages"]).arg(&at),
    )?;
    shell::run(Command::new(at.join("bin/pip")).args([
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "qemu.qmp",
        "blake3",
    ]))?;
    if works(&python()) {
        Ok(())
    } else {
        fail("python modules `nbd`, `qemu.qmp` and `blake3` cannot be imported after set-up")
    }
}
