#!/usr/bin/env python3
"""A disk as a file: what programs see of liveblkd's FUSE export, and what becomes of it when things go wrong.

    check.py --daemon PATH [NAME...]

Each function below whose name begins with `test_` is a test; it gets an empty directory. The kernel's FUSE is needed, and
that we may mount (root, or fusermount3).
"""

import ctypes
import errno
import os
import random
import stat
import subprocess
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "vhost"))
import cases
import qmp

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "compat"))
from bitmaps import Nbd

SIZE = 16 << 20
NOBODY = 65534
BINARY = None
LIBC = ctypes.CDLL(None, use_errno=True)
KEEP_SIZE, PUNCH_HOLE, COLLAPSE, ZERO_RANGE = 1, 2, 8, 16


def mounts():
    with open("/proc/self/mounts") as f:
        return [line.split() for line in f]


class Daemon(qmp.Daemon):
    """A running daemon with a disk `n`, exported as `e` over the file `file`."""

    def __init__(self, path, export="writable=on", node="driver=raw,file=f,node-name=n,discard=unmap", extra=(), size=SIZE):
        self.disk, self.file = os.path.join(path, "disk"), os.path.join(path, "file")
        if not os.path.exists(self.disk):
            with open(self.disk, "wb") as f:
                f.truncate(size)
        if os.path.basename(self.file) not in os.listdir(path):
            open(self.file, "w").close()
        options = [*extra, "--blockdev", f"driver=file,filename={self.disk},node-name=f,discard=unmap", "--blockdev", node]
        if export is not None:
            options += ["--export", f"type=fuse,id=e,node-name=n,mountpoint={self.file},{export}"]
        super().__init__(BINARY, path, options)

    def add(self, id="e", **more):
        return self.ask("block-export-add", type="fuse", id=id, node_name="n", mountpoint=self.file, **more)

    def delete(self, id="e", **more):
        self.qmp("block-export-del", id=id, **more)
        self.event("BLOCK_EXPORT_DELETED", id=id)


def refused(answer):
    return answer["error"]["desc"]


def fails(number, do):
    numbers = number if isinstance(number, tuple) else (number,)
    wanted = " or ".join(errno.errorcode[n] for n in numbers)
    try:
        do()
    except OSError as e:
        assert e.errno in numbers, f"{e} instead of {wanted}"
    else:
        raise AssertionError(f"no error instead of {wanted}")


# what a program meets whose file's connection has ended
ENDED = errno.ENOTCONN, errno.ECONNABORTED


def fallocate(f, mode, offset, length):
    if LIBC.fallocate(f, mode, ctypes.c_int64(offset), ctypes.c_int64(length)):
        e = ctypes.get_errno()
        raise OSError(e, os.strerror(e))


def run(*command):
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == 0, f"{command}: {out.stdout} {out.stderr}"
    return out.stdout


def content(path):
    with open(path, "rb") as f:
        return f.read()


def test_like_a_file(path):
    """Random reads, writes, punches and zeroes at any byte, beside the same done to bytes in memory."""
    seed = int(os.environ.get("LIVEBLK_SEED", random.randrange(1 << 32)))
    print(f"seed {seed}")
    r = random.Random(seed)
    d = Daemon(path, node="driver=qcow2,file=f,node-name=n,discard=unmap", extra=qcow2(path))
    model = bytearray(SIZE)
    f = os.open(d.file, os.O_RDWR)
    for n in range(600):
        length = r.choice([1, 3, 512, 4096, 65536, r.randrange(1, 1 << 18)])
        at = r.randrange(0, SIZE - length + 1)
        if r.random() < 0.5:
            at &= ~511
        kind = r.randrange(8)
        if kind < 3:
            data = r.randbytes(length)
            assert os.pwrite(f, data, at) == length
            model[at:at + length] = data
        elif kind < 5:
            mode = r.choice([PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE])
            fallocate(f, mode, at, length)
            model[at:at + length] = bytes(length)
        elif kind == 5 and n % 10 == 0:
            os.fsync(f)
        else:
            assert os.pread(f, length, at) == model[at:at + length], (n, at, length)
    os.close(f)
    assert content(d.file) == model
    # programs that look for holes copy the same bytes
    run("cp", "--sparse=always", d.file, f"{path}/copy")
    assert content(f"{path}/copy") == model
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", d.file, f"{path}/copy")
    d.quit()
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", f"{path}/copy", d.disk)
    run("qemu-img", "check", d.disk)


