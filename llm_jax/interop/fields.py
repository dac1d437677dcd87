"""Reading a `config.json` without guessing: every key is read, known to be harmless, or refused by name."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from llm_jax.errors import UserError

# Keys that say nothing of what a forward pass computes: where a file comes from, which numbers the special tokens have
# (the tokenizer and generation_config.json say), how weights were initialised, dropout and noise of training (this
# project has none), what is returned beside the outputs, how a framework runs the model, and the sampling options that
# older files kept here. Each by its full name: a pattern would let through keys that nobody has thought of.
_HARMLESS = frozenset("""
    architectures model_type dtype torch_dtype transformers_version transformers.js_config name_or_path _name_or_path
    _commit_hash auto_map finetuning_task task_specific_params title license unsloth_fixed unsloth_version language
    bos_token eos_token pad_token sep_token cls_token unk_token mask_token decoder_start_token
    bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id unk_token_id mask_token_id decoder_start_token_id
    tokenizer_class prefix max_sequence_length model_max_length
    initializer_range initializer_factor dropout dropout_rate attention_dropout attention_probs_dropout_prob
    attention_dropout_prob hidden_dropout hidden_dropout_prob resid_dropout residual_dropout embd_dropout
    embedding_dropout attn_pdrop embd_pdrop resid_pdrop classifier_dropout classifier_dropout_prob
    summary_first_dropout layerdrop router_jitter_noise
    use_cache cache_implementation attn_implementation _attn_implementation return_dict use_return_dict
    output_attentions output_hidden_states output_router_logits output_past output_scores output_logits
    gradient_checkpointing use_flash_attn pretraining_tp ep_size torchscript use_bfloat16 chunk_size_feed_forward
    id2label label2id num_labels problem_type
    max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    return_dict_in_generate""".split())

# Switches which models that do not read them have off.
_OFF = ("is_decoder", "is_encoder_decoder", "tie_encoder_decoder", "add_cross_attention", "use_bidirectional_attention")
_MISSING: Any = object()


class Fields:
    """The keys of one `config.json`, each marked as it is read.

    A family gives the values of absent keys by `default` (those of its configuration class in `transformers`, which
    files leave out), reads what it uses, names what it accepts in one value alone (`must`) or does not use (`ignore`),
    and whoever called it ends with `finish`, which refuses what is left.
    """

    def __init__(self, values: Mapping[str, Any], source: str = "config.json",
                 tensors: Collection[str] | None = None) -> None:
        """
        Args:
          values: of the file.
          source: what messages call it, a path perhaps.
          tensors: canonical names of the checkpoint's tensors, where they are known: what some files leave open (which
            of BERT's heads there are) those say.
        """
        if not isinstance(values, Mapping):
            raise UserError(f"{source} holds no JSON object of settings")
        self.values, self.source, self.tensors = dict(values), source, tensors
        self._defaults: dict[str, Any] = {}
        self._read: set[str] = set()

    def default(self, **values: Any) -> None:
        """What absent keys mean; a default given before stands."""
        self._defaults = values | self._defaults

    def given(self, key: str) -> bool:
        """Whether the file itself has the key, with a value other than null."""
        return self.values.get(key) is not None

    def raw(self, key: str) -> Any:
        """The value whatever it is: the file's, or the default. UserError where there is neither."""
        self._read.add(key)
        value = self.values.get(key, self._defaults.get(key, _MISSING))
        if value is _MISSING:
            raise UserError(f"{self.source}: {key!r} is missing")
        return value

    def refuse(self, key: str, supported: str, value: Any = _MISSING) -> NoReturn:
        """UserError that names the key, its value and what is supported."""
        shown = repr(self.raw(key) if value is _MISSING else value)
        raise UserError(f"{self.source}: {key}={shown if len(shown) <= 80 else shown[:77] + '...'} is not supported; "
                        f"supported: {supported}")

    def integer(self, key: str, least: int = 1) -> int:
        """A whole number of at least `least`."""
        value = self.raw(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            self.refuse(key, f"whole numbers from {least}")
        return value

    def number(self, key: str) -> float:
        """A finite number, as a float."""
        value = self.raw(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < sys.float_info.max:
            self.refuse(key, "numbers")
        return float(value)

    def flag(self, key: str) -> bool:
        """True or False."""
        value = self.raw(key)
        if not isinstance(value, bool):
            self.refuse(key, "true and false")
        return value

    def maybe_integer(self, key: str) -> int | None:
        """A positive whole number, or None for null."""
        return None if self.raw(key) is None else self.integer(key)

    def maybe_number(self, key: str) -> float | None:
        """A number, or None for null."""
        return None if self.raw(key) is None else self.number(key)

    def choice(self, key: str, choices: Mapping[str, str]) -> str:
        """What `choices` translates the value to."""
        value = self.raw(key)
        if not isinstance(value, str) or value not in choices:
            self.refuse(key, ", ".join(map(repr, choices)))
        return choices[value]

    def strings(self, key: str) -> list[str] | None:
        """A list of strings, or None for null."""
        value = self.raw(key)
        if value is not None and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            self.refuse(key, "lists of strings")
        return value

    def must(self, key: str, *allowed: Any) -> None:
        """The key is absent, null, or one of `allowed`: nothing else is supported."""
        self._read.add(key)
        value = self.values.get(key)
        if value is not None and not any(value == a and isinstance(value, bool) == isinstance(a, bool)
                                         for a in allowed):
            self.refuse(key, " or ".join(map(repr, allowed)), value)

    def ignore(self, *keys: str) -> None:
        """Keys which the family's models do not read, whatever their value."""
        self._read.update(keys)

    def nested(self, key: str) -> Fields | None:
        """The object under a key, to be read and finished by itself; None where it is absent or null."""
        self._read.add(key)
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            self.refuse(key, "a JSON object, or null", value)
        return Fields(value, f"{self.source}: {key}")

    def finish(self) -> None:
        """Refuses the first key with a value that was neither read nor is known to change nothing."""
        for key in sorted(self.values):
            known = key in self._read or key in _HARMLESS
            if known or self.values[key] in (None, {}, []) or (key in _OFF and self.values[key] is False):
                continue
            value = repr(self.values[key])
            raise UserError(f"{self.source}: {key}={value if len(value) <= 80 else value[:77] + '...'} is not "
                            f"supported: no model of this family that this project knows reads it, and it may change "
                            f"what is computed. If you know that it does not, remove it from the file")

