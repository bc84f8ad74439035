#!/usr/bin/env python3
"""Compares query-qmp-schema and query-commands with QSD's: schema.py --daemon PATH

Everything that QSD's schema has must be in ours, with the same members, values, variants and features, but for what stands in
MISSING with its reason; nothing may stand there that is not missing. What ours has besides is ours. Every command, event, driver and kind
of export, object, chardev and transaction's action of QSD must be named by docs/compat.md (in `quotes`; a `-part` stands for a name
with the beginning of one before it in the same line).
"""
import argparse
import json
import os
import re
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from catalogue import Talk  # noqa: E402

# What QSD has and we have not: "command NAME", "event NAME", or "PATH: VALUE" of a value in an enumeration under a path.
MISSING = {
    "event BLOCK_IO_ERROR": "QSD never emits it: there are no guest devices",
    "event VSERPORT_CHANGE": "the same",
}
# Values that are cut out of enumerations, with all that only they lead to.
CUT = "".join(line for line in """
# exports of nobody
vduse-blk
# drivers of steps C and later, and of nobody
replication blkreplay bochs cloop dmg ftp ftps gluster host_cdrom http https iscsi luks nfs nvme parallels qcow qed rbd ssh vdi vhdx vmdk vpc vvfat
# chardevs that nothing in a storage daemon reads
braille dbus file hub msmouse mux parallel pipe pty qemu-vdagent serial spiceport spicevmc testdev udp vc wctablet
# objects: of machines that are emulated (QSD's schema names them, it has none), and those that docs/compat.md names
acpi-generic-initiator acpi-generic-port authz-listfile authz-pam can-bus can-host-socketcan colo-compare cryptodev-backend
cryptodev-backend-builtin cryptodev-backend-lkcf cryptodev-vhost-user dbus-vmstate filter-buffer filter-dump filter-mirror
filter-redirector filter-replay filter-rewriter input-barrier input-linux iommufd memory-backend-epc memory-backend-file
memory-backend-memfd memory-backend-ram memory-backend-shm pef-guest pr-manager-helper qtest rng-builtin rng-egd rng-random
s390-pv-guest secret_keyring sev-guest sev-snp-guest thread-context tls-cipher-suites tls-creds-anon tls-creds-psk
x-remote-object x-vfio-user-server
""".splitlines(True) if not line.startswith("#")).split()


class Schema:
    def __init__(self, answer):
        self.by_name = {e["name"]: e for e in answer}

    def entries(self, kind):
        return {n for n, e in self.by_name.items() if e["meta-type"] == kind}


def compare(ours, theirs, a, b, path, seen, out):
    """Differences between type `b` of theirs and type `a` of ours, where ours has less."""
    if (a, b) in seen:
        return
    seen.add((a, b))
    if b.startswith("[") != a.startswith("["):
        out.append(f"{path}: a list on one side")
        return
    if b.startswith("["):
        return compare(ours, theirs, a[1:-1], b[1:-1], path + "[]", seen, out)
    x, y = ours.by_name[a], theirs.by_name[b]
    if x["meta-type"] != y["meta-type"]:
        out.append(f"{path}: {x['meta-type']} instead of {y['meta-type']}")
    elif y["meta-type"] == "builtin":
        if x["json-type"] != y["json-type"]:
            out.append(f"{path}: {x['json-type']} instead of {y['json-type']}")
    elif y["meta-type"] == "enum":
        lost = set(y["values"]) - set(x["values"])
        if lost - set(CUT):
            out.append(f"{path}: lacks {sorted(lost - set(CUT))}")
    elif y["meta-type"] == "alternate":
        if len(x["members"]) < len(y["members"]):
            out.append(f"{path}: lacks alternatives")
        for m, n in zip(x["members"], y["members"]):
            compare(ours, theirs, m["type"], n["type"], path, seen, out)
    elif y["meta-type"] == "object":
        mine = {m["name"]: m for m in x["members"]}
        for m in y["members"]:
            at = f"{path}.{m['name']}"
            if m["name"] not in mine:
                out.append(f"{at}: missing")
                continue
            if ("default" in m) != ("default" in mine[m["name"]]):
                out.append(f"{at}: optional on one side")
            if set(m.get("features", [])) - set(mine[m["name"]].get("features", [])):
                out.append(f"{at}: lacks features")
            compare(ours, theirs, mine[m["name"]]["type"], m["type"], at, seen, out)
        cases = {v["case"]: v["type"] for v in x.get("variants", [])}
        for v in y.get("variants", []):
            # a case that is missing is one of a value that is cut
            if v["case"] in cases:
                compare(ours, theirs, cases[v["case"]], v["type"], f"{path}/{v['case']}", seen, out)
        if x.get("tag") != y.get("tag"):
            out.append(f"{path}: another tag")


