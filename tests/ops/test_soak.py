"""The soak in small: the same traffic for half a minute over a compiled engine in a process of its own."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import json

from benchmarks import soak
from benchmarks.fleet import make_run
from benchmarks.soak_traffic import GOOD, KINDS, Known


def test_mixed_traffic_leaves_nothing_behind(tmp_path):
    run_dir = make_run(tmp_path / "runs" / "tiny", 0)
    with soak.running_server(tmp_path, run_dir) as (http_port, grpc_port, pid, key):
        result, before, after, watch, known = asyncio.run(soak.soak(
            http_port, grpc_port, pid, key, seconds=25.0, warm_s=15.0, clients=8, prompts=soak.PROMPTS[::3], say=print))
    assert soak.said(tmp_path, key, known) == []
    # Half a minute says nothing of memory: what is still being filled counts as growth.
    assert soak.judge(result, before, dataclasses.replace(after, memory_mib=before.memory_mib)) == []
    assert set(result.counts) == {"good", *(kind for kind, *_ in KINDS)}
    assert {action.__name__ for action in GOOD} <= set(result.actions)
    assert result.counts["good"] > 100 and max(one.pages for one in watch.samples) > 0
    # Who stalled was waited for by nobody: what was made meanwhile came in large pieces. How much that is depends on
    # what the kernel takes before anything waits, and on how fast the engine is while they stall.
    tokens, merged, most = known.merged
    assert merged > tokens / 8 and most > 16
    # An audit line for each request that reached the door, none without its status; those that left were let go of.
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert len(lines) >= result.counts.total() - result.counts["dropped"] - result.counts["cancelled"]
    statuses = collections.Counter(line["status"] for line in lines)
    assert statuses["cancelled"] > (result.counts["cancelled"] + result.counts["dropped"]) / 2


def test_a_leak_would_be_seen():
    """The judge, shown a server that keeps something."""
    quiet = soak.Sample(60.0, 0, 0, 0, (100.0, 400.0), (10, 20), (30, 5))
    assert soak.judge(soak.Result(), quiet, quiet) == []
    for change in ({"pages": 1}, {"running": 2}, {"open_requests": 1}, {"memory_mib": (140.0, 400.0)},
                   {"threads": (10, 25)}, {"files": (40, 5)}):
        assert len(soak.judge(soak.Result(), quiet, dataclasses.replace(quiet, **change))) == 1, change
    assert soak.judge(soak.Result(wrong=["another text"]), quiet, quiet)
    known = Known(sent={"a": frozenset(("ok",)), "b": frozenset(("ok", "cancelled"))})
    lines = [{"request_id": "a", "status": "ok"}, {"request_id": "b", "status": "cancelled"}]
    assert soak.unaudited(lines, known) == []
    for change in (lines[:1], lines + lines[:1], [lines[0] | {"status": "cancelled"}, lines[1]],
                   [*lines, {"request_id": "c", "status": "unauthenticated"}]):
        assert len(soak.unaudited(change, known)) == 1, change
    slow = soak.Result()
    slow.seconds["good"].append(soak.STALL_S + 1)
    assert soak.judge(slow, quiet, quiet)
