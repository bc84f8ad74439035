#!/usr/bin/env python3
"""Random command lines for qemu-storage-daemon and for another daemon: exit status and message.

    cmdline.py --daemon PATH [--rounds N] [--seed S] [--verbose]

A line is a few options with values that fit, that almost do, and that are no values at all. Every line ends with an option that fails, so that
no daemon stays; a line whose own options are right is thus told by that last message. What may differ is in KNOWN, each with its reason
(and in docs/compat.md). What help texts say is not compared. Exit status 0: nothing differs.
"""
import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile

LIMIT = 20  # seconds for a line
LAST = ["--export", "nbd,id=last,node-name=the-last-option"]

# (what a difference has to contain, why it may be)
KNOWN = [
    (r'got .*is not supported by liveblkd', "what is missing is refused by name"),
    (r"none: No such file or directory'.*\"(-T|--trace=?)\b.*events=none", "nothing is traced, so no list of events is read"),
    (r"Chardev with id .* already exists", "the words of chardev-add"),
    (r"got .*--export: Unexpected argument.*\"--\", \"--export", "QSD ignores what comes after --"),
    (r"Invalid parameter 'x{128}'", "a name that is too long is no name, either"),
    (r"descriptor 77: Bad file descriptor", "a descriptor that is none"),
    (r"got .*Invalid parameter 'help'", "help with a kind of chardev that there is not"),
]

# Values that make sense, by option
FILES = ["file,node-name=f,filename=1.raw", "driver=file,node-name=f,filename=1.raw", "driver=qcow2,node-name=q,file.driver=file,file.filename=1.q", "qcow2,node-name=q,file=f", "raw,node-name=r,file=f",
         "null-co,node-name=n,size=1048576", "null-co,node-name=n,size=1M,read-zeroes=on", "quorum,node-name=u,vote-threshold=1,children.0=f,children.1=n", "throttle,node-name=t,throttle-group=tg,file=f",
         "quorum,node-name=u,vote-threshold=1,children.0.driver=null-co,children.1.driver=null-co", "blkdebug,node-name=d,image=n,inject-error.0.event=pwritev,inject-error.0.errno=5",
         "nbd,node-name=k,server.type=unix,server.path=none", "nbd,node-name=k,server.type=inet,server.host=127.0.0.1,server.port=1,export=e",
         '{"driver":"file","node-name":"f","filename":"1.raw"}', '{"driver":"qcow2","node-name":"q","file":{"driver":"file","filename":"1.q"},"backing":null}', "qcow2,node-name=q,file.driver=file,file.filename=1.q,backing=",
         "file,node-name=f,filename=1.raw,cache.direct=off,discard=unmap,read-only=on,auto-read-only=off,force-share=on,detect-zeroes=on"]  # fmt: skip
