"""Weights that stay packed in memory, and are decoded block by block to be multiplied."""

from collections.abc import Sequence
from functools import partial
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PyTree

from fluxjax.nets.grouped import GroupedWeight
from fluxjax.nets.packed_formats import PACKED_FORMATS, PackedFormat, decode_rows
from fluxjax.nets.weight import Dense, FindMaxima, LocalWeight, Weight
from fluxjax.shapes import Array, Float, UInt8

Network = TypeVar("Network", bound=eqx.Module)


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

    def matmul(
        self, x: Float[Array, "*batch features"], maxima: FindMaxima | None = None
    ) -> Float[Array, "*batch out"]:
        # Decoded again for a gradient: kept, the values would be a dense copy of all blocks.
        return jax.checkpoint(_decoded_matmul, static_argnums=2)(self.value, x, self.format)


def decode_weights(
    network: Network,
    dtype: DTypeLike = jnp.bfloat16,
    *,
    donate: bool = False,
) -> Network:
    """Return a network whose packed matrices are decoded, to merge adapters or to save it.

    **Arguments:** `donate`: free each packed matrix once it is decoded, after which `network` can't
    be used.
    """

    def decode(node: PyTree) -> PyTree:
        if isinstance(node, GroupedWeight):
            return _joined(node, [decode(stack) for stack in node.stacks.content], dtype)
        if not isinstance(node, PackedWeight):
            return node
        value = _decoded_stack(node.value, node.format, jnp.dtype(dtype))
        if donate:
            # The values have to be finished before their source is freed.
            jax.block_until_ready(value)
            node.value.delete()
        return Dense(value)

    return jax.tree.map(decode, network, is_leaf=lambda node: isinstance(node, Weight))


def _joined(weight: GroupedWeight, stacks: Sequence[Dense], dtype: DTypeLike) -> Dense:
    """Return the plain stacks of a weight as one."""
    blocks = []
    for group, place in zip(weight.group.tolist(), weight.place.tolist(), strict=True):
        blocks.append(stacks[group].value[place].astype(dtype))
    return Dense(jnp.stack(blocks))


@partial(jax.jit, static_argnums=(1, 2))
def _decoded_stack(
    value: UInt8[Array, "*depth out row_bytes"],
    format: str,
    dtype: jnp.dtype,
) -> Float[Array, "*depth out features"]:
    """Return the matrices of packed rows, of one block or of a stack of them."""
    if value.ndim == 2:
        return decode_rows(value, format).astype(dtype)
    # Block by block, so that no whole stack is in memory in float32.
    return jax.lax.map(lambda block: decode_rows(block, format).astype(dtype), value)


def _decoded_matmul(
    value: UInt8[Array, "out row_bytes"],
    x: Float[Array, "*batch features"],
    format: str,
) -> Float[Array, "*batch out"]:
    return Dense(decode_rows(value, format).astype(x.dtype)).matmul(x)
