#!/usr/bin/env python3
"""Copies between files of a file system that shares blocks (XFS in a file, mounted on a loop device).

    share.py --daemon PATH [--mib N] [--reference QSD] [--seed S]

A disk is mirrored while a client writes to it, from and to raw and qcow2, through the page cache and past it. Target and source must
be equal when the client has stopped, the target must have blocks of the source (that is the point), and writes to one of them
afterwards must not be seen in the other. Seconds of a copy nobody disturbs are printed, beside those of the reference.
Wants root, `mkfs.xfs` and a loop device. `cargo xtask share` runs it with liveblkd.
"""
import argparse
import itertools
import os
import random
import shutil
import subprocess
import tempfile
import threading
import time

import nbd
from vast import Daemon, tool

KINDS = ["raw", "qcow2"]


def node(form, name, direct):
    file = {"driver": "file", "filename": name, "cache": {"direct": direct}}
    return {"driver": form, "node-name": name.split(".")[0], "file": file}


def images(source, target, mib):
    size = mib << 20
    tool("qemu-img", "create", "-q", "-f", "raw", "fill", str(size))
    with open("fill", "r+b") as f:
        for _ in range(mib):
            f.write(os.urandom(1 << 20))
    tool("qemu-img", "convert", "-f", "raw", "-O", source, "fill", "s.img")
    tool("qemu-img", "create", "-q", "-f", target, "t.img", str(size))
    os.unlink("fill")
    os.sync()


def clean():
    for name in ("s.img", "t.img", "qmp", "nbd"):
        if os.path.exists(name):
            os.unlink(name)


def mirror(program, source, target, direct):
    daemon = Daemon(program, [node(source, "s.img", direct), node(target, "t.img", direct)], 600)
    daemon.do("nbd-server-start", {"addr": {"type": "unix", "data": {"path": "nbd"}}})
    daemon.do("block-export-add", {"type": "nbd", "id": "e", "node-name": "s", "name": "s", "writable": True})
    return daemon


def ready(daemon):
    began = time.monotonic()
    daemon.do("blockdev-mirror", {"job-id": "m", "device": "s", "target": "t", "sync": "full"})
    daemon.event(["BLOCK_JOB_READY"])
    return time.monotonic() - began


def over(daemon):
    daemon.do("block-job-cancel", {"device": "m"})
    daemon.event(["BLOCK_JOB_COMPLETED"])
    daemon.do("quit", {})
    if daemon.process.wait(60) != 0:
        raise SystemExit(f"the daemon ended with {daemon.process.returncode}")


def timed(program, source, target, direct, mib):
    images(source, target, mib)
    daemon = mirror(program, source, target, direct)
    took = ready(daemon)
    over(daemon)
    same(source, target)
    clean()
    return took


def same(source, target):
    tool("qemu-img", "compare", "-f", source, "-F", target, "s.img", "t.img")


def shared(name):
    out = subprocess.run(["filefrag", "-v", name], check=True, capture_output=True, text=True).stdout
    return sum(int(line.split(":")[3]) for line in out.splitlines() if "shared" in line) * 4096


def written(stop, size, seed):
    """Writes to the first half of the disk until told to stop, pieces of odd places and lengths among them."""
    rng, h = random.Random(seed), nbd.NBD()
    h.connect_uri("nbd+unix:///s?socket=nbd")
    while not stop.is_set():
        length = rng.choice([512, 4096, 65536, 1 << 20])
        at = rng.randrange(0, size // 2 - length) & ~511
        h.pwrite(bytes([rng.randrange(1, 256)]) * length, at)
    h.shutdown()


def disturbed(program, source, target, direct, mib, seed):
    images(source, target, mib)
    daemon, stop = mirror(program, source, target, direct), threading.Event()
    client = threading.Thread(target=written, args=(stop, mib << 20, seed))
    client.start()
    try:
        ready(daemon)
        time.sleep(0.5)
    finally:
        stop.set()
        client.join()
    over(daemon)
    same(source, target)
    sharing = shared("t.img")
    # what the client wrote to since is not; nothing else was written
    if sharing < mib << 19:
        raise SystemExit(f"{source} to {target}: only {sharing >> 20} of {mib} MiB are shared")
    tool("qemu-img", "convert", "-f", target, "-O", "raw", "t.img", "before")
    tool("qemu-io", "-f", source, "-c", f"write -q -P 1 0 {mib // 2}M", "-c", f"write -q -P 2 {mib // 2}M 77k", "s.img")
    tool("qemu-img", "compare", "-f", target, "-F", "raw", "t.img", "before")
    os.unlink("before")
    clean()
    return sharing


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--daemon", required=True)
    parser.add_argument("--reference", default=shutil.which("qemu-storage-daemon"))
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    o = parser.parse_args()
    print(f"seed {o.seed}")
    where = tempfile.mkdtemp(prefix="liveblk-share-")
    image, mount = os.path.join(where, "xfs"), os.path.join(where, "mnt")
    os.mkdir(mount)
    with open(image, "wb") as f:
        f.truncate(max(1 << 30, (8 * o.mib) << 20))
    tool("mkfs.xfs", "-q", "-m", "reflink=1", image)
    tool("mount", "-o", "loop", image, mount)
    try:
        os.chdir(mount)
        for source, target, direct in itertools.product(KINDS, KINDS, [False, True]):
            case = f"{source} to {target}, {'past' if direct else 'through'} the page cache"
            sharing = disturbed(o.daemon, source, target, direct, o.mib, o.seed)
            ours, theirs = (timed(p, source, target, direct, o.mib) for p in (o.daemon, o.reference))
            print(f"{case}: equal, {sharing >> 20} of {o.mib} MiB shared; alone {ours:.3f} s, reference {theirs:.3f} s: "
                  f"{theirs / ours:.1f}x")
    finally:
        os.chdir("/")
        tool("umount", "-l", mount)
        shutil.rmtree(where)


if __name__ == "__main__":
    main()
