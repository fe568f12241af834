"""Attention that guides, and the seam that it goes through."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import CONFIG, IDS, IMAGE, TEXT, draw, small_flux

from fluxjax import Nag, attention
from fluxjax.kernels import isolated_attention
from fluxjax.nets import DegradedBlocks


def heads(tokens: int):
    return draw(3, tokens, 2, 8)


def test_isolated_attention_is_attention_under_its_mask():
    q, k, v = heads(TEXT + IMAGE)
    hidden = np.zeros((TEXT + IMAGE, TEXT + IMAGE))
    hidden[TEXT:, TEXT:] = np.where(np.eye(IMAGE), 0, -np.inf)
    mask = jnp.broadcast_to(jnp.float32(hidden), (2, *hidden.shape))
    np.testing.assert_allclose(
        isolated_attention(q, k, v, TEXT), attention(q, k, v, bias=mask), atol=1e-6
    )


def test_without_text_an_isolated_token_keeps_its_own_value():
    q, k, v = heads(IMAGE)
    np.testing.assert_array_equal(isolated_attention(q, k, v, 0), v)


def test_nag_is_none_at_scale_1_alpha_0_and_for_equal_texts():
    q, k, v = heads(2 * TEXT + IMAGE)
    plain = attention(q[TEXT:], k[TEXT:], v[TEXT:])
    for nag in (Nag(1.0), Nag(5.0, alpha=0.0)):
        np.testing.assert_allclose(nag(q, k, v, 2 * TEXT)[TEXT:], plain, atol=1e-6)
    equal = [jnp.concatenate([x[TEXT : 2 * TEXT], x[TEXT:]]) for x in (q, k, v)]
    np.testing.assert_allclose(Nag(5.0)(*equal, 2 * TEXT)[TEXT:], plain, atol=1e-6)
    assert np.abs(Nag(5.0)(q, k, v, 2 * TEXT)[TEXT:] - plain).max() > 0.01


def test_each_of_nags_texts_has_an_attention_of_its_own():
    q, k, v = heads(2 * TEXT + IMAGE)
    mixed = Nag(5.0)(q, k, v, 2 * TEXT)
    alone = attention(*(jnp.concatenate([x[:TEXT], x[2 * TEXT :]]) for x in (q, k, v)))
    np.testing.assert_allclose(mixed[:TEXT], alone[:TEXT], atol=1e-6)


@pytest.mark.parametrize("scale", [2.0, 9.0])
def test_nag_extrapolates_bounds_the_norm_and_blends(scale):
    positive, negative = (np.asarray(draw(IMAGE, 2, 8, seed=seed)) for seed in (1, 2))
    expected = []
    for near, far in zip(positive, negative, strict=True):  # a token's heads share a norm
        moved = scale * near - (scale - 1) * far
        ratio = np.abs(moved).sum() / np.abs(near).sum()
        expected.append(0.25 * moved * min(ratio, 2.5) / ratio + 0.75 * near)
    np.testing.assert_allclose(
        Nag(scale).combine(jnp.asarray(positive), jnp.asarray(negative)),
        expected,
        rtol=2e-5,
        atol=1e-6,
    )


def test_nag_keeps_a_value_of_zero():
    zero = jnp.zeros((IMAGE, 2, 8))
    np.testing.assert_array_equal(Nag(5.0).combine(zero, zero), zero)


def test_nag_needs_as_many_tokens_of_both_texts():
    with pytest.raises(ValueError, match="as many tokens"):
        Nag(2.0)(*heads(TEXT + IMAGE), TEXT)


@pytest.fixture(scope="module")
def flux():
    return small_flux()


def call(flux, text=None, **options):
    text = draw(TEXT, 12, seed=3) if text is None else text
    return eqx.filter_jit(flux)(
        draw(IMAGE, 8), 0.6, txt=text, vec=draw(6, seed=4), img_ids=IDS, guidance=2.0, **options
    )


def test_a_skipped_block_is_one_that_the_network_does_not_have(flux):
    def without(blocks, number):
        return jax.tree.map(
            lambda x: jnp.delete(x, number, axis=0) if eqx.is_array(x) else x, blocks
        )

    fewer = eqx.tree_at(
        lambda flux: (flux.double, flux.single),
        flux,
        (without(flux.double, 1), without(flux.single, 0)),
    )
    skipped = call(flux, degraded=DegradedBlocks(CONFIG, double=[1], single=[0]))
    np.testing.assert_allclose(skipped, call(fewer), atol=1e-5)
    assert np.abs(skipped - call(flux)).max() > 1e-3


def test_an_attention_of_ones_own_takes_the_place_of_all_or_of_some(flux):
    plain = call(flux)

    def same(q, k, v, txt_tokens):
        assert (txt_tokens, len(q)) == (TEXT, TEXT + IMAGE)
        return attention(q, k, v)

    np.testing.assert_allclose(call(flux, attention=same), plain, atol=1e-6)
    everywhere = {"double": range(3), "single": range(2)}
    whole = call(flux, attention=isolated_attention)
    np.testing.assert_allclose(
        call(flux, degraded=DegradedBlocks(CONFIG, **everywhere, attention=isolated_attention)),
        whole,
        atol=1e-5,
    )
    some = call(flux, degraded=DegradedBlocks(CONFIG, single=[1], attention=isolated_attention))
    assert np.abs(some - plain).max() > 1e-3
    assert np.abs(some - whole).max() > 1e-3


def test_in_the_network_nag_of_scale_1_is_the_wanted_text_alone(flux):
    positive, negative = draw(TEXT, 12, seed=3), draw(TEXT, 12, seed=9)
    both = jnp.concatenate([negative, positive])
    np.testing.assert_allclose(call(flux, both, attention=Nag(1.0)), call(flux), atol=1e-5)
    assert np.abs(call(flux, both, attention=Nag(6.0)) - call(flux)).max() > 1e-3


def test_unused_the_seam_leaves_no_trace_in_the_program(flux):
    assert "cond[" not in str(jax.make_jaxpr(lambda: call(flux))())
    assert "cond[" in str(
        jax.make_jaxpr(lambda: call(flux, degraded=DegradedBlocks(CONFIG, double=[0])))()
    )


def test_blocks_to_weaken_are_some_that_exist():
    with pytest.raises(ValueError, match=r"got \[3\]; this network has double blocks 0 to 2"):
        DegradedBlocks(CONFIG, double=[1, 3])
    with pytest.raises(ValueError, match="needs a block"):
        DegradedBlocks(CONFIG)
