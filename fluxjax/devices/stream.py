"""Networks whose blocks pass through the device one by one, from host memory or from files."""

from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import KeyPath
from jax.typing import DTypeLike
from jaxtyping import PyTree

from fluxjax.checkpoint.load import block_index, load_with_block_weights
from fluxjax.checkpoint.plan import Plan
from fluxjax.devices.offload import DEVICE_MEMORY, HOST_MEMORY, move_arrays
from fluxjax.devices.streamed import BlockReader, FileWeight, HostWeight
from fluxjax.nets.clip import Clip
from fluxjax.nets.controlnet import ControlNet
from fluxjax.nets.quantized import QuantizedWeight
from fluxjax.nets.stack import is_stacked, path_name
from fluxjax.nets.t5 import T5
from fluxjax.nets.transformer import AbstractTransformer
from fluxjax.nets.weight import Dense

Network = TypeVar("Network", bound=eqx.Module)


def stream_blocks(network: Network) -> Network:
    """Return a network whose blocks' matrices stay in the host's memory.

    Each block's are copied to the device while the block before it runs, so that it holds two
    blocks at once. Everything else is on the device.

    **Arguments:** `network`: a `Flux`, `Chroma`, `ControlNet`, `T5` or `Clip`, on the device or
    from `offload`, with which it is never on the device as a whole. Merge adapters before, or
    attach them.
    **Raises:** `ValueError` for another network, or for quantized weights.
    """
    if not isinstance(network, AbstractTransformer | ControlNet | T5 | Clip):
        raise ValueError(
            "`stream_blocks(network)` takes a network of stacked blocks (a Flux, Chroma, "
            f"ControlNet, T5 or Clip), got a {type(network).__name__}. Keep others on the device."
        )

    def place(path: KeyPath, node: PyTree) -> PyTree:
        if isinstance(node, QuantizedWeight):
            raise ValueError(
                "Quantized weights have no streamed form. Stream the plain ones, or keep these on "
                "the device."
            )
        if isinstance(node, Dense) and is_stacked(path_name(path)):
            return HostWeight(move_arrays(node, HOST_MEMORY).value)
        return move_arrays(node, DEVICE_MEMORY)

    def is_placed(node: PyTree) -> bool:
        return isinstance(node, Dense | QuantizedWeight)

    return jax.tree_util.tree_map_with_path(place, network, is_leaf=is_placed)


def load_streamed(plan: Plan, *, dtype: DTypeLike | None = None) -> PyTree:
    """Load a checkpoint, except for its blocks' matrices, which stay in the files.

    Each of these is read once now, block by block, so that NaN, infinity and values that the dtype
    can't hold are reported here and not in the middle of an image.

    **Arguments** and **Raises:** as for `fluxjax.checkpoint.load.load`.
    """

    def file_weight(
        name: str,
        shape: tuple[int, ...],
        target: np.dtype,
    ) -> FileWeight:
        for block in range(shape[0]):
            plan.leaf(name, shape, target, block_index(shape, block))
        return FileWeight(jnp.arange(shape[0]), BlockReader(plan, name, shape, target))

    return load_with_block_weights(plan, file_weight, dtype=dtype)
