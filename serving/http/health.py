"""What a load balancer and a monitor ask: alive, ready, and the metrics."""

from __future__ import annotations

import secrets
from typing import Literal

import pydantic
from fastapi import APIRouter, Request, Response

from llm_jax.inference.request import Unavailable
from serving.calls import Calls
from serving.errors import Reason, Rejected
from serving.http.deps import ModelInfo, caller, make_router
from serving.http.errors import json_response


class Health(pydantic.BaseModel):
    """How the server is."""

    status: Literal["ok", "ready", "not ready"]
    instance: str | None = pydantic.Field(
        None, description="Of /readyz: drawn when the process started, so that who restarts it knows the new one.")


def router(calls: Calls, info: ModelInfo) -> APIRouter:
    """The three paths; the first two ask nobody for a key, because probes have none."""
    routes = APIRouter(tags=["operations"])
    guarded = make_router(calls, "metrics", tags=["operations"])
    instance = secrets.token_hex(8)

    @routes.head("/healthz", include_in_schema=False)
    @routes.get("/healthz", response_model=Health)
    async def healthz() -> Response:
        """200 as long as the process answers, also while it drains: who asks here would restart it otherwise."""
        return json_response({"status": "ok"})

    @routes.head("/readyz", include_in_schema=False)
    @routes.get("/readyz", response_model=Health, responses={503: {"model": Health, "description": "Not now."}})
    async def readyz() -> Response:
        """200 while requests are taken, 503 while draining or without an engine: a balancer sends none then."""
        live = calls.is_live
        return json_response({"status": "ready" if live else "not ready", "instance": instance}, 200 if live else 503)

    @guarded.get("/metrics", response_class=Response,
                 responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
    async def metrics(request: Request) -> Response:
        """Prometheus' text format."""
        async with calls.admitted(caller(request), "metrics"):
            if calls.metrics is None:
                raise Rejected(Reason.NOT_FOUND, "this server keeps no metrics")
            try:
                stats = await calls.front.stats()
            except Unavailable:  # the door's own counts are worth having all the same
                stats = None
            return Response(calls.metrics.render(stats, live=calls.is_live), media_type=calls.metrics.content_type)

    routes.include_router(guarded)
    return routes
