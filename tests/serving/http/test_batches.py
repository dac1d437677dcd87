"""Every line of a batch is answered exactly once: through errors, a full queue, a cancellation, and a killed server."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time

import httpx
import openai
import pytest

from serving.admission import BATCH_PRIORITY
from serving.http import batch_input, batch_runner
from serving.http.batch_store import BatchStore
from serving.http.file_store import KEPT_S, FileStore
from serving.state import State
from tests.serving.access.keyring import NOW, Keyring
from tests.serving.doubles import FakeService, wait_until
from tests.serving.http.chat_doubles import ChatService
from tests.serving.http.conftest import MODEL, running_app
from tests.serving.http.test_files import Clock

ENDED = ("completed", "failed", "expired", "cancelled")


@pytest.fixture
def state(tmp_path):
    state = State(tmp_path / "state")
    yield state
    state.close()


@pytest.fixture
def app(state):
    with running_app(options={"state": state}) as running:
        yield running


@pytest.fixture
def store(state):
    files = FileStore(state, clock=Clock())
    yield BatchStore(files)
    files.close()


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch):
    monkeypatch.setattr(batch_runner, "POLL_S", 0.1)
    monkeypatch.setitem(batch_runner.BatchRunner.__init__.__kwdefaults__, "poll_s", 0.1)
    monkeypatch.setattr(batch_runner, "FIRST_WAIT_S", 0.05)
    monkeypatch.setattr(batch_runner, "LONGEST_WAIT_S", 0.2)


def line(name: str, body: dict, url: str = "/v1/completions", **fields) -> dict:
    return {"custom_id": name, "method": "POST", "url": url, "body": {"model": MODEL} | body} | fields


def prompts(count: int, max_tokens: int = 4) -> list[dict]:
    return [line(f"第{i}行", {"prompt": f"从前{i}", "max_tokens": max_tokens}) for i in range(count)]


def jsonl(lines: list) -> bytes:
    texts = [json.dumps(one, ensure_ascii=False) if isinstance(one, dict) else one for one in lines]
    return "".join(text + "\n" for text in texts).encode()


def submit(client, lines: list, endpoint: str = "/v1/completions", window: str = "24h", **fields):
    stored = client.files.create(file=("请求.jsonl", jsonl(lines)), purpose="batch")
    return client.batches.create(input_file_id=stored.id, endpoint=endpoint, completion_window=window, **fields)


def follow(client, batch, until):
    """The batch once `until` holds of it."""
    for _ in range(1200):
        found = client.batches.retrieve(batch.id)
        if until(found):
            return found
        time.sleep(0.05)
    raise AssertionError(f"after a minute: {found}")


def end(client, batch):
    return follow(client, batch, lambda found: found.status in ENDED)


def content(client, file_id: str | None) -> list[dict]:
    return [json.loads(text) for text in client.files.content(file_id).text.splitlines()] if file_id else []


def test_openai_client_runs_a_batch_to_its_files(client, app):
    lines = prompts(9)
    lines[4]["body"]["max_tokens"] = -1
    batch = end(client, submit(client, ["", *lines], metadata={"为": "测试"}))
    assert (batch.status, batch.model, batch.metadata) == ("completed", MODEL, {"为": "测试"})
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at < batch.expires_at
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (9, 8, 1)
    assert (batch.usage.input_tokens, batch.usage.output_tokens) == (8 * 4, 8 * 4)

    found, wrong = content(client, batch.output_file_id), content(client, batch.error_file_id)
    assert [one["custom_id"] for one in found] == [f"第{i}行" for i in range(9) if i != 4], "in the input's order"
    for one in found:
        assert one["error"] is None and one["response"]["status_code"] == 200 and one["response"]["request_id"]
        alone = client.completions.create(model=MODEL, prompt=f"从前{one['custom_id'][1]}", max_tokens=4)
        assert one["response"]["body"]["choices"][0]["text"] == alone.choices[0].text
    assert [one["custom_id"] for one in wrong] == ["第4行"]
    assert wrong[0]["response"]["status_code"] == 400
    assert wrong[0]["response"]["body"]["error"]["param"] == "max_tokens"
    assert len({one["id"] for one in found + wrong}) == 9
    output = client.files.retrieve(batch.output_file_id)
    assert (output.purpose, output.filename) == ("batch_output", f"{batch.id}_output.jsonl")
    assert [one.id for one in client.batches.list()] == [batch.id]


def test_batches_of_embeddings_and_of_a_path_that_refuses(client, app):
    embedded = end(client, submit(client, [line("甲", {"input": "你好"}, "/v1/embeddings")], "/v1/embeddings"))
    alone = client.embeddings.create(model=MODEL, input="你好", encoding_format="float")
    found = content(client, embedded.output_file_id)[0]["response"]["body"]
    assert found["data"][0]["embedding"] == alone.data[0].embedding
    messages = [{"role": "user", "content": "你好"}]
    chat = end(client, submit(client, [line("乙", {"messages": messages}, "/v1/chat/completions")],
                              "/v1/chat/completions"))  # the double's tokenizer has no chat template
    assert chat.output_file_id is None
    assert content(client, chat.error_file_id)[0]["response"]["status_code"] == 400


def test_batches_of_conversations(state):
    with running_app(ChatService("好的。"), options={"state": state}) as app, _client(app) as client:
        messages = [{"role": "user", "content": "你好"}]
        chat = end(client, submit(client, [line("甲", {"messages": messages}, "/v1/chat/completions")],
                                  "/v1/chat/completions"))
        answer = content(client, chat.output_file_id)[0]["response"]["body"]
        assert answer["choices"][0]["message"]["content"] == "好的。" and chat.usage.output_tokens == 3
        responses = end(client, submit(client, [line("乙", {"input": "你好"}, "/v1/responses")], "/v1/responses"))
        answer = content(client, responses.output_file_id)[0]["response"]["body"]
        assert answer["output"][0]["content"][0]["text"] == "好的。" and responses.usage.output_tokens == 3


def test_lines_run_behind_everything_else_and_few_at_a_time(state):
    with running_app(FakeService(step_s=0.002), options={"state": state}) as app, _client(app) as client:
        urgent = [one | {"body": one["body"] | {"priority": 7}} for one in prompts(12, 20)]
        batches = [submit(client, urgent), submit(client, prompts(12, 20))]
        most = 0
        while any(client.batches.retrieve(batch.id).status not in ENDED for batch in batches):
            most = max(most, *(app.service.stats()["running"] for _ in range(20) if not time.sleep(0.002)))
        assert 1 < most <= batch_runner.AT_ONCE
        assert {priority for _, _, priority in app.service.submitted} == {BATCH_PRIORITY}
        first_of_second = [ids[-1] for ids, _, _ in app.service.submitted].index(ord("0") + 3, 1)
        assert first_of_second < 12, "batches take turns"
        client.completions.create(model=MODEL, prompt="交互", max_tokens=1)
        assert app.service.submitted[-1][2] == 0


def test_lines_that_a_busy_server_refuses_are_tried_again(state):
    with running_app(FakeService(max_running=2), options={"state": state}) as app, _client(app) as client:
        batch = end(client, submit(client, prompts(8)))
        assert batch.request_counts.completed == 8 and len(app.service.submitted) == 8


def test_a_fault_of_the_server_is_tried_a_few_times(client, app):
    app.service.faults["坏"] = RuntimeError("the disk of the engine")
    batch = end(client, submit(client, [line("甲", {"prompt": "坏"}), line("乙", {"prompt": "好"})]))
    assert [one["custom_id"] for one in content(client, batch.output_file_id)] == ["乙"]
    assert content(client, batch.error_file_id)[0]["response"]["status_code"] == 500


@pytest.mark.parametrize("wrong, code, param", [
    ("{", "invalid_json_line", None), ("[1]", "invalid_json_line", None), ("[" * 100_000, "invalid_json_line", None),
    (line("乙", {}, url="/v1/embeddings"), "mismatched_endpoint", "url"),
    (line("乙", {}, method="GET"), "invalid_method", "method"), (line("甲", {}), "duplicate_custom_id", "custom_id"),
    (line("乙", {}, colour="红"), "unknown_parameter", "colour"), (line("", {}), "invalid_value", "custom_id"),
    ('{"custom_id": "\\ud800", "method": "POST", "url": "/v1/completions", "body": {}}', "invalid_value", "custom_id"),
    ({"custom_id": "乙", "method": "POST", "url": "/v1/completions"}, "missing_required_parameter", "body"),
    (line("乙", {"stream": True}), "invalid_value", "body.stream"),
    (line("乙", {"background": True}), "invalid_value", "body.background"),
    (line("乙", {"model": "other"}), "mismatched_model", "body.model"),
])
def test_a_wrong_line_is_found(tmp_path, wrong, code, param):
    path = tmp_path / "lines"
    path.write_bytes(jsonl([line("甲", {"prompt": "好"}), "", wrong]))
    checked = batch_input.check(path, "/v1/completions", 1 << 20)
    assert [(one["code"], one["param"], one["line"]) for one in checked.errors] == [(code, param, 3)]


def test_a_wrong_line_fails_the_batch_before_anything_runs(client, app):
    batch = end(client, submit(client, [line("甲", {"prompt": "好"}), "{", line("甲", {})]))
    assert batch.status == "failed" and batch.failed_at and batch.output_file_id is None
    assert [(one.code, one.line) for one in batch.errors.data] == [("invalid_json_line", 2), ("duplicate_custom_id", 3)]
    assert not app.service.submitted


def test_files_without_lines_or_with_too_many_fail(tmp_path, monkeypatch):
    path = tmp_path / "lines"
    path.write_bytes(b"\n \n")
    assert batch_input.check(path, "/v1/completions", 1000).errors[0]["code"] == "empty_file"
    path.write_bytes(jsonl(prompts(3)))
    assert batch_input.check(path, "/v1/completions", 20).errors[0]["code"] == "line_too_long"
    monkeypatch.setattr(batch_input, "MAX_LINES", 2)
    assert batch_input.check(path, "/v1/completions", 1000).errors[0]["code"] == "too_many_requests"
    path.write_bytes(b"{\n" * 1000)
    assert len(batch_input.check(path, "/v1/completions", 1000).errors) == batch_input.MAX_ERRORS
    path.unlink()
    assert batch_input.check(path, "/v1/completions", 1000).errors[0]["code"] == "file_not_found"


@pytest.fixture(scope="module")
def shared_http(tmp_path_factory):
    state = State(tmp_path_factory.mktemp("state"))
    with running_app(options={"state": state}) as app, httpx.Client(base_url=app.url) as http:
        yield http
    state.close()


@pytest.mark.parametrize("fields, param", [
    (dict(endpoint="/v1/audio"), "endpoint"), (dict(completion_window="1s"), "completion_window"),
    (dict(completion_window="99d"), "completion_window"), (dict(completion_window="3 days"), "completion_window"),
    (dict(input_file_id="file-x"), "input_file_id"),
    (dict(metadata={"a": 1}), "metadata.a"), (dict(metadata={str(i): "" for i in range(17)}), "metadata"),
    (dict(output_expires_after={"anchor": "created_at", "seconds": 1}), "output_expires_after.seconds"),
    (dict(colour="红"), "colour"),
])
def test_a_wrong_batch_is_refused_by_its_field(shared_http, fields, param):
    http = shared_http
    stored = http.post("/v1/files", files={"file": ("a", jsonl(prompts(1)))}, data={"purpose": "batch"}).json()
    answer = http.post("/v1/batches", json={"input_file_id": stored["id"], "endpoint": "/v1/completions",
                                            "completion_window": "24h"} | fields)
    assert answer.status_code in (400, 404) and answer.json()["error"]["param"] == param
    assert http.get("/v1/batches").json()["data"] == []


def test_a_cancelled_batch_has_the_answers_so_far_and_says_so_of_the_rest(state):
    with running_app(FakeService(step_s=0.005), options={"state": state}) as app, _client(app) as client:
        batch = submit(client, prompts(4, 2) + [line(f"长{i}", {"prompt": "长", "max_tokens": 5000}) for i in range(9)])
        follow(client, batch, lambda found: found.request_counts.completed == 4)
        assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
        batch = end(client, batch)
        assert batch.status == "cancelled" and batch.cancelled_at >= batch.cancelling_at
        assert (batch.request_counts.total, batch.request_counts.completed) == (13, 4)
        assert [one["custom_id"] for one in content(client, batch.output_file_id)] == [f"第{i}行" for i in range(4)]
        rest = content(client, batch.error_file_id)
        assert [one["custom_id"] for one in rest] == [f"长{i}" for i in range(9)]
        assert {one["error"]["code"] for one in rest} == {"batch_cancelled"} and rest[0]["response"] is None
        assert wait_until(lambda: app.service.stats()["running"] == 0)
        with pytest.raises(openai.ConflictError, match="cancelled can't be cancelled"):
            client.batches.cancel(batch.id)


def test_a_batch_that_runs_out_of_time_keeps_what_it_has(state, monkeypatch):
    clock = Clock()
    monkeypatch.setitem(FileStore.__init__.__kwdefaults__, "clock", clock)
    with running_app(options={"state": state}) as app, _client(app) as client:
        batch = submit(client, [*prompts(1), line("长", {"prompt": "长", "max_tokens": 9000})], window="2m")
        follow(client, batch, lambda found: found.request_counts.completed == 1)
        clock.now += 121
        batch = end(client, batch)
        assert batch.status == "expired" and batch.expired_at
        assert len(content(client, batch.output_file_id)) == 1
        assert content(client, batch.error_file_id)[0]["error"]["code"] == "batch_expired"
        assert wait_until(lambda: app.service.stats()["running"] == 0)


_SERVER = """
import sys, time
from serving.state import State
from tests.serving.access.keyring import NOW, Keyring
from tests.serving.doubles import FakeService
from tests.serving.http.conftest import running_app
with running_app(FakeService(step_s=0.01), options={"state": State(sys.argv[1])}) as app:
    print(app.url, flush=True)
    time.sleep(60)
