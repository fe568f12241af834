"""Tensors of a file to the leaves of a network and back, one tensor at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from fluxjax.convert.files import Tensor, WeightsError
from fluxjax.convert.tables import Dialect, Row

Network = TypeVar("Network", bound=eqx.Module)
Parts = Mapping[str, slice]
"""The rows that each part of a fused weight takes."""

_STACKED = ("double", "single", "blocks")
_ALIGNMENT = 64  # what XLA:CPU asks of a buffer to take it over without a copy


@dataclass(frozen=True)
class _Slot:
    """A tensor's place: a leaf, and the block of it if the leaf is stacked."""

    leaf: int
    block: int | None
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Piece:
    """A file's tensor and where it goes."""

    key: str
    tensor: Tensor
    row: Row
    slot: _Slot
    part: slice | None


def leaf_names(network: eqx.Module) -> list[str]:
    """Return the names of a network's array leaves, in the order of its leaves: fields and indices joined by dots."""
    paths = jax.tree_util.tree_flatten_with_path(network)[0]
    return [".".join(_field(entry) for entry in path).removesuffix(".value") for path, _ in paths]


def _field(entry: Any) -> str:
    return str(entry.name if isinstance(entry, jax.tree_util.GetAttrKey) else entry.idx)


def _slots(network: eqx.Module) -> dict[str, _Slot]:
    slots: dict[str, _Slot] = {}
    for index, (name, leaf) in enumerate(zip(leaf_names(network), jax.tree.leaves(network), strict=True)):
        field, _, rest = name.partition(".")
        if field in _STACKED:
            slots |= {f"{field}.{block}.{rest}": _Slot(index, block, leaf.shape[1:]) for block in range(leaf.shape[0])}
        else:
            slots[name] = _Slot(index, None, leaf.shape)
    return slots


def load(
    network: Network,
    tensors: Mapping[str, Tensor],
    dialect: Dialect,
    *,
    parts: Parts | None = None,
    dtype: DTypeLike | None = None,
    sharding: Any = None,
) -> Network:
    """Fill a network with the tensors of a checkpoint.

    **Arguments:** `network`: of `jax.ShapeDtypeStruct` leaves (`eqx.filter_eval_shape`). `tensors`: from `read_headers`.
    `dialect`: how they are named. `parts`: the rows of the parts of fused weights. `dtype`: of the weights; None keeps the
    file's, the widest of those stacked together. `sharding`: of every leaf, or a pytree of shardings, one a leaf.
    **Returns:** the network with arrays on the default device, or as `sharding` says.
    **Raises:** `WeightsError` that lists all that is missing, unexpected or misshapen; nothing is read then.
    """
    plan = _plan(network, tensors, dialect, parts or {})
    leaves, structure = jax.tree.flatten(network)
    if sharding is None or isinstance(sharding, jax.sharding.Sharding):
        shardings = [sharding] * len(leaves)
    else:
        shardings = jax.tree.leaves(sharding)
        if len(shardings) != len(leaves):
            raise ValueError(f"`load(sharding)` needs one sharding a leaf, {len(leaves)}, got {len(shardings)}.")
    filled = []
    for index, leaf in enumerate(leaves):
        buffer = _fill(leaf.shape, plan[index], dtype)
        filled.append(jax.block_until_ready(jax.device_put(buffer, shardings[index], may_alias=True)))
    return jax.tree.unflatten(structure, filled)


def _plan(network: eqx.Module, tensors: Mapping[str, Tensor], dialect: Dialect, parts: Parts) -> list[list[_Piece]]:
    """Return the pieces of each leaf, having checked that all fits."""
    slots = _slots(network)
    plan: list[list[_Piece]] = [[] for _ in jax.tree.leaves(network)]
    wanted = {(name, part) for name in slots for part in _parts_of(name, dialect)}
    problems: dict[str, list[str]] = {"missing": [], "unexpected": [], "misshapen": [], "repeated": []}
    for key, tensor in tensors.items():
        found = dialect.find(key)
        if found is None or found[0] not in slots:
            if dialect.strip(key) not in dialect.unneeded:
                problems["unexpected"].append(key)
            continue
        name, row = found
        if (name, row.part) not in wanted:
            problems["repeated"].append(key)
        wanted.discard((name, row.part))
        piece = _Piece(key, tensor, row, slots[name], None if row.part is None else parts[row.part])
        expected = _their_shape(piece)
        if tensor.shape != expected:
            problems["misshapen"].append(f"{key} is {list(tensor.shape)}, not {list(expected)}")
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            problems["misshapen"].append(f"{key} is {tensor.dtype}, not a float")
        plan[piece.slot.leaf].append(piece)
    problems["missing"] = sorted(_their_key(name, part, dialect) for name, part in wanted)
    if any(problems.values()):
        raise WeightsError(_report(network, dialect, problems))
    return plan


