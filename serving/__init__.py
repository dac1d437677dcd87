"""The doors to a served model: gRPC and HTTP over `llm_jax.inference`, and a client, which needs no JAX."""
