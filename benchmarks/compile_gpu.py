"""Compiles the kernels of attention for an H100 on a machine without one, that of serving and those of training, for an
8B Llama and for shapes at the edges of what they take, and says what each program needs.

    pip install jax-cuda13-plugin jax-cuda13-pjrt    # --no-deps, of JAX's own version: no CUDA library is needed
    python -m benchmarks.compile_gpu

Where `ptxas` is on the path (or --ptxas names it) and JAX is 0.10, it also prints registers and bytes spilt of every
kernel. Exits with 1 if a program does not compile, copies a pool, has room for all scores, or spills more than 256
bytes a thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

PAGE, PAGES = 16, 4096


@dataclasses.dataclass(frozen=True)
class Case:
    """A step's attention; the defaults are those of an 8B Llama."""

    rows: int = 0
    prefill: int = 0
    decode_width: int = 1
    chunk: int = 512
    heads: tuple[int, int] = (32, 8)
    width: int = 128
    context: int = 4096
    dtype: str = "bfloat16"
    window: int | None = None
    soft_cap: float | None = None

    def __str__(self) -> str:
        return ", ".join(f"{f.name} {getattr(self, f.name)}" for f in dataclasses.fields(self)
                         if f.name in ("rows", "prefill") or getattr(self, f.name) != f.default)


CASES = (Case(1), Case(1, context=32768), Case(8), Case(64), Case(64, context=32768), Case(8, decode_width=5),
         Case(0, 1), Case(0, 4), Case(8, 1), Case(64, 4, window=1024, soft_cap=30.0),
         Case(8, 1, heads=(12, 4), width=64), Case(8, 1, width=80),
         Case(8, 1, heads=(16, 8), width=256, soft_cap=50.0), Case(8, 1, dtype="float32"),
         Case(8, 1, heads=(8, 1), width=256), Case(8, 1, heads=(8, 8), width=32, dtype="float32"))


@dataclasses.dataclass(frozen=True)
class Train:
    """Attention of whole rows, forward and backward; the defaults are those of an 8B Llama."""

    backend: str
    length: int = 4096
    heads: tuple[int, int] = (32, 8)
    widths: tuple[int, int] = (128, 128)
    dtype: str = "bfloat16"
    causal: bool = True
    window: int | None = None
    soft_cap: float | None = None

    def __str__(self) -> str:
        return ", ".join(f"{f.name} {getattr(self, f.name)}" for f in dataclasses.fields(self)
                         if f.name == "backend" or getattr(self, f.name) != f.default)


TRAIN = (Train("cudnn"), Train("cudnn", heads=(32, 32), widths=(64, 64), window=1024), Train("cudnn", causal=False),
         Train("triton"), Train("triton", length=32768), Train("triton", heads=(32, 8), widths=(64, 64)),
         Train("triton", window=1024, soft_cap=50.0), Train("triton", causal=False, length=1000),
         Train("triton", heads=(9, 3), widths=(80, 48)), Train("triton", dtype="float32"), Train("chunked"))


def kernels(folder: pathlib.Path, ptxas: str | None) -> list[tuple[str, int, int]]:
    """(name, registers, bytes spilt) of the kernels whose machine-independent code lies in `folder`."""
    found = []
    for file in sorted(folder.glob("*.ptx")):
        if ptxas and "attention" in file.read_text():
            said = subprocess.run([ptxas, "-v", "-arch=sm_90a", file, "-o", folder / "out"], check=True,
                                  capture_output=True, text=True).stderr
            name = re.search(r"entry function '(\w+)'", said)
            registers, spilt = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
            assert name and registers and spilt, said
            found.append((name[1], int(registers[1]), int(spilt[1])))
    return found


