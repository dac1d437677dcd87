"""All diagnoses of a run."""

from __future__ import annotations

from llm_jax.diagnosis.finding import Finding
from llm_jax.diagnosis.learning import gradients, learning
from llm_jax.diagnosis.memorising import memorising
from llm_jax.diagnosis.record import Record
from llm_jax.diagnosis.speed import speed


def diagnose(record: Record) -> list[Finding]:
    """What is wrong with a run, what matters most first; empty if nothing stands out."""
    return [*gradients(record), *learning(record), *memorising(record), *speed(record)]
