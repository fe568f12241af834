"""Networks over a mesh of devices: where each weight lies, and how a part of it is used inside of a `jax.shard_map`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fluxjax.arguments import convert_arguments
from fluxjax.kernels.attention import Attention
from fluxjax.kernels.context import Ring, Ulysses
from fluxjax.kernels.guiding import Nag
from fluxjax.nets.clip import Clip
from fluxjax.nets.flux import Flux, Prepared
from fluxjax.nets.layers import Adapted, Dense, Weight
from fluxjax.nets.quantized import Quantized
from fluxjax.nets.vae import Conv
from fluxjax.numeric import wide_dtype
from fluxjax.shapes import Array, Float

AXES = ("data", "fsdp", "tensor", "context")
ROWS = PartitionSpec(("data", "fsdp"))
"""Of a batch: its rows are split over both axes."""
Network = TypeVar("Network", bound=eqx.Module)
Result = TypeVar("Result")

# How the layers of blocks are split over the axis "tensor": by the features that come out (heads, hidden features), by those
# that go in, whose products are then summed, or by those that come out and are joined at once.
_TENSOR: Mapping[str, str] = {
    **dict.fromkeys(("qkv", "linear1", "up", "gate", "q", "k", "v"), "out"),
    **dict.fromkeys(("out", "down", "linear2"), "in"),
    "modulation": "joined",
}
_BLOCKS = ("double", "single", "blocks")


@convert_arguments
def make_mesh(*, data: int = 1, fsdp: int = 1, tensor: int = 1, context: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Return a mesh of devices, by default all.

    **Arguments:** `data`: parts of a batch. `fsdp`: parts of a batch and of every weight, which is gathered as it is used.
    `tensor`: parts of the heads and hidden features. `context`: parts of the tokens. One of them may be -1, for the
    devices that the others leave.
    **Raises:** `ValueError` if their product is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = dict(zip(AXES, (data, fsdp, tensor, context), strict=True))
    free = [axis for axis, size in sizes.items() if size == -1]
    taken = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(free) == 1 and taken > 0 and len(devices) % taken == 0:
        sizes[free[0]] = len(devices) // taken
    if min(sizes.values()) < 1 or int(np.prod(list(sizes.values()))) != len(devices):
        told = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ValueError(
            f"`make_mesh({told})` does not use {len(devices)} devices. Choose sizes of that product, one of them -1 for what "
            "is left, or pass devices=."
        )
    return Mesh(np.array(devices).reshape(tuple(sizes.values())), AXES)


class Gathered(Weight):
    """A weight of which each device holds a part, put together as it is used. `axis`: of the matrix, -2 (out) or -1 (in)."""

    part: Dense | Quantized
    axis: int = eqx.field(static=True)

    @property
    def shape(self) -> tuple[int, ...]:
        whole = list(self.part.shape)
        whole[self.axis] *= jax.lax.axis_size("fsdp")
        return tuple(whole)

    def matmul(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch out"]:
        return self.fetch().matmul(x)

    @property
    def spread(self) -> bool:
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


class Summed(Weight):
    """A weight of which each device holds the columns of its features; the products are summed."""

    base: Weight

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def matmul(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch out"]:
        return jax.lax.psum(self.base.matmul(x).astype(wide_dtype(x.dtype)), "tensor")

    @property
    def spread(self) -> bool:
        return self.base.spread

    def fetch(self) -> Weight:
        return Summed(self.base.fetch())


class Joined(Weight):
    """A weight of which each device holds some rows; what comes out is joined."""

    base: Weight

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def matmul(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch out"]:
        part = self.base.matmul(x)
        return jax.lax.all_gather(part, "tensor", axis=part.ndim - 1, tiled=True)

    @property
    def spread(self) -> bool:
        return self.base.spread

    def fetch(self) -> Weight:
        return Joined(self.base.fetch())


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
        elif (role in ("bias", "scale") and how == "out") or (role, how) in (("down", "in"), ("scale", "joined")):
            dims[-1] = "tensor"
        elif role == "up" and how in ("out", "joined"):
            dims[-2] = "tensor"
        elif layer == "position_bias" and parts > 1:
            dims[-1] = "tensor"
        return PartitionSpec(*dims)

    parts = _tensor_parts(network, mesh)
    return jax.tree_util.tree_map_with_path(place, eqx.filter(network, lambda leaf: hasattr(leaf, "shape")))


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


def shard(network: Network, mesh: Mesh) -> Network:
    """Return a network with its arrays on a mesh, as `specs` has them, for `on_mesh`.

    With "tensor" the rows of fused layers change places, so that each device's part has its heads' queries, keys and values, in
    this order: convert, merge adapters and save before. **Raises:** `ValueError` if the axis does not divide heads and hidden
    features.
    """

    def place(path: Any, leaf: Array, spec: PartitionSpec) -> Array:
        return jax.device_put(_regrouped(path, leaf, network, mesh.shape["tensor"]), NamedSharding(mesh, spec))

    arrays, static = eqx.partition(network, eqx.is_array)
    return eqx.combine(jax.tree_util.tree_map_with_path(place, arrays, specs(network, mesh)), static)


def _regrouped(path: Any, leaf: Array, network: Any, parts: int) -> Array:
    """Return a fused layer's array with the parts of one device beside each other."""
    layer, role, stacked = _leaf(path)
    if parts == 1 or not stacked or layer not in ("qkv", "linear1", "linear2"):
        return leaf
    width, hidden = network.config.width, network.config.mlp_width
    fused = {"qkv": [width] * 3, "linear1": [width] * 3 + [hidden], "linear2": [width, hidden]}[layer]
    columns = layer == "linear2"
    rows: dict[str, int | None] = {"value": -2, "down": None, "up": -2, "bias": -1, "scale": -1}
    axis = rows[role] if not columns else -1 if role in ("value", "down") else None
    if axis is None:
        return leaf
    starts = np.cumsum([0, *fused[:-1]])
    order = [
        start + np.arange(part * size // parts, (part + 1) * size // parts)
        for part in range(parts)
        for start, size in zip(starts, fused, strict=True)
    ]
    return jnp.take(leaf, np.concatenate(order), axis=axis)


def local(network: Any, placed: Any) -> Any:
    """Return a network, or a pytree of some, of one device's arrays, inside of `jax.shard_map`: its weights fetch and sum what
    they lack.

    `placed`: its `specs`.
    """

    def wrap(path: Any, weight: Any, spec: Any) -> Any:
        if isinstance(weight, Conv) and "fsdp" in tuple(spec.weight):
            return GatheredConv(weight)
        if not isinstance(weight, Weight):
            return weight
        how = _TENSOR.get(_leaf((*path, path[-1])).layer) if "tensor" in str(spec) else None
        part = _gathering(weight, spec)
        return Summed(part) if how == "in" else Joined(part) if how == "joined" else part

    return jax.tree_util.tree_map_with_path(wrap, network, placed, is_leaf=lambda node: isinstance(node, Weight | Conv))


def _gathering(weight: Weight, spec: Any) -> Weight:
    """Return a weight that gathers what "fsdp" splits."""
    if isinstance(weight, Adapted):
        return Adapted(_gathering(weight.base, spec.base), weight.down, weight.up)
    if isinstance(weight, Dense | Quantized):
        axes = tuple(spec.value)
        return Gathered(weight, axes.index("fsdp") - len(axes)) if "fsdp" in axes else weight
    raise ValueError(
        f"A {type(weight).__name__} weight has no form on a mesh. Use dense or quantized ones, or attached adapters."
    )


def on_mesh(
    function: Callable[[Any, Any, Any], Result], mesh: Mesh, networks: Any, rows: Any, rest: Any = None, *, fill: bool = False
) -> Result:
    """Return function(networks, rows, rest), computed on a mesh by `jax.shard_map`.

    **Arguments:** `function`: of the networks in their local form, of this device's rows, and of what is the same everywhere;
    gives arrays of its rows. `networks`: from `shard`. `rows`: arrays with one row an example; where the devices do not divide
    them, the last is repeated and dropped. `rest`: a pytree. `fill`: whether that may leave a device nothing but the repeated.
    **Raises:** `ValueError` for fewer rows than data x fsdp, without `fill`.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    count = len(jax.tree.leaves(eqx.filter(rows, eqx.is_array))[0])
    if count < parts and not fill:
        raise ValueError(
            f"A batch of {count} leaves some of data x fsdp = {parts} devices idle. Draw more at once, or let them serve "
            "tensor= or context=."
        )
    rows = jax.tree.map(lambda x: _filled(x, -count % parts) if eqx.is_array(x) else x, rows)
    arrays, static = eqx.partition((networks, rows, rest), eqx.is_array)
    placed = jax.tree.map(lambda network: specs(network, mesh), arrays[0], is_leaf=lambda node: isinstance(node, eqx.Module))
    inputs = (placed, jax.tree.map(lambda _: ROWS, arrays[1]), jax.tree.map(lambda _: PartitionSpec(), arrays[2]))

    def body(arrays: Any) -> Result:
        networks, rows, rest = eqx.combine(arrays, static)
        return function(local(networks, placed), rows, rest)

    # What varies over which axis is for gradients; the steps' first states are constants, which it would refuse.
    result = jax.shard_map(body, mesh=mesh, in_specs=(inputs,), out_specs=ROWS, check_vma=False)(arrays)
    return jax.tree.map(lambda x: x[:count], result)


def _filled(x: Array, more: int) -> Array:
    return x[np.minimum(np.arange(len(x) + more), len(x) - 1)] if more else x


class Part(eqx.Module):
    """What is prepared for this device's part of the tokens, and how many tokens the whole text has."""

    prepared: Prepared
    txt_tokens: int = eqx.field(static=True)


class OnTokens(eqx.Module):
    """A `Flux` of which each device along "context" runs a part of the text's and of the image's tokens; `prepare` and
    `velocity` are as the network's.

    Tokens that the devices do not divide are padded, and no token sees the padding. Heads are exchanged for tokens
    (`Ulysses`) where the devices divide them, else keys and values go round (`Ring`). Both know `Nag`.
    **Raises:** `ValueError` for a custom attention, which would see a part of the tokens, or one that is named where keys and
    values go round.
    """

    flux: Flux

    def prepare(self, times: Any, *, txt: Array, img_ids: Array, txt_ids: Array | None = None, **inputs: Any) -> Part:
        ids = None if txt_ids is None else _mine(txt_ids)
        return Part(self.flux.prepare(times, txt=_mine(txt), img_ids=_mine(img_ids), txt_ids=ids, **inputs), len(txt))

    def velocity(
        self,
        x: Float[Array, "img_tokens channels"],
        t: Any,
        part: Part,
        *,
        attention: Any = None,
        weaken: Any = None,
    ) -> Float[Array, "img_tokens out_channels"]:
        nag = attention if isinstance(attention, Nag) else None
        named = attention if nag is None else nag.implementation
        custom = callable(named) and not isinstance(named, Attention)
        if custom or (weaken is not None and weaken.attention is not None):
            raise ValueError("A custom attention would see a part of the tokens. Use context=1 with it.")
        devices = jax.lax.axis_size("context")
        heads = self.flux.config.heads // jax.lax.axis_size("tensor")
        if heads % devices and named is not None:
            raise ValueError(
                f"{heads} heads are not divided by context={devices}, so keys and values go round, by an attention of that "
                "ring's own. Leave out attention=, or choose a context that divides them."
            )
        counts = (part.txt_tokens, len(x))
        joint = Ring("context", *counts, nag) if heads % devices else Ulysses("context", *counts, named, nag)
        out = self.flux.velocity(_mine(x), t, part.prepared, attention=joint, weaken=weaken)
        return jax.lax.all_gather(out, "context", tiled=True)[: len(x)]


def _mine(rows: Float[Array, "tokens features"]) -> Float[Array, "part features"]:
    """Return this device's part of the tokens along "context", padded to be as many as the others'."""
    devices, index = jax.lax.axis_size("context"), jax.lax.axis_index("context")
    part = -(-len(rows) // devices)
    rows = jnp.pad(rows, ((0, part * devices - len(rows)), (0, 0)))
    return jax.lax.dynamic_slice_in_dim(rows, index * part, part)
