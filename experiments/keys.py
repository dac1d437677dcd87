"""API keys of a server: makes, lists and revokes them, and sets the quotas of tenants.

A server that runs with the same --keys_file follows the file: a revoked key is refused from the next request on.
"""

from __future__ import annotations

import json as json_lib
import pathlib
import sys
import time

if not __package__:
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from experiments import cli  # noqa: E402
from llm_jax.errors import UserError  # noqa: E402

EXAMPLES = (
    "python -m experiments.keys create --keys_file=keys.json --name=laptop --role=developer --days=90",
    "python -m experiments.keys create --keys_file=keys.json --name=网站 --tenant=web --requests_per_minute=600",
    "python -m experiments.keys quota --keys_file=keys.json --tenant=web --tokens_per_day=5000000",
    "python -m experiments.keys list --keys_file=keys.json",
    "python -m experiments.keys revoke --keys_file=keys.json --id=key-1f6c0a92",
    "python -m experiments.serve --run_dir=runs/quickstart --http_port=8000 --keys_file=keys.json",
)


def create(keys_file: str, name: str, role: str = "user", tenant: str = "default", days: float | None = None,
           requests_per_minute: int | None = None, concurrent: int | None = None, tokens_per_day: int | None = None,
           certificate: str | None = None, json: bool = False) -> None:
    """Makes a key and prints it, this once: the file holds its hash.

    Args:
      keys_file: JSON file of keys, made if there is none; readable by its owner alone
      name: what it is for
      role: admin, developer, user or read-only
      tenant: whose it is: caches, files, batches and quotas are the tenant's own
      days: until it expires; without, it doesn't
      requests_per_minute: limit
      concurrent: requests at once, limit
      tokens_per_day: of prompts and completions in a UTC day, limit
      certificate: common name of a client certificate that stands for a key, with --tls_client_ca; no key is made
      json: print one JSON object instead of lines
    """
    import pydantic

    from serving.access import keys

    if days is not None and not 0 < days <= 36500:
        raise UserError(f"days={days} must lie between 0 and 36500")
    secret = keys.new_secret() if certificate is None else None
    now = time.time()
    with keys.changed(keys_file) as holder:
        try:
            key = keys.Key(
                id=keys.new_id(), sha256=keys.hashed(secret) if secret else None, certificate=certificate, name=name,
                tenant=tenant, role=role, created=keys.utc(now),
                expires=None if days is None else keys.utc(now + days * 86400),
                requests_per_minute=requests_per_minute, concurrent=concurrent, tokens_per_day=tokens_per_day)
            holder[0] = keys.KeySet(keys=(*holder[0].keys, key), tenants=holder[0].tenants)
        except pydantic.ValidationError as error:
            raise UserError(keys.first_fault(error)) from None
    if json:
        print(json_lib.dumps({**_shown(key), "key": secret}, ensure_ascii=False))
        return
    print(_line(key))
    print(f"{secret}\nThis is the key. It is shown this once." if secret else f"certificate: {certificate}")


def list_(keys_file: str, json: bool = False) -> None:
    """Prints the keys, without what they are made of, and the quotas of tenants.

    Args:
      keys_file: JSON file of keys
      json: print one JSON object instead of lines
    """
    from serving.access import keys

    found = keys.read(keys_file)
    if json:
        print(json_lib.dumps({"keys": [_shown(key) for key in found.keys],
                              "tenants": {name: tenant.model_dump() for name, tenant in found.tenants.items()}},
                             ensure_ascii=False))
        return
    for key in found.keys:
        print(_line(key))
    for name, tenant in found.tenants.items():
        print(f"tenant {name}: {_limits(tenant.model_dump())}")


def revoke(keys_file: str, id: str) -> None:
    """Ends a key. It stays in the file, so that its id in old audit lines can be explained.

    Args:
      keys_file: JSON file of keys
      id: of the key, as create and list print it
    """
    from serving.access import keys

    with keys.changed(keys_file) as holder:
        key = holder[0].by_id(id)
        if key is None:
            known = ", ".join(key.id for key in holder[0].keys) or "none"
            raise UserError(f"no key of {keys_file} has the id {id!r}; there are {known}")
        ended = key if key.revoked else key.model_copy(update={"revoked": keys.utc(time.time())})
        holder[0] = keys.KeySet(keys=tuple(ended if k is key else k for k in holder[0].keys), tenants=holder[0].tenants)
    print(_line(ended))


def quota(keys_file: str, tenant: str, tokens_per_day: int | None = None, tokens_per_month: int | None = None) -> None:
    """Sets what all keys of a tenant may use together; without a number there is no limit.

    Args:
      keys_file: JSON file of keys
      tenant: its name
      tokens_per_day: of prompts and completions in a UTC day
      tokens_per_month: of prompts and completions in a UTC month
    """
    import pydantic

    from serving.access import keys

    with keys.changed(keys_file) as holder:
        try:
            limits = keys.Tenant(tokens_per_day=tokens_per_day, tokens_per_month=tokens_per_month)
            holder[0] = keys.KeySet(keys=holder[0].keys, tenants={**holder[0].tenants, tenant: limits})
        except pydantic.ValidationError as error:
            raise UserError(keys.first_fault(error)) from None
    print(f"tenant {tenant}: {_limits(limits.model_dump())}")


def _shown(key) -> dict:
    return key.model_dump(mode="json", exclude={"sha256"}, exclude_none=True)


def _line(key) -> str:
    if key.revoked:
        state = f"revoked {key.revoked:%Y-%m-%d}"
    elif key.expires:
        state = f"{'expired' if key.expires.timestamp() <= time.time() else 'until'} {key.expires:%Y-%m-%d}"
    else:
        state = "good"
    limits = _limits(key.model_dump(include={"requests_per_minute", "concurrent", "tokens_per_day"}))
    return f"{key.id}  {state:<18}  {key.role:<9}  tenant {key.tenant}  {key.name!r}  {limits}"


def _limits(limits: dict) -> str:
    return ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in limits.items() if value) or "no limits"


COMMANDS = {"create": create, "list": list_, "revoke": revoke, "quota": quota}


def main(argv=None) -> int:
    """Runs the command that the first argument names; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = COMMANDS.get(arguments[0]) if arguments else None
    if command is None:
        is_help = bool(arguments) and arguments[0] in ("-h", "--help")
        said = "\n".join((
            f"usage: python -m experiments.keys {'|'.join(COMMANDS)} --keys_file=FILE [--help]", "",
            (__doc__ or "").strip(), "", "commands, whose own --help lists their flags:",
            *(f"  {name:<8}  {(function.__doc__ or '').splitlines()[0]}" for name, function in COMMANDS.items()), "",
            "examples:", *(f"  {line}" for line in EXAMPLES)))
        if not is_help:
            unknown = f"there is no command {arguments[0]!r}; " if arguments else ""
            raise UserError(f"{unknown}say what to do first: {', '.join(COMMANDS)}\n{said}")
        print(said)
        return 0
    root = f"experiments.keys:{command.__name__}"
    return cli.gin_main(root, (), arguments[1:], description=command.__doc__ or "", examples=EXAMPLES, flags=True,
                        command=arguments[0])


if __name__ == "__main__":
    sys.exit(cli.run(main))
