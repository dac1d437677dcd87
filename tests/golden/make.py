"""Makes the golden files: `python -m tests.golden.make [FOLDER …]` in an environment of requirements-parity.txt.

Each folder gets a random checkpoint as it would lie on the hub, and what transformers computes from it in float32 after
reading it back from there. What is checked here: that transformers takes every tensor, that a float64 run agrees, that
attention, routing and logits are not degenerate, that old and new spellings of config.json mean the same, and sizes.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import sys
import tempfile
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from tests.golden import references, rope  # noqa: E402
from tests.golden.decoders import DECODERS  # noqa: E402
from tests.golden.encoders import OTHERS  # noqa: E402
from tests.golden.spec import Spec, randomize  # noqa: E402

HERE = pathlib.Path(__file__).parent
SPECS = DECODERS | OTHERS
LIMIT = 300_000  # bytes of a folder


def _noise(shape: tuple[int, ...], like: torch.Tensor, seed: int, scale: float) -> torch.Tensor:
    values = scale * np.random.default_rng(seed).standard_normal(shape)
    return torch.from_numpy(values.astype(np.float32)).to(like.dtype)


def _gpt2(tensors: dict, config: Any) -> dict:
    """Without the prefix "transformer.", and with the buffers of causal masks."""
    out = {name.removeprefix("transformer."): t for name, t in tensors.items() if not name.startswith("lm_head")}
    mask = torch.tril(torch.ones(config.n_positions, config.n_positions))[None, None]
    return out | {f"h.{i}.attn.bias": mask.clone() for i in range(config.n_layer)}


def _bert(tensors: dict, config: Any) -> dict:
    """Norms spelt gamma and beta, and the buffer of position ids."""
    def rename(name: str) -> str:
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    ids = torch.arange(config.max_position_embeddings)[None]
    return {rename(k): t for k, t in tensors.items()} | {"bert.embeddings.position_ids": ids}


def _t5(tensors: dict, config: Any) -> dict:
    """With the relative bias that nothing reads."""
    like = tensors["decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    return tensors | {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight":
                      _noise(tuple(like.shape), like, 5, 1.0)}


def _flan_t5(tensors: dict, config: Any) -> dict:
    """An output projection of its own, and the shared embedding three times."""
    shared = tensors["shared.weight"]
    return tensors | {"encoder.embed_tokens.weight": shared.clone(), "decoder.embed_tokens.weight": shared.clone(),
                      "lm_head.weight": _noise(tuple(shared.shape), shared, 6, 0.6)}


def _deepseek(tensors: dict, config: Any) -> dict:
    """The correction bias in float32 among bfloat16 weights, and some of the layer that predicts the token after next,
    which comes after the last layer and belongs to no forward pass."""
    name, like, d = f"model.layers.{config.num_hidden_layers}.", tensors["model.norm.weight"], config.hidden_size
    out = {k: t.float() if k.endswith("correction_bias") else t for k, t in tensors.items()}
    for i, (part, shape) in enumerate((("enorm.weight", (d,)), ("hnorm.weight", (d,)), ("eh_proj.weight", (d, 2 * d)),
                                       ("shared_head.norm.weight", (d,)), ("input_layernorm.weight", (d,)))):
        out[name + part] = _noise(shape, like, 100 + i, 0.5)
    return out


HUB = {"gpt2": _gpt2, "bert": _bert, "t5": _t5, "flan_t5": _flan_t5, "deepseek_v3": _deepseek}


def _write_json(path: pathlib.Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def _model_class(spec: Spec, config: Any) -> Any:
    if spec.model:
        return getattr(transformers, spec.model)
    return transformers.AutoModelForCausalLM


def load(cls: Any, folder: pathlib.Path, config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a folder, after checking that every tensor found its place."""
    model, info = cls.from_pretrained(folder, config=config, dtype=dtype, attn_implementation="eager",
                                      experts_implementation="eager", output_loading_info=True)
    predicts_further = f"model.layers.{getattr(config, 'num_hidden_layers', 0)}."
    info["unexpected_keys"] = {k for k in info["unexpected_keys"] if not k.startswith(predicts_further)}
    wrong = {k: sorted(v) for k, v in info.items() if v and k in ("missing_keys", "unexpected_keys",
                                                                  "mismatched_keys", "error_msgs")}
    assert not wrong, f"{folder.name}: {wrong}"
    return _ready(model)


def _ready(model: Any) -> Any:
    scaling = getattr(model.config, "rope_parameters", None) or {}
    model.stateful_rope = scaling.get("rope_type") in ("dynamic", "longrope")
    return model.eval()


def _watch_routers(model: Any) -> dict[str, list[np.ndarray]]:
    """Router -> the experts it chooses in the forward passes to come."""
    seen: dict[str, list[np.ndarray]] = {}
    for name, module in model.named_modules():
        if type(module).__name__.endswith("TopKRouter") or type(module).__name__.endswith("TopkRouter"):
            chosen = seen.setdefault(name, [])
            module.register_forward_hook(lambda m, i, out, chosen=chosen: chosen.append(out[-1].numpy()))
    return seen


