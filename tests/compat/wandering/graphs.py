"""Graphs of every driver, with options that fit and some that do not, reopened, rebuilt and used."""
import copy

from .scene import MIB, Scene

NAMES = list("abcdefgh")
STEPS = (5, 20)
RAW = ["1.raw", "2.raw", "3.raw", "odd.raw"]
QCOW2 = ["1.q", "2.q", "3.q", "4.q", "5.q", "6.q"]
EVENTS = ["none", "pwritev", "read_aio", "write_aio", "l2_load", "cluster_alloc", "flush_to_disk", "l2_update", "refblock_alloc"]
PERMS = ["consistent-read", "write", "write-unchanged", "resize"]
# What a client never waits long for
LIMITS = [{}, {"iops-total": 1000}, {"bps-total": 1 << 30}, {"iops-read": 1000, "iops-write": 1000}, {"iops-total": 1000, "iops-read": 5}, {"iops-total-max": 5}, {"iops-size": 512}]


class Graphs(Scene):
    def make(self):
        self.there = {}  # what was asked for, by name
        self.groups = False
        self.images()
        for _ in range(self.random.randint(2, 5)):
            self.add()
        if self.maybe(0.5):
            self.serve()
        for _ in range(self.random.randint(*STEPS)):
            self.some()
        self.last()

    def images(self):
        made = ["truncate -s 1M 1.raw 2.raw 3.raw", "truncate -s 700001 odd.raw; truncate -s 4M log.raw"]
        made += ["qemu-img create -q -f qcow2 1.q 1M", "qemu-img create -q -f qcow2 -b DIR/1.q -F qcow2 2.q 2M", "qemu-img create -q -f qcow2 -o extended_l2=on,cluster_size=128k 3.q 1M"]
        made += ["qemu-img create -q -f qcow2 -o compat=0.10,cluster_size=4k 4.q 1M", "qemu-img create -q -f qcow2 -o data_file=DIR/data.raw,lazy_refcounts=on 5.q 1M"]
        made += ["qemu-img create -q -f qcow2 -o refcount_bits=1 6.q 1M" if self.maybe(0.5) else "qemu-img create -q -f qcow2 6.q 1M; qemu-img bitmap --add 6.q p; qemu-img snapshot -c i 6.q"]
        for name in ("1.q", "3.q", "4.q", "1.raw"):
            if self.maybe(0.6):
                at = self.random.randrange(0, MIB - 65536, 4096)
                made.append(f"qemu-io -f {'raw' if name.endswith('raw') else 'qcow2'} -c 'write -P {self.random.randint(1, 255)} {at} 64k' {name}")
        self.shell("; ".join(made))

    # what a node is asked to be

    def node(self):
        there = list(self.there)
        return self.random.choice(there) if there and self.maybe(0.93) else self.one(*NAMES, "nope")

    def file(self, *names):
        """A protocol node."""
        options = {"driver": "file", "filename": ("" if self.maybe(0.1) else "DIR/") + self.one(*names)}
        if self.maybe(0.04):
            options["filename"] = self.one("", "DIR", "DIR/none", "file:DIR/1.raw", "json:{}", "/dev/null", "/dev/zero", 'json:{"driver":"file","filename":"DIR/1.raw"}')
        return options | self.some_of([
            ("locking", 0.08, ["auto", "on", "off", "nope"]), ("aio", 0.05, ["threads", "native", "io_uring"]), ("aio-max-batch", 0.03, [0, 5]), ("drop-cache", 0.03, [True, False]),
            ("x-check-cache-dropped", 0.03, [True, False]), ("pr-manager", 0.02, ["pr"]),
        ])  # fmt: skip

    def child(self, depth, *, of=None):
        """Whom a node stands on: somebody who is there, or whoever is made with it."""
        if self.maybe(0.03):
            return self.one("", None, 5, {}, [], "nope", {"driver": "nope"}, {"node-name": "a"})
        if of is None and (depth > 2 or self.maybe(0.55)):
            return self.node()
        inner = of() if of and self.maybe(0.9) else self.node_options(depth + 1)
        if self.maybe(0.6):
            inner["node-name"] = self.one(*NAMES, *(n + "f" for n in NAMES))
        return inner | (self.common() if self.maybe(0.3) else {})

    def common(self):
        return self.some_of([
            ("read-only", 0.15, [True, True, False]), ("auto-read-only", 0.1, [True, False]), ("discard", 0.12, ["unmap", "ignore"]), ("detect-zeroes", 0.1, ["on", "off", "unmap"]),
            ("cache", 0.05, [{"direct": True}, {"no-flush": True}, {"direct": False, "no-flush": False}, {}]), ("force-share", 0.06, [True, False]), ("active", 0.05, [True, False]),
        ])  # fmt: skip

    def node_options(self, depth=0):
        driver = self.weighted([
            (4, "file"), (4, "raw"), (6, "qcow2"), (3, "null-co"), (1, "null-aio"), (2, "quorum"), (2, "throttle"), (2, "copy-on-read"), (2, "copy-before-write"), (1, "snapshot-access"),
            (1, "compress"), (1, "preallocate"), (2, "blkdebug"), (1, "blkverify"), (1, "blklogwrites"), (1, "replication"), (0.5, "host_device"), (0.4, "odd"),
        ])  # fmt: skip
        return self.file(*RAW, *QCOW2) if driver == "file" else getattr(self, driver.replace("-", "_"))(depth)

    def odd(self, depth):
        driver = self.one("vmdk", "nope", "vvfat", "luks", "https", "", 5)
        return {"driver": driver, "file": self.child(depth)}

    def null_co(self, depth):
        return {"driver": "null-co"} | self.some_of([("size", 0.95, [MIB, MIB, MIB, 2 * MIB, 700001, 512, 0, -1]), ("read-zeroes", 0.6, [True, True, False]), ("latency-ns", 0.08, [0, 1000])])

    def null_aio(self, depth):
        return self.null_co(depth) | {"driver": "null-aio"}

    def host_device(self, depth):
        return self.file("1.raw", "../null") | {"driver": "host_device"}

    def raw(self, depth):
        options = {"driver": "raw", "file": self.child(depth, of=self.one(None, lambda: self.file(*RAW)))}
        return options | self.some_of([("offset", 0.12, [0, 512, 65536, 1000, 2 * MIB]), ("size", 0.12, [0, 512, 65536, 1000, MIB, 2 * MIB, -1])])

    def qcow2(self, depth):
        image = self.one(*QCOW2)
        options = {"driver": "qcow2", "file": self.child(depth, of=self.one(lambda: self.file(image), lambda: self.file(image), lambda: self.file(image), None))}
        options |= self.some_of([
            ("backing", 0.3, [None, self.node(), self.node(), "", {"driver": "qcow2", "file": {"driver": "file", "filename": "DIR/1.q"}}]), ("lazy-refcounts", 0.1, [True, False]),
            ("overlap-check", 0.08, ["none", "constant", "cached", "all", {"template": "cached", "bitmap-directory": True}]), ("cache-size", 0.06, [0, 1 << 20, 1, 1 << 62]),
            ("l2-cache-size", 0.06, [0, 65536, 1 << 40]), ("refcount-cache-size", 0.05, [0, 65536, 262144]), ("l2-cache-entry-size", 0.05, [512, 4096, 65536, 1000, 256]),
            ("cache-clean-interval", 0.05, [0, 5, 1 << 31, 1 << 33]), ("pass-discard-request", 0.06, [True, False]), ("pass-discard-snapshot", 0.05, [True, False]),
            ("pass-discard-other", 0.05, [True, False]), ("discard-no-unref", 0.06, [True, False]),
        ])  # fmt: skip
        if image == "5.q" and self.maybe(0.3) or self.maybe(0.03):
            options["data-file"] = self.child(depth, of=lambda: self.file("data.raw"))
        return options

    def quorum(self, depth):
        children = [self.child(depth, of=self.one(None, lambda: self.file(*RAW), lambda: self.null_co(depth))) for _ in range(self.random.choice([0, 1, 2, 2, 3, 3, 4]))]
        options = {"driver": "quorum", "children": children, "vote-threshold": self.one(1, 1, 2, 2, 3, 0, 5, -1)}
        return options | self.some_of([("blkverify", 0.1, [True, False]), ("rewrite-corrupted", 0.1, [True, False]), ("read-pattern", 0.2, ["quorum", "fifo", "nope"])])

    def throttle(self, depth):
        if not self.groups or self.maybe(0.1):
            self.groups = True
            self.send("object-add", {"qom-type": "throttle-group", "id": self.one("tg", "tg", "tg2"), "limits": self.one(*LIMITS)})
        return {"driver": "throttle", "throttle-group": self.one("tg", "tg", "tg2", "nope"), "file": self.child(depth)}

    def filter(self, driver, depth):
        return {"driver": driver, "file": self.child(depth)}

    def copy_on_read(self, depth):
        return self.filter("copy-on-read", depth) | self.some_of([("bottom", 0.2, [self.node(), self.node(), "nope", ""])])

    def compress(self, depth):
        return self.filter("compress", depth)

    def preallocate(self, depth):
        return self.filter("preallocate", depth) | self.some_of([("prealloc-align", 0.2, [512, 65536, MIB, 1000, 0]), ("prealloc-size", 0.2, [0, 65536, MIB, 1000])])

    def snapshot_access(self, depth):
        return self.filter("snapshot-access", depth)

    def copy_before_write(self, depth):
        options = self.filter("copy-before-write", depth) | {"target": self.child(depth, of=self.one(None, lambda: self.file(*RAW), lambda: self.null_co(depth)))}
        return options | self.some_of([
            ("bitmap", 0.1, [{"node": self.node(), "name": "bm"}]), ("on-cbw-error", 0.1, ["break-guest-write", "break-snapshot"]), ("cbw-timeout", 0.05, [0, 5]),
            ("min-cluster-size", 0.1, [65536, 131072, 1000, 4096, 0]),
        ])  # fmt: skip

    def blkdebug(self, depth):
        rule = {"event": self.one(*EVENTS), **self.some_of([("errno", 0.6, [5, 28, 0]), ("once", 0.6, [True, False]), ("sector", 0.2, [0, 8, -1]), ("state", 0.2, [1, 2, 0]), ("immediately", 0.1, [True, False]),
                                                            ("iotype", 0.3, ["read", "write", "flush", "write-zeroes", "discard", "block-status"])])}  # fmt: skip
        return {"driver": "blkdebug", "image": self.child(depth)} | self.some_of([
            ("inject-error", 0.3, [[rule], [rule, rule], []]), ("set-state", 0.1, [[{"event": "pwritev", "new_state": 2}], [{"event": "none", "state": 2, "new_state": 1}], [{"event": "write_aio", "new_state": 0}]]),
            ("align", 0.1, [512, 4096, 1000, 0]), ("max-transfer", 0.1, [65536, 512, 1000]), ("opt-write-zero", 0.06, [4096, 1000]), ("max-write-zero", 0.06, [65536, 1000]),
            ("opt-discard", 0.06, [4096, 1000]), ("max-discard", 0.06, [65536, 1000]), ("take-child-perms", 0.1, [[self.one(*PERMS)], []]), ("unshare-child-perms", 0.1, [[self.one(*PERMS)], PERMS]),
            ("config", 0.04, ["", "DIR/none"]),
        ])  # fmt: skip

    def blkverify(self, depth):
        return {"driver": "blkverify", "test": self.child(depth), "raw": self.child(depth)}

    def blklogwrites(self, depth):
        options = self.filter("blklogwrites", depth) | {"log": self.child(depth, of=lambda: self.file("log.raw"))}
        return options | self.some_of([("log-sector-size", 0.2, [512, 4096, 1000, 0]), ("log-append", 0.2, [True, False]), ("log-super-update-interval", 0.1, [1, 0, 4096])])

    def replication(self, depth):
        return self.filter("replication", depth) | {"mode": self.one("primary", "secondary")} | self.some_of([("top-id", 0.4, [self.node(), "nope"])])

    # what happens

    def some(self):
        self.weighted([
            (8, self.add), (6, self.delete), (9, self.reopen), (3, self.change_children), (5, self.export), (2, self.unexport), (7, self.client), (3, self.resize), (5, self.query),
            (2, self.iothread), (2, self.activate), (2, self.snapshot), (1, self.threshold), (2, self.group), (5, self.job), (3, self.verb), (1, self.serve), (1, self.stop), (2, self.bitmap),
        ])()  # fmt: skip

    def named(self, options):
        """Whoever this makes, if it works."""
        if isinstance(options, dict):
            if isinstance(options.get("node-name"), str):
                self.there[options["node-name"]] = options
            for v in options.values():
                self.named(v)
        elif isinstance(options, list):
            for v in options:
                self.named(v)

    def add(self):
        options = {"node-name": self.one(*NAMES)} | self.node_options() | (self.common() if self.maybe(0.4) else {})
        if self.maybe(0.04):
            options[self.one("bogus", "filename", "file.driver", "size", "x-y")] = self.one(1, "x", None, {})
        self.send("blockdev-add", options)
        self.named(options)

    def delete(self):
        name = self.node()
        self.command("blockdev-del", node_name=name)
        if self.maybe(0.5):
            self.there.pop(name, None)

    def reopen(self):
        """Nodes as they are, but for something."""
        wanted = []
        for _ in range(self.one(1, 1, 1, 2, 3)):
            name = self.node()
            options = copy.deepcopy(self.there.get(name, {"driver": "raw", "file": self.node()}))
            for key, value in options.items():
                if isinstance(value, dict) and isinstance(value.get("node-name"), str) and self.maybe(0.8):
                    options[key] = value["node-name"]
            options["node-name"] = name
            for _ in range(self.one(0, 1, 1, 2)):
                self.alter(options)
            wanted.append(options)
        self.send("blockdev-reopen", {"options": wanted})
        for options in wanted:
            self.there[options["node-name"]] = options

    def alter(self, options):
        what = self.one("common", "common", "drop", "other", "child", "backing", "bogus")
        keys = [k for k in options if k not in ("driver", "node-name")]
        if what == "common":
            for key, value in self.common().items():
                options[key] = value
        elif what == "drop" and keys:
            options.pop(self.random.choice(keys))
        elif what == "other":
            driver = options.get("driver", "raw")
            drawn = {} if driver not in KINDS else self.file(*RAW) if driver == "file" else getattr(self, driver.replace("-", "_"))(3)
            for key in list(drawn):
                if key in options and not self.maybe(0.3):
                    drawn.pop(key)
            options |= drawn
        elif what == "child" and [k for k in keys if k in ("file", "image")]:
            options[self.one(*[k for k in keys if k in ("file", "image")])] = self.node()
        elif what == "backing":
            options["backing"] = self.one(None, self.node(), self.node(), "nope")
        elif what == "bogus" and self.maybe(0.3):
            options[self.one("bogus", "driver", "size")] = self.one("raw", 1, "x")

    def change_children(self):
        parent = self.like("quorum")
        if self.maybe(0.5):
            self.send("x-blockdev-change", {"parent": parent, "node": self.node()})
        else:
            self.send("x-blockdev-change", {"parent": parent, "child": self.one("children.0", "children.1", "children.2", "file", "children.7", "nope"), **({"node": self.node()} if self.maybe(0.1) else {})})

    def like(self, driver):
        there = [n for n, o in self.there.items() if o.get("driver") == driver]
        return self.random.choice(there) if there and self.maybe(0.85) else self.node()

    def serve(self):
        self.command("nbd-server-start", addr={"type": "unix", "data": {"path": "DIR/nbd.sock"}})
        self.export()

    def stop(self):
        self.command("nbd-server-stop")

    def export(self):
        more = self.some_of([("writable", 0.75, [True, True, True, False]), ("bitmaps", 0.05, [["bm"]]), ("allocation-depth", 0.1, [True]), ("writethrough", 0.1, [True, False]), ("allow-inactive", 0.06, [True, False])])
        self.command("block-export-add", type="nbd", id=self.one("e", "e", "e2"), node_name=self.node(), name=self.one("e", "e", "e2"), **more)

    def unexport(self):
        self.command("block-export-del", id=self.one("e", "e2"), mode=self.one("hard", "safe", ...))
        self.shell("sleep 0.2")

    def client(self):
        self.qemu_io(self.one("e", "e", "e2"), self.bytes())

    def resize(self):
        self.command("block_resize", node_name=self.node(), size=self.one(MIB, 2 * MIB, MIB // 2, 512, 1000, 700001, 0, -512))

    def query(self):
        self.weighted([
            (3, lambda: self.command("query-named-block-nodes", flat=True)), (2, lambda: self.command("query-named-block-nodes")), (2, lambda: self.command("x-debug-query-block-graph")),
            (1, lambda: self.command("query-block-exports")), (1, lambda: self.command("query-block")), (1, lambda: self.command("query-jobs")),
        ])()  # fmt: skip

    def iothread(self):
        if self.maybe(0.4):
            return self.send("object-add", {"qom-type": "iothread", "id": "io"})
        self.command("x-blockdev-set-iothread", node_name=self.node(), iothread=self.one("io", "io", None, "nope", ""), force=self.one(True, False, ...))

    def activate(self):
        self.command("blockdev-set-active", node_name=self.one(self.node(), self.node(), ...), active=self.one(False, False, True, True))

    def snapshot(self):
        if self.maybe(0.6):
            return self.command("blockdev-snapshot", node=self.node(), overlay=self.like("qcow2"))
        self.command("blockdev-snapshot-sync", node_name=self.node(), snapshot_file="DIR/s1.q", snapshot_node_name=self.one(*NAMES))

    def threshold(self):
        self.command("block-set-write-threshold", node_name=self.node(), write_threshold=self.one(0, 4096, MIB))

    def bitmap(self):
        verb = self.one("add", "add", "remove", "clear", "disable")
        self.send("block-dirty-bitmap-" + verb, {"node": self.node(), "name": "bm", **({"persistent": True} if verb == "add" and self.maybe(0.4) else {})})

    def group(self):
        self.weighted([
            (3, lambda: self.send("object-del", {"id": self.one("tg", "tg2", "io")})),
            (3, lambda: self.send("qom-set", {"path": self.one("tg", "/objects/tg"), "property": "limits", "value": self.one(*LIMITS)})),
            (2, lambda: self.send("qom-get", {"path": "tg", "property": "limits"})),
            (2, lambda: self.send("object-add", {"qom-type": "throttle-group", "id": self.one("tg", "tg2"), "limits": self.one(*LIMITS)})),
        ])()  # fmt: skip

    def job(self):
        more = {"job_id": self.one("j", "k"), **self.some_of([("auto_finalize", 0.3, [False]), ("auto_dismiss", 0.3, [False]), ("filter_node_name", 0.2, ["flt"])])}
        kind = self.one("mirror", "backup", "commit", "stream")
        if kind in ("mirror", "backup"):
            self.command("blockdev-" + kind, device=self.node(), target=self.node(), sync=self.one("full", "full", "top", "none"), **more)
        else:
            self.command("block-" + kind, device=self.node(), **({"base_node": self.node()} if self.maybe(0.5) else {}), **more)
        self.settle()

    def verb(self):
        self.command("job-" + self.one("complete", "complete", "cancel", "finalize", "dismiss", "pause", "resume"), id=self.one("j", "k"))
        self.settle()

    # what there is in the end

    def last(self):
        self.settle()
        self.command("query-jobs")
        self.command("query-named-block-nodes", flat=True)
        self.command("query-named-block-nodes")
        self.command("x-debug-query-block-graph")
        self.command("query-block-exports")
        for say in ("qemu-img check -q $f 2>&1 | grep -v ^qemu-img", "qemu-img convert -O raw $f out 2>/dev/null && sha256sum out; rm -f out"):
            self.lines.append(f"!! for f in {' '.join(QCOW2)} s1.q; do if test -e $f; then echo $f; {say}; fi; done")
        self.lines.append(f"!! sha256sum {' '.join(RAW)}")


KINDS = [n.replace("_", "-") for n in ("file", "raw", "qcow2", "null_co", "null_aio", "quorum", "throttle", "copy_on_read", "compress", "preallocate", "copy_before_write", "blkdebug")]
