"""`/v1/embeddings`: a vector for each text."""

from __future__ import annotations

import base64
from typing import Annotated, Literal

import numpy as np
import pydantic
from fastapi import APIRouter, Request, Response
from pydantic import Field

from llm_jax.inference.request import Delta
from serving.calls import Calls
from serving.http import prompts
from serving.http.deps import ModelInfo, caller, make_router
from serving.http.errors import json_response
from serving.http.prompts import Prompts
from serving.http.schemas import INT32, MAX_USER_CHARACTERS, Body, renamed, unsupported
from serving.http.sse import unless_gone


class EmbeddingRequest(Body):
    """OpenAI's request; behind it what this engine can choose."""

    model: str | None = Field(None, description="The served model's name; absent is the served model.")
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = Field(None, description="base64: little-endian float32.")
    dimensions: Annotated[None, unsupported("the model's vectors can't be cut shorter")] = None
    user: str | None = Field(None, max_length=MAX_USER_CHARACTERS, description="Accepted; changes nothing.")

    pooling: Literal["mean", "last"] | None = Field(None, description="Of the hidden states; mean if absent.")
    normalize: bool | None = Field(None, description="Scale to length 1, as OpenAI's are; true if absent.")
    priority: int | None = Field(None, ge=-INT32 - 1, le=INT32, description="Larger goes first among those that wait; "
                                 "from -1000 to 100 (admin, or no keys), 10 (developer) or 0 (user).")


class Embedding(pydantic.BaseModel):
    """The vector of one input."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(pydantic.BaseModel):
    """Tokens of all inputs."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(pydantic.BaseModel):
    """The vectors, in the order of the inputs."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


def router(calls: Calls, info: ModelInfo) -> APIRouter:
    """The one path."""
    routes = make_router(calls, "embed", prefix="/v1", tags=["embeddings"])

    @routes.post("/embeddings", response_model=EmbeddingList)
    async def create_embeddings(request: Request, body: EmbeddingRequest) -> Response:
        """The model's last hidden states of each input, pooled into one vector."""
        who = caller(request)

        async def answer() -> Response:
            async with calls.admitted(who, "embed") as admission:
                info.check(body.model)
                read = await prompts.read(calls, prompts.listed(body.input), "input")
                admission.reserve_all(sum(len(one.ids) for one in read))
                found: list[Delta] = []
                with renamed({"prompt": "input"}):
                    for start in range(0, len(read), calls.max_samples):
                        part = [one.ids for one in read[start:start + calls.max_samples]]
                        found += await calls.embed(part, body.pooling or "mean", body.priority or 0,
                                                   admission=admission)
                tokens = sum(len(one.ids) for one in read)
                return json_response({
                    "object": "list", "model": info.name,
                    "data": [{"object": "embedding", "index": i, "embedding": _vector(delta, body)}
                             for i, delta in enumerate(found)],
                    "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})

        return await unless_gone(request, answer())

    return routes


def _vector(delta: Delta, body: EmbeddingRequest) -> list[float] | str:
    values = np.asarray(delta.embedding, np.float32)
    if body.normalize is not False:
        values = values / max(float(np.linalg.norm(values)), 1e-12)
    if body.encoding_format == "base64":
        return base64.b64encode(values.astype("<f4").tobytes()).decode()
    return values.tolist()
