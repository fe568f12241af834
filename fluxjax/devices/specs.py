"""How each array of a network is split over a mesh."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, TypeVar

import equinox as eqx
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import GetAttrKey, KeyPath
from jaxtyping import PyTree

from fluxjax.nets.clip import Clip
from fluxjax.nets.clip_vision import ClipVision
from fluxjax.nets.flux_config import BlockConfig, fused_features
from fluxjax.nets.ip_adapter import IpAdapter
from fluxjax.nets.packed import PackedWeight
from fluxjax.nets.siglip import Siglip
from fluxjax.nets.stack import is_stacked, path_name

Network = TypeVar("Network", bound=eqx.Module)
TensorSplit = Literal["out", "in", "out_gathered"]
"""How a layer is split over the axis "tensor".

- "out": by its outputs (heads, hidden features); Megatron-LM's column-parallel layer.
- "in": by its inputs; the products are all-reduced. Megatron-LM's row-parallel layer.
- "out_gathered": by its outputs, which are gathered at once, since all devices need them all.
"""
TENSOR_SPLITS: Mapping[str, TensorSplit] = {
    "qkv": "out",
    "linear1": "out",
    "up": "out",
    "gate": "out",
    "q": "out",
    "k": "out",
    "v": "out",
    "out": "in",
    "down": "in",
    "linear2": "in",
    "modulation": "out_gathered",
    "double_residual": "out_gathered",
    "single_residual": "out_gathered",
}
"""How the layers of blocks are split, by name. A test holds that these are all of them."""
_TENSOR_AXES: Mapping[tuple[TensorSplit, str], int] = {
    ("out", "value"): -2,
    ("out", "up"): -2,
    ("out", "bias"): -1,
    ("out", "scale"): -1,
    ("in", "value"): -1,
    ("in", "down"): -1,
    ("out_gathered", "value"): -2,
    ("out_gathered", "up"): -2,
    ("out_gathered", "scale"): -1,
}
"""The axis of a layer's array that is split, by the layer's split and the array's field.

Arrays that are not here are whole on every device: such as a low-rank `down` where the outputs are
split, and a bias that is added to what was reduced or gathered.
"""


_SMALL = (Clip, ClipVision, Siglip, IpAdapter)
"""Networks that are not split over "tensor".

The encoders are a hundredth of the transformer, and 8 devices would not divide CLIP's 12 heads. An
IP-Adapter runs once for an image, and its keys and values are for all heads.
"""


class ArrayRole(NamedTuple):
    """What an array is in its network.

    `layer`: the name of its layer. `field`: what it is of the layer or of the layer's weight, such
    as "value", "bias" or "up". `in_blocks`: whether the layer belongs to stacked blocks.
    """

    layer: str
    field: str
    in_blocks: bool


def array_role(path: KeyPath) -> ArrayRole:
    """Return what the array at a path of a network is."""
    name = path_name(path)
    *parents, field = name.split(".")
    if "weight" in parents:
        # A weight's storage may be nested ("qkv.weight.base.value"): all of it is of the layer.
        parents = parents[: parents.index("weight")]
    return ArrayRole(parents[-1] if parents else "", field, is_stacked(name))


def tensor_split(layer: str, stacked: bool) -> TensorSplit | None:
    """Return how a layer is split over "tensor"; None for one that is not."""
    return TENSOR_SPLITS.get(layer) if stacked else None


def tensor_axis(role: ArrayRole) -> int | None:
    """Return the axis of an array that is split over "tensor"; None if it is not."""
    if role.layer == "position_bias":
        return -1  # a bias of the attention's scores, one for each head
    split = tensor_split(role.layer, role.in_blocks)
    return None if split is None else _TENSOR_AXES.get((split, role.field))


def specs(network: Network, mesh: Mesh) -> Network:
    """Return how each array of a network is split over a mesh.

    Matrices and kernels are split over "fsdp", and matrices of blocks over "tensor" too, with the
    biases that belong to their outputs, except those of CLIP, SigLIP and IP-Adapters. Everything
    else is on every device, as is a matrix whose size "fsdp" does not divide.

    **Returns:** the network with a `PartitionSpec` in place of each array.
    **Raises:** `ValueError` if "tensor" does not divide the heads or the hidden features.
    """
    tensor = _tensor_parts(network, mesh)
    fsdp = mesh.shape["fsdp"]

    def place(path: KeyPath, node: PyTree) -> PyTree:
        if not isinstance(node, PackedWeight):
            return _spec(array_role(path), node.shape, fsdp, tensor)
        role = array_role((*path, GetAttrKey("value")))
        _check_blocks(role, node, getattr(network, "config", None), tensor)
        spec = _spec(role, node.value.shape, fsdp, tensor, unit=node.layout.nbytes)
        return jax.tree.map(lambda _: spec, node)

    arrays = eqx.filter(network, lambda leaf: hasattr(leaf, "shape"))
    return jax.tree_util.tree_map_with_path(
        place, arrays, is_leaf=lambda node: isinstance(node, PackedWeight)
    )


def _check_blocks(role: ArrayRole, weight: PackedWeight, config: object, tensor: int) -> None:
    """Check that "tensor" splits the rows of a packed weight between their blocks.

    **Arguments:** `config`: of the network, which says of what parts the rows of fused layers are.
    **Raises:** `ValueError` if it does not.
    """
    if tensor == 1 or tensor_split(role.layer, role.in_blocks) != "in":
        return
    parts: Sequence[int] = (weight.shape[-1],)
    if isinstance(config, BlockConfig):
        parts = fused_features(config).get(role.layer, parts)
    size = weight.layout.values
    for part in parts:
        if part % (size * tensor):
            raise ValueError(
                f"tensor={tensor} does not split {part} inputs of {role.layer} between the blocks "
                f"of {size} in which {weight.format} has them. Choose a smaller one, split over "
                "fsdp instead, or load the weights with dtype='bfloat16'."
            )


def _spec(
    role: ArrayRole,
    shape: tuple[int, ...],
    fsdp: int,
    tensor: int,
    unit: int = 1,
) -> PartitionSpec:
    """Return how an array is split.

    **Arguments:** `unit`: numbers along the last axis that stay together.
    """
    axes: list[str | None] = [None] * len(shape)
    axis = tensor_axis(role)
    if tensor > 1 and axis is not None:
        axes[axis] = "tensor"
    if fsdp > 1 and role.field == "value":
        # A kernel's outputs are its last axis. Of a matrix, the axis that is not split yet.
        is_kernel = len(shape) == 4
        axis = -1 if is_kernel or axes[-2] is not None else -2
        size = shape[axis] if axis == -2 else shape[axis] // unit
        if size % fsdp == 0:
            axes[axis] = "fsdp"
    return PartitionSpec(*axes)


def shardings(network: Network, mesh: Mesh) -> Network:
    """Return `specs` as shardings on the mesh.

    With `load_flux(source, sharding=lambda network: shardings(network, mesh))`, and the same for
    the other networks, a process reads the slices of its own devices only.
    """
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(network, mesh))


def _tensor_parts(network: eqx.Module, mesh: Mesh) -> int:
    """Return into how many parts "tensor" splits the heads and hidden features of a network."""
    if isinstance(network, _SMALL):
        return 1
    parts = mesh.shape["tensor"]
    config = getattr(network, "config", None)
    for name in ("heads", "mlp_width"):
        size = getattr(config, name, None)
        if size is not None and size % parts:
            raise ValueError(
                f"tensor={parts} does not divide the {size} {name} of {type(network).__name__}. "
                "Choose one that does."
            )
    return parts
