#!/usr/bin/env python3
"""What kills or misleads qemu-storage-daemon 10.0.2 gets a clean answer and a daemon that lives on: crashers.py --daemon PATH

Each scene is played on a daemon of its own: `! WORDS` runs a shell in the directory, `wait` waits until jobs rest; after `=>` stands
what the reply must contain. At the end the daemon answers, ends at `quit`, and its exit status is 0.
"""
import argparse
import json
import os
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from catalogue import Talk  # noqa: E402

DISKS = [
    "! qemu-img create -q -f qcow2 b.q 1M; qemu-img create -q -f qcow2 -b b.q -F qcow2 m.q; qemu-img create -q -f qcow2 -b m.q -F qcow2 t.q; qemu-img create -q -f raw d.raw 1M; qemu-io -f qcow2 -c 'write -P 1 0 64k' b.q; qemu-io -f qcow2 -c 'write -P 2 64k 64k' m.q",
    'blockdev-add {"driver":"qcow2","node-name":"b","file":{"driver":"file","filename":"DIR/b.q"}}',
    'blockdev-add {"driver":"qcow2","node-name":"m","backing":"b","file":{"driver":"file","filename":"DIR/m.q"}}',
    'blockdev-add {"driver":"raw","node-name":"d","file":{"driver":"file","filename":"DIR/d.raw"}}',
    'nbd-server-start {"addr":{"type":"unix","data":{"path":"DIR/nbd.sock"}}}',
]
TOP = 'blockdev-add {"driver":"qcow2","node-name":"t","backing":"m","file":{"driver":"file","node-name":"tf","filename":"DIR/t.q"}}'
# the header can be written until a rule says otherwise, and from then on it cannot
BROKEN = 'blockdev-add {"driver":"qcow2","node-name":"t","backing":"m","file":{"driver":"blkdebug","node-name":"dbg","image":{"driver":"file","filename":"DIR/t.q"},"inject-error":[{"event":"none","iotype":"write","sector":0,"errno":5}]}}'

