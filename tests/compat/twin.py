#!/usr/bin/env python3
"""Sends the same commands to qemu-storage-daemon and to another daemon, and compares every reply.

    twin.py --daemon PATH

The commands are those of the error catalogue that step A has: what is wrong with arguments, names, graphs, jobs, exports.
Both daemons start from equal files made by qemu-img. Exit status 0: no reply differs.
"""
import argparse
import json
import os
import subprocess
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from replay import differences  # noqa: E402
from twins import REFERENCE, SILENT, Side, again  # noqa: E402

FILE = {"driver": "file", "filename": "DIR/a.qcow2"}


def c(name, /, **arguments):
    return {"execute": name, "arguments": {k.replace("_", "-"): v for k, v in arguments.items()}}


def add(**options):
    return c("blockdev-add", **options)


def mirror(**more):
    return c("blockdev-mirror", **{"job_id": "m", "device": "src", "target": "dst", "sync": "full", **more})


def export(**more):
    return c("block-export-add", **{"type": "nbd", "id": "e", "node_name": "a", **more})


LONG = "x" * 4097

# Options of qemu-img create for images of 8 MiB that are opened and described.
KINDS = [
    "cluster_size=64k",
    "cluster_size=64k,preallocation=metadata",
    "cluster_size=512",
    "cluster_size=2M",
    "compat=0.10",
    "lazy_refcounts=on",
    "refcount_bits=1",
    "refcount_bits=64",
    "extended_l2=on",
    "compression_type=zstd",
    "data_file=DIR/data1.raw",
    "data_file=DIR/data2.raw,data_file_raw=on",
]
KINDS_COUNT = len(KINDS)

