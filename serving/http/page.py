"""The chat page at `/`: plain files from the package, which use the same paths as any other client."""

from __future__ import annotations

import pathlib

from fastapi import APIRouter
from fastapi.responses import Response

FOLDER = pathlib.Path(__file__).parent / "static"
FILES = {"index.html": "text/html; charset=utf-8", "chat.css": "text/css; charset=utf-8",
         "chat.js": "text/javascript; charset=utf-8", "api.js": "text/javascript; charset=utf-8",
         "words.js": "text/javascript; charset=utf-8", "icon.svg": "image/svg+xml"}
# Nothing from elsewhere, no inline code, nobody's frame: an answer of the model that is HTML stays text in any case.
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src "
                               "'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff", "referrer-policy": "no-referrer",
    "cache-control": "no-cache"}  # some 30 kB: a page of the last version would cost more


def router() -> APIRouter:
    """The page and its files; they ask nobody for a key, which the page itself lets one enter."""
    routes = APIRouter(include_in_schema=False)

    def serve(path: str, name: str) -> None:
        content = (FOLDER / name).read_bytes()

        @routes.get(path)
        async def get_page() -> Response:
            return Response(content, media_type=FILES[name], headers=HEADERS)

    serve("/", "index.html")
    for name in FILES:
        serve(f"/static/{name}", name)
    return routes
