"""Weights whose blocks are stored in several formats, together in one array of bytes."""

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
    """A stacked weight whose blocks are stored in several formats, in one array of bytes.

    A `GroupedWeight` has one array for each format. Here the rows of all blocks are padded to the
    same number of bytes, so that the next block can be copied from the host's memory while one
    runs. The copy includes the padding. For example, 256 numbers take 144 bytes in Q4_K and 210
    bytes in Q6_K. In a file with blocks of both formats, 210 bytes are copied for each of them.

    `value`: the bytes of the rows. `way`: for each block, the place of its format in `ways`.
    `ways`: the formats, each the name of a packed format or of a dtype. `features`: the number of
    columns of the matrix.
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
    """Return a `GroupedWeight` with all of its blocks in one array of bytes.

    **Arguments:** `weight`: its stacks are plain or packed, on a device or in the host's memory.
    `to_array`: makes an array of JAX from one of numpy. It decides in which memory the bytes are.
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
    """Return the weight of one block.

    **Arguments:** `value`: the bytes of its rows, with padding. `way`: the name of their format.
    `features`: the number of columns of the matrix.
    """
    if way in PACKED_FORMATS:
        packed = PACKED_FORMATS[way]
        return PackedWeight(value[:, : features // packed.values * packed.nbytes], way)
    dtype = jnp.dtype(way)
    numbers = value[:, : features * dtype.itemsize].reshape(len(value), features, dtype.itemsize)
    return Dense(jax.lax.bitcast_convert_type(numbers, dtype))
