"""The kinds of tokenizer behind `llm_jax.data.tokenizer.Tokenizer`, one a file."""
