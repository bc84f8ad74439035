#!/usr/bin/env python3
"""Bitmaps of disks that are killed while they are written to: kill -9 of liveblkd under a client, restart, and the bitmap beside
what really changed.

    dirty.py [--daemon PATH] [--rounds N] [--seed S] [--only raw|qcow2|nbd|mirror]

For a raw file, a qcow2 image and a node behind an NBD server: after each kill the bitmap must be there, usable, recording, contain
every granule whose bytes differ from those when it was created or cleared, and beyond those that the client asked to be written no
more than the regions that may be hot. After a clean end nothing more than was asked for, and QEMU's tools must find the one in a qcow2
image as it was. Where another program wrote in between it must be inconsistent, with the reason told. Exit status 0: so it was.
"""
import argparse
import json
import os
import random
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time

import bitmaps
from bitmaps import Nbd, REPLY_LIMIT

SIZE = 256 << 20
GRANULARITY = 65536
# dirtylog::geometry_for: 128 regions of 1 MiB for a disk of this size, and as much again as is marked
HOT = 128 << 20
DEPTH = 16


class Daemon(bitmaps.Daemon):
    """One with a state directory."""

    def __init__(self, program, where):
        self.told = f"{where}/stderr"
        super().__init__(program, "d", where)

    def start(self):
        with open(self.told, "a") as err:
            super().start("--state-dir", f"{self.where}/state", stderr=err)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def quit(self):
        self.do("quit")
        assert self.process.wait(REPLY_LIMIT) == 0, "the daemon did not end well"

    def bitmap(self, name="b"):
        for node in self.do("query-named-block-nodes", flat=True):
            if node["node-name"] == "n":
                return next((b for b in node.get("dirty-bitmaps", []) if b.get("name") == name), None)
        raise AssertionError("the node is gone")


class Writer(threading.Thread):
    """Writes at random until the server goes away, DEPTH requests at a time; remembers what it asked for."""

    def __init__(self, path, seed, asked):
        super().__init__()
        self.r, self.asked = random.Random(seed), asked
        self.client = Nbd(path, "e")

    def run(self):
        s, inside = self.client.s, 0
        try:
            while True:
                while inside < DEPTH:
                    hot = self.r.random() < 0.8
                    length = self.r.choice([4096, 4096, 512, 65536, 200 << 10])
                    area = SIZE // 16 if hot else SIZE - length
                    at = self.r.randrange(0, area) // 512 * 512
                    self.asked.update(range(at // GRANULARITY, (at + length - 1) // GRANULARITY + 1))
                    body = self.r.randbytes(512) * (length // 512)
                    if self.r.random() < 0.03:
                        # so that what an image says of the writes before is in it when the daemon dies
                        s.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 3, inside, 0, 0))
                        inside += 1
                    s.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 1, inside, at, length) + body)
                    inside += 1
                _, error, _ = struct.unpack(">IIQ", self.client.take(16))
                assert error == 0, f"a write failed: {error}"
                inside -= 1
        except (OSError, AssertionError) as e:
            if "failed" in str(e):
                self.error = e


def content(path):
    c = Nbd(path, "e")
    out = bytearray()
    while len(out) < SIZE:
        n = min(16 << 20, SIZE - len(out))
        c.ask(0, len(out), n)
        out += c.take(n)
    c.close()
    return bytes(out)


