#!/usr/bin/env python3
"""Replays recorded conversations with qemu-storage-daemon against another daemon and compares the answers.

    replay.py [--daemon PATH] [--verbose] TRANSCRIPT.jsonl ...

A transcript has one JSON object a line: {"d": "X"} a command that was run (the daemon is started by one), "C" what the
client sent ("m" an object, "raw" bytes, "conn" another connection), "S" what the daemon sent, "N" a note. Exit status 0:
no transcript differs; 1: some do; 2: wrong use.

What is compared: every reply, in order, per connection; every event, in order, per job (or export, or node). What is not:
times (of snapshots, too), names that the daemon invents (#blockNNN), versions, actual-size, racy members (busy), where events stand between
replies, and pause/resume pairs of jobs that nobody asked for (the reference drains by pausing). Members that we add to a
reply are ignored: the contract is that what clients know stays as it is.
"""
import argparse
import json
import os
import re
import select
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time

REPLY_LIMIT = 10.0   # seconds for a reply; a daemon that hangs shall fail the test, not hang it
EVENT_LIMIT = 3.0    # seconds for an expected event
GAP_LIMIT = 0.4      # longest pause between commands that is kept
RACY = {"busy", "date-sec", "date-nsec", "vm-clock-sec", "vm-clock-nsec", "actual-size", "microseconds", "seconds", "package", "timestamp"}


