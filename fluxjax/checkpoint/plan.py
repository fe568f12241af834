"""Weights in files: which rows of which tensors fill each parameter, and reading them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np

from fluxjax.checkpoint.dialect import Layout
from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.finite import all_finite
from fluxjax.checkpoint.kinds import Network
from fluxjax.checkpoint.tensor_layout import from_file
from fluxjax.checkpoint.tensors import StoredTensor, Tensor
from fluxjax.checkpoint.weights import Parameter, Weights, cast_into, parameter_names, widest
from fluxjax.nets.stack import block_name, is_stacked
from fluxjax.printable import printable_path, quote_name

Bounds = Sequence[tuple[int, int]]
"""A region of an array: along each axis, the first index and the one past the last."""
Index = tuple[slice, ...]
"""A region of a leaf: one slice per axis, as JAX passes them for the shard of a device."""
Shape = tuple[int, ...]
_ALIGNMENT = 64  # bytes; XLA:CPU takes a buffer over without a copy only if it is aligned so


@dataclass(frozen=True)
class TensorRows:
    """Rows of a tensor in a file that fill the rows `start` to `stop` of a parameter.

    `skip`: the first of the tensor's rows that is used. `key`: the tensor's name, for messages.
    """

    tensor: Tensor
    layout: Layout | None
    start: int
    stop: int
    skip: int = 0
    key: str = ""

    def values(self, bounds: Bounds) -> np.ndarray:
        """Return a region of the parameter that lies within these rows."""
        values = from_file(self.tensor.view(), self.layout)
        first, last = self._rows_in_tensor(bounds)
        index = [slice(first, last)]
        for start, stop in bounds[1:]:
            index.append(slice(start, stop))
        return values[tuple(index)]

    def _rows_in_tensor(self, bounds: Bounds) -> tuple[int, int]:
        """Return the rows of the tensor that fill a region of the parameter."""
        first, last = bounds[0]
        shift = self.skip - self.start
        return first + shift, last + shift

    def copy_into(self, out: np.ndarray, bounds: Bounds, name: str) -> None:
        """Write a region of the parameter that lies within these rows into an array.

        Whole rows of the array's dtype are read from the file without a copy in between.
        """
        tensor = self.tensor
        if (
            isinstance(tensor, StoredTensor)
            and tensor.dtype == out.dtype
            and _sizes(bounds)[1:] == tensor.shape[1:]
            and self._has_the_order_of_memory()
        ):
            first, last = self._rows_in_tensor(bounds)
            tensor.rows(first, last).read_into(out)
        else:
            cast_into(out, self.values(bounds), name)

    def _has_the_order_of_memory(self) -> bool:
        """Return whether each row's bytes are in the same order in the file as in memory."""
        if self.layout == "own":
            return True
        return self.layout in (None, "swap") and len(self.tensor.shape) < 4

    def is_as_in_memory(self) -> bool:
        """Return whether the whole tensor's bytes are in the same order as in memory."""
        return self.layout != "swap" and self._has_the_order_of_memory()


