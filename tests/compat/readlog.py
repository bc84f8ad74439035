#!/usr/bin/env python3
"""Reads a log of blklogwrites (Linux's dm-log-writes format): readlog.py LOG [DISK]

Prints the superblock and every entry, with a hash of its data. With DISK it also replays the log onto a disk of zeroes as long as
DISK and says whether that gives DISK; exit status 1 if not. Only for whole logs: an entry that does not fit is an error.
"""
import hashlib
import struct
import sys

MAGIC = 0x6A736677736872
FLAGS = {1: "flush", 2: "fua", 4: "discard", 8: "mark"}

log = open(sys.argv[1], "rb").read()
magic, version, count, unit = struct.unpack_from("<QQQI", log)
if magic != MAGIC or version != 1:
    sys.exit(f"no log: magic {magic:x} version {version}")
print(f"{count} entries, sectors of {unit}")
disk = bytearray(len(open(sys.argv[2], "rb").read())) if len(sys.argv) > 2 else None
place = unit
for _ in range(count):
    sector, sectors, flags, rest = struct.unpack_from("<QQQQ", log, place)
    names = "+".join(name for bit, name in FLAGS.items() if flags & bit) or "write"
    data = b"" if flags & 4 else log[place + unit : place + unit + sectors * unit]
    if not flags & 4 and len(data) != sectors * unit:
        sys.exit(f"the data of the entry at {place} is cut off")
    print(f"{names} {sector * unit}+{sectors * unit} {hashlib.sha1(data).hexdigest()[:12]} {rest}")
    if disk is not None:
        disk[sector * unit : sector * unit + len(data)] = data
    place += unit + len(data)
if disk is not None:
    same = bytes(disk) == open(sys.argv[2], "rb").read()
    print("the log gives the disk" if same else "the log gives another disk")
    sys.exit(0 if same else 1)
