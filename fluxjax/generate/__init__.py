"""From prompts to images: text, conditioning, guided velocities, drawing; loading by name."""

from fluxjax.generate.autoencode import decode, encode
from fluxjax.generate.cache import CachedFlux, FirstBlock, StepCache, TeaCache
from fluxjax.generate.compare import Comparison, compare
from fluxjax.generate.conditioning import Conditioning, PreparedConditioning, ReferenceTokens
from fluxjax.generate.draw import (
    DrawHooks,
    DrawnBatch,
    DrawProgress,
    ImageBatch,
    Recipe,
    denoise,
    draw_batch,
)
from fluxjax.generate.image import read_image, write_png
from fluxjax.generate.latents import (
    image_ids,
    initial_noise,
    pack_latents,
    seed_key,
    unpack_latents,
)
from fluxjax.generate.load import (
    LoadOptions,
    Models,
    activation_dtype,
    load_clip,
    load_flux,
    load_models,
    load_network,
    load_t5,
    load_tokenizers,
    load_vae,
)
from fluxjax.generate.plots import plot_errors, plot_times
from fluxjax.generate.preview import Preview, fit_preview
from fluxjax.generate.prompted import DrawSettings, prompt_batch
from fluxjax.generate.samplers import (
    INTEGRATORS,
    RULES,
    TIMERS,
    integrator,
    model_times,
    step_cache,
    timer,
)
from fluxjax.generate.save import save, save_models
from fluxjax.generate.text import PromptIds, TextStates, encode_text, prompt_ids
from fluxjax.generate.text_to_image import text_to_image
from fluxjax.generate.times_file import read_times, write_times
from fluxjax.generate.tokens import Tokenizers, tokenize
from fluxjax.generate.velocity import Guidance, WeakNetwork, flux_velocity

__all__ = [
    "INTEGRATORS",
    "RULES",
    "TIMERS",
    "CachedFlux",
    "Comparison",
    "Conditioning",
    "DrawHooks",
    "DrawProgress",
    "DrawSettings",
    "DrawnBatch",
    "FirstBlock",
    "Guidance",
    "ImageBatch",
    "LoadOptions",
    "Models",
    "PreparedConditioning",
    "Preview",
    "PromptIds",
    "Recipe",
    "ReferenceTokens",
    "StepCache",
    "TeaCache",
    "TextStates",
    "Tokenizers",
    "WeakNetwork",
    "activation_dtype",
    "compare",
    "decode",
    "denoise",
    "draw_batch",
    "encode",
    "encode_text",
    "fit_preview",
    "flux_velocity",
    "image_ids",
    "initial_noise",
    "integrator",
    "load_clip",
    "load_flux",
    "load_models",
    "load_network",
    "load_t5",
    "load_tokenizers",
    "load_vae",
    "model_times",
    "pack_latents",
    "plot_errors",
    "plot_times",
    "prompt_batch",
    "prompt_ids",
    "read_image",
    "read_times",
    "save",
    "save_models",
    "seed_key",
    "step_cache",
    "text_to_image",
    "timer",
    "tokenize",
    "unpack_latents",
    "write_png",
    "write_times",
]
