"""The shipped model through diffusers' own pipeline, from the same noise, to the same image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import FLOAT32_BOUND, relative_error, to_torch

import fluxjax
from fluxjax.checkpoint.shipped import tiny_folder
from fluxjax.generate.autoencode import decode
from fluxjax.generate.draw import denoise
from fluxjax.generate.image_batch import Recipe
from fluxjax.generate.prompt_batch import prompt_batch
from fluxjax.generate.samplers import model_times
from fluxjax.generate.text import encode_text, prompt_ids

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

PROMPT = "a large red star above a small blue ring on a beige background"
STEPS, GUIDANCE = 20, 3.5


@pytest.fixture(scope="module")
def pipeline():
    pipeline = diffusers.FluxPipeline.from_pretrained(tiny_folder(), torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def encoded(tiny, prompt):
    ids = prompt_ids(tiny.tokenizers, [prompt], max_length=tiny.defaults.max_length)
    return encode_text(tiny.clip, tiny.t5, ids, dtype=jnp.float32)


def test_both_encode_a_prompt_alike(pipeline, tiny):
    txt, vec, _ = pipeline.encode_prompt(PROMPT, None, max_sequence_length=tiny.defaults.max_length)
    ours = encoded(tiny, PROMPT)
    assert relative_error(ours.txt, txt) <= FLOAT32_BOUND
    assert relative_error(ours.vec, vec) <= FLOAT32_BOUND


@pytest.mark.parametrize(("height", "width"), [(128, 128), (96, 160)])
def test_both_draw_the_same_image(pipeline, tiny, height, width):
    noise = fluxjax.initial_noise(jax.random.key(3), height, width)
    theirs = pipeline(
        PROMPT,
        height=height,
        width=width,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        max_sequence_length=tiny.defaults.max_length,
        latents=to_torch(fluxjax.pack_latents(noise))[None],
        output_type="np",
    ).images[0]
    times = model_times(tiny.defaults, STEPS, height, width)
    batch = prompt_batch(
        encoded(tiny, PROMPT),
        None,
        noise=noise[None],
        keys=None,
        distilled=jnp.float32(GUIDANCE),
    )
    latent = denoise(tiny.flux, batch, Recipe(times))
    ours = (np.asarray(decode(tiny.vae, latent, dtype=jnp.float32))[0] + 1) / 2
    assert -10 * np.log10(np.mean(np.square(ours - theirs))) >= 45
