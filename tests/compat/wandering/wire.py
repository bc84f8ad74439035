"""What comes over a monitor's connection and is not quite a command."""
import json

from .scene import Scene

STEPS = (20, 60)
IDS = [None, True, False, 0, -1, 1, 1.5, -0.0, 1e3, 1e-7, 0.1, 123456789.125, 1e22, 1 << 63, (1 << 64) - 1, 1 << 64, 1 << 100, -(1 << 63), -(1 << 63) - 1, "", "x", "\u00e4\u20ac\U0001f600", "\u0000\u001f\u007f", "\"\\/\b\f\n\r\t",
       [], [[]], {}, {"a": {"b": [1, 2]}}, [1, "x", None], {"": 0}]  # fmt: skip
# Numbers as JSON has them and as it has not
NUMBERS = ["0", "-0", "00", "01", "-01", "1.", ".5", "1.5", "1e3", "1E3", "1e+3", "1e-3", "1e", "1e+", "-", "--1", "+1", "0x10", "1_0", "9223372036854775807", "9223372036854775808", "-9223372036854775808",
           "-9223372036854775809", "18446744073709551615", "18446744073709551616", "1e19", "1.0", "100000000000000000000000", "NaN", "Infinity", "-Infinity", "1e400", "0.1e1", "5e-324", "1.7976931348623157e308"]  # fmt: skip
STRINGS = ['"x"', "'x'", "'x\"y'", '"x\'y"', '"\\u0041"', '"\\ud83d\\ude00"', '"\\ud83d"', '"\\ude00"', '"\\ud83d\\u0041"', '"\\u0000"', '"\\u00"', '"\\x41"', '"\\q"', '"\\""', "'\\''", '"\\/"', '"a\tb"', '"a\\tb"', '"%s"', '"%"',
           '"\u00e4"', '"\\ufffe"', '"\\uffff"', '"\\ufdd0"', '"\u007f"', '"\ufffe"']  # fmt: skip
# Bytes (as characters below 256) that are no UTF-8, or none that one takes
BYTES = ["\xff", "\x80", "\xc3", "\xc3\x28", "\xed\xa0\x80", "\xf5\x80\x80\x80", "\xc0\x80", "\xe2\x82", "\xf0\x9f\x98\x80", "\xc3\xa4", "\xef\xbf\xbe", "\xef\xbb\xbf", "\x00", "\x01", "\x7f", "\xf4\x90\x80\x80", "\xe0\x80\x80"]
WORDS = ["true", "false", "null", "True", "nul", "truefalse", "undefined", "nan", "%d", "%p", "%i", "%s", "a"]
PUNCTUATION = list("{}[]:,\"'\\ \t/#%-+.0aZ_@$") + ["//", "/*", "\x0b", "\x0c", "\xa0", ";", "()", "\r"]
# Commands that change nothing, or what the next one may meet
COMMANDS = [
    ("query-jobs", {}), ("query-version", {}), ("query-block-exports", {}), ("query-named-block-nodes", {"flat": True}), ("job-pause", {"id": "x"}), ("block-job-set-speed", {"device": "x", "speed": 0}),
    ("block-job-cancel", {"device": "x", "force": True}), ("block_resize", {"node-name": "n", "size": 1024}), ("block-set-write-threshold", {"node-name": "n", "write-threshold": 512}),
    ("blockdev-add", {"driver": "null-co", "node-name": "n", "size": 65536, "read-zeroes": True}), ("blockdev-del", {"node-name": "n"}), ("qom-get", {"path": "/objects", "property": "type"}),
    ("block-dirty-bitmap-add", {"node": "n", "name": "b", "granularity": 512}), ("block-dirty-bitmap-merge", {"node": "n", "target": "b", "bitmaps": ["c", {"node": "n", "name": "d"}]}),
    ("transaction", {"actions": [{"type": "abort", "data": {}}, {"type": "block-dirty-bitmap-clear", "data": {"node": "n", "name": "b"}}], "properties": {"completion-mode": "individual"}}),
    ("object-add", {"qom-type": "throttle-group", "id": "t", "limits": {"iops-total": 100}}), ("object-del", {"id": "t"}), ("qom-set", {"path": "/objects/t", "property": "limits", "value": {"bps-total": 7}}),
    ("blockdev-reopen", {"options": [{"driver": "null-co", "node-name": "n", "size": 65536}]}), ("chardev-add", {"id": "r", "backend": {"type": "ringbuf", "data": {"size": 64}}}),
    ("blockdev-create", {"job-id": "1", "options": {"driver": "file", "filename": "x", "size": 5}}), ("nbd-server-start", {"addr": {"type": "unix", "data": {"path": "/nonexistent/x"}}, "max-connections": 1}),
    ("qmp_capabilities", {}), ("qmp_capabilities", {"enable": ["oob"]}), ("x-blockdev-change", {"parent": "n", "child": "c"}), ("query-blockstats", {"query-nodes": True}),
]  # fmt: skip


