"""Files come back as they were sent, to their own tenant alone, within limits that the errors name."""

from __future__ import annotations

import io
import os
import time

import httpx
import openai
import pytest

from llm_jax.errors import UserError
from serving.errors import Rejected
from serving.http.batch_store import BatchStore
from serving.http.file_store import KEPT_S, FileStore
from serving.state import State
from tests.serving.http.conftest import running_app

CONTENT = '{"custom_id": "第一行"}\n'.encode()


class Clock:
    """Seconds since 1970, as a test wants them."""

    now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


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
    store = FileStore(state, clock=Clock(), max_bytes=100, max_tenant_bytes=250)
    yield store
    store.close()


def upload(http, content=CONTENT, name="请求.jsonl", **fields):
    return http.post("/v1/files", files={"file": (name, content)}, data={"purpose": "batch"} | fields)


def test_openai_client_keeps_finds_reads_and_deletes_files(client, state):
    made = [client.files.create(file=(f"请求{i}.jsonl", CONTENT * (i + 1)), purpose="batch") for i in range(3)]
    assert [(f.filename, f.bytes, f.purpose, f.status) for f in made] == [
        (f"请求{i}.jsonl", len(CONTENT) * (i + 1), "batch", "processed") for i in range(3)]
    assert made[0].expires_at - made[0].created_at == KEPT_S
    assert client.files.retrieve(made[1].id) == made[1]
    assert client.files.content(made[2].id).content == CONTENT * 3
    assert list(client.files.list()) == made[::-1] and list(client.files.list(order="asc", limit=1)) == made
    assert list(client.files.list(purpose="batch_output")) == []

    assert client.files.delete(made[1].id).deleted
    with pytest.raises(openai.NotFoundError, match="there is no file"):
        client.files.retrieve(made[1].id)
    assert list(client.files.list()) == [made[2], made[0]]
    assert len(list((state.path / "files").iterdir())) == 2


def test_another_tenants_files_are_not_there(http):
    file_id = upload(http).json()["id"]
    others = {"headers": {"x-tenant": "another"}}
    answers = [http.get(f"/v1/files/{file_id}", **others), http.get(f"/v1/files/{file_id}/content", **others),
               http.delete(f"/v1/files/{file_id}", **others)]
    assert [a.status_code for a in answers] == [404] * 3
    assert answers[0].json() == http.get(f"/v1/files/{file_id}", **others).json()
    assert http.get("/v1/files", **others).json()["data"] == []
    assert http.get("/v1/files", params={"after": file_id}, **others).json()["error"]["param"] == "after"
    assert http.get(f"/v1/files/{file_id}/content").content == CONTENT


@pytest.mark.parametrize("sent, param, code, says", [
    (dict(purpose="fine-tune"), "purpose", "invalid_value", "must be 'batch', not 'fine-tune'"),
    (dict(content=b""), "file", "invalid_value", "empty"),
    (dict(name="长" * 256 + ".jsonl"), "file", "invalid_value", "1 to 255 characters"),
    ({"colour": "红"}, "colour", "unknown_parameter", "unknown parameter"),
    ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "60"}, "expires_after[seconds]",
     "invalid_value", "3600"),
    ({"expires_after[anchor]": "now", "expires_after[seconds]": "7200"}, "expires_after[anchor]", "invalid_value",
     "created_at"),
    ({"expires_after[seconds]": "7200"}, "expires_after[anchor]", "missing_required_parameter", "missing"),
    ({"expires_after[anchor]": "created_at"}, "expires_after[seconds]", "missing_required_parameter", "missing"),
])
def test_a_wrong_upload_is_refused_by_its_field(http, sent, param, code, says):
    answer = upload(http, **sent)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert answer.json()["error"]["code"] == code and says in answer.json()["error"]["message"]
    assert http.get("/v1/files").json()["data"] == []


def test_what_is_no_upload_is_refused(http):
    def fault(**sent) -> tuple[int, str, str]:
        answer = http.post("/v1/files", **sent)
        return answer.status_code, answer.json()["error"]["param"], answer.json()["error"]["code"]

    assert fault(data={"purpose": "batch"}) == (400, "file", "missing_required_parameter")
    assert fault(json={"purpose": "batch"}) == (400, "file", "missing_required_parameter")
    assert fault(data={"purpose": "batch", "file": "a plain field"}) == (400, "file", "invalid_type")
    assert fault(files={"file": ("a.jsonl", CONTENT)}) == (400, "purpose", "missing_required_parameter")
    for content_type in ("application/json", "multipart/form-data", "multipart/form-data; boundary=x"):
        answer = http.post("/v1/files", content=b"--x\r\nnonsense", headers={"content-type": content_type})
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"
    two = http.post("/v1/files", files=[("file", ("a", b"1")), ("file", ("b", b"2"))], data={"purpose": "batch"})
    assert two.status_code == 400


