#!/usr/bin/env python3
"""Whether large is as cheap as small: disks of 64 TiB, chains of 256 layers, 1,000 nodes, 64 exports, bitmaps of 64 TiB.

    scale.py --daemon PATH --load NBDLOAD [--reference qemu-storage-daemon] [--rounds N] [NAME...]

For each shape, the small and the large one take turns: milliseconds until the daemon answers its first command, memory (Pss), and
microseconds of its processor per 4 KiB random read at depth 16, checked by the load client. The table is Markdown.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "vhost"))
import qmp

TIB, GIB, MIB = 1 << 40, 1 << 30, 1 << 20
HUGE = 64 * TIB
WINDOW = 64 * MIB
LAYERS, NODES, EXPORTS = 256, 1000, 64
GRANULARITY = 64 << 10


def image(*args):
    subprocess.run(["qemu-img", *map(str, args)], check=True, stdout=subprocess.DEVNULL)


def fill(path, form, at):
    subprocess.run(["qemu-io", "-f", form, "-c", f"write -q -P 0x5a {at} {WINDOW}", path], check=True, stdout=subprocess.DEVNULL)


class Daemon(qmp.Daemon):
    def __init__(self, binary, path, options):
        self.began = time.monotonic()
        super().__init__(binary, path, options)
        self.started = time.monotonic() - self.began

    def memory(self):
        """MiB that this process alone accounts for."""
        with open(f"/proc/{self.process.pid}/smaps_rollup") as f:
            return next(int(line.split()[1]) for line in f if line.startswith("Pss:")) / 1024

    def cpu(self):
        total = 0
        for task in os.listdir(f"/proc/{self.process.pid}/task"):
            with open(f"/proc/{self.process.pid}/task/{task}/schedstat") as f:
                total += int(f.read().split()[0])
        return total / 1e9

    def end(self):
        self.process.kill()
        self.process.wait()


def serve(path, disks):
    """NBD exports of nodes."""
    options = ["--nbd-server", f"addr.type=unix,addr.path={path}/nbd"]
    for n, node in enumerate(disks):
        options += ["--export", f"type=nbd,id=e{n},node-name={node},name=e{n}"]
    return options


def window(path, form, size, at):
    """A disk of which the window at `at` is served."""
    disk = f"{path}/disk"
    image("create", "-q", "-f", form, disk, size)
    fill(disk, form, at)
    return [
        "--blockdev", f"driver={form},node-name=d,file.driver=file,file.filename={disk}",
        "--blockdev", f"driver=raw,node-name=w,file=d,offset={at},size={WINDOW}", *serve(path, ["w"])]


def disks(form):
    return lambda path: window(path, form, GIB, GIB // 2), lambda path: window(path, form, HUGE, HUGE - GIB)


def chain(layers):
    def make(path):
        image("create", "-q", "-f", "qcow2", f"{path}/0", GIB)
        fill(f"{path}/0", "qcow2", 0)
        top = f"driver=qcow2,node-name=n0,file.driver=file,file.filename={path}/0"
        options = ["--blockdev", top]
        for n in range(1, layers):
            # what lies behind a layer is said below, so they may all name the same
            if n == 1:
                image("create", "-q", "-f", "qcow2", "-u", "-b", f"{path}/0", "-F", "qcow2", f"{path}/1", GIB)
            else:
                shutil.copy(f"{path}/1", f"{path}/{n}")
            options += ["--blockdev", f"driver=qcow2,node-name=n{n},backing=n{n - 1},file.driver=file,file.filename={path}/{n}"]
        options += ["--blockdev", f"driver=raw,node-name=w,file=n{layers - 1},offset=0,size={WINDOW}"]
        return options + serve(path, ["w"])
    return make


def many(nodes, exports):
    def make(path):
        options = window(path, "raw", GIB, 0)
        for n in range(nodes - 3):
            options += ["--blockdev", f"driver=null-co,node-name=x{n},size={GIB},read-zeroes=on"]
        for n in range(1, exports):
            options += ["--export", f"type=nbd,id=y{n},node-name={'x%d' % n if nodes > exports + 3 else 'w'},name=y{n}"]
        return options
    return make


SHAPES = {
    "raw of 64 TiB": disks("raw"),
    "qcow2 of 64 TiB": disks("qcow2"),
    f"chain of {LAYERS}": (chain(1), chain(LAYERS)),
    f"{NODES} nodes": (many(3, 1), many(NODES, 1)),
    f"{EXPORTS} exports": (many(3, 1), many(3, EXPORTS)),
}


def measure(binary, load, make):
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="scale-") as path:
        options = make(path)
        d = Daemon(binary, path, options)
        memory, start_cpu = d.memory(), d.cpu()
        run = lambda seconds: json.loads(subprocess.run(
            [load, "--socket", f"{path}/nbd", "--export", "e0", "--depth", "16", "--seconds", str(seconds), "--verify"],
            check=True, capture_output=True, text=True).stdout)
        run(0.1)
        before = d.cpu()
        requests = run(0.5)["requests"]
        us = (d.cpu() - before) / requests * 1e6
        grown = d.memory()
        d.end()
        return d.started * 1000, start_cpu * 1000, memory, grown, us


def shapes(binary, load, rounds, names):
    name = os.path.basename(binary)
    print(f"\n| {name} | start ms small | large | of that CPU ms small | large | MiB small | large | MiB after the load small | large | µs/request small | large | ratio |")
    print("|---" * 12 + "|")
    for shape, pair in SHAPES.items():
        if names and not any(n in shape for n in names):
            continue
        got = [[], []]
        try:
            for n in range(rounds):
                for side in (0, 1) if n % 2 else (1, 0):
                    got[side].append(measure(binary, load, pair[side]))
        except (AssertionError, subprocess.CalledProcessError) as e:
            print(f"| {shape} | failed: {str(e)[:200]} |", flush=True)
            continue
        small, large = [[statistics.median(v) for v in zip(*side)] for side in got]
        cells = [f"{v:.1f}" for both in zip(small, large) for v in both]
        print(f"| {shape} | {' | '.join(cells)} | {large[-1] / small[-1]:.2f} |", flush=True)


def bitmaps(binary, rounds):
    """Milliseconds of each command on bitmaps of a disk of 64 TiB."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="scale-") as path:
        d = Daemon(binary, path, ["--blockdev", f"driver=null-co,node-name=n,size={HUGE}"])
        times = {}

        def timed(what, command, **arguments):
            began = time.monotonic()
            d.qmp(command, **arguments)
            times.setdefault(what, []).append((time.monotonic() - began) * 1000)

        base = d.memory()
        for n in range(rounds):
            for b in ("a", "b", "c"):
                timed("add", "block-dirty-bitmap-add", node="n", name=b, granularity=GRANULARITY)
            timed("merge two", "block-dirty-bitmap-merge", node="n", target="c", bitmaps=["a", "b"])
            timed("disable", "block-dirty-bitmap-disable", node="n", name="c")
            timed("query-named-block-nodes", "query-named-block-nodes")
            timed("clear", "block-dirty-bitmap-clear", node="n", name="a")
            held = d.memory() - base
            for b in ("a", "b", "c"):
                timed("remove", "block-dirty-bitmap-remove", node="n", name=b)
        d.end()
        print(f"\n{os.path.basename(binary)}, bitmaps of 64 TiB at 64 KiB, empty, ms (median, worst); three hold {held:.1f} MiB: " + "; ".join(
            f"{what} {statistics.median(t):.2f} ({max(t):.2f})" for what, t in times.items()), flush=True)


