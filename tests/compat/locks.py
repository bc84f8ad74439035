#!/usr/bin/env python3
"""Whether two processes may use an image at the same time: every pair of ways, held by qemu-storage-daemon or another daemon and
opened by either.

    locks.py --daemon PATH [--verbose] [--all]

For each image and each pair of ways (one holds, the other comes) there are four pairs of processes. What the one that comes is told must
be the same in all four, and so must be the locks that both have on the host. Without `--all` the ways and images that are asked are
those of `QUICK`: seconds. Exit status 0: nothing differs.
"""
import argparse
import itertools
import os
import shutil
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from replay import clean  # noqa: E402
from twins import Side  # noqa: E402


def node(kind, image, **options):
    """`blockdev-add` of an image of this kind as node `n` over `f`."""
    file = {"driver": "file", "node-name": "f", "filename": image}
    if kind == "file":
        return ("blockdev-add", {**file, "node-name": "n", **options})
    return ("blockdev-add", {"driver": kind, "node-name": "n", "file": file, **options})


def export(writable, **options):
    return ("block-export-add", {"type": "nbd", "id": "e", "node-name": "n", "writable": writable, **options})


# Ways to use an image: what `blockdev-add` is told, and what comes after.
WAYS = {
    "unused": ({}, []),
    "unused, read-only": ({"read-only": True}, []),
    "read-only, forced": ({"read-only": True, "force-share": True}, []),
    "read-only, forced, exported": ({"read-only": True, "force-share": True}, [export(False)]),
    "read-only, exported": ({"read-only": True}, [export(False)]),
    "read-write, exported for reading": ({}, [export(False)]),
    "exported": ({}, [export(True)]),
    "auto-read-only": ({"read-only": True, "auto-read-only": True}, [export(False)]),
    "inactive": ({"active": False}, []),
    "inactive, exported": ({"active": False}, [export(True, **{"allow-inactive": True})]),
    "given up": ({}, [export(True, **{"allow-inactive": True}), ("blockdev-set-active", {"active": False})]),
    "given up and taken back": (
        {},
        [export(True, **{"allow-inactive": True}), ("blockdev-set-active", {"active": False}), ("blockdev-set-active", {"active": True})],
    ),
    "reopened read-only": ({}, "reopen-ro"),
    "reopened read-write": ({"read-only": True}, "reopen-rw"),
    "resized": ({}, [("block_resize", {"node-name": "n", "size": 1 << 20})]),
    "locking off": ({"locking": "off"}, [export(True)]),
    "copied from": ({}, [("blockdev-add", {"driver": "null-co", "node-name": "z", "size": 1 << 20}), ("blockdev-mirror", {"job-id": "j", "device": "n", "target": "z", "sync": "none"})]),
    "copied to": ({}, [("blockdev-add", {"driver": "null-co", "node-name": "z", "size": 1 << 20}), ("blockdev-mirror", {"job-id": "j", "device": "z", "target": "n", "sync": "none"})]),
}  # fmt: skip
KINDS = ["raw", "qcow2", "file"]
QUICK = {"raw", "qcow2", "unused", "read-only, forced", "read-only, forced, exported", "read-only, exported", "exported", "given up",
         "given up and taken back", "reopened read-write"}  # fmt: skip
# What the locks may differ in, and why.
KNOWN = {
    "inactive": "an inactive image that nobody reads: QSD may hold nothing",
}


def use(side, kind, image, way):
    """Opens the image in this way; what was said."""
    options, then = WAYS[way]
    options = dict(options)
    locking = options.pop("locking", None)
    name, add = node(kind, image, **options)
    if locking:
        (add if kind == "file" else add["file"])["locking"] = locking
    if then in ("reopen-ro", "reopen-rw"):
        again = {**add, "read-only": then == "reopen-ro"}
        if kind != "file":
            again["file"] = "f"
        then = [("blockdev-reopen", {"options": [again]})]
    said = []
    for command, arguments in [(name, add), *then]:
        reply = side.ask(command, arguments)
        said.append(clean(reply, [(image, "IMAGE")]))
        if "error" in reply:
            break
    return said


def leave(side):
    """Closes everything."""
    if not side.ask("query-block-jobs", {})["return"] == []:
        side.ask("block-job-cancel", {"device": "j", "force": True})
    while side.ask("query-jobs", {})["return"]:
        pass
    side.ask("block-export-del", {"id": "e", "mode": "hard"})
    while side.ask("query-block-exports", {})["return"]:
        pass
    for name in ("n", "z"):
        side.ask("blockdev-del", {"node-name": name})
    left = side.ask("query-named-block-nodes", {})["return"]
    assert not left, left


def locked(image):
    """The bytes of the image that are locked now, each with how often."""
    inode, found = os.stat(image).st_ino, {}
    for line in open("/proc/locks"):
        words = [w for w in line.split() if w != "->"]
        if words[5].split(":")[-1] == str(inode):
            for byte in range(int(words[6]), int(words[7]) + 1):
                found[byte] = found.get(byte, 0) + 1
    return sorted(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--daemon", default=os.environ.get("LIVEBLKD", "liveblkd"))
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--all", action="store_true")
    options = parser.parse_args()
    asked = [w for w in WAYS if options.all or w in QUICK]
    sides = {(who, n): Side(program) for who, program in (("qsd", "qemu-storage-daemon"), ("ours", options.daemon)) for n in (0, 1)}
    folder = tempfile.mkdtemp(prefix="locks-")
    pairs, differ = 0, 0
    try:
        for side in sides.values():
            address = {"type": "unix", "data": {"path": os.path.join(side.dir, "nbd")}}
            assert "return" in side.ask("nbd-server-start", {"addr": address})
        for kind in [k for k in KINDS if options.all or k in QUICK]:
            image = os.path.join(folder, f"{kind}.img")
            subprocess.run(["qemu-img", "create", "-q", "-f", "raw" if kind == "file" else kind, image, "1M"], check=True)
            for first, second in itertools.product(asked, repeat=2):
                told = {}
                for a, b in itertools.product(("qsd", "ours"), repeat=2):
                    holds = use(sides[a, 0], kind, image, first)
                    bytes_held = locked(image)
                    told[a, b] = [holds, bytes_held, use(sides[b, 1], kind, image, second), locked(image)]
                    leave(sides[b, 1])
                    leave(sides[a, 0])
                    assert locked(image) == [], f"{a} or {b} leave locks behind after {first}, {second}"
                pairs += 1
                if any(word in (first, second) for word in KNOWN):
                    told = {k: [t for t in v if not t or not isinstance(t[0], int)] for k, v in told.items()}
                wanted = told["qsd", "qsd"]
                wrong = {k: v for k, v in told.items() if v != wanted}
                differ += bool(wrong)
                if wrong or options.verbose:
                    print(f"{kind}: {first} / {second}: {wanted}")
                    for k, v in wrong.items():
                        print(f"    {' holds, '.join(k)} comes: {v}")
    finally:
        for side in sides.values():
            side.end()
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{pairs - differ} of {pairs} pairs the same")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
