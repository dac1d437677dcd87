"""What is known of a train step once it is compiled: memory, arithmetic and collectives, as numbers and as a table."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

import jax

from llm_jax.analysis import memory, topology
from llm_jax.analysis.flops import StepFlops, kernel_share, step_flops
from llm_jax.analysis.hlo import Program, summary
from llm_jax.analysis.memory import GIB, StepMemory, gib

if TYPE_CHECKING:
    from llm_jax.training.assembly import Assembly


@dataclasses.dataclass(frozen=True)
class StepReport:
    """A step on one topology.

    Attributes:
      about: what was compiled, for what.
      memory: of one device; of the state alone where the compiler gave up.
      limit: bytes of one device; None if it isn't known.
      asked: bytes the compiler asked for and did not get; None if it made the program.
      expected: what arithmetic the step should take, all devices.
      program: what one device does; None if there is no program.
      peak_flops: of one device in bfloat16; None if it isn't known or the step is in another dtype.
      seconds: that compiling took.
    """

    about: dict[str, Any]
    memory: StepMemory
    limit: int | None
    asked: int | None
    expected: StepFlops
    program: Program | None
    peak_flops: float | None
    seconds: float

    @property
    def needed(self) -> int:
        """Bytes that the step takes on a device, or that were asked for."""
        return self.asked or self.memory.peak

    @property
    def fits(self) -> bool:
        """Whether a program was made and stays within the limit."""
        return self.program is not None and (self.limit is None or self.needed <= self.limit)

    @property
    def hardware_flops(self) -> float | None:
        """Operations of the compiled program, all devices."""
        return None if self.program is None else self.program.flops * self.about["devices"]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values: bytes and seconds; FLOPs of a whole step on all devices; collectives of one
        device by kind and mesh axes."""
        program = self.program
        result = {
            **self.about, "fits": self.fits, "compile_seconds": round(self.seconds, 1),
            "memory": {**dataclasses.asdict(self.memory), "peak": self.needed, "limit": self.limit,
                       "is_known": self.program is not None},
            "flops": {"model": self.expected.model, "attention_beside": self.expected.attention,
                      "recomputed": self.expected.recomputed, "slots": self.expected.slots,
                      "expected": self.expected.hardware, "compiled": self.hardware_flops},
        }
        if program is not None:
            result["collectives"] = [
                {"kind": kind, "axes": list(axes) if axes is not None else None, "times": times, "bytes": num_bytes,
                 "sent_bytes": sent} for (kind, axes), (times, num_bytes, sent) in self.collectives().items()]
            result["loops"] = [{"trips": loop.trips, "times": loop.times, "flops": loop.flops * loop.times,
                                "op_name": loop.op_name} for loop in program.loops if loop.flops]
            result["uncounted"] = sorted({product.op_name for product in program.uncounted})
        if self.bound_seconds is not None and self.hardware_flops:
            result["bound"] = {"step_seconds": self.bound_seconds, "mfu": self.expected.model / self.hardware_flops}
        return result

    @property
    def bound_seconds(self) -> float | None:
        """Seconds that the program's products take at the devices' peak: a step can't be faster, and will be slower."""
        if not self.hardware_flops or self.peak_flops is None or (self.program is not None and self.program.uncounted):
            return None
        return self.hardware_flops / self.about["devices"] / self.peak_flops

    def collectives(self) -> dict[tuple[str, tuple[str, ...] | None], tuple[float, float, float]]:
        """(kind, mesh axes) → (times, bytes, bytes sent by a ring), of one device in one step, the largest first."""
        found: dict[tuple[str, tuple[str, ...] | None], tuple[float, float, float]] = {}
        for op in self.program.collective_ops if self.program is not None else ():
            times, num_bytes, sent = found.get((op.kind, op.axes), (0.0, 0.0, 0.0))
            found[op.kind, op.axes] = (times + op.times, num_bytes + op.num_bytes * op.times,
                                       sent + op.moved_bytes * op.times)
        return dict(sorted(found.items(), key=lambda item: -item[1][2]))

    def __str__(self) -> str:
        return "\n".join([*self._head(), "", *self._memory(), "", *self._flops(), *self._collectives(), *self._loops()])

    def _head(self) -> list[str]:
        a = self.about
        shape = " × ".join(f"{axis} {size}" for axis, size in a["mesh"].items() if size > 1) or "one device"
        return [f"{a['parameters'] / 1e9:.4g} B parameters on {a['devices']} × {a['device_kind']} ({a['topology']}), "
                f"mesh {shape}",
                f"{a['rows']:,} rows of {a['row_length']:,} tokens in {a['microbatches']} microbatches; {a['dtype']}, "
                f"remat {a['remat']}, attention {a['attention']}, loss chunk {a['loss_chunk']}",
                f"compiled in {self.seconds:.0f} s with jax {a['jax']}"]

    def _memory(self) -> list[str]:
        m = self.memory
        limit = "of a limit that isn't known" if self.limit is None else f"of {gib(self.limit)}"
        verdict = "fits" if self.fits else "DOES NOT FIT"
        rows = [("parameters", gib(m.parameters)), ("optimizer", gib(m.optimizer))]
        if self.program is not None:
            rows += [("activations, gradients", gib(m.activations)), ("peak", f"{gib(self.needed)} {limit}: {verdict}")]
        else:
            asked = f"{gib(self.asked)} asked for" if self.asked else "more asked for than there is"
            rows += [("peak", f"{asked}, {limit}: {verdict}")]
        return ["memory of one device", *(f"  {name:<34}{value}" for name, value in rows)]

    def _flops(self) -> list[str]:
        e = self.expected
        rows = [("the model's own", f"{e.model:.3e}"), ("attention beside (masked, again)", f"{e.attention:.3e}"),
                ("recomputed by remat", f"{e.recomputed:.3e}")]
        if e.slots:
            rows += [("slots of experts beside", f"{e.slots:.3e}")]
        rows += [("expected", f"{e.hardware:.3e}")]
        if self.hardware_flops is not None:
            ratio = self.hardware_flops / e.hardware
            rows += [("in the compiled program", f"{self.hardware_flops:.3e}, {ratio:.3f} of what is expected")]
        lines = ["FLOPs of one step, all devices", *(f"  {name:<34}{value}" for name, value in rows)]
        if self.bound_seconds is not None and self.hardware_flops:
            lines.append(f"  bound, not an estimate: a step takes at least {self.bound_seconds:.2f} s at the chips' "
                         f"bfloat16 peak, which is at most {e.model / self.hardware_flops:.0%} model-FLOPs utilisation")
        if self.program is not None and self.program.uncounted:
            names = sorted({product.op_name.rsplit("/", 1)[-1] or product.name for product in self.program.uncounted})
            lines.append(f"  not counted, as the program does not tell: {', '.join(names)}")
        return lines

    def _collectives(self) -> list[str]:
        found = self.collectives()
        if not found:
            return []
        lines = ["", f"{'collectives of one device and step':<42}{'times':>8}{'arrays':>12}{'sent by a ring':>16}"]
        for (kind, axes), (times, num_bytes, sent) in found.items():
            where = " × ".join(axes) if axes else "other groups"
            lines.append(f"  {f'{kind} along {where}':<40}{times:>8,.0f}{gib(num_bytes):>12}{gib(sent):>16}")
        return lines

    def _loops(self) -> list[str]:
        loops = [loop for loop in self.program.loops if loop.flops] if self.program is not None else []
        if not loops:
            return []
        lines = ["", f"{'loops of one device and step':<42}{'trips':>8}{'entered':>12}{'FLOPs':>16}"]
        for loop in loops:
            trips = "unknown" if loop.trips is None else f"{loop.trips:,}"
            lines.append(f"  {_short(loop.op_name):<40}{trips:>8}{loop.times:>12,.0f}{loop.flops * loop.times:>16.3e}")
        return lines


