"""Images that are made, amended and found by what headers say of them."""
from .scene import MIB, Scene

STEPS = (4, 14)
SIZES = [MIB, MIB, MIB, 2 * MIB, 0, 512, 1000, 700001, 1 << 40, -1, 1 << 63]
# How a header may name its backing file
BACKINGS = [
    "b.q", "DIR/b.q", "file:b.q", "file:DIR/b.q", "r.raw", "none", 'json:{"driver":"qcow2","file":{"driver":"file","filename":"DIR/b.q"}}', 'json:{"driver":"raw","file.driver":"file","file.filename":"DIR/r.raw"}',
    'json:{"driver":"null-co","size":1048576}', 'json:{"driver":"raw","file":{"driver":"null-co","size":1048576}}', "null-co://", "json:{}", "json:{", 'json:{"file":{"driver":"file","filename":"DIR/r.raw"}}',
    'json:{"driver":"raw","file":"a"}', "nope:x", "nbd+unix:///e?socket=DIR/none", "./b.q", "sub/../b.q", "",
]  # fmt: skip


class Creation(Scene):
    def make(self):
        self.shell("qemu-img create -q -f qcow2 b.q 1M; qemu-io -f qcow2 -c 'write -P 5 0 64k' b.q; head -c 1M /dev/zero | tr '\\0' y > r.raw; mkdir sub; truncate -s 0 1.f 2.f 3.f")
        for n in "123":
            self.command("blockdev-add", driver="file", node_name="f" + n, filename=f"DIR/{n}.f", **({"read_only": True} if self.maybe(0.03) else {}))
        for _ in range(self.random.randint(*STEPS)):
            self.some()
        self.command("query-jobs")
        self.command("query-named-block-nodes", flat=True)
        self.command("query-named-block-nodes")
        facts = "virtual size|backing|bitmap|name:|granul|compat|lazy|refcount bits|extended|data|compression|corrupt|cluster_size"
        for say in ("qemu-img check -q $f 2>&1 | grep -v ^qemu-img", f"qemu-img info $f 2>/dev/null | grep -E '{facts}'", "test $(qemu-img info $f 2>/dev/null | grep -c TiB) = 0 && qemu-img convert -O raw $f out 2>/dev/null && sha256sum out; rm -f out"):
            self.lines.append(f"!! for f in 1.f 2.f 3.f over.q; do if test -e $f; then echo $f; {say}; fi; done")

    def some(self):
        self.weighted([(8, self.create), (4, self.open), (3, self.delete), (2, self.amend), (3, self.named), (2, self.backing), (2, self.resize), (1, self.verb)])()

    def node(self):
        return self.one("f1", "f2", "f3") if self.maybe(0.93) else self.one("q1", "nope", "", None, 5, {"driver": "file", "filename": "DIR/3.f"})

    def create(self):
        driver = self.one("qcow2", "qcow2", "qcow2", "qcow2", "file", "raw") if self.maybe(0.95) else self.one("vmdk", "nope", "null-co", "luks", "nbd")
        options = {"driver": driver, "size": self.one(*SIZES)}
        preallocation = ("preallocation", 0.2, ["off", "metadata", "falloc", "full", "nope"])
        if driver == "file":
            options |= {"filename": self.one("DIR/1.f", "DIR/new", "DIR/none/x", "", "new2", "file:DIR/x")} | self.some_of([preallocation, ("nocow", 0.1, [True, False]), ("extent-size-hint", 0.1, [0, 65536, 1000, 1 << 33])])
        else:
            options |= {"file": self.node()}
        if driver == "qcow2":
            if options["size"] in (1 << 40,):
                options["cluster-size"] = 2 * MIB
            options |= self.some_of([
                preallocation, ("version", 0.25, ["v2", "v3", "v4"]), ("backing-file", 0.3, BACKINGS), ("backing-fmt", 0.25, ["qcow2", "raw", "vmdk", "nope", "file"]),
                ("cluster-size", 0.25, [512, 4096, 65536, 2 * MIB, 4 * MIB, 256, 1000, 0]), ("lazy-refcounts", 0.15, [True, False]), ("refcount-bits", 0.2, [1, 16, 64, 128, 3, 0]),
                ("compression-type", 0.15, ["zlib", "zstd", "nope"]), ("extended-l2", 0.15, [True, False]), ("data-file", 0.12, ["f3", "f3", "nope", {"driver": "file", "filename": "DIR/3.f"}]),
                ("data-file-raw", 0.1, [True, False]), ("encrypt", 0.02, [{"format": "luks"}]),
            ])  # fmt: skip
        if self.maybe(0.05):
            options.pop(self.random.choice(list(options)))
        if self.maybe(0.05):
            options[self.one("bogus", "cluster-size", "extent-size-hint")] = self.one(5, "x")
        self.send("blockdev-create", {"job-id": self.one("c", "c", "c2") if self.maybe(0.97) else self.one("", "1"), "options": options})
        self.settle()
        if self.maybe(0.9):
            self.command("query-jobs")
            self.command("job-dismiss", id="c")

    def open(self):
        n = self.one(*"123")
        options = {"driver": self.one("qcow2", "qcow2", "qcow2", "raw"), "node-name": "q" + n, "file": "f" + n if self.maybe(0.9) else {"driver": "file", "filename": f"DIR/{n}.f"}}
        options |= self.some_of([("backing", 0.15, [None, "q1", "q2"]), ("read-only", 0.1, [True]), ("data-file", 0.1, ["f3"])])
        self.send("blockdev-add", options)

    def delete(self):
        self.command("blockdev-del", node_name=self.one("q1", "q2", "q3", "q1", "q2", "f1", "over"))

    def amend(self):
        options = {"driver": self.one("qcow2", "qcow2", "raw", "luks", "nope")} | self.some_of([("encrypt", 0.2, [{"format": "luks", "state": "active"}, {"format": "qcow"}]), ("bogus", 0.05, [1])])
        self.send("x-blockdev-amend", {"job-id": "a", "node-name": self.one("q1", "q2", "f1", "nope"), "options": options} | self.some_of([("force", 0.3, [True, False])]))
        self.settle()
        self.command("query-jobs")
        self.command("job-dismiss", id="a")

    def named(self):
        """An image whose header names its backing file in some way is opened."""
        name = self.one(*BACKINGS).replace("'", "")
        form = self.one("qcow2", "raw", "qcow2", "raw", "vmdk", "nope", "")
        self.shell(f"""qemu-img create -q -f qcow2 over.q 1M; qemu-img rebase -u -f qcow2 -b '{name}' {"-F " + form if form else ""} over.q >/dev/null 2>&1; true""")
        self.command("blockdev-add", driver="qcow2", node_name="over", file={"driver": "file", "filename": self.one("DIR/over.q", "over.q", "./over.q")}, **self.some_of([("read_only", 0.2, [True])]))
        self.command("query-named-block-nodes", **({"flat": True} if self.maybe(0.5) else {}))
        if self.maybe(0.7):
            self.command("blockdev-del", node_name="over")

    def backing(self):
        name = self.one("q1", "q2", "over", "q3")
        self.command("change-backing-file", device=self.one(name, name, "q1"), image_node_name=name, backing_file=self.one(*BACKINGS, "x" * 1023, "x" * 1024))

    def resize(self):
        self.command("block_resize", node_name=self.one("q1", "q2", "f1", "over"), size=self.one(MIB, 2 * MIB, 512, 0))

    def verb(self):
        self.command("job-" + self.one("cancel", "pause", "resume", "finalize", "complete", "dismiss"), id=self.one("c", "c2"))
