"""The run directory: everything there is to know about one model, handed from stop to stop.

    model.json      ModelConfig: rebuilds the module without Gin
    config.gin      the operative configuration, for replay
    manifest.json   git revision, package versions, data hashes, mesh, seeds, metrics
    tokenizer.*     and what came beside it: special tokens, chat template
    generation_config.json   of an imported model: end tokens, how it wants to be sampled
    checkpoints/    Orbax
    huggingface/    of an imported model, or one trained from it: what the checkpoint held beside its weights
    logs/           TensorBoard, metrics
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from etils import epath

from llm_jax import storage
from llm_jax.errors import UserError

if TYPE_CHECKING:
    from llm_jax.data.tokenizer import Tokenizer
    from llm_jax.inference.engine import Engine, EngineConfig
    from llm_jax.inference.generation_config import SamplingDefaults
    from llm_jax.models import ModelConfig

MODEL, CONFIG, MANIFEST, CHECKPOINTS, LOGS = "model.json", "config.gin", "manifest.json", "checkpoints", "logs"
ORIGIN = "huggingface"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "sentencepiece", "tokenizers", "numpy")

log = logging.getLogger(__name__)


class Run:
    """A run directory, opened for reading; its parts are loaded when they are first asked for.

    Attributes:
      directory: where it is.
      config: the `ModelConfig`.
    """

    def __init__(self, directory: epath.Path, config: ModelConfig):
        self.directory = directory
        self.config = config

    @functools.cached_property
    def manifest(self) -> dict[str, Any]:
        """What `manifest.json` says; empty if there is none."""
        path = self.directory / MANIFEST
        return _read_json(path) if path.exists() else {}

    @functools.cached_property
    def model(self) -> Any:
        """The Flax module (`models.build`). Of a decoder `run.model.apply({"params": run.params}, tokens_BT)` gives
        float32 logits [B, T, V]."""
        from llm_jax import models

        return models.build(self.config)

    @functools.cached_property
    def params(self) -> Any:
        """The parameters of the latest checkpoint, stacked layout, on the first device; float32, or as an imported
        checkpoint stored them."""
        import jax

        with jax.ensure_compile_time_eval():  # whoever asks first may be inside a jit, and this is kept
            return self.load_params()

    def load_params(self, dtype: str | Callable[[tuple[Any, ...]], str] | None = None) -> Any:
        """Reads the latest parameters, cast while they are read.

        Args:
          dtype: of all of them, or a function of a parameter's path (keys of `jax.tree_util`) that says it; None
            leaves them as they were saved.
        Raises:
          UserError: no checkpoint, a damaged one, or one of another model's shapes.
        """
        import jax

        from llm_jax.checkpoints import Checkpoints
        from llm_jax.models import abstract_params

        shapes = abstract_params(self.model)
        with Checkpoints(self.directory / CHECKPOINTS, read_only=True) as checkpoints:
            if dtype is None:
                checkpoints.check_params(shapes)
                return checkpoints.restore_params()
            wanted = jax.tree_util.tree_map_with_path(
                lambda path, leaf: jax.ShapeDtypeStruct(leaf.shape, dtype(path) if callable(dtype) else dtype), shapes)
            return checkpoints.restore_params(wanted)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer the model was trained with."""
        from llm_jax.data.tokenizer import Tokenizer

        return Tokenizer.load(self.directory)

    @functools.cached_property
    def sampling_defaults(self) -> SamplingDefaults:
        """How the model wants to be sampled, from its `generation_config.json`; greedily where it has none."""
        from llm_jax.inference import generation_config

        return generation_config.read(self.directory)

    def engine(self, options: EngineConfig, *, available_bytes: int | None = None) -> tuple[Engine, Tokenizer]:
        """The serving engine over these weights, not yet compiled, and the tokenizer.

        Args:
          options: the engine's layout.
          available_bytes: memory for weights and pages; default what is free.
        Raises:
          UserError: the model generates no text, weights or pages do not fit (both said before the weights are read),
            or the directory is damaged.
        """
        # Imported here, as the library's leaves import no room above them; a run that is only read needs no engine.
        import jax.numpy as jnp

        from llm_jax.inference import memory
        from llm_jax.inference.engine import Engine, check_generates, default_dtype, leaf_dtype

        check_generates(self.config)
        tokenizer = self.tokenizer
        # Special tokens past the model's rows may be there (for images, say): no text gives them.
        if tokenizer.text_vocab_size > self.config.vocab_size:
            raise UserError(f"{self.directory}: the tokenizer has {tokenizer.text_vocab_size} tokens, the model only "
                            f"{self.config.vocab_size}; they are not of one run")
        dtype = options.dtype or default_dtype()
        itemsize = jnp.dtype(dtype).itemsize
        available = memory.free_bytes() if available_bytes is None else available_bytes
        memory.check_weights_fit(self.config, itemsize, available)
        left = available - self.config.num_params() * itemsize
        params = self.load_params(lambda path: leaf_dtype(path, dtype))
        return Engine(self.config, params, options, available_bytes=left, free_params=True), tokenizer

    def generate(self, prompt: str, max_tokens: int | None = None, temperature: float | None = None,
                 **sampling: Any) -> str:
        """Continues `prompt`; the text alone, without the prompt.

        What is None is as the model's `generation_config.json` says, if it has one.

        Args:
          prompt: any text; BOS is put in front of its tokens if the model expects it.
          max_tokens: most tokens to generate; else 128.
          temperature: 0 for the most likely token each time; else 0.
          **sampling: other fields of `inference.request.SamplingParams`.
        """
        return self.complete(prompt, max_tokens=max_tokens, temperature=temperature, **sampling).text

    def complete(self, prompt: str, **sampling: Any) -> Any:
        """As `generate`, with tokens, log-probabilities and counts: an `inference.generation.Completion`."""
        from llm_jax.inference.generation import complete

        params = self.sampling_defaults.params(**sampling)  # first: it may be refused, and the engine takes seconds
        return complete(self._service, [self._service.encode(prompt)], [params])[0]

    @functools.cached_property
    def _service(self) -> Any:
        from llm_jax import compile_cache
        from llm_jax.inference.generation import ALONE
        from llm_jax.inference.service import Service

        compile_cache.enable_compile_cache()
        engine, tokenizer = self.engine(ALONE)
        engine.compile()
        for note in self.sampling_defaults.notes:
            log.warning("%s: %s", self.directory, note)
        return Service(engine, tokenizer, defaults=self.sampling_defaults)

    def close(self) -> None:
        """Ends the engine that `generate` started and lets go of its weights; a later `generate` makes another."""
        service = self.__dict__.pop("_service", None)
        if service is not None:
            service.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load(run_dir: epath.PathLike) -> Run:
    """Opens a run directory.

    Raises:
      UserError: it is not one, or its model description is damaged.
    """
    from llm_jax.models import ModelConfig

    directory = storage.located(run_dir)
    path = directory / MODEL
    try:
        if not path.exists():
            raise UserError(f"{directory} is not a run directory: it has no {MODEL}")
    except PermissionError as error:
        raise UserError(f"cannot read {directory}: {error.strerror}") from error
    fields = _read_json(path)
    try:
        return Run(directory, ModelConfig.from_dict(fields))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def create(run_dir: epath.PathLike, config: ModelConfig, tokenizer_path: epath.PathLike | None, config_gin: str,
           manifest: dict[str, Any]) -> epath.Path:
    """Makes a run directory, or rewrites the description of one that is there (checkpoints and logs stay).

    Args:
      run_dir: where.
      config: the model.
      tokenizer_path: the folder that holds the tokenizer (its files, chat template and `generation_config.json`), or
        its main file, which is copied with what lies beside it; None leaves what is there.
      config_gin: the configuration that `--gin_file` can replay.
      manifest: what this run is made of; `environment()` is added.
    Returns:
      the directory.
    Raises:
      UserError: it cannot be written, or there is no tokenizer or a damaged one.
    """
    from llm_jax.data.tokenizer import Tokenizer
    from llm_jax.data.tokenizers import folder

    source = None if tokenizer_path is None else storage.located(tokenizer_path)
    directory = storage.located(run_dir)
    try:
        (directory / LOGS).mkdir(parents=True, exist_ok=True)
        if source is not None and source.is_dir():
            Tokenizer.load(source).save(directory)
        elif source is not None:
            folder.write(directory, folder.read(source).contents)
        storage.write_atomically(directory / CONFIG, config_gin.encode())
        storage.write_atomically(directory / MANIFEST, storage.to_json(environment() | manifest))
        # Last: a directory with a model.json is a run directory.
        storage.write_atomically(directory / MODEL, storage.to_json(config.to_dict()))
    except OSError as error:
        raise UserError(f"cannot write the run directory {directory}: {error.strerror or error}") from error
    return directory


def update_manifest(run_dir: epath.PathLike, **fields: Any) -> None:
    """Sets top-level fields of the manifest, atomically."""
    path = storage.located(run_dir) / MANIFEST
    storage.write_atomically(path, storage.to_json(_read_json(path) | fields))


def environment() -> dict[str, Any]:
    """Git revision (None outside a checkout), Python, platform and package versions."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"git_revision": _git_revision(), "python": platform.python_version(), "platform": platform.platform(),
            "packages": versions}


def _read_json(path: epath.Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value


def _git_revision() -> str | None:
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        found = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
                               capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None
