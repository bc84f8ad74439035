"""A small NBD client that keeps many requests in flight, and a QMP client. Both give up on a peer that hangs."""

import json
import socket
import struct
import time

READ, WRITE, FLUSH, TRIM, ZERO = 0, 1, 3, 4, 6
NO_HOLE = 1 << 1
# A request that takes longer hangs.
PATIENCE = 20.0


class Hung(Exception):
    """No answer came in time."""


def connect(path, patience=PATIENCE):
    begin = time.monotonic()
    while True:
        s = socket.socket(socket.AF_UNIX)
        s.settimeout(patience)
        try:
            s.connect(path)
            return s
        except (FileNotFoundError, ConnectionRefusedError):
            s.close()
            if time.monotonic() - begin > patience:
                raise Hung(f"nobody listens at {path}")
            time.sleep(0.005)


class Nbd:
    """One connection to an export. Requests are sent by `send` and answered by `collect`, in any order."""

    def __init__(self, path, export, patience=PATIENCE):
        self.s = connect(path, patience)
        self.held = b""
        self.lengths, self.next = {}, 0
        self.get(18)
        name = export.encode()
        self.s.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, len(name)) + name)
        self.size = struct.unpack(">Q", self.get(10)[:8])[0]

    def get(self, n):
        while len(self.held) < n:
            try:
                part = self.s.recv(max(n - len(self.held), 1 << 16))
            except socket.timeout:
                raise Hung("a request is not answered")
            if not part:
                raise ConnectionError("the server went away")
            self.held += part
        out, self.held = self.held[:n], self.held[n:]
        return out

    def send(self, kind, offset=0, length=0, data=b"", flags=0):
        self.next += 1
        self.lengths[self.next] = length if kind == READ else 0
        self.s.sendall(struct.pack(">IHHQQI", 0x25609513, flags, kind, self.next, offset, length) + data)
        return self.next

    def collect(self):
        """Answers of all requests in flight: {handle: (error, data)}."""
        out = {}
        while self.lengths:
            magic, error, handle = struct.unpack(">IIQ", self.get(16))
            assert magic == 0x67446698, "no answer of NBD"
            length = self.lengths.pop(handle)
            out[handle] = (error, self.get(length) if not error else b"")
        return out

    def do(self, kind, offset=0, length=0, data=b"", flags=0):
        """One request; its data, or OSError."""
        handle = self.send(kind, offset, length, data, flags)
        error, got = self.collect()[handle]
        if error:
            raise OSError(error, f"request {kind} at {offset} failed")
        return got

    def read(self, offset, length):
        return b"".join(self.do(READ, at, min(1 << 20, offset + length - at)) for at in range(offset, offset + length, 1 << 20))

    def close(self):
        self.s.close()


class Refused(Exception):
    """A command failed."""


class Qmp:
    def __init__(self, path):
        self.s = connect(path)
        self.buffer, self.events, self.waiting = b"", [], 0
        self.line()
        self.do("qmp_capabilities")

    def line(self):
        while b"\n" not in self.buffer:
            try:
                part = self.s.recv(1 << 16)
            except socket.timeout:
                raise Hung("a command is not answered")
            if not part:
                raise ConnectionError("the daemon went away")
            self.buffer += part
        line, self.buffer = self.buffer.split(b"\n", 1)
        return json.loads(line)

    def begin(self, command, arguments=None):
        text = {"execute": command}
        if arguments:
            text["arguments"] = arguments
        self.s.sendall(json.dumps(text).encode() + b"\n")

    def end(self):
        while True:
            m = self.line()
            if "event" in m:
                self.events.append(m)
            elif "error" in m:
                raise Refused(m["error"]["desc"])
            elif "return" in m:
                return m["return"]

    def do(self, command, **arguments):
        self.begin(command, {k.replace("_", "-"): v for k, v in arguments.items()})
        return self.end()
