"""The keys file: hashes alone, written whole or not at all, by one at a time, and followed while it changes."""

from __future__ import annotations

import concurrent.futures
import datetime
import hashlib
import json
import math
import os
import stat

import pytest

from llm_jax.errors import UserError
from serving.access import keys
from serving.access.keys import Key, KeySet, WatchedKeys
from tests.serving.access.keyring import NOW, Keyring


def test_a_key_is_256_random_bits_and_stored_as_its_hash_alone(keyring):
    secret = keyring.add()
    assert len(secret.removeprefix(keys.PREFIX)) == math.ceil(256 / 6)
    assert len({keys.new_secret() for _ in range(100)}) == 100
    text = keyring.path.read_text()
    assert secret not in text and secret.removeprefix(keys.PREFIX) not in text
    assert hashlib.sha256(secret.encode()).hexdigest() in text


def test_only_the_owner_may_read_the_file_also_after_a_change(keyring):
    keyring.add()
    os.chmod(keyring.path, 0o644)
    keyring.add()
    assert stat.S_IMODE(keyring.path.stat().st_mode) == 0o600


def test_a_key_is_found_by_itself_and_by_nothing_near_it(keyring):
    secret = keyring.add()
    found = keys.read(keyring.path)
    key = found.by_credential(secret)
    assert key is not None and key is found.by_id("key-0")
    for other in ("", secret[:-1], secret + "x", secret.upper(), key.sha256, keys.hashed(secret), "x" * 10_000,
                  "钥匙", "\udc80", f"certificate {key.name}"):
        assert found.by_credential(other) is None


def test_neither_key_nor_hash_is_in_a_repr(keyring):
    secret = keyring.add()
    key = keys.read(keyring.path).by_id("key-0")
    assert keys.hashed(secret) not in repr(key) and "测试" in repr(key)


@pytest.mark.parametrize("content, said", [
    ("", "JSON"), ("[]", "object"), ('{"keys": [], "tenant": {}}', "tenant: Extra inputs"),
    ('{"keys": [{"id": "a"}]}', "keys.0.name: Field required"),
    ('{"tenants": {"a": {"tokens_per_day": -1}}}', "tokens_per_day"),
])
def test_a_file_that_is_wrong_is_refused_with_the_field_at_fault(tmp_path, content, said):
    (tmp_path / "keys.json").write_text(content)
    with pytest.raises(UserError, match=said):
        keys.read(tmp_path / "keys.json")


@pytest.mark.parametrize("changes, said", [
    ({"role": "root"}, "'admin', 'developer', 'user' or 'read-only'"), ({"requests_per_minute": 0}, "greater"),
    ({"concurrent": "many"}, "valid integer"), ({"tenant": ""}, "at least 1"), ({"name": "a\nb"}, "pattern"),
    ({"created": "2026-01-01T00:00:00"}, "timezone"), ({"sha256": None}, "sha256 or a certificate"),
    ({"certificate": "a"}, "sha256 or a certificate"), ({"sha256": "abc"}, "pattern"), ({"id": "key-0"}, "twice"),
])
def test_a_key_that_is_wrong_is_refused_without_telling_its_hash(keyring, changes, said):
    keyring.add()
    text = json.loads(keyring.path.read_text())
    text["keys"].append({**text["keys"][0], "id": "key-1", "sha256": "f" * 64, **changes})
    keyring.path.write_text(json.dumps(text))
    with pytest.raises(UserError, match=said) as refused:
        keys.read(keyring.path)
    assert "fff" not in str(refused.value)


def test_the_same_key_twice_is_refused_unless_one_is_revoked(keyring):
    secret = keyring.add()
    with pytest.raises(ValueError, match="'key-7' and 'key-0' are the same key"):
        keyring.add(id="key-7", sha256=keys.hashed(secret))
    keyring.change("key-0", revoked=NOW)
    keyring.add(id="key-7", sha256=keys.hashed(secret))
    assert keys.read(keyring.path).by_credential(secret).id == "key-7"


def test_a_file_that_anybody_may_write_to_is_refused(keyring):
    os.chmod(keyring.path, 0o602)
    with pytest.raises(UserError, match="anybody may write"):
        keys.read(keyring.path)


def test_changes_that_come_together_are_all_kept(tmp_path):
    Keyring(tmp_path)

    def add(number: int) -> None:
        with keys.changed(tmp_path / "keys.json") as holder:
            key = Key(id=f"key-{number}", sha256=f"{number:064x}", name="x", role="user", created=NOW)
            holder[0] = KeySet(keys=(*holder[0].keys, key))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(40)))
    assert {key.id for key in keys.read(tmp_path / "keys.json").keys} == {f"key-{i}" for i in range(40)}


def test_a_change_that_fails_leaves_the_file_and_nothing_beside_it(keyring, monkeypatch):
    before = keyring.path.read_bytes()
    beside = set(os.listdir(keyring.folder))
    with pytest.raises(RuntimeError), keys.changed(keyring.path):
        raise RuntimeError

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="No space left"):
        keyring.add()
    assert keyring.path.read_bytes() == before and set(os.listdir(keyring.folder)) == beside


def test_a_link_stays_a_link(keyring, tmp_path):
    (tmp_path / "link.json").symlink_to(keyring.path)
    with keys.changed(tmp_path / "link.json") as holder:
        holder[0] = KeySet(tenants={"a": keys.Tenant(tokens_per_day=5)})
    assert (tmp_path / "link.json").is_symlink() and keys.read(keyring.path).tenants["a"].tokens_per_day == 5


def test_a_served_file_is_followed_and_a_broken_one_changes_nothing(keyring, caplog):
    first = keyring.add()
    watched = WatchedKeys(keyring.path)
    second = keyring.add()
    assert watched.now.by_credential(second).id == "key-1"

    good = keyring.path.read_text()
    for broken in (lambda: keyring.path.write_text(good[:-40]), keyring.path.unlink):
        broken()
        assert watched.now.by_credential(first) and watched.now.by_credential(second)
        assert caplog.text.count("the keys stay as they were") == 1
        caplog.clear()

    keyring.path.write_text(good.replace('"created"', f'"revoked": "{datetime.datetime.now(datetime.UTC)}", "created"'))
    assert watched.now.by_credential(first).revoked


def test_a_server_does_not_start_without_its_keys_file(tmp_path):
    with pytest.raises(UserError, match="can't read the keys file"):
        WatchedKeys(tmp_path / "none.json")
