"""Random histories of a replicated pair, and the oracle: what each read may return.

A history is drawn from its seed alone, so all pairs live through the same one. The oracle holds, for every sector, what the primary has and
what the secondary shows: its own write, else the last checkpoint. Every write has a number, which is in each of its sectors. Requests of
one batch are in flight together: a read may return what was there before or any write of the batch; afterwards what was open is read, and
from then on nothing else may be there.
"""

import random
import struct

from nbdio import FLUSH, NO_HOLE, READ, TRIM, WRITE, ZERO
from pairs import DISKS, SECTOR, SIZE

SECTORS = SIZE // SECTOR
WORDS = SECTOR // 4


class Violation(Exception):
    """A byte that must not be there, or a request that must not fail."""


def fill(number, sectors):
    return struct.pack("<I", number) * (WORDS * sectors)


TORN = -1


def numbers(data, where, torn=()):
    """The number in each sector of `data`; TORN for those of `torn` (counted from the first) that are a mixture."""
    out = memoryview(data).cast("I")[::WORDS].tolist()
    if data == b"".join(struct.pack("<I", v) * WORDS for v in out):
        return out
    for i, v in enumerate(out):
        if data[i * SECTOR:(i + 1) * SECTOR] != struct.pack("<I", v) * WORDS:
            if i not in torn:
                raise Violation(f"{where}: a sector is a mixture of two writes")
            out[i] = TORN
    return out


class Op:
    __slots__ = ("side", "kind", "disk", "at", "n", "number", "flags")

    def __init__(self, side, kind, disk, at, n, number, flags=0):
        self.side, self.kind, self.disk, self.at, self.n, self.number, self.flags = side, kind, disk, at, n, number, flags

    def span(self):
        return range(self.at, self.at + self.n)

    def __str__(self):
        name = {READ: "read", WRITE: "write", FLUSH: "flush", TRIM: "discard", ZERO: "zeroes"}[self.kind]
        return f"{self.side} {name} {self.n} sectors at {self.at} of disk {self.disk}"


MIX = [("P", WRITE, 34), ("P", ZERO, 5), ("P", TRIM, 2), ("P", READ, 14), ("P", FLUSH, 2),
       ("S", WRITE, 12), ("S", ZERO, 3), ("S", TRIM, 2), ("S", READ, 24), ("S", FLUSH, 2)]
KINDS, WEIGHTS = [m[:2] for m in MIX], [m[2] for m in MIX]
LENGTHS = [1, 1, 3, 8, 8, 8, 16, 40, 128, 256]


class Batch:
    def __init__(self, ops, checkpoint=None):
        self.ops, self.checkpoint = ops, checkpoint  # checkpoint: None, "after", "during"


def history(seed, operations):
    """Batches with so many operations together."""
    rng, number, done = random.Random(f"history {seed}"), 0, 0
    while done < operations:
        ops = []
        close = rng.random() < 0.5  # requests that meet
        disk, centre = rng.randrange(DISKS), rng.randrange(SECTORS)
        for _ in range(1 if rng.random() < 0.5 else rng.randint(2, 8)):
            side, kind = rng.choices(KINDS, WEIGHTS)[0]
            n = rng.choice(LENGTHS)
            if not close:
                disk, at = rng.randrange(DISKS), rng.randrange(SECTORS)
            else:
                at = centre + rng.randrange(-64, 64)
            if rng.random() < 0.3:
                at -= at % 8
            at = max(0, min(at, SECTORS - n))
            number += 1
            ops.append(Op(side, kind, disk, at, n, number, rng.choice([0, NO_HOLE]) if kind == ZERO else 0))
        done += len(ops)
        checkpoint = rng.choice(["after", "during"]) if rng.random() < 0.05 else None
        yield Batch(ops, checkpoint)


class Side:
    """What one front shows: a number for each sector of each disk."""

    def __init__(self, name):
        self.name = name
        self.now = [[0] * SECTORS for _ in range(DISKS)]
        # Sectors whose content depends on which of several overlapping writes came last, and what it may be (F8).
        self.doubt = [{} for _ in range(DISKS)]

    def take(self, other):
        self.now = [list(d) for d in other.now]
        self.doubt = [dict(d) for d in other.doubt]


