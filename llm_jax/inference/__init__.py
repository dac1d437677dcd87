"""Serving a model: paged cache, engine (device), scheduler (policy, no JAX in it), sampling, generation."""