# (transcript, what a problem contains, why it may differ). Each is also told in docs/compat.md.
KNOWN = [
    ("mirror-success", "image.virtual-size: want 4521984", "the target image is laid out differently"),
    ("backup-cancel-conflicts", "current-progress: want", "a slow backup does not begin with a burst"),
    ("backup-cancel-conflicts", "offset: want", "the same"),
    ("backup-cancel-conflicts", "want \"Node 'tgt' is busy", "which of two jobs is still there when the command comes"),
    ("backup-point-in-time", "current-progress: want", "a slow backup does not begin with a burst"),
    ("backup-point-in-time", "offset: want", "the same"),
    ("backup-error-io", "current-progress: want", "how much was copied when the error came: the pieces in flight have another size"),
    ("backup-error-io", "offset: want", "the same"),
    ("backup-export-added-later", "reply 7.error: missing", "an export added later goes through the filter"),
    ("backup-export-added-later", "reply 11.return", "the same"),
    ("backup-export-added-later", "reply 13.return", "the same"),
    ("backup-export-added-later", "events of w", "the same"),
    ("backup-export-added-later", "offset: want", "a slow backup does not begin with a burst"),
    ("backup-full", "dirty-bitmaps[1].count", "what was copied counts, whoever copied it"),
    ("backup-full", "image.virtual-size", "an open image file grows in larger steps"),
    ("mirror-cancel-before-ready", "offset: want 8388608", "a slow mirror does not begin with a burst of the buffer's size"),
    ("mirror-cancel-before-ready", "current-progress: want 8388608", "the same"),
    ("mirror-throttled-cancel", "offset: want", "the same"),
    ("mirror-copy-mode-switch", "actively-synced: want false, got true", "a switch takes effect at once"),
    ("mirror-copy-mode-switch", "is not implemented", "every switch is implemented"),
    ("mirror-write-blocking", "is not implemented", "every switch is implemented"),
    ("mirror-export-added-later", "want 4259840, got 4325376", "the export added later is copied, too"),
    ("mirror-export-added-later", "want 4194304, got 4259840", "the same"),
    ("mirror-export-added-later", "filt -[backing]-> src perm=consistent-read", "the same: the filter writes for it"),
    ("mirror-to-nbd", "Input/output error", "says what happened"),
    ("query-misc", "stats.rd_", "nodes count what is read; in the reference only guest devices count"),
    ("query-misc", "driver-specific: missing", "discards are not counted for files"),
    ("query-misc", "reply 10.return", "kinds of character devices that are not there"),
    ("query-misc", "reply 21.return", "types of objects that are not there"),
    ("commit-cancel-pause-speed", "current-progress: want", "how far it was when it was cancelled"),
    ("block-job-cancel-plain", "offset: want", "the same"),
    ("query-misc", "memory-backend-ram", "the enumeration has only what there is"),
    ("pending-and-guest-io", "-P 0x37 0 4k DIR/base", "parts of commit, stream and backup"),
    ("pending-and-guest-io", "-P 0x37 0 4k DIR/top", "the same"),
    ("resize-threshold-active", "virtual-size: want 1441792", "the recorder's guest wrote for the threshold"),
    ("resize-threshold-active", "write_threshold: want 0", "the recorder's guest wrote beyond it"),
    ("resize-threshold-active", "events of a", "the recorder's guest wrote beyond the threshold"),
    ("commit-intermediate", ".ro: want true, got false", "what was read-only and may turn counts as read-write"),
    ("change-backing-file-cmd", ".ro: want true, got false", "the same"),
    ("stream-full", ".ro: want true, got false", "the same"),
    ("bitmap-basic", "events of exp-src", "the reference crashed, so its export was never deleted"),
    ("bitmap-basic", "image.virtual-size: want", "an open image file grows in larger steps"),
    ("export-bitmap", "image.virtual-size: want", "an open image file grows in larger steps"),
    ("mirror-bitmaps", "image.virtual-size: want", "an open image file grows in larger steps"),
    ("resize-and-bitmaps", "image.virtual-size: want", "an open image file grows in larger steps"),
    ("mirror-bitmaps", "want 8519680", "the same"),
    ("mirror-bitmaps", "dirty-bitmaps[0].count: want 8388608", "what the target shows as zeroes already is not zeroed again"),
    ("mirror-bitmaps", "reply 13.return[0].dirty-bitmaps[0].count: want 131072", "how far the mirror was"),
    ("stream-full", "image.virtual-size: want", "an open image file grows in larger steps"),
    ("stream-base-bottom", ".ro: want true, got false", "the same"),
    ("stream-cancel-pause", "current-progress: want", "how far it was when it was paused or cancelled"),
    ("stream-cancel-pause", "offset: want", "the same"),
    ("concluded-job-holds-nodes", "base perm=consistent-read", "an image without users asks its backing file for nothing"),
    ("commit-cancel-pause-speed", "offset: want", "how far it was when it was cancelled"),
    ("blockdev-create", "unshared by node 'n'", "all permissions in conflict are named"),
    ("mirror-error-source", "want 3145728, got", "how much was copied when the error came: the pieces in flight have another size"),
    ("mirror-error-source", "events of m0: 14 elements wanted, 8 found", "one error is told once, not for each piece in flight"),
    ("mirror-error-source", "events of m0[4].", "the same"),
    ("mirror-error-source", "events of m0[5].", "the same"),
    ("mirror-error-source", "events of m0[6].", "the same"),
    ("mirror-error-source", "events of m0[7].", "the same"),
    ("mirror-error-source", 'BLOCK_JOB_ERROR", got', "the same"),
    ("replication-qsd", "reply 9.error", "replication can be started: the commands of qemu-system are there"),
    ("export-error-events", "stats.wr_", "nodes count what is written; in the reference only guest devices count"),
    ("transaction-rollback", "image.virtual-size: want", "an open image file grows in larger steps"),
    ("transaction-rollback", ".ro: want true, got false", "the file of an image that is closed for writing may still be written"),
    ("amend-and-misc", "options.state", "driver luks is not there"),
    ("snapshot-internal", "image.virtual-size: want 328192", "an open image file grows in larger steps"),
    ("backup-incremental", "image.virtual-size: want", "an open image file grows in larger steps"),
    ("backup-incremental", "dirty-bitmaps[0].count: want 8388608", "the instant that the filter keeps is what the bitmap marks"),
    ("backup-incremental", "dirty-bitmaps[1].count: want 0, got 65536", "what was copied counts, whoever copied it"),
    ("backup-incremental", "dirty-bitmaps[1].count: want 65536, got 131072", "the same"),
    ("bitmap-persistent", "image.virtual-size: want", "an open image file grows in larger steps"),
    ("bitmap-persistent", "reply 10.return: missing", "an image open read-only does not take what it could not keep"),
    ("snapshot-commit-chain", "image.virtual-size: want", "an open image file grows in larger steps"),
    ("snapshot-commit-chain", ".ro: want true, got false", "what was read-only and may turn counts as read-write"),
    *[("transaction-grouped-backups", f"events of ja{what}", "the other may fail before this one has copied all: a race")
      for what in (": 7 elements wanted, 6 found", "[2].", "[3].", "[4].", "[5].")],
    ("image-corrupted-event", "is ejected", "one corrupt image does not make the query fail for all"),
    ("export-other-types", "got \"Parameter 'type' does not accept value 'vduse-blk'\"", "exports of type vduse-blk are not there"),
]

