"""Chat templates: Jinja, sandboxed, with what transformers gives a template and nothing else."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from llm_jax.data.tokenizers import folder
from llm_jax.errors import UserError


def templates(files: folder.Files) -> dict[str, str]:
    """The chat templates by name; a single one is "default".

    The files chat_template.jinja and additional_chat_templates/NAME.jinja go before tokenizer_config.json's.

    Raises:
      UserError: what the files say is no template.
    """
    found = {}
    for path, content in files.contents.items():
        inside = path.startswith(f"{folder.TEMPLATES}/")
        if inside or path == folder.TEMPLATE:
            try:
                name = path.removeprefix(f"{folder.TEMPLATES}/").removesuffix(".jinja") if inside else "default"
                found[name] = content.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{files.beside(path)} is not UTF-8 text: {error.reason}") from error
    if found:
        return found
    value = files.config.get("chat_template")
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(isinstance(item, dict) and isinstance(item.get("name"), str)
                                       and isinstance(item.get("template"), str) for item in value):
        return {item["name"]: item["template"] for item in value}
    raise UserError(f"{files.beside(folder.CONFIG)}: chat_template must be a template or a list of named ones, not "
                    f"{value!r:.80}")


def render(files: folder.Files, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None,
           add_generation_prompt: bool, template: str | None, variables: Mapping[str, Any]) -> str:
    """Renders a conversation; see `Tokenizer.render_chat`.

    Of several templates, unless one is named, "tool_use" is taken when there are tools, else "default".
    """
    known = templates(files)
    if template is not None and template not in known:
        raise UserError(f"{files.where}: the tokenizer has no chat template {template!r:.80}; those it has: "
                        f"{', '.join(sorted(known)) or 'none'}")
    source = known.get(template or ("tool_use" if tools is not None and "tool_use" in known else "default"))
    if source is None:
        others = f" (only {', '.join(sorted(known))})" if known else ""
        raise UserError(f"{files.where}: the tokenizer has no chat template{others}; render the conversation yourself, "
                        f"or put a {folder.TEMPLATE} beside it")
    for message in messages:
        if not isinstance(message, Mapping):
            raise UserError(f"a chat message must be a mapping with role and content, not {message!r:.80}")
    try:
        return _compiled(source).render(
            **_plain(dict(variables)), messages=_plain(list(messages)),
            tools=None if tools is None else _plain(list(tools)), add_generation_prompt=add_generation_prompt)
    except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError,
            RecursionError) as error:
        raise UserError(f"the chat template of {files.where} refuses: {error}") from error


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`, which marks what the assistant says for training: its body as it is."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A scope, as in transformers, where the body is a call block: what is set inside stays inside.
        return jinja2.nodes.Scope(body).set_lineno(line)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's, without names that reach into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # noqa: B902 - a template may set a variable called self
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _Namespace._check(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r}")


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None,
            separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    # Jinja's own escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise, strftime_now=_now, namespace=_Namespace)
    return environment.from_string(source)


def _plain(value: Any) -> Any:
    """`value` out of JSON's own types: a template must not get hold of objects with methods that do things."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value) if type(value) in (list, tuple) else [
            _plain(item) for item in value]
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, bool | int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    raise TypeError(f"a chat holds text, numbers, lists and mappings, not {type(value).__name__}")
