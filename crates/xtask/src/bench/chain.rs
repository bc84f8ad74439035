//! Disks that jobs work on: made with qemu-img, opened by both sides with the same options, compared afterwards.

use super::nbd::{make_image, socket};
use super::{Options, Side};
use crate::shell::{self, Outcome};
use std::process::Command;

/// What a disk consists of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Layout {
    /// One image of this format, full.
    Plain(&'static str),
    /// Three qcow2 images: `b`, full; `m`, full; `d`, which holds nothing. Where `d` holds something it is its second half.
    Chain {
        /// Whether the topmost holds something.
        active: bool,
    },
}

/// A disk on one side: node `d` is what clients see, `m` and `b` are below it.
pub(super) struct Disk {
    pub(super) layout: Layout,
    /// The files, from the top down.
    pub(super) files: Vec<String>,
}

impl Layout {
    /// Makes the images for `side`.
    pub(super) fn make(self, options: &Options, side: Side) -> Outcome<Disk> {
        let name = |what: &str| format!("{what}-{side:?}");
        let files = match self {
            Layout::Plain(format) => vec![make_image(options, format, &name("d"), true)?],
            Layout::Chain { active } => {
                let base = make_image(options, "qcow2", &name("b"), true)?;
                let middle = overlay(options, &base, &name("m"), Some(("0x77", 0, options.image_mib)))?;
                let half = options.image_mib / 2;
                let holds = active.then_some(("0x33", half, options.image_mib - half));
                let top = overlay(options, &middle, &name("d"), holds)?;
                vec![top, middle, base]
            }
        };
        Ok(Disk { layout: self, files })
    }
}

/// A new qcow2 image on top of `below`, with a pattern from one MiB on for so many.
pub(super) fn overlay(
    options: &Options,
    below: &str,
    name: &str,
    holds: Option<(&str, u64, u64)>,
) -> Outcome<String> {
    let file = options.path(name);
    let format = format_of(below)?;
    let _ = std::fs::remove_file(&file);
    shell::output(
        Command::new("qemu-img").args(["create", "-q", "-f", "qcow2", "-b", below, "-F", &format, &file]),
    )?;
    if let Some((pattern, from, len)) = holds {
        let write = format!("write -q -P {pattern} {from}M {len}M");
        shell::output(Command::new("qemu-io").args(["-f", "qcow2", "-c", &write, &file]))?;
    }
    Ok(file)
}

fn format_of(file: &str) -> Outcome<String> {
    let info = shell::output(Command::new("qemu-img").args(["info", "-U", "--output=json", file]))?;
    let info: serde_json::Value = serde_json::from_str(&info).map_err(|e| format!("qemu-img info: {e}"))?;
    Ok(info["format"].as_str().unwrap_or("raw").to_owned())
}

impl Disk {
    /// The command line that opens it and serves `d`.
    pub(super) fn serving(&self, options: &Options, side: Side) -> Vec<String> {
        let format = match self.layout {
            Layout::Plain(format) => format,
            Layout::Chain { .. } => "qcow2",
        };
        let socket = socket(options, side);
        let _ = std::fs::remove_file(&socket);
        let mut line = Vec::new();
        let names = ["d", "m", "b"];
        for (i, file) in self.files.iter().enumerate().rev() {
            let backing = match self.layout {
                Layout::Plain(_) => String::new(),
                Layout::Chain { .. } if i + 1 == self.files.len() => String::new(),
                Layout::Chain { .. } => format!(",backing={}", names[i + 1]),
            };
            let file = format!("file.driver=file,file.discard=unmap,file.filename={file}");
            line.push("--blockdev".to_owned());
            line.push(format!("driver={format},node-name={},discard=unmap,{file}{backing}", names[i]));
        }
        let server = format!("addr.type=unix,addr.path={socket}");
        let export = "type=nbd,id=e,node-name=d,name=d,writable=on";
        line.extend(["--nbd-server", &server, "--export", export].map(str::to_owned));
        line
    }

    /// A raw image of what the disk contains now.
    pub(super) fn flat(&self, options: &Options) -> Outcome<String> {
        let flat = options.path("expected");
        shell::output(Command::new("qemu-img").args(["convert", "-O", "raw", &self.files[0], &flat]))?;
        Ok(flat)
    }
}

/// Fails unless the image `file` contains what the raw image `expected` does, and its tables are right.
pub(super) fn check(expected: &str, file: &str) -> Outcome {
    let format = format_of(file)?;
    let compare = ["compare", "-q", "-f", "raw", "-F", &format, expected, file];
    shell::output(Command::new("qemu-img").args(compare)).map_err(|e| format!("{file} is wrong: {e}"))?;
    if format == "qcow2" {
        shell::output(Command::new("qemu-img").args(["check", "-q", "-f", "qcow2", file]))?;
    }
    Ok(())
}
