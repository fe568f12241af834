"""Tensors of files matched to the parameters of a network, all of them checked together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

from fluxjax.checkpoint.dialect import Dialect, Row
from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.fused import FusedRows
from fluxjax.checkpoint.kinds import Network
from fluxjax.checkpoint.plan import Plan, TensorRows
from fluxjax.checkpoint.tensor_layout import shape_in_file
from fluxjax.checkpoint.tensors import Tensor
from fluxjax.checkpoint.weights import LOADED_DTYPES, Parameter, parameters_of
from fluxjax.nets.stack import is_stacked, leaf_names
from fluxjax.printable import printable

STORED_FLOATS = frozenset(np.dtype(name) for name in (*LOADED_DTYPES, "float64"))
Part = tuple[str, str | None]
"""The name of a parameter, and of a part of it in the file; None for all of the parameter."""
Problems = Mapping[str, Sequence[str]]
"""Keys that are "missing", "unexpected", "misshapen" or "repeated", with what is wrong."""
_MOST_LISTED = 20


def match_tensors(
    network: Network, tensors: Mapping[str, Tensor], dialect: Dialect, fused: FusedRows
) -> tuple[Plan, Problems]:
    """Return which tensors fill each parameter, and all that does not fit; no values are read.

    **Arguments:** `network`: with shapes as leaves. `tensors`: by their keys in the file.
    `dialect`: how these keys are named. `fused`: the rows of the parts of fused weights.
    **Raises:** `WeightsError` for a config that has far more blocks than there are tensors.
    """
    # Before the blocks are enumerated, since a damaged config can have a billion of them.
    _check_depth(network, len(tensors))
    matching = _Matching(dialect, fused, parameters_of(network))
    for key, tensor in tensors.items():
        matching.add(key, tensor)
    problems = matching.problems | {"missing": matching.missing()}
    return Plan(network, matching.sources, matching.parameters), problems


def complete_plan(
    network: Network, tensors: Mapping[str, Tensor], dialect: Dialect, fused: FusedRows
) -> Plan:
    """Return which tensors fill each parameter; arguments as for `match_tensors`.

    **Raises:** `WeightsError` that lists all that does not fit.
    """
    plan, problems = match_tensors(network, tensors, dialect, fused)
    if any(problems.values()):
        raise WeightsError(_describe(network, dialect, problems))
    return plan


def _check_depth(network: Network, tensor_count: int) -> None:
    """**Raises:** `WeightsError` for a config with far more blocks than a file has tensors."""
    depth = 0
    for name, leaf in zip(leaf_names(network), jax.tree.leaves(network), strict=True):
        if is_stacked(name):
            depth = max(depth, leaf.shape[0])
    if depth > max(tensor_count, 1000):
        raise WeightsError(
            f"The config asks for {depth} blocks, of {tensor_count} tensors. "
            "Pass the file's own config."
        )


@dataclass
class _Matching:
    """The state of matching one tensor after the other.

    `sources`: the tensors found so far, by parameter. `unfilled`: the parameters, and the parts of
    fused ones, that no tensor has filled yet. `problems`: what does not fit.
    """

    dialect: Dialect
    fused: FusedRows
    parameters: dict[str, Parameter]
    sources: dict[str, list[TensorRows]] = field(init=False)
    unfilled: set[Part] = field(init=False)
    problems: dict[str, list[str]] = field(init=False)

    def __post_init__(self) -> None:
        self.sources = {name: [] for name in self.parameters}
        self.unfilled = set()
        for name in self.parameters:
            for part in self._parts_of(name):
                self.unfilled.add((name, part))
        # In the order in which the error lists them.
        self.problems = {
            "missing": [],
            "unexpected": [],
            "misshapen": [],
            "repeated": [],
        }

    def _parts_of(self, name: str) -> list[str | None]:
        """Return the parts in which the dialect has a parameter, [None] for one in one piece."""
        keys = self.dialect.keys(name)
        if not keys:
            return [None]
        return [row.part for _, row in keys]

    def add(self, key: str, tensor: Tensor) -> None:
        """Match one tensor, or note what is wrong with it.

        **Arguments:** `key`: the tensor's name in the file.
        """
        found = self.dialect.find(key)
        if found is None or found[0] not in self.parameters:
            if not self.dialect.ignores(key):
                self.problems["unexpected"].append(printable(key))
            return
        name, row = found
        part = (name, row.part)
        # Two keys can mean one parameter, as with and without the dialect's prefix.
        if part not in self.unfilled:
            self.problems["repeated"].append(printable(key))
        self.unfilled.discard(part)
        shape = self.parameters[name].shape
        rows = slice(0, shape[0])
        if row.part is not None:
            rows = self.fused[row.part]
        count = rows.stop - rows.start
        expected = shape_in_file((count, *shape[1:]), row.layout)
        self._check_tensor(key, tensor, expected)
        self.sources[name] += _tensor_rows(tensor, row, rows, key)

    def _check_tensor(self, key: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
        """Note a tensor of another shape than expected, or of values that are not floats."""
        if tensor.shape != expected:
            problem = f"{key} is {list(tensor.shape)}, not {list(expected)}"
            self.problems["misshapen"].append(printable(problem))
        if tensor.dtype not in STORED_FLOATS:
            problem = f"{printable(key)} is {tensor.dtype}, not a float"
            self.problems["misshapen"].append(problem)

    def missing(self) -> list[str]:
        """Return the keys of the parts that no tensor has filled, sorted."""
        keys = []
        for name, part in self.unfilled:
            keys.append(self._key_of(name, part))
        return sorted(keys)

    def _key_of(self, name: str, part: str | None) -> str:
        """Return the key of a part; the parameter's own name if the dialect has none."""
        for key, row in self.dialect.keys(name):
            if row.part == part:
                return key
        return name


def _tensor_rows(tensor: Tensor, row: Row, rows: slice, key: str) -> list[TensorRows]:
    """Return which of a parameter's rows a tensor fills."""
    if row.layout != "swap":
        return [TensorRows(tensor, row.layout, rows.start, rows.stop, key=key)]
    # The tensor's second half fills the first half of the parameter's rows, and the other way.
    middle = (rows.start + rows.stop) // 2
    return [
        TensorRows(tensor, "swap", rows.start, middle, middle, key),
        TensorRows(tensor, "swap", middle, rows.stop, 0, key),
    ]


def _describe(network: Network, dialect: Dialect, problems: Problems) -> str:
    """Return the message of the error that lists all problems."""
    title = type(network).__name__
    lines = [f"The file does not fit this {title} (read as {dialect.name} names):"]
    for problem, keys in problems.items():
        if keys:
            listed = ", ".join(keys[:_MOST_LISTED])
            if len(keys) > _MOST_LISTED:
                listed += f" … and {len(keys) - _MOST_LISTED} more"
            lines.append(f"  {len(keys)} {problem}: {listed}")
    lines.append("Pass the file of this network, or the config it was made with.")
    return "\n".join(lines)
