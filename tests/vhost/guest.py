#!/usr/bin/env python3
"""A real Linux guest under qemu-system-x86_64 that boots from a vhost-user-blk disk of liveblkd and verifies what it writes,
while the disk is mirrored, pivoted, snapshotted and committed, and while the daemon is killed and started again; or, with --move,
while the guest moves to another machine monitor, which finds the disk behind another export, and back.

    guest.py --daemon PATH [--rounds N] [--move] [--packed] [--keep]

The kernel and its modules are Debian's (linux-image-cloud-amd64), the programs busybox and fio, in an ext4 file system on a
qcow2 image. `cargo xtask setup` installs them. The guest is emulated; LIVEBLK_GUEST_KVM=1 has it
run on /dev/kvm.
"""

import argparse
import glob
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import qmp

# reads per second while the guest moves
READS = 150

MODULES = ["virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci", "virtio_blk"]

# the first program of the guest: finds the disk and goes on from there
EARLY = """#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
for m in {modules}; do /bin/busybox insmod /lib/$m.ko; done
while ! /bin/busybox [ -b /dev/vda ]; do /bin/busybox sleep 0.1; done
/bin/busybox mount -t ext4 -o rw,discard /dev/vda /root || echo GUEST: no root
exec /bin/busybox switch_root /root /init
"""

# the guest's life: rounds of random writes with checksums, direct and through the cache, each read back, until it is told to stop
LIFE = """#!/bin/busybox sh
export PATH=/bin
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
busybox mount -t devtmpfs dev /dev
echo 0 > /proc/sys/kernel/printk
echo "GUEST: up $(cat /sys/block/vda/size) $(cat /sys/block/vda/queue/write_cache) queues $(ls /sys/block/vda/mq | busybox wc -l)"
# reads without end, many at a time, into memory that nobody else writes to: what the disk writes there after the guest's processors
# stopped, and does not come along when the guest moves, is found
reader() {{
  while busybox [ ! -f /dev/over ]; do
    fio --name=reader --filename=/steady --size=4M --rw=randread --bs=4k --ioengine=libaio --iodepth=32 --iodepth_batch=32 --iodepth_batch_complete_min=32 --direct=1 --loops=50 \\
        --verify=crc32c --verify_fatal=1 --output=/dev/shm.reader --minimal \\
        || busybox [ -f /dev/over ] || {{ echo "GUEST: FAILED reader"; cat /dev/shm.reader; break; }}
  done
}}
fio --name=steady --filename=/steady --size=4M --rw=write --bs=4k --verify=crc32c --do_verify=0 --end_fsync=1 --output=/dev/shm.log --minimal
i=0
while :; do
  i=$((i+1))
  fio --name=direct --filename=/direct --size=8M --rw=randrw --bsrange=4k-128k --ioengine=libaio --iodepth=16 --direct=1 \\
      --verify=crc32c --verify_fatal=1 --do_verify=1 --randseed=$i --output=/dev/shm.log --minimal || {{ echo "GUEST: FAILED direct $i"; cat /dev/shm.log; }}
  fio --name=cached --filename=/cached --size=4M --rw=randwrite --bs=8k --ioengine=psync --end_fsync=1 \\
      --verify=crc32c --verify_fatal=1 --do_verify=1 --randseed=$i --output=/dev/shm.log --minimal || {{ echo "GUEST: FAILED cached $i"; cat /dev/shm.log; }}
  busybox rm -f /gone && busybox dd if=/dev/zero of=/gone bs=1M count=4 2>/dev/null && busybox rm /gone
  busybox fstrim / 2>/dev/null
  echo "GUEST: round $i"
  said=
  read -t 1 said
  case "$said" in
    stop) break;;
    read) reader & echo "GUEST: reads";;
  esac
done
echo over > /dev/over
while busybox [ -n "$(busybox pidof fio)" ]; do busybox killall -9 fio 2>/dev/null; busybox sleep 0.1; done
wait
busybox cat /proc/uptime > /end
busybox sync
busybox mount -o remount,ro /
echo "GUEST: done $(busybox dmesg | busybox grep -c -E 'I/O error|EXT4-fs error|Buffer I/O')"
busybox poweroff -f
"""


def run(*command, **more):
    got = subprocess.run(command, capture_output=True, text=True, **more)
    assert got.returncode == 0, (command, got.stdout, got.stderr)
    return got.stdout


def executable(path, text):
    with open(path, "w") as f:
        f.write(text)
    os.chmod(path, 0o755)


def kernel():
    found = sorted(glob.glob("/boot/vmlinuz-*cloud*")) or sorted(glob.glob("/boot/vmlinuz-*"))
    assert found, "no kernel in /boot: cargo xtask setup"
    version = os.path.basename(found[-1]).split("-", 1)[1]
    return found[-1], f"/lib/modules/{version}"


