"""A bucket in memory: `gs://bucket/…` for fsspec (and so etils.epath), and for TensorStore, which speaks HTTP to it.

All see the same objects, as they would those of Google Cloud Storage. What is simulated is its JSON interface as far as
TensorStore uses it: reading (whole or a range), writing and deleting under a condition on an object's generation, and
listing. What isn't: authentication, latency, limits on rates, and the client libraries (gcsfs, google-cloud-storage).
"""

from __future__ import annotations

import http.server
import itertools
import json
import sys
import threading
import types
import urllib.parse
from collections.abc import Iterator
from typing import Any, ClassVar

import fsspec
import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem


class FakeBucket(MemoryFileSystem):
    """Objects by name, and folders that are there as long as an object is in them."""

    protocol = ("gcs", "gs")
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(each) for each in path]
        for prefix in ("gs://", "gcs://"):
            path = str(path).removeprefix(prefix)
        return "/" + path.strip("/") if path.strip("/") else ""


class _Objects(http.server.BaseHTTPRequestHandler):
    """The JSON interface; an object's generation is kept beside its content, and new with every write."""

    protocol_version = "HTTP/1.1"
    generations: ClassVar[dict[str, tuple[Any, int]]] = {}
    numbers = itertools.count(1)
    lock = threading.Lock()

    def _generation(self, name: str) -> int:
        """0 for an object that is not there; fsspec writes objects too, which then are new ones."""
        content = FakeBucket.store.get(name)
        if content is None:
            return 0
        known = self.generations.get(name)
        if known is None or known[0] is not content:
            known = self.generations[name] = content, next(self.numbers)
        return known[1]

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _asked(self) -> tuple[str, dict[str, str]]:
        """The object's name in `FakeBucket.store`, or the bucket's, and what was asked of it."""
        address = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(address.query))
        bucket, _, name = address.path.split("/b/", 1)[1].partition("/o")
        return f"/{bucket}/" + (urllib.parse.unquote(name.lstrip("/")) or query.get("name", "")), query

    def _is_as_asked(self, name: str, query: dict[str, str]) -> bool:
        wanted = query.get("ifGenerationMatch")
        return wanted is None or int(wanted) == self._generation(name)

    def do_GET(self) -> None:
        name, query = self._asked()
        with self.lock:
            if name.count("/") == 2 and name.endswith("/"):
                prefix = name + query.get("prefix", "")
                first, last = name + query.get("startOffset", ""), query.get("endOffset")
                found = sorted(each for each in FakeBucket.store if each.startswith(prefix) and each >= first
                               and (last is None or each < name + last))
                items = [{"name": each.removeprefix(name), "size": str(len(FakeBucket.store[each].getvalue()))}
                         for each in found]
                return self._answer(200, json.dumps({"items": items}).encode(), Content_Type="application/json")
            if not (generation := self._generation(name)):
                return self._answer(404)
            if not self._is_as_asked(name, query):
                return self._answer(412)
            if query.get("ifGenerationNotMatch") == str(generation):
                return self._answer(304)
            content = FakeBucket.store[name].getvalue()
        headers = {"x_goog_generation": str(generation), "Content_Type": "application/octet-stream"}
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            end = min(int(last) + 1 if last else len(content), len(content))
            headers["Content_Range"] = f"bytes {first}-{end - 1}/{len(content)}"
            return self._answer(206, content[int(first):end], **headers)
        self._answer(200, content, **headers)

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        name, query = self._asked()
        with self.lock:
            if not self._is_as_asked(name, query):
                return self._answer(412)
            FakeBucket.store[name] = MemoryFile(FakeBucket(), name, content)
            facts = {"name": query["name"], "generation": str(self._generation(name)), "size": str(len(content))}
        self._answer(200, json.dumps(facts).encode(), Content_Type="application/json")

    def do_DELETE(self) -> None:
        name, query = self._asked()
        with self.lock:
            if not self._is_as_asked(name, query):
                return self._answer(412)
            self._answer(204 if FakeBucket.store.pop(name, None) else 404)

    def log_message(self, *_: Any) -> None:
        pass


class _Blob:
    """An object as google-cloud-storage has it, for one who writes all of it again and again."""

    generation = None

    def __init__(self, name: str, bucket: str):
        self._name = f"/{bucket}/{name}"

    def upload_from_string(self, data: bytes, if_generation_match: None) -> None:
        FakeBucket().pipe_file(self._name, data)


@pytest.fixture
def bucket() -> Iterator[str]:
    """The address of an empty bucket, for what goes through fsspec."""
    fsspec.register_implementation("gcs", FakeBucket, clobber=True)
    backend.fsspec_backend._get_filesystem.cache_clear()
    FakeBucket.store.clear()
    FakeBucket.pseudo_dirs[:] = ["", "/bucket"]
    yield "gs://bucket"
    backend.fsspec_backend._get_filesystem.cache_clear()


@pytest.fixture
def served_bucket(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an empty bucket, for TensorStore as well."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Objects)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_port}")
    # Orbax asks this one whether a bucket has a hierarchical namespace, and tensorboardX hands it whole files.
    storage = types.ModuleType("google.cloud.storage")
    storage.Client = lambda: types.SimpleNamespace(get_bucket=lambda name: types.SimpleNamespace())
    storage.Bucket = lambda client, name: name
    storage.Blob = _Blob
    cloud = types.ModuleType("google.cloud")
    cloud.storage = storage
    monkeypatch.setitem(sys.modules, "google.cloud", cloud)
    monkeypatch.setitem(sys.modules, "google.cloud.storage", storage)
    yield bucket
    server.shutdown()
    server.server_close()
