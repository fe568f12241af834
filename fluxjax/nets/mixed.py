"""Weights of stacked blocks that are stored in several ways, as one array of bytes."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.nets.grouped import GroupedWeight
from fluxjax.nets.packed import PackedWeight
from fluxjax.nets.packed_formats import PACKED_FORMATS
from fluxjax.nets.weight import Dense, FindMaxima, LocalWeight, Weight
from fluxjax.shapes import Array, Float, Int, UInt8


class MixedWeight(LocalWeight):
    """A stacked weight whose blocks are stored in several ways, their rows padded to one length.

    Unlike a `GroupedWeight` it has one array in which all blocks have the same shape, so that the
    next block can be copied from the host's memory while one runs. The padding is copied as well:
    of blocks in Q4_K beside some in Q6_K, rows of 144 bytes for 256 values become 210 bytes long.

    `value`: the bytes of the rows. `way`: the number of each block's way in `ways`. `ways`: names
    of packed formats or of dtypes. `features`: of a row.
    """

    value: UInt8[Array, "*depth out most_bytes"]
    way: Int[Array, "*depth"]
    ways: tuple[str, ...] = eqx.field(static=True)
    features: int = eqx.field(static=True)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.value.shape[:-1], self.features)

    def matmul(
        self, x: Float[Array, "*batch features"], maxima: FindMaxima | None = None
    ) -> Float[Array, "*batch out"]:
        def multiply(way: str) -> Float[Array, "*batch out"]:
            return _weight_of(self.value, way, self.features).matmul(x, maxima)

        return jax.lax.switch(self.way, [lambda way=way: multiply(way) for way in self.ways])


def mixed_weight(
    weight: GroupedWeight, to_array: Callable[[np.ndarray], Array] = jnp.asarray
) -> MixedWeight:
    """Return the blocks of several stacks as one array of bytes.

    **Arguments:** `weight`: of plain and packed stacks, on a device or in the host's memory.
    `to_array`: makes JAX's arrays of numpy's, so that the large one is only where it is to be.
    """
    stacks = weight.stacks.content
    rows_of_stacks, ways = [], []
    for stack in stacks:
        assert isinstance(stack, Dense | PackedWeight)
        value = np.ascontiguousarray(stack.value)
        ways.append(stack.format if isinstance(stack, PackedWeight) else value.dtype.name)
        rows_of_stacks.append(value.view(np.uint8))
    depth, out, features = weight.shape
    most = max(rows.shape[-1] for rows in rows_of_stacks)
    padded = np.zeros((depth, out, most), np.uint8)
    groups, places = np.asarray(weight.group), np.asarray(weight.place)
    for block, (group, place) in enumerate(zip(groups, places, strict=True)):
        rows = rows_of_stacks[group][place]
        padded[block, :, : rows.shape[-1]] = rows
    return MixedWeight(to_array(padded), to_array(groups), tuple(ways), features)


def _weight_of(value: UInt8[Array, "out most_bytes"], way: str, features: int) -> Weight:
    """Return the weight of a block whose rows of bytes are stored in a way."""
    if way in PACKED_FORMATS:
        packed = PACKED_FORMATS[way]
        return PackedWeight(value[:, : features // packed.values * packed.nbytes], way)
    dtype = jnp.dtype(way)
    numbers = value[:, : features * dtype.itemsize].reshape(len(value), features, dtype.itemsize)
    return Dense(jax.lax.bitcast_convert_type(numbers, dtype))
