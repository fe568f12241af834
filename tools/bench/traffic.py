"""Count the bytes that the kernels of a compiled program read and write in the device's memory.

`traffic(compiled.as_text())` adds up the instructions that run as kernels, each as often as the
loops around it iterate. What a kernel reads twice counts once, as if caches held it: the sum is
what a program moves at least.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from types import MappingProxyType
from typing import NamedTuple

from program import Computation, Instruction, Program, iterations, parse, shapes, size

_FREE = (
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "iota",
    "opt-barrier",
    "parameter",
    "partition-id",
    "tuple",
)
"""Instructions that run nothing."""
_ENDS = ("-done", "-update")
"""Ends of asynchronous instructions, which count where they start."""
_SLICES = ("dynamic-slice", "slice", "gather")
_NAMES = ("bitcast", "reshape", "convert", "copy")
"""What may lie between a fusion's operand and the slice of it that is read."""
_ARRAY = re.compile(r"\w+\[[\d,]*\](?:\{[^}]*\})?")
_FAST = re.compile(r"\{[^}]*S\(\d+\)[^}]*\}")
"""A layout in another memory than the device's main one: a TPU's VMEM, or the host's."""
_WORKSPACE = re.compile(r"^s8\[\d+\]|^u8\[\d+\]")


class Traffic(NamedTuple):
    """The kernels of a program, or of a part of it.

    `kernels`: how many run. `read`, `written`: bytes. `kinds`: bytes, both together, by the kind of
    kernel: the target of a custom call, "copy" for what only moves numbers, or "fusion".
    """

    kernels: float = 0.0
    read: float = 0.0
    written: float = 0.0
    kinds: Mapping[str, float] = MappingProxyType({})

    @property
    def moved(self) -> float:
        """The bytes read and written."""
        return self.read + self.written

    def times(self, count: float) -> "Traffic":
        """Return the traffic of `count` runs."""
        kinds = {kind: count * moved for kind, moved in self.kinds.items()}
        return Traffic(count * self.kernels, count * self.read, count * self.written, kinds)


def traffic(text: str) -> Traffic:
    """Return the traffic of one run of a compiled program.

    **Raises:** `ValueError` for a loop whose number of iterations is not known.
    """
    program = parse(text)

    @cache
    def of(name: str) -> Traffic:
        computation = program.computations[name]
        return _sum(_of_line(line, computation, program, of) for line in computation.lines.values())

    return of(program.entry)


def loops(text: str) -> list[Traffic]:
    """Return the traffic of one iteration of each loop, the one that moves the most bytes first."""
    program = parse(text)

    @cache
    def of(name: str) -> Traffic:
        computation = program.computations[name]
        return _sum(_of_line(line, computation, program, of) for line in computation.lines.values())

    found = []
    for computation in program.computations.values():
        for line in computation.lines.values():
            if line.opcode == "while":
                found.append(of(line.called("body")[0]))
    return sorted(found, key=lambda one: one.moved, reverse=True)


def _sum(parts: Iterable[Traffic]) -> Traffic:
    kernels = read = written = 0.0
    kinds = dict[str, float]()
    for part in parts:
        kernels, read, written = kernels + part.kernels, read + part.read, written + part.written
        for kind, moved in part.kinds.items():
            kinds[kind] = kinds.get(kind, 0.0) + moved
    return Traffic(kernels, read, written, kinds)


def _of_line(
    line: Instruction,
    computation: Computation,
    program: Program,
    of: Callable[[str], Traffic],
) -> Traffic:
    """Return the traffic of an instruction. `of`: returns that of a computation by name."""
    kind = line.opcode
    if kind in _FREE or kind.endswith(_ENDS):
        return Traffic()
    if kind == "while":
        (condition,), (body,) = line.called("condition"), line.called("body")
        count = iterations(line, program, _name_of(computation, program))
        return _sum([of(condition), of(body)]).times(count)
    if kind == "conditional":
        roles = ("branch_computations", "true_computation", "false_computation")
        branches = [of(one) for role in roles for one in line.called(role)]
        return max(branches, key=lambda one: one.moved)
    if kind in ("call", "async-start") and (called := line.called("to_apply") or _calls(line)):
        return _sum(map(of, called))
    if kind.startswith("fusion"):
        return _of_fusion(line, computation, program)
    return _of_kernel(line, computation)


def _calls(line: Instruction) -> list[str]:
    return line.called("calls")