VALUES = {
    "--blockdev": FILES,
    "--export": ["nbd,id=e,node-name=f", "type=nbd,id=e,node-name=f,writable=on,name=x,description=a b", "nbd,id=e,node-name=q,bitmaps.0=bm", "nbd,id=e,node-name=q,bitmaps.0.node=q,bitmaps.0.name=bm",
                 "vhost-user-blk,id=v,node-name=f,addr.type=unix,addr.path=v.sock", "fuse,id=u,node-name=f,mountpoint=mount", '{"type":"nbd","id":"e","node-name":"f"}', "nbd,id=e,node-name=f,writethrough=on,allocation-depth=on",
                 "vhost-user-blk,id=v,node-name=f,addr.type=unix,addr.path=v.sock,num-queues=4,logical-block-size=4096", "nbd,id=e,node-name=f,iothread=io,fixed-iothread=on"],
    "--nbd-server": ["addr.type=unix,addr.path=nbd.sock", "addr.type=unix,addr.path=nbd.sock,max-connections=5", "addr.type=inet,addr.host=127.0.0.1,addr.port=0", '{"addr":{"type":"unix","path":"nbd.sock"}}',
                     "addr.type=unix,addr.path=nbd.sock,tls-creds=tls", "addr.type=fd,addr.str=none", "addr.type=unix,addr.path=nbd.sock,handshake-max-seconds=5", "addr.type=inet,addr.host=127.0.0.1,addr.port=0,addr.ipv6=off"],
    "--object": ["iothread,id=io", "throttle-group,id=tg", "throttle-group,id=tg,limits.iops-total=100", "throttle-group,id=tg,x-iops-total=5", "secret,id=s,data=x", "qom-type=secret,id=s,data=aGk=,format=base64",
                 '{"qom-type":"iothread","id":"io","poll-max-ns":5}', "authz-list,id=l,policy=deny,rules.0.match=x,rules.0.policy=allow", "authz-simple,id=z,identity=x", "main-loop,id=m,aio-max-batch=3",
                 "tls-creds-x509,id=tls,dir=none,endpoint=server", "iothread,id=io,poll-max-ns=0x10,aio-max-batch=1k", "throttle-group,id=tg,limits={}", "help", "iothread,help", "secret,?", "nope,help"],
    "--chardev": ["socket,id=c,path=c.sock,server=on,wait=off", "socket,path=c.sock,server,nowait,id=c", "null,id=c", "ringbuf,id=c,size=64", "ringbuf,id=c,size=1K", "socket,id=c,host=127.0.0.1,port=0,server=on,wait=off", "stdio,id=c",
                  "help", "backend=null,id=c", "socket,id=c,path=none.sock", "socket,id=c,fd=77,server=on", "memory,id=c", "null,id=c,logfile=log", "socket,id=c,path=c.sock,server=on,wait=off,reconnect=5", "stdio,id=c,signal=off"],
    "--monitor": ["c", "chardev=c", "chardev=c,mode=control", "chardev=c,pretty=on", "c,mode=readline", "none", '{"chardev":"c"}', "c,id=x", "c,pretty=off,mode=control", "chardev=c,mode=nope"],
    "--pidfile": ["pid", "none/pid", "", ".", "1.raw"],
    "--trace": ["enable=bdrv_nope", "file=trace.log", "events=none", "bogus=1", "enable=nope"],
}  # fmt: skip
FLAGS = ["--daemonize", "--help", "--version", "-h", "-V", "--", "positional", "-x", "--bogus", "-", "--blockdev", "--object", "--block", "--he", "--d", "--ver", "--n", "--e", "--p", "--m", "-T", "-Thelp", "--help=x", "--version=", "-hV", "-Vx", ""]
WORDS = ["on", "off", "yes", "no", "true", "1", "0", "-1", "1k", "1K", "1M", "1.5G", "1e3", "0x10", "018", "1 ", " 1", "99999999999999999999", "9223372036854775808", "18446744073709551615", "18446744073709551616", "", "x", "f", "n", "nope",
         "1kb", "1kk", "-1k", "1P", "1E", "16E", "nan", "inf", ".5", "5.", "a,,b", "\u00e4", "x" * 300, "{}", "[]", "null", "#block1", "a b"]  # fmt: skip
KEYS = ["bogus", "node-name", "read-only", "cache", "cache.direct", "cache.nope", "file", "file.x", "size", "id", "type", "driver", "filename", "children.0", "children.1", "children.3", "children.x", "children.-1", "children.00", "limits.iops-total",
        "addr", "addr.type", "addr.path", "a..b", ".a", "a.", "", "0", "1.2", "a b", "a_b", "\u00e4", "x" * 128, "x" * 127, "file.driver", "max-connections", "rules.0", "help", "server", "wait", "x-iops-total", "discard", "children.4294967296", "file.0"]


