"""What is wrong with a run, in plain words, with the evidence: pure functions of what the run directory says."""

from llm_jax.diagnosis.diagnose import diagnose
from llm_jax.diagnosis.finding import Finding
from llm_jax.diagnosis.record import Record, read

__all__ = ["Finding", "Record", "diagnose", "read"]
