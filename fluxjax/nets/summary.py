"""A network as a short table: its config, and each part's parameters, dtypes and bytes."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import fields
from typing import NamedTuple

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from fluxjax.nets.stack import Unrolled, is_stacked
from fluxjax.nets.weight import Weight

_WIDTH = 100
"""Columns of the text."""
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


class _Part(NamedTuple):
    """A line of the table, about one field of the network."""

    name: str
    kind: str
    parameters: int
    nbytes: int
    dtypes: Sequence[str]


class NetworkSize(NamedTuple):
    """What a network takes: its parameters without adapters, the bytes of its arrays with their
    unit, and their dtypes."""

    parameters: int
    memory: str
    dtypes: str


def network_size(network: eqx.Module) -> NetworkSize:
    """Return what a network of arrays takes over all devices."""
    whole = _part("", network)
    return NetworkSize(whole.parameters, _size(whole.nbytes), ", ".join(whole.dtypes))


def describe_network(network: eqx.Module) -> str:
    """Return a network's class, config and size, and one line for each of its parts.

    A line has the part's class (and how many blocks are stacked or unrolled), the number of its
    parameters without adapters, the bytes of its arrays over all devices, and their dtypes. Weights
    that are left in files take no bytes.

    **Arguments:** `network`: of arrays, sharded or not, or of shapes as from
    `eqx.filter_eval_shape`. One of anything else, such as shardings, is shown leaf by leaf, as
    Equinox does.
    """
    if not all(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(network)):
        return eqx.tree_pformat(network)
    parts = []
    for field in fields(network):
        value = getattr(network, field.name)
        # A layer that this network does not have, such as schnell's guidance, is None.
        if field.name != "config" and value is not None:
            parts.append(_part(field.name, value))
    parameters = sum(part.parameters for part in parts)
    nbytes = sum(part.nbytes for part in parts)
    title = f"{type(network).__name__}: {parameters:,} parameters, {_size(nbytes)}"
    config = textwrap.fill(
        repr(getattr(network, "config", "")),
        _WIDTH,
        initial_indent="  ",
        subsequent_indent="    ",
    )
    return "\n".join([title, config, *_table(parts)])


def _part(name: str, value: PyTree) -> _Part:
    """Return the line of a field."""
    parameters = 0
    for node in jax.tree.leaves(value, is_leaf=lambda node: isinstance(node, Weight)):
        parameters += _parameters(node)
    nbytes = 0
    dtypes = set()
    for leaf in jax.tree.leaves(value):
        # By shape and dtype, which arrays, traced arrays and abstract ones have.
        nbytes += math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        dtypes.add(str(leaf.dtype))
    return _Part(name, _kind(name, value), parameters, nbytes, sorted(dtypes))


def _parameters(node: PyTree) -> int:
    """Return the number of parameters of an array or a weight."""
    try:
        # A weight's shape is the whole matrix's, also where its arrays are quantized or in a file.
        return math.prod(node.shape)
    except AttributeError:
        # A weight of a partitioned network, in which None stands for the missing arrays.
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(node))


def _kind(name: str, value: PyTree) -> str:
    """Return the class of a field, and the number of its blocks."""
    if isinstance(value, Unrolled):
        return f"{type(value.blocks[0]).__name__}, {len(value.blocks)} unrolled"
    kind = type(value).__name__
    leaves = jax.tree.leaves(value)
    if is_stacked(name) and leaves:
        # The leading axis of all arrays is that of the blocks.
        return f"{kind}, {leaves[0].shape[0]} stacked"
    return kind


def _table(parts: Sequence[_Part]) -> list[str]:
    """Return the lines of a table with aligned columns."""
    cells = []
    for part in parts:
        parameters, size = f"{part.parameters:,}", _size(part.nbytes)
        cells.append((part.name, part.kind, parameters, size, ", ".join(part.dtypes)))
    widths = []
    for column in zip(*cells, strict=True):
        widths.append(max(map(len, column)))
    lines = []
    for name, kind, parameters, size, dtypes in cells:
        # Words are aligned at the left, numbers at the right.
        words = f"{name:<{widths[0]}}  {kind:<{widths[1]}}"
        numbers = f"{parameters:>{widths[2]}}  {size:>{widths[3]}}"
        lines.append(f"  {words}  {numbers}  {dtypes}")
    return lines


def _size(nbytes: int) -> str:
    """Return a number of bytes in the largest unit of which it has one."""
    for unit, name in _UNITS:
        if nbytes >= unit:
            return f"{nbytes / unit:.1f} {name}"
    return f"{nbytes} B"
