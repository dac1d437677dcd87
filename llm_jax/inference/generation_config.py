"""How a model wants to be sampled: its `generation_config.json`, obeyed where a caller says nothing."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

from llm_jax import storage
from llm_jax.data.tokenizers import folder
from llm_jax.errors import UserError
from llm_jax.inference.request import SamplingParams

FILE_NAME = "generation_config.json"
_TOP_K = 50  # of transformers, where a file asks for sampling and does not say

# What the file may hold that changes no token here: bookkeeping, lengths (the caller's or the context's business), and
# details of searches that other fields switch on.
_HARMLESS = frozenset({
    "_from_model_config", "transformers_version", "eos_token_id", "bos_token_id", "pad_token_id",
    "decoder_start_token_id", "max_length", "use_cache", "cache_implementation", "cache_config", "num_return_sequences",
    "early_stopping", "length_penalty", "low_memory", "renormalize_logits", "trust_remote_code", "compile_config",
    "disable_compile", "return_legacy_cache", "prefill_chunk_size", "chat_format", "max_time",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_lookbehind",
    "target_lookbehind", "assistant_early_exit", "is_assistant", "max_matching_ngram_size", "prompt_lookup_num_tokens",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"})
# Values under which a field that is not supported does nothing.
_OFF: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,), "num_beam_groups": (1,), "diversity_penalty": (0,), "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,), "typical_p": (1,), "epsilon_cutoff": (0,),
    "eta_cutoff": (0,), "top_h": (1,), "min_length": (0,), "guidance_scale": (1,), "penalty_alpha": (0,),
    "remove_invalid_values": (False,), "token_healing": (False,)}
_SAMPLING_ONLY = frozenset({"typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"})
# Fields of the file, and what `SamplingParams` calls them.
_OBEYED = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
           "repetition_penalty": "repetition_penalty", "min_new_tokens": "min_tokens", "max_new_tokens": "max_tokens"}
_FILLED = ("temperature", "top_k", "top_p", "stop", "min_p", "repetition_penalty")


@dataclasses.dataclass(frozen=True)
class SamplingDefaults:
    """What holds where a request says nothing.

    Attributes:
      temperature, top_k, top_p, stop, min_p, repetition_penalty: as in `SamplingParams`.
      max_tokens: most tokens to generate, for callers that have no limit of their own; None if the file has none.
      notes: what the file asks for and is not done, a line each.
      min_tokens: as in `SamplingParams`, or what is asked for if that is less.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None
    notes: tuple[str, ...] = ()
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0

    def params(self, max_tokens: int | None = None, **fields: Any) -> SamplingParams:
        """Sampling parameters of a request; what is None is filled in.

        Args:
          max_tokens: None: the file's, else `SamplingParams`' own.
          **fields: other fields of `SamplingParams`.
        Raises:
          InvalidRequest: a value out of range.
        """
        given = {name: value for name, value in fields.items() if value is not None}
        limit = max_tokens if max_tokens is not None else self.max_tokens
        if limit is not None:
            given["max_tokens"] = limit
        filled = {name: getattr(self, name) for name in _FILLED}
        if self.min_tokens:
            most = SamplingParams.max_tokens if limit is None else limit
            filled["min_tokens"] = min(self.min_tokens, most) if isinstance(most, int) else 0
        return SamplingParams(**filled | given)


def read(directory: str | os.PathLike) -> SamplingDefaults:
    """The defaults of the model in a run directory or Hugging Face folder; the likeliest token where nothing is said.

    Raises:
      UserError: the file cannot be read, or holds values that are none.
    """
    path = storage.as_path(directory) / FILE_NAME
    fields = _object(path)
    try:
        return _defaults(fields)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def answer_tokens(directory: str | os.PathLike) -> tuple[int, tuple[int, ...]]:
    """Where an encoder–decoder's answers begin and end: `start_id` and `end_ids` of `seq2seq.generate`.

    Each is the first that is given: `decoder_start_token_id` of generation_config.json, of config.json, then
    `bos_token_id`; `eos_token_id` likewise (no end tokens if none is given).

    Args:
      directory: an imported run directory or a Hugging Face folder.
    Raises:
      UserError: a file cannot be read, an id is no whole number, or nothing says where answers begin.
    """
    where = storage.as_path(directory)
    objects = [_object(where / name) for name in (FILE_NAME, *folder.MODEL_CONFIG)]

    def first(*names: str) -> list[int]:
        for name in names:
            for fields in objects:
                ids = folder.listed_ids(fields.get(name))
                if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
                    raise UserError(f"{where}: {name} must be a token's id, not {fields[name]!r:.80}")
                if ids:
                    return ids
        return []

    start = first("decoder_start_token_id", "bos_token_id")
    if not start:
        raise UserError(f"{where}: neither {FILE_NAME} nor config.json has a decoder_start_token_id")
    return start[0], tuple(dict.fromkeys(first("eos_token_id")))


def _object(path: Any) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    try:
        fields = json.loads(path.read_bytes()) if path.exists() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(fields).__name__}")
    return fields


def _defaults(fields: dict[str, Any]) -> SamplingDefaults:
    draws = fields.get("do_sample")
    if draws not in (None, True, False):
        raise UserError(f"do_sample must be true or false, not {draws!r:.80}")
    given = {ours: fields[name] for name, ours in _OBEYED.items() if fields.get(name) is not None}
    stop = fields.get("stop_strings")
    if stop is not None:
        if not isinstance(stop, (str, list)):
            raise UserError(f"stop_strings must be strings, not {stop!r:.80}")
        given["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    if not draws:
        given["temperature"] = 0.0
    else:
        given = {"temperature": 1.0, "top_k": _TOP_K} | given
    least = given.get("min_tokens")
    # Without a limit of its own the file's least is no more than what the caller's leaves.
    room = {"max_tokens": least} if "max_tokens" not in given and isinstance(least, int) and least > 0 else {}
    checked = SamplingParams(**given | room)  # raises for values out of range
    return SamplingDefaults(**{name: getattr(checked, name) for name in _FILLED}, min_tokens=checked.min_tokens,
                            max_tokens=given.get("max_tokens"), notes=tuple(_notes(fields, bool(draws))))


def _notes(fields: dict[str, Any], draws: bool) -> list[str]:
    understood = {"do_sample", "stop_strings", *_OBEYED}
    notes = []
    for name, value in fields.items():
        if name in understood | _HARMLESS or value in (None, [], {}) or (name in _SAMPLING_ONLY and not draws):
            continue
        if name in _OFF and value in _OFF[name]:
            continue
        notes.append(f"{FILE_NAME} asks for {name}={json.dumps(value, ensure_ascii=False)[:100]}, which is not "
                     "supported and left out: tokens may differ from transformers'")
    return notes
