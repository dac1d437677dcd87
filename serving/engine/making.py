"""The service of a run directory, or of a Hugging Face folder, as the engine's process makes it."""

from __future__ import annotations

import hashlib
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from llm_jax import runs, storage
from llm_jax.errors import UserError
from serving.engine.process import Made

MAX_PROPOSED = 4  # where there is a draft model, and nobody says


def make(run_dir: str | None, hf_dir: str | None, layout: dict[str, Any], options: dict[str, Any],
         say: Callable[[str], None]) -> Made:
    """Loads a model and compiles everything; one of several processes (`parallel.distributed`) meets the others first.

    Args:
      run_dir: run directory.
      hf_dir: instead of it, a Hugging Face folder.
      layout: fields of `EngineConfig`; None is its own default.
      options: of `Service.from_run`; None is its own default.
      say: receives lines of progress.
    Raises:
      UserError: the model is damaged, or it or its cache does not fit.
    """
    import jax  # here, so that the doors' process can import what is above

    from llm_jax.inference.engine_config import EngineConfig
    from llm_jax.inference.joint import JointService
    from llm_jax.inference.service import Service
    from llm_jax.parallel import distributed

    given = {name: value for name, value in layout.items() if value is not None}
    is_joint = distributed.initialize()
    if is_joint:
        given.setdefault("tensor", len(jax.devices()))
    if options.get("draft_run_dir") is not None:
        given.setdefault("max_proposed", MAX_PROPOSED)
    config = EngineConfig(**given)
    if hf_dir is not None:
        run_dir = str(imported(hf_dir, say))
    assert run_dir is not None
    kind = JointService if is_joint else Service
    service = kind.from_run(run_dir, config, on_event=say,
                            **{name: value for name, value in options.items() if value is not None})
    created = _written(storage.located(run_dir) / runs.MODEL)
    return Made(service, run_dir, created, follows=is_joint and not distributed.is_lead())


def imported(hf_dir: str, say: Callable[[str], None] = lambda line: None) -> pathlib.Path:
    """The run directory of a Hugging Face folder, in the user's cache; made if it is not there or the folder changed.

    Raises:
      UserError: the folder is damaged or holds what this project does not know, or the disk refuses.
    """
    from llm_jax.interop.huggingface import local
    from llm_jax.interop.importing import import_run

    source = local(hf_dir).resolve()
    target = storage.cache_dir() / "imported" / f"{source.name or 'model'}-{_fingerprint(source)}"
    if (target / runs.MODEL).exists():
        return target
    try:
        import_run(source, target, progress=sys.stderr.isatty())
    except UserError:
        if not (target / runs.MODEL).exists():  # another process may have been quicker
            raise
    say(f"imported {hf_dir} into {target}")
    return target


def _fingerprint(folder: pathlib.Path) -> str:
    """Changes with the folder's place and the names, sizes and times of its files."""
    digest = hashlib.sha256(str(folder).encode())
    try:
        for path in sorted(folder.iterdir()):
            facts = path.stat()
            digest.update(f"{path.name}\0{facts.st_size}\0{facts.st_mtime_ns}\0".encode())
    except OSError as error:
        raise UserError(f"can't read {folder}: {error.strerror or error}") from error
    return digest.hexdigest()[:16]


def _written(path: Any) -> int:
    """When a file was written, seconds since 1970; 0 if it can't be asked."""
    try:
        return int(path.stat().mtime)
    except OSError:
        return 0
