"""Count what a compiled program computes and sends to other devices.

`read(compiled.as_text())` adds up the operations of its instructions, each as often as the loops
around it iterate.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from types import MappingProxyType
from typing import NamedTuple

_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_HEAD = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) .*\{$")
_LINE = re.compile(r"\s+(?P<root>ROOT )?%?(?P<name>[\w.-]+) = (?P<rest>.*)$")
_ELEMENT = re.compile(r"%([\w.-]+)#(\d+)")
"""An element of a tuple, as newer compilers for TPUs name it where it is read."""
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_UNKNOWN = ("collective-broadcast", "ragged-all-to-all", "send")
_COPYING = ("copy", "transpose", "reshape", "slice", "concatenate")
_BRANCHES = ("branch_computations", "true_computation", "false_computation")
_MATRIX_CALL = re.compile(r"gemm|matmul|cublas|cudnn|conv", re.IGNORECASE)


class Moved(NamedTuple):
    """The collectives of one kind, on one device.

    `count`: how often they run. `made`: the bytes of their results. `sent`: the bytes sent to other
    devices, by a ring algorithm. `asynchronous`: how many of them may overlap with other work.
    """

    count: float
    made: float
    sent: float
    asynchronous: float = 0


class Cost(NamedTuple):
    """The cost of a program, on one device.

    `flop`: operations of dots and convolutions of floating-point numbers. `declared`: operations
    that custom kernels declare. `eight`: operations of 8-bit dots and convolutions. `moved`:
    collectives by kind. `copied`: bytes written by instructions that only copy or rearrange,
    outside of fusions, while nothing else runs.
    """

    flop: float = 0.0
    declared: float = 0.0
    eight: float = 0.0
    moved: Mapping[str, Moved] = MappingProxyType({})
    copied: float = 0.0

    @property
    def sent(self) -> float:
        """The bytes that all collectives send."""
        return sum(kind.sent for kind in self.moved.values())

    def times(self, count: float) -> "Cost":
        """Return the cost of `count` runs."""
        moved = {kind: Moved(*(count * value for value in one)) for kind, one in self.moved.items()}
        return Cost(
            count * self.flop, count * self.declared, count * self.eight, moved, count * self.copied
        )


class Instruction(NamedTuple):
    """An instruction of a computation.

    `type`, `operands`: as in the text. `attributes`: all that follows the operands.
    """

    name: str
    type: str
    opcode: str
    operands: str
    attributes: str

    @property
    def inputs(self) -> list[str]:
        """The names of the operands."""
        return re.findall(r"%([\w.-]+)", self.operands)

    def called(self, role: str) -> list[str]:
        """Return the names of the computations in an attribute: one, or a list in braces."""
        found = re.search(rf"\b{role}=(\{{[^}}]*\}}|%[\w.-]+)", self.attributes)
        return re.findall(r"%([\w.-]+)", found[1]) if found else []


class Computation(NamedTuple):
    """Instructions by name, and the name of the one whose value is returned."""

    lines: dict[str, Instruction]
    root: str


class Program(NamedTuple):
    """Computations by name, the name of the entry computation, the number of devices."""

    computations: dict[str, Computation]
    entry: str
    devices: int


def read(text: str) -> Cost:
    """Return the cost of one run of a compiled program, on one device.

    **Raises:** `ValueError` for a loop whose number of iterations is not known, and for
    collectives, groups of devices and library calls for matmuls that cannot be counted.
    """
    program = parse(text)

    @cache
    def cost(name: str) -> Cost:
        return total(
            _instruction(line, program, name, cost)
            for line in program.computations[name].lines.values()
        )

    return cost(program.entry)


def total(costs: Iterable[Cost]) -> Cost:
    """Return the sum of costs."""
    flop, declared, eight, copied, moved = 0.0, 0.0, 0.0, 0.0, dict[str, Moved]()
    for cost in costs:
        flop, declared, eight = flop + cost.flop, declared + cost.declared, eight + cost.eight
        copied += cost.copied
        for kind, one in cost.moved.items():
            moved[kind] = Moved(
                *(a + b for a, b in zip(moved.get(kind, Moved(0, 0, 0)), one, strict=True))
            )
    return Cost(flop, declared, eight, moved, copied)


def parse(text: str) -> Program:
    """Return a program's computations."""
    computations, entry, name = dict[str, Computation](), "", ""
    lines, root = dict[str, Instruction](), ""
    for line in text.splitlines():
        if not name:
            if (head := _HEAD.match(line)) and "->" in line:
                name, lines, root = head["name"], {}, ""
                entry = name if head["entry"] else entry
        elif line.startswith("}"):
            computations[name], name = Computation(lines, root), ""
        elif found := _LINE.match(line):
            one = _split(found["name"], _ELEMENT.sub(partial(_element, lines), found["rest"]))
            lines[one.name] = one
            root = one.name if found["root"] else root
    if not entry:
        raise ValueError("`parse` found no ENTRY computation. Pass a compiled program's text.")
    counts = [
        re.search(rf"\b{key}=(\d+)", text.partition("\n")[0])
        for key in ("num_partitions", "replica_count")
    ]
    return Program(computations, entry, math.prod(int(count[1]) for count in counts if count))


