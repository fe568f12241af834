"""Latents of diffusers' img2img and inpainting pipelines, from the same noise and encoded image."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from reference import FLOAT32_BOUND, normal, perturbed, relative_error, to_torch

from fluxjax import Euler, image_ids, pack_latents
from fluxjax.checkpoint.shipped import tiny_folder
from fluxjax.flow import Inpaint, add_noise, partial_times, sample, sdedit, start_time
from fluxjax.generate.conditioning import Conditioning
from fluxjax.generate.load import load_flux
from fluxjax.generate.samplers import model_times
from fluxjax.generate.velocity import flux_velocity

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

STEPS, GUIDANCE, TXT_TOKENS = 10, 3.5, 5
CONFIG = dict(
    num_layers=1,
    num_single_layers=2,
    num_attention_heads=3,
    attention_head_dim=32,
    axes_dims_rope=(8, 12, 12),
    joint_attention_dim=40,
    pooled_projection_dim=24,
    guidance_embeds=True,
    in_channels=64,
)
SIZES = [(128, 128), (96, 160)]
TXT, VEC = normal(TXT_TOKENS, 40, seed=1), normal(24, seed=2)


@pytest.fixture(scope="module")
def transformers(tmp_path_factory):
    """A transformer of random weights, theirs and ours."""
    torch.manual_seed(0)
    theirs = perturbed(diffusers.FluxTransformer2DModel(**CONFIG))
    folder = tmp_path_factory.mktemp("flux")
    theirs.save_pretrained(folder)
    return theirs, load_flux(folder, dtype="float32")


@pytest.fixture(scope="module")
def pipelines(transformers):
    theirs, _ = transformers
    first = diffusers.FluxImg2ImgPipeline.from_pretrained(
        tiny_folder(), transformer=theirs, torch_dtype=torch.float32
    )
    both = {"img2img": first, "inpaint": diffusers.FluxInpaintPipeline(**first.components)}
    for pipeline in both.values():
        pipeline.set_progress_bar_config(disable=True)
    return both


def run_theirs(pipeline, height, width, strength, **inputs):
    """Return the final latents of a pipeline, which draws its noise from the seed 7."""
    return pipeline(
        prompt_embeds=to_torch(TXT)[None],
        pooled_prompt_embeds=to_torch(VEC)[None],
        height=height,
        width=width,
        strength=strength,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
        **inputs,
    ).images[0]


def latents(height, width):
    """Return the encoded image and the noise that the pipelines draw, [16, rows, columns]."""
    shape = (16, height // 8, width // 8)
    noise = torch.randn((1, *shape), generator=torch.Generator().manual_seed(7))[0]
    return normal(*shape, seed=height), noise.numpy()


def velocity_of(flux, height, width):
    conditioning = Conditioning(
        jnp.asarray(TXT), jnp.asarray(VEC), image_ids(height, width), jnp.float32(GUIDANCE)
    )
    return flux_velocity(flux, conditioning)


def schedule(tiny, height, width):
    return model_times(tiny.defaults, STEPS, height, width)


# A step's rounding is passed on by the next, so a few of them add up.
BOUND = 3 * FLOAT32_BOUND


@pytest.mark.parametrize("strength", [0.6, 0.3])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_sdedit_gives_the_latents_of_their_img2img(
    transformers, pipelines, tiny, height, width, strength
):
    _, flux = transformers
    image, noise = latents(height, width)
    their_image = to_torch(image)[None]
    expected = run_theirs(pipelines["img2img"], height, width, strength, image=their_image)
    times = partial_times(schedule(tiny, height, width), strength)
    packed = pack_latents(image), pack_latents(noise)
    ours = eqx.filter_jit(sdedit)(velocity_of(flux, height, width), *packed, times).x
    assert relative_error(ours, expected) <= BOUND


def pixel_mask(height, width):
    """Return a mask of 0 and 1 in pixels, of a block that is not aligned to tokens."""
    mask = np.zeros((height, width), np.float32)
    mask[24:72, 40:88] = 1
    return mask


@pytest.mark.parametrize("strength", [0.6, 0.3, 1.0])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_one_noise_gives_the_latents_of_their_inpainting(
    transformers, pipelines, tiny, height, width, strength
):
    _, flux = transformers
    image, noise = latents(height, width)
    mask = pixel_mask(height, width)
    expected = run_theirs(
        pipelines["inpaint"],
        height,
        width,
        strength,
        image=to_torch(image)[None],
        mask_image=to_torch(mask)[None, None],
        masked_image_latents=to_torch(image)[None],
    )
    # Theirs is resized to the nearest pixel of each cell.
    cells = np.broadcast_to(mask[::8, ::8], image.shape)
    times = schedule(tiny, height, width)
    image, noise, cells = (jnp.asarray(pack_latents(part)) for part in (image, noise, cells))
    begin = add_noise(image, noise, start_time(times, strength))
    step = Inpaint(Euler(), image, cells, noise)
    velocity, times = velocity_of(flux, height, width), partial_times(times, strength)
    ours = eqx.filter_jit(sample)(velocity, begin, times, step=step)
    assert relative_error(ours.x, expected) <= BOUND
    kept = np.asarray(cells) == 0
    np.testing.assert_array_equal(np.asarray(ours.x)[kept], np.asarray(image)[kept])
