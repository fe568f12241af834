"""How the matrix of a linear layer is stored: one abstract type, `Weight`, and its plain form."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.kernels.chips import default_device
from fluxjax.numeric import wide_dtype
from fluxjax.shapes import Array, Float

RowMaxima = Float[Array, "*batch"]
"""The largest magnitude of each row of what is multiplied."""
FindMaxima = Callable[[], RowMaxima]
"""Finds them; called by weights that round the rows, so that others have no program for it."""
_MANY_ROWS = 128
"""Rows from which a GPU writes a product of bfloat16 in bfloat16."""


class Weight(eqx.Module):
    """The matrix of a linear layer, [out, in], however it is stored.

    The weights of stacked blocks have the blocks along a leading axis, and are multiplied one block
    at a time. A new storage subclasses `LocalWeight`, `FetchedWeight` or `WrappedWeight`.
    """

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix, [out, in], or of the stack, [depth, out, in]."""

    @property
    @abstractmethod
    def is_remote(self) -> bool:
        """Whether a loop over blocks should `fetch` the next block's weight while a block runs."""

    @abstractmethod
    def fetch(self) -> "Weight":
        """Return the weight with all of its numbers in this device's memory."""

    @abstractmethod
    def matmul(
        self, x: Float[Array, "*batch features"], maxima: FindMaxima | None = None
    ) -> Float[Array, "*batch out"]:
        """Return x W^T.

        **Arguments:** `maxima`: finds the largest magnitude of each row of `x`, where there is a
        better way than to read `x`.
        **Returns:** the product, accumulated in float32 (float64 for float64), in the dtype of
        `product_dtype`.
        """


class LocalWeight(Weight):
    """A weight whose numbers are in this device's memory."""

    @property
    def is_remote(self) -> bool:
        return False

    def fetch(self) -> Weight:
        return self


class FetchedWeight(Weight):
    """A weight whose numbers are somewhere else, and are fetched to be multiplied."""

    def matmul(
        self, x: Float[Array, "*batch features"], maxima: FindMaxima | None = None
    ) -> Float[Array, "*batch out"]:
        return self.fetch().matmul(x, maxima)


class WrappedWeight(Weight):
    """A weight that is another one, `base`, but for what is done to the product."""

    base: eqx.AbstractVar[Weight]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def is_remote(self) -> bool:
        return self.base.is_remote

    def fetch(self) -> Weight:
        return replace(self, base=self.base.fetch())


class Dense(LocalWeight):
    """A weight stored as a plain array."""

    value: Float[Array, "*depth out features"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def matmul(
        self, x: Float[Array, "*batch features"], maxima: FindMaxima | None = None
    ) -> Float[Array, "*batch out"]:
        product = multiply_rows(x, self.value.astype(x.dtype), product_dtype(x))
        return without_epilogue(product)


class AdaptedWeight(WrappedWeight):
    """A weight with a low-rank matrix, up @ down, added to it and stored beside it.

    **Source:** Hu et al. 2021, LoRA, eq. 3.
    """

    base: Weight
    down: Float[Array, "*depth rank features"]
    up: Float[Array, "*depth out rank"]

    def matmul(
        self, x: Float[Array, "*batch features"], maxima: FindMaxima | None = None
    ) -> Float[Array, "*batch out"]:
        # Two thin products: up @ down would be as large as the base.
        product = self.base.matmul(x, maxima)
        reduced = Dense(self.down).matmul(x).astype(x.dtype)
        return product + Dense(self.up).matmul(reduced)


class RowScaledWeight(WrappedWeight):
    """A weight whose rows are multiplied by numbers, which are stored beside it.

    **Source:** Liu et al. 2024, DoRA, eq. 5, where they are the ratios of magnitudes.
    """

    base: Weight
    scale: Float[Array, "*depth out"]

    def matmul(
        self, x: Float[Array, "*batch features"], maxima: FindMaxima | None = None
    ) -> Float[Array, "*batch out"]:
        product = self.base.matmul(x, maxima)
        return product * self.scale.astype(product.dtype)


def multiply_rows(x: Array, matrix: Array, dtype: jnp.dtype) -> Array:
    """Return x matrix^T, accumulated in `dtype`.

    **Arguments:** `x`: [*batch, features]. `matrix`: [out, features], in the dtype of `x`. Both are
    floats or both are integers.
    **Returns:** [*batch, out].
    """
    is_single_row = x.size == x.shape[-1]
    if is_single_row and x.dtype.itemsize <= 2 and default_device().platform == "cpu":
        # XLA:CPU computes products with a single row of narrow numbers without vector instructions.
        # With a second row, here of zeros, they took a tenth of the time.
        rows = jnp.pad(x.reshape(1, -1), ((0, 1), (0, 0)))
        return multiply_rows(rows, matrix, dtype)[0].reshape(*x.shape[:-1], -1)
    # The matrix is [out, in]: both last axes are contracted, and nothing is transposed.
    contract_last = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, matrix, contract_last, preferred_element_type=dtype)


def product_dtype(x: Float[Array, "*batch features"]) -> jnp.dtype:
    """Return the dtype in which the product of these rows and a weight is written to memory.

    It is float32 (float64 for float64), except for many rows of bfloat16 on a GPU, whose product is
    written in bfloat16. A GPU's matmul writes what it returns, and XLA does not fuse into it the
    rounding that follows: in float32 the first product of a single block of dev at 1024x1024 would
    take 396 MB instead of 198. A bias is added before the rounding where XLA makes one call of
    both, as cuBLAS and cuDNN allow.
    """
    many_rows = x.ndim > 1 and x.size // x.shape[-1] >= _MANY_ROWS
    if x.dtype == jnp.bfloat16 and many_rows and default_device().platform == "gpu":
        return x.dtype
    return wide_dtype(x.dtype)


def without_epilogue(product: Float[Array, "*batch out"]) -> Float[Array, "*batch out"]:
    """Return a product; on GPUs a large one of bfloat16 is computed apart from what follows it.

    XLA copies a block's weights out of their stack for a product whose bias is part of the same
    call of cuBLAS. Where it leaves all products to cuBLAS
    (`XLA_FLAGS=--xla_gpu_enable_triton_gemm=false`, which the command line sets), one without its
    bias reads them in place.
    """
    large = product.ndim > 1 and product.size // product.shape[-1] >= _MANY_ROWS
    if product.dtype == jnp.bfloat16 and large and default_device().platform == "gpu":
        return jax.lax.optimization_barrier(product)
    return product


def materialize(x: Array) -> Array:
    """Return x; on TPUs it is written to memory once, in its own dtype, for all that read it.

    Otherwise XLA drops a rounding that a reader undoes, and writes float32 beside bfloat16.
    """
    if default_device().platform == "tpu":
        # On others the barrier would only keep XLA from fusing.
        return jax.lax.optimization_barrier(x)
    return x
