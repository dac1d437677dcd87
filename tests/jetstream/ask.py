"""Asks a server with the archived project's own stubs; needs nothing of this project.

    echo '[{"text": "def main("}, {"token_ids": [5, 6]}]' | python ask.py 127.0.0.1:9000 MAX_TOKENS

Requests go at the same time. Prints for each its text, its token ids and how many tokens its first message had.
"""

import concurrent.futures
import json
import sys

import grpc
from jetstream.core.proto import jetstream_pb2, jetstream_pb2_grpc

address, max_tokens = sys.argv[1], int(sys.argv[2])
channel = grpc.insecure_channel(address)
grpc.channel_ready_future(channel).result(timeout=60)
stub = jetstream_pb2_grpc.OrchestratorStub(channel)


def ask(prompt):
    request = jetstream_pb2.DecodeRequest(session_cache="", priority=0, max_tokens=max_tokens)
    if "text" in prompt:
        request.text_content.text = prompt["text"]
    else:
        request.token_content.token_ids.extend(prompt["token_ids"])
    text, token_ids, first = "", [], None
    for response in stub.Decode(request, timeout=120):
        sample = response.stream_content.samples[0]
        first = len(sample.token_ids) if first is None else first
        text += sample.text
        token_ids += sample.token_ids
    return {"text": text, "token_ids": token_ids, "first": first}


health = stub.HealthCheck(jetstream_pb2.HealthCheckRequest(), timeout=10).is_live
with concurrent.futures.ThreadPoolExecutor(16) as pool:
    print(json.dumps({"is_live": health, "answers": list(pool.map(ask, json.load(sys.stdin)))}))
