"""Weights of stacked blocks that are not all stored in the same way."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from fluxjax.nets.stack import BlockStack, SharedArrays, block_at
from fluxjax.nets.weight import FindMaxima, LocalWeight, Weight
from fluxjax.shapes import Array, Float, Int


class GroupedWeight(BlockStack, LocalWeight):
    """A stacked weight whose blocks are in several stacks, one for each way of storing them.

    In files of few bits some blocks have more bits than others. One stack for all would need the
    bytes of the largest, and rounding to one format would change the values. So each block chooses
    its stack as it runs, and reads its own bytes there.

    `group`: the number of each block's stack. `place`: of the block in it. `stacks`: of weights.
    """

    group: Int[Array, "*depth"]
    place: Int[Array, "*depth"]
    stacks: SharedArrays

    @classmethod
    def of_stacks(cls, groups: Sequence[int], stacks: Sequence[Weight]) -> "GroupedWeight":
        """Return the weight of blocks that lie in their stacks in the order of the network.

        **Arguments:** `groups`: the number of each block's stack.
        """
        counts = [0] * len(stacks)
        places = []
        for group in groups:
            places.append(counts[group])
            counts[group] += 1
        group_numbers = jnp.asarray(groups, jnp.int32)
        return cls(group_numbers, jnp.asarray(places, jnp.int32), SharedArrays(tuple(stacks)))

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.group.shape, *self.stacks.content[0].shape[1:])

    def block(self, number: int) -> Weight:
        """Return the weight of one block. `number`: of the block, not traced."""
        stack = self.stacks.content[int(self.group[number])]
        return block_at(stack, int(self.place[number]))

    def matmul(
        self, x: Float[Array, "*batch features"], maxima: FindMaxima | None = None
    ) -> Float[Array, "*batch out"]:
        def multiply(stack: Weight) -> Float[Array, "*batch out"]:
            return block_at(stack, self.place).matmul(x, maxima)

        branches = [lambda stack=stack: multiply(stack) for stack in self.stacks.content]
        return jax.lax.switch(self.group, branches)
