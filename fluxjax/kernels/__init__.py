"""Attention: one function in front of several implementations, one file each.

The Pallas kernels are imported when they are first used.
"""

from fluxjax.kernels.attention import Attention, attention, plain_attention, select_attention
from fluxjax.kernels.block_sizes import PRESETS, BlockSizes
from fluxjax.kernels.guided_attention import Nag, isolated_attention
from fluxjax.kernels.regional_attention import RegionalAttention, labelled_attention

__all__ = [
    "PRESETS",
    "Attention",
    "BlockSizes",
    "Nag",
    "RegionalAttention",
    "attention",
    "isolated_attention",
    "labelled_attention",
    "plain_attention",
    "select_attention",
]
