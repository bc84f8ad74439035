#!/usr/bin/env python3
"""kill -9 at random instants under four verifying NBD clients and one vhost-user guest, with jobs on all disks.

    kills.py --daemon PATH [--kills N] [--seed S] [--where DIR] [--go-on]

Five disks are served by a daemon with --state-dir: `a` and `b` (qcow2, NBD), `g` (qcow2, vhost-user-blk) are mirrored, committed, streamed and
snapshotted; `c` (raw) and `d` (qcow2), of 4 GiB each, have persistent bitmaps and are backed up. The daemon is killed and started again, and
every client goes on. What is checked:

* what a client had flushed is there after each kill; of what it wrote since, each block is old or new, and stays what it then is;
* each bitmap holds every block that was written since it was made, and a kill adds at most the regions of the log;
* nodes, exports and jobs are there again, no job ends with an error (mirrors are verified by the daemon as well), images pass
  `qemu-img check`;
* at the end all jobs end, and everything ever written is read once more.

With --go-on half of the jobs are mirrors, most of which the daemon does not compare: they go on after a kill where they were, and what they
lacked the clients would find.

The instants of kills, the operations and the clients' requests come from the seed; what meets what is up to the machine.
"""
import argparse
import json
import os
import random
import select
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time

import nbd

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "vhost"))
import front as v

