"""Where each array of a network lies on a mesh."""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fluxjax.nets.clip import Clip

Network = TypeVar("Network", bound=eqx.Module)


# How the layers of blocks are split over the axis "tensor": by the features that come out (heads, hidden features), by those
# that go in, whose products are then summed, or by those that come out and are joined at once.
_TENSOR: Mapping[str, str] = {
    **dict.fromkeys(("qkv", "linear1", "up", "gate", "q", "k", "v"), "out"),
    **dict.fromkeys(("out", "down", "linear2"), "in"),
    "modulation": "joined",
}
_BLOCKS = ("double", "single", "blocks")


class _Leaf(NamedTuple):
    """A leaf of a network: the layer it belongs to and what it is of it; whether it is one of stacked blocks."""

    layer: str
    role: str
    stacked: bool


def _leaf(path: Any) -> _Leaf:
    names = [str(entry.name if hasattr(entry, "name") else entry.idx) for entry in path]
    stacked = names[0] in _BLOCKS
    if "weight" in names[:-1]:
        return _Leaf(names[names.index("weight") - 1], names[-1], stacked)
    return _Leaf(names[-2] if len(names) > 1 else "", names[-1], stacked)


def specs(network: Network, mesh: Mesh) -> Network:
    """Return where each array of a network lies on a mesh, as a pytree of `PartitionSpec`.

    Matrices and convolutions are split over "fsdp", matrices of blocks (but CLIP's) over "tensor" too, and biases as what they
    are added to; the rest is on every device, as is a matrix whose size the axis does not divide.
    """

    def place(path: Any, leaf: Any) -> PartitionSpec:
        layer, role, stacked = _leaf(path)
        how = _TENSOR.get(layer) if stacked and parts > 1 else None
        dims: list[str | None] = [None] * leaf.ndim
        if leaf.ndim == 4 and mesh.shape["fsdp"] > 1 and leaf.shape[-1] % mesh.shape["fsdp"] == 0:
            dims[-1] = "fsdp"  # a convolution's outputs
        if role == "value":
            if how is not None:
                dims[-1 if how == "in" else -2] = "tensor"
            free = -1 if dims[-2] else -2
            if mesh.shape["fsdp"] > 1 and leaf.shape[free] % mesh.shape["fsdp"] == 0:
                dims[free] = "fsdp"
        elif (role in ("bias", "scale") and how == "out") or (role, how) in (
            ("down", "in"),
            ("scale", "joined"),
        ):
            dims[-1] = "tensor"
        elif role == "up" and how in ("out", "joined"):
            dims[-2] = "tensor"
        elif layer == "position_bias" and parts > 1:
            dims[-1] = "tensor"
        return PartitionSpec(*dims)

    parts = _tensor_parts(network, mesh)
    return jax.tree_util.tree_map_with_path(
        place, eqx.filter(network, lambda leaf: hasattr(leaf, "shape"))
    )


def shardings(network: Network, mesh: Mesh) -> Network:
    """Return `specs` as shardings: with `load_flux(sharding=lambda network: shardings(network, mesh))` and its siblings, a
    process reads its devices' slices alone."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(network, mesh))


def _tensor_parts(network: eqx.Module, mesh: Mesh) -> int:
    """Return how many parts "tensor" makes of a network's heads and hidden features."""
    if isinstance(network, Clip):
        return 1  # a hundredth of the transformer, and its 12 heads are not divided by 8
    config, parts = getattr(network, "config", None), mesh.shape["tensor"]
    for name in ("heads", "mlp_width"):
        if (size := getattr(config, name, None)) is not None and size % parts:
            raise ValueError(
                f"tensor={parts} does not divide the {size} {name} of {type(network).__name__}. Choose one that does."
            )
    return parts
