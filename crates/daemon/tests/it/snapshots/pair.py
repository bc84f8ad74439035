"""Clients of several disks, one number after another: N goes to the first disk, then to the second, and so on, each write after
the answer to the one before. So at every instant the numbers on the disks, in order, never rise, and fall by one at most.

    pair.py URI...

Prints "writing" after the first round; ends when its standard input does, and prints the last number, which all disks then have.
"""
import select
import struct
import sys

import nbd

handles = []
for uri in sys.argv[1:]:
    handle = nbd.NBD()
    handle.connect_uri(uri)
    handles.append(handle)
number = 0
while True:
    number += 1
    for handle in handles:
        handle.pwrite(struct.pack("<Q", number) * 512, 0)
        # beyond what was ever written, so that tables are made, too
        handle.pwrite(struct.pack("<Q", number) * 512, 65536 * (1 + number % 100))
    if number == 1:
        print("writing", flush=True)
    if number % 8 == 0 and select.select([sys.stdin], [], [], 0)[0]:
        break
for handle in handles:
    handle.flush()
print(number, flush=True)