"""


def test_a_batch_goes_on_after_its_server_was_killed(tmp_path):
    folder = tmp_path / "state"
    with subprocess.Popen([sys.executable, "-c", _SERVER, str(folder)], stdout=subprocess.PIPE, text=True) as server:
        try:
            url = server.stdout.readline().strip()
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            batch = submit(client, prompts(30, 10))
            follow(client, batch, lambda found: found.request_counts.completed >= 5)
        finally:
            server.send_signal(signal.SIGKILL)
    state = State(folder)
    assert len(list((folder / "instances").iterdir())) == 2
    with running_app(options={"state": state}) as app, _client(app) as client:
        before = client.batches.retrieve(batch.id)
        batch = end(client, batch)
        assert batch.status == "completed" and batch.request_counts.completed == 30
        found = content(client, batch.output_file_id)
        assert [one["custom_id"] for one in found] == [f"第{i}行" for i in range(30)]
        assert all(one["response"]["body"]["choices"][0]["text"].startswith(f"从前{i}") for i, one in enumerate(found))
        assert len(app.service.submitted) <= 30 - 5, "what was answered before is not computed again"
        assert before.in_progress_at == batch.in_progress_at
    state.close()
    assert not list((folder / "instances").iterdir())


def test_two_servers_share_a_folder(state):
    with running_app(options={"state": state}) as first, _client(first) as client:
        other = State(state.path)
        with running_app(options={"state": other}) as second, _client(second) as their_client:
            stored = client.files.create(file=("a", jsonl(prompts(20))), purpose="batch")
            batch = their_client.batches.create(input_file_id=stored.id, endpoint="/v1/completions",
                                                completion_window="24h")
            batch = end(client, batch)
            assert len({one["custom_id"] for one in content(client, batch.output_file_id)}) == 20
            assert sorted(len(one.service.submitted) for one in (first, second)) == [0, 20], "one of them runs it"
        other.close()


def test_a_batch_goes_on_after_a_stop_in_order(state):
    with running_app(FakeService(step_s=0.01), options={"state": state}) as app, _client(app) as client:
        batch = submit(client, prompts(20, 10))
        follow(client, batch, lambda found: found.request_counts.completed >= 4)
    with running_app(options={"state": state}) as app, _client(app) as client:
        assert end(client, batch).request_counts.completed == 20
        assert len(app.service.submitted) <= 16


def _one_batch(store, count: int = 3):
    stored = store.files.add("", "a", "batch", io.BytesIO(jsonl(prompts(count))))
    batch = store.add("", "", endpoint="/v1/completions", input_file_id=stored.id, window="24h", window_s=86_400,
                      metadata=None, output_kept_s=KEPT_S)
    return batch, batch_input.check(store.files.path(stored.id), "/v1/completions", 1 << 20)


def test_an_answer_is_stored_once(store):
    batch, checked = _one_batch(store)
    assert [one.id for one in store.claim(9)] == [batch.id]
    store.begin(batch, checked)
    assert store.record(batch.id, 1, '{"a": 1}', False, (1, 0, 2))
    assert not store.record(batch.id, 1, '{"a": 2}', False, (1, 0, 2))
    assert [one.number for one in store.to_do(batch.id, 0)] == [2, 3]
    assert (store.get("", batch.id).completed, store.get("", batch.id).completion_tokens) == (1, 2)
    store.cancel("", batch.id)
    assert not store.record(batch.id, 2, "{}", False), "a batch that is being cancelled takes no more answers"
    store.finish(batch.id, "cancelled")
    with open(store.files.path(store.get("", batch.id).output_file_id)) as file:
        assert file.read() == '{"a": 1}\n'


def test_a_cancellation_that_the_last_lines_were_faster_than(store):
    """They are answered, but not taken any more: their runner thinks that the batch is complete, and it is not."""
    batch, checked = _one_batch(store, 2)
    store.claim(9)
    store.begin(batch, checked)
    assert store.record(batch.id, 1, '{"a": 1}', False)
    store.cancel("", batch.id)
    assert not store.record(batch.id, 2, '{"a": 2}', False)
    store.finish(batch.id, "completed")
    batch = store.get("", batch.id)
    assert batch.status == "cancelled" and batch.cancelled_at and not batch.completed_at
    assert store.files.path(batch.output_file_id).read_text() == '{"a": 1}\n'
    assert "batch_cancelled" in store.files.path(batch.error_file_id).read_text()


def test_files_that_were_half_written_are_written_again(store, monkeypatch):
    batch, checked = _one_batch(store)
    store.claim(9)
    store.begin(batch, checked)
    for number in (1, 2, 3):
        store.record(batch.id, number, f'{{"a": {number}}}', number == 3)
    insert = store.files.insert
    monkeypatch.setattr(store.files, "insert", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        store.finish(batch.id, "completed")
    assert store.get("", batch.id).status == "finalizing"
    monkeypatch.setattr(store.files, "insert", insert)
    store.finish(batch.id, "expired")  # too late to say so
    batch = store.get("", batch.id)
    assert batch.status == "completed" and batch.expired_at is None
    assert store.files.path(batch.output_file_id).read_text() == '{"a": 1}\n{"a": 2}\n'
    assert len(store.files.page("", purpose="batch_output", after=None, limit=9, ascending=True)[0]) == 2


def test_a_server_that_lost_a_batch_while_it_wrote_the_files_changes_nothing(store, monkeypatch):
    batch, checked = _one_batch(store, 1)
    store.claim(9)
    store.begin(batch, checked)
    store.record(batch.id, 1, '{"a": 1}', False)
    write = store.files.write
    monkeypatch.setattr(store.files, "write", lambda lines: (store.release(), write(lines))[1])
    store.finish(batch.id, "completed")
    assert store.get("", batch.id).status == "finalizing"
    assert [path.name for path in store.files.path("x").parent.iterdir()] == [batch.input_file_id]
    monkeypatch.undo()
    store.finish(batch.id, "completed")
    assert store.get("", batch.id).status == "finalizing", "it is nobody's, so not this server's either"
    store.claim(9)
    store.finish(batch.id, "completed")
    assert store.files.path(store.get("", batch.id).output_file_id).read_text() == '{"a": 1}\n'


def test_a_batch_that_stops_short_is_taken_up_again(client, app, monkeypatch):
    times, record = [], BatchStore.record

    def full(self, *args):
        times.append(None)
        if len(times) < 3:
            raise OSError("no space left on device")
        return record(self, *args)

    monkeypatch.setattr(BatchStore, "record", full)
    assert end(client, submit(client, prompts(1))).request_counts.completed == 1 and len(times) == 3


def test_a_batch_is_one_servers_until_that_server_dies(store, state):
    batch, checked = _one_batch(store)
    other_state = State(state.path)
    other = BatchStore(FileStore(other_state, clock=Clock()))
    assert store.claim(9) and not other.claim(9)
    store.begin(batch, checked)
    assert not other.record(batch.id, 1, "{}", False)
    state.close()  # as the kernel does it for a process that dies
    assert [one.id for one in other.claim(9)] == [batch.id]
    assert not store.record(batch.id, 1, "{}", False), "the first one was only slow: it has lost its right"
    assert other.record(batch.id, 1, "{}", False)
    other.release()
    other.files.close()
    other_state.close()


def test_many_batches_of_one_tenant_delay_no_others(store):
    stored = [store.files.add(tenant, "a", "batch", io.BytesIO(b"1")) for tenant in ("甲", "乙")]
    made = [store.add(one.tenant, "", endpoint="/v1/completions", input_file_id=one.id, window="24h", window_s=86_400,
                      metadata=None, output_kept_s=KEPT_S) for one in [stored[0]] * 5 + [stored[1]]]
    assert [one.id for one in store.claim(2)] == [made[0].id, made[5].id]


def _client(app, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{app.url}/v1", api_key=key, max_retries=0, timeout=30)


def test_lines_are_their_keys_requests_for_as_long_as_it_is_good(state, tmp_path):
    ring = Keyring(tmp_path)
    key = ring.add("developer", tenant="网站", concurrent=1, tokens_per_day=1_000)
    with running_app(FakeService(step_s=0.005), guard=ring.guard(), options={"state": state}) as app:
        with _client(app, key) as client:
            first = end(client, submit(client, prompts(6)))
            assert first.request_counts.completed == 6, "its limit of one request at once is for what people wait for"
            assert {tenant for tenant, _ in app.service.terms} == {"网站"}
            lines = [one for one in ring.audited() if one["interface"] == "batch"]
            assert {(one["key_id"], one["tenant"], one["method"], one["status"]) for one in lines} == {
                ("key-0", "网站", "POST /v1/completions", "ok")}
            assert len(lines) == 6 and all(one["completion_tokens"] == 4 for one in lines)
            assert key not in (state.path / "batches.sqlite3").read_bytes().decode("latin-1")

            second = submit(client, prompts(40, 5))
            follow(client, second, lambda found: found.request_counts.completed >= 4)
            ring.change("key-0", revoked=NOW)
        other = ring.add("developer", tenant="网站")
        with _client(app, other) as client:
            second = end(client, second)
            refused = content(client, second.error_file_id)
            assert len(refused) + len(content(client, second.output_file_id)) == 40 and len(refused) > 10
            assert {one["response"]["status_code"] for one in refused} == {401}
        with _client(app, ring.add("read-only", tenant="网站")) as client, pytest.raises(openai.PermissionDeniedError):
            client.batches.list()


def test_another_tenants_batches_are_not_there(client, app):
    batch = end(client, submit(client, prompts(1)))
    with httpx.Client(base_url=app.url, headers={"x-tenant": "another"}) as others:
        assert others.get(f"/v1/batches/{batch.id}").status_code == 404
        assert others.post(f"/v1/batches/{batch.id}/cancel").status_code == 404
        assert others.get("/v1/batches").json()["data"] == []
        stolen = others.post("/v1/batches", json={"input_file_id": batch.input_file_id, "endpoint": "/v1/completions",
                                                  "completion_window": "24h"})
        assert stolen.status_code == 404 and stolen.json()["error"]["param"] == "input_file_id"


def test_batches_are_listed_newest_first_in_pages(client, app):
    made = [submit(client, prompts(1)).id for _ in range(5)]
    assert [one.id for one in client.batches.list(limit=2)] == made[::-1]
    page = client.batches.list(limit=2, after=made[3])
    assert [one.id for one in page.data] == [made[2], made[1]] and page.has_more
