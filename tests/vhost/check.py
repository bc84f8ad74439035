#!/usr/bin/env python3
"""What a front end and a guest see of liveblkd's vhost-user-blk export, well-behaved and hostile, and across kill -9.

    check.py --daemon PATH [NAME...]

Each function below whose name begins with `test_` is a test; it gets a Daemon factory and an empty directory.
"""

import os
import random
import socket
import struct
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import cases
import front as v
import qmp

SIZE = 16 << 20
BINARY = None


class Daemon(qmp.Daemon):
    """A running daemon with a raw disk `n` over file `f`, exported as e0 at s0."""

    def __init__(self, path, export="num-queues=2,writable=on", extra=(), node="driver=raw,file=f,node-name=n"):
        disk = os.path.join(path, "disk")
        if not os.path.exists(disk):
            with open(disk, "wb") as f:
                f.truncate(SIZE)
        self.socket = os.path.join(path, "s0")
        options = [
            *extra, "--blockdev", f"driver=file,filename={disk},node-name=f,discard=unmap", "--blockdev", node,
            "--export", f"type=vhost-user-blk,id=e0,node-name=n,addr.type=unix,addr.path={self.socket},{export}",
        ]
        super().__init__(BINARY, path, options)


def test_reads_and_writes(path):
    d = Daemon(path)
    front, (q, other) = v.connect(d.socket, 2)
    assert front.number(v.GET_QUEUE_NUM) == 2
    assert q.write(8, b"a" * 4096) == v.OK
    assert q.read(8, 4096) == b"a" * 4096 and q.read(0, 512) == bytes(512)
    assert other.read(8, 4096, indirect=True, split=512) == b"a" * 4096
    assert other.write(16, b"b" * 1536, indirect=True, split=100) == v.OK
    assert q.read(15, 2560) == b"a" * 512 + b"b" * 1536 + bytes(512)
    assert q.run(v.FLUSH)[0] == v.OK
    status, name = q.run(v.GET_ID, room=20)
    assert (status, name) == (v.OK, b"vhost_user_blk" + bytes(6))
    assert q.run(99)[0] == v.UNSUPP
    # past the end, no whole sector, an address that wraps around
    assert q.read(SIZE // 512, 512) == v.IOERR and q.read(SIZE // 512 - 1, 1024) == v.IOERR
    assert q.read(0, 100) == v.IOERR and q.read(1 << 60, 512) == v.IOERR and q.read((1 << 64) - 1, 512) == v.IOERR
    assert q.read(SIZE // 512 - 1, 512) == bytes(512)
    # longer than one buffer of the pool
    big = os.urandom(5 << 20)
    front.close()
    front, [q] = v.connect(d.socket, 1, memory=v.Memory(12 << 20))
    assert q.write(2048, big) == v.OK and q.read(2048, len(big), split=1 << 20) == big
    assert q.stop() == 2
    d.quit()
    with open(os.path.join(path, "disk"), "rb") as f:
        f.seek(2048 * 512)
        assert f.read(len(big)) == big


def test_discard_and_zeroes(path):
    d = Daemon(path, node="driver=raw,file=f,node-name=n,discard=unmap")
    _, [q] = v.connect(d.socket, 1, memory=v.Memory(12 << 20))
    assert q.write(0, b"x" * (1 << 20)) == v.OK
    piece = lambda sector, count, flags=0: struct.pack("<QII", sector, count, flags)
    assert q.run(v.WRITE_ZEROES, out=piece(1, 8))[0] == v.OK
    assert q.read(0, 512 * 10) == b"x" * 512 + bytes(4096) + b"x" * 512
    assert q.run(v.WRITE_ZEROES, out=piece(1024, 1024, 1))[0] == v.OK
    assert q.read(1023, 1024) == b"x" * 512 + bytes(512)
    assert q.run(v.DISCARD, out=piece(0, 512))[0] == v.OK
    used = os.stat(os.path.join(path, "disk")).st_blocks
    assert used <= 512, f"{used} blocks are still allocated"
    for bad in (piece(0, 8, 1), piece(0, 8) * 2, piece(0, 8)[:-1]):
        assert q.run(v.DISCARD, out=bad)[0] == v.UNSUPP, bad
    assert q.run(v.WRITE_ZEROES, out=piece(0, 8, 2))[0] == v.UNSUPP
    assert q.run(v.DISCARD, out=piece(0, 32769))[0] == v.IOERR
    assert q.run(v.DISCARD, out=piece(SIZE // 512 - 1, 2))[0] == v.IOERR
    d.quit()


def test_read_only_and_blocks(path):
    d = Daemon(path, export="logical-block-size=4096")
    front, [q] = v.connect(d.socket, 1)
    assert front.features & v.F_RO
    config = front.config()
    capacity, block = struct.unpack_from("<Q", config)[0], struct.unpack_from("<I", config, 20)[0]
    assert (capacity, block, front.number(v.GET_QUEUE_NUM)) == (SIZE // 512, 4096, 1)
    assert q.read(8, 4096) == bytes(4096) and q.read(1, 4096) == v.IOERR and q.read(0, 512) == v.IOERR
    assert q.write(0, bytes(4096)) == v.IOERR
    assert q.run(v.DISCARD, out=struct.pack("<QII", 0, 8, 0))[0] == v.IOERR
    d.quit()


def test_many_at_once(path):
    """Deep queues, all orders, with and without event index; every answer's data is checked."""
    seed = int(os.environ.get("LIVEBLK_SEED", random.randrange(1 << 32)))
    print(f"seed {seed}")
    r = random.Random(seed)
    d = Daemon(path)
    for without in (0, v.F_EVENT_IDX, v.F_EVENT_IDX | v.F_INDIRECT):
        front, queues = v.connect(d.socket, 2, size=128, memory=v.Memory(32 << 20), without=without)
        if without:
            assert not front.features & v.F_EVENT_IDX
        model = bytearray(queues[0].read(0, 1 << 20))
        tables = [None, 1000, 700] if front.features & v.F_INDIRECT else [None]
        parts = lambda: (lambda n: {"split": n, "indirect": bool(n)})(r.choice(tables))
        for _ in range(40):
            start, open_ = front.memory.used, []
            for slot in r.sample(range(128), r.randrange(1, 24)):
                q, at, size = r.choice(queues), slot * 8192, 512 * r.randrange(1, 17)
                if r.random() < 0.5:
                    data = r.randbytes(size)
                    open_.append((q, *q.submit(v.OUT, at // 512, out=data, kick=False, **parts()), None))
                    model[at:at + size] = data
                else:
                    room = q.submit(v.IN, at // 512, room=size, kick=False, **parts())
                    open_.append((q, *room, bytes(model[at:at + size])))
            for q in queues:
                q.kick()
            for q in queues:
                q.wait(sum(1 for o in open_ if o[0] is q))
            for q, _, data, status, want in open_:
                assert front.memory.read(status, 1) == b"\0"
                assert want is None or front.memory.read(data, len(want)) == want
            front.memory.used = start
        assert [q.stop() for q in queues] == [q.next for q in queues]
        front.close()
    d.quit()


def test_write_cache(path):
    d = Daemon(path)
    front, [q] = v.connect(d.socket, 1)
    assert front.config(32, 1) == b"\x01", "there is a cache to flush"
    assert front.tell(v.SET_CONFIG, struct.pack("<III", 32, 1, 0) + b"\0") == 0
    assert front.config(32, 1) == b"\0" and q.write(0, b"w" * 512) == v.OK
    assert front.tell(v.SET_CONFIG, struct.pack("<III", 0, 1, 0) + b"\0") == 1
    d.quit()
    os.remove(os.path.join(path, "s0")) if os.path.exists(os.path.join(path, "s0")) else None
    d = Daemon(path, export="writable=on,writethrough=on")
    front, _ = v.connect(d.socket, 1)
    assert front.config(32, 1) == b"\0"
    d.quit()


def test_exports_come_and_go(path):
    d = Daemon(path)
    second = os.path.join(path, "s1")
    address = {"type": "unix", "path": second}
    add = lambda **more: d.ask("block-export-add", type="vhost-user-blk", id="e1", node_name="n", **{"addr": address, **more})
    refuse = lambda want, **more: (lambda got: (got.get("error", {}).get("desc") == want) or sys.exit(f"{got}"))(add(**more))
    refuse("num-queues must be greater than 0", num_queues=0)
    for size in (3, 256, 513, 4 << 20):
        refuse("parameter logical-block-size must be a power of 2 between 512 and 2097152", logical_block_size=size)
    refuse("Only socket address types 'unix' and 'fd' are supported", addr={"type": "inet", "host": "a", "port": "1"})
    refuse(f"Failed to bind socket to {path}/no/s: No such file or directory", addr={"type": "unix", "path": f"{path}/no/s"})
    refuse("Parameter 'serial' is unexpected", serial="x")
    assert add(logical_block_size=0) == {"return": {}}
    exports = [(e["id"], e["type"], e["node-name"]) for e in d.qmp("query-block-exports")]
    assert exports == [("e1", "vhost-user-blk", "n"), ("e0", "vhost-user-blk", "n")]
    assert "error" in d.ask("blockdev-del", node_name="n")
    d.qmp("block-export-del", id="e1")
    d.event("BLOCK_EXPORT_DELETED", id="e1")
    assert not os.path.exists(second)
    front, [q] = v.connect(d.socket, 1)
    got = d.ask("block-export-del", id="e0")
    assert got["error"]["desc"] == "export 'e0' still in use", got
    assert q.read(0, 512) == bytes(512)
    d.qmp("block-export-del", id="e0", mode="hard")
    assert front.ended()
    d.event("BLOCK_EXPORT_DELETED", id="e0")
    d.qmp("blockdev-del", node_name="n")
    d.quit()


def test_resize_is_told(path):
    d = Daemon(path)
    front, [q] = v.connect(d.socket, 1)
    ours, theirs = socket.socketpair()
    ours.settimeout(30)
    assert front.tell(v.SET_BACKEND_REQ_FD, b"", [theirs.fileno()]) == 0
    theirs.close()
    d.qmp("block_resize", node_name="n", size=2 * SIZE)
    assert struct.unpack("<III", ours.recv(100)) == (2, 1, 0)
    assert struct.unpack("<Q", front.config(0, 8))[0] == 2 * SIZE // 512
    assert q.write(SIZE // 512, b"n" * 512) == v.OK
    d.quit()


def test_writes_are_logged(path):
    """While the guest moves to another host, each page of it that we write to is marked, and no other."""
    d = Daemon(path)
    front, [q] = v.connect(d.socket, 1, memory=v.Memory(16 << 20))
    assert q.write(0, b"w" * 65536) == v.OK
    log = front.log_writes((v.GUEST + (16 << 20)) // 4096 // 8)

    def marked():
        """Pages that were marked since the last look."""
        found = {8 * n + bit for n, byte in enumerate(log[:]) for bit in range(8) if byte & 1 << bit}
        log[:] = bytes(len(log))
        return found

    def pages(at, size):
        return set(range(at // 4096, (at + size - 1) // 4096 + 1))

    m, ring = front.memory, pages(q.used, 6 + 8 * q.size)
    m.take(0, 4096)
    assert marked() == set()
    # the used ring is asked for by itself
    head, data, status = q.submit(v.IN, 0, room=20480)
    q.wait()
    assert marked() == pages(data, 20480) | pages(status, 1)
    assert q.log_used(True) == 0
    m.take(0, 4096)
    head, data, status = q.submit(v.IN, 0, room=4096)
    q.wait()
    assert q.stop() == 3 and m.read(data, 4096) == b"w" * 4096
    assert marked() == pages(data, 4096) | pages(status, 1) | ring
    # of a write only the status
    assert q.start(3) == [0] * 7
    assert q.log_used(True) == 0
    m.take(0, 4096)
    head, data, status = q.submit(v.OUT, 8, out=b"x" * 4096)
    q.wait()
    got = marked()
    assert pages(status, 1) <= got <= pages(status, 1) | ring, got
    # and no more when nobody wants to know
    assert q.log_used(False) == 0
    assert front.tell(v.SET_FEATURES, struct.pack("<Q", front.features)) == 0
    marked()
    assert q.read(8, 4096) == b"x" * 4096 and marked() == set()
    # what is not in the log ends the connection, for the guest would lose it on its way
    assert len(front.log_writes(8)) == 8
    q.submit(v.IN, 0, room=512)
    assert front.ended()
    front, [q] = v.connect(d.socket, 1)
    assert q.read(8, 512) == b"x" * 512
    d.quit()


def test_mirror_pivots_unseen(path):
    """The disk is mirrored and the target takes its place while requests run; both are equal to what was written."""
    target = os.path.join(path, "target")
    with open(target, "wb") as f:
        f.truncate(SIZE)
    d = Daemon(path)
    d.qmp("blockdev-add", driver="file", filename=target, node_name="t")
    _, [q] = v.connect(d.socket, 1, memory=v.Memory(16 << 20))
    wrote = {}

    def some(count):
        for _ in range(count):
            at = random.randrange(SIZE // 4096)
            wrote[at] = os.urandom(4096)
            assert q.write(at * 8, wrote[at]) == v.OK

    some(200)
    for mode in ("background", "write-blocking"):
        d.qmp("blockdev-mirror", job_id="m", device="n", target="t", sync="full", copy_mode=mode)
        # a while only: a guest that writes faster than a background mirror copies keeps it from being ready
        for _ in range(10):
            some(20)
            d.qmp("query-block-jobs")
        d.event("BLOCK_JOB_READY")
        some(50)
        d.qmp("block-job-complete" if mode == "write-blocking" else "block-job-cancel", device="m")
        for _ in range(10):
            some(5)
            d.qmp("query-block-jobs")
        d.event("BLOCK_JOB_COMPLETED")
    assert [e["node-name"] for e in d.qmp("query-block-exports")] == ["t"]
    some(100)
    for at, data in wrote.items():
        assert q.read(at * 8, 4096) == data
    d.quit()
    with open(target, "rb") as f:
        for at, data in wrote.items():
            f.seek(at * 4096)
            assert f.read(4096) == data


def hostile(d, do, queue_stops=True, without=0):
    """Lets `do(queue, memory)` do its worst on a connection of its own: that queue stops and says so, or the connection ends; the
    other queue of the same front end and the daemon go on."""
    front, (q, other) = v.connect(d.socket, 2, without=without)
    do(q, front.memory)
    if queue_stops:
        assert q.failed(), "the queue goes on"
        assert q.answers() == []
    assert other.read(0, 512) == bytes(512)
    # the guest is reset: the same front end can start the queue again
    q.stop()
    front.close()
    front, [q] = v.connect(d.socket, 1)
    assert q.read(0, 512) == bytes(512)
    front.close()


def test_hostile_rings(path):
    d = Daemon(path)
    end = v.GUEST + (4 << 20)

    def header(m, kind=v.IN, sector=0):
        at = m.take(16)
        m.put("IIQ", at, kind, 0, sector)
        return at

    def buffers(make):
        def do(q, m):
            q.expose(q.chain(make(m)))
        hostile(d, do)

    def raw(describe):
        def do(q, m):
            describe(q, m)
        hostile(d, do)

    room = lambda m, n=512: (m.take(n), n, v.WRITE)
    buffers(lambda m: [(header(m), 16, 0)])  # no status
    buffers(lambda m: [room(m)])  # no header
    buffers(lambda m: [(header(m), 15, 0), room(m), room(m, 1)])  # half a header
    buffers(lambda m: [(header(m), 16, v.WRITE), room(m)])  # a header to write
    buffers(lambda m: [(header(m), 16, 0), room(m), (m.take(1), 1, 0)])  # a status to read
    buffers(lambda m: [(header(m), 16, 0), (end, 512, v.WRITE), room(m, 1)])  # outside
    buffers(lambda m: [(header(m), 16, 0), (end - 256, 512, v.WRITE), room(m, 1)])  # across the end
    buffers(lambda m: [(header(m), 16, 0), ((1 << 64) - 256, 512, v.WRITE), room(m, 1)])  # around the end
    buffers(lambda m: [(header(m), 16, 0), (v.GUEST, 0xffffffff, v.WRITE), room(m, 1)])  # huge
    buffers(lambda m: [(header(m), 16, 0), (m.take(1), 0, v.WRITE), room(m, 1)])  # empty
    buffers(lambda m: [(header(m), 16, 0), room(m), (end, 1, v.WRITE)])  # the status outside
    buffers(lambda m: [(end, 16, v.INDIRECT)])  # a table outside
    buffers(lambda m: [(m.take(32), 15, v.INDIRECT)])  # a table of no whole entries
    buffers(lambda m: [(m.take(32), 0, v.INDIRECT)])

    def nested(q, m):
        table = m.take(32)
        q.describe(table, 0, table, 32, v.INDIRECT)
        q.expose(q.chain([(table, 32, v.INDIRECT)]))
    raw(nested)

    def loop(q, m):
        at = header(m)
        for n in range(q.size):
            q.describe(q.desc, n, at, 16, v.NEXT, (n + 1) % q.size)
        q.expose(0)
    raw(loop)

    def loop_in_table(q, m):
        table, at = m.take(32), header(m)
        q.describe(table, 0, at, 16, v.NEXT, 1)
        q.describe(table, 1, at, 16, v.NEXT, 0)
        q.expose(q.chain([(table, 32, v.INDIRECT)]))
    raw(loop_in_table)

    def long_table(q, m):
        count = 60000
        table, at = m.take(16 * count), header(m)
        for n in range(count):
            q.describe(table, n, at, 16, v.NEXT, n + 1)
        q.expose(q.chain([(table, 16 * count, v.INDIRECT)]))
    raw(long_table)

    raw(lambda q, m: (q.describe(q.desc, 0, header(m), 16, v.NEXT, q.size), q.expose(0)))  # past the table
    raw(lambda q, m: q.expose(q.size))
    raw(lambda q, m: q.expose(0xffff))
    raw(lambda q, m: (m.put("H", q.avail + 2, q.size + 1), q.kick()))  # the index jumps
    raw(lambda q, m: (m.put("H", q.avail + 2, 0xffff), q.kick()))
    d.quit()


def test_random_rings(path):
    """Rings of random bytes: whatever comes of it, the daemon goes on serving others."""
    seed = int(os.environ.get("LIVEBLK_SEED", random.randrange(1 << 32)))
    print(f"seed {seed}")
    r = random.Random(seed)
    d = Daemon(path, export="num-queues=2")
    for _ in range(60):
        front, (q, _) = v.connect(d.socket, 2)
        m = front.memory
        for n in range(q.size):
            at = r.choice([v.GUEST + r.randrange(1 << 16), v.GUEST + (4 << 20) - r.randrange(64), r.getrandbits(64)])
            length = r.choice([16, 16, 1, 0, 512, r.getrandbits(16), r.getrandbits(32)])
            q.describe(q.desc, n, at, length, r.choice([0, 1, 1, 2, 3, 3, 4, 5, 7]), r.randrange(q.size + 1))
        for n in range(q.size):
            m.put("H", q.avail + 4 + 2 * n, r.randrange(q.size + 1))
        for _ in range(3):
            m.put("H", q.avail + 2, r.choice([r.getrandbits(16), r.randrange(q.size)]))
            q.kick()
        assert front.number(v.GET_QUEUE_NUM) == 2
        if r.random() < 0.5:
            q.stop()
        front.close()
    front, [q] = v.connect(d.socket, 1)
    assert q.read(0, 512) == bytes(512)
    d.quit()


def test_memory_taken_away(path):
    """The guest's memory is cut short while the rings run: that front end is sent away, the daemon lives."""
    d = Daemon(path)
    other = os.path.join(path, "s1")
    d.qmp("block-export-add", type="vhost-user-blk", id="e1", node_name="n", addr={"type": "unix", "path": other})
    _, [well] = v.connect(other, 1)
    front, [q] = v.connect(d.socket, 1)
    os.ftruncate(front.memory.fd, 0)
    q.kick()
    assert front.ended()
    assert well.read(0, 512) == bytes(512)
    front, [q] = v.connect(d.socket, 1)
    assert q.read(0, 512) == bytes(512)
    d.quit()


def test_bad_memory(path):
    d = Daemon(path)
    table = lambda *regions: struct.pack("<II", len(regions), 0) + b"".join(struct.pack("<QQQQ", *r) for r in regions)
    size = 4 << 20
    for regions, count in [
        ([(0, size + 4096, 0, 0)], 1),  # longer than the file
        ([(0, size, 0, 4096)], 1),
        ([(0, 0, 0, 0)], 1),
        ([((1 << 64) - 4096, 8192, 0, 0)], 1),
        ([(0, 8192, (1 << 64) - 4096, 0)], 1),
        ([(0, 8192, 0, (1 << 64) - 4096)], 1),
        ([(0, 4096, 0, 100)], 1),  # not on a page
        ([(0, 8192, 0, 0), (4096, 8192, 8192, 0)], 2),  # overlapping
        ([(0, 4096, 0, 0)], 2),  # more descriptors than regions
        ([(0, 4096, 0, 0)], 0),
    ]:
        front = v.Front(d.socket)
        front.negotiate()
        assert front.tell(v.SET_MEM_TABLE, table(*regions), [front.memory.fd] * count) == 1, regions
        assert front.share_memory() == 0
        front.close()
    # regions by themselves
    front = v.Front(d.socket)
    front.negotiate()
    m = front.memory
    region = struct.pack("<QQQQQ", 0, v.GUEST, m.size, v.USER, 0)
    assert front.tell(v.ADD_MEM_REG, region, [m.fd]) == 0
    assert front.tell(v.ADD_MEM_REG, region, [m.fd]) == 1, "twice"
    q = v.Queue(front)
    assert q.start() == [0] * 7 and q.read(0, 512) == bytes(512)
    assert front.tell(v.REM_MEM_REG, region) == 1, "a ring lies in it"
    assert q.read(0, 512) == bytes(512)
    q.stop()
    assert front.tell(v.REM_MEM_REG, region) == 0
    assert front.tell(v.REM_MEM_REG, region) == 1, "twice"
    d.quit()


def test_bad_messages(path):
    d = Daemon(path)

    def connection(do, ends=True):
        front = v.Front(d.socket)
        front.negotiate()
        got = do(front)
        if ends:
            assert front.ended()
        front.close()
        return got

    connection(lambda f: f.sock.sendall(struct.pack("<III", 1, 0, 0)))  # another version
    connection(lambda f: f.sock.sendall(struct.pack("<III", 1, 1, 1 << 20)))  # too long
    connection(lambda f: f.send(200))  # unknown
    connection(lambda f: f.send(v.SET_FEATURES, b"\0"))  # too short
    connection(lambda f: f.send(v.SET_FEATURES, struct.pack("<Q", 1 << 63)))  # not offered
    connection(lambda f: f.send(v.SET_PROTOCOL_FEATURES, struct.pack("<Q", 1 << 63)))
    connection(lambda f: f.send(v.GET_VRING_BASE, struct.pack("<II", 9, 0)))  # no such queue
    connection(lambda f: f.send(v.GET_INFLIGHT_FD, bytes(24)))
    many = [os.open("/dev/null", os.O_RDONLY) for _ in range(200)]
    connection(lambda f: f.send(v.SET_MEM_TABLE, bytes(8), many))
    refused = lambda request, body, fds=(): connection(lambda f: f.tell(request, body, fds), ends=False)
    for request in (v.SET_VRING_NUM, v.SET_VRING_BASE, v.SET_VRING_ENABLE):
        assert refused(request, struct.pack("<II", 9, 1)) == 1
    for size in (0, 3, 65536, 1 << 31):
        assert refused(v.SET_VRING_NUM, struct.pack("<II", 0, size)) == 1
    assert refused(v.SET_VRING_ADDR, struct.pack("<IIQQQQ", 0, 0, 8, 4, 2, 0)) == 1
    assert refused(v.SET_VRING_KICK, struct.pack("<Q", 0)) == 1, "a bell without a descriptor"
    assert refused(v.SET_INFLIGHT_FD, struct.pack("<QQHHI", 1 << 40, 0, 1, 128, 0), many[:1]) == 1
    # half a message, then nothing
    front = v.Front(d.socket)
    front.sock.sendall(b"\x01\0\0")
    front.close()
    front, [q] = v.connect(d.socket, 1)
    # a bell that is none
    assert front.tell(v.SET_VRING_KICK, struct.pack("<Q", 0), many[:1]) == 0
    assert q.failed()
    front.close()
    before = len(os.listdir(f"/proc/{d.process.pid}/fd"))
    for _ in range(50):
        front, _ = v.connect(d.socket, 2)
        front.close()
    front, _ = v.connect(d.socket, 2)
    front.close()
    after = before + 1
    until = time.monotonic() + 30
    while after > before and time.monotonic() < until:
        after = len(os.listdir(f"/proc/{d.process.pid}/fd"))
    assert after <= before, (before, after)
    d.quit()


def test_kill_and_resume(path):
    """The daemon is killed with requests in the rings; the next one carries out exactly those, with the log of the first."""
    d = Daemon(path)
    front = v.Front(d.socket, v.Memory(16 << 20))
    front.negotiate()
    log, length = front.inflight(1, 16)
    m = front.memory

    def start(front, q, base):
        assert front.share_memory() == 0
        assert front.use_inflight(log, length, 1, 16) == 0
        assert q.start(base) == [0] * 7

    q = v.Queue(front)
    start(front, q, 0)
    assert q.write(0, b"0" * 512) == v.OK
    for round_ in range(6):
        # stopped in the middle of whatever it does
        open_ = {}
        for n in range(4):
            head, _, status = q.submit(v.OUT, 8 * (4 * round_ + n + 1), out=bytes([round_ * 4 + n + 1]) * 4096)
            open_[head] = status
        d.kill()
        front.close()
        d = Daemon(path)
        front = v.Front(d.socket, m)
        front.negotiate()
        q.front = front
        # a front end knows no more than the used index (QEMU restores it from there)
        start(front, q, m.get("H", q.used + 2))
        got = q.wait(4)
        assert sorted(h for h, _ in got) == sorted(open_), (got, open_)
        assert all(m.read(s, 1) == b"\0" for s in open_.values())
        assert q.answers() == [], "answered twice"
    for n in range(1, 25):
        assert q.read(8 * n, 4096) == bytes([n]) * 4096, n
    d.quit()


def with_log(d):
    """A front end of one queue, which runs, and the log of requests in flight with its length."""
    front = v.Front(d.socket, v.Memory(8 << 20))
    front.negotiate()
    log, length = front.inflight(1, 16)
    q = v.Queue(front)
    assert front.share_memory() == 0 and front.use_inflight(log, length, 1, 16) == 0
    assert q.start() == [0] * 7
    return front, q, log, length


def goes_on(q, d, log, length):
    """The queue's front end with another daemon, which finds the log of the one before."""
    front = v.Front(d.socket, q.memory)
    front.negotiate()
    q.front = front
    assert front.share_memory() == 0 and front.use_inflight(log, length, 1, 16) == 0
    # it knows no more than the used index (QEMU restores it from there)
    assert q.start(q.memory.get("H", q.used + 2)) == [0] * 7


def test_open_requests_survive(path):
    """Requests that hang in the disk when the daemon is killed are the next daemon's."""
    d = ThrottledDaemon(path)
    front, q, log, length = with_log(d)
    open_ = [q.submit(v.OUT, 8 * n, out=bytes([n + 1]) * 4096) for n in range(3)]
    # taken from the ring, not answered: the driver is asked to ring again behind the third
    until = time.monotonic() + 30
    taken = lambda: sum(1 for n in range(16) if os.pread(log, 1, 16 + 16 * n) == b"\x01")
    while taken() + (q.memory.get("H", q.used + 2)) < 3:
        assert time.monotonic() < until
    answered = q.answers()
    assert len(answered) < 3
    d.kill()
    front.close()
    d = Daemon(path)
    goes_on(q, d, log, length)
    got = answered + (q.wait(3 - len(answered)))
    assert sorted(h for h, _ in got) == sorted(h for h, _, _ in open_)
    for n in range(3):
        assert q.read(8 * n, 4096) == bytes([n + 1]) * 4096
    d.quit()


def test_requests_without_an_answer_survive(path):
    """A daemon that ends while requests wait for a secondary says nothing of them: they are the next daemon's."""
    d = Daemon(path)
    store = {"path": os.path.join(path, "store"), "size": 16 << 20}
    d.qmp("replication-group-add", id="g", volumes=[{"node-name": "n"}], store=store)
    nobody = {"type": "unix", "path": os.path.join(path, "nobody")}
    d.qmp("replication-peer-add", group="g", peer="p", addr=nobody)
    d.qmp("replication-start", group="g", role="primary", on_link_loss="suspend")
    front, q, log, length = with_log(d)
    head, _, status = q.submit(v.OUT, 8, out=b"x" * 4096)
    # it has come
    until = time.monotonic() + 30
    while not any(os.pread(log, 1, 16 + 16 * n) == b"\x01" for n in range(16)):
        assert time.monotonic() < until
    d.quit()
    assert q.answers() == []
    front.close()
    d = Daemon(path)
    goes_on(q, d, log, length)
    assert [h for h, _ in q.wait(1)] == [head] and front.memory.read(status, 1) == b"\0"
    assert q.read(8, 4096) == b"x" * 4096
    d.quit()


class ThrottledDaemon(Daemon):
    """One request in a hundred seconds, so that requests hang."""

    def __init__(self, path):
        limits = "throttle-group,id=g,x-iops-write=1,x-iops-write-max=1"
        super().__init__(path, node="driver=throttle,throttle-group=g,file=f,node-name=n", extra=("--object", limits))


def with_packed_rings(test):
    """The same test, with packed rings."""

    def run(path):
        v.PACKED = True
        try:
            test(path)
        finally:
            v.PACKED = False
    run.__doc__ = f"{test.__name__} with packed rings"
    return run


test_packed_reads_and_writes = with_packed_rings(test_reads_and_writes)
test_packed_discard_and_zeroes = with_packed_rings(test_discard_and_zeroes)
test_packed_many_at_once = with_packed_rings(test_many_at_once)
test_packed_mirror_pivots_unseen = with_packed_rings(test_mirror_pivots_unseen)
test_packed_memory_taken_away = with_packed_rings(test_memory_taken_away)


def test_packed_hostile_rings(path):
    """As test_hostile_rings, with what only a packed ring can get wrong."""
    d = Daemon(path)
    end = v.GUEST + (4 << 20)

    def header(m):
        at = m.take(16)
        m.put("IIQ", at, v.IN, 0, 0)
        return at

    def hostile(do):
        front, (q, other) = v.connect(d.socket, 2, packed=True)
        do(q, front.memory)
        assert q.failed(), "the queue goes on"
        assert q.answers() == [] and other.read(0, 512) == bytes(512)
        front.close()
        front, [q] = v.connect(d.socket, 1, packed=True)
        assert q.read(0, 512) == bytes(512)
        front.close()

    def buffers(make):
        hostile(lambda q, m: q.expose(q.chain(make(m))))

    room = lambda m, n=512: (m.take(n), n, v.WRITE)
    buffers(lambda m: [(header(m), 16, 0)])  # no status
    buffers(lambda m: [room(m)])  # no header
    buffers(lambda m: [(header(m), 16, v.WRITE), room(m)])  # a header to write
    buffers(lambda m: [(header(m), 16, 0), room(m), (m.take(1), 1, 0)])  # a status to read
    buffers(lambda m: [(header(m), 16, 0), (end, 512, v.WRITE), room(m, 1)])  # outside
    buffers(lambda m: [(header(m), 16, 0), ((1 << 64) - 256, 512, v.WRITE), room(m, 1)])  # around the end
    buffers(lambda m: [(header(m), 16, 0), (m.take(1), 0, v.WRITE), room(m, 1)])  # empty
    buffers(lambda m: [(end, 16, v.INDIRECT)])  # a table outside
    buffers(lambda m: [((1 << 64) - 16, 64, v.INDIRECT)])  # one that wraps around
    buffers(lambda m: [(m.take(32), 15, v.INDIRECT)])  # a table of no whole entries
    buffers(lambda m: [(m.take(32), 0, v.INDIRECT)])
    buffers(lambda m: [(m.take(16 * 60000), 16 * 60000, v.INDIRECT)])  # a long one
    buffers(lambda m: [(header(m), 16, 0), (m.take(32), 32, v.INDIRECT)])  # a table among others

    def nested(q, m):
        table = m.take(32)
        q.describe(table, 0, table, 32, 0, v.INDIRECT)
        q.expose(q.chain([(table, 32, v.INDIRECT)]))
    hostile(nested)

    def endless(q, m):
        """A chain that goes all around the ring and on."""
        at = header(m)
        for n in range(q.size):
            q.describe(q.desc, n, at, 16, 0, v.NEXT | v.AVAILABLE)
        q.kick()
    hostile(endless)

    def start(base, size=16, shift=0, lift=0):
        front = v.Front(d.socket, packed=True)
        front.negotiate()
        assert front.share_memory() == 0
        m = front.memory
        at = m.take(16 * max(size, 1) + 64)
        q = v.PackedQueue(front, 0, size, (at + shift + lift, m.take(4, 4), m.take(4, 4)))
        return front, q.start(base)

    for base in (16, 16 << 16, 0x7fff, 0x80100010):  # positions past the ring
        front, results = start(base)
        assert any(r != 0 for r in results), (hex(base), results)
        front.close()
    front, results = start(0x80008000, lift=(4 << 20) - 128)  # a ring across the end of memory
    assert any(r != 0 for r in results), results
    front.close()
    front, [q] = v.connect(d.socket, 1, packed=True)
    # the kind of a ring that runs
    assert front.tell(v.SET_FEATURES, struct.pack("<Q", front.features & ~v.F_PACKED)) != 0
    front.close()
    # any size will do, also one that is no power of two
    front = v.Front(d.socket, packed=True)
    front.negotiate()
    assert front.share_memory() == 0
    q = v.PackedQueue(front, 0, 7)
    assert q.start() == [0] * 7
    for n in range(30):
        assert q.write(n, bytes([n]) * 512, split=[None, 256, 128][n % 3]) == v.OK and q.read(n, 512) == bytes([n]) * 512
    d.quit()


def test_packed_random_rings(path):
    """As test_random_rings."""
    seed = int(os.environ.get("LIVEBLK_SEED", random.randrange(1 << 32)))
    print(f"seed {seed}")
    r = random.Random(seed)
    d = Daemon(path, export="num-queues=2")
    for _ in range(80):
        front, (q, _) = v.connect(d.socket, 2, packed=True)
        m = front.memory
        for _ in range(3):
            for n in range(q.size):
                at = r.choice([v.GUEST + r.randrange(1 << 16), v.GUEST + (4 << 20) - r.randrange(64), r.getrandbits(64)])
                length = r.choice([16, 16, 1, 0, 512, r.getrandbits(16), r.getrandbits(32)])
                flags = r.choice([0, 1, 1, 2, 3, 3, 4, 5, 7]) | r.choice([v.AVAILABLE, v.AVAILABLE, v.USED, 0, v.AVAILABLE | v.USED])
                q.describe(q.desc, n, at, length, r.getrandbits(16), flags)
            m.put("H", q.avail, r.getrandbits(16))
            m.put("H", q.avail + 2, r.getrandbits(16))
            q.kick()
        assert front.number(v.GET_QUEUE_NUM) == 2
        if r.random() < 0.5:
            v.Queue.stop(q)
        front.close()
    front, [q] = v.connect(d.socket, 1, packed=True)
    assert q.read(0, 512) == bytes(512)
    d.quit()


def test_packed_kill_and_resume(path):
    """As test_kill_and_resume: what was not answered is carried out from the log's copy of the descriptors, since answers
    overwrite the ring."""
    d = Daemon(path)
    front = v.Front(d.socket, v.Memory(16 << 20), packed=True)
    front.negotiate()
    log, length = front.inflight(1, 16)
    m = front.memory

    def start(q):
        assert q.front.share_memory() == 0
        assert q.front.use_inflight(log, length, 1, 16) == 0
        # where we are is not known to who comes: the log says it
        assert q.start(0x80008000) == [0] * 7

    q = v.PackedQueue(front)
    start(q)
    assert q.write(0, b"0" * 512) == v.OK
    for round_ in range(12):
        open_ = {}
        for n in range(4):
            data = bytes([round_ * 4 + n + 1]) * 4096
            head, _, status = q.submit(v.OUT, 8 * (4 * round_ + n + 1), out=data, indirect=n % 2 == 1)
            open_[head] = status
        answered = q.answers() if round_ % 2 else []
        d.kill()
        front.close()
        d = Daemon(path)
        front = v.Front(d.socket, m, packed=True)
        front.negotiate()
        q.front = front
        start(q)
        got = answered + q.wait(4 - len(answered))
        assert sorted(h for h, _ in got) == sorted(open_), (got, open_)
        assert all(m.read(s, 1) == b"\0" for s in open_.values())
        assert q.answers() == [], "answered twice"
    for n in range(1, 49):
        assert q.read(8 * n, 4096) == bytes([n]) * 4096, n
    d.quit()


def test_packed_open_requests_survive(path):
    """Requests that hang in the disk when the daemon is killed, while others are answered in their places of the ring."""
    d = ThrottledDaemon(path)
    front = v.Front(d.socket, v.Memory(8 << 20), packed=True)
    front.negotiate()
    log, length = front.inflight(1, 16)
    q = v.PackedQueue(front)
    assert front.share_memory() == 0 and front.use_inflight(log, length, 1, 16) == 0
    assert q.start() == [0] * 7
    open_ = [q.submit(v.OUT, 8 * n, out=bytes([n + 1]) * 4096) for n in range(3)]
    until = time.monotonic() + 30
    taken = lambda: sum(1 for n in range(16) if os.pread(log, 1, 32 + 32 * n) == b"\x01")
    answered = []
    while taken() + len(answered) < 3:
        answered += q.answers()
        assert time.monotonic() < until
    # reads are not held up: their answers go where the descriptors of those that hang were
    for _ in range(4):
        head, _, _ = q.submit(v.IN, 64, room=512, indirect=True)
        found = q.wait(1)
        answered += [f for f in found if f[0] != head]
    assert len(answered) < 3
    d.kill()
    front.close()
    d = Daemon(path)
    again = v.Front(d.socket, front.memory, packed=True)
    again.negotiate()
    q.front = again
    assert again.share_memory() == 0 and again.use_inflight(log, length, 1, 16) == 0
    assert q.start(0x80008000) == [0] * 7
    got = answered + q.wait(3 - len(answered))
    assert sorted(h for h, _ in got) == sorted(h for h, _, _ in open_)
    for n in range(3):
        assert q.read(8 * n, 4096) == bytes([n + 1]) * 4096
    d.quit()


def test_packed_writes_are_logged(path):
    """What answers write, and where, while the guest moves: the ring itself, and where the daemon says when it wants to be told."""
    d = Daemon(path)
    front = v.Front(d.socket, packed=True)
    front.negotiate()
    assert front.share_memory() == 0
    m = front.memory
    ring = m.take(16 * 16, 4096), m.take(4, 4096), m.take(4, 4096)
    q = v.PackedQueue(front, ring=ring)
    assert q.start() == [0] * 7
    log = front.log_writes(1 << 16)
    assert q.log_used(True) == 0
    marked = lambda at: log[at // 4096 // 8] >> (at // 4096 % 8) & 1
    assert q.read(0, 512) == bytes(512)
    until = time.monotonic() + 30
    while not (marked(ring[0]) and marked(ring[2])):
        assert time.monotonic() < until, "not marked"
        time.sleep(0.001)
    assert not marked(ring[1])
    d.quit()


def main():
    global BINARY
    BINARY, names = cases.arguments()
    cases.run(globals(), names, "vhost-")


main()
