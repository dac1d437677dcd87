"""The audit file: a line of JSON for each request, whole, private, without content or keys."""

from __future__ import annotations

import concurrent.futures
import json
import os
import stat
import threading

import pytest

from experiments import serve
from llm_jax.errors import UserError
from serving.access import audit as audit_module
from serving.access import keys
from serving.access.audit import AuditEntry, AuditLog


def entry(**fields) -> AuditEntry:
    return AuditEntry(**{"request_id": "req-1", "interface": "http", "method": "POST /v1/completions", "status": "ok",
                         "seconds": 0.123456, "time": 1_800_000_000.25, **fields})


def written(audit: AuditLog, *entries: AuditEntry) -> None:
    """They are in the file when this returns."""
    for one in entries:
        audit.write(one)
    assert audit.flush()


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def test_a_line_says_who_and_how_and_how_much(tmp_path):
    (tmp_path / "logs").mkdir()
    audit = AuditLog(tmp_path / "logs" / "audit.jsonl")
    written(audit, entry(key_id="key-1", tenant="网站", role="user", peer="10.0.0.9", prompt_tokens=7,
                         completion_tokens=5))
    assert lines(tmp_path / "logs" / "audit.jsonl") == [{
        "time": "2027-01-15T08:00:00.250Z", "request_id": "req-1", "key_id": "key-1", "tenant": "网站", "role": "user",
        "interface": "http", "method": "POST /v1/completions", "status": "ok", "prompt_tokens": 7,
        "completion_tokens": 5, "tokens": 12, "seconds": 0.1235, "peer": "10.0.0.9"}]
    assert stat.S_IMODE((tmp_path / "logs" / "audit.jsonl").stat().st_mode) == 0o600


@pytest.mark.parametrize("told", ['a\nb"}\r\n{"status": "ok"}', "\u2028\x85\x00", "\udc80", "x" * 10_000, "中" * 300])
def test_what_a_client_chose_can_neither_end_the_line_nor_make_it_long(tmp_path, told):
    audit = AuditLog(tmp_path / "audit.jsonl")
    written(audit, entry(request_id=told, method=told, tenant=told, peer=told))
    found, = lines(tmp_path / "audit.jsonl")
    assert found["request_id"] == told[:256] and found["status"] == "ok"


@pytest.mark.parametrize("around", ["{}", "req_{}", "/v1/models?api_key={}", "x" * 250 + "{}"])
def test_a_key_where_none_belongs_is_left_out(tmp_path, around):
    secret = keys.new_secret()
    written(AuditLog(tmp_path / "audit.jsonl"), entry(request_id=around.format(secret), method=around.format(secret)))
    text = (tmp_path / "audit.jsonl").read_text()
    assert secret[12:20] not in text and secret not in text


def test_lines_of_several_threads_and_servers_stay_whole(tmp_path):
    audits = [AuditLog(tmp_path / "audit.jsonl") for _ in range(2)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: audits[i % 2].write(entry(request_id=f"req-{i}")), range(400)))
    assert all(audit.flush() for audit in audits)
    assert {line["request_id"] for line in lines(tmp_path / "audit.jsonl")} == {f"req-{i}" for i in range(400)}


def test_a_file_that_was_moved_away_is_begun_anew(tmp_path):
    audit = AuditLog(tmp_path / "audit.jsonl")
    written(audit, entry(request_id="1"))
    os.rename(tmp_path / "audit.jsonl", tmp_path / "audit.jsonl.1")
    written(audit, entry(request_id="2"))
    assert [line["request_id"] for line in lines(tmp_path / "audit.jsonl.1")] == ["1"]
    assert [line["request_id"] for line in lines(tmp_path / "audit.jsonl")] == ["2"]
    assert stat.S_IMODE((tmp_path / "audit.jsonl").stat().st_mode) == 0o600


def test_a_full_disk_costs_lines_and_is_told_once(caplog):
    audit = AuditLog("/dev/full")
    written(audit, *[entry()] * 3)
    assert caplog.text.count("No space left on device") == 1


def test_a_line_that_fitted_in_part_does_not_spoil_the_next(tmp_path, monkeypatch):
    audit, write = AuditLog(tmp_path / "audit.jsonl"), os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:20]))
    written(audit, entry(request_id="1"))
    monkeypatch.undo()
    written(audit, *(entry(request_id=str(i)) for i in (2, 3)))
    found = (tmp_path / "audit.jsonl").read_text().splitlines()
    assert [json.loads(line)["request_id"] for line in found[1:]] == ["2", "3"]


def test_where_lines_go_without_a_file(capfd):
    written(AuditLog("-"), entry())
    written(AuditLog(None), entry(request_id="req-2"))
    assert [json.loads(line)["request_id"] for line in capfd.readouterr().err.splitlines()] == ["req-1"]


def test_a_file_that_can_t_be_written_is_told_at_the_start(tmp_path):
    with pytest.raises(UserError, match="can't write the audit file"):
        AuditLog(tmp_path)


def test_a_folder_that_is_not_there_is_not_made(tmp_path):
    """It is told in one line before a model is loaded: whoever reads the lines would look elsewhere."""
    with pytest.raises(UserError, match=f"can't write the audit file .*: there is no folder {tmp_path}/a/b"):
        serve.main(["--run_dir=/nowhere", "--port=0", f"--audit_file={tmp_path}/a/b/audit.jsonl"])
    assert list(tmp_path.iterdir()) == []


def test_what_has_come_is_written_at_the_end_and_nothing_after_it(tmp_path):
    audit = AuditLog(tmp_path / "audit.jsonl")
    for i in range(500):
        audit.write(entry(request_id=str(i)))
    audit.close()
    audit.write(entry(request_id="late"))
    audit.close()
    assert [line["request_id"] for line in lines(tmp_path / "audit.jsonl")] == [str(i) for i in range(500)]


@pytest.fixture
def stuck(tmp_path):
    """A pipe that takes 64 KiB and no more until it is read: its path, and its other end."""
    path = tmp_path / "audit.jsonl"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDWR)
    yield path, reader
    os.close(reader)


def test_a_request_waits_for_no_disk(stuck):
    path, reader = stuck
    audit = AuditLog(path)

    def write() -> None:
        for i in range(1000):
            audit.write(entry(request_id=str(i)))

    writing = threading.Thread(target=write, daemon=True)
    writing.start()
    writing.join(30)
    assert not writing.is_alive() and not audit.flush(0.0)
    told = b""
    while told.count(b"\n") < 1000:
        told += os.read(reader, 1 << 16)
    audit.close()
    assert [json.loads(line)["request_id"] for line in told.splitlines()] == [str(i) for i in range(1000)]


def test_a_disk_that_hangs_costs_lines_and_not_memory(stuck, monkeypatch, caplog):
    path, _ = stuck
    monkeypatch.setattr(audit_module, "MAX_WAITING", 5)
    monkeypatch.setattr(audit_module, "CLOSE_S", 0.0)
    audit = AuditLog(path)
    for _ in range(1000):
        audit.write(entry())
    assert caplog.text.count("audit lines are lost") == 1 and "5 wait to be written" in caplog.text
    audit.close()  # and the end of the server waits for nobody
    assert "could not be written" in caplog.text