def copy_program(root, name):
    """A program with the libraries that it loads."""
    path = shutil.which(name)
    assert path, f"{name} is missing: cargo xtask setup"
    shutil.copy(path, f"{root}/bin/{name}")
    # a static program has none, and ldd calls that an error
    for line in subprocess.run(["ldd", path], capture_output=True, text=True).stdout.splitlines():
        for word in line.split():
            if word.startswith("/"):
                os.makedirs(root + os.path.dirname(word), exist_ok=True)
                shutil.copy(word, root + word)


def prepare(path):
    """initrd and disk.qcow2."""
    _, modules = kernel()
    early = f"{path}/early"
    for d in ("bin", "lib", "proc", "dev", "root"):
        os.makedirs(f"{early}/{d}")
    shutil.copy(shutil.which("busybox"), f"{early}/bin/busybox")
    there = {}
    for m in MODULES:
        found = glob.glob(f"{modules}/**/{m}.ko*", recursive=True)
        if found:  # or else it is built in
            assert found[0].endswith(".ko"), f"{found[0]} is compressed"
            shutil.copy(found[0], f"{early}/lib/{m}.ko")
            there[m] = True
    executable(f"{early}/init", EARLY.format(modules=" ".join(there)))
    run("sh", "-c", f"cd {early} && find . | cpio -o -H newc --quiet > {path}/initrd")
    root = f"{path}/root"
    for d in ("bin", "proc", "sys", "dev", "lib64"):
        os.makedirs(f"{root}/{d}")
    for program in ("busybox", "fio"):
        copy_program(root, program)
    for link in ("sh", "cat", "ls", "echo"):
        os.symlink("busybox", f"{root}/bin/{link}")
    executable(f"{root}/init", LIFE.format())
    with open(f"{path}/raw", "wb") as f:
        f.truncate(192 << 20)
    run("mke2fs", "-q", "-t", "ext4", "-d", root, f"{path}/raw")
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", f"{path}/raw", f"{path}/disk.qcow2")
    os.remove(f"{path}/raw")


