"""Tensors of files matched to the leaves of a network, all checked together."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from math import prod
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.finite import all_finite
from fluxjax.checkpoint.names import Dialect, Row
from fluxjax.checkpoint.tensors import StoredTensor, Tensor
from fluxjax.nets.stack import block_name, is_stacked, leaf_names
from fluxjax.printable import printable, printable_path, quote_name

Network = TypeVar("Network", bound=eqx.Module)
Parts = Mapping[str, slice]
"""The rows that each part of a fused weight takes."""
Bounds = Sequence[tuple[int, int]]
"""First and past-the-last index along each axis."""
LOADED_DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
STORED_FLOATS = {np.dtype(name) for name in (*LOADED_DTYPES, "float64")}
_ALIGNMENT = 64  # what XLA:CPU asks of a buffer to take it over without a copy


@dataclass(frozen=True)
class Slot:
    """A leaf of a network, or one block of a leaf that is stacked."""

    leaf: int
    block: int | None
    shape: tuple[int, ...]


def slots_of_leaf(leaf: str, shape: Sequence[int]) -> list[str]:
    """Return the names of a leaf's slots: itself, or its blocks where it is stacked."""
    return [block_name(leaf, block) for block in range(shape[0])] if is_stacked(leaf) else [leaf]


def slots_of(network: eqx.Module) -> dict[str, Slot]:
    """Return every slot of a network by name, blocks of a leaf in a row."""
    slots: dict[str, Slot] = {}
    for index, (name, leaf) in enumerate(
        zip(leaf_names(network), jax.tree.leaves(network), strict=True)
    ):
        if is_stacked(name):
            slots |= {
                block_name(name, block): Slot(index, block, leaf.shape[1:])
                for block in range(leaf.shape[0])
            }
        else:
            slots[name] = Slot(index, None, leaf.shape)
    return slots


class Weights(ABC):
    """A network's weights, wherever they lie: read a slot at a time."""

    network: eqx.Module
    """Its structure, with leaves that have a shape."""

    @abstractmethod
    def dtype(self, slot: str) -> np.dtype:
        """Return what a slot's values are, unless cast."""

    @abstractmethod
    def read(self, slot: str, rows: slice, dtype: np.dtype) -> np.ndarray:
        """Return rows of a slot, in memory of their own or not, cast to a dtype."""


@dataclass(frozen=True)
class InMemoryWeights(Weights):
    """Weights in memory."""

    network: eqx.Module

    @cached_property
    def _leaves(self) -> dict[str, tuple[Any, int | None]]:
        leaves = jax.tree.leaves(self.network)
        return {
            name: (leaves[slot.leaf], slot.block) for name, slot in slots_of(self.network).items()
        }

    def dtype(self, slot: str) -> np.dtype:
        return np.dtype(self._leaves[slot][0].dtype)

    def read(self, slot: str, rows: slice, dtype: np.dtype) -> np.ndarray:
        leaf, block = self._leaves[slot]
        return cast(np.asarray(leaf if block is None else leaf[block])[rows], dtype, slot)


@dataclass(frozen=True)
class Piece:
    """A tensor that fills the rows `start` to `stop` of a slot, with its own rows from `skip` on. `key`: its name."""

    tensor: Tensor
    layout: str | None
    start: int
    stop: int
    skip: int = 0
    key: str = ""

    def take(self, bounds: Bounds) -> np.ndarray:
        """Return a region of the slot that lies within these rows."""
        (first, last), rest = bounds[0], bounds[1:]
        shift = self.skip - self.start
        values = _to_ours(self.tensor.view(), self.layout)
        return values[(slice(first + shift, last + shift), *(slice(*bound) for bound in rest))]

    def copy_into(self, out: np.ndarray, bounds: Bounds, name: str) -> None:
        """Write a region of the slot that lies within these rows; whole rows of one dtype come straight from the file."""
        (first, last), rest = bounds[0], bounds[1:]
        plain = (
            isinstance(self.tensor, StoredTensor)
            and self.layout in (None, "ours", "swap")
            and self.tensor.dtype == out.dtype
        )
        straight = self.layout == "ours" or len(self.tensor.shape) < 4
        if (
            plain
            and straight
            and tuple(stop - start for start, stop in rest) == self.tensor.shape[1:]
        ):
            shift = self.skip - self.start
            self.tensor.rows(first + shift, last + shift).read_into(out)  # type: ignore[attr-defined]
        else:
            cast_into(out, self.take(bounds), name)