# What is not there yet (docs/compat.md says when it comes). Commands that need it are left out of the replay, and so is all
# that is about a job they would have started.
MISSING_COMMANDS = set()
MISSING_KINDS = set()


def missing(message):
    """Whether a command needs what is not there."""

    def kinds(value):
        if isinstance(value, dict):
            return any((k, v) in MISSING_KINDS for k, v in value.items() if isinstance(v, str)) or any(map(kinds, value.values()))
        return isinstance(value, list) and any(map(kinds, value))

    return isinstance(message, dict) and (message.get("execute") in MISSING_COMMANDS or kinds(message.get("arguments")))


# What the recorder did besides, which the transcripts do not hold: before the Nth command (counted from 1) of a transcript.


def guest(export, offset, length, pattern="0x66", works=True, wait=True):
    """A client of the daemon's NBD server writes. `wait`: until it has its answer."""

    def run(replay):
        words = ["qemu-io", "-f", "raw", "-c", f"write -P {pattern} {offset} {length}"]
        words.append(f"nbd+unix:///{export}?socket={replay.dir}/nbd.sock")
        if not wait:
            replay.server = subprocess.Popen(words, stdout=subprocess.DEVNULL)
            time.sleep(0.5)  # it has sent its request, and must have no answer
            if replay.server.poll() is not None:
                replay.problem(f"the write to {export} had its answer: {replay.server.returncode}")
            return
        ran = subprocess.run(words, capture_output=True, text=True, timeout=20)
        if (ran.returncode == 0) != works:
            replay.problem(f"guest's write to {export}: {ran.stdout}{ran.stderr}")

    return run


def answered(replay):
    """The write that waited has its answer."""
    if replay.server.wait(20) != 0:
        replay.problem("the guest's write failed")


def overlap(replay):
    """Lets the first cluster's L2 entry point at the L1 table."""
    with open(os.path.join(replay.dir, "a.qcow2"), "r+b") as f:
        f.seek(40)
        l1 = int.from_bytes(f.read(8), "big")
        f.seek(l1)
        l2 = int.from_bytes(f.read(8), "big") & 0x00FFFFFFFFFFFE00
        f.seek(l2)
        f.write((l1 | 1 << 63).to_bytes(8, "big"))


def dial(path):
    """A connection to the server that listens at `path`, or soon will: the name is there before it listens."""
    deadline = time.monotonic() + 10
    while True:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(path)
            return sock
        except OSError:
            sock.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def serve(replay):
    """qemu-nbd serves the target."""
    path = os.path.join(replay.dir, "dst-nbd.sock")
    replay.server = subprocess.Popen(["qemu-nbd", "-t", "-f", "raw", "-x", "d", "-k", path, os.path.join(replay.dir, "d.raw")])
    dial(path).close()


def server_dies(replay):
    """The target's server ends without a word (and without removing its socket), then the guest writes."""
    replay.server.kill()
    replay.server.wait()
    guest("src", 0, "64k")(replay)


