"""Networks that are not all on the device: kept in host memory until they are used, or passed through it block by block."""

import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.convert.load import Plan, is_stacked, load, loaded_dtype
from fluxjax.nets.clip import Clip
from fluxjax.nets.flux import Flux
from fluxjax.nets.layers import Dense, Weight
from fluxjax.nets.quantized import Quantized
from fluxjax.nets.t5 import T5
from fluxjax.shapes import Array, Float, Int

Network = TypeVar("Network", bound=eqx.Module)
_HOST, _DEVICE = "pinned_host", "device"


def offload(network: Network) -> Network:
    """Return a network with its arrays in the host's memory, on the same devices' side. `fetch` brings it back; nothing runs
    on it there."""
    return _moved(network, _HOST)


def fetch(network: Network) -> Network:
    """Return a network with its arrays on their devices; those that are there are not copied, and what is streamed stays."""
    return _moved(network, _DEVICE)


def _moved(network: Any, kind: str) -> Any:
    def move(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.sharding.memory_kind == kind:
            return leaf
        return jax.device_put(leaf, leaf.sharding.with_memory_kind(kind))

    return jax.tree.map(move, network, is_leaf=lambda node: isinstance(node, Hosted))


class Hosted(Weight):
    """A weight in the host's memory, copied to the device as it is used; blocks' are fetched while the block before runs."""

    value: Float[Array, "*depth out features"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def matmul(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch out"]:
        return self.fetch().matmul(x)

    @property
    def spread(self) -> bool:
        return True

    def fetch(self) -> Weight:
        return Dense(jax.device_put(self.value, jax.memory.Space.Device))


def stream_blocks(network: Network) -> Network:
    """Return a network whose blocks' matrices stay in the host's memory, from which each is fetched while the block before it
    runs: two blocks are on the device at once. The rest is on the device.

    `network`: a `Flux`, `T5` or `Clip`, on the device or from `offload`, which saves it from ever being there whole. Adapters
    are merged before, or attached. **Raises:** `ValueError` for another network, or quantized weights.
    """
    if not isinstance(network, Flux | T5 | Clip):
        raise ValueError(
            f"`stream_blocks(network)` takes a Flux, T5 or Clip, whose blocks are stacked, got a {type(network).__name__}. "
            "Keep others on the device."
        )

    def place(path: Any, node: Any) -> Any:
        if isinstance(node, Quantized):
            raise ValueError("Quantized weights have no streamed form. Stream the plain ones, or keep these on the device.")
        if isinstance(node, Dense) and is_stacked(str(path[0].name)):
            return Hosted(_moved(node, _HOST).value)
        return _moved(node, _DEVICE)

    return jax.tree_util.tree_map_with_path(place, network, is_leaf=lambda node: isinstance(node, Dense | Quantized))


class _Reader:
    """Reads the blocks of a stacked leaf, each next one in the background while the one before is used."""

    # One for all leaves: the blocks' matrices are read in the order in which they are used.
    pool = ThreadPoolExecutor(1, "fluxjax-reader")

    def __init__(self, plan: Plan, name: str, shape: tuple[int, ...], dtype: np.dtype):
        self.plan, self.name, self.shape, self.dtype = plan, name, shape, dtype
        self.ahead: tuple[int, Future] | None = None

    def read(self, number: int) -> np.ndarray:
        # Copied, so that a mapped file is read here and not where it is waited for.
        whole = tuple(slice(0, size) for size in self.shape[1:])
        return np.array(self.plan.region(self.name, self.shape, self.dtype, (slice(number, number + 1), *whole))[0])

    def __call__(self, number: Any) -> np.ndarray:
        wanted = int(number)
        ahead, self.ahead = self.ahead, None
        found = ahead[1].result() if ahead is not None and ahead[0] == wanted else self.read(wanted)
        after = (wanted + 1) % self.shape[0]
        self.ahead = (after, self.pool.submit(self.read, after))
        return found


class Filed(Weight):
    """A weight that stays in its file, from which a block's is read by a callback as it is used. `number`: of the block."""

    number: Int[Array, "*depth"]
    reader: _Reader = eqx.field(static=True)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.number.shape, *self.reader.shape[1:])

    def matmul(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch out"]:
        return self.fetch().matmul(x)

    def fetch(self) -> Weight:
        found = jax.ShapeDtypeStruct(self.reader.shape[1:], self.reader.dtype)
        return Dense(jax.pure_callback(self.reader, found, self.number))


def load_streamed(plan: Plan, *, dtype: Any = None) -> Any:
    """As `fluxjax.convert.load.load`, with the blocks' matrices left in the files. Each is read once here, block by block, so
    that NaN, infinity, and values that the dtype can't hold are told now, and not in the middle of an image."""
    rest, taken = take_out(plan)

    def filed(name: str, shape: tuple[int, ...], target: np.dtype) -> Filed:
        for block in range(shape[0]):
            plan.leaf(name, shape, target, (slice(block, block + 1), *(slice(0, size) for size in shape[1:])))
        return Filed(jnp.arange(shape[0]), _Reader(plan, name, shape, target))

    return put_back(load(rest, dtype=dtype), {name: filed(name, *leaf(dtype)) for name, leaf in taken.items()})


Taken = Mapping[str, Callable[[Any], tuple[tuple[int, ...], np.dtype]]]
"""Of a leaf's name: a function of the dtype that is wanted, or None, that gives its shape and dtype."""


def take_out(plan: Plan) -> tuple[Plan, Taken]:
    """Return a plan without the blocks' matrices, and those."""
    taken: dict[str, Any] = {}

    def leave(path: Any, node: Any) -> Any:
        name = _name(path)
        if not isinstance(node, Dense) or not is_stacked(name):
            return node
        taken[name] = lambda dtype: (node.shape, loaded_dtype(plan, name, node.shape, dtype))
        return None

    rest = jax.tree_util.tree_map_with_path(leave, plan.network, is_leaf=lambda node: isinstance(node, Dense))
    return Plan(rest, plan.pieces, plan.slots), taken


def put_back(network: Any, weights: Mapping[str, Weight]) -> Any:
    """Return a network with weights in the places that `take_out` left."""

    def put(path: Any, node: Any) -> Any:
        return weights.get(_name(path), node)

    return jax.tree_util.tree_map_with_path(put, network, is_leaf=lambda node: node is None)


def _name(path: Any) -> str:
    return ".".join(str(entry.name if hasattr(entry, "name") else entry.idx) for entry in path)


def residency(networks: Mapping[str, Any]) -> str:
    """Return where the bytes of networks lie, a line each: on the devices, in the host's memory, in files. None: nowhere."""
    return "\n".join(f"{name}: {_told(network)}" for name, network in networks.items())


def _told(network: Any) -> str:
    found: dict[str, int] = {}

    def add(place: str, size: int) -> None:
        found[place] = found.get(place, 0) + size

    for node in jax.tree.leaves(network, is_leaf=lambda node: isinstance(node, Filed)):
        if isinstance(node, Filed):
            add("in files", math.prod(node.shape) * node.reader.dtype.itemsize)
        elif isinstance(node, jax.Array):
            devices = len(node.sharding.device_set)
            share = math.prod(node.sharding.shard_shape(node.shape)) * node.dtype.itemsize
            place = "in host memory" if node.sharding.memory_kind == _HOST else "in device memory"
            add(place if devices == 1 else f"{place} for each of {devices} devices", share)
    return ", ".join(f"{size / 1e9:.3f} GB {place}" for place, size in found.items()) or "not in memory"
