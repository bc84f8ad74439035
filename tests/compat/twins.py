#!/usr/bin/env python3
"""Plays scenes with qemu-storage-daemon and with another daemon, and compares what both say and do.

    twins.py --daemon PATH [--verbose] SCENE.txt ...

A scene has one step a line: `COMMAND {arguments}` is sent by QMP, `! WORDS` is run by a shell in the scene's directory (clients of
the daemon's NBD server, mostly), `@ ID WORD` waits for the next event WORD, or the next status WORD, of the job (export, node) ID, `? REASON` says that and why the next step may differ, `?? WORDS | REASON` that differences with these words
may be, `# TEXT` is for the reader. `~` waits until no job moves by itself, and `!! WORDS` is run when the daemons have ended. `> TEXT` sends TEXT as it is, and `>> TEXT` without waiting for a reply; `< "TEXT"` sends a JSON string whose characters
are bytes, and ends whatever it has begun. `=== NAME` begins another scene
of the same file, with daemons of its own; what `??` says holds until there. DIR is the
directory, SRC that of this file. Compared are replies, exit status and output of clients (without figures of speed), and the events of each job, export and
node in their order (without pauses that nobody asked for: the reference drains by pausing).
Exit status 0: nothing differs.
"""
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from replay import Connection, clean, differences, key, report  # noqa: E402

# nbdsh takes the first python3 there is, and the system's alone knows libnbd
ENV = {**os.environ, "PATH": "/usr/bin:" + os.environ.get("PATH", "")}
REFERENCE = "qemu-storage-daemon"
QUIET = 0.3  # seconds without a reply after which none is expected: some lines have none, some have several
EVENT_LIMIT = 3.0  # seconds for an event that the twin emitted
RUN_LIMIT = 60.0  # seconds for a client
REPLY_LIMIT = 90.0  # seconds for a reply: a busy machine is no difference
PASSING = 0.1  # seconds: a job may pass through states in which others wait
REST = 1.0  # seconds without progress after which a job waits for clients
SETTLE_LIMIT = 10.0  # seconds in which jobs come to rest
STORM_LIMIT = 10.0  # seconds after which no more events are taken at once
ATTEMPTS = 3  # at a scene in which the reference dies, falls silent or says something else than before
SILENT = "no reply"
STILL = ("ready", "standby", "paused", "pending", "waiting", "concluded")


def grown(said):
    """Without the lengths of files below images: an open image's file grows in larger steps with us."""
    for node in said["return"] if isinstance(said, dict) and isinstance(said.get("return"), list) else []:
        if isinstance(node, dict) and node.get("drv") == "file":
            node["image"].pop("virtual-size")
    return said


def in_order(said):
    """Properties of objects and character devices, which QSD has in the order of a hash table, by their names."""
    listed = said["return"] if isinstance(said, dict) and isinstance(said.get("return"), list) else []
    for name, other in (("name", "type"), ("label", "frontend-open")):
        if listed and all(isinstance(p, dict) and {name, other} <= set(p) for p in listed):
            listed.sort(key=lambda p: p[name])
    return said


