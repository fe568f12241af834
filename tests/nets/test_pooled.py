"""CLIP's encoders compute the last block for the one token whose state they return."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import draw, randomized

from fluxjax import Clip, unroll
from fluxjax.nets import ClipConfig, ClipVision, ClipVisionConfig

END = 19
SIZES = {"width": 16, "heads": 2, "mlp_width": 32}


@pytest.fixture(scope="module", params=[1, 3])
def clip(request):
    """An encoder of one block, which is the last, or of three."""
    return randomized(
        Clip,
        ClipConfig(vocabulary=20, positions=9, depth=request.param, eos_token=END, **SIZES),
    )


def ids_with_end(end):
    ids = np.arange(9)
    ids[end:] = END
    return jnp.asarray(ids, jnp.int32)


@pytest.mark.parametrize("end", [0, 4, 8])
@pytest.mark.parametrize("form", ["stacked", "unrolled"])
def test_the_pooled_state_is_that_of_the_end_token_among_all(clip, form, end):
    network = unroll(clip) if form == "unrolled" else clip
    ids = ids_with_end(end)
    pooled = eqx.filter_jit(network)(ids)
    states = eqx.filter_jit(lambda network, ids: network.hidden_states(ids))(network, ids)
    assert pooled.shape == (16,)
    np.testing.assert_allclose(pooled, states[end], rtol=1e-5, atol=1e-5)


def test_the_pooled_states_of_a_batch_are_those_of_its_prompts(clip):
    batch = jnp.stack([ids_with_end(end) for end in (2, 7)])
    pooled = eqx.filter_jit(eqx.filter_vmap(clip))(batch)
    expected = [clip.hidden_states(ids)[end] for ids, end in zip(batch, (2, 7), strict=True)]
    np.testing.assert_allclose(pooled, jnp.stack(expected), rtol=1e-5, atol=1e-5)


def test_gradients_are_those_by_way_of_all_states(clip):
    ids, factors = ids_with_end(4), draw(16)
    arrays, static = eqx.partition(clip, eqx.is_array)

    def by_pooled(arrays):
        return factors @ eqx.combine(arrays, static)(ids)

    def by_all(arrays):
        return factors @ eqx.combine(arrays, static).hidden_states(ids)[4]

    found, expected = jax.jit(jax.grad(by_pooled))(arrays), jax.jit(jax.grad(by_all))(arrays)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), found, expected
    )


def test_the_embedding_of_an_image_is_of_the_state_of_its_class_token():
    config = ClipVisionConfig(image_size=16, patch=4, depth=2, embedding=6, **SIZES)
    vision = randomized(ClipVision, config)
    pixels = draw(16, 16, 3)
    states = vision.hidden_states(pixels)
    expected = vision.project(vision.norm(states[0]))
    np.testing.assert_allclose(eqx.filter_jit(vision)(pixels), expected, rtol=1e-5, atol=1e-5)


def test_the_last_block_has_an_mlp_for_one_token_only(clip):
    program = jax.make_jaxpr(lambda ids: clip(ids))(ids_with_end(4))
    shapes = [
        equation.outvars[0].aval.shape
        for equation in program.jaxpr.eqns
        if equation.primitive.name == "dot_general"
    ]
    # Outside of the loop over the other blocks: of hidden features of the MLP there is one row.
    assert (1, 32) in shapes
    assert (9, 32) not in shapes