@dataclass(frozen=True)
class Plan(Weights):
    """The weights of a network that lie in files.

    `sources`: what fills each parameter, by the parameter's name. `parameters`: their shapes and
    their places in the network.
    """

    network: Network
    sources: Mapping[str, Sequence[TensorRows]]
    parameters: Mapping[str, Parameter] = field(repr=False)

    def dtype(self, name: str) -> np.dtype:
        """Return the widest dtype of the tensors that fill a parameter."""
        return widest(source.tensor.dtype for source in self.sources[name])

    def read(self, name: str, rows: slice, dtype: np.dtype) -> np.ndarray:
        """Return rows of a parameter from its files.

        **Raises:** `WeightsError` for NaN, infinity, or a value that does not fit in the dtype.
        """
        shape = self.parameters[name].shape
        first, last, _ = rows.indices(shape[0])
        bounds = [(first, last)]
        for size in shape[1:]:
            bounds.append((0, size))
        out = np.empty(_sizes(bounds), dtype)
        self.fill(name, out, bounds)
        self._check_finite(out, [name])
        return out

    def fill(self, name: str, out: np.ndarray, bounds: Bounds) -> None:
        """Write a region of a parameter into a contiguous array.

        **Arguments:** `out`: of the region's shape, in the dtype to read. `bounds`: the region.
        **Raises:** `WeightsError` if a value does not fit in the dtype.
        """
        low, high = bounds[0]
        for source in self.sources[name]:
            # The rows that the region and this source have in common.
            first = max(low, source.start)
            last = min(high, source.stop)
            if first < last:
                target = out[first - low : last - low]
                source.copy_into(target, [(first, last), *bounds[1:]], name)

    def leaf(self, name: str, shape: Shape, dtype: np.dtype, index: Index) -> np.ndarray:
        """Return a region of a leaf, as `region` does, having checked its values.

        **Arguments:** `name`, `shape`: of the leaf, with the axis of blocks where it is stacked.
        `dtype`: to read it in. `index`: the region.
        **Raises:** `WeightsError` that names a tensor with NaN or infinity.
        """
        values = self.region(name, shape, dtype, index)
        names = parameter_names(name, shape)
        if is_stacked(name):
            names = names[index[0]]
        self._check_finite(values, names)
        return values

    def _check_finite(self, values: np.ndarray, names: Sequence[str]) -> None:
        """**Raises:** `WeightsError` for values of these parameters that are not finite."""
        if all_finite(values):
            return
        # The region may hold rows of several tensors; look for the one to name.
        sources = self._sources_of(names)
        damaged = sources[0]
        for source in sources:
            if not all_finite(source.tensor.view()):
                damaged = source
                break
        raise not_finite_error(damaged)

    def _sources_of(self, names: Sequence[str]) -> list[TensorRows]:
        sources: list[TensorRows] = []
        for name in names:
            sources += self.sources[name]
        return sources

    def region(self, name: str, shape: Shape, dtype: np.dtype, index: Index) -> np.ndarray:
        """Return a region of a leaf in a dtype, without checking its values.

        A leaf whose bytes lie in one file as they would in memory is mapped. Any other is read
        into memory that XLA:CPU can take over without a copy.

        **Arguments:** as for `leaf`.
        """
        mapped = self._mapped(name, shape, dtype)
        if mapped is not None:
            return mapped[index]
        bounds = []
        for axis_slice, size in zip(index, shape, strict=True):
            start, stop, _ = axis_slice.indices(size)
            bounds.append((start, stop))
        out = aligned_array(_sizes(bounds), dtype)
        if not is_stacked(name):
            self.fill(name, out, bounds)
            return out
        first = bounds[0][0]
        for block in range(*bounds[0]):
            self.fill(block_name(name, block), out[block - first], bounds[1:])
        return out

    def _mapped(self, name: str, shape: Shape, dtype: np.dtype) -> np.ndarray | None:
        """Return a leaf that lies in one file as it would in memory, else None."""
        names = parameter_names(name, shape)
        sources = self._sources_of(names)
        # With several tensors for one parameter, as of q, k and v, some lie apart.
        if not sources or len(sources) != len(names):
            return None
        first = sources[0].tensor
        if not isinstance(first, StoredTensor) or first.dtype != dtype:
            return None
        offset = first.offset
        for source in sources:
            tensor = source.tensor
            follows = isinstance(tensor, StoredTensor) and tensor.offset == offset
            if not follows or tensor.file != first.file or not source.is_as_in_memory():
                return None
            offset += tensor.nbytes
        return StoredTensor(first.file, dtype, shape, first.offset).view()


def _sizes(bounds: Bounds) -> Shape:
    """Return the shape of a region."""
    return tuple(stop - start for start, stop in bounds)


def not_finite_error(source: TensorRows) -> WeightsError:
    """Return the error for a tensor that holds NaN or infinity."""
    return WeightsError(
        f"{printable_path(source.tensor.file)}: {quote_name(source.key)} holds NaN or "
        "infinity, with which every image is black. The file is damaged, or its training "
        "diverged. Download it again, or use another one."
    )


def aligned_array(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """Return an uninitialized array whose memory begins where XLA:CPU can take it over."""
    nbytes = prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)
