"""Measures a run's loss on held-out text, and prints it as one line of JSON."""

from __future__ import annotations

import json
import math
import pathlib
import sys

if not __package__:
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from experiments import cli  # noqa: E402

EXAMPLES = (
    "python -m experiments.evaluate --run_dir=runs/quickstart",
    "python -m experiments.evaluate --run_dir=runs/quickstart --split=test",
    "python -m experiments.evaluate --run_dir=runs/quickstart --text=novel.txt",
)

# Of a model that came without one, in tokens: dense attention holds a matrix of it by itself for each head.
_DEFAULT_ROW = 1024


def evaluate(run_dir: str, text: str | None = None, data_dir: str | None = None, split: str = "validation",
             row_length: int | None = None, batch_size: int = 16, max_batches: int = 0, dtype: str = "float32",
             step: str | None = None) -> None:
    """Prints `loss` (nats per token), `perplexity`, `bits_per_byte`, `tokens` and what was measured.

    Args:
      run_dir: run directory of the model
      text: a UTF-8 file to measure, instead of the corpus the model was trained on
      data_dir: prepared corpus; by default the one the run was trained on
      split: part of the corpus: train, validation or test
      row_length: tokens that predictions may look back on; by default the length the run was trained with, and of an
        imported model its context, up to 1,024 (attention takes memory with the square of it)
      batch_size: rows of a batch
      max_batches: batches to measure; 0 is all
      dtype: of the computation, float32 or bfloat16
      step: checkpoint to measure: a step, best or good; by default the latest
    """
    import itertools

    from llm_jax import compile_cache, runs, storage
    from llm_jax.data.documents import load_manifest, read_documents
    from llm_jax.data.windows import evaluation_windows, read_text_document
    from llm_jax.errors import UserError
    from llm_jax.models import Execution, build_language_model
    from llm_jax.objectives.evaluation import evaluate_loss

    for name, value, least in (("batch_size", batch_size, 1), ("max_batches", max_batches, 0)):
        if value < least:
            raise UserError(f"--{name}={value} must be at least {least}")
    run = runs.load(run_dir, step)
    limit = run.config.longest_context
    trained = run.manifest.get("settings", {}).get("data", {}).get("row_length")
    row_length = row_length or trained or min(run.config.max_context, _DEFAULT_ROW)
    if not 1 <= row_length <= limit:
        raise UserError(f"--row_length={row_length} must be between 1 and the model's context, {limit}")
    report: dict = {}
    if text is not None:
        document, _ = read_text_document(text, run.tokenizer)
        documents, report["text"] = [document], text
        row_length = min(row_length, max(document[1].size - 1, 1))
        batch_size = min(batch_size, math.ceil(document[1].size / row_length))
    else:
        folder = data_dir or run.manifest.get("data_dir")
        if folder is None:
            raise UserError(f"{run_dir} does not say what it was trained on: give --data_dir or --text")
        if data_dir is None and not storage.as_path(folder).exists():
            raise UserError(f"{folder}, the data that {run_dir} was trained on, is gone: give --data_dir=DIR for where "
                            "it is now, or --text=FILE for a text to measure")
        manifest = load_manifest(folder, verify=False)
        if data_dir is None and manifest["data_hash"] != run.manifest.get("data_hash"):
            raise UserError(f"{folder} is no longer the corpus that {run_dir} was trained on; give --data_dir to use "
                            "it all the same")
        documents, report["split"] = read_documents(folder, split), split
        if split == "validation" and not max_batches:
            report["unigram_bits_per_byte"] = manifest.get("unigram_bits_per_byte")
    compile_cache.enable_compile_cache()
    batches = evaluation_windows(documents, row_length, batch_size)
    if max_batches:
        batches = itertools.islice(batches, max_batches)
    fixed = row_length if run.config.switches_on_length else None  # or a loss would depend on the batch's longest text
    model = build_language_model(run.config, Execution(dtype=dtype, rope_context=fixed))
    measured = evaluate_loss(model, run.params, batches, byte_lengths=run.tokenizer.byte_lengths)
    print(json.dumps(measured | report, ensure_ascii=False))


def main(argv=None) -> int:
    """Evaluates; returns the exit status."""
    return cli.gin_main("experiments.evaluate:evaluate", (), argv, description=__doc__, examples=EXAMPLES, flags=True)


if __name__ == "__main__":
    sys.exit(cli.run(main))