COMMANDS = [
    # nodes
    add(driver="file", node_name="f", filename="DIR/missing.img"),
    add(driver="file", node_name="f", filename="DIR"),
    add(driver="file", filename="DIR/a.qcow2"),
    add(driver="file", node_name="9bad", filename="DIR/a.qcow2"),
    add(driver="file", node_name="x" * 32, filename="DIR/a.qcow2"),
    add(driver="file", node_name="bad name", filename="DIR/a.qcow2"),
    add(driver="qcow2", node_name="q", file="nofile"),
    add(driver="qcow2", node_name="q", file={"driver": "file", "filename": "DIR/raw.img"}),
    add(driver="qcow2", node_name="q", file={"driver": "file"}),
    add(driver="qcow2", node_name="q", file={**FILE, "bogus": 1}),
    add(driver="qcow2", node_name="q", file=FILE, backing="nobacking"),
    add(driver="raw", node_name="r", file={"driver": "file", "filename": "DIR/raw.img"}, size=-5),
    add(driver="raw", node_name="r", file={"driver": "file", "filename": "DIR/raw.img"}, offset=1 << 40),
    add(driver="qcow2", node_name="a", file=FILE),
    add(driver="qcow2", node_name="a", file=FILE),
    # bitmaps
    *[c("block-dirty-bitmap-add", node=n, name=b, **more) for n, b, more in [
        ("a", "b0", {}), ("a", "b0", {}), ("a", "", {}), ("nope", "x", {}), ("a", "x", {"granularity": 100}),
        ("a", "x", {"granularity": 256}), ("a", "x", {"granularity": 0}), ("a", "x", {"granularity": -1}),
        ("a", "x", {"granularity": 1 << 32}), ("a", "y" * 1024, {}), ("a", "y" * 1023, {}),
        ("a", "g4k", {"granularity": 4096}), ("a", "big", {"granularity": 1 << 31}), ("a", "off", {"disabled": True}),
    ]],
    *[c(f"block-dirty-bitmap-{verb}", node="a", name=b) for verb in ["enable", "disable", "clear", "remove"]
      for b in ["nope", "off", "y" * 1023]],
    c("block-dirty-bitmap-add", node="a", name="off", disabled=True),
    *[c("x-debug-block-dirty-bitmap-sha256", node="a", name=b) for b in ["b0", "g4k", "big", "nope"]],
    *[c("block-dirty-bitmap-merge", node="a", target=t, bitmaps=s) for t, s in [
        ("b0", ["g4k"]), ("off", ["b0", {"node": "a", "name": "g4k"}]), ("b0", ["b0"]), ("b0", ["nope"]),
        ("nope", ["b0"]), ("b0", ["g4k", "nope"]), ("b0", [{"node": "nope", "name": "b0"}]), ("b0", [{"node": "a"}]),
    ]],
    c("query-named-block-nodes", flat=True),
    *[c("block-dirty-bitmap-remove", node="a", name=b) for b in ["off", "g4k", "big", "b0", "b0"]],
    add(driver="file", node_name="again", filename="DIR/a.qcow2"),
    add(driver="qcow2", node_name="top", file={"driver": "file", "filename": "DIR/top.qcow2"}),
    c("query-named-block-nodes", flat=True),
    c("query-named-block-nodes"),
    c("query-block"),
    c("x-debug-query-block-graph"),
    c("blockdev-del", node_name="nope"),
    c("blockdev-del", node_name="a"),
    add(driver="file", node_name="f", filename="DIR/raw.img"),
    add(driver="raw", node_name="r", file="f"),
    c("blockdev-del", node_name="f"),
    c("blockdev-del", node_name="r"),
    c("blockdev-del", node_name="f"),
    # sizes
    c("block_resize", node_name="nope", size=1),
    c("block_resize", device="nope", size=1),
    c("block_resize", size=1),
    c("block_resize", node_name="a", size=-1),
    c("block_resize", node_name="a", size=1000),
    c("block_resize", node_name="a", size=16 << 20),
    c("block_resize", node_name="a", size=8 << 20),
    # exports
    export(),
    c("nbd-server-stop"),
    c("nbd-server-start", addr={"type": "unix"}),
    c("nbd-server-start", addr={"type": "unix", "data": {"path": "/nonexistent/x"}}),
    c("nbd-server-start", addr={"type": "inet", "data": {"host": "127.0.0.1", "port": "zz"}}),
    c("nbd-server-start", addr={"type": "unix", "data": {"path": "DIR/nbd.sock"}}, max_connections=-1),
    c("nbd-server-start", addr={"type": "unix", "data": {"path": "DIR/nbd.sock"}}),
    c("nbd-server-start", addr={"type": "unix", "data": {"path": "DIR/nbd.sock"}}),
    export(id="1e"),
    export(node_name="nope"),
    export(iothread="nope"),
    export(type="nope"),
    export(bitmaps=["nope"]),
    export(name=LONG),
    export(description=LONG),
    export(writable=True),
    export(),
    export(id="e2"),
    export(id="e2", name="other"),
    c("query-block-exports"),
    c("blockdev-del", node_name="a"),
    c("block_resize", node_name="a", size=16 << 20),
    c("block-export-del", id="nope"),
    c("block-export-del", id="e"),
    c("block-export-del", id="e2"),
    c("nbd-server-add", device="nope"),
    c("nbd-server-add", device="a"),
    c("nbd-server-add", device="a"),
    c("nbd-server-remove", name="zz"),
    c("nbd-server-remove", name="a"),
    add(driver="raw", node_name="ro", read_only=True, file={"driver": "file", "filename": "DIR/raw.img"}),
    export(node_name="ro", writable=True),
    c("blockdev-del", node_name="ro"),
    # jobs that are not there
    *[c(f"job-{v}", id="nope") for v in ("pause", "resume", "complete", "cancel", "finalize", "dismiss")],
    *[c(f"block-job-{v}", device="nope") for v in ("pause", "resume", "complete", "cancel")],
    *[c(f"block-job-{v}", id="nope") for v in ("finalize", "dismiss")],
    c("block-job-set-speed", device="nope", speed=0),
    c("block-job-change", id="nope", type="mirror", copy_mode="write-blocking"),
    c("query-jobs"),
    c("query-block-jobs"),
    # mirror
    add(driver="raw", node_name="src", file={"driver": "file", "filename": "DIR/src.img"}),
    add(driver="raw", node_name="dst", file={"driver": "file", "filename": "DIR/dst.img"}),
    add(driver="raw", node_name="small", file={"driver": "file", "filename": "DIR/small.img"}),
    mirror(device="nope"),
    mirror(target="nope"),
    mirror(target="src"),
    {"execute": "blockdev-mirror", "arguments": {"device": "src", "target": "dst", "sync": "full"}},
    mirror(job_id="1x"),
    mirror(sync="incremental"),
    mirror(sync="bitmap"),
    mirror(granularity=1000),
    mirror(granularity=256),
    mirror(granularity=128 << 20),
    mirror(granularity=-1),
    mirror(buf_size=-1),
    mirror(speed=-1),
    mirror(replaces="nope"),
    mirror(replaces="small"),
    mirror(filter_node_name="src"),
    mirror(filter_node_name="bad name"),
    mirror(on_source_error="nope"),
    mirror(copy_mode="nope"),
    mirror(bitmap="b"),
    mirror(device="a", target="dst", sync="full", job_id="m"),
    "wait",
    mirror(sync="none", filter_node_name="flt", auto_dismiss=False, auto_finalize=False),
    "wait",
    mirror(sync="none"),
    mirror(sync="none", job_id="m2"),
    mirror(job_id="m2", device="a", target="dst"),
    c("blockdev-del", node_name="src"),
    c("blockdev-del", node_name="dst"),
    c("blockdev-del", node_name="flt"),
    c("block_resize", node_name="src", size=1 << 20),
    export(node_name="dst", writable=True),
    c("job-dismiss", id="m"),
    c("job-finalize", id="m"),
    c("job-resume", id="m"),
    c("block-job-set-speed", device="m", speed=-1),
    c("query-jobs"),
    c("query-block-jobs"),
    c("job-complete", id="m"),
    "wait",
    c("query-block-jobs"),
    c("job-complete", id="m"),
    c("job-pause", id="m"),
    c("job-resume", id="m"),
    c("block-job-set-speed", device="m", speed=0),
    c("block-job-change", id="m", type="mirror", copy_mode="write-blocking"),
    c("job-finalize", id="m"),
    "wait",
    *[c(f"job-{v}", id="m") for v in ("pause", "resume", "complete", "cancel", "finalize")],
    c("block-job-cancel", device="m"),
    mirror(device="small", target="dst"),
    c("query-jobs"),
    c("job-dismiss", id="m"),
    c("query-jobs"),
    # creation
    c("blockdev-create", options={}),
    c("blockdev-create", job_id="5c", options={"driver": "file", "filename": "DIR/n", "size": 512}),
    c("blockdev-create", job_id="c", options={"driver": "raw", "size": 512}),
    c("blockdev-create", job_id="c", options={"driver": "file", "filename": "DIR/n"}),
    c("blockdev-create", job_id="c", options={"driver": "file", "filename": "DIR/no/n", "size": 512}),
    "wait",
    c("query-jobs"),
    c("blockdev-create", job_id="c", options={"driver": "file", "filename": "DIR/n", "size": 512}),
    c("block-job-dismiss", id="c"),
    c("job-dismiss", id="c"),
    c("blockdev-create", job_id="c", options={"driver": "file", "filename": "DIR/n", "size": 512}),
    "wait",
    c("query-jobs"),
    c("job-dismiss", id="c"),
    add(driver="file", node_name="n", filename="DIR/n"),
    c("blockdev-create", job_id="c", options={"driver": "qcow2", "file": "nope", "size": 1 << 20}),
    "wait",
    c("query-jobs"),
    c("job-dismiss", id="c"),
    c("blockdev-create", job_id="c", options={"driver": "qcow2", "file": "n", "size": 1 << 20, "cluster-size": 1000}),
    "wait",
    c("query-jobs"),
    c("job-dismiss", id="c"),
    c("blockdev-create", job_id="c", options={"driver": "qcow2", "file": "n", "size": 1 << 20}),
    "wait",
    c("query-jobs"),
    c("job-dismiss", id="c"),
    add(driver="qcow2", node_name="new", file="n"),
    c("query-named-block-nodes", flat=True),
    # images of many kinds: facts, permissions of every edge, exports
    *[add(driver="qcow2", node_name=f"k{i}", file={"driver": "file", "node-name": f"k{i}f", "filename": f"DIR/kind{i}.qcow2"}) for i in range(KINDS_COUNT)],
    add(driver="null-co", node_name="n1", size=1 << 20, read_zeroes=True),
    add(driver="null-co", node_name="n2", read_zeroes=True),
    add(driver="raw", node_name="n3", file={"driver": "null-co"}),
    add(driver="raw", node_name="n4", offset=512, file="n1"),
    add(driver="raw", node_name="n5", offset=512, size=1024, file={"driver": "file", "node-name": "n5f", "filename": "DIR/raw.img"}),
    add(driver="qcow2", node_name="bro", read_only=True, file={"driver": "file", "node-name": "brof", "filename": "DIR/base1.qcow2"}),
    add(driver="qcow2", node_name="mid", backing="bro", file={"driver": "file", "node-name": "midf", "filename": "DIR/mid1.qcow2"}),
    add(driver="qcow2", node_name="alone", backing=None, file={"driver": "file", "node-name": "alonef", "filename": "DIR/over1.qcow2"}),
    c("query-named-block-nodes", flat=True),
    c("query-named-block-nodes"),
    c("x-debug-query-block-graph"),
    export(id="x0", node_name="k0", writable=True),
    export(id="x1", node_name="mid", name="m", description="d"),
    export(id="x2", node_name="n5", name="w", writable=True),
    c("query-block-exports"),
    c("x-debug-query-block-graph"),
    c("block_resize", node_name="k0", size=16 << 20),
    c("block_resize", node_name="mid", size=16 << 20),
    c("block_resize", node_name="alonef", size=16 << 20),
    c("block_resize", device="alone", size=16 << 20),
    c("block_resize", node_name="alone", size=513),
    c("block_resize", node_name="alone", size=16 << 20),
    c("block_resize", node_name="n5", size=16 << 20),
    mirror(job_id="g", device="k0", target="alone", sync="top", filter_node_name="gf", granularity=4096),
    mirror(job_id="g", device="k0", target="k1", sync="top", filter_node_name="gf", granularity=4096),
    "wait",
    c("query-named-block-nodes", flat=True),
    c("x-debug-query-block-graph"),
    c("query-jobs"),
    c("query-block-jobs"),
    c("query-block-exports"),
    c("job-complete", id="g"),
    "wait",
    c("query-named-block-nodes", flat=True),
    c("x-debug-query-block-graph"),
    c("query-block-exports"),
    c("query-jobs"),
    *[c("block-export-del", id=i) for i in ("x0", "x1", "x2")],
    "wait",
    c("x-debug-query-block-graph"),
    *[c("blockdev-del", node_name=n) for n in ("k0", "bro", "mid", "bro", "k0f", "n1", "n4", "n1")],
    c("query-named-block-nodes", flat=True),
    # objects
    c("object-add", qom_type="iothread", id="1x"),
    c("object-add", qom_type="iothread", id="t", zzz=1),
    c("object-add", qom_type="iothread", id="t"),
    c("object-add", qom_type="iothread", id="t"),
    c("qom-get", path="/objects/t", property="poll-max-ns"),
    c("qom-get", path="/objects/t", property="thread-pool-max"),
    c("qom-get", path="/objects/t", property="aio-max-batch"),
    c("qom-set", path="/objects/t", property="poll-max-ns", value=5),
    c("qom-get", path="/objects/t", property="poll-max-ns"),
    c("qom-set", path="/objects/t", property="poll-max-ns", value="x"),
    c("qom-get", path="/objects/nope", property="x"),
    c("object-add", qom_type="main-loop", id="ml"),
    c("object-add", qom_type="main-loop", id="ml2"),
    c("object-add", qom_type="secret", id="s1", data="hello"),
    c("qom-list", path="/objects/s1"),
    c("qom-get", path="/objects/s1", property="data"),
    c("qom-get", path="/objects/s1", property="keyid"),
    c("qom-get", path="/objects/s1", property="format"),
    c("qom-get", path="/objects/s1", property="type"),
    c("qom-get", path="/objects/s1", property="nope"),
    c("qom-set", path="/objects/s1", property="nope", value="x"),
    c("object-add", qom_type="secret", id="s2", data="a", file="DIR/a.qcow2"),
    c("object-add", qom_type="secret", id="s2"),
    c("object-add", qom_type="secret", id="s2", data="aGk=", format="base64"),
    c("object-add", qom_type="secret", id="s3", data="!!", format="base64"),
    c("object-add", qom_type="secret", id="s3", data="aGk=", format="nope"),
    c("object-add", qom_type="secret", id="s3", data="aGk=", format="base64", keyid="nope"),
    c("object-add", qom_type="secret", id="s3", data="aGk=", format="base64", keyid="s1", iv="AAAA"),
    c("object-add", qom_type="secret", id="k", data="MDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDA=", format="base64"),
    c("object-add", qom_type="secret", id="s3", data="aGk=", format="base64", keyid="k"),
    c("object-add", qom_type="secret", id="s3", data="aGk=", format="base64", keyid="k", iv="AAAA"),
    c("object-add", qom_type="secret", id="s3", data="aGk=", format="base64", keyid="k", iv="MTExMTExMTExMTExMTExMQ=="),
    c("object-add", qom_type="authz-simple", id="a2"),
    c("object-add", qom_type="authz-simple", id="a1", identity="CN=x"),
    c("qom-list", path="/objects/a1"),
    c("qom-set", path="/objects/a1", property="identity", value="CN=z"),
    c("qom-get", path="/objects/a1", property="identity"),
    c("object-add", qom_type="authz-list", id="l1"),
    c("qom-list", path="/objects/l1"),
    c("qom-get", path="/objects/l1", property="policy"),
    c("qom-get", path="/objects/l1", property="rules"),
    c("qom-list-properties", typename="secret"),
    c("qom-list-properties", typename="authz-list"),
    c("qom-list-properties", typename="tls-creds-x509"),
    c("qom-list-properties", typename="nope"),
    *[c("chardev-add", id=i, backend={"type": t, "data": d}) for i, t, d in [
        ("r", "ringbuf", {}), ("r2", "ringbuf", {"size": 1000}), ("r3", "ringbuf", {"size": 16}), ("r", "ringbuf", {}),
        ("1x", "null", {}), ("n", "null", {}), ("m", "memory", {"size": 64}), ("nx", "nope", {}),
        ("s2", "socket", {"addr": {"type": "unix", "data": {"path": "/nonexistent/s"}}}),
        ("s3", "socket", {"addr": {"type": "unix", "data": {"path": "/nonexistent/s"}}, "server": False}),
        ("s4", "socket", {"addr": {"type": "unix", "data": {"path": "/nonexistent/s"}}, "tls-creds": "nope"}),
        ("s6", "socket", {"addr": {"type": "unix", "data": {"path": "DIR/s"}}, "server": False, "wait": True}),
    ]],
    c("ringbuf-write", device="r3", data="hello"),
    c("ringbuf-read", device="r3", size=3),
    c("ringbuf-read", device="r3", size=30),
    c("ringbuf-write", device="r3", data="0123456789abcdefghij"),
    c("ringbuf-read", device="r3", size=100),
    c("ringbuf-write", device="r3", data="//5hYgBj", format="base64"),
    c("ringbuf-read", device="r3", size=100, format="base64"),
    c("ringbuf-write", device="r3", data="//5hYgBj", format="base64"),
    c("ringbuf-read", device="r3", size=100),
    c("ringbuf-write", device="r3", data="!!", format="base64"),
    c("ringbuf-write", device="r3", data="\u20ac\u20ac"),
    c("ringbuf-read", device="r3", size=4),
    c("ringbuf-read", device="r3", size=4),
    c("ringbuf-write", device="n", data="x"),
    c("ringbuf-write", device="zz", data="x"),
    c("ringbuf-read", device="zz", size=4),
    c("ringbuf-read", device="n", size=4),
    c("ringbuf-read", device="r3", size=-1),
    c("ringbuf-read", device="r3", size=0),
    c("chardev-send-break", id="n"),
    c("chardev-send-break", id="zz"),
    c("chardev-remove", id="zz"),
    c("chardev-remove", id="m"),
    c("chardev-change", id="zz", backend={"type": "null", "data": {}}),
    c("chardev-change", id="n", backend={"type": "ringbuf", "data": {}}),
    c("ringbuf-write", device="n", data="x"),
    c("object-add", qom_type="tls-creds-x509", id="x"),
    c("object-add", qom_type="tls-creds-x509", id="x", dir="/nonexistent"),
    c("object-add", qom_type="tls-creds-x509", id="x", dir="/nonexistent", endpoint="both"),
    add(driver="nbd", node_name="n", server={"type": "unix", "path": "DIR/none"}, tls_creds="nope"),
    add(driver="nbd", node_name="n", server={"type": "unix", "path": "DIR/none"}, tls_creds="s1"),
    c("object-del", id="nope"),
    c("object-del", id="t"),
    c("quit"),
]

