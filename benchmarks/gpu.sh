#!/usr/bin/env bash
# Checks attention on a GPU against float64 and prints the GPU's table, in under 9 minutes on a bare machine:
#
#     bash benchmarks/gpu.sh
#
# PYTHON names an interpreter that has JAX with CUDA already; without it, an environment is made (BACKEND=cuda).
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
  BACKEND=cuda make venv
  PYTHON=.venv/bin/python
fi
"$PYTHON" -c 'import jax, sys; d = jax.devices()[0]; print(d); sys.exit(d.platform != "gpu" and "no GPU is visible to JAX")'
"$PYTHON" -m benchmarks.attention_check
timeout 240 "$PYTHON" -m benchmarks.engine_speed --model=88m
timeout 240 "$PYTHON" -m benchmarks.engine_speed --model=llama3_1b --rounds=2
