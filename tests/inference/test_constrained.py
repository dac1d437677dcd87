"""Completions that must belong to a language, through the whole service."""

from __future__ import annotations

import json
import re

import pytest

from llm_jax.inference.generation import complete
from llm_jax.inference.request import Constraint, InvalidRequest, SamplingParams

SCHEMA = json.dumps({"type": "object", "properties": {"名": {"enum": ["红楼梦", "西游记"]}, "n": {"type": "integer"}},
                     "required": ["名", "n"], "additionalProperties": False})


def test_every_completion_is_valid_whatever_else_is_in_the_batch(service):
    """Untrained weights, hot: without the constraint none would be."""
    constraints = [Constraint("json_schema", SCHEMA), Constraint("regex", "(ab|谁)+c{2}"),
                   Constraint("grammar", 'start: "(" start ")" | "x"'), None] * 5
    asked = [SamplingParams(max_tokens=70, temperature=1.0, seed=i, constraint=c, logit_bias={}, min_tokens=i % 3)
             for i, c in enumerate(constraints)]
    found = complete(service, [service.encode("print(")] * len(asked), asked)
    ended = 0
    for c, got in zip(constraints, found, strict=True):
        if c is None or got.finish_reason == "length":
            continue
        ended += 1
        assert got.finish_reason == "stop"
        if c.kind == "json_schema":
            value = json.loads(got.text)
            assert value["名"] in ("红楼梦", "西游记") and isinstance(value["n"], int)
        elif c.kind == "regex":
            assert re.fullmatch("(ab|谁)+c{2}", got.text)
        else:
            assert re.fullmatch(r"(\(*)x(\)*)", got.text) and got.text.count("(") == got.text.count(")")
    assert ended > 5
    alone = complete(service, [service.encode("print(")], asked[:1])[0]
    assert alone.token_ids == found[0].token_ids


def test_the_likeliest_valid_text(service):
    """Greedy: of two words the model's own preference decides, and nothing is drawn after the end."""
    got = complete(service, [service.encode("print(")], [SamplingParams(
        max_tokens=30, constraint=Constraint("regex", "for|range"), ignore_eos=True)])[0]
    assert got.text in ("for", "range") and got.finish_reason == "stop"


def test_what_is_no_constraint_is_refused(service):
    for kind, text, said in (("regex", "(", "regular expression|regex"), ("json_schema", "{", "JSON schema"),
                             ("grammar", "?", "grammar")):
        with pytest.raises(InvalidRequest, match=said):
            service.submit([1], SamplingParams(constraint=Constraint(kind, text)), print)
    with pytest.raises(InvalidRequest, match="constraint must be one of"):
        Constraint("xml", "<a/>")
    with pytest.raises(InvalidRequest, match="characters"):
        Constraint("regex", "")


def test_a_constraint_that_fails_midway_costs_its_own_request_alone(service, monkeypatch):
    from llm_jax.errors import UserError
    from llm_jax.inference import constraints

    real, calls = constraints.Matcher.mask, []

    def mask(self):
        calls.append(1)
        if len(calls) == 3:
            raise UserError("the constraint became too complex")
        return real(self)

    monkeypatch.setattr(constraints.Matcher, "mask", mask)
    asked = [SamplingParams(max_tokens=40, temperature=1.0, seed=1, constraint=Constraint("regex", "[a-z ]{30}")),
             SamplingParams(max_tokens=20, ignore_eos=True)]
    failed, other = complete(service, [[1, 5], [1, 5]], asked)
    assert failed.finish_reason == "error" and "too complex" in failed.error
    assert other.finish_reason == "length" and service.stats()["pages_used"] == 0
