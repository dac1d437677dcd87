"""Messages between the two processes, however the line cuts them."""

from __future__ import annotations

import socket
import threading

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.inference.request import Delta, PromptLogprob, Usage
from serving.engine import wire
from serving.engine.outbox import Outbox

VALUES = st.recursive(st.none() | st.integers() | st.text() | st.floats(allow_nan=False),
                      lambda inner: st.lists(inner).map(tuple), max_leaves=20)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.text(), VALUES), max_size=6), st.lists(st.integers(1, 40), min_size=1))
def test_messages_arrive_whole_however_they_are_cut(messages, sizes):
    data = b"".join(map(wire.pack, messages))
    unpacker, found, at, i = wire.Unpacker(), [], 0, 0
    while at < len(data):
        size = sizes[i % len(sizes)]
        found += unpacker.feed(data[at:at + size])
        at, i = at + size, i + 1
    assert found == messages


def test_receive_reads_one_message_and_knows_the_end():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        big = ("submit", list(range(300_000)))
        sender = threading.Thread(target=lambda: theirs.sendall(wire.pack(big) + wire.pack(("close",))))
        sender.start()
        assert wire.receive(ours) == big
        assert wire.receive(ours) == ("close",)
        sender.join()
        theirs.sendall(wire.pack(("torn",))[:-1])
        theirs.close()
        assert wire.receive(ours) is None and wire.receive(ours) is None


def test_deltas_keep_every_field():
    for delta in (Delta(), Delta("你", (5, 6), (-0.5, -1.0)), Delta("x", (5,), (-0.5,), (((1, -0.25),),)),
                  Delta(prompt_logprobs=(PromptLogprob(3, -1.0, ((4, -2.0),)),)),
                  Delta(finish_reason="stop", usage=Usage(1, 2, 3)), Delta(finish_reason="error", error="why")):
        message, = wire.Unpacker().feed(wire.pack((wire.slim(delta),)))
        assert wire.full(message[0]) == delta
    found = wire.full(wire.slim(Delta(finish_reason="stop", embedding=np.ones(3, np.float32))))
    assert found.embedding.tolist() == [1, 1, 1]


def test_the_outbox_holds_one_delta_a_request_while_nobody_reads():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        outbox = Outbox(theirs)
        text = "字" * 5000
        for _ in range(200):  # 15 kB each: far more than the line holds
            for number in range(3):
                outbox.push(number, Delta(text, (7,), (-1.0,)))
        outbox.drop(2)
        outbox.answer("accepted", 9)
        assert len(outbox._news) == 2
        found, last = {0: "", 1: "", 2: ""}, None
        for number in range(2):
            outbox.push(number, Delta("end", finish_reason="stop", usage=Usage(1, 200)))
        ours.settimeout(10)
        ended, pieces = 0, 0
        while ended < 2:
            kind, value = wire.receive(ours)
            if kind == "accepted":
                last = value
                continue
            for number, sent in value.items():
                delta = wire.full(sent)
                found[number] += delta.text
                pieces += 1
                ended += delta.finish_reason == "stop"
        assert found[0] == found[1] == text * 200 + "end" and last == 9
        assert len(found[2]) < len(text) * 200 and pieces < 60
        ours.close()  # nobody is left: the outbox gives up, and does not wait
        outbox.push(0, Delta(text * 100))
        outbox.close(5)
        assert not outbox._thread.is_alive()
