"""How calls run and end: clients that leave or lag, queues that are full, engines that fail, servers that stop."""

from __future__ import annotations

import time

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from llm_jax.inference.request import Delta, Usage
from serving import messages
from serving.asking import LONG_TEXT
from serving.engine.front import MAX_PREPARING
from tests.serving.doubles import FakeService, ForeignStub, running_server, wait_until


def _text(responses) -> str:
    return "".join(r.stream_content.samples[0].text for r in responses)


def _status(call) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    return caught.value.code(), caught.value.details()


def test_a_client_that_cancels_frees_its_samples(server, stub):
    call = stub.Decode(stub.text_request("ab", max_tokens=9000, num_samples=3))
    next(call)
    call.cancel()
    assert wait_until(lambda: server.service.cancelled == [0, 1, 2])
    assert wait_until(lambda: server.server.calls.running == 0)


def test_a_client_whose_connection_breaks_frees_its_samples(server):
    channel = grpc.insecure_channel(server.address)
    stub = ForeignStub(channel)
    next(stub.Decode(stub.text_request("ab", max_tokens=9000)))
    channel.close()
    assert wait_until(lambda: server.service.cancelled == [0])


def test_a_deadline_frees_the_request(server, stub):
    code, _ = _status(stub.Decode(stub.text_request("ab", max_tokens=9000), timeout=0.3))
    assert code == grpc.StatusCode.DEADLINE_EXCEEDED
    assert wait_until(lambda: server.service.cancelled == [0])


def test_a_full_queue_takes_none_of_a_requests_samples():
    with running_server(FakeService(max_running=4)) as running, grpc.insecure_channel(running.address) as channel:
        stub = ForeignStub(channel)
        first = stub.Decode(stub.text_request("ab", max_tokens=9000, num_samples=2))
        next(first)
        code, said = _status(stub.Decode(stub.text_request("cd", max_tokens=9000, num_samples=3)))
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED and "waiting" in said
        assert len(running.service.submitted) == 2 and not running.service.cancelled
        assert _text(stub.Decode(stub.text_request("ef", max_tokens=4))) == "efef"
        first.cancel()


def test_a_reader_that_lags_gets_everything_in_larger_pieces_and_delays_nobody():
    with running_server(FakeService(step_s=0)) as running:
        options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]  # buffers little for its reader
        with grpc.insecure_channel(running.address, options=options) as lagging, \
                grpc.insecure_channel(running.address) as channel:
            slow_stub, stub = ForeignStub(lagging), ForeignStub(channel)
            slow = slow_stub.Decode(slow_stub.text_request("长文本", max_tokens=9000))
            beginning = next(slow)
            # The slow client reads nothing while others are served, and while its own request runs to its end.
            for _ in range(5):
                assert _text(stub.Decode(stub.text_request("ab", max_tokens=50))) == "ab" * 25
            assert wait_until(lambda: running.service.stats()["running"] == 0)
            messages_of_slow = [beginning, *slow]
            assert _text(messages_of_slow) == "长文本" * 3000
            assert len(messages_of_slow) < 4500


def test_a_fault_ends_one_request(server, stub, caplog):
    service = server.service
    service.faults = {"raise": RuntimeError("no such luck"), "fail": Delta(finish_reason="error", error="went wrong"),
                      "cut": Delta(finish_reason="cancelled"),
                      "late": Delta(finish_reason="deadline", usage=Usage(3, 0))}
    other = stub.Decode(stub.text_request("ab", max_tokens=100))
    failing = stub.Decode(stub.text_request("raise", max_tokens=4))
    code, said = _status(failing)
    request_id = dict(failing.initial_metadata())["x-request-id"]
    assert code == grpc.StatusCode.INTERNAL and request_id in said and "no such luck" not in said
    assert "RuntimeError: no such luck" in caplog.text
    assert _status(stub.Decode(stub.text_request("fail", max_tokens=4))) == (grpc.StatusCode.INTERNAL, "went wrong")
    assert _status(stub.Decode(stub.text_request("cut", max_tokens=4)))[0] == grpc.StatusCode.CANCELLED
    assert _status(stub.Decode(stub.text_request("late", max_tokens=4)))[0] == grpc.StatusCode.DEADLINE_EXCEEDED
    assert _text(other) == "ab" * 50
    assert stub.is_live()


