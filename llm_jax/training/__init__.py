"""The trainer: state, step, optimizer, metrics and the loop that joins them (`llm_jax.training.loop:train`)."""
