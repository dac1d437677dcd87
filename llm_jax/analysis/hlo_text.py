"""Reads the text of an optimized HLO module (`compiled.as_text()`) into computations and instructions.

Only what the analysis needs is taken apart: names, opcodes, shapes, operands. Attributes stay text and are searched for
when they are asked for, so what a newer compiler adds does no harm.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,<=]*)\]")
_HEAD = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{\s*$")
_END = re.compile(r"^\}(?:, .*)?$")
_NAME = re.compile(r"%([\w.\-]+)")
_COMMENT = re.compile(r"/\*.*?\*/")


@dataclasses.dataclass(frozen=True)
class Array:
    """The shape of one array: dtype as HLO spells it ("bf16", "s32", "pred"), and sizes."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def num_bytes(self) -> int:
        """Bytes without padding; tokens have none."""
        bits = 8 if self.dtype == "pred" else int((re.findall(r"\d+", self.dtype) or ["0"])[0])
        return -(-self.size * bits // 8)


@functools.lru_cache(maxsize=4096)
def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape; those of a tuple, nested or not, in order. Layouts are passed over."""
    return tuple(Array(dtype, tuple(int(n.lstrip("<=")) for n in dims.split(",") if n))
                 for dtype, dims in _ARRAY.findall(shape))


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name, opcode, is_root: as printed.
      shape: text of the result's shape.
      operands: names of the operands.
      literal: text between the parentheses, which is the value of a constant.
      attributes: text after them.
    """

    name: str
    opcode: str
    is_root: bool
    shape: str
    operands: tuple[str, ...]
    literal: str
    attributes: str

    @property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays of the result."""
        return arrays(self.shape)

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute names (`calls=%f`, `body=%b`)."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None

    def numbers(self, attribute: str) -> tuple[int, ...]:
        """The whole numbers of a list attribute (`lhs_contracting_dims={1}`); () where it is absent."""
        found = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", self.attributes)
        return tuple(int(n) for n in found[1].split(",") if n) if found else ()

    @property
    def op_name(self) -> str:
        """Where in the traced function it comes from; "" if the compiler made it."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Computation:
    """A function of the module: its instructions by name, in order."""

    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction | None:
        """The instruction whose result is the computation's."""
        return next((i for i in reversed(self.instructions.values()) if i.is_root), None)

    def operand(self, instruction: Instruction, index: int) -> Instruction | None:
        """The instruction that gives an operand."""
        if index >= len(instruction.operands):
            return None
        return self.instructions.get(instruction.operands[index])


@dataclasses.dataclass(frozen=True)
class Module:
    """A whole program.

    Attributes:
      computations: by name.
      entry: the name of the one that runs.
      num_devices: replicas times partitions.
    """

    computations: dict[str, Computation]
    entry: str
    num_devices: int


def parse(text: str) -> Module:
    """Reads a module.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    header, _, _ = text.partition("\n")
    pending: list[str] = []  # the lines of one instruction: some kernels' attributes have line breaks in them

    def finish() -> None:
        instruction = parse_instruction("\n".join(pending)) if pending else None
        if instruction is not None and current is not None:
            current.instructions[instruction.name] = instruction
        pending.clear()

    for line in text.splitlines():
        if current is None:
            if line.rstrip().endswith("{") and (found := _COMPUTATION.match(line)):
                current = computations[found[2]] = Computation(found[2], {})
                entry = found[2] if found[1] else entry
        elif _END.match(line):
            finish()
            current = None
        else:
            if _HEAD.match(line):
                finish()
            pending.append(line)
    if not entry:
        raise ValueError("this is not the text of an HLO module: it has no ENTRY computation")
    counts = [int(n) for n in re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", header)]
    return Module(computations, entry, math.prod(counts))


def parse_instruction(line: str) -> Instruction | None:
    """Reads one line; None if it is not an instruction."""
    head = _HEAD.match(line)
    if head is None:
        return None
    start = head.end()
    end = _closing(line, start) + 1 if line.startswith("(", start) else line.find(" ", start)
    opcode = _OPCODE.match(line, end) if end > start else None
    if opcode is None:
        return None
    close = _closing(line, opcode.end() - 1)
    literal = line[opcode.end():close]
    return Instruction(head[2], opcode[1], bool(head[1]), _COMMENT.sub("", line[start:end]), _operands(literal),
                       literal, line[close + 1:])


def _operands(text: str) -> tuple[str, ...]:
    if "%" in text:
        return tuple(_NAME.findall(text))
    pieces = [piece.split() for piece in re.sub(r"\[[^\]]*\]|\{[^}]*\}", "", _COMMENT.sub("", text)).split(",")]
    return tuple(piece[-1] for piece in pieces if piece)


def _closing(text: str, start: int) -> int:
    """The index of the parenthesis that closes the one at `start`; the text's end if none does."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(text)
