"""ControlNets beside diffusers' classes and pipeline, and beside XLabs' formulas written out."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import FLOAT32_BOUND, normal, perturbed, relative_error, to_torch

import fluxjax
from fluxjax.checkpoint.shipped import tiny_folder
from fluxjax.flow import Euler
from fluxjax.generate import (
    ControlSettings,
    controlnet_condition,
    encode_text,
    load_controlnet,
    load_flux,
    prompt_batch,
    prompt_ids,
)
from fluxjax.generate.latents import image_ids

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "axes_dims_rope": (8, 12, 12),
    "joint_attention_dim": 24,
    "pooled_projection_dim": 16,
    "guidance_embeds": True,
    "in_channels": 64,
}
KINDS = {
    "Union": {"num_layers": 2, "num_single_layers": 3, "num_mode": 4},
    "Union-Pro 2.0": {"num_layers": 3, "num_single_layers": 0},
    "XLabs": {
        "num_layers": 2,
        "num_single_layers": 0,
        "conditioning_embedding_channels": 16,
        "patch_size": 2,
    },
}
TXT, VEC, T, GUIDANCE = normal(7, 24, seed=2), normal(16, seed=3), 0.5, 4.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("controlnet")


@pytest.fixture(scope="module")
def pairs(folder):
    """Each kind of reference, and ours of the same weights."""
    found = {}
    for number, (name, kind) in enumerate(KINDS.items()):
        theirs = perturbed(diffusers.FluxControlNetModel(**SIZES, **kind), seed=number)
        theirs.save_pretrained(folder / name)
        found[name] = theirs, load_controlnet(folder / name)
    return found


@pytest.fixture(scope="module")
def transformers(folder):
    """A transformer of 5 double and 7 single blocks, which no number of residuals divides."""
    config = {**SIZES, "num_layers": 5, "num_single_layers": 7}
    theirs = perturbed(diffusers.FluxTransformer2DModel(**config), seed=9)
    theirs.save_pretrained(folder / "transformer")
    return theirs, load_flux(folder / "transformer")


def condition_of(name, height, width):
    if name == "XLabs":
        return np.tanh(normal(height, width, 3, seed=4))
    return normal(height * width // 256, 64, seed=4)


def theirs_of(name, condition):
    """Return the condition and the mode as the reference takes them."""
    batch = to_torch(condition)[None]
    if name == "XLabs":
        return batch.permute(0, 3, 1, 2), None
    return batch, torch.tensor([[2]]) if name == "Union" else None


def inputs_of_theirs(x, height, width):
    return {
        "hidden_states": to_torch(x)[None],
        "encoder_hidden_states": to_torch(TXT)[None],
        "pooled_projections": to_torch(VEC)[None],
        "timestep": torch.tensor([T]),
        "img_ids": to_torch(image_ids(height, width)),
        "txt_ids": torch.zeros(len(TXT), 3),
        "guidance": torch.tensor([GUIDANCE]),
        "return_dict": False,
    }


@eqx.filter_jit
def run_ours(net, x, condition, mode, ids):
    given = {"txt": TXT, "vec": VEC, "img_ids": ids, "guidance": GUIDANCE}
    return net(x, T, condition=condition, mode=mode, **given)


@eqx.filter_jit
def run_flux(flux, x, ids, control):
    given = {"txt": TXT, "vec": VEC, "img_ids": ids, "guidance": GUIDANCE}
    return flux(x, T, **given, control=control)


@pytest.mark.parametrize(("height", "width"), [(48, 80), (32, 64)])
@pytest.mark.parametrize("name", KINDS)
def test_residuals_and_what_they_do_to_the_velocity(pairs, transformers, name, height, width):
    theirs, ours = pairs[name]
    their_flux, our_flux = transformers
    x, condition = normal(height * width // 256, 64, seed=1), condition_of(name, height, width)
    inputs = inputs_of_theirs(x, height, width)
    their_condition, their_mode = theirs_of(name, condition)
    with torch.no_grad():
        double, single = theirs(
            controlnet_cond=their_condition, controlnet_mode=their_mode, **inputs
        )
        velocity = their_flux(
            **inputs,
            controlnet_block_samples=double,
            controlnet_single_block_samples=single,
            controlnet_blocks_repeat=name == "XLabs",
        )[0]
    mode = jnp.int32(2) if name == "Union" else None
    ids = image_ids(height, width)
    residuals = run_ours(ours, x, condition, mode, ids)
    assert relative_error(residuals.double, torch.cat(double)) <= FLOAT32_BOUND
    if single is not None:
        assert relative_error(residuals.single, torch.cat(single)) <= FLOAT32_BOUND
    found = run_flux(our_flux, x, ids, (residuals,))
    assert relative_error(found, velocity[0]) <= FLOAT32_BOUND


def test_several_are_added_up(pairs, transformers):
    (theirs, ours), height, width = pairs["Union"], 48, 80
    x = normal(15, 64, seed=1)
    conditions = [normal(15, 64, seed=seed) for seed in (4, 5)]
    modes, scales = [1, 3], [0.4, 0.7]
    both = diffusers.FluxMultiControlNetModel([theirs, theirs])
    inputs = inputs_of_theirs(x, height, width)
    with torch.no_grad():
        double, single = both(
            controlnet_cond=[to_torch(one)[None] for one in conditions],
            controlnet_mode=[torch.tensor([mode]) for mode in modes],
            conditioning_scale=scales,
            **inputs,
        )
        velocity = transformers[0](
            **inputs, controlnet_block_samples=double, controlnet_single_block_samples=single
        )[0]
    residuals = []
    for condition, mode, scale in zip(conditions, modes, scales, strict=True):
        one = run_ours(ours, x, condition, jnp.int32(mode), image_ids(height, width))
        residuals.append(one * jnp.float32(scale))
    found = run_flux(transformers[1], x, image_ids(height, width), tuple(residuals))
    assert relative_error(found, velocity[0]) <= FLOAT32_BOUND


# The whole pipeline, of the shipped model.

PROMPT, NEGATIVE = "a red star on white", "a blue ring on black"
HEIGHT, WIDTH, STEPS = 48, 80, 5


@pytest.fixture(scope="module")
def tiny_nets(folder):
    """ControlNets of the shipped model's width, theirs and ours, and the one that ships with it."""
    sizes = dict(diffusers.FluxTransformer2DModel.load_config(tiny_folder() / "transformer"))
    names = ("num_attention_heads", "attention_head_dim", "axes_dims_rope", "joint_attention_dim")
    names += ("pooled_projection_dim", "guidance_embeds", "in_channels")
    found = {}
    for name, kind in KINDS.items():
        config = {key: sizes[key] for key in names}
        theirs = perturbed(diffusers.FluxControlNetModel(**config, **kind), seed=5)
        theirs.save_pretrained(folder / f"tiny {name}")
        found[name] = theirs, load_controlnet(folder / f"tiny {name}")
    theirs = diffusers.FluxControlNetModel.from_pretrained(
        tiny_folder() / "controlnet", torch_dtype=torch.float32
    )
    found["shipped"] = theirs.eval(), load_controlnet("tiny", dtype="float32")
    return found


