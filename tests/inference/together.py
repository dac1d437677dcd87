"""One of several processes that serve together: python -m tests.inference.together FOLDER.

Process 0 asks, and writes what it is told to FOLDER/0.json; each process writes how it ended to FOLDER/INDEX.json.
"""

from __future__ import annotations

import json
import pathlib
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from llm_jax import models
from llm_jax.data.tokenizer_training import train_tokenizer
from llm_jax.errors import UserError
from llm_jax.inference.batch import StepShape
from llm_jax.inference.engine import Engine
from llm_jax.inference.engine_config import EngineConfig
from llm_jax.inference.generation import Completion, complete, embed
from llm_jax.inference.joint import JointService
from llm_jax.inference.request import Constraint, Delta, SamplingParams
from llm_jax.inference.service import Service
from llm_jax.inference.speculation import Policy
from llm_jax.models import Decoder, ModelConfig
from llm_jax.parallel import distributed

CANCELLED, LATE = 3, 6  # of what is asked


def make_engine(tensor: int) -> tuple[Engine, Any]:
    """A small engine, and its tokenizer: few pages, and proposed tokens where no more than two run."""
    tokenizer = train_tokenizer(["for i in range(10):\n    print(i)\n" * 5], 320)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, num_layers=1, embed_dim=32, num_heads=4, num_kv_heads=2,
                         head_dim=8, mlp_dim=48, max_context=96)
    params = jax.jit(lambda key: models.init_params(Decoder(config), key))(jax.random.key(0))
    made = Engine(config, jax.tree.map(lambda leaf: leaf * 2.0, params), EngineConfig(
        max_rows=3, prefill_rows=2, chunk=8, page_size=4, num_pages=26, dtype="float32", tensor=tensor, max_proposed=2,
        swap_pages=6))
    made.shapes = (StepShape(2, 3, 3),)  # holds every step; it is the compiling that takes time
    made.wide_rows = 2
    return made, tokenizer


def ask(service: Service) -> list[Completion]:
    """Greedy, sampled, constrained and penalised requests, one that is cancelled and one that is too late; then
    one that repeats itself."""
    prompts = [service.encode("for i in range(10):\n    print(i)\n" * (1 + i % 3) + "for " * i) for i in range(9)]
    params = [SamplingParams(max_tokens=30, ignore_eos=True, seed=2**63 + i, temperature=0.7 * (i % 3 == 1))
              for i in range(9)]
    params[2] = SamplingParams(max_tokens=12, constraint=Constraint("regex", "(print|range)+[0-9]{3}"))
    params[5] = SamplingParams(max_tokens=20, repetition_penalty=1.4, logit_bias={7: 1.5}, stop=("zzz",))
    gathered: list[list[Delta]] = [[] for _ in prompts]
    ended = [threading.Event() for _ in prompts]
    ids: list[int] = []

    def listen(i: int, delta: Delta) -> None:
        gathered[i].append(delta)
        if delta.finish_reason is not None:
            ended[i].set()
        elif i == CANCELLED:
            service.cancel(ids[i])

    for i, (prompt, wanted) in enumerate(zip(prompts, params, strict=True)):
        ids.append(service.submit(prompt, wanted, lambda delta, i=i: listen(i, delta), priority=i % 2,
                                  tenant="ab"[i % 2], deadline_s=0.01 if i == LATE else 500.0))
    for event in ended:
        assert event.wait(60)
    # Alone, and always the same token: what is proposed is right.
    again = complete(service, [[5, 7, 7]], [SamplingParams(max_tokens=20, logit_bias={7: 100.0}, ignore_eos=True)])
    return [Completion.of(deltas) for deltas in gathered] + again


def refusal(call: Callable[[], Any]) -> str:
    """What the user is told who calls it."""
    try:
        call()
    except UserError as error:
        return str(error)
    return ""


def main(folder: str) -> None:
    """Serves, asks if this is process 0, and writes down how it went."""
    distributed.initialize()
    index, said = jax.process_index(), {}
    engine, tokenizer = make_engine(jax.device_count())
    said["other options"] = refusal(lambda: JointService(engine, tokenizer, max_queue=10 + index))
    if not index:
        clock = time.monotonic
        time.monotonic = lambda: clock() - 1000.0  # those of two hosts begin at different times
    else:
        engine.policy = Policy(2, ((99, 100.0),))  # as if measured on a slower machine: it alone would propose nothing
    service = JointService(engine, tokenizer)
    if index:
        said["submit"] = refusal(lambda: service.submit([1, 2], SamplingParams(), lambda delta: None))
        service.join()
    else:
        said["completions"] = [[c.token_ids, c.finish_reason, c.text] for c in ask(service)]
        said["embedding"] = embed(service, [[5, 6, 7]]).tolist()
        said["new weights"] = refusal(lambda: service.replace_weights({}))
        assert service.wait_drained(20)
    service.close()
    said |= {"stats": service.stats(), "plans": service._line.plans, "steps": engine.num_steps,
             "weights": engine.params["layers_0"]["mlp"]["up"].addressable_shards[0].data.shape}
    (pathlib.Path(folder) / f"{index}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
