"""Weights and kernels of which each device of a mesh has a part, inside of `jax.shard_map`."""

import equinox as eqx
import jax

from fluxjax.nets.conv import Kernel
from fluxjax.nets.packed import PackedWeight
from fluxjax.nets.quantized import QuantizedWeight
from fluxjax.nets.weight import Dense, FetchedWeight, FindMaxima, Weight, WrappedWeight
from fluxjax.numeric import wide_dtype
from fluxjax.shapes import Array, Float


class GatheredWeight(FetchedWeight):
    """A weight that is split over "fsdp", and gathered when it is used.

    `part`: of this device. `axis`: the split axis of the matrix, -2 (out) or -1 (in). `parts`: the
    number of devices that it is split among.
    """

    part: Dense | QuantizedWeight | PackedWeight
    axis: int = eqx.field(static=True)
    parts: int = eqx.field(static=True)

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = list(self.part.shape)
        sizes[self.axis] *= self.parts
        return tuple(sizes)

    @property
    def is_remote(self) -> bool:
        return True

    def fetch(self) -> Weight:
        value = self.part.value
        whole = jax.lax.all_gather(value, "fsdp", axis=value.ndim + self.axis, tiled=True)
        return eqx.tree_at(lambda part: part.value, self.part, whole)


class GatheredKernel(Kernel):
    """A convolution's kernel whose outputs are split over "fsdp", gathered when it is used.

    `part`: of this device.
    """

    part: Float[Array, "side side channels part_of_out"]

    @property
    def side(self) -> int:
        return self.part.shape[0]

    def array(self) -> Float[Array, "side side channels out"]:
        return jax.lax.all_gather(self.part, "fsdp", axis=3, tiled=True)


class SummedWeight(WrappedWeight):
    """A weight whose inputs are split over "tensor": the partial products are all-reduced.

    `base`: the columns of the matrix that belong to this device's features.
    """

    base: Weight

    def matmul(
        self, x: Float[Array, "*batch features"], maxima: FindMaxima | None = None
    ) -> Float[Array, "*batch out"]:
        # Summed before the product is rounded to the dtype of x.
        product = self.base.matmul(x, maxima)
        return jax.lax.psum(product.astype(wide_dtype(x.dtype)), "tensor")


class ConcatenatedWeight(WrappedWeight):
    """A weight whose outputs are split over "tensor", and gathered after the product.

    `base`: the rows of the matrix that are on this device.
    """

    base: Weight

    def matmul(
        self, x: Float[Array, "*batch features"], maxima: FindMaxima | None = None
    ) -> Float[Array, "*batch all_out"]:
        part = self.base.matmul(x, maxima)
        return jax.lax.all_gather(part, "tensor", axis=part.ndim - 1, tiled=True)