def _element(lines: dict[str, Instruction], found: re.Match[str]) -> str:
    """Return the name of an element of a tuple, which becomes an instruction of its own."""
    name, index = found.groups()
    element = f"{name}.element.{index}"
    if element not in lines:
        kind = elements(lines[name].type)[int(index)]
        lines[element] = Instruction(
            element, kind, "get-tuple-element", f"%{name}", f", index={index}"
        )
    return f"%{element}"


def elements(text: str) -> list[str]:
    """Return the types in the type of a tuple."""
    parts, depth, start = [], 0, 1
    for position, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if (letter == "," and depth == 1) or depth == 0:
            parts.append(text[start:position])
            start = position + 1
            if depth == 0:
                break
    return [re.sub(r"/\*.*?\*/", "", part).strip() for part in parts]


def _split(name: str, rest: str) -> Instruction:
    """Parse "type opcode(operands), attributes"."""
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opening = rest.index("(", end)
    closing = _closing(rest, opening)
    return Instruction(
        name,
        rest[:end],
        rest[end:opening].strip(),
        rest[opening + 1 : closing],
        rest[closing + 1 :],
    )


def _closing(text: str, opening: int) -> int:
    """Return the position at which the bracket that opens here is closed."""
    depth = 0
    for found in re.finditer(r"[()]", text[opening:]):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return opening + found.start()
    raise ValueError(f"`parse` found an open bracket in {text[:200]!r}.")


def _instruction(
    line: Instruction, program: Program, name: str, cost: Callable[[str], Cost]
) -> Cost:
    """Return the cost of an instruction.

    **Arguments:** `name`: of its computation. `cost`: returns the cost of a computation by name.
    """
    kind = line.opcode.removesuffix("-start")
    if line.opcode in ("dot", "convolution"):
        count, computation = (
            _dot if line.opcode == "dot" else _convolution,
            program.computations[name],
        )
        if _is_8_bit(line, computation):
            return Cost(eight=count(line, computation))
        # On some machines a shuffle of features is compiled to a matmul of integers.
        return Cost(count(line, computation)) if re.match(r"b?f\d", line.type) else Cost()
    if kind in _COLLECTIVES:
        return Cost(moved={kind: _moved(line, kind, program.devices)})
    if kind in _UNKNOWN and "is_host_transfer=true" not in line.attributes:
        raise ValueError(
            f"`read` does not know what {line.opcode} sends ({line.name}). Add its formula."
        )
    if kind == "while":
        (condition,), (body,) = line.called("condition"), line.called("body")
        return total([cost(condition), cost(body)]).times(iterations(line, program, name))
    if kind == "conditional":
        branches = [cost(one) for role in _BRANCHES for one in line.called(role)]
        return max(branches, key=lambda one: (one.flop + one.declared + one.eight, one.sent))
    if kind == "custom-call":
        return total(
            [Cost(declared=_declared(line)), *map(cost, line.called("called_computations"))]
        )
    if kind == "call":
        return total(map(cost, line.called("to_apply")))
    if kind == "fusion":  # what is rearranged inside a fusion is never written to memory
        return total(map(cost, line.called("calls")))._replace(copied=0.0)
    if line.opcode in _COPYING:
        return Cost(copied=size(line.type))
    if line.opcode == "async-start":
        inside = total(map(cost, line.called("calls")))
        moved = {kind: one._replace(asynchronous=one.count) for kind, one in inside.moved.items()}
        return inside._replace(moved=moved, copied=0.0)
    return Cost()


