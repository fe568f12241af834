"""FLUX for JAX: networks, weights, and sampling as pure functions. Training lives in `fluxjax.train`."""

from jaxtyping import install_import_hook

import fluxjax.shapes  # noqa: F401 (the hook below names it)

__version__ = "0.1.0"

# Shapes and types of every call are checked as it is traced, so a mistake names the argument at fault.
with install_import_hook("fluxjax", "fluxjax.shapes.checked"):
    from fluxjax.checkpoint.convert import convert_weights
    from fluxjax.checkpoint.defaults import load_defaults
    from fluxjax.checkpoint.inspect import inspect_weights
    from fluxjax.checkpoint.locate import download
    from fluxjax.checkpoint.safetensors import WeightsError
    from fluxjax.devices.mesh import make_mesh
    from fluxjax.devices.offload import fetch, offload, residency
    from fluxjax.devices.shard import on_mesh, shard
    from fluxjax.devices.specs import shardings
    from fluxjax.devices.stream import stream_blocks
    from fluxjax.devices.vae_rows import split_vae_rows
    from fluxjax.flow.exponential import DEIS2, RES2M, RES2S, DPMpp2M, DPMpp2S, UniPC2
    from fluxjax.flow.guidance import ClassifierFree, Guided, Projected, WeakModel, ZeroStar
    from fluxjax.flow.ode import sample_ode
    from fluxjax.flow.paths import (
        STRAIGHT,
        CustomPath,
        Discrete,
        VarianceExploding,
        VariancePreserving,
        as_velocity,
        convert_prediction,
        estimates,
    )
    from fluxjax.flow.runge_kutta import AB2, RK4, Euler, Heun, Midpoint
    from fluxjax.flow.sample import Sample, sample, stream
    from fluxjax.flow.step import Step, StochasticStep
    from fluxjax.flow.stochastic import (
        DDIM,
        ERSDE2,
        Churn,
        DPMpp2MSDE,
        Renoise,
        ReverseSDE,
        ancestral,
    )
    from fluxjax.flow.times import (
        beta_times,
        custom_times,
        exponential_times,
        flow_times,
        karras_times,
        linear_quadratic_times,
        resolution_mu,
        static_times,
        time_shift,
        uniform_times,
    )
    from fluxjax.flow.velocity import StatefulVelocity
    from fluxjax.generate.cache import CachedFlux, FirstBlock, TeaCache
    from fluxjax.generate.draw import text_to_image
    from fluxjax.generate.image import read_image, write_png
    from fluxjax.generate.latents import (
        image_ids,
        initial_noise,
        pack_latents,
        seed_key,
        unpack_latents,
    )
    from fluxjax.generate.load import (
        Models,
        activation_dtype,
        load_clip,
        load_flux,
        load_models,
        load_t5,
        load_tokenizers,
        load_vae,
    )
    from fluxjax.generate.plots import plot_errors, plot_times
    from fluxjax.generate.preview import Preview, fit_preview
    from fluxjax.generate.save import save, save_models
    from fluxjax.generate.tokens import Tokenizers, tokenize
    from fluxjax.kernels.attention import Attention, attention, select_attention
    from fluxjax.kernels.blocks import BlockSizes
    from fluxjax.kernels.guiding import Nag, isolated_attention
    from fluxjax.lora.attach import attach
    from fluxjax.lora.init import init_lora, trainable
    from fluxjax.lora.merge import merge, unmerge
    from fluxjax.lora.read import Lora, read_lora
    from fluxjax.lora.write import extract_lora, write_lora
    from fluxjax.nets.clip import Clip, ClipConfig
    from fluxjax.nets.flux import DegradedBlocks, Flux, FluxConfig, Prepared
    from fluxjax.nets.quantized import quantize
    from fluxjax.nets.stack import unroll
    from fluxjax.nets.t5 import T5, T5Config
    from fluxjax.nets.vae import Vae, VaeConfig
    from fluxjax.zoo import ZOO, Defaults

__all__ = [
    "AB2",
    "DDIM",
    "DEIS2",
    "ERSDE2",
    "RES2M",
    "RES2S",
    "RK4",
    "STRAIGHT",
    "T5",
    "ZOO",
    "Attention",
    "BlockSizes",
    "CachedFlux",
    "Churn",
    "ClassifierFree",
    "Clip",
    "ClipConfig",
    "CustomPath",
    "DPMpp2M",
    "DPMpp2MSDE",
    "DPMpp2S",
    "Defaults",
    "Discrete",
    "Euler",
    "FirstBlock",
    "Flux",
    "FluxConfig",
    "Guided",
    "Heun",
    "Lora",
    "Midpoint",
    "Models",
    "Nag",
    "Prepared",
    "Preview",
    "Projected",
    "StatefulVelocity",
    "Renoise",
    "ReverseSDE",
    "Sample",
    "Step",
    "StochasticStep",
    "T5Config",
    "TeaCache",
    "Tokenizers",
    "UniPC2",
    "Vae",
    "VaeConfig",
    "VarianceExploding",
    "VariancePreserving",
    "WeakModel",
    "DegradedBlocks",
    "WeightsError",
    "ZeroStar",
    "activation_dtype",
    "ancestral",
    "as_velocity",
    "attach",
    "attention",
    "beta_times",
    "convert_prediction",
    "convert_weights",
    "custom_times",
    "download",
    "estimates",
    "exponential_times",
    "extract_lora",
    "fetch",
    "fit_preview",
    "flow_times",
    "image_ids",
    "init_lora",
    "initial_noise",
    "inspect_weights",
    "isolated_attention",
    "karras_times",
    "linear_quadratic_times",
    "load_clip",
    "load_defaults",
    "load_flux",
    "load_models",
    "load_t5",
    "load_tokenizers",
    "load_vae",
    "make_mesh",
    "merge",
    "offload",
    "on_mesh",
    "pack_latents",
    "plot_errors",
    "plot_times",
    "quantize",
    "read_image",
    "read_lora",
    "residency",
    "resolution_mu",
    "sample",
    "sample_ode",
    "save",
    "save_models",
    "seed_key",
    "select_attention",
    "shard",
    "shardings",
    "static_times",
    "stream",
    "stream_blocks",
    "text_to_image",
    "tiled",
    "time_shift",
    "tokenize",
    "trainable",
    "uniform_times",
    "unmerge",
    "unpack_latents",
    "unroll",
    "write_lora",
    "write_png",
]
