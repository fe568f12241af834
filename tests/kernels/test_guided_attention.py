"""Attention that guides, by itself and in the network."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import CONFIG, IDS, IMAGE, TEXT, draw, small_flux

from fluxjax import attention
from fluxjax.kernels import Nag, isolated_attention
from fluxjax.nets import DegradedBlocks


def heads(tokens: int):
    return draw(3, tokens, 2, 8)


def traced_nag(scale, alpha=0.25):
    """Return a Nag whose numbers are traced, so that all scales share one program."""
    return Nag(jnp.float32(scale), jnp.float32(2.5), jnp.float32(alpha))


@eqx.filter_jit
def guide(nag, q, k, v, txt_tokens):
    return nag(q, k, v, txt_tokens)


plain_attention = jax.jit(attention)


def test_isolated_attention_is_attention_under_its_mask():
    q, k, v = heads(TEXT + IMAGE)
    hidden = np.zeros((TEXT + IMAGE, TEXT + IMAGE))
    hidden[TEXT:, TEXT:] = np.where(np.eye(IMAGE), 0, -np.inf)
    mask = jnp.broadcast_to(jnp.float32(hidden), (2, *hidden.shape))
    found = jax.jit(isolated_attention, static_argnums=3)(q, k, v, TEXT)
    np.testing.assert_allclose(found, plain_attention(q, k, v, bias=mask), atol=1e-6)


def test_without_text_an_isolated_token_keeps_its_own_value():
    q, k, v = heads(IMAGE)
    found = jax.jit(isolated_attention, static_argnums=3)(q, k, v, 0)
    np.testing.assert_array_equal(found, v)


def test_nag_is_none_at_scale_1_alpha_0_and_for_equal_prompts():
    q, k, v = heads(2 * TEXT + IMAGE)
    plain = plain_attention(q[TEXT:], k[TEXT:], v[TEXT:])
    for nag in (traced_nag(1.0), traced_nag(5.0, alpha=0.0)):
        np.testing.assert_allclose(guide(nag, q, k, v, 2 * TEXT)[TEXT:], plain, atol=1e-6)
    equal = [jnp.concatenate([x[TEXT : 2 * TEXT], x[TEXT:]]) for x in (q, k, v)]
    nag = traced_nag(5.0)
    np.testing.assert_allclose(guide(nag, *equal, 2 * TEXT)[TEXT:], plain, atol=1e-6)
    assert np.abs(guide(nag, q, k, v, 2 * TEXT)[TEXT:] - plain).max() > 0.01


def test_the_negative_prompt_of_nag_attends_with_the_image_alone():
    q, k, v = heads(2 * TEXT + IMAGE)
    mixed = guide(traced_nag(5.0), q, k, v, 2 * TEXT)
    alone = plain_attention(*(jnp.concatenate([x[:TEXT], x[2 * TEXT :]]) for x in (q, k, v)))
    np.testing.assert_allclose(mixed[:TEXT], alone[:TEXT], atol=1e-6)


@pytest.mark.parametrize("scale", [2.0, 9.0])
def test_nag_extrapolates_bounds_the_norm_and_blends(scale):
    positives, negatives = (np.asarray(draw(IMAGE, 2, 8, seed=seed)) for seed in (1, 2))
    expected = []
    for positive, negative in zip(positives, negatives, strict=True):  # a token's heads together
        guided = scale * positive - (scale - 1) * negative
        ratio = np.abs(guided).sum() / np.abs(positive).sum()
        expected.append(0.25 * guided * min(ratio, 2.5) / ratio + 0.75 * positive)
    found = Nag(scale).combine(jnp.asarray(positives), jnp.asarray(negatives))
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)


def test_nag_keeps_a_value_of_zero():
    zero = jnp.zeros((IMAGE, 2, 8))
    np.testing.assert_array_equal(Nag(5.0).combine(zero, zero), zero)


def test_nag_needs_as_many_tokens_of_both_prompts():
    with pytest.raises(ValueError, match="as many tokens"):
        Nag(2.0)(*heads(TEXT + IMAGE), TEXT)


@pytest.fixture(scope="module")
def flux():
    return small_flux()


@eqx.filter_jit
def velocity(flux, text, options):
    inputs = {"vec": draw(6, seed=4), "img_ids": IDS, "guidance": 2.0}
    return flux(draw(IMAGE, 8), 0.6, txt=text, **inputs, **options)


def call(flux, text=None, **options):
    text = draw(TEXT, 12, seed=3) if text is None else text
    return velocity(flux, text, options)


@pytest.fixture(scope="module")
def plain(flux):
    return call(flux)


def test_a_skipped_block_is_one_that_the_network_does_not_have(flux, plain):
    def without(blocks, number):
        return jax.tree.map(
            lambda x: np.delete(x, number, axis=0) if eqx.is_array(x) else x, blocks
        )

    fewer = eqx.tree_at(
        lambda flux: (flux.double, flux.single),
        flux,
        (without(flux.double, 1), without(flux.single, 0)),
    )
    skipped = call(flux, degraded=DegradedBlocks(CONFIG, double=[1], single=[0]))
    np.testing.assert_allclose(skipped, call(fewer), atol=1e-5)
    assert np.abs(skipped - plain).max() > 1e-3


def test_a_custom_attention_takes_the_place_of_all_or_of_some(flux, plain):
    def same(q, k, v, txt_tokens):
        assert (txt_tokens, len(q)) == (TEXT, TEXT + IMAGE)
        return attention(q, k, v)

    np.testing.assert_allclose(call(flux, attention=same), plain, atol=1e-6)
    all_blocks = DegradedBlocks(
        CONFIG, double=range(3), single=range(2), attention=isolated_attention
    )
    whole = call(flux, attention=isolated_attention)
    np.testing.assert_allclose(call(flux, degraded=all_blocks), whole, atol=1e-5)
    some = call(flux, degraded=DegradedBlocks(CONFIG, single=[1], attention=isolated_attention))
    assert np.abs(some - plain).max() > 1e-3
    assert np.abs(some - whole).max() > 1e-3


def test_in_the_network_nag_of_scale_1_is_the_positive_prompt_alone(flux, plain):
    positive, negative = draw(TEXT, 12, seed=3), draw(TEXT, 12, seed=9)
    both = jnp.concatenate([negative, positive])
    np.testing.assert_allclose(call(flux, both, attention=traced_nag(1.0)), plain, atol=1e-5)
    assert np.abs(call(flux, both, attention=traced_nag(6.0)) - plain).max() > 1e-3


def test_unused_degraded_blocks_leave_no_trace_in_the_program(flux):
    assert "cond[" not in str(jax.make_jaxpr(lambda: call(flux))())
    degraded = DegradedBlocks(CONFIG, double=[0])
    assert "cond[" in str(jax.make_jaxpr(lambda: call(flux, degraded=degraded))())


def test_blocks_to_degrade_are_some_that_exist():
    with pytest.raises(ValueError, match=r"got \[3\]; this network has double blocks 0 to 2"):
        DegradedBlocks(CONFIG, double=[1, 3])
    with pytest.raises(ValueError, match="needs at least one block"):
        DegradedBlocks(CONFIG)