def shapes(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """Return the dtypes and shapes of a type, in their order in the text."""
    return [
        (dtype, tuple(map(int, filter(None, dims.split(",")))))
        for dtype, dims in _SHAPE.findall(text)
    ]


def size(text: str) -> int:
    """Return the number of bytes of a type."""
    return sum(_bits(dtype) * math.prod(dims) for dtype, dims in shapes(text)) // 8


def _bits(dtype: str) -> int:
    """Return the bits of a dtype, from the number in its name: s4, bf16, f8e4m3fn, c64."""
    found = re.match(r"[a-z]+(\d+)", dtype)
    if found is None and dtype != "pred":
        raise ValueError(f"`size` does not know the dtype {dtype}. Add its number of bits.")
    return int(found[1]) if found else 8


def _numbers(attributes: str, key: str) -> list[int]:
    found = re.search(rf"\b{key}=\{{([\d,]*)\}}", attributes)
    return [int(number) for number in found[1].split(",") if number] if found else []


def _is_8_bit(line: Instruction, computation: Computation) -> bool:
    """Return whether both operands have 8-bit numbers."""
    types = [shapes(computation.lines[name].type)[0][0] for name in line.inputs]
    return all(re.match(r"s8|f8", one) for one in types)


def _dot(line: Instruction, computation: Computation) -> float:
    """Return the operations of a dot: two for each term of each number of the result."""
    left = shapes(computation.lines[line.inputs[0]].type)[0][1]
    summed = math.prod(left[i] for i in _numbers(line.attributes, "lhs_contracting_dims"))
    return 2 * math.prod(shapes(line.type)[0][1]) * summed


def _convolution(line: Instruction, computation: Computation) -> float:
    """Return the operations of a convolution: two for each product of two numbers.

    Products with padding, and between dilated elements, are not counted: XLA may compile a batched
    matmul to a convolution in which most products are of that kind.
    """
    image, kernel = (shapes(computation.lines[name].type)[0][1] for name in line.inputs)
    out = shapes(line.type)[0][1]
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line.attributes)
    if labels is None:
        raise ValueError(
            f"`read` finds no dim_labels in {line.name}. Add the form of this convolution."
        )
    products = 1
    for i, window in enumerate(_windows(line.attributes, len(out) - 2)):
        sizes = (
            dims[axes.index(str(i))]
            for dims, axes in zip((image, kernel, out), labels.groups(), strict=True)
        )
        products *= _kernel_hits(*sizes, **window)
    return (
        2
        * out[labels[3].index("b")]
        * out[labels[3].index("f")]
        * kernel[labels[2].index("i")]
        * products
    )


