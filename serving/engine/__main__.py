"""The engine's process: `python -m serving.engine FD`, where FD is the socket to the doors' process."""

from __future__ import annotations

import socket
import sys

from serving.engine.process import Engine

if __name__ == "__main__":
    sys.exit(Engine(socket.socket(fileno=int(sys.argv[1]))).run())
