"""The guided velocity of a prompt as a value: beside the network called by hand."""

import functools
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import CONFIG, IDS, IMAGE, TEXT, draw, small_flux

from fluxjax import (
    Conditioning,
    Euler,
    Flux,
    FluxConfig,
    Guidance,
    flow_times,
    flux_velocity,
    sample,
)
from fluxjax.flow import DPMpp2S, Midpoint, evaluation_times
from fluxjax.generate import FirstBlock, ReferenceTokens, WeakNetwork
from fluxjax.kernels import Nag, isolated_attention
from fluxjax.nets import DegradedBlocks

NOISE, TIMES = draw(IMAGE, 8), flow_times(3)
POSITIVE = Conditioning(draw(TEXT, 12, seed=3), draw(6, seed=4), IDS, jnp.float32(2.0))
NEGATIVE = Conditioning(draw(TEXT, 12, seed=9), draw(6, seed=10), IDS, jnp.float32(2.0))
T = jnp.float32(0.6)
# Two programs of the same sums: what is prepared is compiled apart from the rest.
BOUND = 1e-5


@pytest.fixture(scope="module")
def flux():
    return small_flux()


@eqx.filter_jit
def evaluate(velocity, x=NOISE, t=T):
    return velocity(x, t)


@eqx.filter_jit
def by_hand(flux, condition, x=NOISE, t=T, **options):
    return flux(
        x,
        t,
        txt=condition.txt,
        vec=condition.vec,
        img_ids=condition.img_ids,
        guidance=condition.guidance,
        **options,
    )


def test_without_guidance_it_is_the_network(flux):
    velocity = flux_velocity(flux, POSITIVE)
    np.testing.assert_allclose(evaluate(velocity, NOISE, T), by_hand(flux, POSITIVE), atol=BOUND)


def test_prepared_for_its_times_it_is_the_same_there_and_nan_elsewhere(flux):
    velocity = flux_velocity(flux, POSITIVE, NEGATIVE, guidance=Guidance(scale=2.0), times=TIMES)
    free = flux_velocity(flux, POSITIVE, NEGATIVE, guidance=Guidance(scale=2.0))
    for t in TIMES:
        np.testing.assert_allclose(
            evaluate(velocity, NOISE, t), evaluate(free, NOISE, t), atol=BOUND
        )
    assert np.isnan(evaluate(velocity, NOISE, jnp.float32(0.123))).all()


def test_the_scale_combines_both_conditions(flux):
    velocity = flux_velocity(flux, POSITIVE, NEGATIVE, guidance=Guidance(scale=3.0))
    positive, negative = by_hand(flux, POSITIVE), by_hand(flux, NEGATIVE)
    expected = negative + 3 * (positive - negative)
    np.testing.assert_allclose(evaluate(velocity, NOISE, T), expected, atol=5 * BOUND)
    between = Guidance(scale=3.0, low=0.7, high=0.9)
    outside = flux_velocity(flux, POSITIVE, NEGATIVE, guidance=between)
    np.testing.assert_allclose(evaluate(outside), positive, atol=BOUND)


def test_degraded_blocks_are_guided_away_from(flux):
    blocks = DegradedBlocks(CONFIG, double=[1], attention=isolated_attention)
    velocity = flux_velocity(flux, POSITIVE, guidance=Guidance(weak=WeakNetwork(blocks, 1.5)))
    positive = by_hand(flux, POSITIVE)
    expected = positive + 1.5 * (positive - by_hand(flux, POSITIVE, degraded=blocks))
    np.testing.assert_allclose(evaluate(velocity, NOISE, T), expected, atol=BOUND)


def test_nag_attends_to_the_negative_text_and_then_the_positive(flux):
    velocity = flux_velocity(flux, POSITIVE, NEGATIVE, guidance=Guidance(nag=Nag(3.0)))
    both = eqx.tree_at(lambda c: c.txt, POSITIVE, jnp.concatenate([NEGATIVE.txt, POSITIVE.txt]))
    expected = by_hand(flux, both, attention=Nag(3.0))
    np.testing.assert_allclose(evaluate(velocity, NOISE, T), expected, atol=BOUND)


def test_features_are_joined_to_every_token():
    """As FLUX.1 Fill: the input is [noise | condition], the output has the noise's features."""
    config = FluxConfig(**{**vars(CONFIG), "in_channels": 14})
    leaves, tree = jax.tree.flatten(eqx.filter_eval_shape(Flux, config, key=jax.random.key(0)))
    weights = [0.2 * draw(*leaf.shape, seed=number) for number, leaf in enumerate(leaves)]
    wide = jax.tree.unflatten(tree, weights)
    features = draw(IMAGE, 6, seed=20)
    condition = eqx.tree_at(lambda c: c.concat, POSITIVE, features, is_leaf=lambda x: x is None)
    found = flux_velocity(wide, condition, times=TIMES)
    joined = jnp.concatenate([NOISE, features], axis=-1)
    np.testing.assert_allclose(
        evaluate(found, NOISE, TIMES[1]), by_hand(wide, POSITIVE, joined, TIMES[1]), atol=BOUND
    )


