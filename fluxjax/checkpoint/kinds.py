"""The four networks as files hold them: folders, key tables, configs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import equinox as eqx

from fluxjax.checkpoint import configs, folders, names as tables
from fluxjax.checkpoint.names import Dialect
from fluxjax.nets.clip import Clip, ClipConfig
from fluxjax.nets.flux import Flux, FluxConfig
from fluxjax.nets.t5 import T5, T5Config
from fluxjax.nets.vae import Vae, VaeConfig

OWN_METADATA = "fluxjax"
"""The key of a safetensors file's metadata under which fluxjax writes the layout, the networks' configs and their origin."""


@dataclass(frozen=True)
class Kind:
    """One of the four networks, and how files hold it.

    `folder`, `stem`: its folder in a diffusers checkpoint, and the name of the file there. `prefixes`: what its keys may
    begin with in a file. `from_json`, `to_json`: its config.json. `from_shapes`: its config, for a file without one.
    """

    name: str
    title: str
    folder: str
    stem: str
    network: type[eqx.Module]
    config: type
    dialects: tuple[Dialect, ...]
    prefixes: tuple[str, ...]
    from_json: Callable[[Mapping[str, Any]], Any]
    to_json: Callable[[Any], dict[str, Any]]
    from_shapes: Callable[[configs.Shapes], Any]


FLUX = Kind(
    name="flux",
    title="FLUX transformer",
    folder=folders.TRANSFORMER_FOLDER,
    stem="diffusion_pytorch_model",
    network=Flux,
    config=FluxConfig,
    dialects=(tables.FLUX_BFL, tables.FLUX_DIFFUSERS),
    prefixes=("model.diffusion_model.", "diffusion_model.", "transformer.", ""),
    from_json=configs.flux_from_json,
    to_json=configs.flux_to_json,
    from_shapes=configs.flux_from_shapes,
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
    from_shapes=configs.t5_from_shapes,
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
    from_shapes=configs.clip_from_shapes,
)
VAE = Kind(
    name="vae",
    title="VAE",
    folder=folders.VAE_FOLDER,
    stem="diffusion_pytorch_model",
    network=Vae,
    config=VaeConfig,
    dialects=(tables.vae_bfl(4), tables.VAE_DIFFUSERS),
    prefixes=("vae.", "first_stage_model.", ""),
    from_json=configs.vae_from_json,
    to_json=configs.vae_to_json,
    from_shapes=configs.vae_from_shapes,
)
KINDS: Mapping[str, Kind] = {kind.name: kind for kind in (FLUX, T5_XXL, CLIP, VAE)}
