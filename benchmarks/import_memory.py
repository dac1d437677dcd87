"""Host memory of importing a large checkpoint: peak RSS of the process against the largest tensor plus 1 GB.

    python -m benchmarks.import_memory [--gigabytes=3] [--dir=/tmp]

Makes a synthetic sharded Llama of random bfloat16 weights, runs `experiments.import_hf` in a process of its own on the
CPU, and reads the peak from Linux. Ends with status 1 if it is above the bound. Then does the same for an export
and, for information (device arrays lie in host memory there, so the model itself counts), for `hf.load` on a mesh of 8
virtual devices.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np

from llm_jax.interop import families
from llm_jax.interop.safetensors import DTYPES, Folder, Writer
from llm_jax.models import ModelConfig

ALLOWANCE = 10**9
_REPORT = """
with open("/proc/self/status") as file:  # getrusage would count the process that forked this one
    print(*(line for line in file if line.startswith("VmHWM")))
"""
_SCRIPT = """
import importlib, sys
assert importlib.import_module(sys.argv.pop(1)).main() == 0
"""
_LOAD = """
import sys
from llm_jax import hf
from llm_jax.parallel.mesh import MeshConfig, make_mesh
hf.load(sys.argv[1], mesh=make_mesh(MeshConfig(fsdp=4, tensor=2)))
"""


def make_checkpoint(directory: pathlib.Path, gigabytes: float) -> ModelConfig:
    """Writes a Llama-like folder of about that size, in shards of 1 GB."""
    def config_of(layers: int) -> ModelConfig:
        return ModelConfig(vocab_size=64000, num_layers=layers, embed_dim=2048, num_heads=16, num_kv_heads=8,
                           head_dim=128, mlp_dim=8192, max_context=4096)

    one, two = config_of(1).num_params(), config_of(2).num_params()
    config = config_of(max(1, round((gigabytes * 1e9 / 2 - one) / (two - one)) + 1))
    tensors = families.by_name("llama").tensors(config)
    rng = np.random.default_rng(0)
    with Writer(directory, [(t.name, "BF16", t.shape) for t in tensors], shard_bytes=10**9) as writer:
        for tensor in tensors:
            bits = rng.integers(0, 1 << 16, tensor.shape, np.uint16)
            bits &= 0x80FF  # sign, last bit of the exponent and mantissa: numbers about 0.01
            bits |= 0x3C00
            writer.write(tensor.name, bits.view(DTYPES["BF16"]))
    (directory / "config.json").write_text(json.dumps(families.config_to_hf(config)))
    return config


def peak_of(code: str, *arguments: str, **environment: str) -> tuple[float, float]:
    """Runs Python code in a process of its own; its peak resident bytes and the seconds it took."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code + _REPORT, *arguments], stdout=subprocess.PIPE, text=True,
                          env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
                          cwd=pathlib.Path(__file__).parents[1])
    if done.returncode:
        raise SystemExit(f"{arguments} ended with status {done.returncode}")
    return int(re.search(r"VmHWM:\s*(\d+) kB", done.stdout)[1]) * 1024, time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=3.0, help="size of the checkpoint")
    parser.add_argument("--dir", default=None, help="where to write it and the run; needs three times the size")
    options = parser.parse_args()
    root = pathlib.Path(tempfile.mkdtemp(prefix="import-memory-", dir=options.dir))
    try:
        config = make_checkpoint(root / "hf", options.gigabytes)
        with Folder(root / "hf") as folder:
            total = sum(info.nbytes for info in folder.tensors.values())
            name, largest = max(folder.tensors.items(), key=lambda item: item[1].nbytes)
            files = len({info.file for info in folder.tensors.values()})
        bound = largest.nbytes + ALLOWANCE
        print(f"checkpoint: {config.num_params():,} parameters, {len(folder.tensors)} tensors, {total / 1e9:.2f} GB in "
              f"{files} files; largest tensor {name}, {largest.nbytes / 1e9:.3f} GB")
        idle, _ = peak_of("import jax, orbax.checkpoint, tensorstore; jax.devices()")
        print(f"a process that only imports JAX, Orbax and TensorStore: {idle / 1e9:.3f} GB")
        flags = [f"--hf_dir={root / 'hf'}", f"--run_dir={root / 'run'}"]
        peak, seconds = peak_of(_SCRIPT, "experiments.import_hf", *flags)
        print(f"import: peak RSS {peak / 1e9:.3f} GB, bound {bound / 1e9:.3f} GB (largest tensor + 1 GB), "
              f"{seconds:.0f} s, {total / seconds / 1e6:.0f} MB/s")
        flags = [f"--run_dir={root / 'run'}", f"--hf_dir={root / 'out'}"]
        back, seconds = peak_of(_SCRIPT, "experiments.export_hf", *flags)
        print(f"export: peak RSS {back / 1e9:.3f} GB, {seconds:.0f} s, {total / seconds / 1e6:.0f} MB/s")
        shutil.rmtree(root / "out")
        loaded, seconds = peak_of(_LOAD, str(root / "hf"), JAX_NUM_CPU_DEVICES="8")
        print(f"hf.load on 8 virtual devices: peak RSS {loaded / 1e9:.3f} GB, of which {total / 1e9:.2f} GB are the "
              f"parameters, {seconds:.0f} s")
    finally:
        shutil.rmtree(root)
    return 0 if max(peak, back) <= bound else 1


if __name__ == "__main__":
    sys.exit(main())
