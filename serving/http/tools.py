"""The functions that a request offers: what the template sees of them, and what the model must write."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llm_jax.data.tokenizer import Tokenizer
from llm_jax.data.tokenizers import chat as templates
from llm_jax.errors import UserError
from llm_jax.inference.request import Constraint
from serving.http.tool_formats import FORMATS, PLAIN, Format, Spelling, detected

MAX_TOOLS = 128
_SPACE = r"[\x20\x0A\x0D\x09]{1,32}"  # between the parts of a JSON text: enough to indent by
_ANYTHING = r"/(.|\n)*/"


@dataclasses.dataclass(frozen=True)
class Function:
    """A function that the model may call.

    Attributes:
      name: letters, digits, "_" and "-".
      description: for the model.
      parameters: JSON schema of its arguments; None takes any.
      strict: whether arguments must follow the schema.
    """

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    strict: bool = False

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it."""
        said = {"name": self.name, "description": self.description or "",
                "parameters": self.parameters or {"type": "object", "properties": {}}}
        return {"type": "function", "function": said}


@dataclasses.dataclass(frozen=True)
class ToolSyntax:
    """How a model reads and writes calls.

    Attributes:
      format: of its calls.
      tokens: the texts of those control tokens that are part of it, by id; decoding drops them.
    """

    format: Format
    tokens: Mapping[int, str]

    @staticmethod
    def of(tokenizer: Any, named: str | None = None) -> ToolSyntax | None:
        """The syntax of a model; None if its chat template has none that is known.

        Args:
          tokenizer: the model's.
          named: a format's name, which counts instead of what the template looks like.

        Raises:
          UserError: there is no format of that name.
        """
        if named is not None and named not in FORMATS:
            raise UserError(f"tool_format must be one of {', '.join(FORMATS)}, not {named!r}")
        if not getattr(tokenizer, "chat_template", None):
            return None
        sources = [source for source in templates.templates(tokenizer.files).values() if "tools" in source]
        found = (FORMATS[named] if named else detected(sources)) if sources else None
        return None if found is None else ToolSyntax(found, _control_tokens(tokenizer, found.markers))


@dataclasses.dataclass(frozen=True)
class Toolbox:
    """The functions of one request.

    Attributes:
      syntax: the model's.
      functions: those that may be called.
      choice: "auto", "required", or the name of the one that must be called.
      parallel: whether there may be more than one call, unless one function is named.
      shown: those that the template is shown, if not the same.
    """

    syntax: ToolSyntax
    functions: tuple[Function, ...]
    choice: str = "auto"
    parallel: bool = True
    shown: tuple[Function, ...] = ()

    @property
    def forced(self) -> bool:
        """Whether the answer consists of calls."""
        return self.choice != "auto"

    @property
    def many(self) -> bool:
        """Whether there may be more than one call."""
        return self.parallel and self.choice in ("auto", "required")

    @functools.cached_property
    def format(self) -> Format:
        """Of the answer: calls that are asked for are always JSON, which a grammar can hold to the schemas."""
        one = self.syntax.format
        return PLAIN if self.forced and one.spelling is None else one

    @property
    def prompt(self) -> str:
        """What is put behind the prompt, and the model goes on from."""
        return self._spelling.prompt if self.forced else ""

    def for_template(self) -> list[dict[str, Any]]:
        """The functions as the template is given them."""
        return [one.for_template() for one in self.shown or self.functions]

    def constraint(self, answer: Mapping[str, Any] | None = None) -> Constraint | None:
        """What the completion must be so that the request gets what it asks for; None if it may be anything.

        Args:
          answer: JSON schema of the content, if it has one.
        """
        if self.forced:
            return _grammar(self._rules(), ["start: calls"])
        spelling = self.format.spelling
        if spelling is None:  # calls are then as the model writes them
            return None if answer is None else json_constraint(answer)
        opener = f"{_quoted(spelling.prompt)} " if spelling.prompt else ""
        if answer is not None:
            return _grammar(self._rules(), [f"start: answer | {opener}calls", f"answer: {_json(answer)}"])
        # A control token is no text: no grammar can tell what stands behind it.
        if not any(one.strict for one in self.functions) or spelling.prompt in self.syntax.tokens.values():
            return None
        if not spelling.prompt:
            return _grammar(self._rules(), ["start: calls | other", r"other: /[ \t\r\n]*([^{ \t\r\n](.|\n)*)?/"])
        return _grammar(self._rules(), ["start: call_after_text* after", "call_after_text: before calls",
                                        f"before[suffix={_quoted(spelling.prompt)}]: {_ANYTHING}",
                                        f"after: {_ANYTHING}"])

    @property
    def _spelling(self) -> Spelling:
        return self.format.spelling or Spelling()

    def _rules(self) -> list[str]:
        """The rule `calls`, and those below it."""
        spelling = self._spelling
        wanted = [one for one in self.functions if self.choice in ("auto", "required", one.name)]
        more = f" ({' '.join(_pieces(spelling.between))} call)*" if self.many else ""
        rules = [" ".join(["calls:", *_pieces(spelling.begin), "call" + more, *_pieces(spelling.end)]),
                 "call: " + " | ".join(f"call_{i}" for i in range(len(wanted)))]
        for i, one in enumerate(wanted):
            before = spelling.before_name + one.name + spelling.before_arguments
            loose = self.choice == "auto" and not one.strict
            schema = {"type": "object"} | dict({} if loose else one.parameters or {})
            rules += [" ".join([f"call_{i}:", *_pieces(before), f"arguments_{i}", *_pieces(spelling.after)]),
                      f"arguments_{i}: {_json(schema)}"]
        return rules


def json_constraint(schema: Mapping[str, Any]) -> Constraint:
    """The completion is JSON of this schema."""
    return Constraint("json_schema", json.dumps(schema, ensure_ascii=False))


def _grammar(rules: list[str], start: list[str]) -> Constraint:
    return Constraint("grammar", "\n".join([*start, *rules]))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _pieces(text: str) -> list[str]:
    """Literals for the parts of a JSON text: in a grammar that also holds other JSON, longer ones would hide it."""
    return [_quoted(piece) for piece in re.findall(r'"[^"]*"|\s+|[^"\s]+', text)]


def _json(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps(dict(schema) | {"x-guidance": {"whitespace_pattern": _SPACE}}, ensure_ascii=False)


def _control_tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> dict[int, str]:
    found = {}
    for text in texts:
        ids = tokenizer.encode(text, special=True)
        if len(ids) == 1 and ids[0] in tokenizer.special_ids:
            found[ids[0]] = text
    return found
