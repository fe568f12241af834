"""Networks whose blocks are not stacked, so that programs have no loops over them."""

from operator import attrgetter
from typing import Any, TypeVar

import equinox as eqx
import jax

from fluxjax.convert.load import is_stacked
from fluxjax.nets.layers import Apart, depth_of

Network = TypeVar("Network", bound=eqx.Module)


def unroll(network: Network, *, donate: bool = False) -> Network:
    """Return a network with its blocks apart: each is compiled by itself, and its weights are used where they lie.

    A loop over stacked blocks compiles one for all, but on GPUs it copies each block's weights before it uses them.

    **Arguments:** `network`: a `Flux`, `T5` or `Clip`, as it is to be used: adapters, 8 bits and streaming come before; what
    converts, saves or adapts a network takes stacked ones alone. `donate`: give the stacks' memory free, one by one; the
    network can't be used after. Without it there are two copies of the blocks.
    **Raises:** `ValueError` for a network without stacked blocks.
    """
    stacks = {name: child for name, child in vars(network).items() if is_stacked(name) and not isinstance(child, Apart)}
    names = [name for name, blocks in stacks.items() if depth_of(blocks)]
    if not names:
        raise ValueError(f"`unroll(network)` takes stacked blocks apart, and this {type(network).__name__} has none.")
    for name in names:
        network = eqx.tree_at(attrgetter(name), network, _apart(getattr(network, name), donate))
    return network


def _apart(blocks: Any, donate: bool) -> Apart:
    leaves, tree = jax.tree.flatten(blocks)
    rows = []
    for leaf in leaves:
        rows.append([leaf[number] for number in range(depth_of(blocks))] if eqx.is_array(leaf) else [leaf] * depth_of(blocks))
        if donate and eqx.is_array(leaf):
            jax.block_until_ready(rows[-1])
            leaf.delete()
    return Apart(tuple(jax.tree.unflatten(tree, row) for row in zip(*rows, strict=True)))
