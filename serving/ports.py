"""Where a server listens: ports that are free, and who can reach them."""

from __future__ import annotations

import errno
import ipaddress
import socket

from llm_jax.errors import UserError

_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def address(host: str, port: int) -> str:
    """`host:port` as a client would write it."""
    bare = host.strip("[]")
    return f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}"


def check_port(host: str, port: int, flag: str = "port") -> None:
    """Fails at once if `host`:`port` can't be listened on, before a model is loaded for nothing.

    Raises:
      UserError: the port is in use, or the address is not this machine's.
    """
    for one in bound(host, port, flag):
        one.close()


def check_reach(host: str, is_open: bool) -> None:
    """Fails if others than this machine could reach a server that asks nobody who they are.

    Raises:
      UserError: so it is.
    """
    if is_open and not is_loopback(host):
        raise UserError(f"--host={host} lets others than this machine in, and no API keys are set: give --keys_file "
                        "(experiments/keys.py makes one), or listen on 127.0.0.1")


def is_loopback(host: str) -> bool:
    """Whether an address that is listened on can be reached from this machine alone."""
    return all(ipaddress.ip_address(found[4][0].partition("%")[0]).is_loopback for found in _found(host, 0))


def bound(host: str, port: int, flag: str = "port") -> list[socket.socket]:
    """Sockets that are bound to every address of `host`, at one port, and don't listen yet.

    Args:
      port: 0 takes a free one.
      flag: what the port is called on the command line.
    Raises:
      UserError: the port is in use, or the address is not this machine's.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"{flag} {port} is not between 0 and 65535")
    sockets: list[socket.socket] = []
    failed = None
    for family, kind, protocol, _, where in _found(host, port):
        made = None
        try:
            made = socket.socket(family, kind, protocol)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            made.bind((where[0], port, *where[2:]))
        except OSError as error:
            if made is not None:
                made.close()
            failed = error
            if error.errno not in _NOT_HERE:
                break
            continue  # "localhost" is ::1 too, also on a machine without IPv6
        sockets.append(made)
        port = made.getsockname()[1]
    if failed is not None and (not sockets or failed.errno not in _NOT_HERE):
        for one in sockets:
            one.close()
        raise UserError(f"can't listen on {address(host, port)}: {failed.strerror}; choose another --{flag} "
                        "(0 takes a free one)") from None
    return sockets


def _found(host: str, port: int) -> list:
    try:
        return socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise UserError(f"can't listen on {host!r}: {error.strerror or error}") from None
