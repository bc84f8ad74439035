"""The failures F2 to F8 of the specification (reference/replication.md section 0), on any pair: what comes of them.

Each scene says what it saw: "right", or "as QEMU: …" for what is known of QEMU, which only a side that is QEMU may be the reason of;
anything else is a violation. (F2 and F8 are looked for in every history as well.)
"""

import random
import shutil
import traceback

from nbdio import FLUSH, Hung, Refused, WRITE
from oracle import SECTORS, Batch, Op, Oracle, Violation, fill
from pairs import DISKS, make, until


class Known(Exception):
    """What QEMU is known to do."""


def play(scene, name, arguments, where):
    place = f"{where}/{name}-{scene.__name__}"
    rng = random.Random(f"{scene.__name__} {arguments.seed}")
    pairs = []

    def start(**more):
        pairs.append(make(name, place, arguments.daemon, **more))
        return pairs[-1]

    try:
        told = scene(start, name, rng)
        return f"right: {told}"
    except Known as e:
        return f"as QEMU: {e}"
    except (Violation, Hung, OSError, Refused) as e:
        if arguments.verbose:
            traceback.print_exc()
        return f"VIOLATION: {type(e).__name__}: {e}"
    finally:
        for pair in pairs:
            pair.end()
        shutil.rmtree(place, ignore_errors=True)


def once(errno, sector):
    """The first write to that sector fails."""
    return {"inject-error": [{"event": "none", "iotype": "write", "errno": errno, "sector": sector, "once": True}]}


def some_writes(rng, side, first, count, sectors=64):
    return [Op(side, WRITE, i % DISKS, rng.randrange(SECTORS - sectors), sectors, first + i) for i in range(count)]


def one_by_one(oracle, ops):
    for op in ops:
        oracle.play(Batch([op]))


def known_or_wrong(qemu, what):
    raise Known(what) if qemu else Violation(what)


def f3_buffer_full(start, name, rng):
    """The buffer takes nothing for a moment: no checkpoint may be made of what came through."""
    native = name.startswith("native-")
    if native:
        # the disk under the secondary's store takes no more at one place
        rules = {"disk1": once(28, 1024)}
    else:
        # the first cluster of data of the hidden disk
        rules = {"hidden0": once(28, 640)}
    pair = start(rules=rules)
    oracle = Oracle(pair)
    ops = some_writes(rng, "P", 1, 20) + [Op("P", WRITE, 1, 1000, 64, 100)]
    told = "the checkpoints hold everything"
    # the second time there is something to be kept
    for more in (0, 1000):
        one_by_one(oracle, [Op("P", WRITE, op.disk, op.at, op.n, op.number + more) for op in ops])
        try:
            pair.checkpoint()
            oracle.s.take(oracle.p)
        except Refused:
            told = "a checkpoint was refused, the last one stays"
    oracle_is_right(oracle, pair.s_qemu, "a checkpoint of a disk that is not the primary's")
    if not native and told.startswith("the checkpoints hold"):
        raise Violation("a write was refused and the checkpoint was not")
    return told


def oracle_is_right(oracle, may_be_wrong, what):
    try:
        oracle.whole(oracle.s)
    except (Violation, OSError) as e:
        known_or_wrong(may_be_wrong, f"{what} ({e})")


def f4_one_of_two_disks_fails(start, name, rng):
    """A checkpoint over two disks of which one fails: all at the new one, or all at the last."""
    if name.startswith("native-"):
        rules = {"disk1": once(5, 1024)}
    else:
        # emptying it fails (QEMU empties it at the start as well, which is to succeed)
        ours = {"inject-error": [{"event": "cluster_free", "errno": 5}]}
        event = "empty_image_prepare"
        qemus = {"inject-error": [{"event": event, "errno": 5, "state": 2}], "set-state": [{"event": event, "state": 1, "new_state": 2}]}
        rules = {"active1": qemus if name in ("qemu", "ours-qemu") else ours}
    pair = start(rules=rules)
    oracle = Oracle(pair)
    one_by_one(oracle, some_writes(rng, "P", 1, 10) + [Op("P", WRITE, 1, 1000, 64, 100)])
    # own writes, so that there is something to be emptied on both
    one_by_one(oracle, [Op("S", WRITE, n, 3000, 64, 50 + n) for n in range(DISKS)])
    try:
        pair.checkpoint()
        new = True
    except Refused:
        new = False
    seen = []
    for d in range(DISKS):
        try:
            found = oracle.read(oracle.s, d, 0, SECTORS)
        except OSError as e:
            known_or_wrong(pair.s_qemu, f"after the failed checkpoint disk {d} answers with {e}")
        seen.append("new" if found == oracle.p.now[d] else "old" if is_old(found, oracle.s.now[d]) else "neither")
    if seen not in (["new", "new"], ["old", "old"]):
        known_or_wrong(pair.s_qemu, f"the disks are at {seen}")
    return f"both disks are at the {seen[0]} checkpoint, the command {'succeeded' if new else 'failed'}"


