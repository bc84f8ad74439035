"""Chains of images under jobs: what `wander.py` did first."""
import json

from .scene import MIB, Scene

JOBS = ["j", "k"]
BITMAPS = ["bm", "bn"]
QCOW2 = {"b": "b.q", "m": "m.q", "t": "t.q", "x": "x.q", "y": "y.q"}
RAW = {"r": "r.raw", "d": "d.raw"}
CHAIN = ["b", "m", "t"]
STEPS = (6, 22)


class Chains(Scene):
    """Images over images, a client, and all kinds of jobs with them."""

    def make(self):
        self.nodes = []
        self.images()
        self.first()
        for _ in range(self.random.randint(*STEPS)):
            self.some()
        self.last()

    def node(self):
        """A node that is probably there."""
        if self.nodes and self.maybe(0.93):
            return self.random.choice(self.nodes)
        return self.one("b", "m", "t", "tf", "mf", "bf", "x", "d", "nope", "flt")

    def like(self, *names):
        """One of the names that are there, mostly."""
        there = [n for n in names if n in self.nodes]
        return self.random.choice(there) if there and self.maybe(0.9) else self.node()

    # what there is at first

    def images(self):
        cluster = self.one("64k", "64k", "4k")
        size = self.one("1M", "1M", "2M")
        where = self.one("DIR/", "DIR/", "")
        made = [f"qemu-img create -q -f qcow2 -o cluster_size={cluster} b.q 1M"]
        made += [f"qemu-img create -q -f qcow2 -o cluster_size={cluster} -b {where}b.q -F qcow2 m.q {size}"]
        made += [f"qemu-img create -q -f qcow2 -b {where}m.q -F qcow2 t.q {size}"]
        made += [f"qemu-img create -q -f qcow2 x.q {size}", "qemu-img create -q -f qcow2 y.q 1M"]
        made += ["truncate -s 1M r.raw d.raw"]
        for name in ("b.q", "m.q", "t.q", "r.raw"):
            form = "raw" if name.endswith("raw") else "qcow2"
            for _ in range(self.random.randint(0, 3)):
                at, length = self.random.randrange(0, MIB, 4096), self.one(4096, 65536, 131072)
                length = min(length, MIB - at)
                what = self.one(f"write -P {self.random.randint(1, 255)}", "write -P 7", "write -z") + f" {at} {length}"
                made.append(f"qemu-io -f {form} -c '{what}' {name}")
        self.shell("; ".join(made))

    def first(self):
        for name in CHAIN:
            if self.maybe(0.93):
                self.add_qcow2(name)
        for name in ("x", "y"):
            if self.maybe(0.5):
                self.add_qcow2(name)
        for name in RAW:
            if self.maybe(0.6):
                self.add_raw(name)
        if self.maybe(0.3):
            self.add_null()
        if self.maybe(0.6):
            self.serve()

    def add(self, driver, name, **options):
        self.command("blockdev-add", driver=driver, node_name=name, **options)
        self.nodes.append(name)

    def file(self, name, path):
        inner = {"driver": "file", "node-name": name + "f", "filename": "DIR/" + path}
        if self.maybe(0.05):
            inner["read-only"] = True
        if self.maybe(0.1):
            self.command("blockdev-add", **inner)
            return name + "f"
        if self.maybe(0.8):
            return inner
        inner.pop("node-name")
        return inner

    def common(self):
        """Options that every node takes."""
        options = {}
        if self.maybe(0.1):
            options["read_only"] = self.one(True, True, False)
        if self.maybe(0.05):
            options["auto_read_only"] = self.one(True, False)
        if self.maybe(0.1):
            options["discard"] = self.one("unmap", "ignore")
        if self.maybe(0.08):
            options["detect_zeroes"] = self.one("on", "off", "unmap")
        if self.maybe(0.03):
            options["cache"] = {"no-flush": self.one(True, False)}
        return options

    def add_qcow2(self, name):
        below = {"m": "b", "t": "m"}.get(name)
        backing = ...
        if below and self.maybe(0.9):
            backing = below
        elif below and self.maybe(0.5) or name in ("x", "y") and self.maybe(0.5):
            backing = None
        self.add("qcow2", name, file=self.file(name, QCOW2[name]), backing=backing, **self.common())
        if self.lines[-1].find(f'"{name}f"') > 0:
            self.nodes.append(name + "f")

    def add_raw(self, name):
        window = {}
        if self.maybe(0.1):
            window["offset"] = 65536
        if self.maybe(0.1):
            window["size"] = self.one(65536, MIB // 2)
        self.add("raw", name, file=self.file(name, RAW[name]), **window, **self.common())

    def add_null(self):
        self.add("null-co", "n", size=self.one(MIB, MIB, 2 * MIB, 65536), read_zeroes=self.one(True, True, ...))

    def add_filter(self):
        kind = self.one("raw", "throttle", "compress", "preallocate", "blkdebug")
        name = self.one("f", "g")
        child = self.one(*[n for n in self.nodes if not n.endswith("f")] or ["t"])
        if kind == "throttle":
            self.command("object-add", **{"qom-type": "throttle-group", "id": "tg"})
            self.add(kind, name, throttle_group="tg", file=child)
        elif kind == "blkdebug":
            self.add(kind, name, image=child)
        else:
            self.add(kind, name, file=child)

    def serve(self):
        self.command("nbd-server-start", addr={"type": "unix", "data": {"path": "DIR/nbd.sock"}})
        if self.maybe(0.8):
            self.export()

    # what happens

    def some(self):
        kinds = [
            (10, self.job), (14, self.verb), (4, self.snapshot), (5, self.delete), (4, self.reopen), (8, self.bitmap), (4, self.export),
            (3, self.unexport), (8, self.client), (3, self.resize), (3, self.change_backing), (6, self.query), (4, self.transact), (2, self.add_filter),
            (3, self.add_again), (1, self.internal), (1, self.threshold), (1, self.serve), (1, self.stop), (1, self.activate), (3, self.settle), (1, self.create),
        ]  # fmt: skip
        self.weighted(kinds)()

    def job(self):
        kind = self.one("mirror", "mirror", "commit", "commit", "stream", "stream", "backup", "backup", "drive")
        more = {"job_id": self.one(*JOBS, JOBS[0])}
        if self.maybe(0.35):
            more["auto_finalize"] = self.one(True, False, False)
        if self.maybe(0.35):
            more["auto_dismiss"] = self.one(True, False, False)
        if self.maybe(0.12):
            more["speed"] = self.one(0, 1 << 30, 1 << 30, -1, (1 << 63) - 1)
        {"mirror": self.mirror, "commit": self.commit, "stream": self.stream, "backup": self.backup, "drive": self.drive}[kind](more)
        self.settle()

    def mirror(self, more):
        more |= self.some_of([
            ("filter_node_name", 0.3, ["flt", "flt2", "t"]), ("copy_mode", 0.3, ["background", "write-blocking"]), ("granularity", 0.1, [4096, 65536, 1000, 512]),
            ("buf_size", 0.05, [4096, 65536]), ("replaces", 0.15, ["t", "m", "tf", "flt", "nope"]), ("on_target_error", 0.05, ["stop", "report", "ignore"]),
            ("on_source_error", 0.05, ["stop", "report", "ignore", "enospc"]),
        ])  # fmt: skip
        self.command("blockdev-mirror", device=self.like("t", "m", "b", "r"), target=self.like("x", "y", "d", "n"), sync=self.one("full", "full", "top", "none"), **more)

    def commit(self, more):
        more |= self.some_of([
            ("filter_node_name", 0.2, ["flt", "flt2"]), ("backing_file", 0.15, ["b.q", "other", ""]), ("on_error", 0.1, ["report", "stop", "ignore", "enospc"]),
            ("top_node", 0.5, ["m", "m", "t", "b"]), ("base_node", 0.4, ["b", "b", "m"]), ("base", 0.06, ["DIR/b.q", "b.q", "nope"]), ("top", 0.06, ["DIR/m.q", "m.q"]),
            ("backing_mask_protocol", 0.05, [True, False]),
        ])  # fmt: skip
        self.command("block-commit", device=self.like("t", "t", "m"), **more)

    def stream(self, more):
        more |= self.some_of([
            ("filter_node_name", 0.2, ["flt", "flt2"]), ("backing_file", 0.1, ["b.q", "other"]), ("on_error", 0.1, ["report", "stop", "ignore"]),
            ("base_node", 0.3, ["b", "m"]), ("bottom", 0.15, ["m", "t"]), ("base", 0.06, ["DIR/b.q", "b.q", "nope"]), ("backing_mask_protocol", 0.05, [True, False]),
        ])  # fmt: skip
        self.command("block-stream", device=self.like("t", "m"), **more)

    def backup_options(self):
        more = self.some_of([
            ("filter_node_name", 0.2, ["flt", "flt2"]), ("compress", 0.07, [True, False]), ("on_source_error", 0.05, ["report", "stop"]),
            ("on_target_error", 0.05, ["report", "stop", "enospc"]), ("discard_source", 0.05, [True, False]),
            ("x_perf", 0.06, [{"max-workers": 1}, {"max-chunk": 65536}, {"use-copy-range": True}, {"min-cluster-size": 131072}, {"max-workers": 0}, {"max-chunk": 5}, {"min-cluster-size": 3}, {}]),
        ])  # fmt: skip
        more["sync"] = self.one("full", "full", "top", "none", "incremental", "bitmap")
        if more["sync"] in ("incremental", "bitmap") or self.maybe(0.1):
            more["bitmap"] = self.one(*BITMAPS)
            if self.maybe(0.8):
                more["bitmap_mode"] = self.one("on-success", "on-success", "never", "always")
        return more

    def backup(self, more):
        self.command("blockdev-backup", device=self.like("t", "m", "r"), target=self.like("x", "y", "d", "n"), **self.backup_options(), **more)

    def drive(self, more):
        into = {"target": f"DIR/{self.one('new1', 'new2')}", "format": self.one("qcow2", "raw")}
        if self.maybe(0.3):
            into["mode"] = self.one("existing", "absolute-paths")
        if self.maybe(0.5):
            self.command("drive-backup", device=self.like("t", "m", "r"), sync=self.one("full", "top", "none"), **into, **more)
        else:
            more |= self.some_of([("node_name", 0.3, ["new", "t"]), ("replaces", 0.1, ["t", "m", "nope"]), ("unmap", 0.1, [True, False]), ("copy_mode", 0.2, ["background", "write-blocking"])])
            self.command("drive-mirror", device=self.like("t", "m", "r"), sync=self.one("full", "top", "none"), **into, **more)

    def verb(self):
        job = self.one(*JOBS, JOBS[0])
        verb = self.one("pause", "resume", "complete", "complete", "cancel", "finalize", "dismiss", "finalize", "dismiss")
        old = self.maybe(0.4)
        if self.maybe(0.07):
            return self.command("block-job-set-speed", device=job, speed=self.one(0, 1 << 30, -1))
        if self.maybe(0.07):
            return self.command("block-job-change", id=job, type="mirror", copy_mode=self.one("write-blocking", "write-blocking", "background"))
        if not old:
            self.command("job-" + verb, id=job)
        elif verb in ("finalize", "dismiss"):
            self.command("block-job-" + verb, id=job)
        elif verb == "cancel" and self.maybe(0.4):
            self.command("block-job-cancel", device=job, force=self.one(True, False))
        else:
            self.command("block-job-" + verb, device=job)
        self.settle()

    def snapshot(self):
        if self.maybe(0.6):
            self.command("blockdev-snapshot", node=self.like("t", "m", "b", "r"), overlay=self.like("x", "y", "t"))
        else:
            made = self.one("s1", "s2")
            self.command("blockdev-snapshot-sync", **self.snapshot_sync(made))
            self.nodes.append(made)

    def snapshot_sync(self, made):
        named = {"node_name": self.like("t", "m", "r")} if self.maybe(0.9) else {"device": self.like("t", "m", "r")}
        mode = self.one("existing", "absolute-paths") if self.maybe(0.15) else ...
        file = f"DIR/{made}.q" if self.maybe(0.85) else self.one("DIR/x.q", 'json:{"driver":"file","filename":"DIR/s1.q"}', "file:DIR/s2.q", "DIR/none/s", "")
        return named | {"snapshot_file": file, "snapshot_node_name": made, "format": self.one("qcow2", "qcow2", "qcow2", "raw", ...), "mode": mode}

    def delete(self):
        self.command("blockdev-del", node_name=self.node())

    def add_again(self):
        name = self.one(*QCOW2, *RAW)
        self.add_qcow2(name) if name in QCOW2 else self.add_raw(name)

    def reopen(self):
        name = self.like("t", "m", "b", "x")
        path = QCOW2.get(name, "t.q")
        options = {"driver": "qcow2", "node-name": name, "file": self.one(name + "f", name + "f", {"driver": "file", "filename": "DIR/" + path})}
        if self.maybe(0.7):
            options["backing"] = self.one("b", "m", None, "x", "t")
        for k, v in self.common().items():
            options[k.replace("_", "-")] = v
        self.command("blockdev-reopen", options=[options])

    def bitmap_action(self):
        node, name = self.one("t", "m", "r", "b"), self.one(*BITMAPS)
        verb = self.one("add", "add", "add", "remove", "clear", "enable", "disable", "merge")
        data = {"node": node, "name": name}
        if verb == "merge":
            data = {"node": node, "target": name, "bitmaps": [self.one(*BITMAPS), {"node": self.node(), "name": self.one(*BITMAPS)}][: self.random.randint(1, 2)]}
        if verb == "add":
            data |= self.some_of([("persistent", 0.4, [True, False]), ("granularity", 0.2, [4096, 512, 1 << 20]), ("disabled", 0.2, [True, False])])
        return "block-dirty-bitmap-" + verb, data

    def bitmap(self):
        if self.maybe(0.25):
            return self.command("x-debug-block-dirty-bitmap-sha256", node=self.like("t", "m", "r", "b"), name=self.one(*BITMAPS))
        name, data = self.bitmap_action()
        self.command(name, **data)

    def export(self):
        node = self.like("t", "t", "m", "r", "x", "d")
        more = {}
        if self.maybe(0.75):
            more["writable"] = self.one(True, True, True, False)
        if self.maybe(0.15):
            more["bitmaps"] = [self.one(self.one(*BITMAPS), {"node": self.node(), "name": self.one(*BITMAPS)})]
        if self.maybe(0.1):
            more["allocation_depth"] = True
        self.command("block-export-add", type="nbd", id=self.one("e", "e", "e2"), node_name=node, name=self.one("e", "e", "e2"), **more)

    def unexport(self):
        self.command("block-export-del", id=self.one("e", "e2"), mode=self.one("hard", "safe", ...))
        self.shell("sleep 0.2")  # its node may go with it, which takes a moment

    def client(self):
        self.qemu_io(self.one("e", "e", "e2"), self.bytes())

    def resize(self):
        self.command("block_resize", node_name=self.like("t", "m", "r", "x"), size=self.one(MIB, 2 * MIB, 3 * MIB, MIB // 2, 512, 1000))

    def change_backing(self):
        # nothing that makes a loop: the reference's tools follow it without end
        self.command("change-backing-file", device=self.one("t", "m"), image_node_name=self.one("t", "m", "t", "nope"), backing_file=self.one("b.q", "b.q", "else", ""))

    def query(self):
        self.command(self.one("query-jobs", "query-block-jobs", "query-named-block-nodes", "query-block-exports", "x-debug-query-block-graph"))
        if self.lines[-1] == "query-named-block-nodes" and self.maybe(0.7):
            self.lines[-1] = 'query-named-block-nodes {"flat": true}'

    def transact(self):
        actions = []
        for _ in range(self.random.randint(1, 3)):
            kind = self.one("bitmap", "bitmap", "snapshot", "backup", "abort", "drive", "sync", "internal")
            if kind == "bitmap":
                name, data = self.bitmap_action()
                actions.append({"type": name, "data": data})
            elif kind == "snapshot":
                actions.append({"type": "blockdev-snapshot", "data": {"node": self.like("t", "m", "r"), "overlay": self.like("x", "y")}})
            elif kind == "backup":
                data = {"job_id": self.one(*JOBS), "device": self.like("t", "m", "r"), "target": self.like("x", "y", "d", "n"), **self.backup_options()}
                actions.append({"type": "blockdev-backup", "data": {k.replace("_", "-"): v for k, v in data.items()}})
            elif kind == "drive":
                data = {"job_id": self.one(*JOBS), "device": self.like("t", "m", "r"), "target": f"DIR/{self.one('new1', 'new2')}", "format": "qcow2", **self.backup_options()}
                actions.append({"type": "drive-backup", "data": {k.replace("_", "-"): v for k, v in data.items()}})
            elif kind == "sync":
                data = self.snapshot_sync(self.one("s1", "s2"))
                actions.append({"type": "blockdev-snapshot-sync", "data": {k.replace("_", "-"): v for k, v in data.items() if v is not ...}})
            elif kind == "internal":
                actions.append({"type": "blockdev-snapshot-internal-sync", "data": {"device": self.like("t", "m"), "name": self.one("i1", "i2", "")}})
            elif self.maybe(0.4):
                actions.append({"type": "abort", "data": {}})
        more = {"properties": {"completion-mode": self.one("individual", "grouped")}} if self.maybe(0.4) else {}
        self.command("transaction", actions=actions, **more)
        self.settle()

    def internal(self):
        if self.maybe(0.6):
            self.command("blockdev-snapshot-internal-sync", device=self.like("t", "m"), name=self.one("i1", "i2"))
        else:
            self.command("blockdev-snapshot-delete-internal-sync", device=self.like("t", "m"), name=self.one("i1", "i2"))

    def threshold(self):
        self.command("block-set-write-threshold", node_name=self.like("tf", "t", "r"), write_threshold=self.one(0, 4096, MIB))

    def stop(self):
        self.command("nbd-server-stop")

    def activate(self):
        self.command("blockdev-set-active", node_name=self.node(), active=self.one(False, False, True))

    def create(self):
        self.command("blockdev-create", job_id="c", options={"driver": "qcow2", "file": self.one("df", "yf"), "size": self.one(MIB, 1000, 0)})
        self.settle()
        self.command("job-dismiss", id="c")

    # what there is in the end

    def last(self):
        self.settle()
        self.command("query-jobs")
        self.command("query-block-jobs")
        self.command("query-named-block-nodes", flat=True)
        self.command("x-debug-query-block-graph")
        self.command("query-block-exports")
        for node in ("t", "m", "r"):
            for name in BITMAPS:
                self.command("x-debug-block-dirty-bitmap-sha256", node=node, name=name)
        images = "b.q m.q t.q x.q y.q s1.q s2.q"
        facts = "virtual size|backing|bitmap|name:|granul|in-use|auto|TAG|i[12]"
        for say in ("qemu-img check -q $f", f"qemu-img info $f | grep -E '{facts}' | sed 's/ 20[0-9][0-9]-.*//'", "qemu-img convert -O raw $f out && sha256sum out; rm -f out"):
            self.lines.append(f"!! for f in {images}; do if test -e $f; then echo $f; {say}; fi; done")
        self.lines.append("!! for f in r.raw d.raw new1 new2; do if test -e $f; then qemu-img info $f | grep 'file format'; qemu-img convert -O raw $f out; sha256sum out; fi; done")
