"""JetStream's protocol at the door, spoken by a stub that knows nothing of this project."""

from __future__ import annotations

import grpc
import pytest

from serving.orchestrator import DecodeSampling
from serving.server import MAX_MESSAGE_BYTES
from tests.serving.doubles import BOS, ForeignStub, running_server


def _ids(text: str) -> list[int]:
    return [ord(c) + 3 for c in text]


def test_text_is_answered_with_text_and_token_ids(server, stub):
    responses = list(stub.Decode(stub.text_request("你好é", max_tokens=5, priority=4)))
    assert all(len(r.stream_content.samples) == 1 for r in responses)
    assert "".join(r.stream_content.samples[0].text for r in responses) == "你好é你好"
    assert [i for r in responses for i in r.stream_content.samples[0].token_ids] == _ids("你好é你好")
    (prompt, params, priority), = server.service.submitted
    assert prompt == (BOS, *_ids("你好é")) and priority == 4
    assert (params.temperature, params.max_tokens) == (0.0, 5)


def test_tokens_are_answered_with_token_ids_alone_the_first_by_itself(stub):
    responses = list(stub.Decode(stub.token_request(_ids("abc"), max_tokens=7)))
    samples = [r.stream_content.samples[0] for r in responses]
    assert len(samples[0].token_ids) == 1
    assert [i for s in samples for i in s.token_ids] == _ids("abcabca")
    assert not any(s.text for s in samples)


@pytest.mark.parametrize(("content", "has_bos", "prompt"), [
    ("text", False, (BOS, *_ids("ab"))),
    ("text", True, tuple(_ids("ab"))),
    (_ids("ab"), False, (BOS, *_ids("ab"))),
    (_ids("ab"), True, tuple(_ids("ab"))),
    ([BOS, *_ids("ab")], False, (BOS, *_ids("ab"))),
    ([BOS, *_ids("ab")], True, (BOS, *_ids("ab"))),
    ([], False, (BOS,)),
])
def test_the_prompt_begins_with_one_bos(server, stub, content, has_bos, prompt):
    make = stub.text_request if content == "text" else stub.token_request
    list(stub.Decode(make("ab" if content == "text" else content, max_tokens=1, has_bos=has_bos)))
    assert server.service.submitted[0][0] == prompt


def test_every_message_has_an_entry_for_every_sample(server, stub):
    for request in (stub.text_request("abc", max_tokens=20, num_samples=3),
                    stub.token_request(_ids("abc"), max_tokens=20, num_samples=3)):
        got = [[], [], []]
        for response in stub.Decode(request):
            assert len(response.stream_content.samples) == 3
            for ids, sample in zip(got, response.stream_content.samples, strict=True):
                ids.extend(sample.token_ids)
        assert got == [_ids("abcabcabcabcabcabcab")] * 3
    assert [params.sample for _, params, _ in server.service.submitted] == [0, 1, 2, 0, 1, 2]


def test_max_tokens_of_zero_is_what_fits(server, stub):
    call = stub.Decode(stub.text_request("ab"))
    next(call)
    call.cancel()
    assert server.service.submitted[0][1].max_tokens == server.service.max_context - 3


def test_what_upstream_ignores_is_ignored(stub):
    assert list(stub.Decode(stub.text_request("ab", max_tokens=1, session_cache="left over")))


@pytest.mark.parametrize(("fields", "said"), [
    ({"max_tokens": -1}, "max_tokens=-1"),
    ({"num_samples": -1}, "num_samples=-1"),
    ({"num_samples": 1_000_000_000}, "num_samples=1000000000 must lie between 1 and 64"),
    ({"lora_adapter_id": "mine"}, "lora_adapter_id='mine'"),
])
def test_fields_that_cannot_be_honoured_are_refused_by_name(server, stub, fields, said):
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Decode(stub.text_request("ab", **fields)))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert said in caught.value.details()
    assert not server.service.submitted


def test_requests_without_content_or_tokens_are_refused(stub):
    for request, said in ((stub.DecodeRequest(max_tokens=1), "text_content or token_content"),
                          (stub.token_request([], has_bos=True), "no tokens"),
                          (stub.token_request([5] * 20_000), "at most 9999")):
        if said == "no tokens":
            request.token_content.SetInParent()
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Decode(request))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert said in caught.value.details()


def test_bytes_that_are_no_request_are_refused(server):
    with grpc.insecure_channel(server.address) as channel:
        decode = channel.unary_stream("/jetstream_proto.Orchestrator/Decode")
        # A string that is not UTF-8, and a length that runs past the end.
        for garbage in (b"\x2a\x03\x0a\x01\xff", b"\x2a\x7f\x00"):
            with pytest.raises(grpc.RpcError) as caught:
                list(decode(garbage))
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.RpcError) as caught:
            list(decode(b"x" * (MAX_MESSAGE_BYTES + 1)))
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED  # gRPC's own
        assert ForeignStub(channel).is_live()


@pytest.mark.parametrize(("length", "said"), [
    (20_000, "the prompt has at least 10001 tokens; at most 9999 fit"),
    (30 << 20, "the request has 62914570 bytes, more than any prompt that fits: at most 9999 tokens"),
])
def test_a_text_that_cannot_fit_is_refused_unread(server, stub, monkeypatch, length, said):
    monkeypatch.setattr(server.service, "encode", lambda *_args, **_fields: pytest.fail("tokenized"))
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Decode(stub.text_request("é" * length)))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details().startswith(said)


def test_what_a_refusal_quotes_is_cut(stub):
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Decode(stub.text_request("ab", lora_adapter_id="é" * 100_000)))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details().startswith("lora_adapter_id='éé") and len(caught.value.details()) < 1000


def test_long_text_is_answered_too(stub):
    response = next(stub.Decode(stub.text_request("é" * 5000, max_tokens=1)))
    assert response.stream_content.samples[0].text == "é"


def test_the_servers_own_sampling_applies_to_decode():
    with running_server(decode_sampling=DecodeSampling(0.5, 7, 0.9)) as running:
        with grpc.insecure_channel(running.address) as channel:
            stub = ForeignStub(channel)
            list(stub.Decode(stub.text_request("ab", max_tokens=1)))
        params = running.service.submitted[0][1]
        assert (params.temperature, params.top_k, params.top_p) == (0.5, 7, 0.9)
