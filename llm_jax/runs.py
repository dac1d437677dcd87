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
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, overload

from etils import epath

from llm_jax import storage
from llm_jax.errors import UserError

if TYPE_CHECKING:
    from llm_jax.data.tokenizer import Tokenizer
    from llm_jax.inference.engine import Engine
    from llm_jax.inference.engine_config import EngineConfig
    from llm_jax.inference.generation_config import SamplingDefaults
    from llm_jax.inference.offline import Offline
    from llm_jax.models import ModelConfig

MODEL, CONFIG, MANIFEST, CHECKPOINTS, LOGS = "model.json", "config.gin", "manifest.json", "checkpoints", "logs"
ORIGIN = "huggingface"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "sentencepiece", "tokenizers", "numpy")


class Run:
    """A run directory, opened for reading; its parts are loaded when they are first asked for.

    Attributes:
      directory: where it is.
      config: the `ModelConfig`.
      step: which checkpoint its parameters are of, as given to `load`.
    """

    def __init__(self, directory: epath.Path, config: ModelConfig, step: int | str | None = None):
        self.directory = directory
        self.config = config
        self.step = step

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
        """The parameters of the checkpoint (the latest, unless `load` was told another), stacked layout, on the first
        device; float32, or as an imported checkpoint stored them."""
        import jax

        with jax.ensure_compile_time_eval():  # whoever asks first may be inside a jit, and this is kept
            return self.load_params()

    def load_params(self, dtype: str | Callable[[tuple[Any, ...]], str] | None = None) -> Any:
        """Reads the parameters, cast while they are read.

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
            step = self.resolve_step()
            if dtype is None:
                checkpoints.check_params(shapes, step)
                return checkpoints.restore_params(step=step)
            wanted = jax.tree_util.tree_map_with_path(
                lambda path, leaf: jax.ShapeDtypeStruct(leaf.shape, dtype(path) if callable(dtype) else dtype), shapes)
            return checkpoints.restore_params(wanted, step)

    def resolve_step(self) -> int | None:
        """The number of the checkpoint's step; None for the latest.

        Raises:
          UserError: no evaluation says which is best, or none passed the gate, or the step is no number.
        """
        step = self.step
        if step in (None, "latest"):
            return None
        if step == "best":
            best = self.manifest.get("best")
            if not best:
                raise UserError(f"{self.directory} does not say which step is best: it was not evaluated after a step")
            return best["step"]
        if step == "good":
            good = self.manifest.get("gate", {}).get("good_step")
            if good is None:
                raise UserError(f"no checkpoint of {self.directory} has passed the gate"
                                + ("" if "gate" in self.manifest else ": it was trained without one"))
            return good
        try:
            return int(step)  # type: ignore[call-overload]
        except ValueError as error:
            raise UserError(f"step={step!r} is neither a number nor 'latest', 'best' or 'good'") from error

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

    def engine(self, options: EngineConfig, draft_run_dir: epath.PathLike | None = None, *,
               available_bytes: int | None = None) -> tuple[Engine, Tokenizer]:
        """The serving engine over these weights, not yet compiled, and the tokenizer.

        Args:
          options: the engine's layout.
          draft_run_dir: run directory of a smaller model that proposes up to `options.max_proposed` tokens.
          available_bytes: memory for weights and pages; default what is free.
        Raises:
          UserError: a model generates no text, weights or pages do not fit, the draft has another tokenizer (all said
            before the weights are read), or a directory is damaged.
        """
        # Imported here, as the library's leaves import no room above them; a run that is only read needs no engine.
        from llm_jax.inference import memory
        from llm_jax.inference.engine import Engine
        from llm_jax.inference.engine_config import default_dtype

        draft = None if draft_run_dir is None else load(draft_run_dir)
        dtype = options.dtype or default_dtype()
        available = memory.free_bytes() if available_bytes is None else available_bytes
        left = self._check_serves(dtype, available)
        if draft is not None:
            if not options.max_proposed:
                raise UserError("a draft model proposes nothing with max_proposed=0; set it to 3 or so")
            try:
                left = draft._check_serves(dtype, left)
            except UserError as error:
                raise UserError(f"the draft model {draft.directory}: {error}") from error
            _check_same_tokens(self, draft)
        return Engine(self.config, self._serving_params(dtype), options, available_bytes=left, free_params=True,
                      draft=None if draft is None else (draft.config, draft._serving_params(dtype))), self.tokenizer

    def _check_serves(self, dtype: str, available: int) -> int:
        """The bytes that the weights leave of `available`; UserError if they don't fit, or can't be served."""
        import jax.numpy as jnp

        from llm_jax.inference import memory
        from llm_jax.inference.engine import check_generates

        check_generates(self.config)
        # Special tokens past the model's rows may be there (for images, say): no text gives them.
        if self.tokenizer.text_vocab_size > self.config.vocab_size:
            raise UserError(f"{self.directory}: the tokenizer has {self.tokenizer.text_vocab_size} tokens, the model "
                            f"only {self.config.vocab_size}; they are not of one run")
        itemsize = jnp.dtype(dtype).itemsize
        memory.check_weights_fit(self.config, itemsize, available)
        return available - self.config.num_params() * itemsize

    def _serving_params(self, dtype: str) -> Any:
        from llm_jax.inference.engine import leaf_dtype

        return self.load_params(lambda path: leaf_dtype(path, dtype))

    @overload
    def generate(self, prompt: str, max_tokens: int | None = None, temperature: float | None = None,
                 **sampling: Any) -> str: ...

    @overload
    def generate(self, prompt: Sequence[str], max_tokens: int | None = None, temperature: float | None = None,
                 **sampling: Any) -> list[str]: ...

    def generate(self, prompt: str | Sequence[str], max_tokens: int | None = None, temperature: float | None = None,
                 **sampling: Any) -> str | list[str]:
        """Continues `prompt`, or each of several together; the text alone, without the prompt.

        What is None is as the model's `generation_config.json` says, if it has one.

        Args:
          prompt: any text; BOS is put in front of its tokens if the model expects it. For a list, a list is returned.
          max_tokens: most tokens to generate; else 128.
          temperature: 0 for the most likely token each time; else 0.
          **sampling: other fields of `inference.request.SamplingParams`, and what `complete` has.
        Raises:
          UserError: a completion could not be finished; `complete` tells which instead.
        """
        def text(found: Any) -> Any:
            if isinstance(found, list):
                return [text(one) for one in found]
            if found.error:
                raise UserError(found.error)
            return found.text

        return text(self.complete(prompt, max_tokens=max_tokens, temperature=temperature, **sampling))

    def complete(self, prompt: str | Sequence[str], *, n: int | None = None, best_of: int | None = None,
                 **sampling: Any) -> Any:
        """As `generate`, with tokens, log-probabilities and counts: an `inference.generation.Completion`, or a list.

        Args:
          prompt: text, or several.
          n: completions of each prompt, drawn apart; if it is given, each prompt's are a list.
          best_of: draw so many of each, and return the n (else 1) of the highest mean log-probability, the best first.
          **sampling: as of `generate`.
        """
        found = self._offline.complete([prompt] if isinstance(prompt, str) else list(prompt), n, best_of, **sampling)
        shaped = found if n is not None else [each[0] for each in found]
        return shaped[0] if isinstance(prompt, str) else shaped

    def embed(self, text: str | Sequence[str], pooling: str = "mean") -> Any:
        """The embedding of a text, float32 [D], or of several, [n, D]: the model's normalised hidden states, pooled.

        Args:
          text: one text, or several.
          pooling: "mean" over all tokens, or "last".
        """
        found = self._offline.embed([text] if isinstance(text, str) else list(text), pooling)
        return found[0] if isinstance(text, str) else found

    @functools.cached_property
    def _offline(self) -> Offline:
        from llm_jax.inference.offline import Offline

        return Offline(self)

    def close(self) -> None:
        """Ends the engine that `generate` started and lets go of its weights; a later `generate` makes another."""
        if "_offline" in vars(self):
            self._offline.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load(run_dir: epath.PathLike, step: int | str | None = None) -> Run:
    """Opens a run directory.

    Args:
      run_dir: where it is.
      step: which checkpoint the parameters are of: its number; "best", of the best evaluation (kept with
        `GateConfig.keep_best`); "good", the newest that passed the gate; None or "latest".

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
        return Run(directory, ModelConfig.from_dict(fields), step)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _check_same_tokens(run: Run, draft: Run) -> None:
    """UserError unless the ids of both tokenizers mean the same text, whatever else their files say."""
    def content(tokenizer: Tokenizer) -> tuple[Any, ...]:
        return [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)], tokenizer.special_ids

    if run.tokenizer.fingerprint != draft.tokenizer.fingerprint and content(run.tokenizer) != content(draft.tokenizer):
        raise UserError(f"the draft model {draft.directory} has another tokenizer than {run.directory}; what it "
                        "proposes would be other text")


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