class Guest:
    def __init__(self, path, socket, options="", number=0, incoming=()):
        self.options, self.number = options, number
        self.monitor = f"{path}/guest{number}.qmp"
        vmlinuz, _ = kernel()
        # emulated unless asked for: /dev/kvm may be there and the kernel hang in it (nested virtualisation of some clouds)
        kvm = os.environ.get("LIVEBLK_GUEST_KVM") == "1"
        fast = ["-accel", "kvm", "-cpu", "host,-arch-capabilities"] if kvm else ["-accel", "tcg", "-cpu", "max"]
        self.process = subprocess.Popen(
            ["qemu-system-x86_64", "-machine", "q35,memory-backend=m", *fast, "-m", "384M", "-smp", "2",
             "-object", "memory-backend-memfd,id=m,size=384M,share=on",
             "-kernel", vmlinuz, "-initrd", f"{path}/initrd", "-append", "console=ttyS0 panic=1 rdinit=/init",
             "-chardev", f"socket,id=d,path={socket},reconnect-ms=100",
             "-device", f"vhost-user-blk-pci,chardev=d,num-queues=2{options}",
             "-qmp", f"unix:{self.monitor},server=on,wait=off", *incoming,
             "-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        self.lines, self.all = queue.Queue(), []
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        for line in self.process.stdout:
            self.all.append(line)
            if "GUEST:" in line:
                self.lines.put(line[line.index("GUEST:") + 6:].strip())
        self.lines.put(None)

    def hear(self, what, seconds=60):
        """Waits for a line that begins with `what`."""
        until = time.monotonic() + seconds
        while True:
            try:
                line = self.lines.get(timeout=max(0.1, until - time.monotonic()))
            except queue.Empty:
                line = None
            assert line is not None, f"the guest did not say '{what}':\n{''.join(self.all[-60:])}"
            assert "FAILED" not in line, f"the guest: {line}\n{''.join(self.all[-60:])}"
            if line.startswith(what):
                return line

    def move(self, path, socket, guests):
        """Moves to another monitor, which finds the disk at `socket`, while it works on; that monitor."""
        number = self.number + 1
        at = f"{path}/moving{number}"
        there = Guest(path, socket, self.options, number, ["-incoming", f"unix:{at}"])
        guests.append(there)
        until = time.monotonic() + 120
        while not os.path.exists(at):
            assert there.process.poll() is None and time.monotonic() < until, "".join(there.all)
            time.sleep(0.05)
        talk = qmp.Talk(self.monitor)
        talk.qmp("migrate", uri=f"unix:{at}")
        while (state := talk.qmp("query-migrate"))["status"] != "completed":
            assert state["status"] != "failed" and time.monotonic() < until, state
            time.sleep(0.05)
        talk.qmp("quit")
        self.process.wait(60)
        there.all = self.all + there.all
        return there

    def rounds(self, more):
        for _ in range(more):
            self.hear("round")


def daemon(binary, path, top, slow=False):
    """One that serves the image `top`; with `slow` behind limits that can be set."""
    image = f"driver=qcow2,node-name=top,discard=unmap,file.driver=file,file.discard=unmap,file.filename={path}/{top}"
    options = ["--blockdev", image]
    if slow:
        throttle = "driver=throttle,node-name=slow,throttle-group=g,file=top"
        options += ["--object", "throttle-group,id=g", "--blockdev", throttle]
    node = "slow" if slow else "top"
    export = f"type=vhost-user-blk,id=e,node-name={node},writable=on,num-queues=2,addr.type=unix,addr.path={path}/s"
    return qmp.Daemon(binary, path, [*options, "--export", export])


def node(path, name, **more):
    file = {"driver": "file", "filename": f"{path}/{name}.qcow2", "discard": "unmap"}
    return {"driver": "qcow2", "node-name": name, "discard": "unmap", "file": file, **more}


def jobs_and_kills(args, path, guest, daemons):
    """Jobs under the guest, and a daemon that is killed and started again."""
    d = daemons[-1]
    # another disk takes its place
    d.qmp("blockdev-add", **node(path, "copy"))
    d.qmp("blockdev-mirror", **{"job-id": "m", "device": "top", "target": "copy", "sync": "full"})
    d.event("BLOCK_JOB_READY")
    guest.rounds(args.rounds)
    d.qmp("job-complete", id="m")
    d.event("BLOCK_JOB_COMPLETED")
    guest.rounds(args.rounds)
    # a layer on top of it, and back into it
    d.qmp("blockdev-add", **node(path, "over", backing=None))
    d.qmp("blockdev-snapshot", node="copy", overlay="over")
    guest.rounds(args.rounds)
    d.qmp("block-commit", **{"job-id": "c", "device": "over"})
    d.event("BLOCK_JOB_READY")
    guest.rounds(args.rounds)
    d.qmp("job-complete", id="c")
    d.event("BLOCK_JOB_COMPLETED")
    print("mirrored, pivoted, snapshotted, committed", flush=True)
    # killed in the middle of a round, again and again
    for n in range(5):
        time.sleep(0.3 + 0.37 * n)  # anywhere
        d.kill()
        d = daemon(os.path.abspath(args.daemon), path, "copy.qcow2")
        daemons.append(d)
        guest.rounds(1)
    print("killed and started again", flush=True)


def there_and_back(path, guest, guests, d):
    """The guest goes to another machine monitor at another export of the same disk, and back to a third one at the first."""
    where = {"type": "unix", "path": f"{path}/s2"}
    d.qmp("block-export-add", type="vhost-user-blk", id="e2", node_name="slow", writable=True, num_queues=2, addr=where)
    guest.process.stdin.write("read\n")
    guest.process.stdin.flush()
    guest.hear("reads")
    for socket in ("s2", "s"):
        # some are under way whenever it moves
        d.qmp("qom-set", path="g", property="limits", value={"iops-read": READS})
        guest = guest.move(path, f"{path}/{socket}", guests)
        d.qmp("qom-set", path="g", property="limits", value={})
        guest.rounds(1)
    print("moved to another machine monitor, and back", flush=True)
    return guest


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--daemon", required=True)
    parser.add_argument("--rounds", type=int, default=1, help="rounds of the guest between any two changes")
    parser.add_argument("--move", action="store_true", help="the guest moves; neither jobs nor kills")
    parser.add_argument("--packed", action="store_true", help="the guest's rings are packed ones")
    parser.add_argument("--keep", action="store_true")
    args = parser.parse_args()
    path = tempfile.mkdtemp(prefix="guest-")
    guests, daemons = [], []
    try:
        prepare(path)
        size = 192 << 20
        for name in ("copy", "over"):
            run("qemu-img", "create", "-q", "-f", "qcow2", f"{path}/{name}.qcow2", str(size))
        daemons.append(daemon(os.path.abspath(args.daemon), path, "disk.qcow2", args.move))
        guest = Guest(path, f"{path}/s", ",packed=on" if args.packed else "")
        guests.append(guest)
        up = guest.hear("up")
        assert up == f"up {size // 512} write back queues 2", up
        guest.rounds(args.rounds)
        if args.move:
            name = "disk"
            guest = there_and_back(path, guest, guests, daemons[-1])
        else:
            name = "copy"
            jobs_and_kills(args, path, guest, daemons)
        guest.process.stdin.write("stop\n")
        guest.process.stdin.flush()
        done = guest.hear("done")
        assert done == "done 0", f"the guest saw errors: {done}\n{''.join(guest.all[-60:])}"
        assert guest.process.wait(60) == 0
        daemons[-1].quit()
        # what is on the disk is a whole file system in a whole image
        run("qemu-img", "check", "-q", f"{path}/{name}.qcow2")
        run("qemu-img", "convert", "-O", "raw", f"{path}/{name}.qcow2", f"{path}/end.raw")
        run("e2fsck", "-f", "-n", f"{path}/end.raw")
        print(f"ok: {sum('GUEST: round' in l for l in guest.all)} rounds", flush=True)
    finally:
        for one in guests + daemons:
            if one.process.poll() is None:
                one.process.kill()
        if daemons:
            sys.stderr.write(daemons[-1].said())
        if not args.keep:
            shutil.rmtree(path, ignore_errors=True)


main()
