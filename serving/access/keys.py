"""API keys: what one is made of, and the file that knows them by their hashes.

A key is a public prefix and 256 bits from the system's random source. Its SHA-256 is all that is stored, and a key is
found by looking its hash up. A slow hash (scrypt, Argon2) is for passwords, which can be guessed; nobody guesses 256
bits, and a hash that took 50 ms would let anybody without a key keep the server busy. The look-up compares hashes,
which no caller can steer, so the time it takes says nothing of the keys.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import logging
import os
import pathlib
import secrets
import stat
import tempfile
from collections.abc import Iterator
from typing import Annotated, Literal

import pydantic

from llm_jax.errors import UserError

log = logging.getLogger(__name__)

PREFIX = "sk-lljx-"  # by which logs leave it out (serving/logs.py), and scanners find one that was published
MAX_CREDENTIAL_CHARACTERS = 512  # more is no key, and isn't hashed
_ONLY_OWNER = 0o600

Label = Annotated[str, pydantic.Field(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f]*$")]
Limit = Annotated[int, pydantic.Field(ge=1, le=10**15)] | None
PerMinute = Annotated[int, pydantic.Field(ge=1, le=100_000)] | None
_CLOSED = pydantic.ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class Key(pydantic.BaseModel):
    """What is known of a key.

    Attributes:
      id: public, for logs and for revoking.
      sha256: of the whole key, hexadecimal; None for a caller that is known by its certificate.
      certificate: common name of the client certificate that stands for a key, where mutual TLS is on; None for a key.
      name: what its maker called it.
      tenant: whose it is.
      role: one of `identity.ROLES`.
      created, expires, revoked: expires and revoked are None while it is good.
      requests_per_minute: in any 60 seconds; None is no limit.
      concurrent: requests at once.
      tokens_per_day: of prompts and completions, in a UTC day.
    """

    model_config = _CLOSED

    id: Label
    sha256: str | None = pydantic.Field(default=None, pattern="^[0-9a-f]{64}$", repr=False)
    certificate: Label | None = None
    name: Label
    tenant: Label = "default"
    role: Literal["admin", "developer", "user", "read-only"]
    created: pydantic.AwareDatetime
    expires: pydantic.AwareDatetime | None = None
    revoked: pydantic.AwareDatetime | None = None
    requests_per_minute: PerMinute = None
    concurrent: Limit = None
    tokens_per_day: Limit = None

    @pydantic.model_validator(mode="after")
    def _is_found_by_one_thing(self) -> Key:
        if (self.sha256 is None) == (self.certificate is None):
            raise ValueError("must have a sha256 or a certificate, and not both")
        return self


class Tenant(pydantic.BaseModel):
    """What all keys of a tenant may use together: tokens in a UTC day and month; None is no limit."""

    model_config = _CLOSED

    tokens_per_day: Limit = None
    tokens_per_month: Limit = None


class KeySet(pydantic.BaseModel):
    """The content of a keys file, looked up by hash, certificate or id."""

    model_config = _CLOSED

    keys: tuple[Key, ...] = ()
    tenants: dict[Label, Tenant] = {}
    _by_proof: dict[str, Key] = pydantic.PrivateAttr(default_factory=dict)
    _by_id: dict[str, Key] = pydantic.PrivateAttr(default_factory=dict)

    @pydantic.model_validator(mode="after")
    def _index(self) -> KeySet:
        for key in self.keys:
            proof = key.sha256 or f"certificate {key.certificate}"
            if key.id in self._by_id:
                raise ValueError(f"the id {key.id!r} occurs twice")
            if proof in self._by_proof and key.revoked is None and self._by_proof[proof].revoked is None:
                raise ValueError(f"{key.id!r} and {self._by_proof[proof].id!r} are the same key or certificate")
            self._by_id[key.id] = key
            if proof not in self._by_proof or key.revoked is None:
                self._by_proof[proof] = key
        return self

    def by_credential(self, credential: str) -> Key | None:
        """The key that was sent, also if it is no longer good."""
        return None if len(credential) > MAX_CREDENTIAL_CHARACTERS else self._by_proof.get(hashed(credential))

    def by_certificate(self, common_name: str) -> Key | None:
        """What stands for a verified certificate of this common name."""
        return self._by_proof.get(f"certificate {common_name}")

    def by_id(self, key_id: str) -> Key | None:
        """The key of a public id."""
        return self._by_id.get(key_id)


def hashed(secret: str) -> str:
    """What is stored of a key."""
    return hashlib.sha256(secret.encode("utf-8", "backslashreplace")).hexdigest()


def new_secret() -> str:
    """A key: `PREFIX` and 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def new_id() -> str:
    """A public id."""
    return f"key-{secrets.token_hex(4)}"


