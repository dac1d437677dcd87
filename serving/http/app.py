"""The HTTP door: OpenAI's interface over the calls that gRPC makes too, and the operator's pages.

    app = make_app(Calls(front), ModelInfo.of(front, "my-model"))      # any ASGI server runs it; ours is uvicorn
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

import llm_jax
from serving.calls import Calls
from serving.http import (
    batches,
    chat,
    completions,
    embeddings,
    errors,
    files,
    health,
    models,
    page,
    responses,
    tokenize,
    websocket,
)
from serving.http.batch_runner import BatchRunner
from serving.http.batch_store import BatchStore
from serving.http.deps import ModelInfo, max_body_bytes
from serving.http.file_store import FileStore
from serving.http.long_work import LongWork
from serving.http.middleware import Outermost
from serving.state import State

_DESCRIPTION = """OpenAI's interface to one model, with this engine's own fields beside it. Fields that are absent or
null are as the model came configured. A field that is not listed is refused by its name. Every answer has the header
`x-request-id`: the request's own, if it sent one, else a new one."""


def make_app(calls: Calls, info: ModelInfo, *, state: State | None = None) -> FastAPI:
    """The application over `calls`.

    Args:
      calls: the pipeline that every door shares.
      info: what clients are told of the model.
      state: where files and batches are kept, which run while the application does; None keeps none.
    """
    store = FileStore(state) if state else None
    queue = BatchStore(store) if store else None
    work = LongWork()
    runner: BatchRunner | None = None

    @contextlib.asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        if runner:
            runner.start()
        yield
        work.close()
        if runner:
            await runner.stop()
        if store:
            store.close()

    app = FastAPI(
        title="llm_jax", version=llm_jax.__version__, description=_DESCRIPTION, docs_url=None, redoc_url=None,
        redirect_slashes=False,  # to a POST 307 says nothing, and behind a proxy its address would be wrong
        responses={"4XX": {"model": errors.ErrorBody, "description": "The request is refused; why, and what is right."},
                   "5XX": {"model": errors.ErrorBody, "description": "The server can't answer it, or failed."}},
        generate_unique_id_function=lambda route: route.name, lifespan=running)
    app.add_middleware(Outermost, calls=calls)
    errors.install(app)
    if queue:
        runner = BatchRunner(queue, app, max_line_bytes=max_body_bytes(calls), is_live=lambda: calls.is_live)
    for part in (health, models, completions, chat, responses, embeddings):
        app.include_router(part.router(calls, info))
    app.include_router(tokenize.router(calls, info, work))
    app.include_router(websocket.router(calls))
    app.include_router(page.router())
    app.include_router(files.router(calls, store))
    app.include_router(batches.router(calls, queue, runner.wake if runner else _nobody))
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _nobody(_batch_id: str | None = None) -> None:
    """Runs batches where there are none."""


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The document, with the two ways to send a key."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        document.setdefault("components", {})["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "header": {"type": "apiKey", "in": "header", "name": "x-api-key"}}
        document["security"] = [{}, {"bearer": []}, {"header": []}]
        app.openapi_schema = document
    return app.openapi_schema
