"""An NBD client that knows what its disk must contain. Run by the tests of mirrors with libnbd, a client that is not ours.

    writer.py URI MODEL SEED [DEPTH [OPS-A-SECOND [KINDS]]]

MODEL is a raw image of what the disk contains; it is read at the start and written at the end. Between, DEPTH requests
are kept in flight, no two on one block, and everything read is compared. Prints "writing" after the first round; ends
when its standard input does: the whole disk is then read and compared. Prints {"ops": N, "slowest": SECONDS}.
KINDS "sequence": numbered blocks are written one after another, for the test of one instant.
"""
import json
import random
import select
import struct
import sys
import time

import nbd

uri, model_path, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
depth = int(sys.argv[4]) if len(sys.argv) > 4 else 8
rate = float(sys.argv[5]) if len(sys.argv) > 5 else 0.0
kinds = sys.argv[6] if len(sys.argv) > 6 else "all"
BLOCK = 4096
DEAD = 20.0  # seconds after which a request without an answer is a failure

rng = random.Random(seed)
model = bytearray(open(model_path, "rb").read())
handle = nbd.NBD()
handle.connect_uri(uri)
size = handle.get_size()
assert size == len(model), f"the disk has {size} bytes, not {len(model)}"
blocks = size // BLOCK
busy = set()
looks = []
ops, slowest, in_flight = 0, 0.0, 0


def check(offset, got):
    want = model[offset:offset + len(got)]
    if got != want:
        at = next(i for i in range(len(got)) if got[i] != want[i])
        sys.exit(f"seed {seed}, op {ops}: wrong byte at {offset + at}: {got[at]:#x}, not {want[at]:#x}")


def done(error, name, first, count, then):
    global in_flight, slowest
    if error.value != 0:
        sys.exit(f"seed {seed}, op {ops}: {name} of blocks {first}+{count} failed with {error.value}")
    if then is not None and then():
        return 1
    in_flight -= 1
    busy.difference_update(range(first, first + count))
    return 1


def begin(kind=None):
    global in_flight, ops, slowest
    ops += 1
    count = rng.choice((1, 1, 1, 2, 4, 16, 64))
    first = rng.randrange(blocks - count)
    if not busy.isdisjoint(range(first, first + count)):
        return
    offset, length = first * BLOCK, count * BLOCK
    if rng.random() < 0.3:  # parts of blocks
        cut = rng.randrange(512, BLOCK, 512)
        offset, length = offset + cut, max(512, length - cut - 512)
    busy.update(range(first, first + count))
    in_flight += 1
    start = time.monotonic()
    kind = kind or rng.choices(("write", "read", "zero", "trim", "flush"), (55, 25, 10, 9, 1))[0]

    def finish(then=None):
        def call(error):
            global slowest
            slowest = max(slowest, time.monotonic() - start)
            return done(error, kind, first, count, then)
        return call

    if kind == "write":
        data = struct.pack("<QQ", rng.getrandbits(64), ops) * (length // 16)
        model[offset:offset + length] = data
        handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), offset, completion=finish())
    elif kind == "read":
        buf = nbd.Buffer(length)
        handle.aio_pread(buf, offset, completion=finish(lambda: check(offset, buf.to_bytearray())))
    elif kind == "zero":
        model[offset:offset + length] = bytes(length)
        flags = rng.choice((0, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FUA))
        handle.aio_zero(length, offset, completion=finish(), flags=flags)
    elif kind == "trim":
        # what a trimmed block holds is the server's choice; but it must stay that
        again = nbd.Buffer(length)

        def settle():
            model[offset:offset + length] = again.to_bytearray()

        def look():  # later: libnbd may not be called from its own callbacks
            looks.append(lambda: handle.aio_pread(again, offset, completion=finish(settle)))
            return True
        handle.aio_trim(length, offset, completion=finish(look))
    else:
        handle.aio_flush(completion=finish())


def sequence(number):
    """Block number % blocks gets `number`, alone in flight."""
    offset = number % blocks * BLOCK
    data = struct.pack("<Q", number) * (BLOCK // 8)
    handle.pwrite(data, offset)
    model[offset:offset + BLOCK] = data


told, last = False, time.monotonic()
begun = last
def poll():
    handle.poll(100)
    while looks:
        looks.pop()()


while not select.select([sys.stdin], [], [], 0)[0]:
    if rate and ops > (time.monotonic() - begun) * rate:
        time.sleep(0.001)
        if in_flight:
            poll()
        continue
    if kinds == "sequence":
        ops += 1
        sequence(ops)
    else:
        if in_flight < depth:
            begin(None if kinds == "all" else kinds)
        seen = in_flight
        if in_flight >= depth:
            poll()
        if in_flight < seen or in_flight < depth:
            last = time.monotonic()
        if time.monotonic() - last > DEAD:
            sys.exit(f"seed {seed}, op {ops}: no answer for {DEAD} s")
    if not told and ops > 50:
        print("writing", flush=True)
        told = True
while in_flight:
    poll()
    if time.monotonic() - last > 2 * DEAD:
        sys.exit(f"seed {seed}: {in_flight} requests are never answered")
handle.flush()
for offset in range(0, size, 1 << 20):
    check(offset, handle.pread(min(1 << 20, size - offset), offset))
handle.shutdown()
open(model_path, "wb").write(model)
print(json.dumps({"ops": ops, "slowest": round(slowest, 3)}))
