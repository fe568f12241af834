from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import (
    BFLOAT16_RATIO,
    FLOAT32_BOUND,
    as_bfloat16,
    normal,
    perturbed,
    relative_error,
    to_torch,
)

from fluxjax.generate.latents import image_ids
from fluxjax.generate.load import load_flux

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

CONFIGS = {
    "odd depths, guidance": dict(
        num_layers=3,
        num_single_layers=5,
        num_attention_heads=3,
        attention_head_dim=32,
        axes_dims_rope=(8, 12, 12),
        joint_attention_dim=40,
        pooled_projection_dim=24,
        guidance_embeds=True,
        in_channels=64,
    ),
    "one double block, no guidance": dict(
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=4,
        attention_head_dim=16,
        axes_dims_rope=(4, 6, 6),
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=False,
        in_channels=16,
    ),
    "other channels out": dict(
        num_layers=2,
        num_single_layers=3,
        num_attention_heads=2,
        attention_head_dim=64,
        axes_dims_rope=(16, 24, 24),
        joint_attention_dim=64,
        pooled_projection_dim=48,
        guidance_embeds=True,
        in_channels=96,
        out_channels=64,
    ),
    "official width": dict(
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=24,
        attention_head_dim=128,
        axes_dims_rope=(16, 56, 56),
        joint_attention_dim=4096,
        pooled_projection_dim=768,
        guidance_embeds=True,
        in_channels=64,
    ),
}
HEIGHT, WIDTH, TXT_TOKENS = 48, 80, 7


@pytest.fixture(params=CONFIGS, scope="module")
def pair(request, tmp_path_factory):
    """A reference network, ours of the same weights, and inputs."""
    config = CONFIGS[request.param]
    torch.manual_seed(0)
    theirs = perturbed(diffusers.FluxTransformer2DModel(**config))
    folder = tmp_path_factory.mktemp("flux")
    theirs.save_pretrained(folder)
    tokens = (HEIGHT // 16) * (WIDTH // 16)
    inputs = dict(
        x=normal(2, tokens, config["in_channels"], seed=1),
        txt=normal(2, TXT_TOKENS, config["joint_attention_dim"], seed=2),
        vec=normal(2, config["pooled_projection_dim"], seed=3),
        # Exactly representable in bfloat16, also after x1000, which the reference computes in it.
        t=np.float32([0.5, 0.125]),
        guidance=np.float32([4.0, 1.0]) if config["guidance_embeds"] else None,
    )
    return theirs, load_flux(folder), inputs


def run_theirs(network, x, txt, vec, t, guidance, dtype=torch.float32):
    with torch.no_grad():
        return network.to(dtype)(
            hidden_states=to_torch(x, dtype),
            encoder_hidden_states=to_torch(txt, dtype),
            pooled_projections=to_torch(vec, dtype),
            timestep=to_torch(t, dtype),
            img_ids=to_torch(image_ids(HEIGHT, WIDTH)),
            txt_ids=torch.zeros(txt.shape[1], 3),
            guidance=None if guidance is None else to_torch(guidance),
            return_dict=False,
        )[0].float()


def run_ours(network, x, txt, vec, t, guidance, dtype=jnp.float32):
    ids = image_ids(HEIGHT, WIDTH)

    @eqx.filter_jit
    def run(network, *inputs):
        return jax.vmap(partial(one, network), axes)(*inputs)

    def one(network, x, txt, vec, t, guidance):
        return network(x, t, txt=txt, vec=vec, guidance=guidance, img_ids=ids, dtype=dtype)

    axes = (0, 0, 0, 0, None if guidance is None else 0)
    return run(network, x, txt, vec, t, guidance)


def test_a_batch_of_velocities_equals_diffusers(pair):
    theirs, ours, inputs = pair
    assert relative_error(run_ours(ours, **inputs), run_theirs(theirs, **inputs)) <= FLOAT32_BOUND


def test_one_example_equals_its_row_of_a_batch(pair):
    _, ours, inputs = pair
    alone = {name: None if value is None else value[1:] for name, value in inputs.items()}
    assert relative_error(run_ours(ours, **alone)[0], run_ours(ours, **inputs)[1]) <= FLOAT32_BOUND


def test_bfloat16_is_as_close_to_float32_as_diffusers(pair, platform):
    theirs, ours, inputs = pair
    exact = run_theirs(theirs, **inputs)
    reference_error = relative_error(run_theirs(theirs, **inputs, dtype=torch.bfloat16), exact)
    theirs.float()
    half = jax.tree.map(as_bfloat16, ours)
    assert (
        relative_error(run_ours(half, **inputs, dtype=jnp.bfloat16), exact)
        <= BFLOAT16_RATIO * reference_error
    )