@pytest.mark.parametrize("cache", [None, FirstBlock(0.0)], ids=["plain", "cached"])
def test_reference_tokens_follow_the_image_and_their_prediction_is_dropped(flux, cache):
    """As FLUX.1 Kontext."""
    reference = ReferenceTokens(draw(4, 8, seed=21), IDS[:4].at[:, 0].set(1.0))
    condition = eqx.tree_at(lambda c: c.reference, POSITIVE, reference, is_leaf=lambda x: x is None)
    found = flux_velocity(flux, condition, guidance=Guidance(cache=cache))
    whole = eqx.tree_at(lambda c: c.img_ids, POSITIVE, jnp.concatenate([IDS, reference.ids]))
    expected = by_hand(flux, whole, jnp.concatenate([NOISE, reference.tokens]))
    np.testing.assert_allclose(evaluate(found), expected[:IMAGE], atol=BOUND)


@eqx.filter_jit
def sampled(velocity, step):
    return sample(velocity, NOISE, TIMES, step=step).x


class Unknown(Midpoint):
    """The midpoint method, without saying at which times it evaluates."""

    def evaluation_times(self, t, u):
        return None


@pytest.mark.parametrize(
    "step", [Euler(), Midpoint(), Unknown(), DPMpp2S()], ids=lambda step: type(step).__name__
)
def test_sampling_it_is_sampling_the_network(flux, step):
    """Whatever is computed before the loop."""
    velocity = flux_velocity(flux, POSITIVE, times=evaluation_times(step, TIMES))
    plain = eqx.Partial(
        flux, txt=POSITIVE.txt, vec=POSITIVE.vec, img_ids=IDS, guidance=POSITIVE.guidance
    )
    found = sampled(velocity, step)
    np.testing.assert_allclose(found, sampled(plain, step), atol=1e-4)


def test_it_is_a_pytree_under_jit_vmap_and_grad(flux):
    guidance = Guidance(scale=jnp.float32(2.0))

    @eqx.filter_jit
    def end(condition, flux):
        times = evaluation_times(Euler(), TIMES)
        velocity = flux_velocity(flux, condition, NEGATIVE, guidance=guidance, times=times)
        return sample(velocity, NOISE, TIMES).x

    conditions = jax.tree.map(lambda *leaves: jnp.stack(leaves), POSITIVE, NEGATIVE)
    ends = eqx.filter_jit(eqx.filter_vmap(end, in_axes=(0, None)))(conditions, flux)

    @eqx.filter_jit
    @functools.partial(eqx.filter_value_and_grad, has_aux=True)
    def slope(condition, flux):
        x = end(condition, flux)
        return x.sum(), x

    for number, condition in enumerate((POSITIVE, NEGATIVE)):
        (_, alone), gradient = slope(condition, flux)
        np.testing.assert_allclose(ends[number], alone, atol=1e-4)
        assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient)[:2])


def test_what_does_not_go_together_is_refused(flux):
    with pytest.raises(ValueError, match="Pass the negative conditioning"):
        flux_velocity(flux, POSITIVE, guidance=Guidance(nag=Nag(3.0)))
    with pytest.raises(ValueError, match="negative"):
        flux_velocity(flux, POSITIVE, guidance=Guidance(scale=2.0))
    nag = Guidance(nag=Nag(3.0))
    with pytest.raises(ValueError, match="custom attention itself"):
        flux_velocity(flux, POSITIVE, NEGATIVE, guidance=nag, attention=isolated_attention)
    with pytest.raises(ValueError, match="finite"):
        Guidance(scale=float("nan"))


def pulled_back(velocity):
    """Return the gradient of a velocity with respect to x, along a fixed direction."""
    return jax.vjp(lambda x: velocity(x, T), NOISE)[1](draw(IMAGE, 8, seed=5))[0]


@pytest.mark.parametrize(
    "guidance",
    [Guidance(), Guidance(scale=3.0, weak=WeakNetwork(DegradedBlocks(CONFIG, double=[1]), 1.5))],
    ids=["plain", "guided"],
)
def test_rematerialized_gradients_are_the_same(flux, guidance):
    gradients = []
    for remat in (False, True):
        velocity = flux_velocity(flux, POSITIVE, NEGATIVE, guidance=guidance, remat=remat)
        gradients.append(eqx.filter_jit(pulled_back)(velocity))
    np.testing.assert_allclose(*gradients, rtol=1e-5, atol=1e-6)


def test_with_rematerialization_a_gradients_memory_grows_by_one_input_for_each_block():
    def temporaries(depth, remat):
        config = replace(CONFIG, double_depth=depth, single_depth=depth)
        shapes = eqx.filter_eval_shape(Flux, config, key=jax.random.key(0))

        def gradient(flux):
            return pulled_back(flux_velocity(flux, POSITIVE, remat=remat))

        program = jax.jit(gradient).lower(shapes).compile()
        return program.memory_analysis().temp_size_in_bytes

    plain, remat = (temporaries(10, remat) - temporaries(2, remat) for remat in (False, True))
    # Beside activations there is the modulation of each block, which both need.
    assert 0 < remat < 0.5 * plain
