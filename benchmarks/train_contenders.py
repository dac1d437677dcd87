"""The contenders of `benchmarks.train_speed`, each in a process of its own: this trainer, and torch with transformers.

All train the same Llama from the same weights on the same batches: AdamW, warm-up and cosine, weight decay of matrices
alone, clipping by the global norm.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import time
from typing import Any

import numpy as np

from benchmarks.serve_trace.workers import answer

OPTIMIZER: dict[str, Any] = dict(peak_learning_rate=1e-3, warmup_steps=20, end_learning_rate_ratio=0.1, b1=0.9, b2=0.95,
                                 eps=1e-8, weight_decay=0.1, clip_norm=1.0)
NUM_STEPS = 100_000  # the cosine's length; nothing gets there


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is trained: a Llama's sizes, a batch, and the dtype of its products (weights are kept in float32)."""

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    tie_embeddings: bool
    rows: int
    length: int
    dtype: str

    @property
    def tokens(self) -> int:
        """Of a batch."""
        return self.rows * self.length

    def batch(self, number: int) -> np.ndarray:
        """The tokens of batch `number`, int32 [rows, length]; small ones are likelier, so there is something to
        learn."""
        uniform = np.random.default_rng(number).uniform(size=(self.rows, self.length))
        return np.minimum(self.vocab_size**uniform, self.vocab_size - 1).astype(np.int32)


SHAPES = {
    "9m": Shape(8192, 256, 6, 8, 8, 32, 768, False, 8, 256, "float32"),
    "1b": Shape(128256, 2048, 16, 32, 8, 64, 8192, True, 4, 4096, "bfloat16"),
    "tiny": Shape(256, 32, 2, 4, 2, 8, 64, False, 4, 32, "float32"),
}


class Jax:
    """This trainer's own state, optimizer and step, as `experiments.train` makes them.

    Args:
      shape: what is trained.
      hf_dir: where the first parameters are written, for the others.
      options: fields of `models.Execution` that are not as a run has them.
    """

    def __init__(self, shape: Shape, hf_dir: str, options: dict[str, Any]):
        import jax

        from llm_jax import compile_cache, hf, models
        from llm_jax.parallel import rules
        from llm_jax.parallel.mesh import MeshConfig, make_mesh
        from llm_jax.training.optimizer import OptimizerConfig, decay_mask, learning_rate_schedule, make_optimizer
        from llm_jax.training.state import init_state, state_shardings
        from llm_jax.training.step import make_train_step

        compile_cache.enable_compile_cache()
        self._jax, self._shape, self._steps = jax, shape, 0
        facts = dataclasses.asdict(shape)
        _, length, dtype = (facts.pop(name) for name in ("rows", "length", "dtype"))
        config = models.ModelConfig(max_context=length, rope_theta=10000.0, norm_eps=1e-5, **facts)
        self._flops = config.flops_per_token(length)
        model = models.build_language_model(config, models.Execution(**{"dtype": dtype} | options))
        mesh, settings = make_mesh(MeshConfig(), jax.devices()[:1]), OptimizerConfig(**OPTIMIZER)
        optimizer = make_optimizer(settings, NUM_STEPS, decay_mask(models.logical_axes(model)))
        shardings = state_shardings(model, optimizer, mesh)
        self._state = init_state(model, optimizer, 0, shardings)
        hf.save(hf_dir, self._state.params, config)
        self._step = make_train_step(model, optimizer, learning_rate_schedule(settings, NUM_STEPS), mesh, shardings)
        self._sharding = rules.batch_sharding(mesh)

    def flops_per_token(self) -> float:
        """Of a training step, by `ModelConfig.flops_per_token`."""
        return self._flops

    def train(self, count: int) -> dict[str, float]:
        """The next `count` steps: seconds, and the last one's loss."""
        began = time.perf_counter()
        metrics: Any = {}
        for _ in range(count):
            tokens_BT = self._shape.batch(self._steps)
            self._steps += 1
            positions_BT = np.broadcast_to(np.arange(self._shape.length, dtype=np.int32), tokens_BT.shape)
            batch = {"tokens": tokens_BT, "segment_ids": np.ones_like(tokens_BT), "positions": positions_BT}
            placed = {name: self._jax.make_array_from_process_local_data(self._sharding, array)
                      for name, array in batch.items()}
            self._state, metrics = self._step(self._state, placed)
        self._jax.block_until_ready(self._state)
        return {"seconds": time.perf_counter() - began, "loss": float(metrics["loss"])}

    def peak(self, size: int, seconds: float) -> float:
        """FLOP/s of the best of many products of two matrices of that size, in the shape's dtype."""
        jnp = self._jax.numpy
        a = jnp.full((size, size), 1e-3, self._shape.dtype)
        product = self._jax.jit(lambda a, b: a @ b)
        product(a, a).block_until_ready()
        return _best(lambda: product(a, a).block_until_ready(), seconds, 2 * size**3)


