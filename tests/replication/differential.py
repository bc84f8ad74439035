#!/usr/bin/env python3
"""The same random histories on pairs of QEMU, of liveblkd, and mixed, each held against one oracle.

    differential.py --daemon PATH [--ops N] [--seed S] [--pair NAME ...] [--only WORD] [--no-scenes] [--where DIR]

Pairs: `qemu` (both sides qemu-system), `ours-qemu` and `qemu-ours` (primary-secondary, over NBD), `nbd` (two liveblkd as QEMU composes them),
`native-redo` and `native-undo` (two liveblkd over their own wire). On each, N operations in histories of about a thousand: writes, zeroes,
discards, reads and flushes on both sides of two disks, alone and overlapping in flight, with checkpoints (over the own wire also
while requests are in flight); each history ends with a comparison of both disks, a failover under whose merge the secondary goes on, and an old
primary that writes on. Then scenes with the failures F2 to F8 of the specification. What a QEMU pair is known to do wrong is
counted under its number and must not be seen elsewhere: wherever liveblkd is the side that could prevent it, it is a violation.
Exit status 0: no violation.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback

import scenes
from nbdio import Hung, READ, Refused, WRITE
from oracle import SECTORS, Batch, Op, Oracle, Violation, fill, history
from pairs import DISKS, NAMES, SECTOR, make, until

PER_HISTORY = 1000


def play(name, seed, operations, where, daemon):
    """One history; its figures."""
    pair = make(name, where, daemon)
    try:
        oracle = Oracle(pair)
        for batch in history(seed, operations):
            oracle.play(batch)
        oracle.whole(oracle.p)
        oracle.whole(oracle.s)
        ending(oracle, random.Random(f"ending {seed}"))
        return oracle.figures
    finally:
        pair.end()


def ending(oracle, rng):
    pair = oracle.pair
    if pair.native:
        # what is acknowledged as received need not be on the secondary's disk yet; what is committed will be
        pair.checkpoint()
        oracle.s.take(oracle.p)
        until("the end of the apply", lambda: pair.info(pair.secondary)["buffer"]["pending"] == 0)
    oracle.alike()
    oracle.disks(oracle.p, pair.primary)
    # an epoch that is not to come to be, with own writes over it
    last = [Op(rng.choice("PPS"), WRITE, rng.randrange(DISKS), rng.randrange(SECTORS - 64), rng.randint(1, 64), 1_000_000 + i) for i in range(30)]
    oracle.play(Batch(last))
    pair.fail_over()
    oracle.whole(oracle.s)
    foreign = write_on(pair, rng)
    # served while it merges
    for i in range(20):
        op = Op("S", WRITE, rng.randrange(DISKS), rng.randrange(SECTORS - 8), 8, 2_000_000 + i)
        look = Op("S", READ, rng.randrange(DISKS), rng.randrange(SECTORS - 8), 8, 0)
        try:
            oracle.play(Batch([op, look]))
        except Violation:
            if not (pair.s_qemu and foreign):
                raise
            oracle.figures["F2 histories"] = 1
            return
    pair.merged()
    found = foreign_sectors(oracle, foreign)
    if found and not pair.s_qemu:
        raise Violation(f"the old primary's writes {found[:5]} reached the promoted disk (F2)")
    if found:
        oracle.figures["F2 histories"] = 1
        return
    oracle.whole(oracle.s)
    oracle.disks(oracle.s, pair.secondary)


def write_on(pair, rng):
    """The old primary does not know that another was promoted; numbers of what it writes."""
    numbers = []
    for i in range(10):
        number, at = 3_000_000 + i, rng.randrange(SECTORS - 64)
        try:
            pair.p[i % DISKS].do(WRITE, at * SECTOR, 64 * SECTOR, fill(number, 64))
        except (OSError, Hung):
            # over the own wire it is told that it is fenced
            pass
        numbers.append(number)
    return set(numbers)


def foreign_sectors(oracle, foreign):
    return [(d, b) for d in range(DISKS) for b, v in enumerate(oracle.read(oracle.s, d, 0, SECTORS)) if v in foreign]


def run(name, arguments, where):
    """All of one pair; its figures, and what went wrong."""
    total, bad, begin = {}, [], time.monotonic()
    left, number = arguments.ops, 0
    while left > 0:
        seed, operations = f"{arguments.seed}.{number}", min(PER_HISTORY, left)
        try:
            figures = play(name, seed, operations, f"{where}/{name}-{number}", arguments.daemon)
        except (Violation, Hung, OSError, Refused) as e:
            bad.append(f"{name}, history {seed}: {type(e).__name__}: {e}")
            if arguments.verbose:
                traceback.print_exc()
            shutil.rmtree(f"{where}/{name}-{number}", ignore_errors=True)
            figures = {}
        for key, value in figures.items():
            total[key] = total.get(key, 0) + value
        left, number = left - operations, number + 1
    total["histories"] = number
    total["seconds"] = round(time.monotonic() - begin)
    return total, bad


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--daemon", required=True)
    parser.add_argument("--ops", type=int, default=100_000)
    parser.add_argument("--seed", default=str(os.getpid()))
    parser.add_argument("--pair", action="append", choices=NAMES)
    parser.add_argument("--only", help="scenes with this word only, and no histories")
    parser.add_argument("--no-scenes", action="store_true")
    parser.add_argument("--where")
    parser.add_argument("--verbose", action="store_true")
    arguments = parser.parse_args()
    arguments.daemon = os.path.abspath(arguments.daemon)
    print(f"seed {arguments.seed}", flush=True)
    # whoever is told to end ends its daemons
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    where, wrong = tempfile.mkdtemp(prefix="replication-", dir=arguments.where), []
    try:
        for name in arguments.pair or NAMES:
            if not arguments.only:
                total, bad = run(name, arguments, where)
                wrong += bad
                told = ", ".join(f"{v} {k}" for k, v in total.items())
                print(f"{name}: {told}, {len(bad)} violations", flush=True)
            for scene in [] if arguments.no_scenes else scenes.ALL:
                if arguments.only and arguments.only not in scene.__name__:
                    continue
                told = scenes.play(scene, name, arguments, where)
                print(f"{name}: {scene.__name__}: {told}", flush=True)
                if told.startswith("VIOLATION"):
                    wrong.append(f"{name}: {scene.__name__}: {told}")
    finally:
        shutil.rmtree(where, ignore_errors=True)
    for line in wrong:
        print(line)
    print(f"{len(wrong)} violations in all")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