def full_bitmaps(binary, load, rounds):
    """The same with something in them: all of a disk is dirtied by one command (zeroes on a driver that does nothing)."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="scale-") as path:
        d = Daemon(binary, path, ["--blockdev", f"driver=null-co,node-name=n,size={HUGE}", "--nbd-server", f"addr.type=unix,addr.path={path}/nbd",
                                  "--export", "type=nbd,id=e0,node-name=n,name=e0,writable=on"])
        times = {}

        def timed(what, command, **arguments):
            began = time.monotonic()
            d.qmp(command, **arguments)
            times.setdefault(what, []).append((time.monotonic() - began) * 1000)

        for n in range(rounds):
            for b in ("a", "b", "c"):
                d.qmp("block-dirty-bitmap-add", node="n", name=b, granularity=GRANULARITY)
            # scattered: a bit here and there, as a guest leaves them
            subprocess.run([load, "--socket", f"{path}/nbd", "--export", "e0", "--op", "randwrite", "--depth", "64", "--bs", str(4 << 20), "--seconds", "0.3"],
                           check=True, stdout=subprocess.DEVNULL)
            d.qmp("block-dirty-bitmap-clear", node="n", name="c")
            timed("merge two", "block-dirty-bitmap-merge", node="n", target="c", bitmaps=["a", "b"])
            timed("query-named-block-nodes", "query-named-block-nodes")
            timed("clear", "block-dirty-bitmap-clear", node="n", name="a")
            for b in ("a", "b", "c"):
                timed("remove", "block-dirty-bitmap-remove", node="n", name=b)
        d.end()
        print(f"\n{os.path.basename(binary)}, the same with scattered bits, ms (median, worst): " + "; ".join(
            f"{what} {statistics.median(t):.2f} ({max(t):.2f})" for what, t in times.items()), flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--daemon", required=True)
    parser.add_argument("--load", required=True)
    parser.add_argument("--reference")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    for binary in filter(None, (args.daemon, args.reference)):
        shapes(binary, args.load, args.rounds, args.names)
        if not args.names or "bitmaps" in args.names:
            bitmaps(binary, args.rounds)
            full_bitmaps(binary, args.load, args.rounds)


main()