def test_a_file_that_is_too_large_is_refused_while_it_comes(state, monkeypatch):
    monkeypatch.setitem(FileStore.__init__.__kwdefaults__, "max_bytes", 100_000)
    with running_app(options={"state": state}) as app, httpx.Client(base_url=app.url) as http:
        for content in (b"x" * 100_001, b"x" * 10_000_000):  # told by its own size, and by the body's
            answer = upload(http, content)
            assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"
            assert "at most 100000 bytes" in answer.json()["error"]["message"]
        assert not list((state.path / "files").iterdir())
        assert upload(http, b"x" * 100_000).status_code == 200


def test_a_tenant_has_so_much_room(store):
    first = [store.add("甲", "a", "batch", io.BytesIO(b"x" * 100)) for _ in range(2)]
    with pytest.raises(Rejected, match="take 200 bytes already") as found:
        store.add("甲", "a", "batch", io.BytesIO(b"x" * 51))
    assert found.value.reason.value.http == 429
    store.add("乙", "a", "batch", io.BytesIO(b"x" * 51))
    store.delete("甲", first[0].id)
    store.add("甲", "a", "batch", io.BytesIO(b"x" * 51))
    assert len(list(store.path("x").parent.iterdir())) == 3


def test_a_file_ends_at_its_time_and_leaves_nothing(store):
    short = store.add("", "a", "batch", io.BytesIO(b"1"), 3600)
    long = store.add("", "b", "batch", io.BytesIO(b"2"))
    batches = BatchStore(store)
    batches.add("", "", endpoint="/v1/completions", input_file_id=long.id, window="24h", window_s=86_400, metadata=None,
                output_kept_s=KEPT_S)
    left, fresh = store.path("file-left"), store.path("file-fresh")
    left.write_text("of a server that was killed")
    os.utime(left, (time.time() - 7200,) * 2)
    fresh.write_text("just being written by another")
    store.clock.now += 3600
    with pytest.raises(Rejected, match="no file"):
        store.get("", short.id)
    store.sweep()
    assert not store.path(short.id).exists() and not left.exists() and fresh.exists()
    store.clock.now += KEPT_S
    store.sweep()
    assert store.path(long.id).exists(), "a batch still reads it"


def test_the_input_of_a_running_batch_is_not_deleted(store):
    stored = store.add("", "a", "batch", io.BytesIO(b"1"))
    batches = BatchStore(store)
    batch = batches.add("", "", endpoint="/v1/completions", input_file_id=stored.id, window="24h", window_s=86_400,
                        metadata=None, output_kept_s=KEPT_S)
    with pytest.raises(Rejected, match=f"{batch.id}.*cancel it first") as found:
        store.delete("", stored.id)
    assert found.value.reason.value.http == 409
    batches.cancel("", batch.id)
    store.delete("", stored.id)


def test_what_is_kept_is_its_owners_alone(store, state):
    store.add("", "a", "batch", io.BytesIO(b"1"))
    for path in (state.path, state.path / "files", state.path / "instances", state.path / "batches.sqlite3",
                 state.path / "batches.sqlite3-wal"):
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_folder_that_is_none_and_a_database_of_another_version_are_refused(tmp_path, store):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't keep state in"):
        State(tmp_path / "file")
    with store.database.transaction() as database:
        database.execute("PRAGMA user_version = 9")
    with pytest.raises(UserError, match="is of version 9, this server's of version 1"):
        FileStore(store.state)
    broken = State(tmp_path / "broken")
    (broken.path / "batches.sqlite3").write_bytes(b"no database" * 1000)
    with pytest.raises(UserError, match="not a database"):
        FileStore(broken)
    broken.close()


def test_without_a_folder_the_paths_say_so():
    with running_app() as app, httpx.Client(base_url=app.url) as http:
        for answer in (upload(http), http.get("/v1/files"), http.get("/v1/batches/batch_1")):
            assert answer.status_code == 404 and "--state_dir" in answer.json()["error"]["message"]