def read(path: str | os.PathLike) -> KeySet:
    """The keys of a file.

    Raises:
      UserError: it can't be read, is no keys file, or somebody else could put keys into it.
    """
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read()
    except OSError as error:
        raise UserError(f"can't read the keys file {path}: {error.strerror or error}") from None
    if mode & stat.S_IWOTH:
        raise UserError(f"anybody may write to the keys file {path}: chmod 600 it, and look at what is in it")
    try:
        return KeySet.model_validate_json(content)
    except pydantic.ValidationError as error:
        raise UserError(f"{path} is not a keys file: {first_fault(error)}") from None


def first_fault(error: pydantic.ValidationError) -> str:
    """Field and fault, without the value."""
    fault = error.errors(include_url=False, include_input=False)[0]
    return ": ".join(filter(None, (".".join(map(str, fault["loc"])), fault["msg"])))


@contextlib.contextmanager
def changed(path: str | os.PathLike) -> Iterator[list[KeySet]]:
    """The keys of a file, in a list of one, to be replaced there by what the file shall hold.

    One change at a time, whoever makes it; a reader sees the old file or the new one, and only its owner may read it.
    If the body raises, nothing is written.

    Raises:
      UserError: as `read`, or it can't be written.
    """
    path = pathlib.Path(os.path.realpath(os.path.expanduser(path)))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _ONLY_OWNER)
    except OSError as error:
        raise UserError(f"can't write beside {path}: {error.strerror or error}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        holder = [read(path) if path.exists() else KeySet()]
        yield holder
        try:
            _write(path, holder[0].model_dump_json(indent=2, exclude_none=True).encode() + b"\n")
        except OSError as error:
            raise UserError(f"can't write {path}: {error.strerror or error}") from None
    finally:
        os.close(lock)


def _write(path: pathlib.Path, content: bytes) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)  # made 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            with contextlib.suppress(FileNotFoundError, PermissionError):  # root changes it, another user serves
                before = path.stat()
                os.fchown(file.fileno(), before.st_uid, before.st_gid)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


class WatchedKeys:
    """The keys of a file that may change while it is served: a revoked key is refused from the next request on.

    A file that can't be read any more, or is wrong, changes nothing but is told in the log: the keys that were
    good stay so, and no key is ever good because a file is missing.

    Raises:
      UserError: at the start, as `read`.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self._path = os.path.expanduser(path)
        self._version = self._look()
        self._keys = read(self._path)

    @property
    def now(self) -> KeySet:
        """The keys as the file has them."""
        version = self._look()
        if version != self._version:
            self._version = version
            try:
                self._keys = read(self._path)
            except UserError as error:
                log.error("the keys stay as they were: %s", error)
        return self._keys

    def _look(self) -> tuple[int, ...]:
        try:
            found = os.stat(self._path)
        except OSError:
            return ()
        return found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_mode


def utc(time_s: float) -> datetime.datetime:
    """A moment, from seconds since 1970, cut to whole seconds."""
    return datetime.datetime.fromtimestamp(int(time_s), datetime.UTC)
