#!/usr/bin/env python3
"""An application on an NBD disk: it keeps a ledger, and can tell whether a ledger is whole.

    ledger.py write SOCKET   numbers entries, each written when the one before was acknowledged; ends when the disk is gone
    ledger.py check SOCKET   says how far the ledger goes; fails if any entry before that is missing or damaged

Entry n is in slot n modulo SLOTS. So a disk at any single instant holds the newest SLOTS entries without a gap, and a disk
that is a mixture of two instants does not.
"""

import socket
import struct
import sys
import zlib

SLOT, SLOTS = 4096, 1000


class Disk:
    def __init__(self, path):
        self.s = socket.socket(socket.AF_UNIX)
        self.s.connect(path)
        self.get(18)
        self.s.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, 4) + b"disk")
        self.get(10)

    def get(self, n):
        parts = b""
        while len(parts) < n:
            part = self.s.recv(n - len(parts))
            if not part:
                raise ConnectionError("the server went away")
            parts += part
        return parts

    def request(self, kind, offset, length, data=b""):
        self.s.sendall(struct.pack(">IHHQQI", 0x25609513, 0, kind, 1, offset, length) + data)
        _, error, _ = struct.unpack(">IIQ", self.get(16))
        if error:
            raise OSError(error, f"request at {offset} failed")
        return self.get(length) if kind == 0 else b""


def entry(n):
    body = b"entry %d " % n
    body += bytes([n % 251]) * (SLOT - 4 - len(body))
    return body + struct.pack(">I", zlib.crc32(body))


def newest(disk):
    slots = [disk.request(0, i * SLOT, SLOT) for i in range(SLOTS)]
    number = lambda s: int(s.split(b" ")[1]) if s.startswith(b"entry ") else 0
    last = max(map(number, slots))
    for n in range(max(1, last - SLOTS + 1), last + 1):
        if slots[n % SLOTS] != entry(n):
            raise SystemExit(f"BROKEN: entry {n} of {last} is missing or damaged")
    return last


def write(path):
    disk = Disk(path)
    n = newest(disk)
    print(f"ledger: going on after entry {n}", flush=True)
    try:
        while True:
            disk.request(1, (n + 1) % SLOTS * SLOT, SLOT, entry(n + 1))
            n += 1
            if n % 100 == 0:
                disk.request(3, 0, 0)
    except ConnectionError:
        print(f"ledger: the server went away; {n} entries were acknowledged", flush=True)
    except OSError as e:
        print(f"ledger: {e}; {n} entries were acknowledged", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(sys.argv[2])
    else:
        print(f"ledger: whole, up to entry {newest(Disk(sys.argv[2]))}")
