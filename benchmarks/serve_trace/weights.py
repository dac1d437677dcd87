"""The models that are served: random weights, made once, as a run directory and as a folder that transformers loads."""

from __future__ import annotations

import pathlib
import sysconfig

from llm_jax.models import ModelConfig

MAX_CONTEXT = 1024
VOCAB_SIZE = 8192
MODELS = {
    "9m": ModelConfig(vocab_size=VOCAB_SIZE, num_layers=6, embed_dim=256, num_heads=8, num_kv_heads=8, head_dim=32,
                      mlp_dim=768, max_context=MAX_CONTEXT),
    "88m": ModelConfig(vocab_size=VOCAB_SIZE, num_layers=12, embed_dim=768, num_heads=12, num_kv_heads=4, head_dim=64,
                       mlp_dim=2048, max_context=MAX_CONTEXT),
}


def make(model: str, directory: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Makes (run directory, Hugging Face folder) of a model below `directory`, in float32; used again if it is there.

    The tokenizer is trained on the standard library, so that detokenising costs what it costs.
    """
    run_dir, hf_dir = directory / model / "run", directory / model / "huggingface"
    if run_dir.exists() and (hf_dir / "config.json").exists():
        return run_dir, hf_dir

    import jax

    from llm_jax import hf, models
    from llm_jax.data.tokenizer_training import train_tokenizer
    from llm_jax.interop.importing import import_run

    sources = sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]
    tokenizer = train_tokenizer([path.read_text(errors="replace") for path in sources], VOCAB_SIZE)
    config = MODELS[model]
    params = jax.jit(lambda key: models.init_params(models.build(config), key))(jax.random.key(0))
    hf.save(hf_dir, params, config, tokenizer)
    import_run(hf_dir, run_dir)
    return run_dir, hf_dir


if __name__ == "__main__":  # in a process of its own, so that the one that measures needs no JAX
    import sys

    make(sys.argv[1], pathlib.Path(sys.argv[2]))
