#!/usr/bin/env python3
"""Plays scenes with qemu-storage-daemon and with another daemon, and compares what both say and do.

    twins.py --daemon PATH [--verbose] SCENE.txt ...

A scene has one step a line: `COMMAND {arguments}` is sent by QMP, `! WORDS` is run by a shell in the scene's directory (clients of
the daemon's NBD server, mostly), `? REASON` says that and why the next step may differ, `# TEXT` is for the reader. DIR is the
directory. Compared are replies, exit status and output of clients (without figures of speed), and events in their order.
Exit status 0: nothing differs.
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from replay import Connection, clean, differences  # noqa: E402

# nbdsh takes the first python3 there is, and the system's alone knows libnbd
ENV = {**os.environ, "PATH": "/usr/bin:" + os.environ.get("PATH", "")}
EVENT_LIMIT = 3.0  # seconds for an event that the twin emitted


class Side:
    """A daemon in a scene."""

    def __init__(self, daemon):
        self.dir = tempfile.mkdtemp(prefix="twins-")
        socket = os.path.join(self.dir, "qmp.sock")
        words = [daemon, "--chardev", f"socket,id=c,path={socket},server=on,wait=off", "--monitor", "chardev=c"]
        self.log = open(os.path.join(self.dir, "stderr"), "w+")
        self.process = subprocess.Popen(words, cwd=self.dir, stderr=self.log)
        self.connection = Connection(socket)
        self.connection.wait(lambda: self.connection.replies, 10)
        self.ask("qmp_capabilities", {})

    def ask(self, name, arguments):
        seen = len(self.connection.replies)
        self.connection.send((json.dumps({"execute": name, "arguments": arguments}) + "\n").encode())
        self.connection.wait(lambda: len(self.connection.replies) > seen, 20)
        return self.connection.replies[seen] if len(self.connection.replies) > seen else "no reply"

    def step(self, line):
        line = line.replace("DIR", self.dir)
        if line.startswith("!"):
            # what it runs must not outlive a hanging daemon
            ran = subprocess.run(line[1:], shell=True, cwd=self.dir, capture_output=True, text=True, timeout=60, env=ENV)
            out = re.sub(r"\n?.*(ops/sec|ops; ).*", "", ran.stdout + ran.stderr)
            said = {"exit": ran.returncode, "output": out.strip().split("\n")}
        else:
            name, _, arguments = line.partition(" ")
            said = self.ask(name, json.loads(arguments or "{}"))
        return clean(said, [(self.dir, "DIR")])

    def events(self):
        return [clean({"event": e["event"], **e.get("data", {})}, [(self.dir, "DIR")]) for e in self.connection.events]

    def end(self):
        self.connection.send(b'{"execute": "quit"}\n')
        try:
            code = self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = "does not end"
        self.log.seek(0)
        log = self.log.read()
        shutil.rmtree(self.dir, ignore_errors=True)
        return code, log


def play(path, daemon, verbose):
    """The differences in a scene."""
    problems, reason = [], None
    theirs, ours = Side("qemu-storage-daemon"), Side(daemon)
    try:
        for number, line in enumerate(open(path), 1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            if line.startswith("?"):
                reason = line[1:].strip()
                continue
            want, got = theirs.step(line), ours.step(line)
            if verbose:
                print(f"{number}: {line}\n    {json.dumps(want)}\n    {json.dumps(got)}")
            found = list(differences(want, got))
            if found and not reason:
                problems.append(f"line {number}: {line[:200]}")
                problems += ["    " + d for d in found]
            reason = None
        want = theirs.events()
        ours.connection.wait(lambda: len(ours.events()) >= len(want), EVENT_LIMIT)
        problems += ["events" + d for d in differences(want, ours.events())]
    finally:
        (_, _), (code, log) = theirs.end(), ours.end()
    if code != 0:
        problems.append(f"the daemon's exit status is {code}: {log[-2000:]}")
    return problems


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--daemon", default=os.environ.get("LIVEBLKD", "liveblkd"))
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("scenes", nargs="+")
    options = parser.parse_args()
    failed = 0
    for path in options.scenes:
        problems = play(path, options.daemon, options.verbose)
        print(f"{'differs' if problems else 'same':8}{os.path.basename(path)}")
        for p in problems[:40]:
            print("        ", p)
        failed += bool(problems)
    print(f"{len(options.scenes) - failed} of {len(options.scenes)} the same")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
