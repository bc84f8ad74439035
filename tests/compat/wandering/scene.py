"""What all random scenes are made of."""
import json
import random

MIB = 1 << 20


class Scene:
    """The lines of one scene, as `twins.py` plays them."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.lines = []
        self.make()

    def make(self):
        raise NotImplementedError

    def maybe(self, chance):
        return self.random.random() < chance

    def one(self, *of):
        return self.random.choice(of)

    def weighted(self, table):
        """One of what a table of (weight, what) has."""
        return self.random.choices([k for _, k in table], [w for w, _ in table])[0]

    def some_of(self, table):
        """Some of the options in a table of (name, chance, values)."""
        return {key: self.one(*values) for key, chance, values in table if self.maybe(chance)}

    def command(self, command, /, **arguments):
        self.send(command, {k.replace("_", "-"): v for k, v in arguments.items() if v is not ...})

    def send(self, command, arguments):
        self.lines.append(f"{command} {json.dumps(arguments)}" if arguments else command)

    def shell(self, words):
        self.lines.append("! " + words)

    def settle(self):
        self.lines.append("~")

    def qemu_io(self, export, what, more=""):
        ro = "-r " if "read" in what else ""
        self.shell(f"qemu-io {ro}-f raw -c '{what}' {more}'nbd+unix:///{export}?socket=DIR/nbd.sock'")

    def bytes(self):
        """What a client asks for."""
        at, length = self.random.randrange(0, MIB, self.one(512, 4096, 65536)), self.one(512, 4096, 65536, 200000)
        return self.one(
            f"write -P {self.random.randint(1, 255)} {at} {length}", f"write -P 9 {at} {length}", f"write -z {at} {length}",
            f"write -z -u {at} {length}", f"discard {at} {length}", f"read -v {at} 512", "flush", f"read {at} {length}",
        )  # fmt: skip
