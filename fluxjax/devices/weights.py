"""Weights that are not at hand whole: split over a mesh, in the host's memory, or in a file."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import equinox as eqx
import jax
import numpy as np

from fluxjax.checkpoint.plan import Plan
from fluxjax.nets.quantized import QuantizedWeight
from fluxjax.nets.vae import Conv
from fluxjax.nets.weight import Dense, Weight
from fluxjax.numeric import wide_dtype
from fluxjax.shapes import Array, Float, Int


class GatheredWeight(Weight):
    """A weight of which each device holds a part, put together as it is used. `axis`: of the matrix, -2 (out) or -1 (in)."""

    part: Dense | QuantizedWeight
    axis: int = eqx.field(static=True)

    @property
    def shape(self) -> tuple[int, ...]:
        whole = list(self.part.shape)
        whole[self.axis] *= jax.lax.axis_size("fsdp")
        return tuple(whole)

    def matmul(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch out"]:
        return self.fetch().matmul(x)

    @property
    def is_remote(self) -> bool:
        return True

    def fetch(self) -> Weight:
        value = self.part.value
        whole = jax.lax.all_gather(value, "fsdp", axis=value.ndim + self.axis, tiled=True)
        return eqx.tree_at(lambda part: part.value, self.part, whole)


class GatheredConv(Conv):
    """A convolution of which each device holds the kernels of some outputs, put together as it is used."""

    def __init__(self, part: Conv):
        self.weight, self.bias = part.weight, part.bias

    def kernel(self) -> Float[Array, "side side channels all"]:
        return jax.lax.all_gather(self.weight, "fsdp", axis=3, tiled=True)


class SummedWeight(Weight):
    """A weight of which each device holds the columns of its features; the products are summed."""

    base: Weight

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def matmul(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch out"]:
        return jax.lax.psum(self.base.matmul(x).astype(wide_dtype(x.dtype)), "tensor")

    @property
    def is_remote(self) -> bool:
        return self.base.is_remote

    def fetch(self) -> Weight:
        return SummedWeight(self.base.fetch())


class ConcatenatedWeight(Weight):
    """A weight of which each device holds some rows; what comes out is joined."""

    base: Weight

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def matmul(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch out"]:
        part = self.base.matmul(x)
        return jax.lax.all_gather(part, "tensor", axis=part.ndim - 1, tiled=True)

    @property
    def is_remote(self) -> bool:
        return self.base.is_remote

    def fetch(self) -> Weight:
        return ConcatenatedWeight(self.base.fetch())


class HostWeight(Weight):
    """A weight in the host's memory, copied to the device as it is used; blocks' are fetched while the block before runs."""

    value: Float[Array, "*depth out features"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def matmul(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch out"]:
        return self.fetch().matmul(x)

    @property
    def is_remote(self) -> bool:
        return True

    def fetch(self) -> Weight:
        return Dense(jax.device_put(self.value, jax.memory.Space.Device))


class _Reader:
    """Reads the blocks of a stacked leaf, each next one in the background while the one before is used."""

    # One for all leaves: the blocks' matrices are read in the order in which they are used.
    pool = ThreadPoolExecutor(1, "fluxjax-reader")

    def __init__(self, plan: Plan, name: str, shape: tuple[int, ...], dtype: np.dtype):
        self.plan, self.name, self.shape, self.dtype = plan, name, shape, dtype
        self.ahead: tuple[int, Future] | None = None

    def read(self, number: int) -> np.ndarray:
        # Copied, so that a mapped file is read here and not where it is waited for.
        whole = tuple(slice(0, size) for size in self.shape[1:])
        return np.array(
            self.plan.region(
                self.name, self.shape, self.dtype, (slice(number, number + 1), *whole)
            )[0]
        )

    def __call__(self, number: Any) -> np.ndarray:
        wanted = int(number)
        ahead, self.ahead = self.ahead, None
        found = ahead[1].result() if ahead is not None and ahead[0] == wanted else self.read(wanted)
        after = (wanted + 1) % self.shape[0]
        self.ahead = (after, self.pool.submit(self.read, after))
        return found


class FileWeight(Weight):
    """A weight that stays in its file, from which a block's is read by a callback as it is used. `number`: of the block."""

    number: Int[Array, "*depth"]
    reader: _Reader = eqx.field(static=True)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.number.shape, *self.reader.shape[1:])

    def matmul(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch out"]:
        return self.fetch().matmul(x)

    def fetch(self) -> Weight:
        found = jax.ShapeDtypeStruct(self.reader.shape[1:], self.reader.dtype)
        return Dense(jax.pure_callback(self.reader, found, self.number))
