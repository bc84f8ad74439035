#!/usr/bin/env python3
"""Sends every command of QSD's schema with every member odd, to qemu-storage-daemon and to another daemon, and compares the replies.

    odd.py --daemon PATH [--only COMMAND ...] [--verbose]

From `query-qmp-schema` of QSD itself: each command is sent with its mandatory members alone, then with each optional one, then with each
member (at every depth) of another type, null, empty, unknown, and numbers at the edges of what fits. Names that are asked for mostly
name nothing; what a command makes after all is taken away before the next. Exit status 0: no reply differs, but as KNOWN says.
"""
import argparse
import copy
import json
import os
import re
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from replay import differences  # noqa: E402
from schema import CUT, compat, told  # noqa: E402
from twins import REFERENCE, SILENT, Side  # noqa: E402

# (what the request contains, what a difference contains, why it may differ)
KNOWN = [
    ("blockdev-reopen", "got \"Cannot change the option 'driver'\"", "of a node that is to be something else we name the driver, QSD one of the options"),
    ("blockdev-reopen", "want \"Option 'filename' cannot be reset", "the same: values are looked at first"),
    ("blockdev-create", "want \"Driver does not support blockdev-create\"", "we name it"),
    ("blockdev-create", '"backing-fmt"', "formats that are missing are refused here, too"),
    ("query-blockstats", "[", "nodes have counters"),
    ("query-chardev", "elements wanted", "kinds that are missing"),
    ("query-chardev", "return[", "the same, and the order"),
    ("qom-list", "return", "QEMU's internal types are not told"),
    ("", "doesn't support the option", "an empty list or object is one that is not there"),
    ("", "does not support the option", "the same"),
    ("blkdebug", "return: missing", "an errno below 0 or beyond 32 bits is refused"),
    ("log-super-update-interval", "return: missing", "so is what is no interval"),
    ('"str"', "file descriptor", "an inherited descriptor is named by its number"),
    ("port", "Servname not supported", "QSD shows 32 characters of a port"),
    ("xxxxx", "address resolution failed", "the same of a host"),
    ("host", "Name or service not known", "QSD shows so many of a host, or sees a host in nothing"),
    ('"host": ""', "address resolution failed for :", "nothing is this host"),
    ("blockdev-add", "would create a cycle", "a name that is not there is not found, also where it is the new node's own"),
    ('"active": false', "unavailable on inactive node", "what of two wrong things is said"),
    ("detect-zeroes", "detect-zeroes", "the same"),
    ("reconnect\": 0", "reconnect", "not to connect again needs no refusal"),
    ('"port": ""', "127.0.0.1:", "no port is port 0"),
    ('"ipv', "family", "to connect QSD takes an address of another family after all"),
    ("null-", "file too large", "a null disk has any size"),
    ("prealloc-align", "return: missing", "an alignment of 0 is none"),
    ("qcow2", "is out of range for parameter", "what of two wrong things is said"),
    ("cache-clean-interval", "got \"Cache clean interval too big", "the same"),
    ("vote-threshold", "threshold may not exceed", "QSD cuts the number to 32 bits"),
    ("raw", "multiple of 512", "a window may have any length"),
    ("ringbuf", "return: missing", "a ring keeps 64 MiB at most, and something"),
    ("memory", "return: missing", "the same"),
    ("", "size of ringbuf chardev", "the same"),
    ("stdio", "bad file descriptor", "twice on one terminal"),
    ("throttle-group", "", "which of two limits that do not fit each other is named"),
    ("main-loop", "only one main-loop", "what of two wrong things is said"),
    ("secret", "unable to read", "the words of GLib"),
    ("tls-creds-x509", "/ca-cert.pem", "QSD looks for it in the root directory"),
    ("priority", "NORMAL", "GnuTLS's language of priorities"),
]

# Not sent: the end; lists that crash QSD when they are empty; the whole schema.
LEFT_OUT = {"quit", "query-qmp-schema", "query-commands", "query-version"}
CRASHES = [("block-dirty-bitmap-merge", "bitmaps"), ("blockdev-reopen", "options")]

# What a string is, by its member's name, where "nope" would lead nowhere or to the network.
TEXT = {"filename": "DIR/a.raw", "host": "127.0.0.1", "port": "1", "path": "DIR/none", "file": "a", "image": "a", "test": "a", "raw": "a",
        "log": "b", "server": "127.0.0.1", "size": "x", "str": "nofd", "cid": "x"}
