"""The audit file: a line of JSON for each request, whole, private, without content or keys."""

from __future__ import annotations

import concurrent.futures
import json
import os
import stat

import pytest

from llm_jax.errors import UserError
from serving.access import keys
from serving.access.audit import AuditEntry, AuditLog


def entry(**fields) -> AuditEntry:
    return AuditEntry(**{"request_id": "req-1", "interface": "http", "method": "POST /v1/completions", "status": "ok",
                         "seconds": 0.123456, "time": 1_800_000_000.25, **fields})


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def test_a_line_says_who_and_how_and_how_much(tmp_path):
    audit = AuditLog(tmp_path / "logs" / "audit.jsonl")
    audit.write(entry(key_id="key-1", tenant="网站", role="user", peer="10.0.0.9", prompt_tokens=7,
                      completion_tokens=5))
    assert lines(tmp_path / "logs" / "audit.jsonl") == [{
        "time": "2027-01-15T08:00:00.250Z", "request_id": "req-1", "key_id": "key-1", "tenant": "网站", "role": "user",
        "interface": "http", "method": "POST /v1/completions", "status": "ok", "prompt_tokens": 7,
        "completion_tokens": 5, "tokens": 12, "seconds": 0.1235, "peer": "10.0.0.9"}]
    assert stat.S_IMODE((tmp_path / "logs" / "audit.jsonl").stat().st_mode) == 0o600


@pytest.mark.parametrize("told", ['a\nb"}\r\n{"status": "ok"}', "\u2028\x85\x00", "\udc80", "x" * 10_000, "中" * 300])
def test_what_a_client_chose_can_neither_end_the_line_nor_make_it_long(tmp_path, told):
    audit = AuditLog(tmp_path / "audit.jsonl")
    audit.write(entry(request_id=told, method=told, tenant=told, peer=told))
    found, = lines(tmp_path / "audit.jsonl")
    assert found["request_id"] == told[:256] and found["status"] == "ok"


@pytest.mark.parametrize("around", ["{}", "req_{}", "/v1/models?api_key={}", "x" * 250 + "{}"])
def test_a_key_where_none_belongs_is_left_out(tmp_path, around):
    secret = keys.new_secret()
    AuditLog(tmp_path / "audit.jsonl").write(entry(request_id=around.format(secret), method=around.format(secret)))
    text = (tmp_path / "audit.jsonl").read_text()
    assert secret[12:20] not in text and secret not in text


def test_lines_of_several_threads_and_servers_stay_whole(tmp_path):
    audits = [AuditLog(tmp_path / "audit.jsonl") for _ in range(2)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: audits[i % 2].write(entry(request_id=f"req-{i}")), range(400)))
    assert {line["request_id"] for line in lines(tmp_path / "audit.jsonl")} == {f"req-{i}" for i in range(400)}


def test_a_file_that_was_moved_away_is_begun_anew(tmp_path):
    audit = AuditLog(tmp_path / "audit.jsonl")
    audit.write(entry(request_id="1"))
    os.rename(tmp_path / "audit.jsonl", tmp_path / "audit.jsonl.1")
    audit.write(entry(request_id="2"))
    assert [line["request_id"] for line in lines(tmp_path / "audit.jsonl.1")] == ["1"]
    assert [line["request_id"] for line in lines(tmp_path / "audit.jsonl")] == ["2"]
    assert stat.S_IMODE((tmp_path / "audit.jsonl").stat().st_mode) == 0o600


def test_a_full_disk_costs_lines_and_is_told_once(caplog):
    audit = AuditLog("/dev/full")
    for _ in range(3):
        audit.write(entry())
    assert caplog.text.count("No space left on device") == 1


def test_a_line_that_fitted_in_part_does_not_spoil_the_next(tmp_path, monkeypatch):
    audit, write = AuditLog(tmp_path / "audit.jsonl"), os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:20]))
    audit.write(entry(request_id="1"))
    monkeypatch.undo()
    for i in (2, 3):
        audit.write(entry(request_id=str(i)))
    found = (tmp_path / "audit.jsonl").read_text().splitlines()
    assert [json.loads(line)["request_id"] for line in found[1:]] == ["2", "3"]


def test_where_lines_go_without_a_file(capfd):
    AuditLog("-").write(entry())
    AuditLog(None).write(entry(request_id="req-2"))
    assert [json.loads(line)["request_id"] for line in capfd.readouterr().err.splitlines()] == ["req-1"]


def test_a_file_that_can_t_be_written_is_told_at_the_start(tmp_path):
    with pytest.raises(UserError, match="can't write the audit file"):
        AuditLog(tmp_path)


def test_after_the_end_nothing_is_written(tmp_path):
    audit = AuditLog(tmp_path / "audit.jsonl")
    audit.close()
    audit.write(entry())
    assert lines(tmp_path / "audit.jsonl") == []