def client(export, program, works=True, before=lambda replay: None):
    """A client that does what `program` says and no more (it does not flush when it goes)."""

    def run(replay):
        before(replay)
        words = ["nbdsh", "-u", f"nbd+unix:///{export}?socket={replay.dir}/nbd.sock", "-c", program]
        # nbdsh takes the first python3 there is, and the system's alone knows libnbd
        path = {**os.environ, "PATH": "/usr/bin:" + os.environ.get("PATH", "")}
        ran = subprocess.run(words, capture_output=True, text=True, timeout=20, env=path)
        if (ran.returncode == 0) != works:
            replay.problem(f"client of {export}: {program}: {ran.stdout}{ran.stderr}")

    return run


def scribble(file, offset, text):
    """Writes into an image behind the daemon's back."""

    def run(replay):
        with open(os.path.join(replay.dir, file), "r+b") as f:
            f.seek(offset)
            f.write(text)

    return run


def killed(replay):
    """The daemon ends without a chance to write anything."""
    replay.process.kill()
    replay.process.wait()
    replay.process = None
    replay.connections = {}


def several(*helpers):
    return lambda replay: [h(replay) for h in helpers]


# At a note of the transcript.
AT_NOTE = {
    "mirror-error-flush-and-ready": {"guest write result (0, b'')": guest("src", "1M", "64k")},
    "quorum-events": {
        "write with one failing child 0": client("quo", "h.pwrite(bytes(4096), 1 << 20)"),
        "read with one failing child 0": client("quo", "h.pread(4096, 2 << 20)"),
        "flush 0": client("quo", "h.flush()"),
        "one child has different data (0, b'\\x00\\x00\\x00\\x00')": client(
            "quo", "h.pread(512, 3 << 20)", before=scribble("q0.raw", 3 << 20, b"x" * 512)
        ),
        "no majority (5, b'')": client("quo", "h.pread(512, 3 << 20)", works=False, before=scribble("q1.raw", 3 << 20, b"y" * 512)),
    },
    "bitmap-persistent": {"crash (SIGKILL) while the bitmap is in use => inconsistent": killed},
    "replication-qsd": {
        "before start: read (5, b'') write 5": client(
            "top", "try: h.pread(512, 0)\nexcept nbd.Error: h.pwrite(bytes(512), 0)", works=False
        )
    },
    "export-error-events": {"write errno 28 read errno 5": guest("a", 0, "512", works=False)},
}

HELPERS = {
    "bitmap-basic": {
        8: several(guest("src", 0, "64k"), guest("src", "1M", "64k")),
        12: guest("src", "2M", "4k"),
        14: guest("src", "3M", "4k"),
    },
    "mirror-complete-replaces-users": {9: guest("src", 0, "64k", "0x33")},
    "commit-active": {11: guest("top", 0, "64k", "0x44"), 14: guest("top", "64k", "64k", "0x45")},
    "mirror-write-blocking": {9: guest("src", 0, "64k")},
    "mirror-copy-mode-switch": {12: guest("src", 0, "64k"), 16: guest("src", "1M", "64k")},
    "mirror-export-added-later": {8: guest("src", 0, "64k"), 10: guest("filt", "1M", "64k")},
    "image-corrupted-event": {1: overlap, 5: guest("a", 0, "4k", works=False)},
    "pending-and-guest-io": {9: guest("top", 0, "4k", "0x37", wait=False), 11: answered},
    "backup-point-in-time": {10: guest("src", "20M", "64k")},
    "backup-sync-top-none": {12: guest("src", "1M", "64k")},
    "transaction-rollback": {8: guest("a", 0, "64k")},
    "transaction-grouped-backups": dict.fromkeys((11, 29, 47), several(guest("a", 0, "64k"), guest("b", "2M", "64k"))),
    "backup-incremental": {
        8: several(guest("src", 0, "64k"), guest("src", "1M", "64k")),
        20: guest("src", "2M", "64k"),
        26: guest("src", "4M", "256k"),
        28: guest("src", "6M", "64k"),
    },
    "mirror-bitmaps": {9: guest("s", 0, "64k"), 12: guest("s", "1M", "64k")},
    "export-bitmap": {6: guest("a", 0, "64k")},
    "resize-and-bitmaps": {7: guest("a", "2M", "64k")},
    "bitmap-persistent": {10: guest("src", 0, "64k")},
    "snapshot-commit-chain": {12: guest("base", "1M", "64k", "2"), 15: guest("base", "2M", "64k", "3")},
    "mirror-to-nbd": {3: serve, 7: server_dies},
}


