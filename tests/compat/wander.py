#!/usr/bin/env python3
"""Random scenes with qemu-storage-daemon and with another daemon: what one says or does and the other does not.

    wander.py --daemon PATH [--kind KIND ...] [--rounds N] [--seed S] [--verbose] [--no-shrink]

A seed and a kind name a scene (see twins.py). Kinds (in wandering/; without --kind they take turns): `chains` (images over images, jobs, bitmaps, exports,
clients), `graphs` (nodes of every driver, reopened and rebuilt), `objects` (objects, the NBD server, all kinds of exports, character devices), `creation`
(images that are made, and found by what headers say), `wire` (what is not quite a command). Names are from small sets, so that they meet. Most arguments
make sense, some do not. When daemons have ended, the images are compared. A scene that differs is cut down to the lines
that matter, and printed. What may differ is in KNOWN, each with its reason (and in docs/compat.md). A scene that crashes or hangs the reference says nothing.
Exit status 0: nothing differs.
"""
import argparse
import os
import random
import re
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from schema import CUT  # noqa: E402
from twins import fairly  # noqa: E402
from wandering.chains import Chains  # noqa: E402
from wandering.creation import Creation  # noqa: E402
from wandering.graphs import Graphs  # noqa: E402
from wandering.objects import Objects  # noqa: E402
from wandering.wire import Wire  # noqa: E402

KINDS = {"chains": Chains, "graphs": Graphs, "objects": Objects, "creation": Creation, "wire": Wire}

# (what the command contains, what the difference contains, why it may be)
KNOWN = [
    ("", ".ro: want true, got false", "what was read-only and may turn counts as read-write"),
    ("", 'want {"backing": ', "an image whose backing file is not the one that its header names shows its file name"),
    ("", 'want {"driver": ', "the same"),
    ("", "Permission conflict on node '", "all permissions in conflict are named, and the job"),
    ("", "-progress: want", "clusters that are zero on both sides are not copied"),
    ("", ".len: want", "the same"),
    ("", ".offset: want", "the same"),
    ("", '"desc": "Block node is read-only"}', "the file below an image that became read-only may still be written"),
    ("", "want \"Node d is in use", "the target of a mirror names the job that uses it"),
    ("", "want \"Node '#block' is busy", "the disk is named, not a job's filter"),
    ("", "would become part of a cycle", "the file of an image cannot be below it as its backing file, too"),
    ("", "want \"Could not open backing file: Failed to get", "layers that are open already are not opened again"),
    ("", "desc\": \"Could not open backing file: Failed to get", "the same"),
    ("", ".paused: want true, got false", "after a soft cancel clients are not held until the job is finalized"),
    ("", ".ro: want false, got true", "the filter of a job over a read-only disk is read-only"),
    ("", ".backing: missing (want null)", "the same as above, inside another name"),
    ("", ".image.virtual-size: want", "a disk over another follows its length. The images are compared in the end"),
    ("", ".count: want", "what the target shows as zeroes is not zeroed again; of a filter's records the second counts what was copied. The marks themselves are compared, too"),
    ("", '.error: missing (want {"class": "GenericError", "desc": "Permission conflict on node', "who comes to a disk with a job goes through the job's filter"),
    ("", 'want "backing file: json:', "the name of the file stands in the header"),
    ("", "got \"Compression is not supported", "which of two things that are wrong is told"),
    ("", "got \"Cannot change the option 'driver'", "the same"),
    ("", "is busy: block device is in use by block job", "a chain that a job works on does not change"),
    ("", "Job type does not support change", "an active commit has copy modes, too"),
    ("", "got \"t -[backing]-> m perm= shared=", "an image without users asks its backing file for nothing"),
    ("", 'want {"image": ', "an image whose backing file is not the one that its header names shows its file name"),
    ("", ".image.filename.", "the same, inside another name"),
    ("", "].file.", "the same"),
    ("", "can't be a backing child of active", "no active disk is put above an inactive one"),
    ("", "Image format driver does not support resize", "null-co can be resized"),
    ("", "Can't make bitmap", "an image open read-only does not take what it could not keep"),
    ("", "options inside an image are not followed", "an image may name files and NBD servers, no options"),
    ("", "-[data-file]->", "an external data file is held as the image is"),
    ("", 'got "Value \'-', "which of two things that are wrong is told"),
    ("", "support the option '", "an empty list or object is one that is not there"),
    ("pr-manager", "'pr-manager' is not supported by liveblkd", "there are none"),
    ("", "would create a cycle\", got", "a name that is not there is not found, also where it is the new node's own"),
    ("", "Failed to open file", "the words of GLib"),
    ("", "' is unexpected\", got", "which of several unknown members is named"),
    ("<", "is out of range", "a number beyond a double's range is refused"),
    ("blockdev-create", "Could not create 'DIR", "sizes that no file can have are told with the file"),
    ("query-jobs", "is too large for a file", "the same"),
    ("query-jobs", "want \"Could not resize image: Image size cannot be negative", "the same"),
    ("query-jobs", "Unsupported preallocation mode", "the same"),
    ("", "Unknown driver 'vmdk'", "a format that is missing is refused by name"),
    ("", 'got "Duplicate nodes with', "which of two things that are wrong is told"),
    ("events", ": 0 elements wanted, 2 found", "the same: QSD may know it before there is a job"),
    ("tls-creds", 'want "Failed to bind', "the same"),
    ("tls-creds", 'want "Unable to access credentials', "the same"),
    ("query-block-exports", ".node-name: want", "an export that comes while a job runs is in front of the job's filter"),
    ("new1 new2", "elements wanted", "what is refused leaves no file"),
    ("", '{"offset": 0', "a raw disk at offset 0 has its file's name, also where that was said"),
    ("", "read-zeroes", "the same of null disks that are said not to read as zeroes"),
    ("", '"take-child-perms', "a filter that asks for more than its users is no plain blkdebug"),
    ("qom-list-properties", "not found", "QEMU's internal types are not told"),
    ("fd", "only QEMU supports file descriptor passing", "an inherited descriptor is named by its number"),
    ("chardev", "Address already in use", "a socket at which somebody listens is not taken away"),
    ("bitmaps", "incompatible with readonly export", "a bitmap that records is not exported read-only, on whatever node it is"),
    ("", "does not support reopening files", "a node of any driver can be described as it is"),
    ("", "perm=write-unchanged", "copy-on-read shares no writing"),
    ("query-chardev", "tcp:127.0.0.1:", "ports that the host has chosen"),
    ("drive-", "does not support image creation", "a driver that cannot create is no format of images"),
    ("json:", "Unknown protocol 'json'", "options inside a name are not followed"),
]


