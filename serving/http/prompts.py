"""A prompt as completions and embeddings take it: a text, tokens, or several of either."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any

import pydantic
from pydantic import Field
from pydantic_core import PydanticCustomError

from llm_jax.errors import UserError
from llm_jax.inference.request import PromptTooLong
from serving.calls import Calls
from serving.errors import Rejected, as_rejected, invalid
from serving.http.errors import too_long
from serving.http.schemas import TokenId

MAX_PROMPTS = 2048  # of one request, as at OpenAI


def _said_at_once(value: Any, handler: pydantic.ValidatorFunctionWrapHandler) -> Any:
    """One message instead of one for each alternative."""
    try:
        return handler(value)
    except pydantic.ValidationError:
        raise PydanticCustomError("prompt_type", "must be a text, a list of token ids, or a list of up to {most} "
                                  "texts or lists of token ids", {"most": MAX_PROMPTS}) from None


Prompts = Annotated[
    str | Annotated[list[TokenId], Field(min_length=1)]
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
    | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)],
    pydantic.WrapValidator(_said_at_once)]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt: its tokens, and its text as it was sent, None if it was sent as tokens."""

    ids: list[int]
    text: str | None


def listed(sent: Any) -> list[Any]:
    """`Prompts` as a list of texts or lists of token ids."""
    return [sent] if isinstance(sent, str) or isinstance(sent[0], int) else sent


async def read(calls: Calls, sent: Sequence[str | list[int]], field: str, add_bos: bool = True) -> list[Prompt]:
    """The tokens of each prompt.

    Args:
      calls: the pipeline.
      sent: texts, which get the beginning-of-sequence token in front if the model expects one, or token ids, which are
        used exactly as they are.
      field: what the request calls them.
      add_bos: whether the model's expectation counts.

    Raises:
      Rejected: one has no tokens, or more than fit.
    """
    found = []
    for i, one in enumerate(sent):
        try:
            ids = calls.token_ids(await calls.encode(one, add_bos=add_bos) if isinstance(one, str) else one)
            if not ids:
                raise invalid(f"the {field} has no tokens", field)
        except (Rejected, UserError) as error:
            where = f"{field}[{i}]" if len(sent) > 1 else field
            if isinstance(error, PromptTooLong):
                raise too_long(str(error), where) from None
            rejected = as_rejected(error)
            rejected.field = where
            raise rejected from None
        found.append(Prompt(ids, one if isinstance(one, str) else None))
        await asyncio.sleep(0)  # each may take some ms: other requests come in between
    return found


async def together(work: Sequence[Callable[[], Awaitable[None]]], most: int) -> None:
    """Does all of it, `most` at a time; the first failure ends the rest and is raised."""
    if len(work) == 1:
        await work[0]()
        return
    room = asyncio.Semaphore(most)

    async def in_turn(one: Callable[[], Awaitable[None]]) -> None:
        async with room:
            await one()

    try:
        async with asyncio.TaskGroup() as group:
            for one in work:
                group.create_task(in_turn(one))
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