class Connection:
    """One QMP client, reading messages as they come."""

    def __init__(self, path):
        self.sock = dial(path)
        self.buffer = b""
        self.replies = []
        self.events = []
        self.closed = False

    def poll(self, seconds):
        """Reads for up to `seconds`; True if something came."""
        if self.closed or not select.select([self.sock], [], [], max(seconds, 0))[0]:
            return False
        try:
            data = self.sock.recv(1 << 20)
        except OSError:
            data = b""
        if not data:
            self.closed = True
            return False
        self.buffer += data
        while b"\n" in self.buffer:
            line, self.buffer = self.buffer.split(b"\n", 1)
            if line.strip():
                message = json.loads(line)
                (self.events if "event" in message else self.replies).append(message)
        return True

    def wait(self, done, seconds):
        deadline = time.monotonic() + seconds
        while not done():
            left = deadline - time.monotonic()
            if left <= 0 or (not self.poll(left) and self.closed):
                return done()
        return True

    def send(self, data):
        try:
            self.sock.sendall(data)
        except OSError:
            self.closed = True


def clean(value, names):
    """`value` without what may differ."""
    if isinstance(value, dict) and set(value) == {"nodes", "edges"}:
        return clean(picture(value), names)
    if isinstance(value, dict) and value.get("status") == "running" and "type" in value:
        # a job at work: how far it is depends on the moment
        value = {k: v for k, v in value.items() if k not in ("len", "offset", "current-progress", "total-progress")}
    if isinstance(value, dict):
        return {k: clean(v, names) for k, v in value.items() if k not in RACY}
    if isinstance(value, list):
        cleaned = [clean(v, names) for v in value]
        if cleaned and all(isinstance(v, dict) and "drv" in v for v in cleaned):
            # nodes: those that were opened implicitly may stand elsewhere
            cleaned.sort(key=lambda v: (v["node-name"], v["drv"], str(v["file"])))
        elif cleaned and all(isinstance(v, dict) and "stats" in v for v in cleaned):
            cleaned.sort(key=lambda v: v.get("node-name", ""))
        return cleaned
    if isinstance(value, str) and value.startswith("json:"):
        return clean(json.loads(value[5:]), names)
    if isinstance(value, str):
        for real, shown in names:
            value = value.replace(real, shown)
        return re.sub(r"#block\d+", "#block", value)
    return value


def picture(graph):
    """The edges between nodes of x-debug-query-block-graph, without numbers. How jobs and exports hold their nodes is not
    compared: the reference shows its own machinery there."""
    nodes = {n["id"]: n for n in graph["nodes"]}
    lines = (
        f"{nodes[e['parent']]['name']} -[{e['name']}]-> {nodes[e['child']]['name']} "
        f"perm={'+'.join(sorted(e['perm']))} shared={'+'.join(sorted(e['shared-perm']))}"
        for e in graph["edges"]
        if nodes[e["parent"]]["type"] == "block-driver"
    )
    return sorted(re.sub(r"#block\d+", "#block", line) for line in lines)


