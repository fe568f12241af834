"""Networks passed through the device block by block, from the host's memory or from files."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.checkpoint.load import block_index, load_with_block_weights
from fluxjax.checkpoint.plan import Plan
from fluxjax.devices.offload import _DEVICE, _HOST, Network, _moved
from fluxjax.devices.weights import FileWeight, HostWeight, _Reader
from fluxjax.nets.clip import Clip
from fluxjax.nets.flux import Flux
from fluxjax.nets.quantized import QuantizedWeight
from fluxjax.nets.stack import is_stacked
from fluxjax.nets.t5 import T5
from fluxjax.nets.weight import Dense


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
        if isinstance(node, QuantizedWeight):
            raise ValueError(
                "Quantized weights have no streamed form. Stream the plain ones, or keep these on the device."
            )
        if isinstance(node, Dense) and is_stacked(str(path[0].name)):
            return HostWeight(_moved(node, _HOST).value)
        return _moved(node, _DEVICE)

    return jax.tree_util.tree_map_with_path(
        place, network, is_leaf=lambda node: isinstance(node, Dense | QuantizedWeight)
    )


def load_streamed(plan: Plan, *, dtype: Any = None) -> Any:
    """As `fluxjax.convert.load.load`, with the blocks' matrices left in the files. Each is read once here, block by block, so
    that NaN, infinity, and values that the dtype can't hold are told now, and not in the middle of an image."""

    def filed(name: str, shape: tuple[int, ...], target: np.dtype) -> FileWeight:
        for block in range(shape[0]):
            plan.leaf(name, shape, target, block_index(shape, block))
        return FileWeight(jnp.arange(shape[0]), _Reader(plan, name, shape, target))

    return load_with_block_weights(plan, filed, dtype=dtype)