class Line:
    def __init__(self, seed):
        self.random = random.Random(seed)
        self.words = []
        for _ in range(self.random.choice([1, 1, 2, 2, 3, 4])):
            self.option()
        self.words += LAST

    def maybe(self, chance):
        return self.random.random() < chance

    def one(self, *of):
        return self.random.choice(of)

    def option(self):
        if self.maybe(0.1):
            self.words.append(self.one(*FLAGS))
            return
        name = self.one(*VALUES, "--blockdev", "--blockdev", "--export", "--object")
        value = self.one(*VALUES[name])
        for _ in range(self.one(0, 0, 1, 1, 2, 3) if name != "--trace" else 0):
            value = self.spoilt(name, value)
        value = value.replace("\0", "")
        self.words += [f"{name}={value}"] if self.maybe(0.1) else [name, value]
        if name == "--pidfile" and self.maybe(0.5):
            self.words.append("--daemonize")

    def spoilt(self, name, value):
        if value.startswith("{") and self.maybe(0.7):
            return self.json(value)
        parts = value.split(",")
        at = self.random.randrange(len(parts))
        key, equals, was = parts[at].partition("=")
        what = self.one("value", "value", "value", "key", "more", "more", "drop", "twice", "cut", "join", "swap", "other", "bare", "noise")
        if what == "value":
            parts[at] = f"{key}={self.one(*WORDS)}" if equals else self.one(*WORDS)
        elif what == "key":
            parts[at] = self.one(*KEYS) + equals + was
        elif what == "more":
            parts.insert(self.random.randint(0, len(parts)), f"{self.one(*KEYS)}={self.one(*WORDS)}")
        elif what == "drop":
            parts.pop(at)
        elif what == "twice":
            parts.append(parts[at])
        elif what == "bare":
            parts[at] = self.one(*KEYS, "no" + key, key)
        elif what == "swap":
            self.random.shuffle(parts)
        elif what == "cut":
            return value[: self.random.randrange(len(value) + 1)]
        elif what == "join":
            return value + self.one(",", ",,", "=", ".", ",,,", "," + self.one(*VALUES[name]))
        elif what == "other":
            return self.one(*WORDS, *VALUES[self.one(*VALUES)])
        else:
            place = self.random.randrange(len(value) + 1)
            return value[:place] + self.one(",", "=", ".", " ", "\"", "'", "{", "}", "%s", "\\", "\u00e4", "\n", "0") + value[place:]
        return ",".join(parts)

    def json(self, value):
        try:
            thing = json.loads(value)
        except ValueError:
            return value + self.one(" ", "x", "}", " {}")
        if not isinstance(thing, dict) or not thing:
            return value
        key = self.random.choice(list(thing))
        what = self.one("value", "drop", "more", "text", "text")
        if what == "value":
            thing[key] = self.one(None, 5, True, "", "x", [], {}, 1.5)
        elif what == "drop":
            thing.pop(key)
        elif what == "more":
            thing[self.one(*KEYS)] = self.one(None, 5, True, "on", "x")
        else:
            at = self.random.randrange(len(value) + 1)
            return value[:at] + self.one(",", "'", "}", "x", "\\", " ") + value[at + self.one(0, 1) :]
        return json.dumps(thing, ensure_ascii=False)


def run(program, words):
    """What a daemon says and how it ends."""
    place = tempfile.mkdtemp(prefix="cmdline-")
    try:
        os.mkdir(os.path.join(place, "sub"))
        for name, size in (("1.raw", 1 << 20), ("mount", 0)):
            with open(os.path.join(place, name), "wb") as f:
                f.truncate(size)
        shutil.copy(IMAGE, os.path.join(place, "1.q"))
        started = subprocess.Popen([program, *words], cwd=place, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0)
        try:
            out, err = started.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            started.kill()
            started.communicate()
            return "does not end", ""
        says = err.decode("utf-8", "replace").replace(place, "DIR")
        # hints and warnings are for people
        says = re.sub(r"(.*: warning: short-form boolean option .*\n.*|.*: warning: .*|.*: info: .*|Identifiers consist of .*|Optional suffix .*|and exabytes, .*)(\n|$)", "", says)
        says = re.sub(r"^(\S*/)?(qemu-storage-daemon|liveblkd)(: |$)", "daemon: ", says, flags=re.M)
        left = sorted(n for n in os.listdir(place) if n not in ("sub", "1.raw", "1.q", "mount"))
        return started.returncode, says.strip(), bool(out), left
    finally:
        shutil.rmtree(place, ignore_errors=True)


def main():
    global IMAGE
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--daemon", default=os.environ.get("LIVEBLKD", "liveblkd"))
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    place = tempfile.mkdtemp(prefix="cmdline-")
    IMAGE = os.path.join(place, "1.q")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", IMAGE, "1M"], check=True)
    subprocess.run(["qemu-img", "bitmap", "--add", IMAGE, "bm"], check=True)
    failed = crashed = 0
    for seed in range(options.seed, options.seed + options.rounds):
        words = Line(seed).words
        theirs, ours = run("qemu-storage-daemon", words), run(options.daemon, words)
        if options.verbose:
            print(seed, words, theirs, ours, sep="\n    ")
        if isinstance(theirs[0], str) or theirs[0] not in (0, 1):
            crashed += 1
            if ours[0] not in (0, 1):
                print(f"seed {seed}: {words}\n    both: {theirs} {ours}")
            continue
        difference = f"want {theirs}\n        got  {ours}"
        same = theirs[:2] == ours[:2] or theirs[0] == ours[0] == 0
        if not same and not any(re.search(k, difference + "\n" + json.dumps(words), re.S) for k, _ in KNOWN):
            failed += 1
            print(f"seed {seed}: {json.dumps(words, ensure_ascii=False)[:600]}\n        {difference}", flush=True)
    shutil.rmtree(place)
    print(f"{options.rounds} lines, {failed} differ, {crashed} ended or held up the reference")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