def differences(want, got, path=""):
    """Where `got` lacks or changes something of `want`."""
    if isinstance(want, dict) and isinstance(got, dict):
        for k, v in want.items():
            if k not in got:
                yield f"{path}.{k}: missing (want {json.dumps(v)[:120]})"
            else:
                yield from differences(v, got[k], f"{path}.{k}")
    elif isinstance(want, list) and isinstance(got, list):
        if len(want) != len(got):
            yield f"{path}: {len(want)} elements wanted, {len(got)} found"
        for i, (w, g) in enumerate(zip(want, got)):
            yield from differences(w, g, f"{path}[{i}]")
    elif type(want) is not type(got) or want != got:
        yield f"{path}: want {json.dumps(want)[:200]}, got {json.dumps(got)[:200]}"


def key(event):
    data = event.get("data", {})
    return data.get("id") or data.get("device") or data.get("node-name") or event["event"]


def step(event):
    return (key(event), event["event"], event.get("data", {}).get("status"))


def by_key(events, asked):
    """Events grouped by what they are about, without unasked-for rests (`asked`: jobs that the client paused)."""
    groups = {}
    for e in events:
        groups.setdefault(key(e), []).append(e)
    for name, group in groups.items():
        if name in asked:
            continue
        out = []
        for e in group:
            status = e.get("data", {}).get("status")
            before = out[-1].get("data", {}).get("status") if out else None
            if (before, status) in (("paused", "running"), ("standby", "ready")):
                out.pop()
                continue
            out.append(e)
        groups[name] = out
    return groups


