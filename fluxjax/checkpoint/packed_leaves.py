"""The matrices of a plan that stay packed as their files have them, and reading their bytes."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.tree_util import KeyPath
from jaxtyping import PyTree

from fluxjax.checkpoint.plan import Index, Plan, aligned_array, not_finite_error
from fluxjax.checkpoint.tensors import BYTES
from fluxjax.checkpoint.weights import parameter_names, widest
from fluxjax.nets.grouped import GroupedWeight
from fluxjax.nets.packed import PackedWeight
from fluxjax.nets.packed_formats import PACKED_FORMATS
from fluxjax.nets.stack import is_rounded, path_name
from fluxjax.nets.weight import Dense, Weight

Stored = str | np.dtype
"""How a matrix is stored: the name of a packed format, or a dtype."""


@dataclass(frozen=True)
class MatrixStack:
    """Matrices of several blocks that are stored in one way, as one array.

    `names`: of their parameters. `stored`: a packed format, or the dtype to read them in. `shape`:
    of the array; of a packed format, in bytes.
    """

    names: Sequence[str]
    stored: Stored
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the array."""
        return BYTES if isinstance(self.stored, str) else self.stored

    def read(self, plan: Plan, index: Index) -> np.ndarray:
        """Return a region of the array.

        **Raises:** `WeightsError` that names a tensor with NaN or infinity.
        """
        blocks, rows, columns = index
        chosen = self.names[blocks]
        first, last, _ = rows.indices(self.shape[1])
        out = aligned_array((len(chosen), last - first, self.shape[2]), self.dtype)
        for name, matrix in zip(chosen, out, strict=True):
            if isinstance(self.stored, str):
                read_packed(plan, name, self.stored, first, matrix)
            else:
                matrix[...] = plan.read(name, slice(first, last), self.stored)
        return out[:, :, columns]


def block_storages(plan: Plan, name: str, shape: tuple[int, ...]) -> list[Stored]:
    """Return how each block of a stacked matrix is stored.

    **Arguments:** `name`, `shape`: of the leaf. Matrices that do not stay packed get one dtype.
    """
    formats: list[str | None] = []
    plain_dtypes = []
    for parameter in parameter_names(name, shape):
        format = _packed_format(plan, parameter)
        formats.append(format)
        if format is None:
            plain_dtypes.append(plan.dtype(parameter))
    stored: list[Stored] = []
    for format in formats:
        stored.append(widest(plain_dtypes) if format is None else format)
    return stored


def _packed_format(plan: Plan, name: str) -> str | None:
    """Return the format in which a parameter can stay packed; None if it is decoded.

    The parts of a fused one have to be in one format.
    """
    formats = set()
    for source in plan.sources[name]:
        # A row of the tensor has to be a row of the parameter.
        rows_are_whole = source.layout in (None, "own", "swap")
        formats.add(source.tensor.packed_format if rows_are_whole else None)
    if len(formats) > 1:
        return None
    return formats.pop()


def read_packed(plan: Plan, name: str, format: str, first: int, out: np.ndarray) -> None:
    """Read rows of a packed parameter, from row `first` on, into an array of bytes.

    **Arguments:** `format`: in which all tensors of the parameter are. `out`: [rows, bytes of a
    row].
    **Raises:** `WeightsError` that names a tensor whose scales are not finite.
    """
    last = first + len(out)
    for source in plan.sources[name]:
        # The rows that the array and this source have in common.
        start = max(first, source.start)
        stop = min(last, source.stop)
        if start >= stop:
            continue
        rows = out[start - first : stop - first]
        shift = source.skip - source.start
        source.tensor.read_packed_rows(start + shift, rows)
        if not _has_finite_scales(rows, format):
            raise not_finite_error(source)


def _has_finite_scales(rows: np.ndarray, format: str) -> bool:
    """Return whether the values of packed rows are finite: codes are, whatever their bits are."""
    packed = PACKED_FORMATS[format]
    size = np.dtype(packed.scale_dtype).itemsize
    blocks = rows.reshape(-1, packed.nbytes)
    for offset in packed.scales:
        scale_bytes = np.ascontiguousarray(blocks[:, offset : offset + size])
        scales = scale_bytes.view(packed.scale_dtype).astype(np.float32)
        if not np.isfinite(scales).all():
            return False
    return True


def with_packed_matrices(plan: Plan) -> tuple[PyTree, dict[str, MatrixStack]]:
    """Return a plan's network with the weights that stay packed, and how to read these.

    **Returns:** the network, of shapes; and by the names of its arrays what they hold.
    """
    stacks: dict[str, MatrixStack] = {}

    def pack(path: KeyPath, node: object) -> object:
        name = path_name(path)
        if not isinstance(node, Dense) or not is_rounded(name):
            return node
        stored = block_storages(plan, name, node.shape)
        if not any(isinstance(way, str) for way in stored):
            return node
        groups = _stacks_of(parameter_names(name, node.shape), stored, node.shape[1:])
        weights = [_abstract_weight(stack) for stack in groups]
        if len(groups) == 1:
            stacks[name] = groups[0]
            return weights[0]
        for number, stack in enumerate(groups):
            stacks[f"{name}.stacks.content.{number}"] = stack
        ways = [stack.stored for stack in groups]
        return GroupedWeight.of_stacks([ways.index(way) for way in stored], weights)

    network = jax.tree_util.tree_map_with_path(
        pack, plan.network, is_leaf=lambda node: isinstance(node, Weight)
    )
    return network, stacks


def _stacks_of(
    names: Sequence[str], stored: Sequence[Stored], shape: tuple[int, ...]
) -> list[MatrixStack]:
    """Return a stack for each way in which some matrices are stored.

    **Arguments:** `names`, `stored`: of the matrices, in order. `shape`: of each.
    """
    names_by_way: dict[Stored, list[str]] = {}
    for name, way in zip(names, stored, strict=True):
        names_by_way.setdefault(way, []).append(name)
    stacks = []
    for way, mine in names_by_way.items():
        stacks.append(MatrixStack(mine, way, stored_shape(way, (len(mine), *shape))))
    return stacks


def stored_shape(stored: Stored, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the array that holds matrices of a shape.

    **Returns:** the same shape for a dtype; for a packed format, with the bytes of rows.
    """
    if not isinstance(stored, str):
        return shape
    packed = PACKED_FORMATS[stored]
    *leading, columns = shape
    row_bytes = columns // packed.values * packed.nbytes
    return (*leading, row_bytes)


def _abstract_weight(stack: MatrixStack) -> Weight:
    """Return a weight whose array is a shape."""
    empty = np.zeros((0, 0), stack.dtype)
    if isinstance(stack.stored, str):
        weight: Weight = PackedWeight(jax.numpy.asarray(empty), stack.stored)
    else:
        weight = Dense(jax.numpy.asarray(empty))
    # Put into the place of an array, whose type the field has.
    shape = jax.ShapeDtypeStruct(stack.shape, stack.dtype)
    return jax.tree.unflatten(jax.tree.structure(weight), [shape])
