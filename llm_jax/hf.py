"""Hugging Face checkpoints: `hf.load(dir)` and `hf.save(dir, params, config, tokenizer)`; see docs/interop.md."""

from llm_jax.interop.huggingface import load, read_config, save

__all__ = ["load", "read_config", "save"]
