#!/usr/bin/env python3
"""Replays recorded conversations with qemu-storage-daemon against another daemon and compares the answers.

    replay.py [--daemon PATH] [--verbose] TRANSCRIPT.jsonl ...

A transcript has one JSON object a line: {"d": "X"} a command that was run (the daemon is started by one), "C" what the
client sent ("m" an object, "raw" bytes, "conn" another connection), "S" what the daemon sent, "N" a note. Exit status 0:
no transcript differs; 1: some do; 2: wrong use.

What is compared: every reply, in order, per connection; every event, in order, per job (or export, or node). What is not:
times, names that the daemon invents (#blockNNN), versions, actual-size, racy members (busy), where events stand between
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
RACY = {"busy", "actual-size", "microseconds", "seconds", "package", "timestamp"}


# (transcript, what a problem contains, why it may differ). Each is also told in docs/compat.md.
KNOWN = [
    ("", "-[backing]-> src", "the filter's edge asks for what its users need, and does not keep others from growing the disk"),
    ("", "qemu-io: can't", "the recorder's helpers were not recorded"),
    ("mirror-success", "image.virtual-size: want 4521984", "the target image is laid out differently"),
    ("mirror-success", "dirty-bitmaps: missing", "the mirror's own record is no bitmap of the filter node"),
    ("mirror-cancel-before-ready", "offset: want 8388608", "a slow mirror does not begin with a burst of the buffer's size"),
    ("mirror-cancel-before-ready", "current-progress: want 8388608", "the same"),
    ("mirror-throttled-cancel", "offset: want", "the same"),
    ("mirror-copy-mode-switch", "actively-synced: want false, got true", "a switch takes effect at once"),
    ("mirror-copy-mode-switch", "is not implemented", "every switch is implemented"),
    ("mirror-write-blocking", "is not implemented", "every switch is implemented"),
    ("mirror-complete-replaces-users", "qemu-io -f qcow2", "the recorder's NBD client was not recorded"),
    ("", "len: want 16842752", "the same"),
    ("", "offset: want 16842752", "the same"),
    ("", "len: want 16908288", "the same"),
    ("", "offset: want 16908288", "the same"),
    ("", "len: want 8454144", "the same"),
    ("", "offset: want 8454144", "the same"),
    ("blockdev-create", "unshared by node 'n'", "all permissions in conflict are named"),
]


class Connection:
    """One QMP client, reading messages as they come."""

    def __init__(self, path):
        deadline = time.monotonic() + 10
        while True:
            self.sock = socket.socket(socket.AF_UNIX)
            try:
                self.sock.connect(path)
                break
            except OSError:
                self.sock.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
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
            cleaned.sort(key=lambda v: (v["node-name"], v["drv"], v["file"]))
        return cleaned
    if isinstance(value, str):
        for real, shown in names:
            value = value.replace(real, shown)
        return re.sub(r"#block\d+", "#block", value)
    return value


def picture(graph):
    """The edges between nodes of x-debug-query-block-graph, without numbers. How jobs and exports hold their nodes is not
    compared: the reference shows its own machinery there."""
    nodes = {n["id"]: n for n in graph["nodes"]}
    return sorted(
        f"{nodes[e['parent']]['name']} -[{e['name']}]-> {nodes[e['child']]['name']} "
        f"perm={'+'.join(sorted(e['perm']))} shared={'+'.join(sorted(e['shared-perm']))}"
        for e in graph["edges"]
        if nodes[e["parent"]]["type"] == "block-driver"
    )


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
        before = 0.0
        try:
            for entry in entries:
                if entry["d"] == "X":
                    self.command(entry)
                elif entry["d"] == "C":
                    time.sleep(min(max(entry["t"] - before, 0), GAP_LIMIT))
                    connection, _, _ = self.connection(entry)
                    if "raw" in entry:
                        connection.send(entry["raw"].encode())
                    else:
                        self.note_pause(entry["m"])
                        connection.send(self.real(json.dumps(entry["m"])).encode())
                elif entry["d"] == "S":
                    self.expect(entry)
                before = entry["t"]
            self.finish()
        except (OSError, subprocess.TimeoutExpired, Stop) as e:
            self.problem(f"stopped: {e}")
        finally:
            if self.process and self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            shutil.rmtree(self.dir, ignore_errors=True)
        return self.problems

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
            want, got = clean(message, self.names), clean(connection.replies[len(replies) - 1], self.names)
            for d in differences(want, got):
                self.problem(f"reply {len(replies)}{d}")
            if self.verbose:
                print("   ", json.dumps(got)[:200])

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


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--daemon", default=os.environ.get("LIVEBLKD", "liveblkd"))
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("transcripts", nargs="+")
    options = parser.parse_args()
    failed = 0
    for path in options.transcripts:
        problems = Replay(options.daemon, path, options.verbose).run()
        name = os.path.basename(path)
        problems = [p for p in problems if not any(name.startswith(n) and k in p for n, k, _ in KNOWN)]
        print(f"{'differs' if problems else 'same':8}{os.path.basename(path)}")
        for p in problems[:40]:
            print("        ", p)
        failed += bool(problems)
    print(f"{len(options.transcripts) - failed} of {len(options.transcripts)} the same")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
