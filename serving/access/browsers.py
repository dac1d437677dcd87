"""Web pages that use a server without keys through the browser of somebody who may reach it.

A server that listens on loopback and asks nobody who they are is still within reach of every page that its operator
looks at: the page's scripts run on the same machine. Browsers say where a request comes from (`Origin`), and what name
the page used for the server (`Host`), which a page of evil.example can have pointed at 127.0.0.1 (DNS rebinding).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit


def foreign_page(headers: Mapping[str, str]) -> str:
    """The site whose page makes a request, if it is not this server's own.

    Args:
      headers: of the request, by names in lower case.

    Returns:
      Its origin or name; "" for a page of the server itself or of this machine, and for what is no browser.
    """
    host = _name(f"//{headers.get('host', '')}")
    if "." in host and not _is_address(host) and not host.endswith(".localhost"):
        return host  # names without a dot are a proxy's and a local network's: nobody else can point them anywhere
    origin = headers.get("origin")
    if origin is None:
        return ""
    name = _name(origin)
    return "" if name and (name == host or _is_loopback(name)) else origin or "null"


def _name(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(name: str) -> bool:
    return name == "localhost" or name.endswith(".localhost") or (
        _is_address(name) and ipaddress.ip_address(name).is_loopback)
