"""What a compiled program does in one run, read from its text: arithmetic, collectives, loops.

XLA's own `cost_analysis` counts the body of a loop once; a scanned model is nearly all loop. Here each computation
counts as often as it runs: `summary(compiled.as_text())`. Numbers are those of one device.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping

from llm_jax.analysis import products
from llm_jax.analysis.device_groups import axes_of_groups, axes_of_pairs, device_groups, permuted_pairs
from llm_jax.analysis.hlo_text import Computation, Instruction, Module, parse
from llm_jax.analysis.trip_count import trip_count

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_SPELT = {name: kind for kind in KINDS for name in (kind, f"{kind}-start")} | {"ragged-all-to-all": "all-to-all"}


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product, convolution, or custom call with arithmetic of its own.

    Attributes:
      name: of the instruction.
      op_name: where in the traced function it comes from.
      flops: of one execution, a multiplication and an addition counted as two; None where the program does not tell.
      times: how often it runs.
    """

    name: str
    op_name: str
    flops: float | None
    times: float


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation.

    Attributes:
      name, op_name: as for `Product`.
      kind: one of `KINDS`; the asynchronous forms count as what they do.
      num_bytes: of the whole array on one device: what an all-gather results in, what a reduce-scatter begins with,
        what an all-reduce, all-to-all or permute takes.
      group_size: devices that take part together.
      axes: mesh axes along which they lie; None if no mesh was given or the groups are no product of its axes.
      times: how often it runs.
      channel: the number by which its parts find each other; None if it has none.
    """

    name: str
    op_name: str
    kind: str
    num_bytes: int
    group_size: int
    axes: tuple[str, ...] | None
    times: float
    channel: int | None = None

    @property
    def moved_bytes(self) -> float:
        """Bytes that a device sends in one execution, by a ring (Patarasuk & Yuan 2009, "Bandwidth optimal all-reduce
        algorithms"): all-reduce 2·(n−1)/n of the array, all-gather, reduce-scatter and all-to-all (n−1)/n, a permute
        all of it."""
        share = (self.group_size - 1) / self.group_size
        factors = {"all-reduce": 2 * share, "collective-permute": 1.0, "collective-broadcast": 1.0}
        return self.num_bytes * factors.get(self.kind, share)


@dataclasses.dataclass(frozen=True)
class Loop:
    """A while loop.

    Attributes:
      name, op_name: as for `Product`.
      trips: how often the body runs each time the loop is entered; None if the program does not tell (counted as 1).
      times: how often it is entered.
      flops: of all its trips, one time.
    """

    name: str
    op_name: str
    trips: int | None
    times: float
    flops: float


@dataclasses.dataclass(frozen=True)
class Program:
    """What one device does in one run of a program; see `summary`."""

    products: tuple[Product, ...] = ()
    collective_ops: tuple[Collective, ...] = ()
    loops: tuple[Loop, ...] = ()
    num_devices: int = 1

    @property
    def flops(self) -> float:
        """Floating-point operations of all products whose count is known."""
        return sum((product.flops or 0.0) * product.times for product in self.products)

    @property
    def uncounted(self) -> tuple[Product, ...]:
        """Custom calls that may well compute, and don't say how much."""
        return tuple(product for product in self.products if product.flops is None)

    @property
    def unknown_loops(self) -> tuple[Loop, ...]:
        """Loops whose number of trips is found out as they run; their bodies are counted once."""
        return tuple(loop for loop in self.loops if loop.trips is None)

    @property
    def collectives(self) -> dict[str, tuple[float, float]]:
        """kind → (executions, bytes): `Collective.num_bytes` times executions."""
        return self._by_kind(lambda op: op.num_bytes)

    @property
    def moved_bytes(self) -> dict[str, float]:
        """kind → bytes that a device sends; see `Collective.moved_bytes`."""
        return {kind: moved for kind, (_, moved) in self._by_kind(lambda op: op.moved_bytes).items()}

    def along(self, *axes: str) -> Program:
        """Only the collectives along exactly these mesh axes, and nothing else."""
        kept = tuple(op for op in self.collective_ops if op.axes is not None and set(op.axes) == set(axes))
        return Program(collective_ops=kept, num_devices=self.num_devices)

    def _by_kind(self, size: Callable[[Collective], float]) -> dict[str, tuple[float, float]]:
        totals: dict[str, tuple[float, float]] = {}
        for op in self.collective_ops:
            count, num_bytes = totals.get(op.kind, (0.0, 0.0))
            totals[op.kind] = (count + op.times, num_bytes + size(op) * op.times)
        return totals

    def _repeated(self, times: float) -> Program:
        return Program(tuple(dataclasses.replace(item, times=item.times * times) for item in self.products),
                       tuple(dataclasses.replace(item, times=item.times * times) for item in self.collective_ops),
                       tuple(dataclasses.replace(item, times=item.times * times) for item in self.loops),
                       self.num_devices)


def summary(text: str, mesh: Mapping[str, int] | None = None, kernel_share: float = 1.0) -> Program:
    """Counts what a program does.

    Products are counted as 2·M·N·K, masked entries and padding included, for they are computed; elementwise arithmetic
    is not counted. Of a conditional the branch with the most arithmetic counts.

    Args:
      text: `compiled.as_text()`, of a program for CPU, GPU or TPU.
      mesh: axis → size (`mesh.shape`), to say along which axes collectives go.
      kernel_share: share of all pairs of queries and keys that attention kernels visit, which their calls don't tell.

    Returns:
      The counts of one device.

    Raises:
      ValueError: this is not the text of an HLO module.
    """
    module = parse(text)
    return _Counter(module, mesh, kernel_share).of(module.entry)


class _Counter:
    """Counts each computation once, however often it is called."""

    def __init__(self, module: Module, mesh: Mapping[str, int] | None, kernel_share: float):
        self.module, self.mesh, self.kernel_share = module, mesh, kernel_share
        self.known: dict[str, Program] = {}

    def of(self, name: str | None) -> Program:
        computation = self.module.computations.get(name or "")
        if computation is None:
            return Program(num_devices=self.module.num_devices)
        if computation.name not in self.known:
            whole = Program(num_devices=self.module.num_devices)
            for instruction in computation.instructions.values():
                part = self._count(computation, instruction)
                if part is not None:
                    whole = _joined(whole, part, once=instruction.opcode == "fusion")
            self.known[computation.name] = whole
        return self.known[computation.name]

    def _count(self, computation: Computation, instruction: Instruction) -> Program | None:
        """What one execution of an instruction does; None for what does not count."""
        opcode = instruction.opcode
        if opcode in _SPELT:
            return Program(collective_ops=(self._collective(computation, instruction),))
        if products.is_product(instruction):
            flops = products.flops(computation, instruction, self.kernel_share)
            return Program((Product(instruction.name, instruction.op_name, flops, 1.0),))
        if opcode == "while":
            return self._loop(computation, instruction)
        if opcode == "conditional":
            return max(map(self.of, _branches(instruction)), default=Program(), key=_weight)
        if opcode in ("fusion", "async-start"):
            return self.of(instruction.called("calls"))
        if opcode == "call":
            return self.of(instruction.called("to_apply"))
        return None

    def _loop(self, computation: Computation, instruction: Instruction) -> Program:
        trips = trip_count(self.module, computation, instruction)
        body = self.of(instruction.called("body"))._repeated(1 if trips is None else trips)
        loop = Loop(instruction.name, instruction.op_name, trips, 1.0, body.flops)
        return dataclasses.replace(body, loops=(loop, *body.loops))

    def _collective(self, computation: Computation, instruction: Instruction) -> Collective:
        kind = _SPELT[instruction.opcode]
        if kind == "all-reduce" and _is_scattered(computation, instruction):
            kind = "reduce-scatter"
        operands = [computation.operand(instruction, i) for i in range(len(instruction.operands))]
        used = operands[:1] if instruction.opcode == "ragged-all-to-all" else operands
        num_bytes = sum(array.num_bytes for operand in used if operand is not None for array in operand.arrays)
        if kind == "collective-permute":
            pairs = permuted_pairs(instruction.attributes)
            axes = axes_of_pairs(pairs, self.mesh) if self.mesh else None
            group_size = 2
        else:
            groups = device_groups(instruction.attributes, self.module.num_devices)
            axes = axes_of_groups(groups, self.mesh) if self.mesh else None
            group_size = max(map(len, groups))
            num_bytes *= group_size if kind == "all-gather" else 1
        channel = re.search(r"channel_id=(\d+)", instruction.attributes)
        return Collective(instruction.name, instruction.op_name, kind, num_bytes, group_size, axes, 1.0,
                          int(channel[1]) if channel else None)


def _joined(a: Program, b: Program, once: bool) -> Program:
    """Both, one after the other; with `once`, without collectives of b that a has under the same channel.

    Compilers for TPU put a collective that goes on beside other work into several fusions, which begin it, wait for it,
    and do that work in between, and each of them shows it whole.
    """
    there = {op.channel for op in a.collective_ops if op.channel is not None} if once else set()
    new = tuple(op for op in b.collective_ops if op.channel not in there)
    return Program(a.products + b.products, a.collective_ops + new, a.loops + b.loops, a.num_devices)


def _weight(program: Program) -> tuple[float, float]:
    return program.flops, sum(op.num_bytes * op.times for op in program.collective_ops)


def _branches(instruction: Instruction) -> list[str]:
    found = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    if found:
        return [name.strip().lstrip("%") for name in found[1].split(",")]
    named = (instruction.called("true_computation"), instruction.called("false_computation"))
    return [name for name in named if name is not None]


def _is_scattered(computation: Computation, instruction: Instruction) -> bool:
    """Whether an all-reduce is half of what compilers for TPU make of a reduce-scatter: a fusion in which each device
    goes on with its own slice alone."""
    if computation.name.startswith("all-reduce-scatter"):
        return True
    users = [other for other in computation.instructions.values() if instruction.name in other.operands]
    return bool(users) and not instruction.is_root and all(u.opcode == "dynamic-slice" and u.is_root for u in users)