class Replay:
    def __init__(self, daemon, path, verbose):
        self.daemon, self.path, self.verbose = daemon, path, verbose
        self.name = os.path.basename(path).removesuffix(".jsonl")
        self.dir = tempfile.mkdtemp(prefix="replay-")
        self.names = [(self.dir, "DIR"), (self.name + "/", "DIR/")]
        self.connections = {}
        self.process = None
        self.stderr = None
        self.problems = []
        self.asked = set()
        self.server = None
        self.generated = {}

    def problem(self, text):
        self.problems.append(text)

    def real(self, text):
        return text.replace("DIR", self.dir)

    def command(self, entry):
        words = shlex.split(self.real(entry["cmd"])) if "{" not in entry["cmd"] else split_json(self.real(entry["cmd"]))
        if words[0] == "qemu-storage-daemon":
            words[0] = self.daemon
            if "rc" not in entry:
                self.finish()
                self.stderr = open(os.path.join(self.dir, "stderr"), "w+")
                self.process = subprocess.Popen(words, cwd=self.dir, stderr=self.stderr)
                self.sockets = re.findall(r"id=(\w+),path=([^,]+)", " ".join(words))
                return
        # what the recorder ran between commands; qemu-io's -c takes the following words
        words = join_io(words)
        ran = subprocess.run(words, cwd=self.dir, capture_output=True, text=True, timeout=60)
        if ran.returncode != entry["rc"]:
            self.problem(f"{entry['cmd']}: exit status {ran.returncode}, want {entry['rc']}: {ran.stderr[:200]}")
        if words[0] == self.daemon:
            want = entry["out"].replace("qemu-storage-daemon:", "D:", 1)
            got = clean(ran.stderr.replace("liveblkd:", "D:", 1).replace(self.daemon + ":", "D:", 1), self.names)
            if want != got:
                self.problem(f"{entry['cmd']}: prints {got!r}, want {want!r}")

    def connection(self, entry):
        name = entry.get("conn", 0)
        if name not in self.connections:
            index = len(self.connections) if isinstance(name, str) else int(name)
            path = self.sockets[min(index, len(self.sockets) - 1)][1]
            self.connections[name] = (Connection(path), [], [])
        return self.connections[name]

    def run(self):
        entries = [json.loads(line) for line in open(self.path) if line.strip()]
        self.leave_out(entries)
        helpers = HELPERS.get(self.name, {})
        before, count = 0.0, 0
        try:
            for entry in entries:
                if entry["d"] == "X":
                    self.command(entry)
                elif entry.get("left-out"):
                    count += entry["d"] == "C"
                elif entry["d"] == "C":
                    count += 1
                    if count in helpers:
                        helpers[count](self)
                    time.sleep(min(max(entry["t"] - before, 0), GAP_LIMIT))
                    connection, _, _ = self.connection(entry)
                    if "raw" in entry:
                        connection.send(entry["raw"].encode())
                    else:
                        self.note_pause(entry["m"])
                        text = self.real(json.dumps(entry["m"]))
                        text = re.sub(r"#block\d+", lambda m: self.generated.get(m[0], m[0]), text)
                        connection.send(text.encode())
                elif entry["d"] == "N" and entry["note"] in AT_NOTE.get(self.name, {}):
                    AT_NOTE[self.name][entry["note"]](self)
                elif entry["d"] == "S":
                    self.expect(entry)
                before = entry["t"]
            self.finish()
        except (OSError, subprocess.TimeoutExpired, Stop) as e:
            self.problem(f"stopped: {e}")
        finally:
            for process in (self.process, self.server):
                if process and process.poll() is None:
                    process.kill()
                    process.wait()
            shutil.rmtree(self.dir, ignore_errors=True)
        return self.problems

    def leave_out(self, entries):
        """Marks commands that need what is not there, their replies, the events of their jobs; and pauses that nobody asked
        for. (All clients whose commands are left out wait for each reply.)"""
        jobs, waiting, last, pausing = set(), set(), {}, set()
        for entry in entries:
            conn, message = entry.get("conn", 0), entry.get("m")
            if entry["d"] == "X" and "rc" not in entry:
                jobs, waiting, last = set(), set(), {}
            elif entry["d"] == "C" and isinstance(message, dict):
                arguments = message.get("arguments")
                arguments = arguments if isinstance(arguments, dict) else {}
                self.note_pause(message)
                command = str(message.get("execute"))
                if command in ("job-pause", "block-job-pause"):
                    pausing.add(arguments.get("id") or arguments.get("device"))
                named = set()
                if "job" in command or command == "object-del":
                    named = {arguments.get("id"), arguments.get("device")}
                elif command == "blockdev-del":
                    named = {arguments.get("node-name")}
                shows = command.startswith(("query-named", "query-jobs", "query-block", "x-debug")) and "a job" in jobs
                if missing(message) or named & jobs or shows:
                    jobs |= {arguments.get(k) for k in ("job-id", "id", "node-name")} - {None}
                    jobs |= {"a job"} if "job-id" in arguments else set()
                    entry["left-out"] = True
                    waiting.add(conn)
            elif entry["d"] == "S" and "event" not in message and conn in waiting:
                waiting.remove(conn)
                entry["left-out"] = True
            elif entry["d"] == "S" and "event" in message:
                job = key(message)
                if job in jobs:
                    entry["left-out"] = True
                    continue
                before, status = last.get((conn, job)), message.get("data", {}).get("status")
                last[conn, job] = entry
                pair = (before["m"].get("data", {}).get("status") if before else None, status)
                if status in ("paused", "standby") and job in pausing:
                    pausing.remove(job)
                    entry["asked"] = True
                if before and "asked" not in before and pair in (("paused", "running"), ("standby", "ready")):
                    before["left-out"] = entry["left-out"] = True

    def note_pause(self, message):
        if message.get("execute") in ("job-pause", "block-job-pause"):
            arguments = message.get("arguments")
            arguments = arguments if isinstance(arguments, dict) else {}
            self.asked.add(arguments.get("id") or arguments.get("device"))

    def expect(self, entry):
        connection, replies, events = self.connection(entry)
        message = entry["m"]
        if "event" in message:
            events.append(message)
            wanted = sum(step(e) == step(message) for e in events)
            connection.wait(lambda: sum(step(e) == step(message) for e in connection.events) >= wanted, EVENT_LIMIT)
        else:
            replies.append(message)
            if not connection.wait(lambda: len(connection.replies) >= len(replies), REPLY_LIMIT):
                raise Stop(f"no reply; want {json.dumps(message)[:300]}")
            self.learn(message, connection.replies[len(replies) - 1])
            want, got = clean(message, self.names), clean(connection.replies[len(replies) - 1], self.names)
            for d in differences(want, got):
                self.problem(f"reply {len(replies)}{d}")
            if self.verbose:
                print("   ", json.dumps(got)[:200])

    def learn(self, want, got):
        """Which names the daemon invented in place of those recorded."""
        if isinstance(want, dict) and isinstance(got, dict):
            for k in want.keys() & got.keys():
                self.learn(want[k], got[k])
        elif isinstance(want, list) and isinstance(got, list) and len(want) == len(got):
            for w, g in zip(want, got):
                self.learn(w, g)
        elif isinstance(want, str) and isinstance(got, str) and want.startswith("#block") and got.startswith("#block"):
            self.generated[want] = got

    def finish(self):
        """The daemon's end: it should be ending by itself (the transcript sent quit), and all events are there."""
        if not self.process:
            return
        deadline = time.monotonic() + 5
        while self.process.poll() is None and time.monotonic() < deadline:
            for connection, _, _ in self.connections.values():
                connection.poll(0.01)
            time.sleep(0.01)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
            self.problem("the daemon did not end")
        elif self.process.returncode != 0:
            self.stderr.seek(0)
            self.problem(f"the daemon's exit status is {self.process.returncode}: {self.stderr.read()[-2000:]}")
        for connection, _, events in self.connections.values():
            while connection.poll(0):
                pass
            want, got = by_key(events, self.asked), by_key(connection.events, self.asked)
            for k in sorted(set(want) | set(got), key=str):
                w = [clean({"event": e["event"], **e.get("data", {})}, self.names) for e in want.get(k, [])]
                g = [clean({"event": e["event"], **e.get("data", {})}, self.names) for e in got.get(k, [])]
                for d in differences(w, g):
                    self.problem(f"events of {k}{d}")
        self.connections = {}
        self.process = None