def _windows(attributes: str, count: int) -> list[dict[str, int]]:
    """Return the window of each spatial dimension."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(part.split("=") for part in found[1].split()) if found else {}

    def values(key: str, default: str) -> list[str]:
        return fields[key].split("x") if key in fields else [default] * count

    strides, dilations, gaps = (
        values("stride", "1"),
        values("lhs_dilate", "1"),
        values("rhs_dilate", "1"),
    )
    pads, reversed = values("pad", "0_0"), values("rhs_reversal", "0")
    return [
        {
            "stride": int(strides[i]),
            "dilation": int(dilations[i]),
            "gap": int(gaps[i]),
            "pad": int(pads[i].split("_")[0]),
            "reversed": int(reversed[i]),
        }
        for i in range(count)
    ]


def _kernel_hits(
    image: int,
    kernel: int,
    out: int,
    *,
    stride: int,
    dilation: int,
    gap: int,
    pad: int,
    reversed: int,
) -> int:
    """Return how many pairs of a kernel's and an image's element are multiplied, along one axis."""
    places = (
        o * stride - pad + (kernel - 1 - k if reversed else k) * gap
        for o in range(out)
        for k in range(kernel)
    )
    return sum(1 for place in places if place % dilation == 0 and 0 <= place // dilation < image)


def _declared(line: Instruction) -> float:
    """Return the operations that a custom kernel declares in `cost_estimate`; 0 without one."""
    target = re.search(r'custom_call_target="([^"]*)"', line.attributes)
    found = re.search(r'"cost_estimate":\s*(\{[^}]*\})', line.attributes)
    if found is None and target is not None and _MATRIX_CALL.search(target[1]):
        raise ValueError(
            f"`read` does not know what {target[1]} computes ({line.name}). Add its formula."
        )
    return float(json.loads(found[1]).get("flops", 0)) if found else 0.0


def _moved(line: Instruction, kind: str, devices: int) -> Moved:
    """Return the bytes that one run of a collective makes and sends."""
    made, asynchronous = size(_result(line, kind)), line.opcode.endswith("-start")
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{([{}\d,]*)\}", line.attributes)
        sending = sum(a != b for a, b in re.findall(r"(\d+),(\d+)", pairs[1])) if pairs else devices
        return Moved(1, made, made * sending / devices, asynchronous)
    others = _group(line, devices) - 1
    share = others / (others + 1)
    return Moved(
        1,
        made,
        made * {"all-reduce": 2 * share, "reduce-scatter": others}.get(kind, share),
        asynchronous,
    )


def _result(line: Instruction, kind: str) -> str:
    """Return the type of a collective's result.

    The start of an asynchronous collective, all-reduce apart, has a type of operands and results.
    """
    if not line.opcode.endswith("-start") or kind == "all-reduce":
        return line.type
    return elements(line.type)[1]


def _group(line: Instruction, devices: int) -> int:
    """Return how many devices take part in a collective.

    Groups are listed, counted as [groups, devices]<=…, or axes of a mesh:
    mesh['a'=2,'b'=4] {'b'}, where 'b':(2)2 would be a part of an axis, of 2 devices. The order of a
    mesh's devices, as device_ids=([2,2]T(1,0)), does not change how many there are.
    """
    text = line.attributes
    if found := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\S+)? \{([^}]*)\}", text
    ):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    found = re.search(r"replica_groups=(\{\}|\{\{([\d,]+)\}|\[\d+,(\d+)\]<=)", text)
    if found is None:
        raise ValueError(
            f"`read` does not know which devices {line.name} joins ({text[:300]}). "
            "Add the form of its replica_groups."
        )
    return len(found[2].split(",")) if found[2] else int(found[3]) if found[3] else devices


def iterations(line: Instruction, program: Program, name: str) -> int:
    """Return the number of iterations of a loop.

    It is the compiler's own count if there is one; else it follows from the counter's start, step
    and limit.
    **Arguments:** `name`: of the computation with the loop.
    **Raises:** `ValueError` where it cannot be known.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line.attributes):
        return int(known[1])
    (condition,), (body,) = line.called("condition"), line.called("body")
    try:
        index, limit = _limit(program, condition)
        start = _constant(
            program, name, program.computations[name].lines[line.inputs[0]].inputs[index]
        )
        step = _step(
            program,
            body,
            program.computations[body].lines[program.computations[body].root].inputs[index],
        )
    except (LookupError, ValueError) as error:
        raise ValueError(
            f"`read` does not know how often {line.name} of {name} iterates: {error}."
        ) from error
    return max(0, -(-(limit - start) // step))


def _constant(program: Program, name: str, value: str) -> int:
    """Return the value of an integer constant, also behind copies."""
    line = program.computations[name].lines[value]
    if line.opcode == "constant":
        return int(line.operands)
    if line.opcode not in ("copy", "copy-done", "copy-start", "bitcast"):
        raise ValueError(f"{value} is a {line.opcode}, not a constant")
    return _constant(program, name, line.inputs[0])


def _limit(program: Program, condition: str) -> tuple[int, int]:
    """Return the index of a loop's counter in its state, and the counter's limit (exclusive)."""
    computation = program.computations[condition]
    test = computation.lines[computation.root]
    inside = _fused(program, test)
    if inside.opcode != "compare" or not re.search(r"direction=L[TE]", inside.attributes):
        raise ValueError(f"{test.name} does not compare a counter with its limit")
    counter = computation.lines[test.inputs[0]]
    index = re.search(r"index=(\d+)", counter.attributes)
    if counter.opcode != "get-tuple-element" or index is None:
        raise ValueError(f"{counter.name} is not part of the loop's state")
    return int(index[1]), _constant(program, condition, test.inputs[1]) + (
        "direction=LE" in inside.attributes
    )


def _step(program: Program, body: str, value: str) -> int:
    """Return the number that a loop's body adds to its counter."""
    line = program.computations[body].lines[value]
    if line.opcode == "copy":
        return _step(program, body, line.inputs[0])
    if _fused(program, line).opcode != "add":
        raise ValueError(f"{value} does not add to a counter")
    return _constant(program, body, line.inputs[1])


def _fused(program: Program, line: Instruction) -> Instruction:
    """Return the only operation of a fusion that wraps a single one, or the instruction itself."""
    if line.opcode != "fusion":
        return line
    inside = program.computations[line.called("calls")[0]]
    root = inside.lines[inside.root]
    if [inside.lines[name].operands for name in root.inputs] != ["0", "1"]:
        raise ValueError(f"{line.name} does more than {root.opcode}")
    return root
