#!/usr/bin/env python3
"""A mirror that is cut at 90 %, and how much more it copies until it is ready (issue E, show 3).

    resume.py [--daemon PATH] [--mib N] [--dir DIR] [--only killed|link|target]

Three ways: the daemon is killed (kill -9) and started again on its state directory; the link to the target is cut, and comes back
after two seconds (`on-link-loss`); the target's server is killed and started again. A client writes to 256 KiB of the disk all the time. In
the end source and target are compared byte by byte. Wanted: what was left at the cut and at most 2 % of the disk more (1.2 GiB of
10 GiB), but at least two flushes' worth: the target is flushed every 64 MiB. DIR needs room for two such disks. Exit status 0: so it was.
"""
import argparse
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "compat"))
import bitmaps  # noqa: E402
from bitmaps import Nbd, REPLY_LIMIT  # noqa: E402

MIB = 1 << 20
# What is flushed at once, what is copied while that goes on, and what is in flight.
STEPS = 2 * 64 * MIB + 32 * MIB
PATIENCE = 1800.0


class Daemon(bitmaps.Daemon):
    def start(self):
        with open(f"{self.where}/stderr", "a") as err:
            super().start("--state-dir", f"{self.where}/state", stderr=err)


class Client(threading.Thread):
    """Writes a little all the time, until it is told to stop or its server goes away."""

    def __init__(self, path):
        super().__init__(daemon=True)
        self.nbd, self.over, self.r = Nbd(path, "e"), False, random.Random(5)

    def run(self):
        try:
            while not self.over:
                self.nbd.ask(1, self.r.randrange(0, 64) * 4096, 4096, self.r.randbytes(4096))
                time.sleep(0.01)
            self.nbd.close()
        except (OSError, AssertionError):
            pass

    def stop(self):
        self.over = True
        self.join(REPLY_LIMIT)


