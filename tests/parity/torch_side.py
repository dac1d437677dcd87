"""A drawn model in transformers: its checkpoint on disk, its outputs, and its gradients by the checkpoint's names."""

from __future__ import annotations

import copy
import pathlib
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file

from tests.golden.spec import randomize
from tests.parity.drawn import LONGEST, ROWS, Case

FILE = "model.safetensors"


def make(case: Case, folder: pathlib.Path, seed: int) -> torch.nn.Module:
    """Writes a checkpoint with random weights and gives the model as transformers reads it from there."""
    cls = getattr(transformers, case.model)
    model = cls._from_config(case.config, dtype=torch.float32)
    randomize(model, case.gains, seed)
    model.save_pretrained(folder)
    if case.untied:
        tensors = load_torch(folder / FILE)
        shape = tensors["shared.weight"].shape
        noise = np.random.default_rng(seed).standard_normal(tuple(shape)).astype(np.float32)
        save_file(tensors | {"lm_head.weight": torch.from_numpy(0.6 * noise)}, folder / FILE, {"format": "pt"})
    return load(case, folder)


def load(case: Case, folder: pathlib.Path) -> torch.nn.Module:
    """The model of a folder, by its own config.json; every key must find its place and none be missing."""
    auto = {"decoder": transformers.AutoModelForCausalLM, "bert": transformers.AutoModelForPreTraining,
            "t5": transformers.AutoModelForSeq2SeqLM, "tokens": transformers.AutoModelForTokenClassification,
            "sequence": transformers.AutoModelForSequenceClassification}[case.kind]
    model, info = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager",
                                       experts_implementation="eager", output_loading_info=True)
    wrong = {name: keys for name, keys in info.items() if keys and name != "loaded_keys"}
    assert not wrong, wrong
    assert type(model).__name__ == case.model
    return model.eval()


def inputs(case: Case, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random rows of unlike lengths: tokens and lengths, with what else the kind of model takes, and labels."""
    vocab, pad = case.config.vocab_size, 0
    lengths = np.sort(rng.integers(5, LONGEST + 1, ROWS))[::-1].astype(np.int32)
    tokens = rng.integers(8, vocab, (ROWS, int(lengths[0]))).astype(np.int32)
    made = {"tokens": tokens, "lengths": lengths}
    if case.kind == "t5":
        made["decoder_lengths"] = rng.integers(5, LONGEST + 1, ROWS).astype(np.int32)
        made["decoder_tokens"] = rng.integers(8, vocab, (ROWS, int(made["decoder_lengths"].max()))).astype(np.int32)
        made["decoder_tokens"][:, 0] = 0
    if case.kind == "bert":
        made["token_types"] = rng.integers(0, case.config.type_vocab_size, tokens.shape).astype(np.int32)
        made["nsp_labels"] = rng.integers(0, 2, ROWS)
    side = "decoder_" if case.kind == "t5" else ""
    if case.kind == "decoder" or case.kind == "t5":
        made["labels"] = np.pad(made[side + "tokens"][:, 1:], ((0, 0), (0, 1)))
        made["counts"] = np.arange(made["labels"].shape[1]) < made[side + "lengths"][:, None] - 1
    elif case.kind == "sequence":
        made["labels"] = rng.integers(0, case.config.num_labels, ROWS)
        made["counts"] = np.ones(ROWS, bool)
    else:
        classes = vocab if case.kind == "bert" else case.config.num_labels
        made["labels"] = rng.integers(0, classes, tokens.shape)
        made["counts"] = np.arange(tokens.shape[1]) < lengths[:, None]
    for name in ("", "decoder_"):
        if name + "tokens" in made:
            row = made[name + "tokens"]
            row[np.arange(row.shape[1]) >= made[name + "lengths"][:, None]] = pad
    return made


def forward(case: Case, model: torch.nn.Module, data: dict[str, np.ndarray]) -> list[tuple[Any, Any]]:
    """(logits, next-sentence logits or None) of each row, unpadded, with gradients."""
    rows = []
    for i, n in enumerate(data["lengths"]):
        # Dynamic scalings remember the longest row they saw, unlike a function.
        for module in model.modules():
            if "dynamic" in str(getattr(module, "rope_type", "")):
                module.max_seq_len_cached = module.original_max_seq_len
                module.register_buffer("inv_freq", module.original_inv_freq, persistent=False)
        kwargs = {"input_ids": torch.from_numpy(data["tokens"][i:i + 1, :n]).long()}
        if case.kind == "t5":
            m = data["decoder_lengths"][i]
            kwargs["decoder_input_ids"] = torch.from_numpy(data["decoder_tokens"][i:i + 1, :m]).long()
        if case.kind == "bert":
            kwargs["token_type_ids"] = torch.from_numpy(data["token_types"][i:i + 1, :n]).long()
        out = model(**kwargs)
        if case.kind == "bert":
            rows.append((out.prediction_logits[0], out.seq_relationship_logits[0]))
        else:
            rows.append((out.logits[0], None))
    return rows


def loss(case: Case, rows: list[tuple[Any, Any]], data: dict[str, np.ndarray]) -> torch.Tensor:
    """Mean cross-entropy over what counts, or square of a reward less 1; BERT's next-sentence loss is added."""
    total, cross_entropy = torch.zeros(()), torch.nn.functional.cross_entropy
    for i, (logits, nsp) in enumerate(rows):
        logits = logits[None] if case.kind == "sequence" else logits
        labels = torch.from_numpy(np.atleast_1d(data["labels"][i])[:len(logits)]).long()
        counts = torch.from_numpy(np.atleast_1d(data["counts"][i])[:len(logits)])
        if case.kind == "sequence" and case.config.num_labels == 1:
            total = total + (logits - 1).square().mean() / len(rows)
        elif counts.any():
            total = total + cross_entropy(logits[counts], labels[counts], reduction="sum") / int(data["counts"].sum())
        if nsp is not None:
            total = total + cross_entropy(nsp, torch.tensor(int(data["nsp_labels"][i]))) / len(rows)
    return total


def gradients(case: Case, model: torch.nn.Module, data: dict[str, np.ndarray],
              folder: pathlib.Path) -> tuple[float, dict[str, np.ndarray]]:
    """The loss, and its gradient of every tensor under its name on disk.

    transformers writes a model whose weights are the gradients: fused experts are taken apart as it does with weights.
    """
    model.zero_grad()
    value = loss(case, forward(case, model, data), data)
    value.backward()
    shadow = copy.deepcopy(model)
    with torch.no_grad():
        for ours, theirs in zip(shadow.parameters(), model.parameters(), strict=True):
            ours.copy_(torch.zeros_like(theirs) if theirs.grad is None else theirs.grad)
    shadow.save_pretrained(folder)
    return float(value.detach()), load_file(folder / FILE)
