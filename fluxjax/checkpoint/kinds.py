"""The networks as files hold them: folders, key tables, configs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic

from fluxjax.checkpoint import (
    configs,
    folders,
    image_prompt_configs,
    image_prompt_names,
    names as tables,
    shape_configs,
)
from fluxjax.checkpoint.chroma_names import CHROMA_BFL, CHROMA_DIFFUSERS
from fluxjax.checkpoint.config_fields import JsonObject
from fluxjax.checkpoint.controlnet_configs import (
    controlnet_from_json,
    controlnet_from_shapes,
    controlnet_to_json,
    controlnet_variant,
)
from fluxjax.checkpoint.controlnet_names import CONTROLNET_DIFFUSERS, CONTROLNET_XLABS
from fluxjax.checkpoint.dialect import Dialect
from fluxjax.checkpoint.own_configs import Config, NetworkConfig
from fluxjax.nets.chroma import Chroma
from fluxjax.nets.chroma_config import ChromaConfig
from fluxjax.nets.clip import Clip, ClipConfig
from fluxjax.nets.clip_vision import ClipVision, ClipVisionConfig
from fluxjax.nets.controlnet import ControlNet
from fluxjax.nets.controlnet_config import ControlNetConfig
from fluxjax.nets.flux import Flux
from fluxjax.nets.flux_config import FluxConfig
from fluxjax.nets.ip_adapter import IpAdapter, IpAdapterConfig
from fluxjax.nets.redux import Redux, ReduxConfig
from fluxjax.nets.siglip import Siglip, SiglipConfig
from fluxjax.nets.t5 import T5, T5Config
from fluxjax.nets.vae import Vae, VaeConfig

OWN_METADATA = "fluxjax"
"""The key in a safetensors file's metadata under which fluxjax writes what the file holds.

