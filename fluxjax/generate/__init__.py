"""From prompts to images: text, conditioning, drawing, images; loading by name."""

from fluxjax.generate.autoencode import decode, encode
from fluxjax.generate.cache import CachedFlux, FirstBlock, StepCache, TeaCache
from fluxjax.generate.compare import compare
from fluxjax.generate.draw import denoise, text_to_image
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
from fluxjax.generate.samplers import INTEGRATORS, RULES, TIMERS, integrator, timer
from fluxjax.generate.save import save, save_models
from fluxjax.generate.text import encode_text, prompt_ids
from fluxjax.generate.tokens import Tokenizers, tokenize

__all__ = [
    "INTEGRATORS",
    "RULES",
    "TIMERS",
    "CachedFlux",
    "FirstBlock",
    "Models",
    "Preview",
    "StepCache",
    "TeaCache",
    "Tokenizers",
    "activation_dtype",
    "compare",
    "decode",
    "denoise",
    "encode",
    "encode_text",
    "fit_preview",
    "image_ids",
    "initial_noise",
    "integrator",
    "load_clip",
    "load_flux",
    "load_models",
    "load_t5",
    "load_tokenizers",
    "load_vae",
    "pack_latents",
    "plot_errors",
    "plot_times",
    "prompt_ids",
    "read_image",
    "save",
    "save_models",
    "seed_key",
    "text_to_image",
    "timer",
    "tokenize",
    "unpack_latents",
    "write_png",
]
