"""Which rows of the fused weights of FLUX's blocks are those of q, k, v and the MLP."""

from collections.abc import Mapping

from fluxjax.checkpoint.own_configs import NetworkConfig
from fluxjax.nets.flux_config import BlockConfig

FusedRows = Mapping[str, slice]
"""The rows that each part of a fused weight takes, by the name of the part."""


def fused_parts(config: NetworkConfig) -> FusedRows:
    """Return the rows of the parts of a network's fused weights, which only FLUX's blocks have."""
    if isinstance(config, BlockConfig):
        return fused_rows(config.width, config.mlp_width)
    return {}


def fused_rows(width: int, mlp_width: int) -> FusedRows:
    """Return the rows of the parts of a transformer's fused weights.

    q, k and v take `width` rows each. In a single block's first layer the hidden features of the
    MLP follow, `mlp_width` rows.
    """
    return {
        "q": slice(0, width),
        "k": slice(width, 2 * width),
        "v": slice(2 * width, 3 * width),
        "qkv": slice(0, 3 * width),
        "mlp": slice(3 * width, 3 * width + mlp_width),
    }