@dataclass(frozen=True)
class Plan(Weights):
    """Weights in files: the pieces of every slot."""

    network: eqx.Module
    pieces: Mapping[str, Sequence[Piece]]
    slots: Mapping[str, Slot] = field(repr=False)

    def dtype(self, slot: str) -> np.dtype:
        return widest(piece.tensor.dtype for piece in self.pieces[slot])

    def read(self, slot: str, rows: slice, dtype: np.dtype) -> np.ndarray:
        shape = self.slots[slot].shape
        first, last, _ = rows.indices(shape[0])
        out = np.empty((last - first, *shape[1:]), dtype)
        self.fill(slot, out, [(first, last), *((0, n) for n in shape[1:])])
        self._check(out, [slot])
        return out

    def fill(self, slot: str, out: np.ndarray, bounds: Bounds) -> None:
        """Write a region of a slot into a contiguous array."""
        low, high = bounds[0]
        for piece in self.pieces[slot]:
            first, last = max(low, piece.start), min(high, piece.stop)
            if first < last:
                piece.copy_into(out[first - low : last - low], [(first, last), *bounds[1:]], slot)

    def leaf(
        self, name: str, shape: tuple[int, ...], dtype: np.dtype, index: tuple[slice, ...]
    ) -> np.ndarray:
        """As `region`, checked. **Raises:** `WeightsError` that names a tensor with NaN or infinity."""
        found = self.region(name, shape, dtype, index)
        slots = slots_of_leaf(name, shape)
        self._check(found, slots[index[0]] if is_stacked(name) else slots)
        return found

    def _check(self, values: np.ndarray, slots: Sequence[str]) -> None:
        if all_finite(values):
            return
        pieces = [piece for slot in slots for piece in self.pieces[slot]]
        bad = next((piece for piece in pieces if not all_finite(piece.tensor.view())), pieces[0])
        raise WeightsError(
            f"{printable_path(bad.tensor.file)}: {quote_name(bad.key)} holds NaN or infinity, with which every image is black. The file is "
            "damaged, or its training diverged. Download it anew, or use another one."
        )

    def region(
        self, name: str, shape: tuple[int, ...], dtype: np.dtype, index: tuple[slice, ...]
    ) -> np.ndarray:
        """Return a region of a leaf, mapped if it lies in one file just so, else read into memory that XLA:CPU takes over."""
        bounds = [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)]
        mapped = self._mapped(name, shape, dtype)
        if mapped is not None:
            return mapped[index]
        out = _aligned([stop - start for start, stop in bounds], dtype)
        if not is_stacked(name):
            self.fill(name, out, bounds)
        else:
            for block in range(*bounds[0]):
                self.fill(block_name(name, block), out[block - bounds[0][0]], bounds[1:])
        return out

    def _mapped(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray | None:
        """Return a leaf that lies in one file as it would in memory."""
        slots = slots_of_leaf(name, shape)
        pieces = [piece for slot in slots for piece in self.pieces[slot]]
        first = pieces[0].tensor if pieces else None
        if len(pieces) != len(slots) or not isinstance(first, StoredTensor) or first.dtype != dtype:
            return None
        offset = first.offset
        for piece in pieces:
            tensor = piece.tensor
            as_it_is = piece.layout == "ours" or (piece.layout is None and len(tensor.shape) < 4)
            if (
                not as_it_is
                or not isinstance(tensor, StoredTensor)
                or (tensor.file, tensor.offset) != (first.file, offset)
            ):
                return None
            offset += tensor.nbytes
        return StoredTensor(first.file, dtype, shape, first.offset).view()


Problems = Mapping[str, Sequence[str]]
"""Keys that are missing, unexpected, misshapen or repeated, with what is wrong with them."""


def match(
    network: eqx.Module, tensors: Mapping[str, Tensor], dialect: Dialect, parts: Parts
) -> tuple[Plan, Problems]:
    """Return where each tensor goes, and all that does not fit; nothing is read.

    **Arguments:** `network`: of `jax.ShapeDtypeStruct` leaves. `dialect`: how the tensors are named. `parts`: the rows of the
    parts of fused weights.
    """
    names_and_leaves = zip(leaf_names(network), jax.tree.leaves(network), strict=True)
    depth = max((leaf.shape[0] for name, leaf in names_and_leaves if is_stacked(name)), default=0)
    if depth > max(len(tensors), 1000):  # a damaged config: don't enumerate it
        raise WeightsError(
            f"The config asks for {depth} blocks, of {len(tensors)} tensors. Pass the file's own config."
        )
    slots = slots_of(network)
    pieces: dict[str, list[Piece]] = {name: [] for name in slots}
    wanted = {(name, part) for name in slots for part in _parts_of(name, dialect)}
    problems: dict[str, list[str]] = {
        "missing": [],
        "unexpected": [],
        "misshapen": [],
        "repeated": [],
    }
    for key, tensor in tensors.items():
        found = dialect.find(key)
        if found is None or found[0] not in slots:
            if not dialect.ignores(key):
                problems["unexpected"].append(printable(key))
            continue
        name, row = found
        if (name, row.part) not in wanted:
            problems["repeated"].append(printable(key))
        wanted.discard((name, row.part))
        rows = slice(0, slots[name].shape[0]) if row.part is None else parts[row.part]
        expected = their_shape((rows.stop - rows.start, *slots[name].shape[1:]), row)
        if tensor.shape != expected:
            problems["misshapen"].append(
                printable(f"{key} is {list(tensor.shape)}, not {list(expected)}")
            )
        if tensor.dtype not in STORED_FLOATS:
            problems["misshapen"].append(f"{printable(key)} is {tensor.dtype}, not a float")
        pieces[name] += _pieces(tensor, row, rows, key)
    problems["missing"] = sorted(_their_key(name, part, dialect) for name, part in wanted)
    return Plan(network, pieces, slots), problems


def _pieces(tensor: Tensor, row: Row, rows: slice, key: str) -> list[Piece]:
    if row.layout != "swap":
        return [Piece(tensor, row.layout, rows.start, rows.stop, key=key)]
    half = (rows.start + rows.stop) // 2
    return [
        Piece(tensor, "swap", rows.start, half, half, key),
        Piece(tensor, "swap", half, rows.stop, 0, key),
    ]


def plan(
    network: eqx.Module, tensors: Mapping[str, Tensor], dialect: Dialect, parts: Parts
) -> Plan:
    """As `match`. **Raises:** `WeightsError` that lists all that does not fit."""
    found, problems = match(network, tensors, dialect, parts)
    if any(problems.values()):
        raise WeightsError(_report(network, dialect, problems))
    return found


def widest(dtypes: Iterable[np.dtype]) -> np.dtype:
    """Return the one dtype, or what holds them all; 8-bit floats beside others count as bfloat16."""
    different = set(dtypes)
    if len(different) == 1:
        return different.pop()
    with jax.numpy_dtype_promotion("standard"):
        return np.dtype(
            reduce(
                jnp.promote_types,
                (jnp.bfloat16 if dtype.itemsize == 1 else dtype for dtype in different),
            )
        )


def _parts_of(name: str, dialect: Dialect) -> list[str | None]:
    return [row.part for _, row in dialect.keys(name)] or [None]


def _their_key(name: str, part: str | None, dialect: Dialect) -> str:
    return next((key for key, row in dialect.keys(name) if row.part == part), name)


def their_shape(shape: tuple[int, ...], row: Row) -> tuple[int, ...]:
    """Return the shape that a tensor of ours has in a file."""
    if row.layout == "ours":
        return shape
    if len(shape) == 4:
        return (shape[3], shape[2], shape[0], shape[1])
    return (*shape, 1, 1) if row.layout == "1x1" and len(shape) == 2 else shape


def _to_ours(values: np.ndarray, layout: str | None) -> np.ndarray:
    if values.ndim == 4 and layout == "1x1":
        return values[:, :, 0, 0]
    return values.transpose(2, 3, 1, 0) if values.ndim == 4 and layout != "ours" else values


def to_theirs(values: np.ndarray, row: Row) -> np.ndarray:
    """Return a tensor of ours as a file has it."""
    if row.layout == "ours":
        return values
    if values.ndim == 4:
        return values.transpose(3, 2, 0, 1)
    if row.layout == "1x1" and values.ndim == 2:
        return values[:, :, None, None]
    return np.roll(values, len(values) // 2, axis=0) if row.layout == "swap" else values


def cast(values: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Return values in a dtype. **Raises:** `WeightsError` if one does not fit in it."""
    if values.dtype == dtype:
        return values
    out = np.empty(values.shape, dtype)
    cast_into(out, values, name)
    return out


def cast_into(out: np.ndarray, values: np.ndarray, name: str) -> None:
    """Write values into an array of another dtype, without a copy between. **Raises:** `WeightsError` if one does not fit."""
    with np.errstate(over="ignore", invalid="ignore"):
        out[...] = values
    most = float(jnp.finfo(out.dtype).max)
    if (
        most < float(jnp.finfo(values.dtype).max)
        and not np.isfinite(out).all()
        and np.isfinite(values).all()
    ):
        largest = float(np.abs(values.astype(np.float32)).max())
        raise WeightsError(
            f"{name} holds {largest:.4g}, which {out.dtype} can't (at most {most:g}). Use bfloat16."
        )


def _report(network: eqx.Module, dialect: Dialect, problems: Problems) -> str:
    kind = type(network).__name__
    lines = [f"The file does not fit this {kind} (read as {dialect.name} names):"]
    for problem, found in problems.items():
        if found:
            more = f" … and {len(found) - 20} more" if len(found) > 20 else ""
            lines.append(f"  {len(found)} {problem}: {', '.join(found[:20])}{more}")
    lines.append("Pass the file of this network, or the config it was made with.")
    return "\n".join(lines)


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    nbytes = prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def abstract(make: Callable[..., Network], config: Any) -> Network:
    """Return a network of shapes alone, no array made. **Raises:** `WeightsError` for a config that makes none."""
    try:
        return eqx.filter_eval_shape(make, config, key=jax.random.key(0))
    except Exception as error:  # a config from a damaged file can fail anywhere
        network, reason = getattr(make, "__name__", "network"), printable(str(error))
        raise WeightsError(
            f"{printable(str(config), 1000)} makes no {network}: {reason}"
        ) from error
