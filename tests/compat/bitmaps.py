#!/usr/bin/env python3
"""Random histories of persistent bitmaps, handed back and forth between liveblkd and qemu-storage-daemon.

    bitmaps.py [--daemon PATH] [--count N] [--seed S]

A history is one image. In each round one of the two daemons opens it, does random things to bitmaps and disk, and closes it
(or is killed). A model in here says what each bitmap must hold: it is compared, bit by bit by its hash, before and after each
round, whoever opened the image, and as `nbdinfo --map` shows it to a client. Between rounds `qemu-img info` and `qemu-img check` look
at the image, and `qemu-img bitmap` takes its turn. Exit status 0: no difference.
"""
import argparse
import hashlib
import json
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import tempfile

REPLY_LIMIT = 30.0  # seconds: a daemon that hangs shall fail the test, not hang it


class Nbd:
    """As much of a client as writes need."""

    def __init__(self, path, export):
        self.s = socket.socket(socket.AF_UNIX)
        self.s.settimeout(REPLY_LIMIT)
        self.s.connect(path)
        self.take(18)
        self.s.sendall(struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 1, len(export)) + export.encode())
        self.take(10)

    def take(self, n):
        out, at = bytearray(n), 0
        while at < n:
            got = self.s.recv_into(memoryview(out)[at:])
            if not got:
                raise AssertionError("the server hung up")
            at += got
        return bytes(out)

    def ask(self, command, at, length, data=b"", flags=0):
        self.s.sendall(struct.pack(">IHHQQI", 0x25609513, flags, command, 1, at, length) + data)
        _, error, _ = struct.unpack(">IIQ", self.take(16))
        assert error == 0, f"command {command} at {at}+{length}: error {error}"

    def close(self):
        self.s.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 2, 1, 0, 0))
        self.s.close()