def granules(uri, name):
    out = subprocess.run(["nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{name}", uri], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    found = set()
    for e in json.loads(out.stdout):
        if e["type"]:
            found.update(range(e["offset"] // GRANULARITY, (e["offset"] + e["length"] - 1) // GRANULARITY + 1))
    return found


def changed(a, b):
    return {g for g in range(SIZE // GRANULARITY)
            if a[g * GRANULARITY:(g + 1) * GRANULARITY] != b[g * GRANULARITY:(g + 1) * GRANULARITY]}


class Case:
    def __init__(self, args, kind, where, r):
        self.kind, self.where, self.r, self.server = kind, where, r, None
        self.image = f"{where}/disk.{'qcow2' if kind == 'qcow2' else 'raw'}"
        form = "qcow2" if kind == "qcow2" else "raw"
        subprocess.run(["qemu-img", "create", "-q", "-f", form, self.image, str(SIZE)], check=True)
        if kind == "nbd":
            below = f"{where}/below"
            self.server = subprocess.Popen(["qemu-nbd", "-f", "raw", "-t", "-k", below, "-e", "8", self.image])
            while not os.path.exists(below):
                time.sleep(0.01)
            node = {"driver": "nbd", "server": {"type": "unix", "path": below}}
        else:
            node = {"driver": form, "file": {"driver": "file", "filename": self.image}}
        self.d = Daemon(args.daemon, where)
        self.d.do("blockdev-add", node_name="n", **node)
        self.d.do("block-export-add", type="nbd", id="e", node_name="n", name="e", writable=True)
        self.d.do("block-dirty-bitmap-add", node="n", name="b", granularity=GRANULARITY, persistent=True)
        self.base, self.asked, self.extra = content(self.d.nbd), set(), 0

    def bits(self):
        self.d.do("block-export-add", type="nbd", id="look", node_name="n", name="look", writable=True, bitmaps=["b"])
        found = granules(f"nbd+unix:///look?socket={self.d.nbd}", "b")
        self.d.do("block-export-del", id="look", mode="hard")
        return found

    def compare(self, exact):
        b = self.d.bitmap()
        assert b, f"{self.kind}: the bitmap is gone"
        assert not b.get("inconsistent"), f"{self.kind}: the bitmap is inconsistent: {b}"
        assert b["recording"] and b["persistent"], f"{self.kind}: {b}"
        bits, real = self.bits(), changed(self.base, content(self.d.nbd))
        missing = real - bits
        assert not missing, f"{self.kind}: {len(missing)} changed granules are not marked: {sorted(missing)[:5]}"
        extra = len(bits - self.asked) * GRANULARITY
        assert extra <= (0 if exact else self.extra), f"{self.kind}: {extra} bytes marked that nobody asked to write, {self.extra} allowed"
        return len(bits), len(real), extra

    def round(self):
        writer = Writer(self.d.nbd, self.r.random(), self.asked)
        writer.start()
        time.sleep(self.r.uniform(0.02, 0.5))
        self.d.kill()
        writer.join(REPLY_LIMIT)
        assert not hasattr(writer, "error"), writer.error
        before = os.path.getsize(self.d.told)
        self.d.start()
        # regions that were in doubt stay marked, of every kill
        with open(self.d.told) as f:
            f.seek(before)
            doubt = sum(int(m) << 20 for m in re.findall(r"(\d+) MiB that were being written count as changed", f.read()))
        self.extra += doubt
        marked, real, extra = self.compare(False)
        # of what is hot, as much may be marked already
        assert doubt <= HOT + 2 * len(self.asked) * GRANULARITY + 2 * (self.extra - doubt), f"{doubt >> 20} MiB were in doubt"
        if self.r.random() < 0.4:
            self.d.do("block-dirty-bitmap-clear", node="n", name="b")
            self.base, self.asked, self.extra = content(self.d.nbd), set(), 0
        return marked, real, extra

    def clean(self):
        """A clean end: exact after, and QEMU's tools see what is in a qcow2 image."""
        self.d.do("block-dirty-bitmap-clear", node="n", name="b")
        self.base, self.asked, self.extra = content(self.d.nbd), set(), 0
        c = Nbd(self.d.nbd, "e")
        for _ in range(50):
            at = self.r.randrange(0, SIZE // 4096) * 4096
            self.asked.add(at // GRANULARITY)
            c.ask(1, at, 4096, self.r.randbytes(512) * 8)
        c.close()
        self.d.quit()
        if self.kind == "qcow2":
            info = json.loads(subprocess.run(["qemu-img", "info", "--output=json", self.image], capture_output=True, check=True).stdout)
            bitmaps = info["format-specific"]["data"]["bitmaps"]
            assert [(b["name"], b["flags"]) for b in bitmaps] == [("b", ["auto"])], bitmaps
            theirs = self.theirs()
            assert theirs == self.asked, "qemu-nbd sees another bitmap than was stored"
        self.d.start()
        self.compare(True)

    def theirs(self):
        path = f"{self.where}/qemu-nbd"
        p = subprocess.Popen(["qemu-nbd", "-r", "-f", "qcow2", "-B", "b", "-k", path, self.image])
        while not os.path.exists(path):
            assert p.poll() is None, "qemu-nbd does not open the image"
            time.sleep(0.01)
        found = granules(f"nbd+unix:///?socket={path}", "b")
        p.wait(REPLY_LIMIT)
        return found

    def foreign(self):
        """Another program writes between two lives."""
        if self.kind == "qcow2":
            # looking at it is no harm
            self.d.kill()
            subprocess.run(["qemu-io", "-r", "-f", "qcow2", "-c", "read 0 4k", self.image], check=True, stdout=subprocess.DEVNULL)
            subprocess.run(["qemu-img", "info", self.image], check=True, stdout=subprocess.DEVNULL)
            self.d.start()
            assert not self.d.bitmap().get("inconsistent"), "a reader cost us the bitmap"
            self.d.kill()
        elif self.kind == "raw":
            self.d.quit()
        else:
            return
        form = "qcow2" if self.kind == "qcow2" else "raw"
        subprocess.run(["qemu-io", "-f", form, "-c", "write -P 7 100M 4k", self.image], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["qemu-img", "info", self.image], check=True, stdout=subprocess.DEVNULL)
        self.d.start()
        b = self.d.bitmap()
        assert b and b.get("inconsistent"), f"{self.kind}: another program wrote, and the bitmap is believed: {b}"
        said = open(self.d.told).read()
        assert "another program" in said or "was changed" in said, f"nobody was told why: {said}"
        assert b["inconsistent-reason"] in said, f"the query does not say why: {b}"
        self.d.do("block-dirty-bitmap-remove", node="n", name="b")
        self.d.do("block-dirty-bitmap-add", node="n", name="b", granularity=GRANULARITY, persistent=True)
        self.d.kill()
        self.d.start()
        assert not self.d.bitmap().get("inconsistent"), "the new one was not kept"

    def end(self):
        self.d.kill()
        if self.server:
            self.server.kill()
            self.server.wait()


def mirror(args, where, r):
    """A mirror is killed at 90 %: a later life copies what was left, what was copied since the target was last flushed, and what is
    in doubt; source and target are equal in the end."""
    size = 512 << 20
    src, dst = f"{where}/src.raw", f"{where}/dst.raw"
    with open(src, "wb") as f:
        for _ in range(size >> 20):
            f.write(r.randbytes(1 << 20))
    subprocess.run(["qemu-img", "create", "-q", "-f", "raw", dst, str(size)], check=True)
    d = Daemon(args.daemon, where)
    try:
        for name, path in (("src", src), ("dst", dst)):
            d.do("blockdev-add", node_name=name, driver="raw", file={"driver": "file", "filename": path})
        d.do("block-export-add", type="nbd", id="e", node_name="src", name="e", writable=True)
        d.do("blockdev-mirror", job_id="m", device="src", target="dst", sync="full", verify="full", speed=200 << 20)
        client, cut = Nbd(d.nbd, "e"), size * 9 // 10
        while d.do("query-block-jobs")[0]["offset"] < cut:
            client.ask(1, r.randrange(0, 64) * 4096, 4096, r.randbytes(4096))
            time.sleep(0.01)
        d.kill()
        d.start()
        client = Nbd(d.nbd, "e")
        while not (job := d.do("query-block-jobs")[0])["ready"]:
            client.ask(1, r.randrange(0, 64) * 4096, 4096, r.randbytes(4096))
            time.sleep(0.01)
        told = d.do("query-jobs")[0].get("resumed", "")
        assert "goes on" in told, f"the job was started anew: {told!r}"
        # what was left; one step of 64 MiB and what is copied while it is being flushed; what the client wrote
        most = size - cut + (64 << 20) + (64 << 20)
        # all of it was compared as well
        copied = job["offset"] - size
        assert copied <= most, f"{copied >> 20} MiB were copied again, {most >> 20} MiB allowed"
        client.close()
        d.do("job-complete", id="m")
        while d.do("query-block-jobs"):
            time.sleep(0.01)
        d.quit()
        assert subprocess.run(["cmp", src, dst]).returncode == 0, "source and target differ"
        print(f"mirror of {size >> 20} MiB killed at 90 %: {copied >> 20} MiB more were copied, source and target are equal")
    finally:
        d.kill()


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--daemon", default="target/debug/liveblkd")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--seed", type=int, default=os.getpid())
    p.add_argument("--only", default="")
    args = p.parse_args()
    print(f"seed {args.seed}")
    for kind in ("raw", "qcow2", "nbd"):
        if args.only not in ("", kind):
            continue
        where = tempfile.mkdtemp(prefix="liveblk-dirty-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        case = None
        try:
            case = Case(args, kind, where, random.Random(f"{args.seed} {kind}"))
            figures = [case.round() for _ in range(args.rounds)]
            case.clean()
            case.foreign()
            most = max(f[2] for f in figures)
            print(f"{kind}: {args.rounds} kills, {sum(f[1] for f in figures)} changed granules, none missing; at most {most >> 20} MiB more")
        except Exception:
            print(f"seed {args.seed}, {kind}: {where}/stderr: {open(where + '/stderr').read() if os.path.exists(where + '/stderr') else ''}", file=sys.stderr)
            raise
        finally:
            if case:
                case.end()
            shutil.rmtree(where, ignore_errors=True)
    if args.only in ("", "mirror"):
        where = tempfile.mkdtemp(prefix="liveblk-dirty-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        try:
            mirror(args, where, random.Random(f"{args.seed} mirror"))
        finally:
            shutil.rmtree(where, ignore_errors=True)


if __name__ == "__main__":
    main()
