"""`/v1/models`: the one model that is served."""

from __future__ import annotations

from typing import Any, Literal

import pydantic
from fastapi import APIRouter, Request, Response

from serving.calls import Calls
from serving.http.deps import ModelInfo, caller, make_router
from serving.http.errors import json_response


class Model(pydantic.BaseModel):
    """The served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int = pydantic.Field(description="Longest sequence, prompt and completion, in tokens.")
    has_chat_template: bool = pydantic.Field(description="Whether it can be asked at /v1/chat/completions.")


class ModelList(pydantic.BaseModel):
    """All models that are served."""

    object: Literal["list"]
    data: list[Model]


def router(calls: Calls, info: ModelInfo) -> APIRouter:
    """The list, and its one entry."""
    routes = make_router(calls, "read", prefix="/v1/models", tags=["models"])

    def model() -> dict[str, Any]:
        return {"id": info.name, "object": "model", "created": info.created, "owned_by": info.owned_by,
                "max_model_len": info.max_context, "has_chat_template": info.has_chat_template}

    @routes.get("", response_model=ModelList)
    async def list_models(request: Request) -> Response:
        """The served model, as a list."""
        async with calls.admitted(caller(request), "read"):
            return json_response({"object": "list", "data": [model()]})

    @routes.get("/{model_name:path}", response_model=Model)
    async def get_model(request: Request, model_name: str) -> Response:
        """The served model; its name may have slashes."""
        async with calls.admitted(caller(request), "read"):
            info.check(model_name)
            return json_response(model())

    return routes
