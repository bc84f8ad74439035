#!/usr/bin/env python3
"""Goes through the catalogue of QSD's errors row by row: each is provoked on a daemon, or stands in UNREACHED with its reason.

    catalogue.py --daemon PATH [--verbose]

Provocations are the commands of twin.py and of provoke.txt (one command a line; `! WORDS` runs a shell in the directory, `raw BYTES`
is sent as it is). A row is reached by an error of the same command and class with the same words, whatever names and numbers stand
in it. Exit status 0: every row is reached or has a reason, and no reason stands for a row that is reached.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import twin  # noqa: E402
from replay import Connection  # noqa: E402

HERE = os.path.dirname(os.path.abspath(__file__))
CUT = 165  # rows are cut off at about this many characters

# (words of the row, why it is not reached)
UNREACHED = [
    ("Only socket address types 'unix' and 'fd'", "vhost-user-blk is checked by its own tests"),
    ("num-queues must be", "the same"),
    ("parameter logical-block-size", "the same"),
    ("Failed to stat", "exports of type fuse are checked by their own tests"),
    ("vduse device", "exports of type vduse-blk are not there (docs/compat.md)"),
    ("The command xen-set-replication has not been found", "it is there"),
    ("Missing the option top-id", "the driver replication is checked by its own tests"),
    ("does not support option top-id", "the same"),
    *[(f"{c}{w}", "the same") for c, w in (("xen-colo", "-do-checkpoint"), *(("xen-set-replication ", w) for w in ("Active", "Backup", "Block repl", "No top", "Parameter", "The parameter", "The secondary")))],
    ("invalid object type: memory-backend-ram", "the enumeration has only what there is, so its schema refuses the value"),
    ("'options.state' is missing", "a member of the driver luks, which is not there"),
    ("block-job-change Change to copy mode 'background' is not implemented", "every switch is"),
    ("blockdev-mirror Parameter 'bitmap' is unexpected", "mirrors take a bitmap"),
    ("blockdev-mirror Sync mode 'incremental' not supported", "mirrors do that"),
    ("query-named-block-nodes Block device a is ejected", "one corrupt image does not make the query fail"),
    ("change-backing-file Could not change backing file", "crashers.py does it"),
]


def words(desc):
    """An error sentence without the names and numbers in it."""
    desc = re.sub(r"'[^']*('|$)", "'*'", desc.replace("n't", "nt"))
    desc = re.sub(r"bitmaps to [^ ]+:", "bitmaps to *:", desc)
    desc = re.sub(r"\b(Node|node|device|Bitmap|command|Could not open|socket to|exists:|keyword|type:|resolution failed for) [^ ,;]+", r"\1 *", desc)
    desc = re.sub(r"\S*/\S*", "*", desc)
    return re.sub(r"\d+", "N", desc).strip()


class Talk:
    """A daemon that is provoked."""

    def __init__(self, daemon, directory):
        self.dir, self.errors = directory, []
        socket = os.path.join(directory, "qmp.sock")
        line = [daemon, "--chardev", f"socket,id=c,path={socket},server=on,wait=off", "--monitor", "chardev=c"]
        self.process = subprocess.Popen(line, cwd=directory, stderr=subprocess.DEVNULL)
        self.connection = Connection(socket)
        self.connection.wait(lambda: self.connection.replies, 10)

    def send(self, command):
        raw = command if isinstance(command, bytes) else json.dumps(command).replace("DIR", self.dir).encode()
        seen = len(self.connection.replies)
        self.connection.send(raw + b"\n")
        self.connection.wait(lambda: len(self.connection.replies) > seen, 20)
        reply = self.connection.replies[seen] if len(self.connection.replies) > seen else {}
        if "error" in reply:
            names = ["(raw)", "5", "None", "query-jobs", "job-pause", "qmp_capabilities"]
            if isinstance(command, dict):
                names = [command.get("execute", command.get("exec-oob"))]
            self.errors += [(name, reply["error"]["class"], reply["error"]["desc"]) for name in names]
        return reply

    def step(self, line):
        if line.startswith("!"):
            subprocess.run(line[1:].replace("SRC", HERE), shell=True, cwd=self.dir, check=True, stdout=subprocess.DEVNULL, timeout=60)
        elif line.startswith("raw "):
            self.send(line[4:].encode())
        else:
            name, _, arguments = line.partition(" ")
            return self.send({"execute": name, **({"arguments": json.loads(arguments)} if arguments else {})})
        return None

    def jobs_rest(self):
        """Waits until no job moves on by itself."""
        def resting():
            jobs = self.send({"execute": "query-jobs"}).get("return", [])
            return all(j["status"] in ("ready", "pending", "concluded", "paused", "standby") for j in jobs)
        self.connection.wait(resting, 10)
        while self.connection.poll(0.25):
            pass  # one that was just told to go on has not always begun to

    def end(self):
        self.connection.send(b'{"execute": "quit"}\n')
        return self.process.wait(20)


def provoke(daemon, verbose):
    found = []
    with tempfile.TemporaryDirectory(prefix="catalogue-") as directory:
        twin.prepare(directory)
        talk = Talk(daemon, directory)
        talk.send({"execute": "query-version"})
        talk.send({"execute": "qmp_capabilities", "arguments": {"enable": ["bogus"]}})
        talk.send({"execute": "qmp_capabilities"})
        for command in twin.COMMANDS[:-1]:
            talk.jobs_rest() if command == "wait" else talk.send(command)
        assert talk.end() == 0
        found += talk.errors
    with tempfile.TemporaryDirectory(prefix="catalogue-") as directory:
        talk = Talk(daemon, directory)
        talk.send({"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}})
        for number, line in enumerate(open(os.path.join(HERE, "provoke.txt")), 1):
            line = line.strip()
            if line == "wait":
                talk.jobs_rest()
            elif line and not line.startswith("#"):
                reply = talk.step(line)
                if verbose:
                    print(f"{number}: {line[:150]}\n    {json.dumps(reply)[:300]}")
        assert talk.end() == 0
        found += talk.errors
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--daemon", default=os.environ.get("LIVEBLKD", "liveblkd"))
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    found = {(name, kind, words(desc)) for name, kind, desc in provoke(options.daemon, options.verbose)}
    rows = [line.rstrip("\n").split("\t") for line in open(os.path.join(HERE, "error-catalogue.tsv")) if line[0] != "#"]
    problems, reached = [], 0
    for name, kind, desc, transcript in rows:
        wanted = words(desc)
        hit = any(n == name and k == kind and (d == wanted or len(desc) >= CUT and d.startswith(wanted[:75])) for n, k, d in found)
        reasons = [w for w, _ in UNREACHED if w in f"{name} {desc}"]
        if hit and reasons:
            problems.append(f"reached, and yet it has a reason: {name}: {desc}")
        if not hit and not reasons:
            problems.append(f"not reached: {name}\t{kind}\t{desc}\t{transcript}")
        reached += hit
    print(f"{reached} of {len(rows)} rows reached, {len(rows) - reached} not")
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
