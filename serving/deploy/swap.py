"""Gives every instance behind nginx its new model, one after another, without a refused request.

    python -m serving.deploy.swap --conf=/etc/llm_jax --restart="systemctl restart llm-jax@{n}" \\
        --reload="nginx -p /etc/llm_jax/ -c nginx_grpc.conf -s reload"

For instance n = 1, 2, …: take it out of gRPC's list, wait until nobody sends it anything new, restart it (which lets
what runs on it finish: the server drains at SIGTERM), wait until another process than before is ready, and put it back.
Which process it is says the `instance` of /readyz, so a restart may return before the old process has gone. HTTP needs
no list: what reaches an instance that drains goes on to the next. The first instance that does not get ready is left
out, and the rest as they are: they go on serving the old model. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence

HTTP_LIST, GRPC_LIST = "instances_http.conf", "instances_grpc.conf"
SETTLE_S = 6.0  # nginx_grpc.conf's keepalive_time and a second: until no connection of an old worker is left
_SERVER = re.compile(r"^(\s*server\s+)(\S+?)(\s[^;]*)?;", re.MULTILINE)


class Failed(Exception):
    """The swap has stopped; says at which instance, and in what state it is."""


def addresses(conf: pathlib.Path) -> list[str]:
    """`host:port` of each instance's HTTP, in order."""
    return [found[2] for found in _SERVER.finditer((conf / HTTP_LIST).read_text())]


def mark(conf: pathlib.Path, n: int, down: bool) -> None:
    """Takes instance `n` (from 1) out of gRPC's list, or puts it back; the file changes as a whole."""
    path = conf / GRPC_LIST
    count = 0

    def changed(found: re.Match[str]) -> str:
        nonlocal count
        count += 1
        if count != n:
            return found[0]
        words = [word for word in (found[3] or "").split() if word != "down"] + ["down"] * down
        return f"{found[1]}{' '.join([found[2], *words])};"

    new = path.with_name(path.name + ".new")
    new.write_text(_SERVER.sub(changed, path.read_text()))
    os.replace(new, path)


def is_ready(url: str, old: str = "") -> bool:
    """Whether the instance takes requests, and is not the process `old`."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:  # noqa: S310 - an address of the operator's own list
            return answer.status == 200 and (not old or _instance(answer.read()) != old)
    except (urllib.error.URLError, OSError):
        return False


def identity(url: str) -> str:
    """Which process answers, ready or not; "" if none does, or one that does not say."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:  # noqa: S310 - likewise
            return _instance(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return _instance(error.read())
    except (urllib.error.URLError, OSError):
        return ""


def _instance(body: bytes) -> str:
    try:
        found = json.loads(body)
    except ValueError:
        return ""
    return str(found.get("instance", "")) if isinstance(found, dict) else ""


def swap(conf: pathlib.Path, restart: Callable[[int], None], reload: Callable[[], None], *, ready: str,
         settle_s: float = SETTLE_S, timeout_s: float = 900.0, say: Callable[[str], None] = print) -> None:
    """Does it.

    Args:
      conf: folder of nginx's configuration, with the lists.
      restart: ends instance n in order and starts it with the new model; may return before either has happened.
      reload: has gRPC's nginx read its configuration again.
      ready: address that answers 200 when an instance takes requests, with {address} for its `host:port`; its JSON
        says in `instance` which process that is.
      settle_s: how long an instance that was taken out may still be sent requests.
      timeout_s: how long an instance may take until it is ready.
      say: receives a line for each step.

    Raises:
      Failed: an instance did not come back; it is out of the list.
      subprocess.CalledProcessError: a command failed; the instance it was about is out of the list.
    """
    for n, address in enumerate(addresses(conf), 1):
        mark(conf, n, down=True)
        reload()
        say(f"instance {n} ({address}) is out of rotation")
        time.sleep(settle_s)
        began = time.monotonic()
        url = ready.format(address=address, n=n)
        old = identity(url)
        restart(n)
        while not is_ready(url, old):
            if time.monotonic() - began > timeout_s:
                still = "; the process that was to end still answers" if old and identity(url) == old else ""
                raise Failed(f"instance {n} ({address}) was not ready after {timeout_s:g} s and stays out of rotation"
                             f"{still}; those after it still serve the old model")
            time.sleep(0.2)
        mark(conf, n, down=False)
        reload()
        say(f"instance {n} ({address}) is back after {time.monotonic() - began:.1f} s")
        time.sleep(min(settle_s, 1.0))  # so that it takes its share before the next one goes


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit status 1 and a line if the swap stopped."""
    parser = argparse.ArgumentParser(prog="python -m serving.deploy.swap", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conf", type=pathlib.Path, required=True, help="folder of nginx's configuration")
    parser.add_argument("--restart", required=True, help="command that restarts instance {n}")
    parser.add_argument("--reload", required=True, help="command that has gRPC's nginx read its list again")
    parser.add_argument("--ready", default="http://{address}/readyz", help="address that says when it is ready")
    parser.add_argument("--settle_seconds", type=float, default=SETTLE_S,
                        help="between the reload and the restart: a second more than nginx_grpc.conf's keepalive_time")
    parser.add_argument("--timeout_seconds", type=float, default=900.0, help="for an instance to get ready")
    args = parser.parse_args(argv)

    def run(command: str, **values: int) -> None:
        subprocess.run(command.format(**values), shell=True, check=True)  # noqa: S602 - the operator's own command

    try:
        swap(args.conf, lambda n: run(args.restart, n=n), lambda: run(args.reload), ready=args.ready,
             settle_s=args.settle_seconds, timeout_s=args.timeout_seconds, say=lambda line: print(line, flush=True))
    except (Failed, OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