def is_old(found, view):
    """At the checkpoint before (which holds zeroes here), own writes on it or not."""
    return all(v == o or v == 0 for v, o in zip(found, view))


def f5_secondary_killed(start, name, rng):
    """The secondary is killed in the middle of an epoch and comes back: it is at its checkpoint."""
    pair = start(durable=True)
    oracle = Oracle(pair)
    one_by_one(oracle, some_writes(rng, "P", 1, 20))
    pair.checkpoint()
    oracle.s.take(oracle.p)
    at = [list(d) for d in oracle.s.now]
    one_by_one(oracle, some_writes(rng, "P", 100, 20))
    for client in pair.s:
        client.close()
    pair.secondary.kill()
    pair.revive()
    if pair.native:
        pair.follow()
        if rng.random() < 0.5:
            until("the catch-up", pair.in_sync)
            pair.checkpoint()
            at, told = oracle.p.now, "it caught up"
        else:
            pair.fail_over()
            # the primary may have made a checkpoint with it before that
            at, told = None, "it took over"
    elif pair.s_qemu:
        # there is nothing else that could be done with it
        pair.secondary.qmp.do("xen-set-replication", enable=True, primary=False)
        told = "started again"
    else:
        pair.fail_over()
        told = "it took over"
    pair.open_secondary()
    found = [oracle.read(oracle.s, d, 0, SECTORS) for d in range(DISKS)]
    allowed = [at] if at else [oracle.s.now, oracle.p.now]
    if found not in allowed:
        known_or_wrong(pair.s_qemu, "what it shows is no checkpoint but half an epoch")
    return f"{told}, at a checkpoint"


def f6_merge_fails(start, name, rng):
    """The merge after a failover meets an error: it is told, and can be tried again."""
    place = 3000
    rules = {"disk0": once(5, place)}
    pair = start(rules=rules)
    oracle = Oracle(pair)
    clear = [Op("P", WRITE, i % DISKS, rng.randrange(2800), 64, 1 + i) for i in range(10)]
    one_by_one(oracle, clear)
    pair.checkpoint()
    oracle.s.take(oracle.p)
    one_by_one(oracle, [Op("S", WRITE, 0, place - 10, 40, 50)])
    pair.fail_over()
    until("the error of the merge", lambda: pair.trouble(pair.secondary) or pair.is_merged())
    if pair.is_merged():
        raise Violation("the merge did not meet the failing sector")
    oracle.whole(oracle.s)
    one_by_one(oracle, [Op("S", WRITE, 1, 500, 8, 60)])
    pair.fail_over()
    try:
        until("the merge", pair.is_merged, 3.0)
    except Hung:
        known_or_wrong(pair.s_qemu, "the second command succeeded, and nothing is merged")
    oracle.whole(oracle.s)
    oracle.disks(oracle.s, pair.secondary)
    return "served meanwhile, told, merged by the second command"


def f7_peer_frozen(start, name, rng):
    """The secondary is stopped: the primary's client and its monitor go on."""
    pair = start()
    pair.secondary.freeze()
    client = pair.p[0]
    client.s.settimeout(4.0)
    try:
        for kind in (WRITE, FLUSH):
            data = fill(7, 64) if kind == WRITE else b""
            client.do(kind, 0, len(data), data)
        pair.primary.qmp.do("query-named-block-nodes", flat=True)
    except Hung:
        known_or_wrong(pair.p_qemu, "the primary's client hangs")
    finally:
        pair.secondary.thaw()
    if not pair.trouble(pair.primary):
        raise Violation("the primary does not say that it is alone")
    return "the client went on, the status says so"


def f8_overlapping_writes(start, name, rng):
    """Large overlapping writes in flight: both disks end alike."""
    pair = start()
    oracle = Oracle(pair)
    for round in range(200):
        ops = [Op("P", WRITE, round % DISKS, rng.randrange(1024), rng.choice([512, 1024, 2048]), round * 8 + i + 1) for i in range(6)]
        oracle.play(Batch(ops))
    if pair.native:
        pair.checkpoint()
        oracle.s.take(oracle.p)
        until("the end of the apply", lambda: pair.info(pair.secondary)["buffer"]["pending"] == 0)
    oracle.alike()
    if oracle.figures["F8 sectors"]:
        known_or_wrong(pair.p_qemu, f"{oracle.figures['F8 sectors']} sectors differ")
    return "200 rounds, both disks alike"


ALL = [f3_buffer_full, f4_one_of_two_disks_fails, f5_secondary_killed, f6_merge_fails, f7_peer_frozen, f8_overlapping_writes]
