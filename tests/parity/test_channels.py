"""FLUX.1 Fill, Canny, Depth and Kontext through diffusers' pipelines, from the same noise."""

import jax.numpy as jnp
import numpy as np
import pytest
from diffusers import (
    FluxControlPipeline,
    FluxFillPipeline,
    FluxKontextPipeline,
    FluxTransformer2DModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from reference import FLOAT32_BOUND, normal, perturbed, relative_error, to_torch

import fluxjax
from fluxjax import Recipe, load_flux
from fluxjax.checkpoint.shipped import tiny_folder
from fluxjax.generate import (
    TextStates,
    control_condition,
    denoise,
    fill_condition,
    kontext_condition,
    model_times,
    prompt_batch,
)

CONFIG = {
    "patch_size": 1,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 8,
    "guidance_embeds": True,
    "axes_dims_rope": [4, 6, 6],
}
STEPS, GUIDANCE = 3, 7.0
# Each step adds a network's error, and the reference rounds 1000 t, of which it takes sines.
BOUND = STEPS * FLOAT32_BOUND
SIZES = [(32, 48), (80, 48)]
"""In tokens 2x3 and 5x3."""
WITHOUT_TEXT = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))


@pytest.fixture(autouse=True)
def mean_of_posterior(monkeypatch):
    """diffusers draws a sample of the encoder's posterior, where BFL and we take the mean."""
    mean = DiagonalGaussianDistribution.mode
    monkeypatch.setattr(
        DiagonalGaussianDistribution, "sample", lambda self, generator=None: mean(self)
    )


def networks(folder, features):
    """Return our transformer and diffusers', which read so many features beside the latent."""
    config = CONFIG | {"in_channels": 64 + features, "out_channels": 64}
    theirs = perturbed(FluxTransformer2DModel.from_config(config))
    theirs.save_pretrained(folder / "model")
    return load_flux(folder / "model"), theirs


def pipeline(kind, transformer):
    made = kind.from_pretrained(tiny_folder(), transformer=transformer, **WITHOUT_TEXT)
    made.set_progress_bar_config(disable=True)
    return made


def picture(height, width, seed=0):
    return np.clip(0.5 * normal(height, width, 3, seed=seed), -1, 1)


def inputs(height, width):
    """Return noise and text states, and the arguments that pass them to a pipeline."""
    noise = fluxjax.initial_noise(fluxjax.generate.seed_key(3), height, width)
    states = TextStates(jnp.asarray(normal(1, 5, 24, seed=1)), jnp.asarray(normal(1, 8, seed=2)))
    arguments = {
        "prompt_embeds": to_torch(states.txt),
        "pooled_prompt_embeds": to_torch(states.vec),
        "latents": to_torch(fluxjax.pack_latents(noise))[None],
        "height": height,
        "width": width,
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "output_type": "latent",
    }
    return noise, states, arguments


def ours(tiny, flux, noise, states, condition):
    """Return the packed latent that we draw."""
    height, width = 8 * noise.shape[1], 8 * noise.shape[2]
    batch = prompt_batch(
        states,
        None,
        noise=noise[None],
        keys=None,
        distilled=jnp.float32(GUIDANCE),
        conditions=[condition],
    )
    recipe = Recipe(model_times(tiny.defaults, STEPS, height, width))
    return fluxjax.pack_latents(denoise(flux, batch, recipe)[0])


def as_tensor(image):
    """Return an image of [-1, 1] as [1, 3, height, width] of [0, 1]."""
    return to_torch((image + 1) / 2).permute(2, 0, 1)[None]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_fill(tiny, tmp_path, height, width):
    flux, theirs = networks(tmp_path, 320)
    noise, states, arguments = inputs(height, width)
    image = picture(height, width)
    mask = (np.random.default_rng(4).uniform(size=(height, width)) < 0.3).astype(np.float32)
    expected = pipeline(FluxFillPipeline, theirs)(
        image=as_tensor(image), mask_image=to_torch(mask)[None, None], **arguments
    ).images[0]
    condition = fill_condition(tiny.vae, image, mask, dtype=jnp.float32)
    found = ours(tiny, flux, noise, states, condition)
    assert relative_error(found, expected) <= BOUND
    other = fill_condition(tiny.vae, image, mask[::-1], dtype=jnp.float32)
    assert relative_error(ours(tiny, flux, noise, states, other), expected) > 1e-3


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_control(tiny, tmp_path, height, width):
    flux, theirs = networks(tmp_path, 64)
    noise, states, arguments = inputs(height, width)
    image = picture(height, width)
    control = to_torch(image).permute(2, 0, 1)[None]
    expected = pipeline(FluxControlPipeline, theirs)(control_image=control, **arguments).images[0]
    condition = control_condition(tiny.vae, image, dtype=jnp.float32)
    found = ours(tiny, flux, noise, states, condition)
    assert relative_error(found, expected) <= BOUND


@pytest.mark.parametrize(
    ("height", "width", "reference"), [(32, 48, (32, 48)), (80, 48, (48, 64)), (48, 48, (80, 32))]
)
def test_kontext_with_a_reference_of_the_same_or_of_another_size(
    tiny, tmp_path, height, width, reference
):
    flux, theirs = networks(tmp_path, 0)
    noise, states, arguments = inputs(height, width)
    image = picture(*reference)
    expected = pipeline(FluxKontextPipeline, theirs)(
        image=as_tensor(image), max_area=height * width, _auto_resize=False, **arguments
    ).images[0]
    condition = kontext_condition(tiny.vae, [image], dtype=jnp.float32)
    found = ours(tiny, flux, noise, states, condition)
    assert relative_error(found, expected) <= BOUND


def test_kontext_chooses_the_same_sizes():
    from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

    rng = np.random.default_rng(0)
    for height, width in rng.integers(64, 4096, (200, 2)):
        nearest = min(
            PREFERRED_KONTEXT_RESOLUTIONS, key=lambda s: (abs(width / height - s[0] / s[1]), s)
        )
        assert fluxjax.generate.preferred_size(int(height), int(width)) == nearest[::-1]
