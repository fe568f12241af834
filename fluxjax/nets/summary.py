"""A network as a short table: its config, and each part's parameters, dtypes and bytes."""

import math
import textwrap
from dataclasses import fields
from typing import NamedTuple

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from fluxjax.nets.stack import Unrolled, is_stacked
from fluxjax.nets.weight import Weight

_WIDTH = 100
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


class _Row(NamedTuple):
    """A line of the table."""

    name: str
    kind: str
    parameters: int
    dtypes: str
    nbytes: int


def describe_network(network: eqx.Module) -> str:
    """Return a network's class, config and size, and one line for each of its parts.

    A line has the part's class (and how many blocks are stacked or unrolled), the number of its
    parameters without adapters, the dtypes of its arrays, and their bytes over all devices. Weights
    that are left in files take none.

    **Arguments:** `network`: of arrays, sharded or not, or of shapes as from
    `eqx.filter_eval_shape`. One of anything else, such as shardings, is shown leaf by leaf, as
    Equinox does.
    """
    if not all(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(network)):
        return eqx.tree_pformat(network)
    rows = []
    for field in fields(network):
        part = getattr(network, field.name)
        if field.name != "config" and part is not None:
            rows.append(_row(field.name, part))
    total = sum(row.parameters for row in rows)
    nbytes = sum(row.nbytes for row in rows)
    title = f"{type(network).__name__}: {total:,} parameters, {_size(nbytes)}"
    config = textwrap.fill(
        repr(getattr(network, "config", "")),
        _WIDTH,
        initial_indent="  ",
        subsequent_indent="    ",
    )
    return "\n".join([title, config, *_table(rows)])


def _row(name: str, part: PyTree) -> _Row:
    nodes = jax.tree.leaves(part, is_leaf=lambda node: isinstance(node, Weight))
    parameters = sum(_parameters(node) for node in nodes)
    leaves = jax.tree.leaves(part)
    dtypes = sorted({str(leaf.dtype) for leaf in leaves})
    nbytes = sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in leaves)
    return _Row(name, _kind(name, part), parameters, ", ".join(dtypes), nbytes)


def _parameters(node: PyTree) -> int:
    """Return the number of parameters of an array or a weight."""
    try:
        # A weight's shape is the whole matrix's, also where its arrays are quantized or in a file.
        return math.prod(node.shape)
    except AttributeError:
        # A weight of a partitioned network, in which None stands for the missing arrays.
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(node))


def _kind(name: str, part: PyTree) -> str:
    if isinstance(part, Unrolled):
        blocks = part.blocks
        return f"{type(blocks[0]).__name__}, {len(blocks)} unrolled"
    kind = type(part).__name__
    leaves = jax.tree.leaves(part)
    if is_stacked(name) and leaves:
        return f"{kind}, {leaves[0].shape[0]} stacked"
    return kind


def _table(rows: list[_Row]) -> list[str]:
    """Return the lines of a table with aligned columns."""
    cells = []
    for row in rows:
        cells.append((row.name, row.kind, f"{row.parameters:,}", _size(row.nbytes), row.dtypes))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for name, kind, parameters, size, dtypes in cells:
        left = f"  {name:<{widths[0]}}  {kind:<{widths[1]}}"
        lines.append(f"{left}  {parameters:>{widths[2]}}  {size:>{widths[3]}}  {dtypes}")
    return lines


def _size(nbytes: int) -> str:
    for unit, name in _UNITS:
        if nbytes >= unit:
            return f"{nbytes / unit:.1f} {name}"
    return f"{nbytes} B"
