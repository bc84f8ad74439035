#!/usr/bin/env python3
"""Connects to an NBD export and stays in the background: hold.py SOCKET EXPORT. Goes when the server closes the connection."""
import os
import socket
import struct
import sys

s = socket.socket(socket.AF_UNIX)
s.connect(sys.argv[1])
name = sys.argv[2].encode()
s.recv(18, socket.MSG_WAITALL)
s.sendall(struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 1, len(name)) + name)
s.recv(10, socket.MSG_WAITALL)
if os.fork() == 0:
    os.setsid()
    for fd in (0, 1, 2):
        os.close(fd)
    s.recv(1)