It is the layout, the networks' configs, and the files that they come from.
"""

Network = Flux | Chroma | T5 | Clip | Vae | ControlNet | Siglip | ClipVision | Redux | IpAdapter
"""One of the networks, with arrays or with shapes as leaves."""


@dataclass(frozen=True)
class Kind(Generic[Config]):
    """One of the networks, and how files hold it.

    `title`: what messages call it. `folder`, `stem`: its folder in a diffusers checkpoint, and the
    name of the file there. `dialects`: how its keys may be named; of the transformer's and the
    VAE's, BFL's is first and diffusers' second. `prefixes`: what its keys may begin with in a file
    of several networks; ComfyUI's is first. `from_json`, `to_json`: read and write its config.json.
    `from_shapes`: makes its config for a file without one. `at_root`: whether a repository on the
    hub holds it in its root, and not in the folder. `stands_for`: the network in whose place it is,
    and under whose name adapters change it; "" for none.
    """

    name: str
    title: str
    folder: str
    stem: str
    network: type[Network]
    config: type[Config]
    dialects: tuple[Dialect, ...]
    prefixes: tuple[str, ...]
    from_json: Callable[[JsonObject], Config]
    to_json: Callable[[Config], JsonObject]
    from_shapes: Callable[[shape_configs.Shapes], Config]
    at_root: bool = False
    stands_for: str = ""

    @property
    def role(self) -> str:
        """The name under which adapters change it."""
        return self.stands_for or self.name

    @property
    def hub_folder(self) -> str:
        """Its folder in a repository on the hub; "" for the root."""
        return "" if self.at_root else self.folder


FLUX = Kind(
    name="flux",
    title="FLUX transformer",
    folder=folders.TRANSFORMER_FOLDER,
    stem="diffusion_pytorch_model",
    network=Flux,
    config=FluxConfig,
    dialects=(tables.FLUX_BFL, tables.FLUX_DIFFUSERS),
    # ComfyUI's and Stable Diffusion's, then those of other programs; most files have none.
    prefixes=("model.diffusion_model.", "diffusion_model.", "transformer.", ""),
    from_json=configs.flux_from_json,
    to_json=configs.flux_to_json,
    from_shapes=shape_configs.flux_from_shapes,
)
CHROMA_TRANSFORMER = Kind(
    name="chroma",
    title="Chroma transformer",
    folder=folders.TRANSFORMER_FOLDER,
    stem="diffusion_pytorch_model",
    network=Chroma,
    config=ChromaConfig,
    dialects=(CHROMA_BFL, CHROMA_DIFFUSERS),
    prefixes=FLUX.prefixes,
    from_json=configs.chroma_from_json,
    to_json=configs.chroma_to_json,
    from_shapes=shape_configs.chroma_from_shapes,
    stands_for="flux",
)
T5_XXL = Kind(
    name="t5",
    title="T5 encoder",
    folder=folders.T5_FOLDER,
    stem="model",
    network=T5,
    config=T5Config,
    dialects=(tables.T5_TRANSFORMERS, tables.T5_LLAMA),
    prefixes=("text_encoders.t5xxl.transformer.", ""),
    from_json=configs.t5_from_json,
    to_json=configs.t5_to_json,
    from_shapes=shape_configs.t5_from_shapes,
)
CLIP = Kind(
    name="clip",
    title="CLIP text encoder",
    folder=folders.CLIP_FOLDER,
    stem="model",
    network=Clip,
    config=ClipConfig,
    dialects=(tables.CLIP_TRANSFORMERS,),
    prefixes=("text_encoders.clip_l.transformer.", ""),
    from_json=configs.clip_from_json,
    to_json=configs.clip_to_json,
    from_shapes=shape_configs.clip_from_shapes,
)
VAE = Kind(
    name="vae",
    title="VAE",
    folder=folders.VAE_FOLDER,
    stem="diffusion_pytorch_model",
    network=Vae,
    config=VaeConfig,
    # Whatever the number of levels here, `dialect_for` makes BFL's table for that of the config.
    dialects=(tables.vae_bfl(4), tables.VAE_DIFFUSERS),
    prefixes=("vae.", "first_stage_model.", ""),
    from_json=configs.vae_from_json,
    to_json=configs.vae_to_json,
    from_shapes=shape_configs.vae_from_shapes,
)
SIGLIP = Kind(
    name="siglip",
    title="SigLIP vision encoder",
    folder=folders.IMAGE_ENCODER_FOLDER,
    stem="model",
    network=Siglip,
    config=SiglipConfig,
    dialects=(image_prompt_names.SIGLIP_TRANSFORMERS,),
    prefixes=("clip_vision.", ""),
    from_json=image_prompt_configs.siglip_from_json,
    to_json=image_prompt_configs.siglip_to_json,
    from_shapes=image_prompt_configs.siglip_from_shapes,
)
CLIP_VISION = Kind(
    name="clip_vision",
    title="CLIP vision encoder",
    folder=folders.IMAGE_ENCODER_FOLDER,
    stem="model",
    network=ClipVision,
    config=ClipVisionConfig,
    dialects=(image_prompt_names.CLIP_VISION_TRANSFORMERS,),
    prefixes=("clip_vision.", ""),
    from_json=image_prompt_configs.clip_vision_from_json,
    to_json=image_prompt_configs.clip_vision_to_json,
    from_shapes=image_prompt_configs.clip_vision_from_shapes,
)
REDUX = Kind(
    name="redux",
    title="Redux embedder",
    folder=folders.IMAGE_EMBEDDER_FOLDER,
    stem="diffusion_pytorch_model",
    network=Redux,
    config=ReduxConfig,
    dialects=(image_prompt_names.REDUX_BFL,),
    prefixes=("style_model.", ""),
    from_json=image_prompt_configs.redux_from_json,
    to_json=image_prompt_configs.redux_to_json,
    from_shapes=image_prompt_configs.redux_from_shapes,
)
IP_ADAPTER = Kind(
    name="ip_adapter",
    title="IP-Adapter",
    folder=folders.IP_ADAPTER_FOLDER,
    stem="ip_adapter",
    network=IpAdapter,
    config=IpAdapterConfig,
    dialects=(image_prompt_names.IP_ADAPTER_XLABS, image_prompt_names.IP_ADAPTER_INSTANTX),
    prefixes=("ip_adapter.", ""),
    from_json=image_prompt_configs.ip_adapter_from_json,
    to_json=image_prompt_configs.ip_adapter_to_json,
    from_shapes=image_prompt_configs.ip_adapter_from_shapes,
    at_root=True,
)
CONTROLNET = Kind(
    name="controlnet",
    title="ControlNet",
    folder=folders.CONTROLNET_FOLDER,
    stem="diffusion_pytorch_model",
    network=ControlNet,
    config=ControlNetConfig,
    dialects=(CONTROLNET_XLABS, CONTROLNET_DIFFUSERS),
    prefixes=("controlnet.", ""),
    from_json=controlnet_from_json,
    to_json=controlnet_to_json,
    from_shapes=controlnet_from_shapes,
    at_root=True,
)
AnyKind = Kind[Any]
"""A kind of network, whichever it is."""
_ALL = (
    FLUX,
    CHROMA_TRANSFORMER,
    T5_XXL,
    CLIP,
    VAE,
    CONTROLNET,
    SIGLIP,
    CLIP_VISION,
    REDUX,
    IP_ADAPTER,
)
KINDS: Mapping[str, AnyKind] = {kind.name: kind for kind in _ALL}
"""All kinds, by name."""


def kind_of_network(network: Network) -> AnyKind:
    """Return the kind of a network."""
    for kind in KINDS.values():
        if isinstance(network, kind.network):
            return kind
    raise TypeError(f"{type(network).__name__} is not a network of FLUX.")


def dialect_for(dialect: Dialect, config: NetworkConfig) -> Dialect:
    """Return a dialect for a network of this config.

    BFL's names of a VAE depend on it, since they number the decoder's levels from the other end;
    and the names of an IP-Adapter, which are those of its maker.
    """
    if isinstance(config, IpAdapterConfig) and dialect.name in ("xlabs", "instantx"):
        return IP_ADAPTER.dialects[1 if config.joins_attention else 0]
    if dialect.name == "bfl" and isinstance(config, VaeConfig):
        return tables.vae_bfl(len(config.channels))
    return dialect


_VARIANTS_BY_CHANNELS = {384: "Fill", 128: "Canny/Depth"}


def flux_variant(config: NetworkConfig) -> str | None:
    """Return which of the published networks a config is of; None for the encoders and the VAE.

    It is "dev" (which Krea and Kontext share), "schnell" (which models share that were trained from
    it, or without a distilled scale), "lite-8B", "Fill" or "Canny/Depth", followed by ", of another
    size" for other widths or depths. Of Chroma it is "Chroma1", whose versions have one size.
    """
    if isinstance(config, ControlNetConfig):
        return controlnet_variant(config)
    if isinstance(config, ChromaConfig):
        return "Chroma1" if config == ChromaConfig.hd() else "Chroma1, of another size"
    if not isinstance(config, FluxConfig):
        return None
    if config == FluxConfig.lite():
        return "lite-8B"
    # Fill and Canny/Depth append the features of their condition to those of the image's tokens.
    if config.in_channels == FluxConfig().in_channels:
        name = "dev" if config.guidance_embed else "schnell"
    else:
        unknown = f"{config.in_channels} input features"
        name = _VARIANTS_BY_CHANNELS.get(config.in_channels, unknown)
    full_size = replace(
        FluxConfig(),
        in_channels=config.in_channels,
        guidance_embed=config.guidance_embed,
    )
    return name if config == full_size else f"{name}, of another size"
