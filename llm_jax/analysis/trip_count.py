"""How often the body of a while loop runs, where the program says or its counter shows it."""

from __future__ import annotations

import re

from llm_jax.analysis.hlo_text import Computation, Instruction, Module

_KNOWN = re.compile(r'"known_trip_count":\s*\{\s*"n":\s*"?(\d+)')
_PASSING = ("copy", "bitcast", "convert", "reshape", "broadcast", "optimization-barrier")


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """Trips of one entry into a loop.

    What the compiler noted is believed. Otherwise a counter is looked for: an entry of the carried tuple that the
    condition compares with a constant, that begins at a constant and that the body adds a constant to.

    Args:
      module: the program.
      computation: the one that holds the loop.
      loop: its `while` instruction.

    Returns:
      The number, or None if it is found out only as the program runs.
    """
    noted = _KNOWN.search(loop.attributes)
    if noted:
        return int(noted[1])
    condition = module.computations.get(loop.called("condition") or "")
    body = module.computations.get(loop.called("body") or "")
    if condition is None or body is None or condition.root is None:
        return None
    initial = computation.operand(loop, 0)
    compared = _comparison(module, condition, condition.root)
    if compared is None:
        return None
    left, right, direction = compared
    counter, bound = _place(left), _constant(right)
    if bound is None and _place(right) is not None:  # loops carry constants that the body does not change
        bound = _initial(computation, initial, _place(right)) if _is_kept(body, _place(right)) else None
    start = _initial(computation, initial, counter)
    step = _step(module, body, counter)
    if start is None or bound is None or not step:
        return None
    reach = bound - start + (0 if direction in ("LT", "GT", "NE") else 1 if step > 0 else -1)
    return max(0, -(-reach // step))


def _comparison(module: Module, computation: Computation, root: Instruction
                ) -> tuple[Instruction, Instruction, str] | None:
    """Both sides of the condition, as instructions of the condition's computation, and the direction."""
    sides = [computation.operand(root, i) for i in range(len(root.operands))]
    if root.opcode == "compare":
        direction = re.search(r"direction=(\w+)", root.attributes)
        if direction is None or len(sides) != 2 or sides[0] is None or sides[1] is None:
            return None
        return sides[0], sides[1], direction[1]
    if root.opcode not in ("fusion", "call"):
        return None
    inner = module.computations.get(root.called("calls") or root.called("to_apply") or "")
    found = _comparison(module, inner, inner.root) if inner is not None and inner.root is not None else None
    if found is None:
        return None
    outer = [sides[int(side.literal)] if side.opcode == "parameter" and int(side.literal) < len(sides) else side
             for side in found[:2]]
    return (outer[0], outer[1], found[2]) if outer[0] is not None and outer[1] is not None else None


def _place(instruction: Instruction | None) -> int | None:
    """Which entry of the carried tuple an instruction reads."""
    if instruction is None or instruction.opcode != "get-tuple-element":
        return None
    found = re.search(r"index=(\d+)", instruction.attributes)
    return int(found[1]) if found else None


def _constant(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "constant":
        return None
    text = instruction.literal.strip("{} ")
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def _initial(computation: Computation, carried: Instruction | None, place: int | None) -> int | None:
    if carried is None or place is None or carried.opcode != "tuple":
        return None
    return _constant(_origin(computation, computation.operand(carried, place)))


def _origin(computation: Computation, instruction: Instruction | None) -> Instruction | None:
    while instruction is not None and instruction.opcode in _PASSING:
        instruction = computation.operand(instruction, 0)
    return instruction


def _is_kept(body: Computation, place: int | None) -> bool:
    """Whether the body hands an entry on as it got it."""
    if body.root is None or place is None:
        return False
    return _place(_origin(body, body.operand(body.root, place))) == place


def _step(module: Module, body: Computation, place: int | None) -> int | None:
    """What the body adds to an entry."""
    if body.root is None or place is None:
        return None
    found = _origin(body, body.operand(body.root, place))
    if found is not None and found.opcode in ("fusion", "call"):
        inner = module.computations.get(found.called("calls") or found.called("to_apply") or "")
        if inner is None or inner.root is None or inner.root.opcode != "add":
            return None
        outer = [_origin(body, body.operand(found, i)) for i in range(len(found.operands))]
        terms = [outer[int(term.literal)] if term is not None and term.opcode == "parameter" else term
                 for term in (_origin(inner, inner.operand(inner.root, i)) for i in range(2))]
    elif found is not None and found.opcode == "add":
        terms = [_origin(body, body.operand(found, i)) for i in range(2)]
    else:
        return None
    added = [_constant(term) for term in terms if _place(term) != place]
    return added[0] if len(added) == 1 else None