SCENES = {
    "a merge of nothing": DISKS + [
        'block-dirty-bitmap-add {"node":"d","name":"x"}',
        'block-dirty-bitmap-merge {"node":"d","target":"x","bitmaps":[]} => {"return": {}}',
    ],
    "a transaction enables a bitmap that is not there": DISKS + [
        'transaction {"actions":[{"type":"block-dirty-bitmap-enable","data":{"node":"d","name":"zz"}}]} => Dirty bitmap \'zz\' not found',
        'transaction {"actions":[{"type":"block-dirty-bitmap-enable","data":{"node":"zz","name":"zz"}}]} => Node \'zz\' not found',
    ],
    "a null disk of a negative size": [
        'blockdev-add {"driver":"null-co","node-name":"n","size":-1} => Value \'-1\' is out of range',
    ],
    "a ring of a negative size": [
        'chardev-add {"id":"r","backend":{"type":"ringbuf","data":{"size":-9223372036854775808}}} => size of ringbuf chardev must be',
    ],
    "an empty list of nodes to reopen": ['blockdev-reopen {"options":[]} => {"return": {}}'],
    "an iothread that a node was given is deleted": DISKS + [
        'object-add {"qom-type":"iothread","id":"io"}',
        'x-blockdev-set-iothread {"node-name":"d","iothread":"io"} => {"return": {}}',
        'object-del {"id":"io"} => {"return": {}}',
        'block-export-add {"type":"nbd","id":"e","node-name":"d","writable":true} => {"return": {}}',
        "! qemu-io -f raw -c 'write 0 4k' 'nbd+unix:///d?socket=nbd.sock'",
    ],
    "a commit whose header cannot be rewritten": DISKS + [
        BROKEN,
        'block-commit {"job-id":"c","device":"t","top-node":"m","base-node":"b","auto-dismiss":false} => {"return": {}}',
        "wait",
        'query-jobs => Input/output error',
        'job-dismiss {"id":"c"} => {"return": {}}',
        'x-debug-query-block-graph => "backing"',
        'block-export-add {"type":"nbd","id":"e","node-name":"t"} => {"return": {}}',
        "! qemu-io -f raw -r -c 'read -P 1 0 64k' -c 'read -P 2 64k 64k' 'nbd+unix:///t?socket=nbd.sock'",
        'query-named-block-nodes {"flat":false} => "backing_file_depth": 2',
    ],
    "a stream whose header cannot be rewritten": DISKS + [
        BROKEN,
        'block-stream {"job-id":"s","device":"t","base-node":"b","auto-dismiss":false} => {"return": {}}',
        "wait",
        'query-jobs => Input/output error',
        'query-named-block-nodes {"flat":false} => "backing_file_depth": 2',
        'job-dismiss {"id":"s"} => {"return": {}}',
        'change-backing-file {"device":"t","image-node-name":"t","backing-file":"zz"} => Could not change backing file to \'zz\': Input/output error',
    ],
    "a failing grouped backup while an export of an iothread runs": DISKS + [
        'object-add {"qom-type":"iothread","id":"io"}',
        'block-export-add {"type":"nbd","id":"e","node-name":"d","writable":true,"iothread":"io"} => {"return": {}}',
        'blockdev-add {"driver":"blkdebug","node-name":"bad","image":{"driver":"null-co","size":1048576},"inject-error":[{"event":"none","iotype":"write","errno":28},{"event":"none","iotype":"write-zeroes","errno":28}]}',
        'blockdev-add {"driver":"null-co","node-name":"good","size":1048576}',
        'transaction {"actions":[{"type":"blockdev-backup","data":{"job-id":"x","device":"d","target":"bad","sync":"full","auto-dismiss":false}},{"type":"blockdev-backup","data":{"job-id":"y","device":"m","target":"good","sync":"full","auto-dismiss":false}}],"properties":{"completion-mode":"grouped"}} => {"return": {}}',
        "wait",
        'query-jobs => No space left on device',
        "! qemu-io -f raw -c 'write 0 4k' 'nbd+unix:///d?socket=nbd.sock'",
    ],
    "the end during a backup of a disk that only an export keeps": DISKS + [
        'blockdev-add {"driver":"null-co","node-name":"n","size":1048576}',
        'block-export-add {"type":"nbd","id":"e","node-name":"d","writable":true} => {"return": {}}',
        'blockdev-backup {"job-id":"x","device":"d","target":"n","sync":"full","speed":1} => {"return": {}}',
    ],
    "a change of a job that names another kind": DISKS + [
        'blockdev-add {"driver":"null-co","node-name":"n","size":1048576}',
        'blockdev-mirror {"job-id":"x","device":"d","target":"n","sync":"full"} => {"return": {}}',
        'block-job-change {"id":"x","type":"commit","copy-mode":"write-blocking"} => "error"',
    ],
    "a negative speed": DISKS + [
        'blockdev-add {"driver":"null-co","node-name":"n","size":1048576}',
        'blockdev-mirror {"job-id":"x","device":"d","target":"n","sync":"full","speed":-1} => non-negative',
        'query-jobs => {"return": []}',
    ],
    "a persistent bitmap of an image that is read-only": DISKS + [
        'blockdev-add {"driver":"qcow2","node-name":"r","backing":null,"read-only":true,"file":{"driver":"file","filename":"DIR/t.q"}}',
        'block-dirty-bitmap-add {"node":"r","name":"x","persistent":true} => "error"',
    ],
    "zeroes written through blkverify": DISKS + [
        "! qemu-img create -q -f raw e.raw 1M",
        'blockdev-add {"driver":"file","node-name":"e","filename":"DIR/e.raw"}',
        'blockdev-add {"driver":"blkverify","node-name":"v","test":"d","raw":"e"}',
        'block-export-add {"type":"nbd","id":"e","node-name":"v","writable":true} => {"return": {}}',
        "! qemu-io -f raw -c 'write -P 1 0 1M' -c 'write -z 64k 64k' -c 'write -z -u 256k 64k' -c 'read -P 0 64k 64k' -c 'read -P 1 0 64k' 'nbd+unix:///v?socket=nbd.sock'",
    ],
    "blkverify finds a difference": DISKS + [
        "! qemu-img create -q -f raw e.raw 1M; qemu-io -f raw -c 'write -P 1 128k 4k' e.raw",
        'blockdev-add {"driver":"file","node-name":"e","filename":"DIR/e.raw"}',
        'blockdev-add {"driver":"blkverify","node-name":"v","test":"d","raw":"e"}',
        'block-export-add {"type":"nbd","id":"e","node-name":"v","writable":true} => {"return": {}}',
        "! qemu-io -f raw -c 'read 0 128k' 'nbd+unix:///v?socket=nbd.sock'; ! qemu-io -f raw -c 'read 64k 128k' 'nbd+unix:///v?socket=nbd.sock'",
        'block-export-add {"type":"nbd","id":"e2","name":"x","node-name":"v"} => {"return": {}}',
    ],
    "the last children of a quorum are taken": DISKS + [
        'blockdev-add {"driver":"quorum","node-name":"quo","vote-threshold":1,"children":["d"]}',
        'x-blockdev-change {"parent":"quo","child":"children.0"} => cannot be lower than the vote threshold 1',
        'block-export-add {"type":"nbd","id":"e","node-name":"quo","writable":true} => {"return": {}}',
    ],
}


def play(daemon, steps):
    problems = []
    with tempfile.TemporaryDirectory(prefix="crashers-") as directory:
        talk = Talk(daemon, directory)
        talk.send({"execute": "qmp_capabilities"})
        for step in steps:
            line, _, want = step.partition(" => ")
            if line == "wait":
                talk.jobs_rest()
                continue
            reply = json.dumps(talk.step(line))
            if not line.startswith("!") and (want or '{"return": {}}') not in reply:
                problems.append(f"{line[:150]}\n        {reply[:600]}")
        alive = talk.send({"execute": "query-named-block-nodes", "arguments": {"flat": True}})
        if "return" not in alive:
            problems.append(f"afterwards it says {alive}")
        status = talk.end()
        if status != 0:
            problems.append(f"its exit status is {status}")
    return problems


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--daemon", default=os.environ.get("LIVEBLKD", "liveblkd"))
    options = parser.parse_args()
    failed = 0
    for name, steps in SCENES.items():
        problems = play(options.daemon, steps)
        failed += bool(problems)
        print(f"{'fails' if problems else 'lives':6} {name}")
        for p in problems:
            print("    ", p)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