def main() -> int:
    """Prints a line a program; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ptxas", default=shutil.which("ptxas"), help="NVIDIA's assembler")
    parser.add_argument("--cases", type=int, default=len(CASES), help="only the first so many of serving")
    parser.add_argument("--train", type=int, default=len(TRAIN), help="only the first so many of training")
    arguments = parser.parse_args()
    dump = tempfile.TemporaryDirectory()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={dump.name}"
    import jax  # it reads the environment
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    from llm_jax.analysis import topology
    from llm_jax.errors import UserError
    from llm_jax.kernels import paged_triton
    from llm_jax.kernels.attention import DenseContext, dense_attention
    from llm_jax.kernels.paged import PagedContext, make_pool

    try:
        devices = topology.devices("h100:1")
    except UserError as error:
        sys.exit(str(error))
    try:
        cudnn.check_cudnn_version()
    except RuntimeError:  # not installed here; programs call it, and it plans nothing before they run
        cudnn.check_cudnn_version = lambda: 91200
    mesh = jax.make_mesh((1,), ("gpu",), (jax.sharding.AxisType.Auto,), devices=devices)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def abstract(*shape: int, dtype: str = "int32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def compile_case(case: Case) -> jax.stages.Compiled:
        H, G = case.heads
        N, R = case.rows * case.decode_width + case.prefill * case.chunk, case.rows + case.prefill
        context = PagedContext(abstract(N), abstract(N), case.rows, case.chunk, decode_width=case.decode_width,
                               table_RP=abstract(R, case.context // PAGE), length_R=abstract(R), backend="triton")
        pools = jax.eval_shape(lambda: make_pool(PAGES, PAGE, (G, case.width, case.width), case.dtype,
                                                 "triton"))
        pools = tuple(abstract(*pool.shape, dtype=case.dtype) for pool in pools)
        q, k, v = (abstract(1, N, heads, case.width, dtype=case.dtype) for heads in (H, G, G))

        def step(q, k, v, context, pools):
            return paged_triton.attend(q, k, v, context, pools, scale=case.width**-0.5, window=case.window,
                                       soft_cap=case.soft_cap)

        return jax.jit(step, donate_argnums=4).lower(q, k, v, context, pools).compile()

    def compile_train(case: Train) -> jax.stages.Compiled:
        (H, G), (K, V) = case.heads, case.widths
        ids = None if case.backend == "cudnn" else abstract(1, case.length)
        q, k, v, dout = (abstract(1, case.length, heads, width, dtype=case.dtype)
                         for heads, width in ((H, K), (G, K), (G, V), (H, V)))

        def step(q, k, v, dout, ids):
            context = DenseContext(ids, causal=case.causal, backend=case.backend)
            attend = functools.partial(dense_attention, context=context, scale=case.widths[0]**-0.5,
                                       window=case.window, soft_cap=case.soft_cap)
            out, transpose = jax.vjp(attend, q, k, v)
            return out, transpose(dout)

        return jax.jit(step).lower(q, k, v, dout, ids).compile()

    def compiled(case: Case | Train) -> tuple[jax.stages.Compiled, float, list[tuple[str, int, int]]] | None:
        """The program, the seconds it took, and its kernels."""
        began = time.perf_counter()
        try:
            with jax.set_mesh(mesh):
                program = compile_case(case) if isinstance(case, Case) else compile_train(case)
        except Exception as error:  # whatever the compiler says, the other programs are still worth a try
            print(f"FAILED {case}: {str(error).splitlines()[0]}")
            return None
        used = kernels(pathlib.Path(dump.name), arguments.ptxas)
        for file in pathlib.Path(dump.name).iterdir():
            file.unlink()
        return program, time.perf_counter() - began, used

    right = True
    print(f"jax {jax.__version__}, {devices[0].device_kind}")
    for case in (*CASES[:arguments.cases], *TRAIN[:arguments.train]):
        result = compiled(case)
        if result is None:
            right = False
            continue
        program, seconds, used = result
        memory = program.memory_analysis()
        if isinstance(case, Case):
            pool = PAGES * PAGE * case.heads[1] * case.width * (4 if case.dtype == "float32" else 2)
            lean = memory.temp_size_in_bytes < pool and memory.alias_size_in_bytes >= 2 * pool
            said = f"beside the pools{'' if lean else ', COPIED'}"
        else:
            lean = memory.temp_size_in_bytes < case.heads[0] * case.length**2  # a byte a score
            said = f"forward and backward{'' if lean else ', TOO MUCH'}"
        right &= lean and all(spilt <= 256 for _, _, spilt in used)
        print(f"{seconds:5.1f} s  {memory.temp_size_in_bytes / 1e6:5.1f} MB {said}  {case}")
        for name, registers, spilt in used:
            print(f"{'':9}{name}: {registers} registers, {spilt} bytes spilt")
    dump.cleanup()
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
