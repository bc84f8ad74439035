#!/usr/bin/env python3
"""Seconds that jobs on a disk of 16 TiB with little in it take: they should be those of its data, not of its size.

    vast.py --daemon PATH [--format qcow2|raw] [--mib N] [--gib N] [--where DIR] [--limit SECONDS] [JOB ...]

JOB is mirror, backup, commit (of a layer in the middle), active (commit of the active layer) or stream; all if none is given. The data
are N MiB (1024) in pieces of 4 MiB, evenly spread; with --gib the disk has that size: 2 compares with one that holds little else (a layer has its pieces between those of another). A raw disk is 1 GiB shorter, which files of ext4 may be. Any daemon with the
command line of qemu-storage-daemon will do. A job that takes longer than the limit is given up and said so. `cargo xtask vast` runs it
with liveblkd.
"""
import argparse
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time

PIECE = 4 << 20
JOBS = ["mirror", "backup", "commit", "active", "stream"]


def tool(*line):
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)


class Disk:
    """Images in the current directory."""

    def __init__(self, form, mib, gib):
        self.form, self.pieces = form, mib * (1 << 20) // PIECE
        # what ext4 may have
        self.size = min(gib << 30, (16 << 40) - (1 << 30 if form == "raw" else 0))

    def create(self, name, below=None):
        if below:
            tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", below[0], "-F", below[1], name)
        else:
            tool("qemu-img", "create", "-q", "-f", self.form, name, str(self.size))

    def fill(self, name, form, between=False):
        apart = self.size // self.pieces // 65536 * 65536
        shift = apart // 2 if between else 0
        writes = [f"write -q -P {1 + i % 250} {i * apart + shift} {PIECE}" for i in range(self.pieces)]
        for first in range(0, len(writes), 200):
            commands = [word for w in writes[first:first + 200] for word in ("-c", w)]
            tool("qemu-io", "-f", form, *commands, name)


class Daemon:
    def __init__(self, program, nodes, limit):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind("qmp")
        listener.listen(1)
        line = [program, "--chardev", "socket,id=c,path=qmp", "--monitor", "c"]
        for n in nodes:
            line += ["--blockdev", json.dumps(n)]
        self.process = subprocess.Popen(line)
        listener.settimeout(30)
        connection, _ = listener.accept()
        connection.settimeout(limit)
        # for reading alone: Python's file for both forgets what it has read ahead when something is written
        self.connection, self.lines, self.events = connection, connection.makefile("r"), []
        self.lines.readline()
        self.do("qmp_capabilities", {})

    def do(self, command, arguments):
        self.connection.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while True:
            answer = json.loads(self.lines.readline())
            if "error" in answer:
                raise SystemExit(f"{command} {arguments}: {answer['error']['desc']}")
            if "return" in answer:
                return
            self.events.append(answer)

    def event(self, names):
        while True:
            e = self.events.pop(0) if self.events else json.loads(self.lines.readline())
            if e["event"] in names:
                return e

    def cpu(self):
        with open(f"/proc/{self.process.pid}/stat") as f:
            words = f.read().rsplit(")", 1)[1].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    def peak(self):
        with open(f"/proc/{self.process.pid}/status") as f:
            return next(int(line.split()[1]) >> 10 for line in f if line.startswith("VmHWM"))

    def end(self):
        self.process.kill()
        self.process.wait()
        os.unlink("qmp")


def node(name, form, **more):
    file = {"driver": "file", "filename": name, "discard": "unmap"}
    return {"driver": form, "node-name": name, "discard": "unmap", "file": file, **more}


def prepare(disk, job):
    """Images made; the nodes, and what starts the job."""
    form = disk.form
    if job in ("mirror", "backup"):
        disk.create("s")
        disk.fill("s", form)
        disk.create("d")
        arguments = {"device": "s", "target": "d", "sync": "full"}
        return [node("s", form), node("d", form)], f"blockdev-{job}", arguments
    disk.create("base")
    disk.fill("base", form, between=True)
    disk.create("mid", ("base", form))
    disk.fill("mid", "qcow2")
    disk.create("top", ("mid", "qcow2"))
    nodes = [node("base", form, **{"read-only": True}), node("mid", "qcow2", backing="base", **{"read-only": True}),
             node("top", "qcow2", backing="mid")]
    if job == "stream":
        return nodes, "block-stream", {"device": "top"}
    more = {"top-node": "mid"} if job == "commit" else {}
    return nodes, "block-commit", {"device": "top", "base-node": "base", **more}


def measure(o, job):
    what = f"{os.path.basename(o.daemon)}, {o.format}, {o.mib} MiB, {job}"
    nodes, command, arguments = prepare(Disk(o.format, o.mib, o.gib), job)
    daemon = Daemon(o.daemon, nodes, o.limit)
    try:
        begun, cpu = time.monotonic(), daemon.cpu()
        daemon.do(command, {"job-id": "j", **arguments})
        e = daemon.event(["BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED"])
        if e["event"] == "BLOCK_JOB_READY":
            daemon.do("job-complete", {"id": "j"})
            e = daemon.event(["BLOCK_JOB_COMPLETED"])
        took = time.monotonic() - begun
        if "error" in e["data"]:
            raise SystemExit(f"{what}: {e['data']['error']}")
        print(f"{what}: {took:.2f} s, {daemon.cpu() - cpu:.2f} s of processor time, {daemon.peak()} MiB at most", flush=True)
    except TimeoutError:
        print(f"{what}: not done after {o.limit:.0f} s, {daemon.cpu() - cpu:.2f} s of processor time", flush=True)
    finally:
        daemon.end()


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--daemon", default="liveblkd")
    p.add_argument("--format", choices=["qcow2", "raw"], default="qcow2")
    p.add_argument("--mib", type=int, default=1024)
    p.add_argument("--gib", type=int, default=16 << 10)
    p.add_argument("--where", default=None)
    p.add_argument("--limit", type=float, default=120.0)
    p.add_argument("jobs", nargs="*", metavar="JOB", choices=JOBS + [[]])
    o = p.parse_args()
    o.daemon = shutil.which(o.daemon) or os.path.abspath(o.daemon)
    for job in o.jobs or JOBS:
        where = tempfile.mkdtemp(prefix="liveblk-vast-", dir=o.where)
        try:
            os.chdir(where)
            measure(o, job)
        finally:
            os.chdir("/")
            shutil.rmtree(where)


if __name__ == "__main__":
    main()
