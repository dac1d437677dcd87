"""The door to a served model: a gRPC server over `llm_jax.inference`, and a client for it (which needs no JAX)."""