class Oracle:
    """Plays batches on a pair and compares. Where both sides are of QEMU or the primary is, overlapping writes may end differently on the
    two disks (F8): that is counted, and a violation anywhere else."""

    def __init__(self, pair):
        self.pair, self.f8_allowed = pair, pair.p_qemu
        self.p, self.s = Side("primary"), Side("secondary")
        self.figures = {"operations": 0, "reads": 0, "checkpoints": 0, "of them under load": 0, "F8 sectors": 0}

    def check(self, side, disk, at, found, allowed_more=None):
        """`found`: numbers read at `at`; `allowed_more`: {sector: numbers} of writes in flight."""
        expected = side.now[disk][at:at + len(found)]
        self.figures["reads"] += 1
        if found == expected:
            return
        for i, (v, e) in enumerate(zip(found, expected)):
            if v == TORN:
                self.figures["torn reads of QEMU"] = self.figures.get("torn reads of QEMU", 0) + 1
                continue
            if v == e or (allowed_more and v in allowed_more.get(at + i, ())):
                continue
            if v in side.doubt[disk].get(at + i, ()):
                self.figures["F8 sectors"] += 1
                side.now[disk][at + i] = v
                del side.doubt[disk][at + i]
                continue
            raise Violation(f"sector {at + i} of disk {disk} on the {side.name} holds write {v}, not {e}")

    def play(self, batch):
        during = batch.checkpoint == "during" and self.pair.marks_in_band
        before = [list(d) for d in self.p.now] if during else None
        if during:
            self.pair.begin_checkpoint()
        sent, clients = [], {"P": self.pair.p, "S": self.pair.s}
        for op in batch.ops:
            data = fill(op.number, op.n) if op.kind == WRITE else b""
            at, length = (0, 0) if op.kind == FLUSH else (op.at * SECTOR, op.n * SECTOR)
            sent.append((clients[op.side][op.disk].send(op.kind, at, length, data, op.flags), op))
        answers = {(side, n): c.collect() for side, all in clients.items() for n, c in enumerate(all) if c.lengths}
        if during:
            self.pair.end_checkpoint()
        self.figures["operations"] += len(sent)
        # who writes where
        writes = {"P": [{} for _ in range(DISKS)], "S": [{} for _ in range(DISKS)]}
        for op in batch.ops:
            if op.kind in (WRITE, ZERO):
                into, value = writes[op.side][op.disk], op.number if op.kind == WRITE else 0
                for b in op.span():
                    into.setdefault(b, []).append(value)
        seen_s = [dict(w) for w in writes["S"]]
        if during:
            # the secondary's view changes meanwhile, to a primary that is being written to
            for d in range(DISKS):
                for b in {b for op in batch.ops if op.disk == d for b in op.span()}:
                    seen_s[d][b] = seen_s[d].get(b, []) + writes["P"][d].get(b, []) + [before[d][b]]
        for handle, op in sent:
            error, data = answers[op.side, op.disk][handle]
            if error:
                raise Violation(f"{op}: error {error}")
            if op.kind == READ:
                # QEMU's reads and writes of one sector at a time are those of the page cache, which may mix them
                mixed = writes["P"][op.disk] if op.side == "P" and self.pair.p_qemu else ()
                found = numbers(data, op, [b - op.at for b in mixed])
                side, more = (self.p, writes["P"]) if op.side == "P" else (self.s, seen_s)
                self.check(side, op.disk, op.at, found, more[op.disk])
        self.settle(self.p, writes["P"])
        if during:
            self.figures["of them under load"] += 1
            self.switched(before, writes)
        else:
            self.settle(self.s, writes["S"])
        if batch.checkpoint:
            self.figures["checkpoints"] += 1
            if not during:
                self.pair.checkpoint()
                self.s.take(self.p)

    def settle(self, side, writes):
        """Writes of the batch have ended: where several met, the front says which came last."""
        for d, into in enumerate(writes):
            for b, values in into.items():
                side.doubt[d].pop(b, None)
                if len(set(values)) == 1:
                    side.now[d][b] = values[0]
                    continue
                found = self.read(side, d, b, 1)[0]
                if found not in values:
                    raise Violation(f"sector {b} of disk {d} on the {side.name}: {found} is none of the writes {values}")
                side.now[d][b] = found
                if side is self.p and self.f8_allowed:
                    side.doubt[d][b] = set(values)

    def switched(self, before, writes):
        """A checkpoint came while the batch was in flight: any of its writes, on either side, may be in the new view or not."""
        own = self.s.now
        self.s.take(self.p)
        for d in range(DISKS):
            for b in set(writes["P"][d]) | set(writes["S"][d]):
                allowed = {before[d][b], *writes["P"][d].get(b, ()), *writes["S"][d].get(b, ())}
                found = self.read(self.s, d, b, 1)[0]
                if found not in allowed:
                    raise Violation(f"sector {b} of disk {d} on the secondary after a checkpoint: {found}, not one of {allowed} (own {own[d][b]})")
                self.s.now[d][b] = found

    def read(self, side, disk, at, n):
        client = (self.pair.p if side is self.p else self.pair.s)[disk]
        return numbers(client.read(at * SECTOR, n * SECTOR), f"{side.name}, disk {disk}")

    def whole(self, side):
        """Every byte of a front."""
        for d in range(DISKS):
            self.check(side, d, 0, self.read(side, d, 0, SECTORS))

    def disks(self, side, process):
        """Every byte of the disks beneath, which must be the same as the front then."""
        for d in range(DISKS):
            self.check(side, d, 0, numbers(process.raw(d), f"disk {d} of the {side.name}"))

    def alike(self):
        """Both disks are the same, byte for byte (undo and NBD, when all is quiet)."""
        for d in range(DISKS):
            p = numbers(self.pair.primary.raw(d), "primary's disk")
            s = numbers(self.pair.secondary.raw(d), "secondary's disk")
            for b, (x, y) in enumerate(zip(p, s)):
                if x != y:
                    if y not in self.p.doubt[d].get(b, ()):
                        raise Violation(f"sector {b} of disk {d}: {x} on the primary's disk, {y} on the secondary's")
                    self.figures["F8 sectors"] += 1