def qcow2(path):
    run("qemu-img", "create", "-q", "-f", "qcow2", f"{path}/disk", str(SIZE))
    return ()


def test_holes(path):
    d = Daemon(path, size=8 << 20)
    f = os.open(d.file, os.O_RDWR)
    fails(errno.ENXIO, lambda: os.lseek(f, 0, os.SEEK_DATA))
    assert os.lseek(f, 5, os.SEEK_HOLE) == 5
    os.pwrite(f, b"x" * (1 << 20), 2 << 20)
    assert os.lseek(f, 0, os.SEEK_DATA) == 2 << 20 and os.lseek(f, 2 << 20, os.SEEK_HOLE) == 3 << 20
    assert os.lseek(f, (2 << 20) + 7, os.SEEK_DATA) == (2 << 20) + 7
    fails(errno.ENXIO, lambda: os.lseek(f, 3 << 20, os.SEEK_DATA))
    fails(errno.ENXIO, lambda: os.lseek(f, 8 << 20, os.SEEK_HOLE))
    assert os.lseek(f, 0, os.SEEK_END) == 8 << 20
    os.pwrite(f, b"y", (8 << 20) - 1)
    assert os.lseek(f, (8 << 20) - 1, os.SEEK_HOLE) == 8 << 20
    used = os.fstat(f).st_blocks
    assert used == os.stat(d.disk).st_blocks, "the space that the image takes"
    fallocate(f, PUNCH_HOLE | KEEP_SIZE, 2 << 20, 1 << 20)
    assert os.fstat(f).st_blocks <= used - 2000, "punching gave nothing back"
    # past the end is no matter for a hole; the other modes are not there
    fallocate(f, PUNCH_HOLE | KEEP_SIZE, (8 << 20) - 4096, 1 << 20)
    assert os.pread(f, 4096, (8 << 20) - 4096) == bytes(4096)
    for mode in (0, KEEP_SIZE, COLLAPSE):
        fails(errno.EOPNOTSUPP, lambda: fallocate(f, mode, 0, 4096))
    d.quit()


