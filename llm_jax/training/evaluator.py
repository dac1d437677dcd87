"""A run's evaluations on held-out text, and what they decide."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from llm_jax import runs
from llm_jax.data.documents import read_documents
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.data.windows import evaluation_windows
from llm_jax.models import activation_rules
from llm_jax.objectives.evaluation import evaluate_loss
from llm_jax.parallel import distributed
from llm_jax.training.assembly import Assembly
from llm_jax.training.gates import GateConfig, Gates


class Evaluator:
    """Evaluates the validation split, always on the same batches.

    Attributes:
      gates: the evaluations so far, and the verdict on them.
    """

    def __init__(self, parts: Assembly, tokenizer: Tokenizer, num_batches: int, gates: GateConfig):
        """Reads nothing yet.

        Args:
          parts: model, mesh and rules.
          tokenizer: the run's.
          num_batches: of each evaluation; 0 takes the whole split.
          gates: what is made of the results.
        """
        self._parts, self._tokenizer, self._num_batches = parts, tokenizer, num_batches
        self._rows = parts.data.batch_size // parts.accumulation
        self._kept: list[dict[str, np.ndarray]] = []
        self.gates = Gates(gates)

    def open(self, manifest: Mapping[str, Any] | None) -> None:
        """Takes the evaluations of the run's earlier processes from its manifest."""
        self.gates = Gates(self.gates.config, manifest)

    def rewind(self, run_dir: Any, step: int) -> None:
        """Forgets evaluations after `step`, from where the run goes on, in the manifest too: their checkpoints are
        gone, and others of the same steps may come, which would be promoted by what those were."""
        if not self.gates.evaluations:
            return
        self.gates.rewind(step)
        self._keep(run_dir)

    def evaluate(self, params: Any, watched: Callable[[Iterator[Any]], Iterator[Any]] = iter) -> dict[str, float]:
        """The figures of `objectives.evaluation.evaluate_loss`; `watched` sees each batch pass."""
        with jax.set_mesh(self._parts.mesh), activation_rules(self._parts.rules.activations):
            return evaluate_loss(self._parts.model, params, watched(self._batches()), put=self._put,
                                 byte_lengths=self._tokenizer.byte_lengths)

    def judge(self, run_dir: Any, step: int, figures: Mapping[str, float]) -> list[str]:
        """Notes the evaluation after `step` in the manifest, and what follows from it; returns what is to be said."""
        verdict = self.gates.add(step, figures)
        self._keep(run_dir)
        stopping = f"stopped early at step {step}: {verdict.stop}" if verdict.stop else ""
        return [line for line in (self.gates.said(), stopping) if line]

    def _keep(self, run_dir: Any) -> None:
        if distributed.is_lead():
            runs.update_manifest(run_dir, **self.gates.to_manifest())

    def _batches(self) -> Iterator[dict[str, np.ndarray]]:
        """Kept if they are few."""
        if self._kept:
            yield from self._kept
            return
        documents = read_documents(self._parts.data.data_dir, "validation")
        windows = evaluation_windows(documents, self._parts.data.row_length, self._rows)
        for number, batch in enumerate(windows, start=1):
            if self._num_batches:
                self._kept.append(batch)
            yield batch
            if number == self._num_batches:
                return

    def _put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """A batch that every process has whole."""
        return {name: jax.make_array_from_callback(array.shape, self._parts.batch_sharding, array.__getitem__)
                for name, array in batch.items()}
