#!/usr/bin/env python3
"""Processor time that the daemon spends on a 4 KiB request over vhost-user-blk, beside qemu-storage-daemon's.

    cost.py --daemon PATH [--reference qemu-storage-daemon] [--rounds N]

Requests are put into the ring 64 at a time, as a busy guest does, on a raw file in /dev/shm; each read is checked. The driver
here is slow, so the figure is the daemons' own time (utime and stime from /proc), from which follows what one core can do.
The two take turns, and the medians are printed.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import front as v

SIZE, DEPTH, BATCHES = 64 << 20, 64, 400


def spent(pid):
    with open(f"/proc/{pid}/stat") as f:
        fields = f.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(binary, kind):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        stamp = os.urandom(4096)
        with open(f"{path}/disk", "wb") as f:
            f.write(stamp * (SIZE // 4096))
        process = subprocess.Popen([
            binary, "--blockdev", f"driver=file,filename={path}/disk,node-name=f", "--blockdev", "driver=raw,file=f,node-name=n",
            "--export", f"type=vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path={path}/s,writable=on"])
        while not os.path.exists(f"{path}/s"):
            time.sleep(0.01)
        front, [q] = v.connect(f"{path}/s", 1, size=256, memory=v.Memory(16 << 20))
        m, began = front.memory, None
        base = m.used
        for batch in range(BATCHES + 20):
            if batch == 20:
                began = spent(process.pid)
            m.used = base
            made = []
            for _ in range(DEPTH):
                sector = 8 * random.randrange(SIZE // 4096)
                more = {"room": 4096} if kind == v.IN else {"out": stamp}
                made.append(q.submit(kind, sector, kick=False, **more))
            q.kick()
            q.wait(DEPTH)
            assert all(m.read(s, 1) == b"\0" for _, _, s in made)
            assert kind != v.IN or all(m.read(at, 4096) == stamp for _, at, _ in made)
        used = spent(process.pid) - began
        front.close()
        process.terminate()
        process.wait()
        return used / (BATCHES * DEPTH) * 1e6


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--daemon", required=True)
    parser.add_argument("--reference", default="qemu-storage-daemon")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    for name, kind in (("read", v.IN), ("write", v.OUT)):
        got = {args.daemon: [], args.reference: []}
        for n in range(args.rounds):
            for binary in sorted(got, reverse=bool(n % 2)):
                got[binary].append(measure(binary, kind))
        for binary, us in got.items():
            middle = statistics.median(us)
            print(f"{name} 4K: {os.path.basename(binary)} {middle:.2f} us of processor ({min(us):.2f}-{max(us):.2f}), "
                  f"{1e6 / max(middle, 0.01):.0f} IOPS per core")


main()
