"""Blocks of a transformer that are degraded on purpose, as a weaker model to guide away from."""

from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from fluxjax.nets.flux_config import BlockConfig
from fluxjax.nets.heads import JointAttention
from fluxjax.shapes import Array, Bool


class DegradedBlocks(eqx.Module):
    """Which blocks of a transformer are degraded: they are skipped, or use another attention.

    `double`, `single`: flags, one for each block. `attention`: of the flagged blocks; None skips
    them.
    **Source:** skip-layer guidance of Stable Diffusion 3.5; with `isolated_attention`, PAG (Ahn et
    al. 2024).
    """

    double: Bool[Array, " double_depth"]
    single: Bool[Array, " single_depth"]
    attention: JointAttention | None

    def __init__(
        self,
        config: BlockConfig,
        *,
        double: Sequence[int] = (),
        single: Sequence[int] = (),
        attention: JointAttention | None = None,
    ):
        """Choose blocks by number.

        **Arguments:** `config`: of the network. `double`, `single`: numbers of its blocks, from 0.
        **Raises:** `ValueError` for no block, or one that the network does not have.
        """
        if not (double or single):
            raise ValueError(
                "`DegradedBlocks` needs at least one block. Pass double=(number, …) or "
                "single=(number, …)."
            )
        self.double = _flags("double", config.double_depth, double)
        self.single = _flags("single", config.single_depth, single)
        self.attention = attention


def _flags(
    kind: str,
    depth: int,
    numbers: Sequence[int],
) -> Bool[Array, " depth"]:
    """Return which blocks of a kind are degraded.

    **Raises:** `ValueError` for a number that is of no block.
    """
    unknown = [number for number in numbers if not 0 <= number < depth]
    if unknown:
        raise ValueError(
            f"`DegradedBlocks({kind})` got {unknown}; this network has {kind} blocks 0 to "
            f"{depth - 1}. Choose among these."
        )
    # An array, so that other blocks of the same network do not compile anew.
    return jnp.asarray(np.isin(np.arange(depth), numbers))