ODD = {
    "str": [5, True, None, [], {}, "", "\u20ac\u0001", "x" * 2000],
    "int": ["1", "", True, None, [], 1.5, -1, 0, 1, 511, 512, 65536, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, 1e3, -(1 << 63)],
    "bool": ["on", "true", 1, None, [], False],
    "enum": ["bogus", "", 1, None, True, []],
    "list": [{}, "x", None, 5, [], [None], [5], ["x"], [[]]],
    "object": [[], "x", None, 5, {}, {"bogus": 1}],
    "alternate": [5, None, [], {}, "", True, 1.5],
}
PATIENT = {"open-timeout", "wait"}  # members that say how long the answer takes
DEPTH = 4  # of objects in objects


class Grammar:
    """What can be said, from the schema."""

    def __init__(self, answer):
        self.types = {e["name"]: e for e in answer}

    def kind(self, name):
        t = self.types[name]
        if t["meta-type"] == "builtin":
            return {"string": "str", "int": "int", "number": "int", "boolean": "bool"}.get(t["json-type"], "any")
        return {"enum": "enum", "array": "list", "object": "object", "alternate": "alternate"}[t["meta-type"]]

    def least(self, name, member, depth=0):
        """The shortest value of a type."""
        t, kind = self.types[name], self.kind(name)
        if kind == "str":
            return TEXT.get(member, "nope")
        if kind in ("int", "bool", "any"):
            return {"int": 1, "bool": True, "any": "nope"}[kind]
        if kind == "enum":
            return [v for v in t["values"] if v not in CUT][0] if set(t["values"]) - set(CUT) else t["values"][0]
        if kind == "list":
            return [] if depth > DEPTH else [self.least(t["element-type"], member, depth + 1)]
        if kind == "alternate":
            texts = [m["type"] for m in t["members"] if self.kind(m["type"]) in ("str", "enum")]
            return self.least(texts[0] if texts else t["members"][0]["type"], member, depth + 1)
        return next(iter(self.cases(name, depth)))[0]

    def cases(self, name, depth):
        """The shortest objects of a type, one for each variant; with each its members."""
        t = self.types[name]
        tag = t.get("tag")
        for variant in sorted(t.get("variants", [None]), key=lambda v: bool(v) and v["case"] in CUT):
            members = [m for m in t["members"]] + (self.types[variant["type"]]["members"] if variant else [])
            value = {}
            for m in members:
                if m["name"] == tag:
                    value[tag] = variant["case"]
                elif "default" not in m:
                    value[m["name"]] = self.least(m["type"], m["name"], depth + 1)
            nested = self.types[variant["type"]].get("variants") if variant else None
            if nested:  # a variant that is a union itself: its first case
                value = {**value, **self.least(variant["type"], "", depth + 1)}
            yield value, members, variant["case"] if variant else None

    def odd(self, name, member, depth=0):
        """Values that stand in for one of a type."""
        t, kind = self.types[name], self.kind(name)
        yield from ODD.get(kind, [])
        if kind == "enum":
            yield from t["values"]
        if depth > DEPTH:
            return
        if kind == "list":
            least = self.least(t["element-type"], member, depth + 1)
            yield [least, least]
            yield from ([v] for v in self.odd(t["element-type"], member, depth + 1) if v not in ODD["object"])
        if kind == "alternate":
            for m in t["members"]:
                # not again and again what is in what
                if self.kind(m["type"]) != "object" or depth == 0 and member in ("overlap-check", "bitmaps"):
                    yield from self.odd(m["type"], member, depth + 1)
                elif depth == 0:
                    yield {"driver": "null-co"}
                    yield {"driver": "bogus"}
        if kind == "object":
            yield from self.objects(name, depth + 1)

    def objects(self, name, depth=0):
        first = None
        for base, members, case in self.cases(name, depth):
            first = first or case
            yield base
            if case in CUT:
                continue
            yield {**base, "bogus": 1}
            for m in members:
                if m["name"] in base and m["name"] != self.types[name].get("tag"):
                    yield {k: v for k, v in base.items() if k != m["name"]}
                if m["name"] == self.types[name].get("tag"):
                    values = ODD["enum"] if case == first else []
                else:
                    values = [self.least(m["type"], m["name"], depth + 1), *self.odd(m["type"], m["name"], depth + 1)]
                if m["name"] in PATIENT:
                    values = [v for v in values if v is not True and (type(v) is not int or v < 2 or v > 1 << 32)]
                for v in values:
                    yield {**base, m["name"]: v}


# What takes away what a command made.
def undo(command, arguments):
    take = lambda *names: [arguments[n] for n in names if isinstance(arguments.get(n), str)]  # noqa: E731
    if command in ("blockdev-add",):
        return [("blockdev-del", {"node-name": n}) for n in take("node-name")]
    if command == "object-add":
        return [("object-del", {"id": n}) for n in take("id")]
    if command == "chardev-add":
        return [("chardev-remove", {"id": n}) for n in take("id")]
    if command == "nbd-server-start":
        return [("nbd-server-stop", {})]
    return []


