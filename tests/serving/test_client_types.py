"""What the client says to arguments of another type: the argument, what it must be, and before anything is sent."""

from __future__ import annotations

import numpy as np
import pytest

from serving.client import Client, WrongType
from serving.client_request import generate_request
from tests.serving.doubles import running_server


@pytest.fixture(scope="module")
def server():
    with running_server() as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with Client(server.address) as found:
        yield found


@pytest.mark.parametrize("prompt", [b"x", bytearray(b"x"), None, 5, ["a"], [1.5], [True], [[1]], {1: 2}, {"a"}])
def test_a_prompt_is_text_or_token_ids(server, client, prompt):
    before = len(server.service.submitted)
    with client.session() as session:
        for ask in (client.generate, client.decode, session.start):
            with pytest.raises(WrongType, match="^prompt must be text or a list of token ids, not "):
                ask(prompt)
    with pytest.raises(TypeError, match="^prompts must be a list, each of text or of token ids, not "):
        client.embed([prompt])
    assert len(server.service.submitted) == before


@pytest.mark.parametrize("prompts", ["ab", b"ab", None, 5])
def test_embeddings_are_of_a_list(client, prompts):
    """A text by itself is no list of its letters."""
    with pytest.raises(WrongType, match="^prompts must be a list, each of text or of token ids, not "):
        client.embed(prompts)


@pytest.mark.parametrize(("name", "value", "words"), [
    ("max_tokens", "5", "a whole number"), ("max_tokens", 2.0, "a whole number"),
    ("max_tokens", True, "a whole number"),
    ("priority", 1.5, "a whole number"), ("seed", "x", "a whole number"), ("temperature", "hot", "a number"),
    ("temperature", False, "a number"), ("deadline_seconds", "1", "a number"), ("ignore_eos", "no", "True or False"),
    ("ignore_eos", 1, "True or False"), ("tenant", b"x", "text"), ("tenant", 5, "text"),
    ("stop", 5, "text or a list of texts"), ("stop", [5], "text or a list of texts"),
    ("stop", b"x", "text or a list of texts"), ("stop", {"a": 1}, "text or a list of texts"),
    ("stop_ids", 5, "a list of whole numbers"), ("stop_ids", b"ab", "a list of whole numbers"),
    ("logit_bias", [1], "a dict of numbers by token id"), ("logit_bias", {"a": 1}, "a dict of numbers by token id"),
    ("logit_bias", {1: "x"}, "a dict of numbers by token id"), ("constraint", "x", "a Constraint")])
def test_an_argument_of_another_type_is_named(client, name, value, words):
    with pytest.raises(WrongType) as caught:
        client.generate("ab", **{name: value})
    assert str(caught.value) == f"{name} must be {words}, not {value!r}"


def test_what_numpy_has_is_as_good():
    sent = generate_request(np.array([1, 2]), {
        "max_tokens": np.int64(3), "temperature": np.float32(0.5), "stop_ids": (np.int32(7),), "stop": ("a", "b"),
        "top_k": None})
    assert list(sent.token_ids.ids) == [1, 2] and list(sent.sampling.stop_ids) == [7]
    assert (sent.sampling.max_tokens, sent.sampling.temperature, list(sent.sampling.stop)) == (3, 0.5, ["a", "b"])


@pytest.mark.parametrize(("arguments", "said"), [
    ({"address": 9000}, "address must be text, not 9000"), ({"address": b"a:1"}, "address must be text"),
    ({"api_key": 5}, "api_key must be text"), ({"tls_ca": 5}, "tls_ca must be text"),
    ({"timeout_s": "1"}, "timeout_s must be a number"), ({"connect_timeout_s": None}, "connect_timeout_s must be")])
def test_so_are_those_of_the_connection(arguments, said):
    with pytest.raises(WrongType, match=said):
        Client(**({"address": "127.0.0.1:1"} | arguments))


def test_pooling_is_text(client):
    with pytest.raises(WrongType, match="pooling must be text, not 5"):
        client.embed(["a"], 5)
