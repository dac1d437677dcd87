#!/usr/bin/env bash
# Checks attention on a GPU against float64, then measures that of training, the paged kernel and the engine, in under 10
# minutes:
#
#     bash benchmarks/gpu.sh
#
# PYTHON names an interpreter that has JAX with CUDA already; without it, an environment is made (BACKEND=cuda), which
# comes on top of the 10 minutes. What fails does not keep the rest from running; the exit status tells of it.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
  BACKEND=cuda make venv
  PYTHON=.venv/bin/python
fi
"$PYTHON" -c 'import jax, sys; d = jax.devices()[0]; print(d); sys.exit(d.platform != "gpu" and "no GPU is visible to JAX")'
status=0
try() {
  timeout "$1" "$PYTHON" -m "${@:2}" || { status=1; echo "FAILED: ${*:2}" >&2; }
}
try 100 benchmarks.attention_check
rows="--dtype=bfloat16 --heads=32 --kv_heads=8 --width=64 --tokens=8192"
try 40 benchmarks.attention_train $rows --lengths=1024,4096 # packed, beside all scores at once
try 30 benchmarks.attention_train $rows --lengths=4096,8192 --documents=0 --backends=chunked,cudnn,triton
try 170 benchmarks.gpu_paged
try 110 benchmarks.engine_speed --model=88m --rounds=2
try 140 benchmarks.engine_speed --model=llama3_1b --rounds=2
exit $status
