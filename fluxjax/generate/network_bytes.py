"""What a network takes in memory, from its shapes or from the headers of its files."""

import math
from dataclasses import dataclass
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
from jax.typing import DTypeLike

from fluxjax.checkpoint.detect import open_source
from fluxjax.checkpoint.dtypes import loaded_dtype
from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.family import hub_folder
from fluxjax.checkpoint.kinds import KINDS, Kind, Network
from fluxjax.checkpoint.locate import find_source
from fluxjax.checkpoint.own_configs import NetworkConfig
from fluxjax.checkpoint.plan import Plan
from fluxjax.generate.storages import storage_named
from fluxjax.nets.stack import is_rounded, leaf_names

STREAMED = "streamed"
"""In place of a storage: matrices in the host's memory, of which two blocks are on the device."""
_FILE_BYTES = 2
"""Bytes of a weight in a file that is not on this machine: the published ones are in bfloat16."""


@dataclass(frozen=True, kw_only=True)
class NetworkBytes:
    """The sizes of a network.

    `matrices`: bytes of the blocks' matrices in their dtype, and `numbers`: how many numbers these
    are. `block`: bytes of those of the largest block that every step uses. `rest`: bytes of all
    other arrays. `known`: whether they are those of a file, and not of a config alone.
    """

    matrices: int
    numbers: int
    block: int
    rest: int
    known: bool = True

    @property
    def has_blocks(self) -> bool:
        return self.numbers > 0

    def on_device(self, storage: str | None) -> int:
        """Return the bytes on the device.

        **Arguments:** `storage`: the name of a format, `STREAMED`, or None for the plain arrays.
        """
        if storage is None:
            return self.rest + self.matrices
        if storage == STREAMED:
            return self.rest + 2 * self.block
        return self.rest + math.ceil(self.numbers * storage_named(storage).bits / 8)

    def on_host(self, storage: str | None) -> int:
        """Return the bytes that stay in the host's memory."""
        return self.matrices if storage == STREAMED else 0

    def plus(self, other: "NetworkBytes") -> "NetworkBytes":
        """Return the sizes of both networks together, whose blocks are not used at once."""
        return NetworkBytes(
            matrices=self.matrices + other.matrices,
            numbers=self.numbers + other.numbers,
            block=self.block + other.block,
            rest=self.rest + other.rest,
            known=self.known and other.known,
        )


NOTHING = NetworkBytes(matrices=0, numbers=0, block=0, rest=0)
"""Of a network that is not there."""


def network_bytes(network: Network, itemsizes: list[int], *, known: bool = True) -> NetworkBytes:
    """Return the sizes of a network of shapes.

    **Arguments:** `itemsizes`: bytes of a number of each leaf.
    """
    matrices = numbers = rest = 0
    blocks: dict[str, int] = {}
    for name, leaf, size in zip(
        leaf_names(network), jax.tree.leaves(network), itemsizes, strict=True
    ):
        count = math.prod(leaf.shape)
        # Stacks of vectors have two axes, of matrices three.
        if not is_rounded(name) or len(leaf.shape) != 3:
            rest += count * size
            continue
        matrices += count * size
        numbers += count
        if ".modulation." in name:
            continue  # used once, before the first step
        stack = name.partition(".")[0]
        blocks[stack] = blocks.get(stack, 0) + count * size // max(leaf.shape[0], 1)
    largest = max(blocks.values(), default=0)
    return NetworkBytes(matrices=matrices, numbers=numbers, block=largest, rest=rest, known=known)


def bytes_of_plan(plan: Plan, dtype: DTypeLike | None = None) -> NetworkBytes:
    """Return the sizes of a network whose files' headers are read.

    **Arguments:** `dtype`: in which it is loaded; None for the files' own.
    """
    itemsizes = []
    leaves = jax.tree.leaves(plan.network)
    for name, leaf in zip(leaf_names(plan.network), leaves, strict=True):
        itemsizes.append(loaded_dtype(plan, name, leaf.shape, dtype).itemsize)
    return network_bytes(plan.network, itemsizes)


def bytes_of_config(
    kind: Kind, config: NetworkConfig | None = None, dtype: DTypeLike | None = None
) -> NetworkBytes:
    """Return the sizes of a network of a config, in bfloat16 or another dtype.

    **Arguments:** `config`: None for the default one of its kind.
    """
    shapes = eqx.filter_eval_shape(kind.network, config or kind.config(), key=jax.random.key(0))
    size = _FILE_BYTES if dtype is None else np.dtype(dtype).itemsize
    return network_bytes(shapes, [size] * len(jax.tree.leaves(shapes)), known=False)


def bytes_of_source(
    name: str,
    source: str | Path,
    *,
    config: NetworkConfig | None = None,
    dtype: DTypeLike | None = None,
) -> NetworkBytes:
    """Return the sizes of a network of a source, without a download.

    **Arguments:** `name`: of its kind, as "flux". `source`: a zoo name, a path, or a hub id.
    `config`: taken where its files are not on this machine; None for the default one of its kind.
    `dtype`: in which it is loaded; None for the files' own.
    **Raises:** `WeightsError` for a local file that is damaged or holds no such network.
    """
    kind = KINDS[name]
    try:
        path = find_source(source, [hub_folder(source, kind)], cached=True)
    except (WeightsError, OSError):
        return bytes_of_config(kind, config, dtype)
    if path.is_dir() and (path / kind.folder).is_dir():
        path = path / kind.folder
    elif not Path(source).exists() and kind.name not in open_source(path).networks:
        return bytes_of_config(kind, config, dtype)  # the rest of the model is in the cache
    return bytes_of_plan(open_source(path).network(kind).plan(None), dtype)
