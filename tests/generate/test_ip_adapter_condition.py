"""Image prompts of IP-Adapters as a part of what images are conditioned on."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layouts import random_network
from small import IDS, IMAGE, TEXT, draw, small_flux

from fluxjax import Conditioning, Guidance, flow_times, flux_velocity, sample
from fluxjax.generate import (
    FirstBlock,
    ReferenceTokens,
    clip_pixels,
    ip_adapter_condition,
    siglip_pixels,
)
from fluxjax.generate.conditioning import split_images
from fluxjax.nets import (
    ClipVision,
    ClipVisionConfig,
    IpAdapter,
    IpAdapterConfig,
    Siglip,
    SiglipConfig,
)

CLIP = ClipVisionConfig(image_size=8, patch=4, width=8, heads=2, depth=1, mlp_width=6, embedding=5)
SIGLIP = SiglipConfig(image_size=9, patch=4, width=8, heads=2, depth=1, mlp_width=6)
SIZES = dict(tokens=3, context=7, width=32, head_dim=16, double_depth=3)
XLABS = IpAdapterConfig(features=5, **SIZES)
INSTANTX = IpAdapterConfig(features=8, hidden=6, single_depth=2, joins_attention=True, **SIZES)
GUIDANCE = jnp.float32(2.0)
POSITIVE = Conditioning(draw(TEXT, 12, seed=3), draw(6, seed=4), IDS, GUIDANCE)
NEGATIVE = Conditioning(draw(TEXT, 12, seed=9), draw(6, seed=10), IDS, GUIDANCE)
NOISE, T = draw(IMAGE, 8), jnp.float32(0.6)
PICTURE = jnp.clip(draw(12, 9, 3, seed=1), -1, 1)
# The same sums in programs that are compiled apart.
BOUND = 1e-5


@pytest.fixture(scope="module")
def flux():
    return small_flux()


@pytest.fixture(scope="module")
def clip():
    return random_network(ClipVision, CLIP, scale=0.4)


@pytest.fixture(scope="module")
def xlabs():
    return random_network(IpAdapter, XLABS, scale=0.5)


@pytest.fixture(scope="module")
def condition(xlabs, clip):
    return ip_adapter_condition(xlabs, clip, PICTURE)


@eqx.filter_jit
def evaluate(flux, positive, negative=None, guidance=Guidance()):
    return flux_velocity(flux, positive, negative, guidance=guidance)(NOISE, T)


@eqx.filter_jit
def by_hand(flux, conditioning, prompt, x=NOISE, ids=IDS):
    return flux(
        x,
        T,
        txt=conditioning.txt,
        vec=conditioning.vec,
        img_ids=ids,
        guidance=GUIDANCE,
        image_prompts=[prompt],
    )


@eqx.filter_jit
def prompt_of(adapter, encoder, pixels):
    embedding = encoder(pixels)
    return adapter(encoder.pool(embedding) if isinstance(encoder, Siglip) else embedding)


def test_the_encoders_embedding_makes_the_prompt(xlabs, clip, condition):
    expected = prompt_of(xlabs, clip, clip_pixels(PICTURE, CLIP))
    np.testing.assert_allclose(condition.prompt.double.k, expected.double.k, rtol=1e-3, atol=1e-4)
    black = prompt_of(xlabs, clip, clip_pixels(-jnp.ones((20, 20, 3)), CLIP))
    np.testing.assert_allclose(condition.negative.double.v, black.double.v, rtol=1e-3, atol=1e-4)


def test_siglips_pooled_state_makes_the_prompt_of_an_adapter_that_joins():
    adapter = random_network(IpAdapter, INSTANTX, scale=0.5)
    siglip = random_network(Siglip, SIGLIP, scale=0.4)
    found = ip_adapter_condition(adapter, siglip, PICTURE, scale=[0.5] * 5).prompt
    expected = prompt_of(adapter, siglip, siglip_pixels(PICTURE, SIGLIP))
    np.testing.assert_allclose(found.single.v, expected.single.v, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(found.scales, [0.5] * 5)


def test_a_negative_prompt_gets_the_black_image(flux, condition):
    positive, negative = condition.add(POSITIVE), condition.add_to_negative(NEGATIVE)
    guided = evaluate(flux, positive, negative, Guidance(scale=4.0))
    towards = by_hand(flux, POSITIVE, condition.prompt)
    away = by_hand(flux, NEGATIVE, condition.negative)
    np.testing.assert_allclose(guided, away + 4 * (towards - away), atol=10 * BOUND)


def test_another_image_or_scale_compiles_nothing(flux, xlabs, clip):
    traces = []

    @eqx.filter_jit
    def run(flux, conditioning):
        traces.append(None)
        return flux_velocity(flux, conditioning)(NOISE, T)

    results = []
    for scale in (0.3, 1.0):
        condition = ip_adapter_condition(xlabs, clip, scale * PICTURE, scale=scale)
        results.append(run(flux, condition.add(POSITIVE)))
    assert len(traces) == 1
    assert np.abs(results[0] - results[1]).max() > 1e-3


def test_a_reference_has_no_prompt(flux, condition):
    tokens, ids = draw(2, 8, seed=6), jnp.ones((2, 3))
    with_reference = replace(condition.add(POSITIVE), reference=ReferenceTokens(tokens, ids))
    limited = replace(condition.prompt, token_weights=jnp.float32([1] * IMAGE + [0, 0]))
    x, all_ids = jnp.concatenate([NOISE, tokens]), jnp.concatenate([IDS, ids])
    expected = by_hand(flux, POSITIVE, limited, x, all_ids)[:IMAGE]
    np.testing.assert_allclose(evaluate(flux, with_reference), expected, atol=BOUND)


def test_a_cache_that_skips_nothing_gives_the_plain_result(flux, condition):
    conditioning = condition.add(POSITIVE)
    plain = evaluate(flux, conditioning)
    cached = evaluate(flux, conditioning, None, Guidance(cache=FirstBlock(0.0)))
    np.testing.assert_allclose(cached, plain, atol=BOUND)


def test_each_image_of_a_batch_can_have_a_prompt_of_its_own(flux, xlabs, clip):
    prompts = [ip_adapter_condition(xlabs, clip, x).prompt for x in (PICTURE, -PICTURE)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *prompts)
    batch = eqx.tree_at(lambda one: one.image_prompts, POSITIVE, (stacked,))
    rows, shared = split_images(batch)
    assert rows.image_prompts[0].double.k.shape == (2, 3, 3, 2, 16)
    assert shared.image_prompts[0].double.k is None
    velocities = eqx.filter_jit(
        lambda flux, rows: jax.vmap(
            lambda row: flux_velocity(flux, eqx.combine(row, shared))(NOISE, T)
        )(rows)
    )(flux, rows)
    for velocity, prompt in zip(velocities, prompts, strict=True):
        expected = by_hand(flux, POSITIVE, prompt)
        np.testing.assert_allclose(velocity, expected, atol=BOUND)


def test_prepared_for_all_times_it_is_what_it_is_at_each(flux, condition):
    conditioning, times = condition.add(POSITIVE), flow_times(2)

    @eqx.filter_jit
    def run(flux, times):
        return sample(flux_velocity(flux, conditioning, times=times), NOISE, flow_times(2)).x

    np.testing.assert_allclose(run(flux, times), run(flux, None), atol=BOUND)


def test_what_does_not_fit_an_adapter_is_an_error(xlabs, clip):
    siglip = random_network(Siglip, SIGLIP)
    with pytest.raises(ValueError, match="takes 5 features, got 8"):
        ip_adapter_condition(xlabs, siglip, PICTURE)
    with pytest.raises(ValueError, match=r"`ip_adapter_condition\(scale\)` needs finite"):
        ip_adapter_condition(xlabs, clip, PICTURE, scale=float("inf"))
