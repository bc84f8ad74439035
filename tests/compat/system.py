#!/usr/bin/env python3
"""Replays conversations recorded with qemu-system (the commands of its replication, which QSD lacks) against another daemon.

    system.py [--daemon PATH] [--verbose] TRANSCRIPT.jsonl ...

Each `qemu-system` of a transcript is a daemon here. `qemu-io` by way of `human-monitor-command` is a client of an export that is made
for it; what it said stands in the note behind. What NBD clients did while it was recorded is not in the transcript: see CLIENTS.
Compared are replies and what clients read, and of events those of quorums. Exit status 0: nothing differs but what KNOWN has.
"""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from replay import Connection, clean, differences, named, report  # noqa: E402

# (transcript, what a difference contains, why it may differ: each is told in docs/compat.md)
KNOWN = [
    ("system-replication", "xen-set-replication: want {\"return\": {}}, got {\"error\"", "a side that was stopped says so when it is stopped again"),
    ("system-replication", "file.backing: missing", "QEMU names a node by its options where its backing was one of them"),
    ("system-replication", "childs0 -[", "what the filter asks of the disks that it does not itself write to"),
    ("system-replication", "x-debug-query-block-graph: .return: 3 elements", "the filter stays in front of former exports until they are removed"),
    ("system-replication", "x-debug-query-block-graph: .return[", "so the edges behind differ, too"),
    ("system-replication-stop", "x-debug-query-block-graph", "a plain stop leaves nothing half done"),
    ("system-replication-stop", "xen-set-replication: want {\"error\"", "a plain stop of a secondary succeeds"),
    ("system-replication-stop", "\"read -v 0 4\"", "and drops what its own user wrote"),
    ("system-replication-stop", "\"read -v 1M 4\"", "so its view is the primary's then"),
    ("system-replication-errors", "xen-colo-do-checkpoint", "a primary that did not forward something refuses the checkpoint"),
]
# (transcript, the beginning of a note, connection, export, what a client did then)
CLIENTS = [
    ("system-replication", "write before replication", "pri", "g", "write -P 0x61 0 64k"),
    ("system-replication", "write with replication", "pri", "g", "write -P 0x62 1M 64k"),
    ("system-replication", "primary writes after", "pri", "g", "write -P 0x63 3M 64k"),
    ("system-replication-stop", "job control on", "sec", "parent0", "write -P 0x71 1M 64k"),
]
# Servers that ran beside: (transcript, what the command that precedes them contains, the server, what it ends before).
SERVERS = [("system-replication-errors", "DIR/t.raw", "qemu-nbd -f raw -x d -t -k DIR/t.sock DIR/t.raw", "write -P 2 0 64k")]
LIMIT = 20.0  # seconds for a reply


class System:
    def __init__(self, daemon, directory, words):
        path = next(w for w in words if w.startswith("unix:")).split(":", 1)[1].split(",")[0].replace("DIR", directory)
        self.dir, self.server = directory, None
        chardev = f"socket,id=c,path={path},server=on,wait=off"
        self.process = subprocess.Popen([daemon, "--chardev", chardev, "--monitor", "c"], cwd=directory)
        self.connection = Connection(path)
        self.connection.wait(lambda: self.connection.replies, LIMIT)

    def ask(self, message):
        seen = len(self.connection.replies)
        self.connection.send(json.dumps(message).replace("DIR", self.dir).encode() + b"\n")
        self.connection.wait(lambda: len(self.connection.replies) > seen, LIMIT)
        said = self.connection.replies[seen] if len(self.connection.replies) > seen else "no reply"
        if message["execute"] == "nbd-server-start" and "return" in said:
            self.server = message["arguments"]["addr"]["data"]["path"].replace("DIR", self.dir)
        return said

    def io(self, node, command):
        """What qemu-io says of a command on a node."""
        path = self.server or os.path.join(self.dir, "io.sock")
        if not self.server:
            self.ask({"execute": "nbd-server-start", "arguments": {"addr": {"type": "unix", "data": {"path": path}}}})
            self.server = None
        arguments = {"type": "nbd", "id": "qemu-io", "node-name": node, "name": "qemu-io"}
        # a user of its own that writes is not let in beside others on the secondary disk
        arguments["writable"] = command.startswith("write")
        made = self.ask({"execute": "block-export-add", "arguments": arguments})
        if "error" in made:
            return made["error"]["desc"]
        said = client(path, "qemu-io", command)
        self.ask({"execute": "block-export-del", "arguments": {"id": "qemu-io", "mode": "hard"}})
        done = lambda: any(e["event"] == "BLOCK_EXPORT_DELETED" and e["data"]["id"] == "qemu-io" for e in self.connection.events)  # noqa: E731
        self.connection.wait(done, LIMIT)
        self.connection.events = [e for e in self.connection.events if e.get("data", {}).get("id") != "qemu-io"]
        if not self.server:
            self.ask({"execute": "nbd-server-stop"})
        return said


