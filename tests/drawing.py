"""Batches of the tiny model's images, as the drawing functions take them."""

import jax
import jax.numpy as jnp
from layouts import random_network

from fluxjax import Guidance, ImageBatch, Models, Recipe, flow_times
from fluxjax.flow import Euler
from fluxjax.generate import encode_text, prompt_batch, prompt_ids
from fluxjax.generate.latents import noise_batch, step_keys
from fluxjax.nets import Vae, VaeConfig

PROMPTS = ["a red star on white", "a blue ring on black", "a green cross left of a white heart"]
NEGATIVES = ["a blue ring on black", "", "a red circle"]
KEY = jax.random.key(0)
SMALL_VAE = VaeConfig(channels=(4, 4, 4, 4), groups=2, resnets=0, scale=1.0, shift=0.0)


def with_small_vae(models: Models) -> Models:
    """Return a model with a random VAE, which is compiled in half the time."""
    return models._replace(vae=random_network(Vae, SMALL_VAE, scale=0.5))


def encoded(models, texts, *, max_length=13, encode=encode_text, mesh=None):
    ids = prompt_ids(models.tokenizers, texts, max_length=max_length)
    return encode(models.clip, models.t5, ids, dtype=jnp.float32, mesh=mesh)


def batch_of(models, images, *, height=48, width=80, negative=False, step=Euler(), guidance=3.5):
    """Return a batch of images of the tiny model, each with a prompt of its own."""
    # All in one batch, so that the encoders are compiled once for all sizes of batches.
    texts = encoded(models, [*PROMPTS, *NEGATIVES])
    numbers = [number % len(PROMPTS) for number in range(images)]
    negatives = [number + len(PROMPTS) for number in numbers]
    noise = noise_batch(KEY, range(images), height, width, channels=16)
    return prompt_batch(
        texts.rows(numbers),
        texts.rows(negatives) if negative else None,
        noise=noise,
        keys=step_keys(KEY, range(images), step),
        distilled=None if guidance is None else jnp.float32(guidance),
    )


def recipe_of(steps=2, step=Euler(), attention=None, **guidance) -> Recipe:
    return Recipe(flow_times(steps), step, Guidance(**guidance), attention)


__all__ = [
    "KEY",
    "NEGATIVES",
    "PROMPTS",
    "ImageBatch",
    "batch_of",
    "encoded",
    "recipe_of",
    "with_small_vae",
]