class Daemon:
    def __init__(self, program, name, where):
        self.program, self.name, self.where = program, name, where
        self.start()

    def start(self, *options, stderr=subprocess.DEVNULL):
        self.qmp, self.nbd = f"{self.where}/{self.name}.qmp", f"{self.where}/{self.name}.nbd"
        for old in (self.qmp, self.nbd):
            if os.path.exists(old):
                os.unlink(old)
        self.events = []
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.qmp)
        listener.listen(1)
        self.process = subprocess.Popen(
            [self.program, *options, "--chardev", f"socket,id=c0,path={self.qmp}", "--monitor", "c0",
             "--nbd-server", f"addr.type=unix,addr.path={self.nbd}"], stderr=stderr)
        listener.settimeout(REPLY_LIMIT)
        connection, _ = listener.accept()
        connection.settimeout(REPLY_LIMIT)
        # for reading alone: Python's file for both forgets what it has read ahead when something is written
        self.connection, self.lines = connection, connection.makefile("r", encoding="utf-8")
        self.lines.readline()
        self.do("qmp_capabilities")

    def do(self, command, **arguments):
        arguments = {k.replace("_", "-"): v for k, v in arguments.items()}
        self.connection.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while True:
            answer = json.loads(self.lines.readline())
            if "error" in answer:
                raise AssertionError(f"{self.name}: {command} {arguments}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]
            self.events.append(answer["event"])

    def wait_event(self, name):
        while name not in self.events:
            self.events.append(json.loads(self.lines.readline())["event"])
        self.events.clear()

    def delete_export(self, export):
        self.do("block-export-del", id=export, mode="hard")
        self.wait_event("BLOCK_EXPORT_DELETED")

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.start()

    def end(self):
        self.process.kill()
        self.process.wait()


class Bits:
    """A bitmap of the model."""

    def __init__(self, granularity, persistent, enabled):
        self.g, self.persistent, self.enabled = granularity, persistent, enabled
        self.inconsistent, self.set = False, set()

    def mark(self, at, length, size):
        if self.enabled and length:
            self.set.update(range(at // self.g, (min(at + length, size) - 1) // self.g + 1))

    def ranges(self, size):
        """What is set, as merged (start, end) pairs."""
        out = []
        for i in sorted(self.set):
            start, end = i * self.g, min((i + 1) * self.g, size)
            if out and out[-1][1] == start:
                start = out.pop()[0]
            out.append((start, end))
        return out

    def merge(self, other, size):
        if other is self:
            return
        for start, end in other.ranges(size):
            self.set.update(range(start // self.g, (end - 1) // self.g + 1))

    def sha(self, size):
        n = -(-size // self.g)
        packed = bytearray(-(-n // 64) * 8)
        for i in self.set:
            packed[i // 8] |= 1 << (i % 8)
        return hashlib.sha256(packed).hexdigest()


class History:
    def __init__(self, r, where, daemons):
        self.r, self.where, self.daemons = r, where, daemons
        self.image = f"{where}/image.qcow2"
        self.size = r.choice([1 << 20, 3 << 20, 64 << 20, 1 << 30]) + r.choice([0, 512, 65536])
        self.bitmaps = {}
        # the reference takes its time over a large disk of tiny clusters
        options = f"cluster_size={r.choice(['4k', '64k', '64k'] + ['512'] * (self.size < 4 << 20))}"
        # The reference dies when it shrinks an image with an external data file.
        self.fragile = r.random() < 0.15
        if self.fragile:
            options += f",data_file={where}/image.raw"
        if r.random() < 0.2:
            options += ",lazy_refcounts=on"
        self.tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, self.image, str(self.size))
        self.log = [f"create {options} {self.size}"]

    def tool(self, *line):
        out = subprocess.run(line, capture_output=True, text=True)
        assert out.returncode == 0, f"{' '.join(line)}: {out.stdout}{out.stderr}"
        return out.stdout

    def round(self):
        d = self.r.choice(self.daemons)
        self.log.append(f"open by {d.name}")
        d.do("blockdev-add", driver="qcow2", node_name="n", discard="unmap",
             file={"driver": "file", "filename": self.image})
        self.compare(d)
        d.do("block-export-add", type="nbd", id="e", node_name="n", name="e", writable=True)
        client = Nbd(d.nbd, "e")
        for _ in range(self.r.randrange(1, 12)):
            self.step(d, client)
        self.compare(d)
        client.close()
        if self.r.random() < 0.4:
            self.show(d)
        if self.r.random() < 0.04:
            self.log.append("kill")
            in_image = {b["name"] for b in self.info().get("bitmaps", [])}
            d.kill()
            self.bitmaps = {n: b for n, b in self.bitmaps.items() if n in in_image}
            for b in self.bitmaps.values():
                b.inconsistent, b.enabled, b.set = True, False, set()
            self.tool("qemu-img", "check", "-q", "-r", "all", self.image)
            self.between()
            return
        d.delete_export("e")
        if self.r.random() < 0.2:
            self.resize(d)
        d.do("blockdev-del", node_name="n")
        self.bitmaps = {n: b for n, b in self.bitmaps.items() if b.persistent}
        self.look()
        if self.r.random() < 0.5:
            self.between()

    def look(self):
        """What `qemu-img` says of the closed image."""
        self.tool("qemu-img", "check", "-q", self.image)
        want = {(n, b.g, b.inconsistent, not b.inconsistent and b.enabled) for n, b in self.bitmaps.items()}
        have = {(b["name"], b["granularity"], "in-use" in b["flags"], "auto" in b["flags"] and "in-use" not in b["flags"])
                for b in self.info().get("bitmaps", [])}
        assert want == have, f"qemu-img info: want {want}, have {have}"

    def between(self):
        """`qemu-img bitmap` changes a bitmap of the closed image."""
        r = self.r
        sound = sorted(n for n, b in self.bitmaps.items() if not b.inconsistent)
        what = r.choice(["add", "remove", "clear", "enable", "disable", "merge", "merge"])
        words = [f"--{what}"]
        if what == "add":
            name = r.choice(["a", "b", "q", "ü"])
            if name in self.bitmaps:
                return
            b = self.bitmaps[name] = Bits(1 << r.choice([9, 16, 20, 31]), True, r.random() < 0.7)
            words += ["-g", str(b.g)] + ["--disable"] * (not b.enabled)
            if sound and r.random() < 0.5:
                other = r.choice(sound)
                words += ["--merge", other]
                b.merge(self.bitmaps[other], self.size)
        elif what == "remove":
            if not self.bitmaps or r.random() < 0.5:
                return
            name = r.choice(sorted(self.bitmaps))
            del self.bitmaps[name]
        else:
            if not sound:
                return
            name = r.choice(sound)
            b = self.bitmaps[name]
            if what == "merge":
                other = r.choice(sound)
                words.append(other)
                b.merge(self.bitmaps[other], self.size)
            elif what == "clear":
                b.set = set()
            else:
                b.enabled = what == "enable"
        self.log.append(f"qemu-img bitmap {' '.join(words)} {name[:3]}")
        self.tool("qemu-img", "bitmap", "-f", "qcow2", *words, self.image, name)
        self.look()

    def show(self, d):
        """What a client of the daemon sees of a bitmap."""
        sound = sorted(n for n, b in self.bitmaps.items() if not b.inconsistent)
        if not sound:
            return
        name = self.r.choice(sound)
        self.log.append(f"nbdinfo {name[:3]}")
        d.do("block-export-add", type="nbd", id="m", node_name="n", name="m", writable=True, bitmaps=[name])
        context = f"qemu:dirty-bitmap:{name}"
        rows = json.loads(self.tool("nbdinfo", "--json", f"--map={context}", f"nbd+unix:///m?socket={d.nbd}"))
        d.delete_export("m")
        have, at = [], 0
        for row in rows:
            assert row["offset"] == at, f"nbdinfo: {name[:3]} in {d.name}: nothing said of {at}"
            at += row["length"]
            if row["type"] & 1:
                start = have.pop()[0] if have and have[-1][1] == row["offset"] else row["offset"]
                have.append((start, at))
        want = self.bitmaps[name].ranges(self.size)
        assert at == self.size and have == want, f"nbdinfo: {name[:3]} in {d.name}: want {want[:9]}, have {have[:9]}"

    def info(self):
        out = self.tool("qemu-img", "info", "-U", "--output=json", self.image)
        return json.loads(out)["format-specific"]["data"]

    def resize(self, d):
        if any(b.inconsistent for b in self.bitmaps.values()):
            return
        size = self.size + self.r.choice([-(self.size // 3 // 512 * 512), 65536, 1 << 20, 512])
        if d.name == "qsd" and size < self.size and self.fragile:
            return
        self.log.append(f"resize {self.size} -> {size}")
        d.do("block_resize", node_name="n", size=size)
        self.size = size
        for b in self.bitmaps.values():
            b.set = {i for i in b.set if i * b.g < size}
        self.compare(d)

    def compare(self, d):
        node = next(n for n in d.do("query-named-block-nodes", flat=True) if n["node-name"] == "n")
        have = {b["name"]: b for b in node.get("dirty-bitmaps", [])}
        assert set(have) == set(self.bitmaps), f"bitmaps: want {sorted(self.bitmaps)}, have {sorted(have)}"
        for name, b in self.bitmaps.items():
            h = have[name]
            got = (h["granularity"], h["recording"], h["persistent"], h.get("inconsistent", False), h["count"])
            want = (b.g, b.enabled, b.persistent, b.inconsistent, len(b.set) * b.g)
            assert got == want, f"{name} in {d.name}: want {want}, have {got}"
            if not b.inconsistent:
                sha = d.do("x-debug-block-dirty-bitmap-sha256", node="n", name=name)["sha256"]
                assert sha == b.sha(self.size), f"{name} in {d.name}: other bits"

    def step(self, d, client):
        r = self.r
        sound = [n for n, b in self.bitmaps.items() if not b.inconsistent]
        what = r.choice(["add", "remove", "clear", "enable", "disable", "merge"] + ["write"] * 8)
        if what == "write":
            return self.write(client)
        if what == "add":
            name = r.choice(["a", "b", "c", "x" * 200, "ü", "d"])
            if name in self.bitmaps:
                return
            g = 1 << r.choice([9, 12, 16, 16, 20, 31])
            b = Bits(g, r.random() < 0.8, r.random() < 0.8)
            self.log.append(f"add {name[:3]} {g} {b.persistent} {b.enabled}")
            d.do("block-dirty-bitmap-add", node="n", name=name, granularity=g, persistent=b.persistent,
                 disabled=not b.enabled)
            self.bitmaps[name] = b
            return
        if what == "remove" and self.bitmaps and r.random() < 0.5:
            name = r.choice(sorted(self.bitmaps))
            self.log.append(f"remove {name[:3]}")
            d.do("block-dirty-bitmap-remove", node="n", name=name)
            del self.bitmaps[name]
            return
        if not sound or what == "remove":
            return
        name = r.choice(sorted(sound))
        b = self.bitmaps[name]
        self.log.append(f"{what} {name[:3]}")
        if what == "merge":
            other = r.choice(sorted(sound))
            d.do("block-dirty-bitmap-merge", node="n", target=name, bitmaps=[other])
            b.merge(self.bitmaps[other], self.size)
            return
        d.do(f"block-dirty-bitmap-{what}", node="n", name=name)
        if what == "clear":
            b.set = set()
        else:
            b.enabled = what == "enable"

    def write(self, client):
        r = self.r
        kind = r.choice(["write", "write", "zero", "trim"])
        at = r.randrange(self.size)
        length = min(r.choice([1, 512, 4096, 70000, 300000]), self.size - at)
        if kind != "write" or r.random() < 0.7:
            at -= at % 512
            length = min(-(-length // 512) * 512, self.size - at)
        self.log.append(f"{kind} {at}+{length}")
        if kind == "write":
            client.ask(1, at, length, bytes([r.randrange(1, 256)]) * length)
        else:
            client.ask(6 if kind == "zero" else 4, at, length)
        for b in self.bitmaps.values():
            b.mark(at, length, self.size)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--daemon", default="liveblkd")
    p.add_argument("--count", type=int, default=20)
    p.add_argument("--seed", type=int, default=None)
    o = p.parse_args()
    first = o.seed if o.seed is not None else random.randrange(1 << 30)
    print(f"{o.count} histories from seed {first}", flush=True)
    where = tempfile.mkdtemp(prefix="liveblk-bitmaps-")
    daemons, failed, rounds, turns, maps = [], 0, 0, 0, 0
    try:
        daemons = [Daemon(o.daemon, "liveblkd", where), Daemon("qemu-storage-daemon", "qsd", where)]
        for seed in range(first, first + o.count):
            history = History(random.Random(seed), where, daemons)
            try:
                for _ in range(history.r.randrange(2, 7)):
                    history.round()
                    rounds += 1
            except (AssertionError, OSError, ValueError, StopIteration) as e:
                failed += 1
                print(f"seed {seed}: {e}\n  " + "\n  ".join(history.log), flush=True)
                for d in daemons:
                    d.kill()
            turns += sum(line.startswith("qemu-img bitmap") for line in history.log)
            maps += sum(line.startswith("nbdinfo") for line in history.log)
    finally:
        for d in daemons:
            d.end()
        shutil.rmtree(where, ignore_errors=True)
    print(f"{o.count} histories, {rounds} rounds, {turns} turns of qemu-img, {maps} maps by nbdinfo, {failed} with differences")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
