"""The networks that adapters are for, and the storage of their weights that merging needs."""

from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.kinds import KINDS
from fluxjax.nets.grouped import GroupedWeight
from fluxjax.nets.packed import PackedWeight
from fluxjax.nets.weight import Dense, Weight
from fluxjax.shapes import Array

Network = TypeVar("Network", bound=eqx.Module)
Leaf = Array | jax.ShapeDtypeStruct
"""An array, or the shape of one."""
LOOKUP_TABLES = ("tokens.weight", "positions.weight", "position_bias.weight")
"""Matrices whose rows are looked up, so they are never multiplied by activations."""

TRANSFORMER = "flux"
"""The name under which adapters change a transformer, also Chroma's."""
_ADAPTED = (TRANSFORMER, "controlnet", "clip", "t5")
"""The networks that adapters can be attached to; formats of files have names for some of them."""


def network_kind(call: str, model: eqx.Module) -> str:
    """Return which network this is for adapters: "flux" for any transformer, or another role.

    **Arguments:**

    - `call`: the name of the public function, for the error message.
    - `model`: any network, or the shapes of one.

    **Raises:** `ValueError` for anything else.
    """
    for kind in KINDS.values():
        if kind.role in _ADAPTED and isinstance(model, kind.network):
            return kind.role
    raise ValueError(
        f"`{call}` needs a Flux, Chroma, ControlNet, Clip or T5, got {type(model).__name__}. "
        "Pass one network at a time."
    )


def is_weight(node: object) -> bool:
    """Return whether a node of a network is a linear layer's matrix, in whatever storage."""
    return isinstance(node, Weight)


def dense_shapes(model: Network) -> Network:
    """Return the shapes of a network as if all of its weights were dense.

    The slots of dense weights have the names that adapters use, in whatever way weights are
    stored.
    """

    def shape(node: Weight | Leaf) -> Dense | jax.ShapeDtypeStruct:
        plain = jax.ShapeDtypeStruct(node.shape, jnp.float32)
        if not isinstance(node, Weight):
            return plain
        # The field is replaced afterwards, because its type allows arrays only.
        return eqx.tree_at(lambda dense: dense.value, Dense(jnp.zeros((0, 0))), plain)

    return jax.tree.map(shape, model, is_leaf=is_weight)


def check_plain(
    model: eqx.Module,
    problem: str,
    remedy: str = "Pass the plain network.",
) -> None:
    """Check that no weight of a network is quantized, adapted or fetched from elsewhere.

    **Arguments:**

    - `model`: the network.
    - `problem`: the beginning of the error message.
    - `remedy`: its end.

    **Raises:** `WeightsError` if one is.
    """
    for node in jax.tree.leaves(model, is_leaf=is_weight):
        if isinstance(node, PackedWeight | GroupedWeight):
            remedy += " `fluxjax.nets.decode_weights` decodes packed ones; or attach the adapters."
        if isinstance(node, Weight) and not isinstance(node, Dense):
            kind = type(node).__name__
            raise WeightsError(f"{problem} weights that are stored as {kind}. {remedy}")


def is_plain(model: eqx.Module) -> bool:
    """Return whether no weight of a network is packed, quantized, adapted or somewhere else."""
    for node in jax.tree.leaves(model, is_leaf=is_weight):
        if isinstance(node, Weight) and not isinstance(node, Dense):
            return False
    return True