def _short(op_name: str) -> str:
    """What a loop's path comes to: the last function on it, and whether it is of the forward or the backward pass."""
    parts = [part for part in op_name.split("/") if part not in ("while", "body", "closed_call", "checkpoint")]
    named = [part for part in parts if "jvp(" not in part and not part.startswith("rematted")]
    way = "" if "jvp(" not in op_name else ", backward" if "transpose(" in op_name else ", forward"
    return (named[-1].removeprefix("jit(").rstrip(")") + way)[-40:] if named else "made by the compiler"


def compile_report(assembly: Assembly, name: str, limit: int | None = None) -> StepReport:
    """Compiles a run's step and reads what the compiler made.

    Args:
      assembly: the run, on the devices to compile for.
      name: of their topology.
      limit: bytes of one device; None takes what the kind of device has.

    Returns:
      The report; also where the compiler refused for want of memory.

    Raises:
      jax.errors.JaxRuntimeError: the compiler refused for another reason.
    """
    from llm_jax.training.metrics import peak_flops

    config, execution, data = assembly.config, assembly.execution, assembly.data
    device = assembly.mesh.devices.flat[0]
    attention = attention_backend(assembly)
    about = {
        "topology": name, "device_kind": device.device_kind, "devices": assembly.mesh.size,
        "mesh": dict(assembly.mesh.shape), "parameters": config.num_params(), "rows": data.batch_size,
        "row_length": data.row_length, "microbatches": assembly.accumulation, "dtype": execution.dtype,
        "remat": execution.remat, "attention": attention, "loss_chunk": execution.loss_chunk, "jax": jax.__version__}
    state = assembly.abstract_state()
    limit = topology.usable_bytes(device) if limit is None else limit
    held: StepMemory | None = memory.of_state(state)
    program, asked = None, None
    began = time.perf_counter()
    try:
        compiled = assembly.compile_step()
        held = memory.of_step(compiled, state) or held
        program = summary(compiled.as_text(), assembly.mesh.shape, kernel_share(config, data.row_length))
    except jax.errors.JaxRuntimeError as error:
        refused = memory.refusal(error)
        if refused is None or refused.space != "hbm":
            raise
        asked, limit = refused.asked or 0, min(limit or refused.limit or 0, refused.limit or limit or 0) or None
    assert held is not None
    return StepReport(
        about=about, memory=held, limit=limit, asked=asked, program=program,
        expected=step_flops(config, execution, data.batch_size, data.row_length, attention),
        peak_flops=peak_flops(device.device_kind) if execution.dtype == "bfloat16" else None,
        seconds=time.perf_counter() - began)


def attention_backend(assembly: Assembly) -> str:
    """How the step computes attention: what `Execution.attention` comes to on its devices."""
    from llm_jax.kernels.attention import choose
    from llm_jax.kernels.attention_call import Call

    config, execution, length = assembly.config, assembly.execution, assembly.data.row_length
    value_width = config.head_dim if config.latent is None else config.latent.value_dim
    is_local = config.attention_pattern[0] == "local"
    call = Call(length, length, config.num_heads, config.num_kv_heads, config.head_dim, value_width, execution.dtype,
                window=config.sliding_window if is_local else None, soft_cap=config.attention_soft_cap, segments=True)
    with jax.set_mesh(assembly.mesh):
        return choose(call, execution.attention)


def limit_of(hbm_gib: float | None) -> int | None:
    """A limit as a flag gives it."""
    return None if hbm_gib is None else int(hbm_gib * GIB)
