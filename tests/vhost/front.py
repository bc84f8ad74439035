"""A vhost-user-blk front end and a guest's driver in one: speaks the protocol, keeps the guest's memory, fills the rings.

It does what a test asks, right or wrong: the plain calls keep to the specification (vhost-user, virtio 1.2 sections 2.7, 2.8
and 5.2), and everything below them (descriptors, indices, messages) can be set to nonsense.
"""

import array
import ctypes
import mmap
import os
import select
import socket
import struct
import threading

GET_FEATURES, SET_FEATURES, SET_OWNER, RESET_OWNER, SET_MEM_TABLE, SET_LOG_BASE = 1, 2, 3, 4, 5, 6
SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE, GET_VRING_BASE = 8, 9, 10, 11
SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR = 12, 13, 14
GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, GET_QUEUE_NUM, SET_VRING_ENABLE = 15, 16, 17, 18
SET_BACKEND_REQ_FD, GET_CONFIG, SET_CONFIG = 21, 24, 25
GET_INFLIGHT_FD, SET_INFLIGHT_FD, GET_MAX_MEM_SLOTS, ADD_MEM_REG, REM_MEM_REG = 31, 32, 36, 37, 38

F_LOG_ALL = 1 << 26
F_RO, F_EVENT_IDX, F_INDIRECT, F_PROTOCOL, F_VERSION_1 = 1 << 5, 1 << 29, 1 << 28, 1 << 30, 1 << 32
F_PACKED = 1 << 34
P_REPLY_ACK, P_BACKEND_REQ, P_INFLIGHT, P_MEM_SLOTS = 1 << 3, 1 << 5, 1 << 12, 1 << 15

NEXT, WRITE, INDIRECT = 1, 2, 4
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
# flags of a packed ring's descriptors, and what is said there of when to ring
AVAILABLE, USED = 1 << 7, 1 << 15
TELL, TELL_NOT, TELL_AT = 0, 1, 2

# whether rings are packed ones where a test does not say
PACKED = False

USER = 0x7000_0000_0000  # where the front end says that it has mapped the memory itself
GUEST = 0x10_0000  # where the guest has it


# taking a lock is a locked instruction: a store before it is seen before a load behind it, which the event index needs
FENCE = threading.Lock()


def eventfd():
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


