"""What the long benchmarks say about themselves: where they ran, with what, and how far they are."""

from __future__ import annotations

import contextlib
import importlib.metadata
import pathlib
import platform
import signal
import sys
import time
from collections.abc import Callable, Sequence

from benchmarks.serve_trace import noise


def begin(packages: Sequence[str], threads: int) -> Callable[[str], None]:
    """Keeps the benchmark to that many cores, prints versions and processor, and sees that a SIGTERM ends its children.

    Returns:
      What prints a line of progress, with the seconds since, on stderr.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    noise.use_cpus(threads)
    began = time.perf_counter()

    def say(line: str) -> None:
        print(f"[{time.perf_counter() - began:6.1f} s] {line}", file=sys.stderr, flush=True)

    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    print(f"Python {platform.python_version()}, {versions}; {threads} cores of {processor()}")
    return say


def version(package: str) -> str:
    """Of an installed package, or "none"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def processor() -> str:
    """The CPU's name."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
