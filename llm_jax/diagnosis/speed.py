"""Is the run slower than it need be? Compiling, waiting for data, float32 on an accelerator, a small batch."""

from __future__ import annotations

import numpy as np

from llm_jax.diagnosis.finding import Finding
from llm_jax.diagnosis.record import Record, level

LEAST_ROWS = 3
COMPILE_SHARE = 0.3
LONG_RUN_S = 300.0  # from so long on, a run should have its compiling behind it
RECOMPILED = 0.2  # share of intervals, after the first, in which something was compiled again
DATA_SHARE = 0.15
LOW_UTILISATION = 0.35
LEAST_TOKENS = 4096  # of a device and step, on accelerators
LEAST_TOKENS_ON_CPU = 128


def speed(record: Record) -> list[Finding]:
    """What costs time."""
    if len(record.train) < LEAST_ROWS:
        return []
    return [*_compiling(record), *_data(record), *_float32(record), *_small_batch(record)]


def _compiling(record: Record) -> list[Finding]:
    last = record.train[-1]
    share = last.get("goodput", {}).get("compile", 0.0)
    # The first interval compiles the step, the first evaluation its own program; both may be in the first two rows.
    later = [row.get("compiles", 0) for row in record.train[2:]]
    again = float(np.mean([count > 0 for count in later])) if later else 0.0
    wall = last.get("wall_seconds", 0.0)
    if share < COMPILE_SHARE or not (again > RECOMPILED or wall > LONG_RUN_S):
        return []
    evidence = [f"{share:.0%} of {wall:.0f} s were spent compiling"]
    advice = ["keep the compile cache between runs: $JAX_COMPILATION_CACHE_DIR, or a home directory that stays"]
    if again > RECOMPILED:
        evidence.append(f"{sum(later)} programs were compiled after the run was under way, in {again:.0%} of the "
                        "intervals")
        advice.insert(0, "find what changes shape, or clears JAX's caches, from step to step: JAX_LOG_COMPILES=1 names "
                         "each program")
    return [Finding("slow_compile", "Much of the time goes into compiling.", tuple(evidence), tuple(advice))]


def _data(record: Record) -> list[Finding]:
    waits = record.series("data_wait")[1]
    share = level(waits, max(3, waits.size // 2))
    if not share > DATA_SHARE:
        return []
    return [Finding("slow_data", "The device waits for data.",
                    (f"in the second half of the run, {share:.0%} of the time passed with nothing to compute because "
                     "the next batch was not there",),
                    ("raise DataConfig.prefetch, or put the data on a faster disk (a local copy instead of a bucket)",
                     "see whether other processes take the CPU that makes the batches"))]


def _float32(record: Record) -> list[Finding]:
    execution = record.manifest.get("execution", {})
    if record.is_on_cpu or execution.get("dtype") != "float32":
        return []
    utilisation = _utilisation(record)
    evidence = [f"Execution.dtype is 'float32' on {record.manifest.get('devices')}"]
    if utilisation is not None:
        evidence.append(f"the model's arithmetic uses {utilisation:.0%} of the devices' bfloat16 peak")
    return [Finding("slow_float32", "The model is computed in float32, for which accelerators are slow.",
                    tuple(evidence), ("Execution.dtype = 'bfloat16'; parameters and moments stay float32",))]


def _small_batch(record: Record) -> list[Finding]:
    tokens = record.tokens_per_step / record.num_devices
    utilisation = _utilisation(record)
    limit = LEAST_TOKENS_ON_CPU if record.is_on_cpu else LEAST_TOKENS
    if not 0 < tokens < limit or utilisation is not None and utilisation > LOW_UTILISATION:
        return []
    evidence = [f"a step is {tokens:.0f} tokens a device: {record.setting('data', 'batch_size')} rows of "
                f"{record.setting('data', 'row_length')}, on {record.num_devices} "
                f"{'device' if record.num_devices == 1 else 'devices'}"]
    if utilisation is not None:
        evidence.append(f"the model's arithmetic uses {utilisation:.0%} of the devices' peak")
    times = record.series("seconds_per_step")[1]
    if times.size:
        evidence.append(f"{np.median(times) * 1e3:.3g} ms a step, of which much is the same whatever the batch: "
                        "sending it off, and the optimizer's pass over all parameters")
    return [Finding("slow_small_batch", "The batch is small: a step costs more than its tokens need.", tuple(evidence),
                    ("raise BATCH_SIZE or ROW_LENGTH as far as memory goes, and LEARNING_RATE with the root of it",))]


def _utilisation(record: Record) -> float | None:
    values = record.series("model_flops_utilisation")[1]
    return float(np.median(values)) if values.size else None