# Enumerations of which docs/compat.md names every value: where they stand.
KINDS = {
    "driver": ("blockdev-add", "driver"),
    "export": ("block-export-add", "type"),
    "object": ("object-add", "qom-type"),
    "chardev": ("chardev-add", "backend", "type"),
    "action": ("transaction", "actions", "type"),
}


def values(schema, command, *path):
    """The values of the enumeration at a path of a command's arguments."""
    of = schema.by_name[schema.by_name[command]["arg-type"]]
    for name in path:
        while of["meta-type"] == "array":
            of = schema.by_name[of["element-type"]]
        of = schema.by_name[next(m["type"] for m in of["members"] if m["name"] == name)]
    return of["values"]


def told(text):
    """The names that a text has in quotes, with those it shortens."""
    names = set()
    for line in text.splitlines():
        here = re.findall(r"`([^`]+)`", line)
        names.update(here)
        for short in (n for n in here if n.startswith("-")):
            for full in (n for n in here if not n.startswith("-")):
                names.update(full[:i] + short for i, c in enumerate(full) if c == "-")
    return names


def compat():
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../docs/compat.md")) as f:
        return f.read()


def untold(theirs):
    """What of QSD's docs/compat.md does not name."""
    names = told(compat())
    all_of = [("command", c) for c in theirs.entries("command")] + [("event", e) for e in theirs.entries("event")]
    all_of += [(kind, v) for kind, path in KINDS.items() for v in values(theirs, *path)]
    return [f"docs/compat.md does not name the {kind} {name}" for kind, name in all_of if name not in names]


def ask(daemon):
    with tempfile.TemporaryDirectory(prefix="schema-") as directory:
        talk = Talk(daemon, directory)
        talk.send({"execute": "qmp_capabilities"})
        schema = talk.send({"execute": "query-qmp-schema"})["return"]
        commands = {c["name"] for c in talk.send({"execute": "query-commands"})["return"]}
        assert talk.end() == 0
        return Schema(schema), commands


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--daemon", default=os.environ.get("LIVEBLKD", "liveblkd"))
    options = parser.parse_args()
    (ours, commands), (theirs, their_commands) = ask(options.daemon), ask("qemu-storage-daemon")
    out = untold(theirs) + [f"command {c} in one of schema and query-commands" for c in commands ^ ours.entries("command")]
    for kind in ("command", "event"):
        lost = {f"{kind} {n}" for n in theirs.entries(kind) - ours.entries(kind)}
        known = {m for m in MISSING if m.startswith(kind)}
        out += [f"{m} is missing" for m in sorted(lost - known)] + [f"{m} is there" for m in sorted(known - lost)]
        for name in sorted(theirs.entries(kind) & ours.entries(kind)):
            x, y = ours.by_name[name], theirs.by_name[name]
            for role in ("arg-type", "ret-type"):
                if role in y:
                    compare(ours, theirs, x[role], y[role], f"{name} {role}", set(), out)
            if set(y.get("features", [])) - set(x.get("features", [])):
                out.append(f"{name}: lacks features")
    print(f"{len(theirs.by_name)} entities of QSD, {len(ours.by_name)} of ours, {len(their_commands)} and {len(commands)} commands")
    print("\n".join(sorted(set(out))))
    return 1 if out else 0


if __name__ == "__main__":
    sys.exit(main())