def _reference(spec: Spec, model: Any, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    if spec.kind == "decoder":
        return references.decoder(model, rng, spec)
    makers = {"bert": references.bert, "sequence": references.sequence, "tokens": references.per_token,
              "t5": references.t5}
    return makers[spec.kind](model, rng)


def _check(name: str, reference: dict, exact: dict) -> None:
    for key in reference:
        if key.endswith("logits"):
            top = np.abs(exact[key]).max()
            off = np.abs(reference[key] - exact[key]).max() / top
            assert off < 1e-5, f"{name}: {key} of float32 and float64 differ by {off:.1e} of the largest"
            spread = reference[key][np.any(reference[key] != 0, -1)].std()
            assert spread > (0.8 if reference[key].size > 100 else 0.3), f"{name}: {key} hardly spread: {spread:.2f}"
            print(f"  {key:14s} spread {spread:5.2f}  largest {top:6.2f}  float32 off by {off:.0e}")
        else:
            np.testing.assert_allclose(reference[key], exact[key], rtol=1e-4, atol=1e-4)


def make(name: str, spec: Spec) -> None:
    print(name, flush=True)
    with tempfile.TemporaryDirectory(dir=HERE, prefix=f".{name}-") as temporary:
        folder = pathlib.Path(temporary)
        config = spec.config()
        dtype = getattr(torch, spec.dtype)
        cls = _model_class(spec, config)
        maker = cls.from_config if cls is transformers.AutoModelForCausalLM else cls._from_config
        model = maker(config, dtype=torch.float32)
        randomize(model, spec.gains, spec.seed)
        model.to(dtype).save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        weights = folder / "model.safetensors"
        tensors = load_file(weights)
        if spec.hub:
            tensors = HUB[spec.hub](tensors, config)
        save_file({k: t.contiguous() for k, t in tensors.items()}, weights, metadata={"format": "pt"})
        fields = json.loads((folder / "config.json").read_text())
        if spec.generation:
            _write_json(folder / "generation_config.json", spec.generation | {"transformers_version": "4.51.0"})

        written = transformers.AutoConfig.from_pretrained(folder)
        model = load(cls, folder, written)
        experts = _watch_routers(model)
        reference = _reference(spec, model, spec.seed)
        for router, chosen in experts.items():
            used = len(set(np.concatenate(chosen).ravel().tolist()))
            there_are = getattr(written, "num_local_experts", None) or written.num_experts
            assert used == there_are, f"{router} sends tokens to {used} of {there_are} experts"
        _check(name, reference, _reference(spec, _ready(load(cls, folder, written, torch.float64)), spec.seed))
        np.savez_compressed(folder / "reference.npz", **reference)
        for kind, changes in spec.variants.items():
            _variant(folder, cls, spec, fields | changes, kind)
        if spec.old is not None:
            _old(folder, cls, spec, fields, reference)
        _install(folder, HERE / name)


def _config_of(fields: dict, folder: pathlib.Path) -> Any:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        _write_json(pathlib.Path(scratch) / "config.json", fields)
        return transformers.AutoConfig.from_pretrained(scratch)


def _variant(folder: pathlib.Path, cls: Any, spec: Spec, fields: dict, kind: str) -> None:
    print(f"  variant {kind}")
    config = _config_of(fields, folder)
    reference = _reference(spec, load(cls, folder, config), spec.seed)
    _check(kind, reference, _reference(spec, load(cls, folder, config, torch.float64), spec.seed))
    plain = dict(np.load(folder / "reference.npz"))
    moved = np.abs(reference["logits"] - plain["logits"]).max()
    far = np.abs(reference["long_logits"] - plain["long_logits"]).max() if "long_logits" in plain else moved
    assert (moved > 0.1 or kind == "dynamic") and far > 0.1, f"{kind} changes nothing"
    _write_json(folder / f"{kind}.json", fields)
    np.savez_compressed(folder / f"{kind}.npz", **reference)


def _old(folder: pathlib.Path, cls: Any, spec: Spec, fields: dict, reference: dict) -> None:
    """config_v4.json, and that it means what config.json means."""
    old = {k: v for k, v in fields.items() if k not in ("rope_parameters", *spec.old_drops)}
    old["torch_dtype"] = old.pop("dtype")
    old |= spec.old | {"transformers_version": "4.44.0"}
    again = _reference(spec, load(cls, folder, _config_of(old, folder)), spec.seed)
    np.testing.assert_array_equal(again["logits"], reference["logits"])
    _write_json(folder / "config_v4.json", old)


def _install(made: pathlib.Path, folder: pathlib.Path) -> None:
    size = sum(p.stat().st_size for p in made.iterdir())
    assert size < LIMIT, f"{folder.name} takes {size:,} bytes"
    print(f"  {size:,} bytes")
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.name not in {p.name for p in made.iterdir()}:
            path.unlink()
    for path in made.iterdir():
        shutil.copymode(HERE / "make.py", path)
        os.replace(path, folder / path.name)


def main(names: list[str]) -> None:
    unknown = sorted(set(names) - set(SPECS) - {"rope"})
    if unknown:
        raise SystemExit(f"no such folder: {unknown}; there are {sorted(SPECS)} and rope")
    torch.manual_seed(0)
    for name, spec in SPECS.items():
        if not names or name in names:
            make(name, spec)
    if not names or "rope" in names:
        rope.make(HERE / "rope.npz")


if __name__ == "__main__":
    main(sys.argv[1:])