class Torch:
    """transformers' Llama and torch's AdamW.

    Args:
      shape: what is trained.
      hf_dir: the folder with the first parameters.
      options: "compiled" (bool), "threads", and "device" ("cpu" or "cuda").
    """

    def __init__(self, shape: Shape, hf_dir: str, options: dict[str, Any]):
        import torch
        from transformers import LlamaForCausalLM

        torch.set_num_threads(options["threads"])
        torch.set_float32_matmul_precision("highest")
        self._torch, self._shape, self._steps, self._device = torch, shape, 0, options["device"]
        model = LlamaForCausalLM.from_pretrained(hf_dir, dtype=torch.float32, attn_implementation="sdpa")
        self._model = model.to(self._device).train()
        self._parameters = list(model.parameters())
        decayed = [p for p in self._parameters if p.ndim >= 2]
        kept = [p for p in self._parameters if p.ndim < 2]
        o = OPTIMIZER
        self._optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": o["weight_decay"]}, {"params": kept, "weight_decay": 0.0}],
            lr=o["peak_learning_rate"], betas=(o["b1"], o["b2"]), eps=o["eps"], fused=True)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, _rate)
        self._forward = torch.compile(self._model) if options["compiled"] else self._model

    def train(self, count: int) -> dict[str, float]:
        """As `Jax.train`."""
        torch = self._torch
        began = time.perf_counter()
        loss: Any = None
        for _ in range(count):
            tokens_BT = torch.from_numpy(self._shape.batch(self._steps)).long().to(self._device)
            self._steps += 1
            cast = contextlib.nullcontext() if self._shape.dtype == "float32" else torch.autocast(
                self._device, dtype=getattr(torch, self._shape.dtype))
            with cast:
                loss = self._forward(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self._parameters, OPTIMIZER["clip_norm"], foreach=True)
            self._optimizer.step()
            self._schedule.step()
            self._optimizer.zero_grad(set_to_none=True)
        self._wait()
        return {"seconds": time.perf_counter() - began, "loss": float(loss.detach())}

    def peak(self, size: int, seconds: float) -> float:
        """As `Jax.peak`."""
        a = self._torch.full((size, size), 1e-3, dtype=getattr(self._torch, self._shape.dtype), device=self._device)

        def multiply() -> None:
            self._torch.mm(a, a)
            self._wait()

        multiply()
        return _best(multiply, seconds, 2 * size**3)

    def _wait(self) -> None:
        if self._device == "cuda":
            self._torch.cuda.synchronize()


def _rate(step: int) -> float:
    """The learning rate as a share of the peak; `learning_rate_schedule`'s formula."""
    done, warmup, end = step + 1, OPTIMIZER["warmup_steps"], OPTIMIZER["end_learning_rate_ratio"]
    if done <= warmup:
        return done / warmup
    progress = min((done - warmup) / (NUM_STEPS - warmup), 1.0)
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress))


def _best(run: Any, seconds: float, operations: float) -> float:
    best, began = math.inf, time.perf_counter()
    while time.perf_counter() - began < seconds:
        at = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - at)
    return operations / best


def main() -> None:
    """Answers commands until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contender", choices=("jax", "torch"), required=True)
    parser.add_argument("--shape", choices=list(SHAPES), required=True)
    parser.add_argument("--hf_dir", required=True)
    parser.add_argument("--options", default="{}")
    arguments = parser.parse_args()
    kind: Any = Jax if arguments.contender == "jax" else Torch
    contender = kind(SHAPES[arguments.shape], arguments.hf_dir, json.loads(arguments.options))
    answer({name: getattr(contender, name) for name in ("train", "peak", "flops_per_token")
            if hasattr(contender, name)})


if __name__ == "__main__":
    main()
