"""Weights that stay packed in memory, and are decoded block by block to be multiplied."""

import equinox as eqx
import jax
from jax.typing import DTypeLike

from fluxjax.nets.packed_formats import PACKED_FORMATS, PackedFormat, decode_rows
from fluxjax.nets.weight import Dense, LocalWeight
from fluxjax.shapes import Array, Float, UInt8


class PackedWeight(LocalWeight):
    """A weight of a few bits for each value: rows of blocks, as a GGUF file has them.

    To be multiplied it is decoded to the dtype of the activations. A loop over stacked blocks does
    so for one block of the network at a time, so that there is never a second copy of them all.

    `value`: the bytes of the rows. `format`: a name in `PACKED_FORMATS`.
    """

    value: UInt8[Array, "*depth out row_bytes"]
    format: str = eqx.field(static=True)

    @property
    def layout(self) -> PackedFormat:
        """How the bytes of a block hold its values."""
        return PACKED_FORMATS[self.format]

    @property
    def shape(self) -> tuple[int, ...]:
        *rows, row_bytes = self.value.shape
        return (*rows, row_bytes // self.layout.nbytes * self.layout.values)

    def decoded(self, dtype: DTypeLike) -> Float[Array, "*depth out features"]:
        """Return the values in a dtype."""
        return decode_rows(self.value, self.format).astype(dtype)

    def matmul(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch out"]:
        # Decoded again for a gradient: kept, the values would be a dense copy of all blocks.
        return jax.checkpoint(_decoded_matmul, static_argnums=2)(self.value, x, self.format)


def _decoded_matmul(
    value: UInt8[Array, "out row_bytes"],
    x: Float[Array, "*batch features"],
    format: str,
) -> Float[Array, "*batch out"]:
    return Dense(decode_rows(value, format).astype(x.dtype)).matmul(x)