BLOCK = 4096
SMALL, LARGE = 64 << 20, 4 << 30
GRANULE = 64 << 10
# A client ever writes near so many places.
PLACES = 400
# A kill puts at most so much in doubt, beside what is marked: twice what may be hot (`dirtylog::geometry_for`), for regions that cross.
DOUBT = 2 * max(LARGE // 64, 128 << 20)
PATIENCE = 60.0
SPEED = 30 << 20
# One life in so many is as long as the jobs take that were there when it began, up to so many seconds: a client that writes faster than
# a job copies keeps it for ever.
PATIENT, LONG_LIFE = 10, 15.0


class Gone(Exception):
    """The daemon has been killed."""


class Wrong(Exception):
    """What must not be."""


def content(disk, block, version):
    return struct.pack("<QII", block, version, disk) * (BLOCK // 16) if version else bytes(BLOCK)


class Model:
    """What a disk may contain, block by block."""

    def __init__(self, number, name, size, rng):
        self.number, self.name, self.blocks, self.rng = number, name, size // BLOCK, rng
        self.now, self.doubt, self.version = {}, {}, 0
        self.known = [rng.randrange(self.blocks) for _ in range(PLACES)]
        self.places = rng.sample(self.known, 24)
        self.figures = {"writes": 0, "reads": 0, "flushes": 0, "reconnections": 0}

    def pick(self):
        """Mostly near a few places: a disk of 4 GiB whose every region is written has no cold ones, and its backups never end."""
        if self.rng.random() < 0.02:
            self.places[self.rng.randrange(len(self.places))] = self.rng.choice(self.known)
        return min(self.rng.choice(self.places) + self.rng.randrange(64), self.blocks - 1)

    def begin(self, block):
        """A new version of a block is about to be written; what the block will hold."""
        self.version += 1
        self.doubt.setdefault(block, {self.now.get(block, 0)}).add(self.version)
        return self.version, content(self.number, block, self.version)

    def written(self, block, version):
        self.now[block] = version
        self.figures["writes"] += 1

    def flushed(self):
        self.doubt.clear()
        self.figures["flushes"] += 1

    def seen(self, block, data):
        """`data` was read; nothing else may be there, or one of several after a kill."""
        self.figures["reads"] += 1
        allowed = self.doubt.get(block, {self.now.get(block, 0)})
        for version in allowed:
            if data == content(self.number, block, version):
                return version
        found = struct.unpack_from("<QII", data)
        raise Wrong(f"disk {self.name}: block {block} holds {found}, not one of {sorted(allowed)} (version now {self.version})")

    def check_current(self, block, data):
        if data != content(self.number, block, self.now.get(block, 0)):
            found = struct.unpack_from("<QII", data)
            raise Wrong(f"disk {self.name}: block {block} reads as {found}, version {self.now.get(block, 0)} was written")

    def after_kill(self, read):
        for block in list(self.doubt):
            self.now[block] = self.seen(block, read(block))
        self.doubt.clear()
        known = list(self.now)
        for block in self.rng.sample(known, min(len(known), 200)):
            self.check_current(block, read(block))


class Client(threading.Thread):
    """Writes, reads and flushes until told to stop; survives the daemon."""

    def __init__(self, model, stop):
        super().__init__(daemon=True)
        self.model, self.stop, self.error = model, stop, None

    def run(self):
        try:
            self.work()
        except BaseException as e:
            self.error = e
            self.stop.set()

    def work(self):
        while not self.stop.is_set():
            try:
                self.connect()
                self.model.figures["reconnections"] += 1
                self.model.after_kill(self.read)
                self.connected()
                while not self.stop.is_set():
                    self.round()
            except Gone:
                continue
        while True:
            try:
                for block in list(self.model.now):
                    self.model.check_current(block, self.read(block))
                return
            except Gone:
                self.connect()
                self.model.after_kill(self.read)

    def connected(self):
        pass


class NbdClient(Client):
    def __init__(self, model, stop, path, bitmap=None):
        super().__init__(model, stop)
        self.path, self.bitmap, self.extra = path, bitmap, 0

    def connect(self):
        until = time.monotonic() + PATIENCE
        while True:
            self.handle = nbd.NBD()
            # libnbd 1.14 never frees what it was given to write, so it is always given the same
            self.buffers = [bytearray(BLOCK) for _ in range(8)]
            self.handle.set_export_name(self.model.name)
            if self.bitmap:
                self.handle.add_meta_context(f"qemu:dirty-bitmap:{self.bitmap}")
            try:
                return self.handle.connect_unix(self.path)
            except nbd.Error as e:
                if time.monotonic() > until:
                    raise Wrong(f"disk {self.model.name} does not come back: {e}") from e
                time.sleep(0.01)

    def call(self, function, *arguments):
        try:
            return function(*arguments)
        except nbd.Error as e:
            if self.handle.aio_is_dead() or self.handle.aio_is_closed():
                raise Gone() from e
            raise Wrong(f"disk {self.model.name}: {e}") from e

    def read(self, block):
        return bytes(self.call(self.handle.pread, BLOCK, block * BLOCK))

    def round(self):
        kind = self.model.rng.random()
        if kind < 0.1:
            self.call(self.handle.flush)
            return self.model.flushed()
        if kind < 0.4:
            for _ in range(4):
                block = self.model.pick()
                self.model.check_current(block, self.read(block))
            return None
        pending = {}
        for block in {self.model.pick() for _ in self.buffers}:
            version, data = self.model.begin(block)
            buffer = self.buffers[len(pending)]
            buffer[:] = data
            pending[self.call(self.handle.aio_pwrite, nbd.Buffer.from_buffer(buffer), block * BLOCK)] = (block, version)
        until = time.monotonic() + PATIENCE
        while self.handle.aio_in_flight() and not (self.handle.aio_is_dead() or self.handle.aio_is_closed()):
            self.call(self.handle.poll, 1000)
            if time.monotonic() > until:
                raise Wrong(f"disk {self.model.name}: no answer for {PATIENCE} s")
        gone = False
        for cookie, (block, version) in pending.items():
            try:
                if self.call(self.handle.aio_command_completed, cookie):
                    self.model.written(block, version)
                else:
                    gone = True
            except Gone:
                gone = True
        if gone:
            raise Gone()
        return None

    def connected(self):
        """The bitmap, before anything more is written."""
        if not self.bitmap:
            return
        dirty = []
        def extents(context, offset, entries, error):
            if context.startswith("qemu:dirty-bitmap"):
                for n in range(0, len(entries), 2):
                    if entries[n + 1] & 1:
                        dirty.append((offset, offset + entries[n]))
                    offset += entries[n]
            return 0
        at, size = 0, self.model.blocks * BLOCK
        while at < size:
            self.call(self.handle.block_status, min(size - at, 1 << 30), at, extents)
            at += min(size - at, 1 << 30)
        dirty.sort()
        granules = {g for a, b in dirty for g in range(a // GRANULE, -(-b // GRANULE))}
        written = {b * BLOCK // GRANULE for b in self.model.now if self.model.now[b]}
        if lost := written - granules:
            raise Wrong(f"disk {self.model.name}: the bitmap lacks {len(lost)} granules, such as {min(lost)}, of {len(written)}")
        extra = len(granules - written) * GRANULE
        # as much again as was marked may have been hot
        most = DOUBT + 2 * (len(written) * GRANULE + self.extra)
        if extra - self.extra > most:
            raise Wrong(f"disk {self.model.name}: a kill added {extra - self.extra} bytes to the bitmap, more than {most}")
        self.extra = extra


class Guest(Client):
    """The same over vhost-user-blk: requests in the ring when the daemon dies are the next one's."""

    SIZE = 16

    def __init__(self, model, stop, path):
        super().__init__(model, stop)
        self.path, self.memory, self.queue = path, v.Memory(16 << 20), None
        self.front, self.unsure = None, set()
        # being written now; and of those what a daemon was given a second time since the last flush
        self.writing, self.twice = set(), set()

    def connect(self):
        until = time.monotonic() + PATIENCE
        # a daemon serves one front end at a time
        if self.front:
            self.front.close()
        while True:
            self.front = front = v.Front(self.path, self.memory, connect=False)
            try:
                front.sock.connect(self.path)
                front.negotiate()
                if not self.queue:
                    self.log = front.inflight(1, self.SIZE)
                    self.queue = v.Queue(front)
                    base, self.mark = 0, self.memory.used
                else:
                    self.queue.front, base = front, self.memory.get("H", self.queue.used + 2)
                results = [front.share_memory(), front.use_inflight(*self.log, 1, self.SIZE), *self.queue.start(base)]
                if results == [0] * 9:
                    return
                why = f"answers {results}"
            except (OSError, AssertionError, TypeError, struct.error, IndexError) as e:
                why = repr(e)  # killed in the middle of it, or not there yet
            front.close()
            if time.monotonic() > until:
                raise Wrong(f"the guest's disk does not come back: {why}")
            time.sleep(0.01)

    def finish(self, heads):
        """Waits for all of these, through the daemon's deaths."""
        left, until = set(heads), time.monotonic() + PATIENCE
        while left:
            poll = select.poll()
            poll.register(self.queue.call_fd, select.POLLIN)
            poll.register(self.front.sock, select.POLLIN | select.POLLHUP)
            ready = dict(poll.poll(200))
            if self.queue.call_fd in ready:
                os.eventfd_read(self.queue.call_fd)
            left -= {head for head, _ in self.queue.answers()}
            if self.front.sock.fileno() in ready and left:
                self.connect()
                # lives of the daemon that were too short to serve anybody do not count
                until = time.monotonic() + PATIENCE
                self.model.figures["reconnections"] += 1
                # answered before the kill and not flushed: old or new
                self.unsure |= set(self.model.doubt)
                self.twice |= self.writing
            if time.monotonic() > until:
                raise Wrong(f"the guest has no answer for {PATIENCE} s: {left}; {self.rings()}")

    def rings(self):
        """Both indices, and the log: head, mark, link, counter."""
        q = self.queue
        log = os.pread(self.log[0], self.log[1], 0)
        entries = [(n, log[16 + 16 * n], *struct.unpack_from("<HQ", log, 22 + 16 * n)) for n in range(self.SIZE)]
        return {"available": q.memory.get("H", q.avail + 2), "used": q.memory.get("H", q.used + 2),
                "log's last and used": struct.unpack_from("<HH", log, 12), "log": entries}

    def submit(self, kind, sector=0, **more):
        return self.queue.submit(kind, sector, **more)

    def round(self):
        if self.unsure:
            return self.find_out()
        kind = self.model.rng.random()
        if kind < 0.1:
            head, _, status = self.submit(v.FLUSH)
            self.finish([head])
            self.expect(status)
            if not self.unsure:
                self.model.flushed()
                self.twice.clear()
        elif kind < 0.4:
            self.check(self.model.pick())
        else:
            pending = []
            for block in list({self.model.pick() for _ in range(3)}):
                version, data = self.model.begin(block)
                pending.append((block, version, *self.submit(v.OUT, block * 8, out=data)))
            self.writing = {p[0] for p in pending}
            self.finish([p[2] for p in pending])
            self.writing = set()
            for block, version, _, _, status in pending:
                self.expect(status)
                self.model.written(block, version)
        self.memory.used = self.mark
        return None

    def find_out(self):
        """Which of several versions a block has since the kill."""
        for block in list(self.unsure):
            self.unsure.discard(block)
            data = self.read(block)
            if block not in self.unsure:
                version = self.model.seen(block, data)
                # What outlived a kill outlives the next one; what was written again may be seen now and gone then.
                stays = {version} | (self.model.doubt[block] if block in self.twice else set())
                self.model.now[block], self.model.doubt[block] = version, stays

    def check(self, block):
        data = self.read(block)
        # killed meanwhile: it is found out later
        if block not in self.unsure:
            self.model.check_current(block, data)

    def expect(self, status):
        if self.memory.read(status, 1) != b"\0":
            raise Wrong(f"the guest got status {self.memory.read(status, 1)}")

    def read(self, block):
        head, data, status = self.submit(v.IN, block * 8, room=BLOCK)
        self.finish([head])
        self.expect(status)
        got = bytes(self.memory.read(data, BLOCK))
        self.memory.used = self.mark
        return got

    def work(self):
        self.connect()
        while not self.stop.is_set():
            self.round()
        while self.unsure:
            self.find_out()
        for block in list(self.model.now):
            self.check(block)


class Monitor:
    def __init__(self, path, process):
        until = time.monotonic() + PATIENCE
        while True:
            if process.poll() is not None:
                raise Gone()
            self.sock = socket.socket(socket.AF_UNIX)
            try:
                self.sock.connect(path)
                break
            except OSError:
                if time.monotonic() > until:
                    raise Wrong("the daemon does not come back") from None
                time.sleep(0.01)
        self.sock.settimeout(PATIENCE)
        # for reading alone: Python's file for both forgets what it has read ahead when something is written
        self.lines = self.sock.makefile("r")
        self.message()
        self.do("qmp_capabilities")

    def message(self):
        try:
            line = self.lines.readline()
        except TimeoutError as e:
            raise Wrong(f"the monitor does not answer for {PATIENCE} s") from e
        except OSError as e:
            raise Gone() from e
        if not line.endswith("\n"):
            raise Gone()
        return json.loads(line)

    def try_to(self, command, **arguments):
        arguments = {k.replace("_", "-"): x for k, x in arguments.items()}
        try:
            self.sock.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        except OSError as e:
            raise Gone() from e
        while "event" in (m := self.message()):
            data = m.get("data", {})
            if m["event"] in ("BLOCK_JOB_ERROR", "BLOCK_IMAGE_CORRUPTED", "BLOCK_JOB_MISMATCH") or "error" in data:
                raise Wrong(f"{m['event']}: {data}")
        return m

    def do(self, command, **arguments):
        m = self.try_to(command, **arguments)
        if "error" in m:
            raise Wrong(f"{command} {arguments}: {m['error']['desc']}")
        return m["return"]


class Lab:
    def __init__(self, program, where, rng, go_on):
        self.program, self.where, self.rng = program, where, rng
        self.proofs = ["off", "off", "off", "full"] if go_on else ["off", "sampled", "full"]
        self.kinds = ["mirror"] * (3 if go_on else 1) + ["snapshot", "commit", "stream"]
        self.images, self.made, self.started, self.resumed, self.outlived = {}, 0, {}, {}, 0
        self.options = ["--nbd-server", "addr.type=unix,addr.path=nbd.sock,max-connections=0"]
        for name in "abcdg":
            image = f"{name}.{'raw' if name == 'c' else 'qcow2'}"
            self.create(image, LARGE if name in "cd" else SMALL)
            self.options += ["--blockdev", json.dumps(self.node(name, image))]
            self.images[name] = image
        for name in "abcd":
            export = {"type": "nbd", "id": name, "node-name": name, "name": name, "writable": True}
            # the others have bitmaps, which are not there yet
            if name in "ab":
                self.options += ["--export", json.dumps(export)]
        self.options += ["--export", json.dumps({"type": "vhost-user-blk", "id": "g", "node-name": "g", "writable": True,
                                                 "addr": {"type": "unix", "path": "g.sock"}})]

    def create(self, image, size):
        form = image.rsplit(".", 1)[1]
        subprocess.run(["qemu-img", "create", "-q", "-f", form, os.path.join(self.where, image), str(size)], check=True)

    def node(self, name, image):
        return {"driver": image.rsplit(".", 1)[1], "node-name": name, "discard": "unmap",
                "file": {"driver": "file", "filename": image, "discard": "unmap"}}

    def start(self):
        log = open(os.path.join(self.where, "log"), "ab")
        self.process = subprocess.Popen(
            [self.program, "--state-dir", "state", "--chardev", "socket,id=m,path=qmp.sock,server=on,wait=off", "--monitor", "m",
             *self.options], cwd=self.where, stderr=log)

    def monitor(self):
        return Monitor(os.path.join(self.where, "qmp.sock"), self.process)

    def set_up(self):
        self.start()
        m = self.monitor()
        for name in "cd":
            m.do("block-dirty-bitmap-add", node=name, name="kept", persistent=True, granularity=GRANULE)
            m.do("block-dirty-bitmap-add", node=name, name="since", persistent=True, granularity=GRANULE)
            m.do("block-export-add", **{"type": "nbd", "id": name, "node-name": name, "name": name, "writable": True, "bitmaps": ["kept"]})

    def tidy(self, m):
        """Nodes that nobody uses any more go, and their files."""
        used = {e["node-name"] for e in m.do("query-block-exports")}
        for node in m.do("query-named-block-nodes", flat=True):
            name = node["node-name"]
            if name in self.images and name not in used and "return" in m.try_to("blockdev-del", node_name=name):
                os.unlink(os.path.join(self.where, self.images.pop(name)))

    def begin(self, m):
        """Something new on some disk that has no job."""
        busy = {j["id"] for j in m.do("query-jobs")}
        exports = {e["id"]: e["node-name"] for e in m.do("query-block-exports")}
        name = self.rng.choice("abcdg")
        if name in busy:
            return
        self.made += 1
        device, new = exports[name], f"{name}{self.made}"
        image = f"{new}.qcow2"
        job = {"job_id": name, "device": device, "speed": SPEED}
        proof = self.rng.choice(self.proofs)
        if name in "cd":
            what = self.rng.choice(["full", "incremental", "clear"])
            if what == "clear":
                m.do("block-dirty-bitmap-clear", node=device, name="since")
                return
            self.create(image, LARGE)
            self.images[new] = image
            m.do("blockdev-add", **self.node(new, image))
            more = {"bitmap": "since"} if what == "incremental" else {}
            m.do("blockdev-backup", target=new, sync=what, **job, **more)
        else:
            what = self.rng.choice(self.kinds)
            if what == "mirror":
                self.create(image, SMALL)
                self.images[new] = image
                m.do("blockdev-add", **self.node(new, image))
                mode = self.rng.choice(["background", "write-blocking", "read-write-blocking"])
                m.do("blockdev-mirror", target=new, sync="full", copy_mode=mode, verify=proof, **job)
            elif what == "snapshot":
                self.images[new] = image
                m.do("blockdev-snapshot-sync", node_name=device, snapshot_file=image, snapshot_node_name=new)
            elif what == "commit":
                # of a chain of one image there is nothing to commit
                m.try_to("block-commit", **job)
            else:
                m.do("block-stream", **job)
        self.started[what] = self.started.get(what, 0) + 1

    def steer(self, m):
        """Lets jobs that are ready come to their end. How many there are."""
        jobs = m.do("query-jobs")
        for job in jobs:
            if "error" in job:
                raise Wrong(f"job {job}")
            if job["status"] == "ready":
                m.try_to("job-complete", id=job["id"])
            elif self.rng.random() < 0.1:
                # or a client writes faster than it may copy, for ever
                m.try_to("block-job-set-speed", device=job["id"], speed=0)
        return len(jobs)

    def check(self, image, form):
        done = subprocess.run(["qemu-img", "check", "-q", "-U", "-f", form, os.path.join(self.where, image)], capture_output=True, text=True)
        if done.returncode not in (0, 3):
            raise Wrong(f"{image}: {done.stdout}{done.stderr}")

    def come_back(self):
        m = self.monitor()
        state = m.do("query-state")
        if state["broken"]:
            raise Wrong(f"not restored: {state['broken']}")
        exports = sorted(e["id"] for e in m.do("query-block-exports"))
        if exports != list("abcdg"):
            raise Wrong(f"exports after the restart: {exports}")
        for job in m.do("query-jobs"):
            how = f"{job['type']} {job.get('resumed', 'concluded').split(':')[0]}"
            self.resumed[how] = self.resumed.get(how, 0) + 1
        # what had left the graph when the daemon died, or had not come into it
        nodes = {n["node-name"] for n in m.do("query-named-block-nodes", flat=True)}
        for name in [n for n in self.images if n not in nodes]:
            image = os.path.join(self.where, self.images.pop(name))
            if os.path.exists(image):
                os.unlink(image)
        return m

    def round(self, stop, patient):
        """Operations, a kill in the middle, and the next life. A patient one waits with the kill for the jobs that were there: those
        that are compared, or copy the disk of one instant, begin that anew after each kill, and hold their disks."""
        killer = threading.Timer(self.rng.uniform(0.02, 1.2), self.process.kill)
        try:
            m = self.monitor()
            there = {j["id"] for j in m.do("query-jobs")} if patient else set()
            until = time.monotonic() + LONG_LIFE
            while True:
                if not killer.ident and (not there or time.monotonic() > until):
                    killer.start()
                if not there:
                    self.begin(m)
                for _ in range(self.rng.randrange(1, 8)):
                    self.steer(m)
                    time.sleep(0.01)
                self.tidy(m)
                if there:
                    there &= {j["id"] for j in m.do("query-jobs")}
                    self.outlived += not there
                if stop.is_set():
                    break
        except Gone:
            pass
        if not killer.ident:
            killer.start()
        killer.join()
        self.process.wait()
        images = [i for i in self.images.values() if i.endswith("qcow2") and os.path.exists(os.path.join(self.where, i))]
        image = self.rng.choice(sorted(images))
        found = None
        try:
            self.check(image, "qcow2")
        except Wrong as e:
            # of one that left the graph in that moment the layers below may be gone
            found = e
        self.start()
        self.come_back().sock.close()
        if found and image in self.images.values():
            raise found

    def finish(self):
        m = self.monitor()
        for job in m.do("query-block-jobs"):
            # as fast as it can: a client may write faster than a limit lets it be copied
            m.try_to("block-job-set-speed", device=job["device"], speed=0)
        until = time.monotonic() + 2 * PATIENCE
        while self.steer(m):
            if time.monotonic() > until:
                raise Wrong(f"jobs do not end: {m.do('query-jobs')}")
            time.sleep(0.05)
        return m


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--daemon", required=True)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--where")
    parser.add_argument("--go-on", action="store_true")
    args = parser.parse_args()
    seed = args.seed if args.seed is not None else int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}", flush=True)
    where = tempfile.mkdtemp(prefix="kills-", dir=args.where or ("/dev/shm" if os.path.isdir("/dev/shm") else None))
    rng = random.Random(seed)
    lab = Lab(os.path.abspath(args.daemon), where, rng, args.go_on)
    stop = threading.Event()
    clients, failure, n = [], None, 0
    try:
        lab.set_up()
        for number, name in enumerate("abcdg"):
            model = Model(number + 1, name, LARGE if name in "cd" else SMALL, random.Random(f"{seed} {name}"))
            path = os.path.join(where, "g.sock" if name == "g" else "nbd.sock")
            bitmap = "kept" if name in "cd" else None
            clients.append(Guest(model, stop, path) if name == "g" else NbdClient(model, stop, path, bitmap))
        for c in clients:
            c.start()
        for n in range(1, args.kills + 1):
            lab.round(stop, patient=n % PATIENT == 0)
            if stop.is_set():
                break
            if n % 25 == 0:
                print(f"{n} kills, {lab.started}", flush=True)
        if not stop.is_set():
            lab.finish()
    except (Wrong, Gone) as e:
        failure = e
    stop.set()
    for c in clients:
        # after a failure there may be no daemon to end with
        c.join(1 if failure else 4 * PATIENCE)
        failure = failure or c.error or (Wrong("a client does not end") if c.is_alive() else None)
    if not failure:
        try:
            lab.finish().try_to("quit")
        except Gone:
            pass
        lab.process.wait()
        for image in sorted(os.listdir(where)):
            if image.endswith(".qcow2"):
                lab.check(image, "qcow2")
    lab.process.kill()
    if failure:
        print(f"seed {seed}, after {n} kills: {failure!r}\nleft in {where}; the daemon said:", file=sys.stderr)
        print(open(os.path.join(where, "log"), errors="replace").read()[-4000:], file=sys.stderr)
        raise SystemExit(1)
    figures = {c.model.name: c.model.figures for c in clients}
    print(f"{n} kills, operations {lab.started}, jobs after kills {lab.resumed}, lives in which all jobs ended: {lab.outlived}, clients {figures}: nothing lost")
    shutil.rmtree(where)


main()