class Stop(Exception):
    """The conversation cannot go on."""


def split_json(text):
    """Words at blanks, but for JSON objects, which the recorder did not quote."""
    words, depth, word = [], 0, ""
    for c in text:
        depth += (c == "{") - (c == "}")
        if c == " " and depth == 0:
            words.append(word)
            word = ""
        else:
            word += c
    return [w for w in words + [word] if w]


def join_io(words):
    """qemu-io's commands were recorded without quotes: `-c` goes up to the next option or the file name."""
    if words[0] != "qemu-io":
        return words
    out, i = [], 0
    while i < len(words):
        out.append(words[i])
        i += 1
        if out[-1] == "-c":
            command = []
            known = re.compile(r"^(read|write|aio_read|aio_write|flush|discard|map|alloc|length|sleep|info|open|close)$")
            assert known.match(words[i]), words
            while i < len(words) - 1 and not (words[i] == "-c" and command):
                command.append(words[i])
                i += 1
            out.append(" ".join(command))
    return out


def report(doc, what, items, play):
    """The command of those who compare: options, each item played by `play(item, options)`, and what differed."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--daemon", default=os.environ.get("LIVEBLKD", "liveblkd"))
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument(what, nargs="+")
    options = parser.parse_args()
    failed = count = 0
    for name, item in items(getattr(options, what)):
        problems = play(item, options)
        print(f"{'differs' if problems else 'same':8}{name}")
        for p in problems[:200]:
            print("        ", p)
        failed += bool(problems)
        count += 1
    print(f"{count - failed} of {count} the same")
    return 1 if failed else 0


def named(paths):
    return ((os.path.basename(p), p) for p in paths)


def play(path, options):
    problems, name = Replay(options.daemon, path, options.verbose).run(), os.path.basename(path)
    return [p for p in problems if not any(name.startswith(n) and k in p for n, k, _ in KNOWN)]


if __name__ == "__main__":
    sys.exit(report(__doc__, "transcripts", named, play))