def _parts_of(name: str, dialect: Dialect) -> list[str | None]:
    return [row.part for _, row in dialect.keys(name)] or [None]


def _their_key(name: str, part: str | None, dialect: Dialect) -> str:
    return next((key for key, row in dialect.keys(name) if row.part == part), name)


def _their_shape(piece: _Piece) -> tuple[int, ...]:
    """Return the shape that the file's tensor should have."""
    shape = piece.slot.shape
    if piece.part is not None:
        shape = (piece.part.stop - piece.part.start, *shape[1:])
    if len(shape) == 4:
        return (shape[3], shape[2], shape[0], shape[1])
    if piece.row.layout == "1x1" and len(shape) == 2:
        return (*shape, 1, 1)
    return shape


def _to_ours(tensor: np.ndarray, row: Row) -> np.ndarray:
    if tensor.ndim == 4 and row.layout != "1x1":
        return tensor.transpose(2, 3, 1, 0)
    if tensor.ndim == 4:
        return tensor[:, :, 0, 0]
    return np.roll(tensor, len(tensor) // 2, axis=0) if row.layout == "swap" else tensor


def _to_theirs(tensor: np.ndarray, row: Row) -> np.ndarray:
    if tensor.ndim == 4:
        return tensor.transpose(3, 2, 0, 1)
    if row.layout == "1x1" and tensor.ndim == 2:
        return tensor[:, :, None, None]
    return np.roll(tensor, len(tensor) // 2, axis=0) if row.layout == "swap" else tensor


def _report(network: eqx.Module, dialect: Dialect, problems: Mapping[str, list[str]]) -> str:
    kind = type(network).__name__
    lines = [f"The file does not fit this {kind} (read as {dialect.name} names):"]
    for problem, found in problems.items():
        if found:
            more = f" … and {len(found) - 20} more" if len(found) > 20 else ""
            lines.append(f"  {len(found)} {problem}: {', '.join(found[:20])}{more}")
    lines.append("Pass the file of this network, or the config it was made with.")
    return "\n".join(lines)


def _fill(shape: Sequence[int], pieces: Sequence[_Piece], dtype: DTypeLike | None) -> np.ndarray:
    """Read a leaf's pieces into one buffer that the CPU backend can take over as it is."""
    with jax.numpy_dtype_promotion("standard"):
        widest = reduce(jnp.promote_types, (piece.tensor.dtype for piece in pieces))
    target = np.dtype(widest if dtype is None else dtype)
    buffer = _aligned(shape, target)
    for piece in pieces:
        place = buffer if piece.slot.block is None else buffer[piece.slot.block]
        place = place if piece.part is None else place[piece.part]
        if piece.tensor.dtype == target and place.shape == piece.tensor.shape and piece.row.layout is None:
            piece.tensor.read_into(place)
        else:
            place[...] = _to_ours(piece.tensor.read(), piece.row)
    return buffer


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    nbytes = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def export(network: eqx.Module, dialect: Dialect, *, parts: Parts | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Yield a network's weights as a dialect names and lays them out, one tensor at a time.

    **Raises:** `WeightsError` for a leaf that the dialect has no name for.
    """
    leaves = jax.tree.leaves(network)
    for name, slot in _slots(network).items():
        keys = dialect.keys(name)
        if not keys:
            raise WeightsError(f"The {dialect.name} names have none for {name} of {type(network).__name__}.")
        leaf = leaves[slot.leaf]
        ours = np.asarray(leaf if slot.block is None else leaf[slot.block])
        for key, row in keys:
            piece = ours if row.part is None else ours[(parts or {})[row.part]]
            yield key, np.ascontiguousarray(_to_theirs(piece, row))


def choose(tensors: Mapping[str, Tensor], dialects: Sequence[Dialect], kind: str, file: Any) -> Dialect:
    """Return the dialect whose mark the tensors hold. **Raises:** `WeightsError` if none does."""
    for dialect in dialects:
        if dialect.mark in tensors or dialect.prefix + dialect.mark in tensors:
            return dialect
    some = ", ".join(list(tensors)[:3]) or "no tensors at all"
    raise WeightsError(f"{file} holds no {kind}: found {some}. Pass the {kind}'s own file or folder.")


def abstract(make: Callable[..., Network], config: Any) -> Network:
    """Return a network of shapes alone, no array made."""
    return eqx.filter_eval_shape(make, config, key=jax.random.key(0))
