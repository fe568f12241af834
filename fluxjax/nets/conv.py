"""Convolutions over [rows, columns, channels], and how their kernels are stored."""

import itertools
from abc import abstractmethod
from functools import partial, reduce

import equinox as eqx
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike

from fluxjax.kernels.chips import default_device
from fluxjax.nets.rows import WHOLE, Cells, Pad, Rows
from fluxjax.nets.weight import product_dtype
from fluxjax.numeric import from_bits, to_bits, wide_dtype
from fluxjax.shapes import Array, Float, PRNGKeyArray

Padding = tuple[Pad, Pad]
"""Zeros above and below, then at the left and right."""
KernelArray = Float[Array, "side side channels out"]
OutCells = Float[Array, "new_rows new_columns out"]
"""Cells in another resolution or with another number of channels."""


_WIDE = 64
"""Channels from which a convolution of bfloat16 is computed as products on CPUs."""
_BLOCK_CELLS = 1024
"""Cells of a block of rows, of such a convolution."""


class Kernel(eqx.Module):
    """The kernel of a convolution, [side, side, in, out], however it is stored."""

    @property
    @abstractmethod
    def side(self) -> int:
        """The number of cells along a side."""

    @abstractmethod
    def array(self) -> KernelArray:
        """Return the whole kernel, in this device's memory."""


class DenseKernel(Kernel):
    """A kernel stored as a plain array."""

    value: KernelArray

    @property
    def side(self) -> int:
        return self.value.shape[0]

    def array(self) -> KernelArray:
        return self.value


class Conv(eqx.Module):
    """A convolution with a square kernel over [rows, columns, channels].

    `weight`: the kernel, in any storage. `bias`: one number for each output channel; None for a
    layer without one.
    """

    weight: Kernel
    bias: Float[Array, " out"] | None

    def __init__(
        self,
        channels: int,
        out: int,
        *,
        side: int = 3,
        bias: bool = True,
        key: PRNGKeyArray,
    ):
        """Draw the kernel with variance 1 / (side^2 channels); the bias is zeros."""
        fan_in = side * side * channels
        value = jax.random.normal(key, (side, side, channels, out)) / jnp.sqrt(fan_in)
        self.weight = DenseKernel(value)
        self.bias = jnp.zeros(out) if bias else None

    def __call__(
        self,
        x: Cells,
        rows: Rows = WHOLE,
        *,
        stride: int = 1,
        padding: Padding | None = None,
    ) -> OutCells:
        """Convolve.

        **Arguments:** `rows`: where the image's rows are. `stride`: along both sides. `padding`:
        zeros around the image; None keeps its size, at a stride of 1.
        """
        if padding is None:
            around = self.weight.side // 2
            padding = ((around, around), (around, around))
        return self._apply(x, rows, self.weight.array(), stride, padding)

    def upsample(self, x: Cells, rows: Rows = WHOLE) -> OutCells:
        """Convolve cells that are first repeated twice along each side.

        Of repeated cells a 3x3 kernel reads only 2x2 different ones. Summing the kernel's values
        for the same cell first takes 16 products instead of 36. The sums differ for even and odd
        rows and columns of the result, which are computed separately.

        **Returns:** [2 rows, 2 columns, out].
        """
        kernel = self.weight.array()
        # The sums of values are rounded once, to the dtype of x.
        kernel = kernel.astype(wide_dtype(kernel.dtype))
        parts = []
        for odd_row in (0, 1):
            for odd_column in (0, 1):
                folded = _folded(_folded(kernel, 0, odd_row), 1, odd_column)
                # The kernel of even rows begins a cell earlier, that of odd rows ends a cell later.
                padding = ((1 - odd_row, odd_row), (1 - odd_column, odd_column))
                parts.append(self._apply(x, rows, folded, 1, padding))
        return _interleave(parts)

    def _apply(
        self,
        x: Cells,
        rows: Rows,
        kernel: Array,
        stride: int,
        padding: Padding,
    ) -> OutCells:
        """Convolve with a kernel and add the bias."""
        vertical, horizontal = padding
        x, vertical = rows.pad(x, vertical)
        # XLA's convolutions take a batch.
        y = _convolve(x[None], kernel.astype(x.dtype), self.bias, stride, (vertical, horizontal))
        return y[0]


def _folded(
    kernel: Array,
    axis: int,
    odd: int,
) -> Array:
    """Return a kernel of 3 values along an axis as one of 2, for cells that are repeated twice.

    Of the three, the last two of an even cell and the first two of an odd one read the same cell.
    """
    first, middle, last = (jax.lax.index_in_dim(kernel, i, axis) for i in range(3))
    if odd:
        return jnp.concatenate([first + middle, last], axis)
    return jnp.concatenate([first, middle + last], axis)


@jax.custom_jvp
def _interleave(parts: list[Array]) -> Array:
    """Return [2 rows, 2 columns, channels] from its four parts [rows, columns, channels].

    **Arguments:** `parts`: of even rows, then of odd ones; of each the even columns come first.
    """
    first = parts[0]
    if not _is_bfloat16_on_cpu(first):
        return _interleave_plainly(parts)
    return from_bits(_interleave_plainly([to_bits(part) for part in parts]), first.dtype)


@_interleave.defjvp
def _interleave_jvp(
    primals: tuple[list[Array]], tangents: tuple[list[Array]]
) -> tuple[Array, Array]:
    """Differentiate without integers, which have no derivatives."""
    (parts,), (changes,) = primals, tangents
    return _interleave(parts), _interleave_plainly(changes)


