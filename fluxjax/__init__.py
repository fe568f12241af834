"""FLUX for JAX: networks, weights, and sampling as pure functions. Training lives in `fluxjax.train`."""

from jaxtyping import install_import_hook

import fluxjax.shapes  # noqa: F401 (the hook below names it)

__version__ = "0.1.0"

# Shapes and types of every call are checked as it is traced, so a mistake names the argument at fault.
with install_import_hook("fluxjax", "fluxjax.shapes.checked"):
    from fluxjax.convert.files import WeightsError
    from fluxjax.generate import Models, activation_dtype, load_models, text_to_image
    from fluxjax.image import read_image, write_png
    from fluxjax.integrate import Euler, Step
    from fluxjax.kernels.attention import attention
    from fluxjax.latents import image_ids, initial_noise, pack_latents, unpack_latents
    from fluxjax.lora.attach import attach
    from fluxjax.lora.init import init_lora, trainable
    from fluxjax.lora.merge import merge, unmerge
    from fluxjax.lora.read import Lora, read_lora
    from fluxjax.lora.write import extract_lora, write_lora
    from fluxjax.nets.clip import Clip, ClipConfig
    from fluxjax.nets.flux import Flux, FluxConfig
    from fluxjax.nets.t5 import T5, T5Config
    from fluxjax.nets.vae import Vae, VaeConfig
    from fluxjax.sample import Sample, sample
    from fluxjax.schedule import flow_times, resolution_mu, time_shift
    from fluxjax.tokens import Tokenizers, tokenize
    from fluxjax.weights import convert_weights, inspect_weights
    from fluxjax.zoo import (
        ZOO,
        Defaults,
        download,
        load_clip,
        load_defaults,
        load_flux,
        load_t5,
        load_tokenizers,
        load_vae,
        save_folder,
    )

__all__ = [
    "T5",
    "ZOO",
    "Clip",
    "ClipConfig",
    "Defaults",
    "Euler",
    "Flux",
    "FluxConfig",
    "Lora",
    "Models",
    "Sample",
    "Step",
    "T5Config",
    "Tokenizers",
    "Vae",
    "VaeConfig",
    "WeightsError",
    "activation_dtype",
    "attach",
    "attention",
    "convert_weights",
    "download",
    "extract_lora",
    "flow_times",
    "image_ids",
    "init_lora",
    "initial_noise",
    "inspect_weights",
    "load_clip",
    "load_defaults",
    "load_flux",
    "load_models",
    "load_t5",
    "load_tokenizers",
    "load_vae",
    "merge",
    "pack_latents",
    "read_image",
    "read_lora",
    "resolution_mu",
    "sample",
    "save_folder",
    "text_to_image",
    "time_shift",
    "tokenize",
    "trainable",
    "unmerge",
    "unpack_latents",
    "write_lora",
    "write_png",
]