class Side:
    """A daemon in a scene."""

    def __init__(self, daemon):
        self.reference = os.path.basename(daemon) == REFERENCE
        for _ in range(ATTEMPTS):
            said = self.start(daemon)
            if not self.reference or isinstance(said, dict) and "return" in said:
                break
            self.clear()  # the reference mishears even that now and then
        else:
            raise RuntimeError(f"{daemon} does not answer 'qmp_capabilities' {ATTEMPTS} times in a row, at last: {said}")
        self.mark = 0  # events before the last command
        self.asked = []  # jobs that the scene paused, with the number of events before

    def start(self, daemon):
        """What it says to `qmp_capabilities`."""
        self.number = 0  # of the last command
        self.dir = tempfile.mkdtemp(prefix="twins-")
        socket = os.path.join(self.dir, "qmp.sock")
        words = [daemon, "--chardev", f"socket,id=c,path={socket},server=on,wait=off", "--monitor", "chardev=c"]
        self.log = open(os.path.join(self.dir, "stderr"), "w+")
        self.process = subprocess.Popen(words, cwd=self.dir, stdout=self.log, stderr=self.log)
        self.connection = Connection(socket)
        self.connection.wait(lambda: self.connection.replies, 60)
        return self.ask("qmp_capabilities", {})

    def ask(self, name, arguments):
        """The reply to a command. It is known by its number: the reference answers a good command with a parse error now and then,
        and what it says then must not be taken for the reply to the next. We may not: a stray reply of ours is the reply."""
        self.number += 1
        seen, number = len(self.connection.replies), self.number
        is_it = lambda r: isinstance(r, dict) and (r.get("id") == number or not self.reference and "id" not in r)  # noqa: E731
        self.connection.send((json.dumps({"execute": name, "arguments": arguments, "id": number}) + "\n").encode())
        self.connection.wait(lambda: any(map(is_it, self.connection.replies[seen:])), REPLY_LIMIT)
        reply = next(filter(is_it, self.connection.replies[seen:]), None)
        return SILENT if reply is None else {k: v for k, v in reply.items() if k != "id"}

    def said_to(self, name, arguments):
        """The reply to a command in which DIR is the scene's directory, as it is compared."""
        return self.shown(self.ask(name, json.loads(json.dumps(arguments).replace("DIR", self.dir))))

    def shown(self, said):
        """Without what differs from one run to the next."""
        return clean(said, [(self.dir, "DIR")])

    def drain(self, quiet):
        """Takes what comes until nothing does for `quiet` seconds."""
        deadline = time.monotonic() + STORM_LIMIT
        while time.monotonic() < deadline and self.connection.poll(quiet):
            pass

    def step(self, line):
        line = line.replace("DIR", self.dir).replace("SRC", os.path.dirname(os.path.abspath(__file__)))
        if line.startswith(">"):
            seen = len(self.connection.replies)
            self.connection.send((line.lstrip(">").strip() + "\n").encode())
            waits = not line.startswith(">>")
            if waits:
                self.connection.wait(lambda: len(self.connection.replies) > seen or self.connection.closed, QUIET)
                self.drain(QUIET)
            said = self.connection.replies[seen:] + (["closed"] if self.connection.closed else []) if waits else []
        elif line.startswith("<"):
            said = self.scrap(json.loads(line[1:]).encode("latin-1"))
        elif line.startswith("!"):
            said = self.run(line[1:])
        elif line == "~":
            said = self.settle()
        elif line.startswith("@"):
            _, about, what = line.split()
            matches = lambda e: key(e) == about and what in (e["event"], e.get("data", {}).get("status"))  # noqa: E731
            said = self.connection.wait(lambda: any(map(matches, self.connection.events[self.mark :])), 10)
        else:
            name, _, arguments = line.partition(" ")
            arguments = json.loads(arguments or "{}")
            self.drain(0)
            self.mark = len(self.connection.events)
            said = self.ask(name, arguments)
            if name in ("job-pause", "block-job-pause") and "return" in said:
                self.asked.append((arguments.get("id") or arguments.get("device"), self.mark))
        return in_order(grown(self.shown(said)))

    def scrap(self, text):
        """What is said to bytes that may be no command, or the beginning of one."""
        seen, last = len(self.connection.replies), "the end"
        # a byte that is no character begins the parser anew
        self.connection.send(text + b"\xff\n" + json.dumps({"execute": "query-version", "id": last}).encode() + b"\n")
        if not self.connection.wait(lambda: any(r.get("id") == last for r in self.connection.replies[seen:]) or self.connection.closed, REPLY_LIMIT):
            return SILENT
        said = self.connection.replies[seen:] + (["closed"] if self.connection.closed else [])
        return [r for r in said if r == "closed" or r.get("id") != last]

    def run(self, words):
        """What a shell says, without figures of speed."""
        # what it runs must not outlive a hanging daemon
        ran = subprocess.Popen(words, shell=True, cwd=self.dir, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENV, process_group=0)
        try:
            said, _ = ran.communicate(timeout=RUN_LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(ran.pid, signal.SIGKILL)
            ran.communicate()
            said = "does not end"
        return {"exit": ran.returncode, "output": re.sub(r"\n?.*(ops/sec|ops; ).*", "", said).strip().split("\n")}

    def settle(self):
        """Waits until every job waits for a command, or for a client. Which jobs there are is compared by whoever asks."""
        deadline, since, last = time.monotonic() + SETTLE_LIMIT, time.monotonic(), None
        while True:
            jobs = self.ask("query-jobs", {})
            if jobs == SILENT:
                return SILENT
            jobs = jobs.get("return", []) if isinstance(jobs, dict) else []
            now = time.monotonic()
            if jobs != last:
                since, last = now, jobs
            still = all(j["status"] in STILL for j in jobs)
            if not jobs or now > since + (PASSING if still else REST):
                return "still"
            if now > deadline:
                return "jobs move"
            time.sleep(0.01)

    def events(self):
        """The events of each job, export and node."""
        groups, asked = {}, list(self.asked)
        for i, e in enumerate(self.connection.events):
            group = groups.setdefault(key(e), [])
            status = e.get("data", {}).get("status")
            if status in ("paused", "standby"):
                mine = [a for a in asked if a[0] == key(e) and a[1] <= i]
                asked.remove(mine[0]) if mine else None
                e["asked"] = bool(mine)
            before = group[-1] if group else {}
            if (before.get("data", {}).get("status"), status) in (("paused", "running"), ("standby", "ready")) and not before["asked"]:
                group.pop()
            else:
                group.append(e)
        told = {k: [{"event": e["event"], **e.get("data", {})} for e in v] for k, v in groups.items()}
        return {str(k): self.shown(v) for k, v in told.items()}

    def quit(self):
        """The exit status and what was written to stderr."""
        if self.process.returncode is None:
            with contextlib.suppress(OSError):
                self.connection.send(b'{"execute": "quit"}\n')
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                return "does not end", ""
        self.log.seek(0)
        return self.process.returncode, self.log.read()

    def end(self):
        """Ends it, with all that is left of it; the exit status and what was written to stderr."""
        said = self.quit()
        self.clear()
        return said

    def clear(self):
        """Nothing is left of it."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.dir, ignore_errors=True)


def scenes(path):
    """The scenes of a file: their names and their lines, with their numbers."""
    found = [(os.path.basename(path), [])]
    for number, line in enumerate(open(path), 1):
        line = line.strip()
        if line.startswith("==="):
            found.append((f"{os.path.basename(path)}: {line.strip('= ')}", []))
        elif line and not line.startswith("#"):
            found[-1][1].append((number, line))
    return [(name, lines) for name, lines in found if lines]


def compared(known, theirs, ours):
    """What differs in what both say, but for what may."""
    if isinstance(ours, dict) and "error" in ours and isinstance(theirs, dict) and "return" in theirs:
        found = [f": want success, got {json.dumps(ours['error'].get('desc'))}"]
        return [d for d in found if not any(k in d for k in known)]
    return [d for d in differences(theirs, ours) if not any(k in d for k in known)]


def parted(theirs, ours):
    """Whether one did what the other refused: what follows says nothing."""
    return isinstance(theirs, dict) and isinstance(ours, dict) and ("error" in theirs) != ("error" in ours)


def play(lines, daemon, verbose, may=None):
    """The differences in a scene, how the reference ended (its exit status, or `SILENT`), and what we said. `may`: says of a line and a
    difference whether that may be; the scene then ends where one may do what the other refuses."""
    problems, reason, known, last, told = [], None, [], [], []

    def found_in(line, want, got):
        told.append((line, got))
        return [d for d in compared(known, want, got) if not (may and may(line, d))]

    theirs, ours = Side(REFERENCE), Side(daemon)
    try:
        for number, line in lines:
            if line.startswith("??"):
                known.append(line[2:].partition("|")[0].strip())
                continue
            if line.startswith("?"):
                reason = line[1:].strip()
                continue
            if line.startswith("!!"):
                last.append((number, line))
                continue
            want, got = theirs.step(line), ours.step(line)
            if verbose:
                print(f"{number}: {line}\n    {json.dumps(want)}\n    {json.dumps(got)}")
            found = found_in(line, want, got)
            if found and not reason:
                problems.append(f"line {number}: {line[:200]}")
                problems += ["    " + d for d in found]
            if SILENT in (want, got):
                # who has no answer once has none to what follows, and each would be waited for
                problems.append(f"line {number}: no reply: {line[:200]}")
                return problems, SILENT if want == SILENT else theirs.quit()[0], told
            reason = None
            if may and not found and parted(want, got):
                return problems, 0, told
        want = theirs.events()
        ours.connection.wait(lambda: sum(map(len, ours.events().values())) >= sum(map(len, want.values())), EVENT_LIMIT)
        got = ours.events()
        for k in sorted(set(want) | set(got)):
            problems += [f"events of {k}" + d for d in found_in("events", want.get(k, []), got.get(k, []))]
        (their_code, _), (code, log) = theirs.quit(), ours.quit()
        if code != 0:
            problems.append(f"the daemon's exit status is {code}: {log[-2000:]}")
        for number, line in last:
            found = found_in(line, theirs.step(line[1:]), ours.step(line[1:]))
            problems += [f"line {number}: {line[:200]}"] + ["    " + d for d in found] if found else []
    finally:
        theirs.clear(), ours.clear()
    return problems, their_code, told


def again(play_once):
    """What differs, how the reference ended, and what we said, as `play_once()` has it. The reference mishears good commands now and
    then (it answers with a parse error), falls silent for good, or dies, on any line and mostly on a busy machine. So it is played again
    where that is so, and where something differs: if it does not the second time, and we say what we said the first, then it was the
    reference."""
    first = None
    for _ in range(ATTEMPTS):
        played = problems, code, told = play_once()
        if problems and (code == SILENT or isinstance(code, int) and code < 0):
            print(f"  the reference {'fell silent' if code == SILENT else f'died of signal {-code}'}: played again", flush=True)
        elif first:
            excused = not problems and all(a == b for a, b in zip(first[2], told))
            if excused:
                print(f"  the reference said something else when asked again: {first[0][:2]}", flush=True)
            return played if excused else first
        elif not problems:
            return played
        else:
            first = played
    return first or played


def fairly(lines, daemon, verbose, may=None):
    """What differs in a scene, and how the reference ended (see `again`)."""
    return again(lambda: play(lines, daemon, verbose, may))[:2]


if __name__ == "__main__":
    every = lambda paths: (scene for path in paths for scene in scenes(path))  # noqa: E731
    sys.exit(report(__doc__, "scenes", every, lambda lines, o: fairly(lines, o.daemon, o.verbose)[0]))