def may(line, difference):
    """Whether a difference may be. What is missing is refused by name, before anything else is looked at."""
    refused = re.search(r"got \"Parameter '.*?' does not accept value '(.*?)'", difference)
    return refused and refused.group(1) in CUT or any(c in line and d in difference for c, d, _ in KNOWN)


def run(lines, options):
    numbered = list(enumerate(lines, 1))
    try:
        return fairly(numbered, options.daemon, options.verbose, may)
    except Exception as e:  # noqa: BLE001: a hanging client must not end the run
        return [f"the scene cannot be played: {e!r}"], 0


def gist(problems):
    """What kind of difference the first one is, without figures."""
    first = next((p for p in problems if not p.startswith("line ")), "")
    return "".join(c for c in first if not c.isdigit())[:70]


def shrink(lines, problems, options):
    """The lines without those that do not matter for the first difference."""
    wanted, piece = gist(problems), max(1, len(lines) // 2)
    while piece:
        at = 0
        while at < len(lines):
            # what waits stays: without it the sides are compared at different moments
            waits = ["~"] * ("~" in lines[at : at + piece] and "~" not in lines[at - 1 : at] + lines[at + piece : at + piece + 1])
            fewer = lines[:at] + waits + lines[at + piece :]
            if fewer == lines:
                at += piece
                continue
            found, code = run(fewer, options)
            if found and code == 0 and gist(found) == wanted:
                lines, problems = fewer, found
            else:
                at += piece
        piece //= 2
    return lines, problems


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--daemon", default=os.environ.get("LIVEBLKD", "liveblkd"))
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--no-shrink", action="store_true", help="print a scene that differs as it is")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    failed = crashed = 0
    for seed in range(options.seed, options.seed + options.rounds):
        kind = options.kind[seed % len(options.kind)]
        lines = KINDS[kind](seed).lines
        problems, code = run(lines, options)
        if code != 0:
            crashed += 1
            continue
        if not problems:
            continue
        failed += 1
        print(f"{kind}, seed {seed} differs:")
        if not options.no_shrink:
            lines, problems = shrink(lines, problems, options)
            print("\n".join(f"    {line}" for line in lines))
        print("\n".join(f"        {p}" for p in problems[:12]), flush=True)
    print(f"{options.rounds} scenes, {failed} differ, {crashed} ended or hung the reference")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
