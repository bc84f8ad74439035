"""Pairs of a primary and a secondary, of liveblkd and of QEMU in either role, with two disks that are replicated together.

`Colo`: as QEMU composes it (quorum, `replication`, NBD); each side is liveblkd or qemu-system. `Native`: two liveblkd with a group, over
liveblk's own wire. Both have the same verbs, so the same history can be played on all.
"""

import os
import shutil
import signal
import subprocess
import time

from nbdio import Hung, Nbd, Qmp, Refused

DISKS = 2
SIZE = 2 << 20
SECTOR = 512
STORE = 16 << 20


def image(kind, path):
    subprocess.run(["qemu-img", "create", "-q", "-f", kind, path, str(SIZE)], check=True)


class Process:
    """liveblkd or qemu-system in a directory of its own."""

    def __init__(self, where, daemon, qemu=False):
        self.where, self.daemon, self.qemu = where, daemon, qemu
        os.makedirs(where, exist_ok=True)
        self.start()

    def start(self):
        for name in ("qmp.sock", "nbd.sock", "repl.sock"):
            if os.path.exists(self.path(name)):
                os.unlink(self.path(name))
        sock = self.path("qmp.sock")
        if self.qemu:
            line = ["qemu-system-x86_64", "-M", "none", "-nodefaults", "-display", "none", "-S",
                    "-qmp", f"unix:{sock},server=on,wait=off"]
        else:
            line = [self.daemon, "--chardev", f"socket,id=c0,path={sock},server=on,wait=off", "--monitor", "c0"]
        self.told = open(self.path("stderr"), "ab")
        self.child = subprocess.Popen(line, cwd=self.where, stdin=subprocess.DEVNULL, stderr=self.told)
        self.qmp = Qmp(sock)
        self.qmp.do("nbd-server-start", addr={"type": "unix", "data": {"path": self.path("nbd.sock")}})

    def path(self, name):
        return os.path.join(self.where, name)

    def add(self, node):
        """The kernel may hold the locks of a process that was killed for a moment longer."""
        begin = time.monotonic()
        while True:
            self.qmp.begin("blockdev-add", node)
            try:
                return self.qmp.end()
            except Refused as e:
                if "lock" not in str(e) or time.monotonic() - begin > 10:
                    raise
            time.sleep(0.02)

    def export(self, node):
        self.qmp.do("block-export-add", type="nbd", id=f"x-{node}", node_name=node, name=node, writable=True)

    def open(self, export):
        return Nbd(self.path("nbd.sock"), export)

    def raw(self, n):
        with open(self.path(f"disk{n}.raw"), "rb") as f:
            return f.read()

    def freeze(self):
        self.child.send_signal(signal.SIGSTOP)

    def thaw(self):
        self.child.send_signal(signal.SIGCONT)

    def kill(self):
        self.thaw()
        self.child.kill()
        self.child.wait()
        self.told.close()


class Pair:
    """What both kinds have in common: the clients of both fronts."""

    def open(self):
        self.p = [self.primary.open(f"top{n}") for n in range(DISKS)]
        self.open_secondary()

    def open_secondary(self):
        self.s = [self.secondary.open(f"top{n}") for n in range(DISKS)]

    def end(self):
        for client in self.p + self.s:
            client.close()
        for side in (self.primary, self.secondary):
            side.kill()
        shutil.rmtree(self.where)


def until(what, is_so, patience=20.0):
    begin = time.monotonic()
    while not is_so():
        if time.monotonic() - begin > patience:
            raise Hung(f"{what} does not come about")
        time.sleep(0.005)


def failing(file, rules):
    return {"driver": "blkdebug", "image": file, **rules} if rules else file