def fitted(command, arguments, number):
    """With what makes a command reach what is to be tried: names of its own, and ports that both can listen on."""
    text = json.dumps(arguments)
    if command in ("nbd-server-start", "chardev-add", "chardev-change"):
        text = text.replace('"port": "1"', '"port": "0"')
    if command in ("object-add", "chardev-add"):
        text = text.replace('"id": "nope"', f'"id": "n{number}"')
    arguments = json.loads(text)
    if command == "chardev-change" and arguments.get("id") == "nope":
        arguments["id"] = "changing"
    if command == "blockdev-add" and "node-name" not in arguments:
        arguments = {"node-name": "n", **arguments}
    if command == "blockdev-reopen":
        for node in arguments["options"] if isinstance(arguments["options"], list) else []:
            if isinstance(node, dict) and "driver" in node and node.get("node-name", "nope") == "nope":
                node["node-name"] = "a"
    return arguments


class Both:
    def __init__(self, daemon):
        self.daemon = daemon
        self.sides = []
        self.begin()

    def begin(self):
        for s in self.sides:
            s.end()
        self.sides = [Side(d) for d in (REFERENCE, self.daemon)]
        for name in ("a", "b"):
            path = "{}/" + name + ".raw"
            for s in self.sides:
                with open(path.format(s.dir), "wb") as f:
                    f.truncate(1 << 20)
                s.ask("blockdev-add", {"driver": "file", "node-name": name, "filename": path.format(s.dir)})
        self.ask("chardev-add", {"id": "changing", "backend": {"type": "null", "data": {}}})

    def ask(self, command, arguments):
        return [s.said_to(command, arguments) for s in self.sides]

    def jobs(self):
        """Ends what jobs there are."""
        for s in self.sides:
            for _ in range(20):
                jobs = s.ask("query-jobs", {})
                jobs = jobs["return"] if isinstance(jobs, dict) and "return" in jobs else []
                if not jobs:
                    break
                for j in jobs:
                    s.ask("job-cancel", {"id": j["id"]})
                    s.ask("job-dismiss", {"id": j["id"]})


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--daemon", default=os.environ.get("LIVEBLKD", "liveblkd"))
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    both = Both(options.daemon)
    answer = both.sides[0].ask("query-qmp-schema", {})["return"]
    grammar = Grammar(answer)
    documented = told(compat())
    sent = different = 0
    for entry in answer:
        if entry["meta-type"] != "command" or entry["name"] in LEFT_OUT or options.only and entry["name"] not in options.only:
            continue
        command, seen = entry["name"], set()
        for arguments in grammar.objects(entry["arg-type"]):
            text = json.dumps(arguments, sort_keys=True)
            if text in seen or any(command == c and not arguments.get(m) for c, m in CRASHES):
                continue
            seen.add(text)
            arguments = fitted(command, arguments, sent)
            if command == "chardev-change":  # QSD loses one that it failed to change
                both.ask("chardev-add", {"id": "changing", "backend": {"type": "null", "data": {}}})
            want, got = both.ask(command, arguments)
            sent += 1
            if options.verbose:
                print(command, text[:300], json.dumps(want)[:200], json.dumps(got)[:200], sep="\n    ")
            if want == SILENT:
                print(f"QSD ends: {command} {text[:300]}: {both.sides[0].process.poll()}")
                both.begin()
                continue
            if got == SILENT:
                print(f"no reply: {command} {text[:300]}: {both.sides[1].process.poll()}")
                different += 1
                both.begin()
                continue
            found = list(differences(want, got))
            if "return" not in want and "return" in got:
                found.append(f"succeeds: want {json.dumps(want)[:200]}")
            unsupported = re.search(r"'([^' ]*)' is not supported by liveblkd", got.get("error", {}).get("desc", ""))
            if unsupported and unsupported.group(1) in documented:
                found = []  # so docs/compat.md says
            refused = re.match(r"Parameter '.*' does not accept value '(.*)'", got.get("error", {}).get("desc", ""))
            if refused and refused.group(1) in CUT:
                found = []  # what is missing is refused by name, before anything else
            found = [f for f in found if not any(k in command + " " + text and w.lower() in f.lower() for k, w, _ in KNOWN)]
            if found:
                different += 1
                print(f"{command} {text[:400]}")
                print("\n".join(f"        {f[:400]}" for f in found[:3]))
            if "return" in want or "return" in got:
                both.jobs()
                for c, a in undo(command, arguments):
                    both.ask(c, a)
                if command in ("block_resize",):
                    both.begin()
    for s in both.sides:
        s.end()
    print(f"{sent - different} of {sent} replies the same")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
