"""Where a run's first parameters come from, if not from a seed: those of another run, imported or trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from etils import epath

from llm_jax import runs, storage
from llm_jax.checkpoints import Checkpoints
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.errors import UserError
from llm_jax.models import ModelConfig


def find_model(model: ModelConfig | None, init_from: epath.PathLike | None, run_dir: epath.PathLike,
               manifest: Mapping[str, Any] | None) -> ModelConfig:
    """What the model of a run is: as given, or that of the run it begins with.

    Args:
      model: what the settings say; None leaves it to the run.
      init_from: the run directory to begin with, or None.
      run_dir: the run that is to be made or continued.
      manifest: of the run that is in `run_dir`, or None.

    Raises:
      UserError: nothing says what the model is, the two say different things, or `run_dir` holds an imported model.
    """
    if manifest is not None and ("imported" in manifest or "promoted" in manifest):
        kind = "a promoted" if "promoted" in manifest else "an imported"
        raise UserError(f"{run_dir} holds {kind} model, which stays as it is: train another run from it, with "
                        f"--gin.INIT_FROM={run_dir} and a RUN_DIR of its own")
    if init_from is not None and storage.located(init_from) == storage.located(run_dir):
        raise UserError(f"INIT_FROM and RUN_DIR are both {run_dir}: what a run begins with is another run")
    if init_from is None or manifest is not None:
        if model is None and manifest is None:
            raise UserError("nothing says what the model is: set train.model, or INIT_FROM to a run to begin with")
        return model or runs.load(run_dir).config
    found = runs.load(init_from).config
    if model is not None and model != found:
        differing = [f"{field.name} is {getattr(found, field.name)!r} there and {getattr(model, field.name)!r} here"
                     for field in dataclasses.fields(found)
                     if getattr(found, field.name) != getattr(model, field.name)]
        raise UserError(f"the model is not that of {init_from}: {'; '.join(differing)}. Set train.model = None to take "
                        "that one")
    return found


def check_tokenizer(init_from: epath.PathLike, tokenizer: Tokenizer, data_dir: epath.PathLike) -> None:
    """UserError unless the data's tokenizer is that of the run to begin with, if it has one."""
    try:
        theirs = runs.load(init_from).tokenizer
    except UserError:  # an imported folder may have had none; then nothing can be said
        return
    if _identity(theirs) != _identity(tokenizer):
        raise UserError(f"the tokens in {data_dir} are not those of {init_from}: prepare the text with its tokenizer "
                        f"(--gin.TOKENIZER={init_from})")


def restore_params(init_from: epath.PathLike, like: Any) -> Any:
    """The latest parameters of a run in the dtypes, shapes and shardings of `like`.

    Raises:
      UserError: it has no checkpoint, or a damaged one.
    """
    with Checkpoints(storage.located(init_from) / runs.CHECKPOINTS, read_only=True) as checkpoints:
        return checkpoints.restore_params(like)


def keep(init_from: epath.PathLike, run_dir: epath.Path) -> None:
    """Hands on what an export needs of the checkpoint that was imported in the first place."""
    _copy(storage.located(init_from) / runs.ORIGIN, run_dir / runs.ORIGIN)


def _copy(source: epath.Path, target: epath.Path) -> None:
    for path in source.iterdir() if source.is_dir() else ():
        if path.is_dir():
            _copy(path, target / path.name)
        else:
            storage.copy_atomically(path, target / path.name)  # some are as large as a tensor


def decisive(init_from: epath.PathLike | None) -> dict[str, Any]:
    """The entry of `resume.decisive_settings`; none for a run that begins with a seed."""
    return {} if init_from is None else {"init_from": str(storage.located(init_from))}


def _identity(tokenizer: Tokenizer) -> tuple[Any, ...]:
    return (tokenizer.files.main, tokenizer.vocab_size, tokenizer.special_ids, tokenizer.bos_id, tokenizer.eos_id)