def _interleave_plainly(parts: list[Array]) -> Array:
    order = "(odd_row odd_column) y x c -> (y odd_row) (x odd_column) c"
    return rearrange(jnp.stack(parts), order, odd_row=2)


@partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _convolve(
    x: Array,
    kernel: Array,
    bias: Array | None,
    stride: int,
    padding: Padding,
) -> Array:
    """Convolve [1, rows, columns, channels] and add the bias.

    **Returns:** the result in the dtype of x, to which the sum is rounded from `product_dtype`.
    """
    if _as_products(x, kernel, stride):
        return _convolve_by_products(x[0], kernel, bias, padding)[None]
    y = _convolve_to(product_dtype(x), x, kernel, stride, padding)
    return _add_bias(y, bias).astype(x.dtype)


@_convolve.defjvp
def _convolve_jvp(
    stride: int,
    padding: Padding,
    primals: tuple[Array, Array, Array | None],
    tangents: tuple[Array, Array, Array | None],
) -> tuple[Array, Array]:
    """Differentiate in the dtype of the operands.

    JAX does not transpose a convolution whose result has another dtype than its operands.
    """
    x, kernel, bias = primals
    dx, dkernel, dbias = tangents
    # Restoration transposes this part in loops.
    by_cells = _sum_products if default_device().platform == "cpu" else _convolve_to
    by_x = by_cells(x.dtype, dx, kernel, stride, padding)
    by_kernel = _convolve_to(x.dtype, x, dkernel, stride, padding)
    tangent = _add_bias((by_x + by_kernel).astype(product_dtype(x)), dbias)
    return _convolve(x, kernel, bias, stride, padding), tangent.astype(x.dtype)


def _add_bias(y: Array, bias: Array | None) -> Array:
    return y if bias is None else y + bias.astype(y.dtype)


def _convolve_to(
    dtype: DTypeLike,
    x: Array,
    kernel: Array,
    stride: int,
    padding: Padding,
) -> Array:
    """Convolve, with a result of `dtype`."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=dtype,
    )


def _sum_products(
    dtype: DTypeLike,
    x: Array,
    kernel: Array,
    stride: int,
    padding: Padding,
) -> Array:
    """Convolve by a matrix product for each cell of the kernel, with a result of `dtype`.

    XLA:CPU has fast convolutions for kernels of our layout only. The transpose of a convolution has
    another, and XLA rearranges it everywhere but in loops, where it is ten times as slow. These
    products are almost as fast as a fast convolution, and so are their transposes.
    """
    wide = wide_dtype(x.dtype)
    (above, below), (left, right) = padding
    x = jnp.pad(x.astype(wide), ((0, 0), (above, below), (left, right), (0, 0)))
    side, width, _, _ = kernel.shape
    # How far the kernel's first cell moves, plus one.
    rows = (x.shape[1] - side) // stride * stride + 1
    columns = (x.shape[2] - width) // stride * stride + 1
    products = []
    for row, column in itertools.product(range(side), range(width)):
        cells = x[:, row : row + rows : stride, column : column + columns : stride]
        products.append(cells @ kernel[row, column].astype(wide))
    return reduce(jnp.add, products).astype(dtype)


def _as_products(x: Array, kernel: Array, stride: int) -> bool:
    """Return whether a convolution is computed as matrix products.

    XLA:CPU computes a convolution of bfloat16 in float32, but a matrix product of bfloat16 with the
    processor's instructions for it. With few channels the products are too small to gain.
    """
    return min(kernel.shape[2:]) >= _WIDE and stride == 1 and _is_bfloat16_on_cpu(x)


def _is_bfloat16_on_cpu(x: Array) -> bool:
    return x.dtype == jnp.bfloat16 and default_device().platform == "cpu"


def _convolve_by_products(
    x: Cells,
    kernel: KernelArray,
    bias: Array | None,
    padding: Padding,
) -> OutCells:
    """Convolve with a stride of 1, as one matrix product for each cell of the kernel.

    A block of rows is computed at a time, so that the sums of its products stay in the cache. For
    gradients, which would be summed over blocks in bfloat16, it is not used.
    """
    side, _, channels, out = kernel.shape
    rows, columns = (
        size + sum(around) - side + 1 for size, around in zip(x.shape, padding, strict=False)
    )
    block = min(rows, max(1, _BLOCK_CELLS // columns))
    blocks = -(-rows // block)  # rounded up
    (above, below), horizontal = padding
    missing = blocks * block - rows
    padded = jnp.pad(to_bits(x), ((above, below + missing), horizontal, (0, 0)))
    kernels = [[kernel[row, column] for column in range(side)] for row in range(side)]

    def convolve_block(number: Array) -> Array:
        read = jax.lax.dynamic_slice_in_dim(padded, number * block, block + side - 1)
        total = jnp.zeros((block * columns, out), product_dtype(x))
        for row in range(side):
            for column in range(side):
                cells = read[row : row + block, column : column + columns]
                total += jax.lax.dot_general(
                    from_bits(cells.reshape(-1, channels), x.dtype),
                    kernels[row][column],
                    (((1,), (0,)), ((), ())),
                    preferred_element_type=total.dtype,
                )
        return to_bits(_add_bias(total, bias).astype(x.dtype))

    found = jax.lax.map(convolve_block, jnp.arange(blocks))
    return from_bits(found.reshape(-1, columns, out)[:rows], x.dtype)
