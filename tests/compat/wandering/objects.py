"""Objects of every kind, the NBD server and exports that need them, and character devices."""
from .scene import MIB, Scene

IDS = ["o", "p", "q", "s"]
TYPES = ["iothread", "throttle-group", "secret", "authz-list", "authz-simple", "tls-creds-x509", "main-loop"]
STEPS = (8, 30)
# A certificate authority, a server and a client whose certificates it has signed, as QEMU looks for them.
CERTIFICATES = (
    "mkdir tls cl; cd tls; openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout ca-key.pem -out ca-cert.pem -days 2 -subj /CN=ca 2>/dev/null; for n in server client; do "
    "openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout $n-key.pem -out $n.csr -subj /CN=$n 2>/dev/null; echo subjectAltName=DNS:localhost,IP:127.0.0.1 > ext; "
    "openssl x509 -req -in $n.csr -CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial -days 2 -out $n-cert.pem -extfile ext 2>/dev/null; done; cp ca-cert.pem client-*.pem ../cl"
)


class Objects(Scene):
    def make(self):
        self.shell("truncate -s 1M 1.raw 2.raw; qemu-img create -q -f qcow2 1.q 1M; qemu-img bitmap --add 1.q bm; touch mount; printf geheim > pass; " + (CERTIFICATES if self.maybe(0.5) else "mkdir tls cl"))
        self.command("blockdev-add", driver="file", node_name="a", filename="DIR/1.raw")
        self.command("blockdev-add", driver="qcow2", node_name="b", file={"driver": "file", "filename": "DIR/1.q"})
        self.command("blockdev-add", driver="null-co", node_name="c", size=MIB, read_only=self.one(True, ...))
        for _ in range(self.random.randint(*STEPS)):
            self.some()
        self.command("qom-list", path="/objects")
        self.command("query-block-exports")
        self.command("query-chardev")
        self.command("query-named-block-nodes", flat=True)

    def some(self):
        self.weighted([
            (8, self.add), (4, self.delete), (6, self.property), (2, self.listing), (4, self.server), (2, self.stop), (6, self.export), (3, self.unexport), (3, self.old), (4, self.client),
            (4, self.chardev), (1, self.query), (1, self.ring), (1, self.users),
        ])()  # fmt: skip

    def id(self):
        return self.one(*IDS) if self.maybe(0.95) else self.one("", "1", "a/b", "x" * 300, "\u00e4", "a b", "none")

    def add(self):
        kind = self.one(*TYPES) if self.maybe(0.95) else self.one("nope", "memory-backend-ram", "rng-random", "", "container", "object", "tls-creds", "authz")
        options = {"qom-type": kind, "id": self.id()} | {
            "iothread": self.iothread, "throttle-group": self.throttle, "secret": self.secret, "authz-list": self.authz, "authz-simple": self.simple, "tls-creds-x509": self.tls, "main-loop": self.loop,
        }.get(kind, dict)()  # fmt: skip
        if self.maybe(0.05):
            options[self.one("bogus", "x-y", "limits", "type")] = self.one(1, "x", {}, None)
        if self.maybe(0.03):
            options.pop(self.random.choice(list(options)))
        self.send("object-add", options)

    def loop(self):
        return self.some_of([("aio-max-batch", 0.3, [0, 5, -1]), ("thread-pool-min", 0.3, [0, 2, -1, 1 << 32]), ("thread-pool-max", 0.3, [1, 64, 0, -1])])

    def iothread(self):
        return self.loop() | self.some_of([("poll-max-ns", 0.3, [0, 5, -1, 1 << 63]), ("poll-grow", 0.2, [0, 3]), ("poll-shrink", 0.2, [0, 3, -1])])

    def throttle(self):
        limits = {f"{unit}-{what}{more}": self.one(0, 1, 5, 100, 1 << 20, 1 << 50, -1) for unit in ("bps", "iops") for what in ("total", "read", "write") for more in ("", "-max", "-max-length") if self.maybe(0.06)}
        if self.maybe(0.1):
            limits["iops-size"] = self.one(0, 512, 5)
        if self.maybe(0.2):
            return {"x-" + k: v for k, v in limits.items()}
        return {"limits": limits} if limits or self.maybe(0.3) else {}

    def secret(self):
        options = self.one({"data": self.one("geheim", "", "Z2Vo", "\u00e4", "!!")}, {"file": self.one("DIR/pass", "DIR/none", "")}, {"data": "x", "file": "DIR/pass"}, {})
        return options | self.some_of([("format", 0.3, ["raw", "base64", "nope"]), ("keyid", 0.1, ["s", "none"]), ("iv", 0.1, ["AAAA", "x"])])

    def authz(self):
        rule = {"match": self.one("CN=client", "*", "CN=*", ""), "policy": self.one("allow", "deny")} | self.some_of([("format", 0.5, ["exact", "glob", "nope"])])
        return self.some_of([("policy", 0.6, ["allow", "deny", "nope"]), ("rules", 0.7, [[rule], [rule, {"match": "x", "policy": "deny"}], [], [{"match": "x"}], "x", {}])])

    def simple(self):
        return {"identity": self.one("CN=client", "", "x")} if self.maybe(0.9) else {}

    def tls(self):
        return {"dir": self.one("DIR/tls", "DIR/tls", "DIR/tls", "DIR/cl", "DIR/none", "DIR/pass")} | self.some_of([
            ("endpoint", 0.9, ["server", "server", "client", "nope"]), ("verify-peer", 0.4, [True, False]), ("sanity-check", 0.2, [True, False]), ("passwordid", 0.05, ["s", "none"]),
            ("priority", 0.1, ["NORMAL"]),
        ])  # fmt: skip

    def delete(self):
        self.command("object-del", id=self.id())

    def property(self):
        path = self.one("", "/objects/", "/objects/") + self.one(*IDS)
        name = self.one(
            "type", "limits", "poll-max-ns", "poll-grow", "poll-shrink", "aio-max-batch", "thread-pool-min", "thread-pool-max", "identity", "policy", "rules", "dir", "endpoint", "verify-peer", "loaded",
            "data", "file", "format", "keyid", "priority", "sanity-check", "x-bps-total", "x-iops-total-max", "x-iops-size", "nope", "",
        )  # fmt: skip
        if self.maybe(0.5):
            return self.send("qom-get", {"path": path, "property": name})
        value = self.one(5, 0, -1, "x", "allow", "client", "server", True, False, None, {}, {"bps-read": 7}, {"iops-total": 5, "iops-read": 1}, [], [{"match": "m", "policy": "deny"}], 1.5, 1 << 63)
        self.send("qom-set", {"path": path, "property": name, "value": value})

    def listing(self):
        self.one(
            lambda: self.command("qom-list", path=self.one("/objects", "/objects/" + self.one(*IDS), self.one(*IDS), "objects", "/objects/", "")),
            lambda: self.command("qom-list-properties", typename=self.one(*TYPES, "nope", "object", "tls-creds", "")),
            lambda: self.command("qom-list-types", implements=self.one("secret", "iothread", "nope", "throttle-group", ""), abstract=self.one(True, False, ...)),
        )()  # fmt: skip

    def address(self, odd=0.1):
        if self.maybe(odd):
            return self.one(
                {"type": "unix"}, {"type": "unix", "data": {}}, {"type": "unix", "data": {"path": ""}}, {"type": "unix", "data": {"path": "x" * 120}}, {"type": "unix", "data": {"path": "DIR/none/x"}},
                {"type": "inet", "data": {"host": "127.0.0.1"}}, {"type": "inet", "data": {"host": "127.0.0.1", "port": "zz"}}, {"type": "inet", "data": {"host": "127.0.0.1", "port": 5}},
                {"type": "nope", "data": {}}, {"type": "fd", "data": {"str": "none"}}, {"type": "inet", "data": {"host": "127.0.0.1", "port": "0", "ipv4": False, "ipv6": False}},
                {"type": "inet", "data": {"host": "127.0.0.1", "port": "0", "to": 5}}, {"type": "unix", "data": {"path": "DIR/nbd.sock", "tight": True}}, 5, "x", {}, None,
            )  # fmt: skip
        return {"type": "unix", "data": {"path": "DIR/nbd.sock"}} if self.maybe(0.9) else {"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}}

    def server(self):
        self.send("nbd-server-start", {"addr": self.address()} | self.some_of([
            ("tls-creds", 0.4, IDS), ("tls-authz", 0.2, [*IDS, "none"]), ("max-connections", 0.2, [0, 1, 5, 1 << 31, 1 << 32, -1]), ("handshake-max-seconds", 0.1, [0, 10, 1 << 32]),
        ]))  # fmt: skip

    def stop(self):
        self.command("nbd-server-stop")

    def export(self):
        kind = self.one("nbd", "nbd", "nbd", "nbd", "vhost-user-blk", "fuse") if self.maybe(0.97) else "nope"
        options = {"type": kind, "id": self.one("e", "e", "e2") if self.maybe(0.97) else self.one("", "1", "x/y"), "node-name": self.one("a", "b", "c") if self.maybe(0.95) else self.one("none", "", 5)}
        options |= self.some_of([
            ("writable", 0.6, [True, True, False]), ("writethrough", 0.15, [True, False]), ("iothread", 0.1, [*IDS]), ("fixed-iothread", 0.1, [True, False]), ("allow-inactive", 0.1, [True, False]),
        ])  # fmt: skip
        if kind == "nbd":
            options |= self.some_of([
                ("name", 0.7, ["e", "e", "e2", "", "\u00e4\u20ac", "x" * 4096, "x" * 4097, 5]), ("description", 0.2, ["", "text", "x" * 4096, "x" * 4097]), ("bitmap", 0.05, ["bm"]),
                ("bitmaps", 0.25, [["bm"], ["bm", "bm"], ["none"], [{"node": "b", "name": "bm"}], [{"node": "none", "name": "bm"}], [], [5]]), ("allocation-depth", 0.1, [True, False]),
            ])  # fmt: skip
        elif kind == "vhost-user-blk":
            options["addr"] = self.one({"type": "unix", "path": "DIR/vhost.sock"}, {"type": "unix", "path": "DIR/vhost.sock"}, {"type": "unix", "path": "DIR/none/x"}, {"type": "unix"}, {"type": "inet", "host": "127.0.0.1", "port": "0"}, {})
            options |= self.some_of([("num-queues", 0.3, [1, 4, 0, 65535, 65536, 1024, 1025, -1]), ("logical-block-size", 0.3, [512, 4096, 65536, 1000, 0, 1 << 21])])
        elif kind == "fuse":
            options["mountpoint"] = self.one("DIR/mount", "DIR/mount", "DIR/none", "DIR", "", "DIR/1.raw")
            options |= self.some_of([("growable", 0.3, [True, False]), ("allow-other", 0.3, ["off", "auto", "nope"])])
        if self.maybe(0.05):
            options[self.one("bogus", "device", "addr", "mountpoint")] = self.one("x", 1, None)
        if self.maybe(0.03):
            options.pop(self.random.choice(list(options)))
        self.send("block-export-add", options)

    def unexport(self):
        self.send("block-export-del", {"id": self.one("e", "e", "e2", "none")} | self.some_of([("mode", 0.4, ["hard", "safe", "nope"])]))
        self.shell("sleep 0.1")

    def old(self):
        """Exports as they were once asked for."""
        if self.maybe(0.6):
            return self.send("nbd-server-add", {"device": self.one("a", "b", "c", "none")} | self.some_of([("name", 0.5, ["e", "e2", ""]), ("writable", 0.5, [True, False]), ("bitmap", 0.2, ["bm", "none"]), ("description", 0.1, ["t"])]))
        self.send("nbd-server-remove", {"name": self.one("a", "b", "e", "e2", "none")} | self.some_of([("mode", 0.4, ["hard", "safe"])]))

    def client(self):
        export, more = self.one("e", "e", "e2", "a", "b", ""), self.one("", "", "&tls-certificates=DIR/cl&tls-hostname=localhost")
        if self.maybe(0.4):
            tls = "--tls=require --tls-certificates=DIR/cl" if more else ""
            about = "export|size|read_only|context|description|can_|block_size|is_|protocol"
            return self.shell(f"LANG=C nbdinfo --json {self.one('', '--list ')}'nbd{'s' if tls else ''}+unix:///{export}?socket=DIR/nbd.sock{'&tls-certificates=DIR/cl' if tls else ''}' 2>&1 | grep -E '{about}' | grep -v uri")
        if more:
            return self.shell(
                "qemu-io --object tls-creds-x509,id=t,dir=DIR/cl,endpoint=client --image-opts -c 'read 0 4k' "
                f"driver=nbd,server.type=unix,server.path=DIR/nbd.sock,export={export},tls-creds=t,tls-hostname=localhost 2>&1 | sed 's/.*read failed/read failed/'"
            )
        self.qemu_io(export, self.bytes())

    def chardev(self):
        name = self.one("x", "y", "x")
        if self.maybe(0.3):
            return self.command("chardev-remove", id=self.one("x", "y", "none", ""))
        if self.maybe(0.1):
            return self.command("chardev-send-break", id=self.one("x", "y", "none"))
        kind = self.one("null", "ringbuf", "memory", "socket", "socket", "nope", "file")
        data = {
            "ringbuf": self.one({}, {"size": 64}, {"size": 65536}, {"size": 100}), "memory": self.one({}, {"size": 64}),
            "socket": {"addr": self.address()} | self.some_of([("server", 0.8, [True, True, False]), ("wait", 1, [False]), ("nodelay", 0.1, [True, False]), ("tls-creds", 0.1, IDS), ("tls-authz", 0.1, IDS)]),
            "file": {"out": "DIR/out"},
        }.get(kind, {})  # fmt: skip
        if kind == "socket" and isinstance(data["addr"], dict) and data["addr"].get("data", {}).get("path") == "DIR/nbd.sock":
            data["addr"] = {"type": "unix", "data": {"path": f"DIR/{name}.sock"}}
        backend = {"type": kind, "data": data} if self.maybe(0.95) else self.one({"type": kind}, {"data": data}, 5, {})
        self.send(self.one("chardev-add", "chardev-add", "chardev-add", "chardev-change"), {"id": name if self.maybe(0.95) else self.one("", "1", "a/b", "c"), "backend": backend})

    def ring(self):
        if self.maybe(0.5):
            return self.send("ringbuf-write", {"device": self.one("x", "y"), "data": self.one("abc", "", "YWJj", "\u00e4", "x" * 100)} | self.some_of([("format", 0.3, ["utf8", "base64"])]))
        self.send("ringbuf-read", {"device": self.one("x", "y"), "size": self.one(1, 5, 1000, 0, -1)} | self.some_of([("format", 0.3, ["utf8", "base64"])]))

    def query(self):
        self.command(self.one("query-block-exports", "query-chardev", "query-block", "query-version", "x-debug-query-block-graph"))

    def users(self):
        """Nodes that use objects."""
        self.one(
            lambda: self.command("blockdev-add", driver="throttle", node_name="t", throttle_group=self.one(*IDS), file=self.one("a", "b", "c")),
            lambda: self.command("blockdev-del", node_name=self.one("t", "a", "b", "c", "n")),
            lambda: self.command("blockdev-add", driver="nbd", node_name="n", server={"type": "unix", "path": "DIR/none.sock"}, tls_creds=self.one(*IDS), tls_hostname=self.one("localhost", ...)),
            lambda: self.command("x-blockdev-set-iothread", node_name=self.one("a", "b"), iothread=self.one(*IDS)),
        )()  # fmt: skip
