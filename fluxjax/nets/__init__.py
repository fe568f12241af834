"""The four networks as immutable Equinox modules, and the layers that they are made of.

A network takes one example; `jax.vmap` makes a batch. Blocks of one kind are stacked along a
leading axis.
"""

from fluxjax.nets.clip import Clip, ClipConfig
from fluxjax.nets.flux import DegradedBlocks, Flux, FluxConfig, Prepared
from fluxjax.nets.quantized import QuantizedWeight, quantize
from fluxjax.nets.stack import Unrolled, leaf_names, unroll
from fluxjax.nets.t5 import T5, T5Config
from fluxjax.nets.vae import Vae, VaeConfig
from fluxjax.nets.weight import AdaptedWeight, Dense, Weight

__all__ = [
    "T5",
    "AdaptedWeight",
    "Clip",
    "ClipConfig",
    "DegradedBlocks",
    "Dense",
    "Flux",
    "FluxConfig",
    "Prepared",
    "QuantizedWeight",
    "T5Config",
    "Unrolled",
    "Vae",
    "VaeConfig",
    "Weight",
    "leaf_names",
    "quantize",
    "unroll",
]
