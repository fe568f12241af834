"""A small Chroma of random weights, inputs that fit it, and a whole model around it."""

from dataclasses import replace

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from layouts import random_network
from small import draw

from fluxjax import Models
from fluxjax.generate.tokens import Tokenizers
from fluxjax.nets import Chroma, ChromaConfig
from fluxjax.zoo import ZOO

TEXT, IMAGE, LENGTH = 6, 6, 4
CONFIG = ChromaConfig(
    in_channels=64,
    out_channels=64,
    width=32,
    heads=2,
    double_depth=2,
    single_depth=3,
    mlp_width=128,
    context=12,
    rope_axes=(4, 6, 6),
    approximator_features=16,
    approximator_width=16,
    approximator_depth=2,
)
IDS = jnp.asarray(np.arange(IMAGE)[:, None] * np.float32([0, 1, 0]), jnp.float32)


def small_chroma(config: ChromaConfig = CONFIG) -> Chroma:
    """Return a network all of whose weights are random."""
    return random_network(Chroma, config, scale=0.2)


@eqx.filter_jit
def velocity(network, x, txt, length=None, attention=None, degraded=None):
    """Return the velocity at t = 0.5."""
    given = {"txt": txt, "txt_length": length, "img_ids": IDS}
    return network(x, 0.5, **given, attention=attention, degraded=degraded)


def inputs():
    """Return random image and text tokens."""
    return draw(IMAGE, CONFIG.in_channels, seed=1), draw(TEXT, CONFIG.context, seed=2)


def chroma_models(tiny: Models) -> Models:
    """Return a model of a random transformer, with the tiny model's T5, VAE and T5 tokenizer."""
    network = small_chroma(replace(CONFIG, context=tiny.t5.config.width))
    files = {}
    for name, content in tiny.tokenizers.files.items():
        folder, _, file = name.partition("/")
        if folder == "tokenizer_2":
            files[f"tokenizer/{file}"] = content
    defaults = replace(ZOO["chroma"].defaults, steps=2, height=32, width=48, max_length=16)
    tokenizers = Tokenizers(None, tiny.tokenizers.t5, files=files)
    return Models(tokenizers, None, tiny.t5, network, tiny.vae, defaults)