def test_sizes(path):
    """What is written past the end, with a disk that may grow and one that may not; and others who resize it."""
    d = Daemon(path, size=1 << 20)
    f = os.open(d.file, os.O_RDWR)
    assert os.fstat(f).st_size == 1 << 20
    fails(errno.ENOSPC, lambda: os.pwrite(f, b"x", 1 << 20))
    assert os.pwrite(f, b"x" * 1024, (1 << 20) - 512) == 512 and os.fstat(f).st_size == 1 << 20
    fails(errno.ENOSPC, lambda: fallocate(f, ZERO_RANGE, (1 << 20) - 512, 1024))
    assert os.pread(f, 1024, (1 << 20) - 512) == b"x" * 512 and os.pread(f, 1, 1 << 30) == b""
    # opening does not cut a disk to nothing
    os.close(os.open(d.file, os.O_RDWR | os.O_TRUNC))
    assert os.fstat(f).st_size == 1 << 20 and os.pread(f, 1, (1 << 20) - 1) == b"x"
    # whoever asks for it gets it, rounded up to sectors, as with QSD
    os.ftruncate(f, (2 << 20) - 100)
    assert os.fstat(f).st_size == 2 << 20 == os.stat(d.disk).st_size
    d.qmp("block_resize", node_name="n", size=3 << 20)
    assert os.fstat(f).st_size == 3 << 20 and os.pwrite(f, b"z", (3 << 20) - 1) == 1
    os.close(f)
    d.delete()
    assert "return" in d.add(writable=True, growable=True)
    data = os.urandom(5 << 20)
    with open(f"{path}/source", "wb") as s:
        s.write(data)
    run("cp", f"{path}/source", d.file)
    assert content(d.file) == data and os.stat(d.disk).st_size == 5 << 20
    f = os.open(d.file, os.O_RDWR)
    fallocate(f, ZERO_RANGE | KEEP_SIZE, 6 << 20, 4096)
    assert os.fstat(f).st_size == 5 << 20
    fallocate(f, ZERO_RANGE, 6 << 20, 4096)
    assert os.fstat(f).st_size == (6 << 20) + 4096
    # several at the end at a time
    threads = [threading.Thread(target=os.pwrite, args=(f, bytes([n]) * 65536, (7 << 20) + n * 65536)) for n in range(16)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert os.fstat(f).st_size == 8 << 20
    assert os.pread(f, 1 << 20, 7 << 20) == b"".join(bytes([n]) * 65536 for n in range(16))
    fails(errno.EFBIG, lambda: os.pwrite(f, b"x", (1 << 63) - 2))
    os.close(f)
    # who counts on the length is not let in beside one that changes it
    d.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": f"{path}/nbd"}})
    assert "resize" in refused(d.ask("block-export-add", type="nbd", id="b", node_name="n"))
    d.delete()
    assert "return" in d.add(writable=True)
    d.qmp("block-export-add", type="nbd", id="b", node_name="n")
    fails(errno.EPERM, lambda: os.truncate(d.file, 1 << 20))
    assert os.stat(d.file).st_size == 8 << 20
    d.quit()


def test_read_only(path):
    d = Daemon(path, export="writable=off")
    assert stat.S_IMODE(os.stat(d.file).st_mode) == 0o400
    fails(errno.EROFS, lambda: os.open(d.file, os.O_RDWR))
    fails(errno.EROFS, lambda: os.truncate(d.file, 5))
    fails(errno.EROFS, lambda: os.chmod(d.file, 0o600))
    os.chmod(d.file, 0o444)
    f = os.open(d.file, os.O_RDONLY)
    assert os.pread(f, 4096, 0) == bytes(4096)
    os.fsync(f)
    os.close(f)
    assert content(d.file) == bytes(SIZE)
    d.quit()


def test_attributes(path):
    d = Daemon(path)
    s = os.stat(d.file)
    assert stat.S_ISREG(s.st_mode) and (s.st_ino, s.st_nlink, s.st_uid, s.st_gid) == (1, 1, os.getuid(), os.getgid())
    os.chmod(d.file, 0o640)
    os.chown(d.file, 12, 34)
    os.utime(d.file, ns=(1_000_000_007, 2_000_000_009))
    s = os.stat(d.file)
    assert (stat.S_IMODE(s.st_mode), s.st_uid, s.st_gid, s.st_atime_ns, s.st_mtime_ns) == (0o640, 12, 34, 1_000_000_007, 2_000_000_009)
    run("touch", d.file)
    assert abs(os.stat(d.file).st_mtime - time.time()) < 3600
    v = os.statvfs(d.file)
    assert v.f_blocks * v.f_frsize == SIZE and v.f_bavail == 0
    fails(errno.EBUSY, lambda: os.remove(d.file))
    # mapped, in both ways
    import mmap
    f = os.open(d.file, os.O_RDWR)
    os.pwrite(f, b"hello", 0)
    with mmap.mmap(f, 4096, flags=mmap.MAP_PRIVATE) as m:
        assert m[:5] == b"hello"
    d.quit()


def test_users(path):
    """Others than the daemon's user get at the file only if that was asked for, and its permissions let them."""
    os.chmod(path, 0o755)
    as_nobody = lambda: subprocess.run(["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "head", "-c", "5", d.file], capture_output=True)
    d = Daemon(path)
    assert as_nobody().returncode != 0
    options = lambda: next(m[3] for m in mounts() if m[1] == os.path.realpath(d.file))
    assert "allow_other" not in options() and "default_permissions" in options()
    assert options().startswith("rw,nosuid,nodev")
    for word in ("on", "auto"):
        d.delete()
        assert "return" in d.add(writable=True, allow_other=word)
        assert "allow_other" in options()
        os.chmod(d.file, 0o600)
        assert as_nobody().returncode != 0
        os.chmod(d.file, 0o604)
        assert as_nobody().stdout == bytes(5)
    d.quit()


def test_come_and_go(path):
    d = Daemon(path, export=None)
    assert refused(d.ask("block-export-add", type="fuse", id="e", node_name="n", mountpoint=f"{path}/none")) == \
        f"Failed to stat '{path}/none': No such file or directory"
    os.mkdir(f"{path}/dir")
    assert refused(d.ask("block-export-add", type="fuse", id="e", node_name="n", mountpoint=f"{path}/dir")) == \
        f"'{path}/dir' is not a regular file"
    assert refused(d.ask("block-export-add", type="fuse", id="e", node_name="n")) == "Parameter 'mountpoint' is missing"
    assert "inactive" in refused(d.add(allow_inactive=True))
    assert "return" in d.add()
    assert refused(d.add("e2")) == f"There already is a FUSE export on '{d.file}'"
    assert refused(d.add("e")) == "Block export id 'e' is already in use"
    assert d.qmp("query-block-exports") == [{"id": "e", "type": "fuse", "node-name": "n", "shutting-down": False}]
    # deleted while it is open: who has it open meets the end, and the node is free
    f = os.open(d.file, os.O_RDONLY)
    assert os.pread(f, 1, 0) == b"\0"
    d.delete()
    fails(ENDED, lambda: os.pread(f, 1, 0))
    fails(ENDED, lambda: os.close(f))
    assert os.stat(d.file).st_size == 0 and not any(m[1] == d.file for m in mounts())
    # unmounted by somebody else: the export ends
    assert "return" in d.add(writable=True)
    run("umount", d.file)
    d.event("BLOCK_EXPORT_DELETED", id="e")
    assert d.qmp("query-block-exports") == []
    assert "return" in d.add(writable=True)
    d.delete()
    d.qmp("blockdev-del", node_name="n")
    d.quit()
    # the end of the daemon is the end of the mount
    d = Daemon(path)
    d.quit()
    assert not any(m[1] == d.file for m in mounts())


def test_after_a_kill(path):
    """A daemon that died leaves its mount; the next one takes its place, also by itself from its state directory."""
    d = Daemon(path)
    with open(d.file, "r+b", buffering=0) as f:
        f.write(b"before")
        os.fsync(f.fileno())
    d.kill()
    fails(ENDED, lambda: os.stat(d.file))
    state = ("--state-dir", f"{path}/state")
    d = Daemon(path, extra=state)
    assert content(d.file)[:6] == b"before"
    d.kill()
    d = Daemon(path, extra=state)
    assert content(d.file)[:6] == b"before" and d.qmp("query-block-exports")[0]["id"] == "e"
    assert sum(m[1] == d.file for m in mounts()) == 1, "the dead mount is still below"
    d.quit()


def test_jobs_and_load(path):
    """fio writes and verifies while the disk is mirrored and the mirror takes its place."""
    d = Daemon(path)
    with open(f"{path}/target", "wb") as f:
        f.truncate(SIZE)
    fio = subprocess.Popen(
        ["fio", "--name=v", f"--filename={d.file}", f"--size={SIZE}", "--rw=randwrite", "--bsrange=512-64k", "--bs_unaligned=0",
         "--ioengine=libaio", "--iodepth=16", "--verify=crc32c", "--verify_fatal=1", "--loops=4", "--direct=1", "--minimal"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=path)
    d.qmp("blockdev-add", driver="raw", node_name="t", file={"driver": "file", "filename": f"{path}/target"})
    d.qmp("blockdev-mirror", job_id="m", device="n", target="t", sync="full", copy_mode="write-blocking")
    d.event("BLOCK_JOB_READY", device="m")
    d.qmp("job-complete", id="m")
    d.event("BLOCK_JOB_COMPLETED", device="m")
    out, _ = fio.communicate(timeout=120)
    assert fio.returncode == 0, out
    assert d.qmp("query-block-exports")[0]["node-name"] == "t"
    seen = content(d.file)
    d.quit()
    assert content(f"{path}/target") == seen


def test_requests_that_hang(path):
    """The export is deleted while requests wait for their turn: the deletion hurries them, and none is lost."""
    limits = "throttle-group,id=g,x-iops-write=1,x-iops-write-max=1"
    d = Daemon(path, node="driver=throttle,throttle-group=g,file=f,node-name=n", extra=("--object", limits))
    f = os.open(d.file, os.O_RDWR)
    began = threading.Semaphore(0)

    def write(n):
        began.release()
        try:
            os.pwrite(f, bytes([n + 1]) * 4096, n * 4096)
        except OSError:
            pass  # the mount went first

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    [t.start() for t in threads]
    [began.acquire() for _ in threads]
    d.delete()
    [t.join() for t in threads]
    fails(ENDED, lambda: os.close(f))
    seen = content(d.disk)
    assert all(set(seen[n * 4096:(n + 1) * 4096]) in ({n + 1}, {0}) for n in range(4)), "half a request"
    d.qmp("blockdev-del", node_name="n")
    d.quit()


def test_a_flush_that_failed(path, beside=None):
    """A host that fails a flush once has perhaps dropped what it was to write, and says nothing at the next one: a daemon whose disk
    is a file there says so for ever, as QSD does (`beside`)."""
    errors = ",".join(f"inject-error.0.{o}" for o in ("event=none", "iotype=flush", "errno=5", "once=on"))
    host = Daemon(path, node=f"driver=blkdebug,image=f,node-name=n,{errors}")
    where = os.path.join(path, "user")
    os.mkdir(where)
    user = qmp.Daemon(beside or BINARY, where, [
        "--blockdev", f"driver=file,filename={host.file},node-name=d,locking=off", "--nbd-server", f"addr.type=unix,addr.path={where}/nbd",
        "--export", "type=nbd,id=e,node-name=d,name=e,writable=on"])
    client = Nbd(f"{where}/nbd", "e")
    client.ask(1, 0, 65536, b"1" * 65536)
    for _ in range(2):
        try:
            client.ask(3, 0, 0)
        except AssertionError as e:
            assert f"error {errno.EIO}" in str(e), e
        else:
            raise AssertionError("a flush succeeds after one that failed")
    client.close()
    user.quit()
    # what failed was the user's flush: this one is the first of its kind
    with open(host.file, "r+b") as f:
        os.fsync(f.fileno())
    host.delete()
    host.quit()


def test_without_root(path):
    """A user who may not mount uses fusermount3."""
    os.chmod(path, 0o777)
    global BINARY
    real, wrapper = BINARY, f"{path}/as-nobody"
    run("cp", real, f"{path}/liveblkd")
    with open(wrapper, "w") as f:
        f.write(f'#!/bin/sh\nexec setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups {path}/liveblkd "$@"\n')
    os.chmod(wrapper, 0o755)
    for name in ("disk", "file"):
        with open(f"{path}/{name}", "wb") as f:
            f.truncate(SIZE if name == "disk" else 0)
        os.chown(f"{path}/{name}", NOBODY, NOBODY)
    BINARY = wrapper
    try:
        d = Daemon(path)
    finally:
        BINARY = real
    out = subprocess.run(["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "stat", "-c", "%s %u", d.file], capture_output=True, text=True)
    assert out.stdout == f"{SIZE} {NOBODY}\n", out
    d.delete()
    deadline = time.monotonic() + 30
    # its helper is a process of its own
    while any(m[1] == d.file for m in mounts()):
        assert time.monotonic() < deadline, "still mounted"
        time.sleep(0.01)
    d.quit()


def clean(path):
    """Takes away what a failed test has left mounted."""
    for m in mounts():
        if m[1].startswith(path + "/"):
            LIBC.umount2(m[1].encode(), 2)


def main():
    global BINARY
    BINARY, names = cases.arguments()
    if not os.path.exists("/dev/fuse"):
        sys.exit("this machine has no /dev/fuse: the FUSE export cannot be tested here (modprobe fuse)")
    if os.getuid() != 0:
        sys.exit("these tests mount as root and change users: run them as root")
    cases.run(globals(), names, "fuse-", clean)


main()