def _name_of(computation: Computation, program: Program) -> str:
    return next(name for name, one in program.computations.items() if one is computation)


def _of_kernel(line: Instruction, computation: Computation) -> Traffic:
    """Return the traffic of an instruction that is a kernel by itself."""
    written = _bytes(_result(line))
    if line.opcode in _SLICES:
        read = written
    elif line.opcode == "dynamic-update-slice":
        read = written = _bytes(computation.lines[line.inputs[1]].type)
    else:
        read = sum(_bytes(computation.lines[name].type) for name in set(line.inputs))
    target = re.search(r'custom_call_target="([^"]+)"', line.attributes)
    kind = target[1] if target else line.opcode.removesuffix("-start")
    return Traffic(1, read, written, {kind: read + written})


def _of_fusion(line: Instruction, computation: Computation, program: Program) -> Traffic:
    """Return the traffic of a fusion, which reads only what its result needs of each operand."""
    inside = program.computations[_calls(line)[0]]
    needs = _needs(inside)
    read = 0.0
    for name, one in inside.lines.items():
        if one.opcode == "parameter":
            whole = _bytes(computation.lines[line.inputs[int(one.operands)]].type)
            read += whole * _share(needs.get(name, {}), one)
    written = _written(inside, inside.lines[inside.root], _result(line))
    targets = re.findall(
        r'custom_call_target="([^"]+)"', "\n".join(one.attributes for one in inside.lines.values())
    )
    return Traffic(1, read, written, {targets[0] if targets else "fusion": read + written})


def _share(need: Mapping[str, float], line: Instruction) -> float:
    """Return which share of an instruction's numbers is needed."""
    count = _numbers(line)
    return min(1.0, sum(need.values()) / count) if count else 0.0


def _needs(inside: Computation) -> dict[str, dict[str, float]]:
    """Return what is needed of each instruction of a fusion: how many numbers of each slice.

    Instructions are in an order in which operands come first, so that all that read one are known
    before it. The same slice that is read twice counts once.
    """
    needs: dict[str, dict[str, float]] = {inside.root: {"": _numbers(inside.lines[inside.root])}}
    for line in reversed(inside.lines.values()):
        need = needs.get(line.name)
        if need is None:
            continue
        for position, name in enumerate(line.inputs):
            if line.opcode == "dynamic-update-slice" and position == 0:
                continue  # changed in place
            operand = inside.lines[name]
            wanted = needs.setdefault(name, {})
            for key, count in _passed_on(line, need, operand).items():
                wanted[key] = max(wanted.get(key, 0.0), count)
    return needs


def _passed_on(
    line: Instruction, need: Mapping[str, float], operand: Instruction
) -> Mapping[str, float]:
    """Return what an instruction needs of an operand, if so much is needed of itself."""
    if line.opcode in _SLICES and _numbers(operand) > _numbers(line):
        where = f"{line.operands} {line.attributes}".partition(", metadata")[0]
        return {where: min(_numbers(line), sum(need.values()))}
    ratio = _numbers(operand) / max(1.0, _numbers(line))
    return {key: ratio * count for key, count in need.items()}


def _numbers(line: Instruction) -> float:
    """Return how many numbers an instruction's result has; of a tuple, all of them."""
    return float(sum(math.prod(dims) for _, dims in shapes(line.type)))


def _written(inside: Computation, root: Instruction, result: str) -> float:
    """Return the bytes that a fusion writes."""
    if root.opcode == "tuple":
        return sum(
            _written(inside, inside.lines[name], inside.lines[name].type) for name in root.inputs
        )
    while root.opcode in _NAMES:
        root = inside.lines[root.inputs[0]]
    if root.opcode == "dynamic-update-slice":
        return _bytes(inside.lines[root.inputs[1]].type)
    return _bytes(result)


def _result(line: Instruction) -> str:
    """Return the type of what an instruction makes, without what is only room to work in."""
    kind = line.type
    if not kind.startswith("("):
        return kind
    parts = _ARRAY.findall(kind)
    if line.opcode.endswith("-start"):
        return parts[-2] if len(parts) > 2 else parts[-1]
    return " ".join(part for part in parts if not _WORKSPACE.match(part))


def _bytes(text: str) -> float:
    """Return the bytes of the arrays of a type that are in the device's main memory."""
    return float(sum(size(part) for part in _ARRAY.findall(text) if not _FAST.search(part)))