def pipeline_latents(theirs, tiny, image, noise, settings, scale):
    # The reference draws from the posterior; its mean is what ours takes.
    distribution = pytest.importorskip("diffusers.models.autoencoders.vae")
    distribution = distribution.DiagonalGaussianDistribution
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distribution, "sample", lambda self, generator=None: self.mode())
        pipeline = diffusers.FluxControlNetPipeline.from_pretrained(
            tiny_folder(), controlnet=theirs, torch_dtype=torch.float32
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(
            PROMPT,
            negative_prompt=NEGATIVE,
            true_cfg_scale=scale,
            control_image=to_torch(image).permute(2, 0, 1)[None],
            control_mode=settings.mode,
            controlnet_conditioning_scale=settings.scale,
            control_guidance_start=settings.start,
            control_guidance_end=settings.end,
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            max_sequence_length=tiny.defaults.max_length,
            latents=to_torch(fluxjax.pack_latents(noise))[None],
            output_type="latent",
        ).images[0]


@pytest.mark.parametrize(
    ("name", "settings", "scale"),
    [
        ("Union", ControlSettings(mode=2, scale=0.6, start=0.2, end=0.8), 2.0),
        ("Union-Pro 2.0", ControlSettings(scale=0.8, end=0.5), 1.0),
        ("XLabs", ControlSettings(scale=0.7), 1.0),
        ("shipped", ControlSettings(end=0.8), 1.0),
    ],
)
def test_both_pipelines_end_at_the_same_latents(tiny_nets, tiny, name, settings, scale):
    theirs, ours = tiny_nets[name]
    image = np.tanh(normal(HEIGHT, WIDTH, 3, seed=6))
    noise = fluxjax.initial_noise(jax.random.key(3), HEIGHT, WIDTH)
    expected = pipeline_latents(theirs, tiny, image, noise, settings, scale)
    times = fluxjax.generate.samplers.model_times(tiny.defaults, STEPS, HEIGHT, WIDTH)
    condition = controlnet_condition(ours, tiny.vae, image, settings, dtype=jnp.float32)
    states = []
    for prompt in (PROMPT, NEGATIVE):
        ids = prompt_ids(tiny.tokenizers, [prompt], max_length=tiny.defaults.max_length)
        states.append(encode_text(tiny.clip, tiny.t5, ids, dtype=jnp.float32))
    batch = prompt_batch(
        *states,
        noise=noise[None],
        keys=None,
        distilled=jnp.float32(GUIDANCE),
        conditions=[condition.for_times(times)],
    )
    recipe = fluxjax.Recipe(times, Euler(), fluxjax.Guidance(scale=jnp.float32(scale)))
    latents = fluxjax.denoise(tiny.flux, batch, recipe)
    found = fluxjax.pack_latents(latents[0])
    # The bound of one network, of which each step's error adds to the next.
    assert relative_error(found, expected) <= STEPS * FLOAT32_BOUND
