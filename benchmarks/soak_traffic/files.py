"""Good uploads."""

from __future__ import annotations

from benchmarks.soak_traffic.asker import Asker, Wrong


async def file(ask: Asker) -> None:
    """A file: stored, listed, read back, deleted."""
    content, client = ask.random.randbytes(ask.random.choice((1 << 10, 1 << 16, 2 << 20))), ask.doors.client
    stored = await upload(ask, content)
    path = f"/v1/files/{stored['id']}"
    found = await client.get(f"{path}/content")
    if stored["bytes"] != len(content) or found.status_code != 200 or found.content != content:
        raise Wrong(f"a file of {len(content)} bytes came back with {found.status_code} and {len(found.content)} bytes")
    if stored["id"] not in {one["id"] for one in ask.good(await client.get("/v1/files"))["data"]}:
        raise Wrong("a file is not listed")
    ask.good(await client.delete(path))
    if (await client.get(path)).status_code != 404:
        raise Wrong("a file was deleted and is there")


async def upload(ask: Asker, content: bytes) -> dict:
    """Stores a file for a batch."""
    return ask.good(await ask.doors.client.post("/v1/files", data={"purpose": "batch"},
                                                files={"file": ("上传.jsonl", content)}))


GOOD = (file,)
