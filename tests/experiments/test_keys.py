"""`python -m experiments.keys`: what it prints, what it leaves in the file, what it refuses."""

from __future__ import annotations

import json

import pytest

from experiments import keys as script
from llm_jax.errors import UserError
from serving.access import keys


@pytest.fixture
def run(tmp_path, capsys):
    def run(command: str, *flags: str) -> str:
        assert script.main([command, f"--keys_file={tmp_path / 'keys.json'}", *flags]) == 0
        return capsys.readouterr().out

    return run


def test_a_key_is_shown_once_and_works(run, tmp_path):
    out = run("create", "--name=笔记本", "--role=developer", "--tenant=网站", "--days=90", "--requests_per_minute=60",
              "--concurrent=4", "--tokens_per_day=1000000")
    secret = out.split("\n")[1]
    key = keys.read(tmp_path / "keys.json").by_credential(secret)
    assert (key.name, key.role, key.tenant, key.requests_per_minute, key.concurrent, key.tokens_per_day) == (
        "笔记本", "developer", "网站", 60, 4, 1000000)
    assert (key.expires - key.created).days == 90
    listed = run("list")
    assert key.id in listed and "until" in listed and "1,000,000 tokens per day" in listed
    assert secret not in listed and key.sha256 not in listed


def test_as_json(run, tmp_path):
    made = json.loads(run("create", "--name=a", "--json"))
    assert keys.read(tmp_path / "keys.json").by_credential(made.pop("key")).id == made["id"]
    assert json.loads(run("list", "--json"))["keys"] == [made]
    assert "sha256" not in made and made["role"] == "user"


def test_a_revoked_key_stays_in_the_list(run):
    key_id = json.loads(run("create", "--name=a", "--json"))["id"]
    assert "revoked" in run("revoke", f"--id={key_id}")
    before = run("list")
    assert "revoked" in before and run("revoke", f"--id={key_id}") and run("list") == before


def test_a_certificate_needs_no_secret(run, tmp_path):
    out = run("create", "--name=a", "--certificate=worker-1")
    assert keys.PREFIX not in out
    assert keys.read(tmp_path / "keys.json").by_certificate("worker-1").name == "a"


def test_quotas_of_tenants(run, tmp_path):
    assert run("quota", "--tenant=网站", "--tokens_per_day=5000") == "tenant 网站: 5,000 tokens per day\n"
    run("create", "--name=a", "--tenant=网站")
    assert keys.read(tmp_path / "keys.json").tenants["网站"].tokens_per_day == 5000
    assert run("quota", "--tenant=网站") == "tenant 网站: no limits\n"


@pytest.mark.parametrize("arguments, said", [
    (["create", "--name=a", "--role=root"], "'admin', 'developer', 'user' or 'read-only'"),
    (["create", "--name=a", "--concurrent=0"], "concurrent: Input should be greater"),
    (["create", "--name=a", "--days=-1"], "days=-1 must lie between"),
    (["create", "--name="], "name"),
    (["revoke", "--id=key-x"], "there are key-0"),
    (["quota", "--tenant=a", "--tokens_per_day=-1"], "tokens_per_day"),
    (["create", "--name=b", "--certificate=worker-1"], "same key or certificate"),
    (["make"], "no command 'make'; say what to do first: create, list, revoke, quota"),
    (["create"], "create.name must be given: add --name=…"),
])
def test_what_is_wrong_is_said_and_changes_nothing(run, tmp_path, monkeypatch, arguments, said):
    monkeypatch.setattr(keys, "new_id", lambda: "key-0")
    run("create", "--name=a", "--certificate=worker-1")
    monkeypatch.undo()
    before = (tmp_path / "keys.json").read_bytes()
    with pytest.raises(UserError, match=said):
        script.main([arguments[0], f"--keys_file={tmp_path / 'keys.json'}", *arguments[1:]])
    assert (tmp_path / "keys.json").read_bytes() == before


def test_help_names_the_commands(capsys):
    assert script.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert "create|list|revoke|quota" in said and "revoke    Ends a key." in said
    assert script.main(["create", "--help"]) == 0
    said = capsys.readouterr().out
    assert " create --keys_file=KEYS_FILE --name=NAME" in said and "tokens_per_day" in said