class Colo(Pair):
    """As QEMU does it. `rules` makes images of the secondary fail: {"hidden1": options of blkdebug}."""

    native, marks_in_band, undo = False, False, True

    def __init__(self, where, daemon, primary_is_qemu, secondary_is_qemu, rules=None, durable=False):
        self.where, self.rules = where, rules or {}
        self.p_qemu, self.s_qemu = primary_is_qemu, secondary_is_qemu
        self.durable = durable and not secondary_is_qemu
        self.secondary = Process(f"{where}/s", daemon, secondary_is_qemu)
        for n in range(DISKS):
            image("raw", self.secondary.path(f"disk{n}.raw"))
            image("qcow2", self.secondary.path(f"active{n}.qcow2"))
            image("qcow2", self.secondary.path(f"hidden{n}.qcow2"))
        self.make_secondary()
        self.secondary.qmp.do("xen-set-replication", enable=True, primary=False)
        self.primary = Process(f"{where}/p", daemon, primary_is_qemu)
        for n in range(DISKS):
            self.make_primary(n)
        self.primary.qmp.do("xen-set-replication", enable=True, primary=True)
        self.open()

    def file(self, side, name):
        return {"driver": "file", "filename": side.path(name)}

    def make_secondary(self):
        s = self.secondary
        for n in range(DISKS):
            part = lambda name, ending: failing(self.file(s, f"{name}{n}.{ending}"), self.rules.get(f"{name}{n}"))
            s.add({"driver": "raw", "node-name": f"s{n}", "file": part("disk", "raw")})
            node = {"driver": "replication", "mode": "secondary", "node-name": f"rep{n}", "top-id": f"top{n}",
                    "file": {"driver": "qcow2", "node-name": f"active{n}", "file": part("active", "qcow2"),
                             "backing": {"driver": "qcow2", "node-name": f"hidden{n}", "file": part("hidden", "qcow2"),
                                         "backing": f"s{n}"}}}
            if self.durable:
                node["durable"] = True
            s.add(node)
            s.add({"driver": "quorum", "node-name": f"top{n}", "read-pattern": "fifo", "vote-threshold": 1,
                   "children": [f"rep{n}"]})
            s.export(f"s{n}")
            s.export(f"top{n}")

    def make_primary(self, n):
        p = self.primary
        image("raw", p.path(f"disk{n}.raw"))
        p.add({"driver": "raw", "node-name": f"p{n}", "file": self.file(p, f"disk{n}.raw")})
        node = {"driver": "replication", "mode": "primary", "node-name": f"rep{n}",
                "file": {"driver": "nbd", "node-name": f"link{n}", "export": f"s{n}",
                         "server": {"type": "unix", "path": self.secondary.path("nbd.sock")}}}
        if not self.p_qemu:
            node["forward-timeout"] = 1
        p.add(node)
        p.add({"driver": "quorum", "node-name": f"top{n}", "read-pattern": "fifo", "vote-threshold": 1,
               "children": [f"p{n}", f"rep{n}"]})
        p.export(f"top{n}")

    def checkpoint(self):
        """What a manager does: first the side that may know of trouble, then the other. Raises Refused."""
        self.primary.qmp.do("xen-colo-do-checkpoint")
        self.secondary.qmp.do("xen-colo-do-checkpoint")

    def fail_over(self):
        self.secondary.qmp.do("xen-set-replication", enable=False, primary=False, failover=True)

    def trouble(self, side):
        return side.qmp.do("query-xen-replication-status")["error"]

    def is_merged(self):
        nodes = self.secondary.qmp.do("query-named-block-nodes", flat=True)
        return not any(n["node-name"].startswith("active") for n in nodes)

    def merged(self):
        until("the end of the merge", self.is_merged)

    def revive(self):
        """The secondary was killed: the same images again."""
        self.secondary.start()
        self.make_secondary()


class Native(Pair):
    """Two liveblkd over liveblk's own wire."""

    native, marks_in_band, p_qemu, s_qemu = True, True, False, False

    def __init__(self, where, daemon, engine, rules=None):
        self.where, self.rules, self.engine, self.undo = where, rules or {}, engine, engine == "undo"
        self.secondary, self.primary = Process(f"{where}/s", daemon), Process(f"{where}/p", daemon)
        for side in (self.secondary, self.primary):
            for n in range(DISKS):
                image("raw", side.path(f"disk{n}.raw"))
            self.make(side)
        self.follow()
        address = {"type": "unix", "path": self.secondary.path("repl.sock")}
        self.primary.qmp.do("replication-peer-add", group="g", peer="s", addr=address)
        self.primary.qmp.do("replication-start", group="g", role="primary", timeout_ms=1000)
        until("the first synchronization", self.in_sync)
        self.open()

    def make(self, side):
        rules = self.rules if side is self.secondary else {}
        for n in range(DISKS):
            file = {"driver": "file", "filename": side.path(f"disk{n}.raw")}
            side.add({"driver": "raw", "node-name": f"d{n}", "file": failing(file, rules.get(f"disk{n}"))})
        volumes = [{"node-name": f"d{n}", "front": f"top{n}"} for n in range(DISKS)]
        side.qmp.do("replication-group-add", id="g", volumes=volumes, engine=self.engine,
                    store={"path": side.path("store"), "size": STORE})
        for n in range(DISKS):
            side.export(f"top{n}")

    def follow(self):
        listen = {"type": "unix", "path": self.secondary.path("repl.sock")}
        self.secondary.qmp.do("replication-start", group="g", role="secondary", listen=listen)

    def info(self, side):
        return side.qmp.do("query-replication", group="g")[0]

    def in_sync(self):
        return any(p["state"] == "running" for p in self.info(self.primary).get("peers", []))

    def begin_checkpoint(self):
        self.primary.qmp.begin("replication-checkpoint", {"group": "g"})

    def end_checkpoint(self):
        self.primary.qmp.end()

    def checkpoint(self):
        self.begin_checkpoint()
        self.end_checkpoint()

    def fail_over(self):
        self.secondary.qmp.do("replication-failover", group="g")

    def trouble(self, side):
        return "last-error" in self.info(side)

    def is_merged(self):
        return self.info(self.secondary)["stage"] == "done"

    def merged(self):
        until("the end of the merge", self.is_merged)

    def revive(self):
        self.secondary.start()
        self.make(self.secondary)


def make(name, where, daemon, rules=None, durable=False):
    """A running pair of that name."""
    if name.startswith("native-"):
        return Native(where, daemon, name.removeprefix("native-"), rules)
    primary, secondary = {"qemu": (True, True), "ours-qemu": (False, True), "qemu-ours": (True, False), "nbd": (False, False)}[name]
    return Colo(where, daemon, primary, secondary, rules, durable)


NAMES = ["qemu", "ours-qemu", "qemu-ours", "nbd", "native-redo", "native-undo"]