# (what a problem has to contain, why it may differ)
KNOWN = [
    ("actual-size", "allocation on the host is the host's"),
    ("unshared by mirror job 'm'", "says which job; the reference says 'an unnamed block device'"),
    ("want \"Node dst is in use\"", "the target of a mirror names the job that uses it"),
    ("-[data-file]->", "an external data file is held as the image is: nobody else may write it"),
    ('{"backing": null, "driver": "qcow2"', "the name of an image opened without its backing file is the file's"),
    ("want \"Sync mode 'incremental' not supported\"", "mirrors copy what a bitmap marks, so one must be named"),
    ("want \"Sync mode 'bitmap' not supported\"", "the same"),
    ("want \"Parameter 'bitmap' is unexpected\"", "the same"),
    ("virtual-size: want 197120", "an empty qcow2 image is laid out differently"),
]


def prepare(directory):
    create = ["qemu-img", "create", "-q", "-f", "qcow2"]
    kinds = [[*create, "-o", o.replace("DIR", directory), f"kind{i}.qcow2", "8M"] for i, o in enumerate(KINDS)]
    for command in (
        *kinds,
        [*create, "base1.qcow2", "4M"],
        [*create, "-b", directory + "/base1.qcow2", "-F", "qcow2", "mid1.qcow2", "8M"],
        ["qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "8M"],
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", directory + "/a.qcow2", "-F", "qcow2", "top.qcow2"],
        ["qemu-img", "create", "-q", "-f", "raw", "raw.img", "1M"],
        [*create, "-b", "raw.img", "-F", "raw", "over1.qcow2", "8M"],
        ["qemu-img", "create", "-q", "-f", "raw", "src.img", "1M"],
        ["qemu-img", "create", "-q", "-f", "raw", "dst.img", "1M"],
        ["qemu-img", "create", "-q", "-f", "raw", "small.img", "512k"],
    ):
        subprocess.run(command, cwd=directory, check=True)


QUIET = 0.25  # seconds without an event after which jobs wait


def play(daemon):
    """What differs, command by command, how the reference ended (its exit status, or `SILENT`), and what we said."""
    different, told = [], []
    one, _ = sides = Side(REFERENCE), Side(daemon)
    try:
        for side in sides:
            prepare(side.dir)
        for command in COMMANDS:
            if command == "wait":
                for side in sides:
                    side.drain(QUIET)
                continue
            want, got = (side.said_to(command["execute"], command["arguments"]) for side in sides)
            told.append(got)
            problems = [d for d in differences(want, got) if not any(k in d for k, _ in KNOWN)]
            if SILENT in (want, got):
                # who has no answer once has none to what follows
                different.append(f"{json.dumps(command)[:160]}\n     no reply from {'the reference' if want == SILENT else 'us'}")
                return different, SILENT if want == SILENT else one.quit()[0], told
            if problems:
                different.append("\n".join([json.dumps(command)[:160], *(f"     {p[:400]}" for p in problems[:6])]))
        return different, one.quit()[0], told
    finally:
        for side in sides:
            side.clear()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--daemon", required=True)
    options = parser.parse_args()
    different, _, told = again(lambda: play(options.daemon))
    print("\n".join([*different, f"{len(told) - len(different)} of {len(told)} replies the same"]))
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
