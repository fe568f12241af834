"""The networks as immutable Equinox modules, and the layers that they are made of.

A network takes one example. `eqx.filter_vmap(network)` takes a batch, and
`eqx.filter_jit(eqx.filter_vmap(network))` compiles it with the weights as arguments. (`jax.vmap` of
a network is for code that is traced already: jitted by itself it would close over the weights.)
Blocks of one kind are stacked along a leading axis.
"""

from fluxjax.nets.chroma import Chroma
from fluxjax.nets.chroma_config import ChromaConfig
from fluxjax.nets.clip import Clip, ClipConfig
from fluxjax.nets.clip_vision import ClipVision, ClipVisionConfig
from fluxjax.nets.controlnet import ControlNet, PreparedControlNet
from fluxjax.nets.controlnet_config import ControlNetConfig
from fluxjax.nets.degraded import DegradedBlocks
from fluxjax.nets.flux import Flux
from fluxjax.nets.flux_config import FluxConfig
from fluxjax.nets.flux_control import ControlResiduals
from fluxjax.nets.flux_state import Prepared
from fluxjax.nets.grouped import GroupedWeight
from fluxjax.nets.image_prompt import ImagePrompt
from fluxjax.nets.ip_adapter import IpAdapter, IpAdapterConfig
from fluxjax.nets.packed import PackedWeight, decode_weights
from fluxjax.nets.quantized import QuantizedWeight
from fluxjax.nets.redux import Redux, ReduxConfig
from fluxjax.nets.rounding import quantize
from fluxjax.nets.siglip import Siglip, SiglipConfig
from fluxjax.nets.stack import Unrolled, leaf_names, unroll
from fluxjax.nets.t5 import T5, T5Config
from fluxjax.nets.transformer import AbstractTransformer
from fluxjax.nets.vae import Vae, VaeConfig
from fluxjax.nets.weight import AdaptedWeight, Dense, RowScaledWeight, Weight
from fluxjax.nets.widen import widen_input

__all__ = [
    "T5",
    "AbstractTransformer",
    "AdaptedWeight",
    "Chroma",
    "ChromaConfig",
    "Clip",
    "ClipConfig",
    "ClipVision",
    "ClipVisionConfig",
    "ControlNet",
    "ControlNetConfig",
    "ControlResiduals",
    "DegradedBlocks",
    "Dense",
    "Flux",
    "FluxConfig",
    "GroupedWeight",
    "ImagePrompt",
    "IpAdapter",
    "IpAdapterConfig",
    "PackedWeight",
    "Prepared",
    "PreparedControlNet",
    "QuantizedWeight",
    "Redux",
    "ReduxConfig",
    "RowScaledWeight",
    "Siglip",
    "SiglipConfig",
    "T5Config",
    "Unrolled",
    "Vae",
    "VaeConfig",
    "Weight",
    "decode_weights",
    "leaf_names",
    "quantize",
    "unroll",
    "widen_input",
]
