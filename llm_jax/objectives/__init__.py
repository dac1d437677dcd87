"""Losses as pure functions of (apply, params, batch, rng), and the evaluation that uses them."""