class Wire:
    """A unix socket behind which another one is; can be cut."""

    def __init__(self, path, to):
        self.path, self.to, self.pairs = path, to, []
        self.open()

    def open(self):
        if os.path.exists(self.path):
            os.unlink(self.path)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen(8)
        threading.Thread(target=self.accept, args=(self.listener,), daemon=True).start()

    def accept(self, listener):
        while True:
            try:
                a, _ = listener.accept()
            except OSError:
                return
            b = socket.socket(socket.AF_UNIX)
            try:
                b.connect(self.to)
            except OSError:
                # nobody is there: whoever dialled finds out, and dials again
                a.close()
                continue
            self.pairs.append((a, b))
            for x, y in ((a, b), (b, a)):
                threading.Thread(target=self.pump, args=(x, y), daemon=True).start()

    @staticmethod
    def pump(x, y):
        buffer = bytearray(4 * MIB)
        try:
            while n := x.recv_into(buffer):
                y.sendall(memoryview(buffer)[:n])
        except OSError:
            pass
        for s in (x, y):
            try:
                s.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def cut(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for pair in self.pairs:
            for s in pair:
                try:
                    s.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass
        self.pairs.clear()


def fill(path, size):
    """Bytes of which no 64 KiB are like others, made quickly."""
    block = bytearray(random.Random(1).randbytes(4 * MIB))
    with open(path, "wb") as f:
        for n in range(size // len(block)):
            for at in range(0, len(block), 65536):
                block[at:at + 8] = (n * 64 + at // 65536).to_bytes(8, "little")
            f.write(block)


def serve(where, image, path):
    server = subprocess.Popen(["qemu-nbd", "-f", "raw", "-t", "-e", "16", "-k", path, image])
    while not os.path.exists(path):
        assert server.poll() is None, "qemu-nbd does not start"
        time.sleep(0.01)
    return server


def job(d):
    jobs = d.do("query-block-jobs")
    assert jobs, f"the mirror has ended: {d.do('query-job-log')['jobs'][-1:]}"
    return jobs[0]


def one(args, way, where):
    size = args.mib * MIB
    src, dst = f"{where}/src.raw", f"{where}/dst.raw"
    subprocess.run(["qemu-img", "create", "-q", "-f", "raw", dst, str(size)], check=True)
    server = wire = None
    d = Daemon(args.daemon, "d", where)
    try:
        d.do("blockdev-add", node_name="src", driver="raw", file={"driver": "file", "filename": src})
        if way == "killed":
            d.do("blockdev-add", node_name="dst", driver="raw", file={"driver": "file", "filename": dst})
        else:
            server = serve(where, dst, f"{where}/far")
            wire = Wire(f"{where}/near", f"{where}/far")
            d.do("blockdev-add", node_name="dst", driver="nbd", server={"type": "unix", "path": f"{where}/near"})
        d.do("block-export-add", type="nbd", id="e", node_name="src", name="e", writable=True)
        client = Client(d.nbd)
        client.start()
        begun = time.monotonic()
        more = {} if way == "killed" else {"on_link_loss": {"wait": 600}}
        d.do("blockdev-mirror", job_id="m", device="src", target="dst", sync="full", **more)
        while (at := job(d)["offset"]) < size * 9 // 10:
            time.sleep(0.002)
        if way == "killed":
            d.end()
            client.stop()
            d.start()
            assert "goes on" in d.do("query-jobs")[0]["resumed"], "it was begun anew"
            client = Client(d.nbd)
            client.start()
        elif way == "link":
            wire.cut()
            time.sleep(2)
            wire.open()
        else:
            server.kill()
            server.wait()
            os.unlink(f"{where}/far")
            time.sleep(2)
            server = serve(where, dst, f"{where}/far")
        limit = time.monotonic() + PATIENCE
        while not job(d)["ready"]:
            assert time.monotonic() < limit, f"not ready: {job(d)}"
            time.sleep(0.02)
        client.stop()
        took = time.monotonic() - begun
        d.do("job-complete", id="m")
        while d.do("query-block-jobs"):
            time.sleep(0.01)
        entry = d.do("query-job-log")["jobs"][-1]
        assert entry["outcome"] == "completed", entry
        # what a life copied is in its own log entry
        copied = entry["copied"] - (0 if way == "killed" else at)
        d.do("quit")
        assert d.process.wait(REPLY_LIMIT) == 0
        if server:
            server.terminate()
            server.wait()
            server = None
        assert subprocess.run(["cmp", src, dst]).returncode == 0, "source and target differ"
        most = size - at + max(size // 50, STEPS)
        print(f"{way}: {args.mib} MiB cut at {at // MIB} MiB; {copied / MIB:.0f} MiB more were copied ({most // MIB} allowed), "
              f"equal in the end; {took:.0f} s until ready", flush=True)
        assert copied <= most, f"{way}: {copied // MIB} MiB more, {most // MIB} MiB allowed"
    finally:
        if wire:
            wire.cut()
        d.end()
        if server:
            server.kill()
            server.wait()
        for name in ("state", "dst.raw"):
            path = f"{where}/{name}"
            shutil.rmtree(path) if os.path.isdir(path) else os.path.exists(path) and os.unlink(path)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--daemon", default="target/debug/liveblkd")
    p.add_argument("--mib", type=int, default=10240)
    p.add_argument("--dir", default="/var/tmp")
    p.add_argument("--only", default="")
    args = p.parse_args()
    args.daemon = os.path.abspath(args.daemon)
    where = tempfile.mkdtemp(prefix="liveblk-resume-", dir=args.dir)
    try:
        fill(f"{where}/src.raw", args.mib * MIB)
        for way in ("killed", "link", "target"):
            if args.only in ("", way):
                one(args, way, where)
    except Exception:
        said = f"{where}/stderr"
        print(open(said).read() if os.path.exists(said) else "", file=sys.stderr)
        raise
    finally:
        shutil.rmtree(where, ignore_errors=True)


if __name__ == "__main__":
    main()