class Wire(Scene):
    def make(self):
        for _ in range(self.random.randint(*STEPS)):
            text = self.weighted([(4, self.request), (5, self.spoilt), (4, self.mutated), (2, self.scraps), (1, self.several)])()
            self.lines.append("< " + json.dumps(text))

    def values(self, depth=0):
        """Any JSON, as text."""
        kind = self.one("number", "number", "string", "string", "word", "list", "object", "plain")
        if kind == "number":
            return self.one(*NUMBERS)
        if kind == "string":
            return self.utf8(self.one(*STRINGS)) if self.maybe(0.8) else '"' + self.one(*BYTES) + '"'
        if kind == "word":
            return self.one(*WORDS[:3]) if self.maybe(0.6) else self.one(*WORDS)
        if kind == "plain":
            return json.dumps(self.one(*IDS))
        inner = [self.values(depth + 1) for _ in range(self.random.randint(0, 2 if depth < 3 else 0))]
        if kind == "list":
            return "[" + ",".join(inner) + self.one("", "", "", "", ",") + "]"
        return "{" + ",".join(f"{json.dumps(self.one('a', 'b', ''))}{self.one(':', ':', ':', ':', '', '=')}{v}" for v in inner) + self.one("", "", "", "", ",") + "}"

    def utf8(self, text):
        """Its bytes as characters."""
        return text.encode("utf-8", "surrogatepass").decode("latin-1")

    def message(self):
        command, arguments = self.one(*COMMANDS)
        message = {self.one("execute", "execute", "execute", "execute", "exec-oob"): command}
        if arguments or self.maybe(0.2):
            message["arguments"] = arguments
        if self.maybe(0.5):
            message["id"] = self.one(*IDS)
        return json.loads(json.dumps(message))

    def request(self):
        return json.dumps(self.message(), ensure_ascii=self.maybe(0.5)).encode().decode("latin-1")

    def places(self, value, path=()):
        """Every place in a value."""
        yield path
        if isinstance(value, dict):
            for k, v in value.items():
                yield from self.places(v, (*path, k))
        elif isinstance(value, list):
            for i, v in enumerate(value):
                yield from self.places(v, (*path, i))

    def spoilt(self):
        """A request one of whose values is another one."""
        message = self.message()
        path = self.random.choice(list(self.places(message)))
        mark, inside = "\x1a", message
        if not path:
            return self.values()
        for step in path[:-1]:
            inside = inside[step]
        what = self.one("value", "value", "value", "drop", "more", "twice")
        if what == "drop":
            inside.pop(path[-1])
        elif what == "more" and isinstance(inside, dict):
            inside[self.one("bogus", "", "id", "arguments", "execute", "control", "\u00e4", "type", "data")] = mark
        elif what == "twice" and isinstance(inside, dict):
            inside[mark + "2"] = mark
            return json.dumps(message).replace(json.dumps(mark + "2"), json.dumps(path[-1])).replace(json.dumps(mark), self.values())
        else:
            inside[path[-1]] = mark
        return json.dumps(message).replace(json.dumps(mark), self.values())

    def mutated(self):
        """A request some of whose characters are other ones."""
        text = self.request()
        for _ in range(self.random.randint(1, 3)):
            at = self.random.randrange(len(text) + 1)
            what = self.one("insert", "insert", "delete", "replace", "cut", "double")
            piece = self.one(self.one(*PUNCTUATION), self.one(*BYTES), self.one(*WORDS), self.one(*NUMBERS), self.utf8(self.one(*STRINGS)))
            if what == "insert":
                text = text[:at] + piece + text[at:]
            elif what == "delete":
                text = text[:at] + text[at + self.random.randint(1, 4) :]
            elif what == "replace":
                text = text[:at] + piece + text[at + 1 :]
            elif what == "cut":
                text = text[:at]
            else:
                text = text[:at] + text[max(0, at - 5) :]
        return text

    def scraps(self):
        return "".join(self.one(self.one(*PUNCTUATION), self.values(), self.one(*WORDS), self.one(*BYTES)) for _ in range(self.random.randint(1, 8)))

    def several(self):
        return self.one("", " ", "\n", "\r\n", ",", "\t").join(self.one(self.request, self.spoilt, self.values)() for _ in range(self.random.randint(2, 4)))
