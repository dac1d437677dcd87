"""llm_jax: from a folder of text to a served language model, in JAX and Flax."""

__version__ = "0.1.0"
