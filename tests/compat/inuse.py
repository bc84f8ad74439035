#!/usr/bin/env python3
"""Marks every bitmap of a qcow2 image as in use, as a daemon that was killed leaves it: inuse.py IMAGE"""
import struct
import sys

with open(sys.argv[1], "r+b") as f:
    image = f.read()
    at = struct.unpack_from(">I", image, 100)[0]
    while True:
        kind, size = struct.unpack_from(">II", image, at)
        if kind == 0x23852875:
            break
        at += 8 + (size + 7) // 8 * 8
    count, _, _, place = struct.unpack_from(">IIQQ", image, at + 8)
    for _ in range(count):
        flags, kind, granularity, name, extra = struct.unpack_from(">IBBHI", image, place + 12)
        f.seek(place + 12)
        f.write(struct.pack(">I", flags | 1))
        place += (24 + extra + name + 7) // 8 * 8
