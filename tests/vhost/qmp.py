"""liveblkd with a QMP monitor, for tests: start, ask, wait for events, kill."""

import json
import os
import signal
import socket
import subprocess
import time


class Talk:
    """A QMP conversation, with liveblkd or with QEMU."""

    def __init__(self, path):
        self.monitor = socket.socket(socket.AF_UNIX)
        self.monitor.settimeout(60)
        self.monitor.connect(path)
        # for reading alone: Python's file for both forgets what it has read ahead when something is written
        self.lines = self.monitor.makefile("r")
        self.events = []
        self.next()
        self.qmp("qmp_capabilities")

    def next(self):
        return json.loads(self.lines.readline())

    def ask(self, command, /, **arguments):
        """A command's whole answer."""
        text = {"execute": command, "arguments": {k.replace("_", "-"): a for k, a in arguments.items()}}
        self.monitor.sendall(json.dumps(text).encode() + b"\n")
        while True:
            got = self.next()
            if "event" not in got:
                return got
            self.events.append(got)

    def qmp(self, command, /, **arguments):
        got = self.ask(command, **arguments)
        assert "return" in got, got
        return got["return"]

    def event(self, name, **data):
        """Waits for an event with this data."""
        while True:
            for e in self.events:
                if e["event"] == name and all(e["data"].get(k) == d for k, d in data.items()):
                    self.events.remove(e)
                    return e
            got = self.next()
            assert "event" in got, got
            self.events.append(got)


class Daemon(Talk):
    """A running daemon; `options` are its command line without the monitor. Its files are in the directory `path`."""

    def __init__(self, binary, path, options):
        self.path = path
        qmp = os.path.join(path, "qmp")
        for name in (qmp, os.path.join(path, "pid")):
            if os.path.exists(name):
                os.remove(name)
        command = [
            binary, *options, "--chardev", f"socket,id=c,path={qmp},server=on,wait=off", "--monitor", "c",
            "--pidfile", os.path.join(path, "pid"),
        ]
        with open(os.path.join(path, "log"), "ab") as log:
            self.process = subprocess.Popen(command, stderr=log)
        # the pid file is written when everything is there
        until = time.monotonic() + 60
        while not os.path.exists(os.path.join(path, "pid")):
            assert self.process.poll() is None and time.monotonic() < until, self.said()
            time.sleep(0.005)
        super().__init__(qmp)

    def said(self):
        with open(os.path.join(self.path, "log"), "rb") as f:
            return f.read().decode(errors="replace")

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def quit(self):
        self.process.terminate()
        status = self.process.wait(60)
        assert status == 0, (status, self.said())
