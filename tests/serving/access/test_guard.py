"""Who comes in, what each role may do, and limits that requests which come together can't pass."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import datetime
import pathlib
import re
import threading
import time
import types

import pytest

import serving
from serving.access import policy, quotas
from serving.access.guard import Guard, Refused
from serving.access.identity import ACTIONS, ROLES, Identity
from serving.access.limits import Rates
from serving.access.quotas import FILE
from serving.errors import Reason, Rejected
from serving.state import BUSY_S
from tests.serving.access.keyring import NOW
from tests.serving.doubles import wait_until

DAY_S = 86400


def refused(call, *arguments, **options) -> Rejected:
    """How a call of the guard is refused."""
    with pytest.raises(Rejected) as found, contextlib.ExitStack() as entered:
        result = call(*arguments, **options)
        if hasattr(result, "__enter__"):
            entered.enter_context(result)
    return found.value


def use(guard: Guard, identity: Identity, tokens: int) -> None:
    with guard.enter(identity) as place:
        place.charge(tokens)


def is_over_quota(guard: Guard, identity: Identity) -> bool:
    try:
        with guard.enter(identity):
            return False
    except Rejected as error:
        return error.reason is Reason.OVER_QUOTA


def test_an_open_guard_lets_everybody_do_everything():
    guard = Guard.open()
    identity = guard.identify("whatever a client sends")
    assert guard.is_open and identity == guard.identify(None) == guard.resume("") == Identity()
    for action in ACTIONS:
        guard.authorize(identity, action)
    with guard.enter(identity) as place:
        place.reserve(10**12)
        place.charge(10**12)
    guard.close()


def test_a_keys_file_without_a_key_lets_nobody_in(keyring):
    guard = keyring.guard()
    assert not guard.is_open
    assert refused(guard.identify, None).reason is Reason.UNAUTHENTICATED


def test_a_key_says_who_it_is(keyring):
    secret = keyring.add("developer", tenant="网站", name="笔记本")
    assert keyring.guard().identify(secret) == Identity("key-0", "笔记本", "网站", "developer")


def test_no_wrong_revoked_and_expired_keys(keyring):
    good, expiring = keyring.add(), keyring.add(expires=NOW + datetime.timedelta(hours=1))
    guard = keyring.guard()
    assert "an API key is needed" in refused(guard.identify, None).message
    assert refused(guard.identify, "").message == refused(guard.identify, None).message
    wrong = refused(guard.identify, good[:-1])
    assert (wrong.reason, wrong.message) == (Reason.UNAUTHENTICATED, "the API key is not valid")

    guard.identify(expiring)
    keyring.now += 3600
    expired = refused(guard.identify, expiring)
    assert isinstance(expired, Refused) and expired.identity.key_id == "key-1"  # for the audit line
    assert (expired.reason, expired.message) == (Reason.UNAUTHENTICATED, "the API key expired on 2026-11-23 23:30 UTC")

    identity = guard.identify(good)
    keyring.change("key-0", revoked=NOW)
    for call in (lambda: guard.identify(good), lambda: guard.resume("key-0"), lambda: guard.enter(identity)):
        assert refused(call).message == wrong.message
    assert good not in repr(wrong) + str(wrong) + repr(vars(wrong))


def test_work_left_behind_goes_on_under_its_key_while_that_is_good(keyring):
    keyring.add(tenant="a")
    guard = keyring.guard()
    assert guard.resume("key-0").tenant == "a"
    for unknown in ("", "key-9"):
        assert refused(guard.resume, unknown).reason is Reason.UNAUTHENTICATED


def test_a_certificate_stands_for_a_key_and_a_sent_key_counts_first(keyring):
    keyring.add("admin", certificate="worker-1")
    secret = keyring.add("read-only")
    guard = keyring.guard()
    assert guard.identify(None, "worker-1").role == "admin"
    assert guard.identify(secret, "worker-1").role == "read-only"
    for credential, certificate in (("wrong", "worker-1"), (None, "worker-2"), ("certificate worker-1", None)):
        assert refused(guard.identify, credential, certificate).message == "the API key is not valid"


def test_roles_may_do_what_the_policy_says():
    may = {role: {action for action in ACTIONS if role in policy.allowed()[action]} for role in ROLES}
    assert may["read-only"] == {"read"}
    assert may["user"] == {"read", "generate", "embed"}
    assert may["developer"] == may["user"] | {"files", "batch", "metrics"}
    assert may["admin"] == may["developer"] == set(ACTIONS)


def test_every_action_guards_something():
    """What a door asks the guard for is an action, and each action is asked for by a door."""
    folder = pathlib.Path(serving.__file__).parent
    asked = {action for path in folder.rglob("*.py") for action in re.findall(
        r'(?:make_router\(calls,|admitted\([^\n]*?,|@method\()\s*"(\w+)"', path.read_text(encoding="utf-8"))}
    assert asked == set(ACTIONS)


def test_a_lesser_role_is_told_who_may():
    error = refused(Guard.open().authorize, Identity("key-0", "x", "a", "user"), "batch")
    assert error.reason is Reason.FORBIDDEN
    assert error.message == "the role 'user' may not do this ('batch'); these may: admin, developer"


def test_rate_is_of_any_minute_and_a_refused_request_does_not_count(keyring, monkeypatch):
    guard = keyring.guard()
    clock = types.SimpleNamespace(now=1_800_000_030.0)  # in the middle of a minute
    monkeypatch.setattr(time, "time", lambda: clock.now)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    identity = guard.identify(keyring.add(requests_per_minute=3))
    for _ in range(3):
        with guard.enter(identity):
            clock.now += 10
    for _ in range(5):
        error = refused(guard.enter, identity)
        assert (error.reason, error.message) == (Reason.RATE_LIMITED, "this key may make 3 requests a minute")
    assert error.retry_after_s == pytest.approx(30)
    clock.now += 29.9
    refused(guard.enter, identity)
    clock.now += 0.2
    with guard.enter(identity):
        refused(guard.enter, identity)  # the next has to wait for the second of the three


def test_a_request_refused_for_its_rate_takes_no_place(keyring, monkeypatch):
    guard = keyring.guard()
    now = time.time()
    identity = guard.identify(keyring.add(requests_per_minute=1, concurrent=1))
    with guard.enter(identity):
        pass
    for _ in range(3):
        assert "a minute" in refused(guard.enter, identity).message
    monkeypatch.setattr(time, "time", lambda: now + 61)
    with guard.enter(identity):
        assert "at once" in refused(guard.enter, identity).message


def test_a_clock_that_is_set_back_locks_nobody_out(keyring, monkeypatch):
    guard = keyring.guard()
    identity = guard.identify(keyring.add(requests_per_minute=1))
    now, running = time.time(), time.monotonic()
    monkeypatch.setattr(time, "time", lambda: now)
    with guard.enter(identity):
        refused(guard.enter, identity)
    monkeypatch.setattr(time, "time", lambda: now - 3600)
    monkeypatch.setattr(time, "monotonic", lambda: running)
    with guard.enter(identity):
        refused(guard.enter, identity)


def test_counting_starts_no_thread_and_keeps_no_more_than_it_needs(monkeypatch):
    rates = Rates()
    monkeypatch.setattr(threading.Thread, "start", None)
    clock = types.SimpleNamespace(now=1_800_000_000.0)
    monkeypatch.setattr(time, "time", lambda: clock.now)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    for _ in range(500):
        assert rates.hit("key-0", 10) is None
        clock.now += 6.1
    assert [len(events) for events in rates._storage.events.values()] == [10]


def test_each_key_has_a_rate_of_its_own(keyring):
    guard = keyring.guard()
    first, second = (guard.identify(keyring.add(requests_per_minute=1)) for _ in range(2))
    with guard.enter(first), guard.enter(second):
        refused(guard.enter, first)


def test_requests_at_once_are_given_back_however_they_end(keyring):
    guard = keyring.guard()
    identity = guard.identify(keyring.add(concurrent=2))
    for _ in range(3):
        with pytest.raises(KeyError), guard.enter(identity), guard.enter(identity):
            error = refused(guard.enter, identity)
            assert (error.reason, error.message) == (Reason.RATE_LIMITED, "this key may have 2 requests at once")
            raise KeyError


def test_lines_of_a_batch_count_for_quotas_alone(keyring):
    guard = keyring.guard()
    identity = guard.identify(keyring.add(concurrent=1, requests_per_minute=1, tokens_per_day=10))
    with guard.enter(identity), guard.enter(identity, counted=False), guard.enter(identity, counted=False) as place:
        place.charge(10)
    assert refused(guard.enter, identity, counted=False).reason is Reason.OVER_QUOTA


class SlowCounter(collections.Counter):
    """Lets other threads in between a look at a count and its change."""

    def __getitem__(self, name):
        found = super().__getitem__(name)
        time.sleep(0.002)
        return found


def test_requests_that_come_together_pass_no_limit(keyring):
    guard = keyring.guard()
    guard._concurrency._running = SlowCounter()
    guard._quotas._reserved = SlowCounter()
    at_once = guard.identify(keyring.add(concurrent=5))
    in_a_minute = guard.identify(keyring.add(requests_per_minute=7))
    tokens = guard.identify(keyring.add(tokens_per_day=1000))
    entered, leave = {at_once: 0, in_a_minute: 0, tokens: 0}, threading.Barrier(48 + 1)
    lock = threading.Lock()

    def ask(identity: Identity) -> None:
        with contextlib.suppress(Rejected), guard.enter(identity) as place:
            place.reserve(300)
            with lock:
                entered[identity] += 1
            leave.wait(20)
            return
        leave.wait(20)

    with concurrent.futures.ThreadPoolExecutor(48) as pool:
        for identity in [*entered] * 16:
            pool.submit(ask, identity)
        leave.wait(20)
    assert entered == {at_once: 5, in_a_minute: 7, tokens: 3}


def test_a_tenant_s_quota_is_of_all_its_keys_and_renewed_at_midnight(keyring):
    keyring.quota("网站", tokens_per_day=100)
    guard = keyring.guard()
    first, second = (guard.identify(keyring.add(tenant="网站")) for _ in range(2))
    other = guard.identify(keyring.add(tenant="b"))
    use(guard, first, 60)
    use(guard, second, 40)
    error = refused(guard.enter, first)
    assert error.reason is Reason.OVER_QUOTA and error.retry_after_s == 5400
    assert error.message == ("the tenant '网站' has a quota of 100 tokens a day, renewed at 2026-11-24 00:00 UTC: "
                             "all are used")
    use(guard, other, 10**6)
    with guard.enter(first, "read"):  # uses none
        pass
    keyring.now += 5400
    use(guard, first, 1)


def test_a_month_ends_with_it(keyring):
    keyring.quota("default", tokens_per_month=10)
    guard = keyring.guard()
    identity = guard.identify(keyring.add())
    use(guard, identity, 10)
    keyring.now += 7 * DAY_S
    error = refused(guard.enter, identity)
    assert "a quota of 10 tokens a month, renewed at 2026-12-01 00:00 UTC" in error.message
    keyring.now += DAY_S
    use(guard, identity, 1)


def test_what_running_requests_may_use_is_not_given_twice(keyring):
    guard = keyring.guard()
    identity = guard.identify(keyring.add(tokens_per_day=100))
    with guard.enter(identity) as first:
        first.reserve(70)
        with guard.enter(identity) as second:
            error = refused(second.reserve, 31)
            assert (error.reason, error.field) == (Reason.OVER_QUOTA, "max_tokens")
            assert "100 are left (70 of them set aside for running requests), and this request may take 31" in \
                error.message
            second.reserve(30)
        first.charge(20)
    with guard.enter(identity) as third:
        refused(third.reserve, 81)
        third.reserve(80)


def test_used_tokens_outlive_the_server_and_are_shared_by_several(keyring, tmp_path):
    secret = keyring.add(tokens_per_day=100)
    first, second = keyring.guard(tmp_path / "state"), keyring.guard(tmp_path / "state")
    identity = first.identify(secret)
    use(second, identity, 1)
    use(first, identity, 60)
    use(second, identity, 39)
    for guard in (first, second):
        assert wait_until(lambda guard=guard: is_over_quota(guard, identity))
    for guard in (first, second):
        guard.close()
    again = keyring.guard(tmp_path / "state")
    assert is_over_quota(again, identity)
    again.close()
    assert (tmp_path / "state" / FILE).stat().st_mode & 0o777 == 0o600
    keyring.now += 100 * DAY_S
    keyring.guard(tmp_path / "state").close()  # what is long over is forgotten
    keyring.now -= 100 * DAY_S
    late = keyring.guard(tmp_path / "state")
    assert not is_over_quota(late, identity)
    late.close()


def test_counts_in_memory_are_of_this_month_alone(monkeypatch):
    monkeypatch.setattr(quotas, "_MAX_SEEN", 20)
    found = quotas.Quotas()
    for day in range(400):
        found.charge({"tenant": "a", "key": "b"}, 1, NOW + datetime.timedelta(days=day))
    assert len(found._unwritten) <= 24
    now = NOW + datetime.timedelta(days=399)
    assert found.short([quotas.Quota("tenant", "a", "month", now.day)], 0, now) is None
    assert found.short([quotas.Quota("tenant", "a", "month", now.day)], 1, now).used == now.day


def test_a_disk_that_is_slow_delays_nobody(keyring, tmp_path):
    guard = keyring.guard(tmp_path / "state")
    identity = guard.identify(keyring.add(tokens_per_day=1000))
    with guard._quotas._written.transaction():  # as if a commit took so long
        began = time.monotonic()
        for _ in range(10):
            use(guard, identity, 100)
        assert is_over_quota(guard, identity)
        assert time.monotonic() - began < 5 < BUSY_S
    guard.close()
    guard = keyring.guard(tmp_path / "state")
    assert is_over_quota(guard, identity)
    guard.close()


def test_a_disk_that_refuses_gives_nobody_more_tokens(keyring, tmp_path, caplog):
    guard = keyring.guard(tmp_path / "state")
    identity = guard.identify(keyring.add(tokens_per_day=100))
    use(guard, identity, 30)
    assert wait_until(lambda: not guard._quotas._unwritten)
    guard._quotas._written.close()
    guard._quotas._read.close()
    use(guard, identity, 70)
    assert wait_until(lambda: "can't be written down" in caplog.text)
    assert is_over_quota(guard, identity)
    guard._quotas._seen = {count: (-10.0, seen) for count, (_, seen) in guard._quotas._seen.items()}
    assert is_over_quota(guard, identity) and "can't be read" in caplog.text


def test_what_the_command_line_asks_for(keyring, tmp_path):
    options = types.SimpleNamespace(keys_file=str(keyring.path), audit_file=None, state_dir=str(tmp_path / "s"))
    guard = Guard.from_options(options)
    assert not guard.is_open and (tmp_path / "s" / "audit.jsonl").exists()
    guard.close()
    options = types.SimpleNamespace(keys_file=None, audit_file=None, state_dir=None)
    assert Guard.from_options(options).is_open