def client(path, export, command):
    mode = [] if command.startswith("write") else ["-r"]
    ran = subprocess.run(["qemu-io", "-f", "raw", *mode, "-c", command, f"nbd+unix:///{export}?socket={path}"],
                         capture_output=True, text=True, timeout=60)
    lines = (ran.stdout + ran.stderr).strip().split("\n")
    return " | ".join(line for line in lines if line)


def figures(said):
    """Without figures of speed, and the characters beside a dump."""
    said = re.sub(r"\d+(\.\d+)? \w+, \d+ ops.*", "", said)
    return re.sub(r"((?:[0-9a-f]{2} )+) .*?(?= \|)", r"\1", said).strip(" |")


def play(path, daemon, verbose):
    name = os.path.basename(path).removesuffix(".jsonl")
    directory, systems, problems = tempfile.mkdtemp(prefix="system-"), {}, []
    servers, waiting = [], {}  # what was said and is to be compared with what comes next in the transcript

    def differ(what, found):
        for d in found:
            text = f"{what}: {d}"
            if not any(name.startswith(t) and k in text for t, k, _ in KNOWN):
                problems.append(text)

    try:
        for line in open(path):
            e = json.loads(line)
            if e["d"] == "X" and e["cmd"].startswith("qemu-system"):
                conn = re.search(r"conn=(\w+)", e["out"]).group(1)
                systems[conn] = System(daemon, directory, shlex.split(e["cmd"]))
            elif e["d"] == "X":
                subprocess.run(e["cmd"].replace("DIR", directory), shell=True, check=True, cwd=directory)
                for _, _, line, _ in (s for s in SERVERS if s[0] == name and s[1] in e["cmd"]):
                    servers.append(subprocess.Popen(line.replace("DIR", directory).split()))
                    while not os.path.exists(os.path.join(directory, "t.sock")):
                        assert servers[-1].poll() is None, line
                        time.sleep(0.01)
            elif e["d"] == "N":
                for _, _, conn, export, command in (c for c in CLIENTS if c[0] == name and e["note"].startswith(c[1])):
                    said = client(systems[conn].server, export, command)
                    differ(f"client {command}", [] if said.startswith("wrote") else [said])
                told = re.match(r"\w+: (qemu-io .*?) -> (.*)", e["note"], re.S)
                if told and "io" in waiting:
                    want, got = figures(told.group(2)), figures(waiting.pop("io"))
                    differ(told.group(1), [] if want == got else [f"want {want}, got {got}"])
            elif e["d"] == "C":
                system, message = systems[e["conn"]], e["m"]
                if message["execute"] == "human-monitor-command":
                    _, node, command = shlex.split(message["arguments"]["command-line"])
                    if any(s[0] == name and s[3] == command for s in SERVERS):
                        servers[-1].kill()
                        servers[-1].wait()
                    waiting["io"] = system.io(node, command)
                    continue
                waiting[e["conn"]] = (message["execute"], system.ask(message))
                if verbose:
                    print(json.dumps(message)[:200], json.dumps(waiting[e["conn"]][1])[:300], sep="\n    ")
            elif "event" in e["m"]:
                wanted = e["m"]["event"]
                if wanted.startswith("QUORUM") and e["m"]["data"].get("sectors-count"):
                    seen = systems[e["conn"]].connection
                    same = lambda x, m=e["m"]: x["event"] == m["event"] and not list(differences(m.get("data"), x.get("data")))  # noqa: E731
                    differ(f"event {wanted}", [] if seen.wait(lambda: any(map(same, seen.events)), LIMIT) else ["did not come"])
            elif "QMP" not in e["m"] and e["conn"] in waiting:
                command, said = waiting.pop(e["conn"])
                want, got = clean(e["m"], [(directory, "DIR")]), clean(said, [(directory, "DIR")])
                if set(want) != set(got):
                    differ(command, [f"want {json.dumps(want)[:200]}, got {json.dumps(got)[:200]}"])
                else:
                    differ(command, differences(want, got))
    finally:
        for s in servers:
            s.kill()
        for s in systems.values():
            s.connection.send(b'{"execute": "quit"}\n')
            try:
                if s.process.wait(10) != 0:
                    problems.append(f"exit status {s.process.returncode}")
            except subprocess.TimeoutExpired:
                s.process.kill()
                problems.append("does not end")
        shutil.rmtree(directory, ignore_errors=True)
    return problems


if __name__ == "__main__":
    sys.exit(report(__doc__, "transcripts", named, lambda path, o: play(path, o.daemon, o.verbose)))
