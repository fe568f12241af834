"""The storage seam of a linear layer's matrix: one abstract type, `Weight`, whatever its storage."""

from abc import abstractmethod

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.kernels.chips import default_device
from fluxjax.numeric import wide_dtype
from fluxjax.shapes import Array, Float


class Weight(eqx.Module):
    """The matrix of a linear layer, [out, in], whatever its storage; stacked with its blocks' in front."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix, or of the stack."""

    @abstractmethod
    def matmul(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch out"]:
        """Return x W^T, accumulated in float32, or float64 for that, in the dtype that `written` says."""

    @property
    def is_remote(self) -> bool:
        """Whether its product needs what lies on other devices."""
        return False

    def fetch(self) -> "Weight":
        """Return the weight with all that its product needs at hand: itself, unless it is `spread`."""
        return self


_MANY_ROWS = 128


class Dense(Weight):
    """A weight stored as itself."""

    value: Float[Array, "*depth out features"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def matmul(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch out"]:
        contract_last = (((x.ndim - 1,), (1,)), ((), ()))
        return jax.lax.dot_general(
            x, self.value.astype(x.dtype), contract_last, preferred_element_type=product_dtype(x)
        )


def product_dtype(x: Float[Array, "*batch features"]) -> jnp.dtype:
    """Return the dtype that a product of these rows writes: float32, or float64 for float64; on GPUs, of many rows of bfloat16,
    theirs.

    A GPU's matmul writes to memory what it returns, and does not take in the rounding of all its readers: in float32 that
    is 396 MB for 198 of a single block's first one in dev at 1024x1024. A convolution would take its operands so, too. A bias
    is added before the rounding where XLA puts both into one call, as cuBLAS's and cuDNN's.
    """
    many = x.dtype == jnp.bfloat16 and x.ndim > 1 and x.size // x.shape[-1] >= _MANY_ROWS
    return x.dtype if many and default_device().platform == "gpu" else wide_dtype(x.dtype)


def materialize(x: Array) -> Array:
    """Return x, on TPUs as an array of its own for all its readers: of an int8 product's XLA wrote float32 beside bfloat16, for
    those that go on in it."""
    return jax.lax.optimization_barrier(x) if default_device().platform == "tpu" else x


class AdaptedWeight(Weight):
    """A weight with a low-rank matrix added, up @ down, both kept apart from it. Source: Hu et al. 2021, LoRA, eq. 3."""

    base: Weight
    down: Float[Array, "*depth rank features"]
    up: Float[Array, "*depth out rank"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def matmul(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch out"]:
        return self.base.matmul(x) + Dense(self.up).matmul(
            Dense(self.down).matmul(x).astype(x.dtype)
        )

    @property
    def is_remote(self) -> bool:
        return self.base.is_remote

    def fetch(self) -> Weight:
        return AdaptedWeight(self.base.fetch(), self.down, self.up)
