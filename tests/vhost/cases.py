"""Runs the test functions of a script: each in an empty directory, a failure with what its daemon said."""

import argparse
import os
import signal
import sys
import tempfile
import time
import traceback


def arguments():
    """`--daemon PATH [NAME...]`: the daemon's full path, and the names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--daemon", required=True)
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    return os.path.abspath(args.daemon), args.names


def run(functions, names, prefix, clean=None):
    """The functions whose names begin with `test_`, all or those named; ends the program if one failed.

    A daemon that a failed test left behind, which has its number in `pid`, is killed; then `clean` is called with the directory.
    """
    tests = {n[5:]: f for n, f in functions.items() if n.startswith("test_")}
    failed = []
    for name in names or tests:
        with tempfile.TemporaryDirectory(prefix=prefix) as path:
            began = time.monotonic()
            try:
                tests[name](path)
                print(f"ok {name} {time.monotonic() - began:.2f} s", flush=True)
            except BaseException:
                failed.append(name)
                print(f"FAILED {name}\n{traceback.format_exc()}", flush=True)
                if log := read(path, "log"):
                    print(f"the daemon said:\n{log}", flush=True)
                if pid := read(path, "pid").strip():
                    try:
                        os.kill(int(pid), signal.SIGKILL)
                    except OSError:
                        pass
            if clean is not None:
                clean(path)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def read(path, name):
    """A file's text; nothing where there is none."""
    try:
        with open(os.path.join(path, name), errors="replace") as f:
            return f.read()
    except FileNotFoundError:
        return ""