def wait_for(fd, seconds):
    """Whether there is something to read within this time."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


class Memory:
    """The guest's memory: one region of a memfd, given out piece by piece."""

    def __init__(self, size):
        self.size = size
        self.fd = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        self.map = mmap.mmap(self.fd, size)
        self.used = 0

    def __del__(self):
        os.close(self.fd)

    def take(self, size, align=16):
        at = -(-self.used // align) * align
        assert at + size <= self.size, "the test's guest memory is too small"
        self.used = at + size
        return GUEST + at

    def read(self, at, size):
        return self.map[at - GUEST:at - GUEST + size]

    def write(self, at, data):
        self.map[at - GUEST:at - GUEST + len(data)] = data

    # numbers of the machine's own kind, which are read and written whole: with "<" Python goes byte by byte, and the other side
    # would see halves of an index
    def get(self, form, at):
        return struct.unpack_from("@" + form, self.map, at - GUEST)[0]

    def put(self, form, at, *values):
        if form == "H":
            # pack_into writes zeroes first, and the other side would now and then see an index of 0
            ctypes.c_uint16.from_buffer(self.map, at - GUEST).value = values[0] & 0xffff
        else:
            struct.pack_into("@" + form, self.map, at - GUEST, *values)


class Front:
    """The connection."""

    def __init__(self, path, memory=None, connect=True, packed=None):
        self.packed = PACKED if packed is None else packed
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        self.memory = memory or Memory(4 << 20)
        self.features = self.protocol = 0
        if connect:
            self.sock.connect(path)

    def send(self, request, body=b"", fds=(), flags=1):
        data = struct.pack("<III", request, flags, len(body)) + body
        beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sent = self.sock.sendmsg([data], beside)
        if sent < len(data):
            self.sock.sendall(data[sent:])

    def recv(self):
        """The next message: (request, flags, body, descriptors), or None at the end."""
        head, beside, _, _ = self.sock.recvmsg(12, socket.CMSG_SPACE(4 * 8))
        while 0 < len(head) < 12:
            head += self.sock.recv(12 - len(head))
        if not head:
            return None
        fds = array.array("i")
        for level, kind, data in beside:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(data)
        request, flags, size = struct.unpack("<III", head)
        body = b""
        while len(body) < size:
            body += self.sock.recv(size - len(body))
        return request, flags, body, list(fds)

    def ask(self, request, body=b"", fds=()):
        self.send(request, body, fds)
        got = self.recv()
        assert got and got[0] == request and got[1] & 4, got
        return got[2]

    def number(self, request):
        return struct.unpack("<Q", self.ask(request))[0]

    def tell(self, request, body=b"", fds=()):
        """A message without an answer; with REPLY_ACK it is asked for: 0 is well."""
        if not self.protocol & P_REPLY_ACK:
            self.send(request, body, fds)
            return 0
        self.send(request, body, fds, flags=9)
        got = self.recv()
        if got is None:
            return None
        assert got[0] == request, got
        return struct.unpack("<Q", got[2])[0]

    def ended(self):
        """Whether the other side has hung up; waits for that."""
        try:
            while True:
                if self.recv() is None:
                    return True
        except (ConnectionResetError, BrokenPipeError):
            return True

    def negotiate(self, without=0):
        offered = self.number(GET_FEATURES)
        # nobody wants to know what is written, until the guest is to move
        self.features = offered & ~without & ~F_LOG_ALL & ~(0 if self.packed else F_PACKED)
        self.protocol = self.number(GET_PROTOCOL_FEATURES)
        self.send(SET_PROTOCOL_FEATURES, struct.pack("<Q", self.protocol))
        assert self.tell(SET_FEATURES, struct.pack("<Q", self.features)) == 0
        assert self.tell(SET_OWNER) == 0
        return offered

    def share_memory(self):
        m = self.memory
        body = struct.pack("<IIQQQQ", 1, 0, GUEST, m.size, USER, 0)
        return self.tell(SET_MEM_TABLE, body, [m.fd])

    def log_writes(self, size):
        """Lets the other side mark what it writes; the log."""
        fd = os.memfd_create("log", os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        log = mmap.mmap(fd, size)
        self.ask(SET_LOG_BASE, struct.pack("<QQ", size, 0), [fd])
        os.close(fd)
        assert self.tell(SET_FEATURES, struct.pack("<Q", self.features | F_LOG_ALL)) == 0
        return log

    def config(self, offset=0, size=60):
        body = self.ask(GET_CONFIG, struct.pack("<III", offset, size, 0) + bytes(size))
        return body[12:]

    def inflight(self, queues, size):
        """A new log: (descriptor, length)."""
        self.send(GET_INFLIGHT_FD, struct.pack("<QQHHI", 0, 0, queues, size, 0))
        _, _, body, fds = self.recv()
        return fds[0], struct.unpack_from("<Q", body)[0]

    def use_inflight(self, fd, length, queues, size):
        return self.tell(SET_INFLIGHT_FD, struct.pack("<QQHHI", length, 0, queues, size, 0), [fd])

    def close(self):
        self.sock.close()


class Queue:
    """One virtqueue and its driver."""

    def __init__(self, front, index=0, size=16, ring=None):
        self.front, self.index, self.size, self.memory = front, index, size, front.memory
        m = self.memory
        if ring:
            self.desc, self.avail, self.used = ring
        else:
            self.desc = m.take(16 * size)
            self.avail = m.take(6 + 2 * size, 2)
            self.used = m.take(6 + 8 * size, 4)
        self.event_idx = bool(front.features & F_EVENT_IDX)
        self.kick_fd, self.call_fd, self.err_fd = eventfd(), eventfd(), eventfd()
        self.next = m.get("H", self.avail + 2)
        self.seen = m.get("H", self.used + 2)
        self.free = list(range(size))
        self.slots = {}

    def __del__(self):
        for fd in (self.kick_fd, self.call_fd, self.err_fd):
            os.close(fd)

    def start(self, base=0, enable=True):
        f, i = self.front, self.index
        user = lambda at: at - GUEST + USER
        results = [
            f.tell(SET_VRING_NUM, struct.pack("<II", i, self.size)),
            f.tell(SET_VRING_BASE, struct.pack("<II", i, base)),
            f.tell(SET_VRING_ADDR, struct.pack("<IIQQQQ", i, 0, user(self.desc), user(self.used), user(self.avail), 0)),
            f.tell(SET_VRING_ERR, struct.pack("<Q", i), [self.err_fd]),
            f.tell(SET_VRING_CALL, struct.pack("<Q", i), [self.call_fd]),
            f.tell(SET_VRING_KICK, struct.pack("<Q", i), [self.kick_fd]),
        ]
        if enable:
            results.append(f.tell(SET_VRING_ENABLE, struct.pack("<II", i, 1)))
        return results

    def log_used(self, on):
        """Turns the marking of the used ring on or off, while the queue runs."""
        user = lambda at: at - GUEST + USER
        body = struct.pack("<IIQQQQ", self.index, int(on), user(self.desc), user(self.used), user(self.avail), self.used)
        return self.front.tell(SET_VRING_ADDR, body)

    def stop(self):
        body = self.front.ask(GET_VRING_BASE, struct.pack("<II", self.index, 0))
        return struct.unpack("<II", body)[1]

    def describe(self, at, number, address, length, flags, following=0):
        self.memory.put("QIHH", at + 16 * number, address, length, flags, following)

    def expose(self, head, kick=True):
        """Puts a head into the available ring."""
        m = self.memory
        m.put("H", self.avail + 4 + 2 * (self.next % self.size), head)
        self.next = (self.next + 1) & 0xffff
        m.put("H", self.avail + 2, self.next)
        if kick:
            self.kick()

    def kick(self):
        os.eventfd_write(self.kick_fd, 1)

    def chain(self, buffers, head=None, indirect=False):
        """Writes descriptors for [(address, length, flags)]; the head."""
        if indirect:
            table = self.memory.take(16 * len(buffers))
            for n, (at, length, flags) in enumerate(buffers):
                more = NEXT if n + 1 < len(buffers) else 0
                self.describe(table, n, at, length, flags | more, n + 1)
            buffers = [(table, 16 * len(buffers), INDIRECT)]
        numbers = [self.free.pop() for _ in buffers]
        for n, (at, length, flags) in enumerate(buffers):
            last = n + 1 == len(buffers)
            self.describe(self.desc, numbers[n], at, length, flags | (0 if last else NEXT), 0 if last else numbers[n + 1])
        self.slots[numbers[0]] = numbers
        return numbers[0]

    def submit(self, kind, sector=0, out=b"", room=0, indirect=False, split=None, kick=True):
        """Puts a request into the ring: (head, address of the answer, address of the status)."""
        m = self.memory
        header, status = m.take(16), m.take(1)
        m.put("IIQ", header, kind, 0, sector)
        m.write(status, b"\xff")
        buffers = [(header, 16, 0)]
        data = m.take(max(len(out), room, 1), 512)
        m.write(data, out)
        size, flags = (len(out), 0) if out else (room, WRITE)
        step = split or size or 1
        buffers += [(data + n, min(step, size - n), flags) for n in range(0, size, step)]
        buffers.append((status, 1, WRITE))
        head = self.chain(buffers, indirect=indirect)
        self.expose(head, kick)
        return head, data, status

    def answers(self):
        """Heads answered since the last look: [(head, written)]."""
        m, found = self.memory, []
        while True:
            if self.seen == m.get("H", self.used + 2):
                event = self.avail + 4 + 2 * self.size
                if not self.event_idx or m.get("H", event) == self.seen:
                    return found
                # and once more: what came before this was seen is not called for
                m.put("H", event, self.seen)
                with FENCE:
                    continue
            at = self.used + 4 + 8 * (self.seen % self.size)
            head, written = m.get("I", at), m.get("I", at + 4)
            found.append((head, written))
            self.free += self.slots.pop(head, [])
            self.seen = (self.seen + 1) & 0xffff

    def wait(self, count=1, seconds=30):
        """Waits for so many answers."""
        found = self.answers()
        while len(found) < count:
            ready = wait_for(self.call_fd, seconds)
            if ready:
                # first: a call for an answer that is not seen now must stay
                os.eventfd_read(self.call_fd)
            more = self.answers()
            assert ready, f"no call within {seconds} s: {found} {more}"
            found += more
        return found

    def failed(self, seconds=30):
        """Waits until the other side says that the queue has stopped."""
        return wait_for(self.err_fd, seconds)

    def run(self, kind, sector=0, **more):
        """A request and its status: (status, data)."""
        mark = self.memory.used
        head, data, status = self.submit(kind, sector, **more)
        [(got, written)] = self.wait()
        assert got == head, (got, head)
        room = more.get("room", 0)
        answer = self.memory.read(status, 1)[0], self.memory.read(data, room)
        if answer[0] == OK:
            assert written == room + 1, (written, room)
        self.memory.used = mark
        return answer

    def read(self, sector, size, **more):
        status, data = self.run(IN, sector, room=size, **more)
        return data if status == OK else status

    def write(self, sector, data, **more):
        return self.run(OUT, sector, out=data, **more)[0]


class PackedQueue(Queue):
    """One packed virtqueue and its driver: `desc` is the ring, `avail` says when the driver is to be told, `used` when the device is."""

    def __init__(self, front, index=0, size=16, ring=None):
        if not ring:
            m = front.memory
            ring = m.take(16 * size), m.take(4, 4), m.take(4, 4)
        super().__init__(front, index, size, ring)
        self.free = list(range(size))
        # next to fill, next to be answered; lap of each
        self.fill, self.fill_lap, self.look, self.look_lap = 0, 1, 0, 1
        self.room, self.next, self.pending = size, 0, None
        self.memory.put("H", self.avail + 2, TELL_AT if self.event_idx else TELL)
        self.memory.put("H", self.avail, self.look | self.look_lap << 15)

    def bits(self):
        return self.fill | self.fill_lap << 15, self.look | self.look_lap << 15

    def start(self, base=None, enable=True):
        fill, look = self.bits()
        return super().start(fill | look << 16 if base is None else base, enable)

    def stop(self):
        """How many requests were made; the other side is where we are."""
        base = super().stop()
        assert base == self.bits()[0] | self.bits()[1] << 16 or self.answered < self.next, (base, self.bits())
        return self.next

    answered = 0

    def lay(self, buffers, ident, lap_of=None):
        """Descriptors of a chain in the ring, the first one available last: [(address, length, flags)]."""
        m, first = self.memory, None
        for n, (at, length, flags) in enumerate(buffers):
            if n + 1 < len(buffers):
                flags |= NEXT
            flags |= AVAILABLE if self.fill_lap else USED
            place = self.desc + 16 * self.fill
            m.put("QIH", place, at, length & 0xffffffff, ident)
            if first is None:
                first = place, flags
            else:
                m.put("H", place + 14, flags)
            self.fill += 1
            if self.fill == self.size:
                self.fill, self.fill_lap = 0, 1 - self.fill_lap
        return first

    def chain(self, buffers, head=None, indirect=False):
        if indirect:
            table = self.memory.take(16 * len(buffers))
            for n, (at, length, flags) in enumerate(buffers):
                self.describe(table, n, at, length, 0, flags)
            buffers = [(table, 16 * len(buffers), INDIRECT)]
        assert len(buffers) <= self.room, "the test's ring is too short"
        ident = self.free.pop()
        self.room -= len(buffers)
        self.slots[ident] = len(buffers)
        self.pending = self.lay(buffers, ident)
        return ident

    def expose(self, head, kick=True):
        place, flags = self.pending
        with FENCE:
            self.memory.put("H", place + 14, flags)
        self.next += 1
        if kick:
            self.kick()

    def answers(self):
        m, found = self.memory, []
        while True:
            place = self.desc + 16 * self.look
            flags = m.get("H", place + 14)
            if bool(flags & AVAILABLE) != self.look_lap or bool(flags & USED) != self.look_lap:
                event = self.look | self.look_lap << 15
                if not self.event_idx or m.get("H", self.avail) == event:
                    return found
                # and once more: what came before this was seen is not called for
                m.put("H", self.avail, event)
                with FENCE:
                    continue
            ident, written = m.get("H", place + 12), m.get("I", place + 8)
            found.append((ident, written))
            count = self.slots.pop(ident)
            self.free.append(ident)
            self.room += count
            self.answered += 1
            self.look += count
            if self.look >= self.size:
                self.look, self.look_lap = self.look - self.size, 1 - self.look_lap


def connect(path, queues=1, size=16, memory=None, without=0, packed=None):
    """A front end that is ready, and its queues."""
    front = Front(path, memory, packed=packed)
    front.negotiate(without)
    assert front.share_memory() == 0
    made = [(PackedQueue if front.packed else Queue)(front, i, size) for i in range(queues)]
    for q in made:
        results = q.start()
        assert results == [0] * len(results), results
    return front, made