def test_a_constraint_that_takes_long_to_prepare_stops_nobody(server, stub, channel):
    """It is prepared on another thread; a client that leaves meanwhile leaves nothing behind."""
    service = server.service
    service.hold.clear()
    request = messages.GenerateRequest(text="ab", sampling=messages.Sampling(max_tokens=9000, regex="x*"))
    generate = channel.unary_stream(f"/{messages.INFERENCE}/Generate", messages.GenerateRequest.SerializeToString)
    leaving = [generate(request, timeout=20) for _ in range(MAX_PREPARING + 2)]
    try:
        long = stub.text_request("ab" * LONG_TEXT, max_tokens=4)  # encoded on a thread too
        assert _text(stub.Decode(long)) == "abab"
        assert wait_until(lambda: server.server.calls.running == len(leaving))
        for call in leaving:
            call.cancel()
        assert wait_until(lambda: server.server.calls.running == 0)
    finally:
        service.hold.set()
    assert wait_until(lambda: len(service.submitted) > 1 and not service.stats()["running"])
    assert wait_until(lambda: len(service.cancelled) == len(service.submitted) - 1)


def test_health_follows_the_engine(server, stub, channel):
    health = health_pb2_grpc.HealthStub(channel)
    for name in ("", messages.ORCHESTRATOR, messages.INFERENCE):
        assert health.Check(health_pb2.HealthCheckRequest(service=name)).status == 1
    with pytest.raises(grpc.RpcError) as caught:
        health.Check(health_pb2.HealthCheckRequest(service="unknown"))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    watch = health.Watch(health_pb2.HealthCheckRequest())
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    server.service.is_live = False
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert not stub.is_live()
    assert _status(stub.Decode(stub.text_request("ab")))[0] == grpc.StatusCode.UNAVAILABLE
    server.service.is_live = True
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()


def test_reflection_describes_every_service(channel):
    ask = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo

    def request(**fields):
        answer, = ask(iter([reflection_pb2.ServerReflectionRequest(**fields)]))
        return answer

    listed = {s.name for s in request(list_services="").list_services_response.service}
    assert listed == {messages.ORCHESTRATOR, messages.INFERENCE, "grpc.health.v1.Health",
                      "grpc.reflection.v1alpha.ServerReflection"}
    for name in listed:
        files = request(file_containing_symbol=name).file_descriptor_response.file_descriptor_proto
        described = map(descriptor_pb2.FileDescriptorProto.FromString, files)
        services = [f"{file.package}.{service.name}" for file in described for service in file.service]
        assert services == [name]


def test_stopping_lets_running_calls_finish_and_refuses_others(server, stub):
    call = stub.Decode(stub.text_request("ab", max_tokens=1000))
    beginning = next(call)
    stopping = server.start_stopping(grace_seconds=30)
    assert wait_until(lambda: not server.server.calls.accepting)
    assert not stub.is_live()
    code, said = _status(stub.Decode(stub.text_request("ab")))
    assert code == grpc.StatusCode.UNAVAILABLE and "shutting down" in said
    assert _text([beginning, *call]) == "ab" * 500
    assert stopping.result(timeout=10) is True
    assert not server.service.cancelled


def test_stopping_cuts_what_outlasts_the_grace_period(server, stub):
    call = stub.Decode(stub.text_request("ab", max_tokens=9000))
    next(call)
    began = time.monotonic()
    stopping = server.start_stopping(grace_seconds=0.3)
    code, said = _status(call)
    assert code == grpc.StatusCode.UNAVAILABLE and "shut down before" in said
    assert stopping.result(timeout=10) is False
    assert 0.25 < time.monotonic() - began < 3
    assert server.service.cancelled == [0]
