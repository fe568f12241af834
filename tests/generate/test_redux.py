"""Images as prompts: where their tokens go, how they are weighted, and what does not recompile."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layouts import random_network
from small import IDS, IMAGE, TEXT, draw, small_flux

from fluxjax import Conditioning, Guidance, flux_velocity
from fluxjax.generate import (
    clip_pixels,
    prompt_batch,
    redux_condition,
    redux_tokens,
    siglip_pixels,
)
from fluxjax.generate.text import TextStates
from fluxjax.kernels import Nag
from fluxjax.nets import (
    ClipVision,
    ClipVisionConfig,
    Redux,
    ReduxConfig,
    Siglip,
    SiglipConfig,
)

SIGLIP = SiglipConfig(image_size=9, patch=4, width=8, heads=2, depth=1, mlp_width=6)
TOKENS = 4  # of an image
CONTEXT = 12  # features of a text token of the small transformer
GUIDANCE = jnp.float32(2.0)
POSITIVE = Conditioning(draw(TEXT, CONTEXT, seed=3), draw(6, seed=4), IDS, GUIDANCE)
NEGATIVE = Conditioning(draw(TEXT, CONTEXT, seed=9), draw(6, seed=10), IDS, GUIDANCE)
NOISE, T = draw(IMAGE, 8), jnp.float32(0.6)
IMAGES = draw(2, TOKENS, CONTEXT, seed=5)
# The same sums in programs that are compiled apart.
BOUND = 1e-5


@pytest.fixture(scope="module")
def flux():
    return small_flux()


@pytest.fixture(scope="module")
def networks():
    redux = ReduxConfig(features=8, hidden=10, context=CONTEXT)
    return random_network(Siglip, SIGLIP, scale=0.3), random_network(Redux, redux, scale=0.3)


@eqx.filter_jit
def evaluate(flux, positive, negative=None, guidance=Guidance()):
    return flux_velocity(flux, positive, negative, guidance=guidance)(NOISE, T)


@eqx.filter_jit
def by_hand(flux, txt, vec, **options):
    return flux(NOISE, T, txt=txt, vec=vec, img_ids=IDS, guidance=GUIDANCE, **options)


def test_tokens_of_images_follow_those_of_the_text_at_position_zero(flux):
    condition = redux_condition(IMAGES, weights=[0.5, 2.0])
    first, second = np.asarray(IMAGES)
    txt = np.concatenate([POSITIVE.txt, np.float32(0.5) * first, np.float32(2) * second])
    zeros = jnp.zeros((len(txt), 3))
    expected = by_hand(flux, txt, POSITIVE.vec, txt_ids=zeros)
    np.testing.assert_allclose(evaluate(flux, condition.add(POSITIVE)), expected, atol=BOUND)


def test_weight_1_keeps_the_prompt_and_the_tokens_bit_by_bit():
    found = redux_condition(IMAGES).add(POSITIVE)
    np.testing.assert_array_equal(found.txt[:TEXT], POSITIVE.txt)
    np.testing.assert_array_equal(found.txt[TEXT:], IMAGES.reshape(-1, CONTEXT))
    np.testing.assert_array_equal(found.vec, POSITIVE.vec)


def test_the_sum_adds_up_whole_sequences():
    weights, pooled = [0.25, 0.5], [0.1, 0.3]
    condition = redux_condition(IMAGES, weights=weights, pooled_weights=pooled, rule="sum")
    found = condition.add(POSITIVE)
    sequences = [np.concatenate([POSITIVE.txt, image]) for image in IMAGES]
    expected = weights[0] * sequences[0] + weights[1] * sequences[1]
    np.testing.assert_allclose(found.txt, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.vec, 0.4 * POSITIVE.vec, rtol=1e-5)


def test_a_batch_of_prompts_gets_the_same_images():
    states = TextStates(draw(3, TEXT, CONTEXT), draw(3, 6))
    noise = draw(3, 2, 2, 2)
    condition = redux_condition(IMAGES)
    batch = prompt_batch(
        states, states, noise=noise, keys=None, distilled=None, conditions=[condition]
    )
    assert batch.positive.txt.shape == (3, TEXT + 2 * TOKENS, CONTEXT)
    for row in batch.positive.txt[:, TEXT:]:
        np.testing.assert_array_equal(row, IMAGES.reshape(-1, CONTEXT))
    # Images are guided away from the text alone.
    np.testing.assert_array_equal(batch.negative.txt, states.txt)


def test_a_negative_prompt_without_the_images_is_guided_away_from(flux):
    condition = redux_condition(IMAGES)
    positive = condition.add(POSITIVE)
    guided = evaluate(flux, positive, condition.add_to_negative(NEGATIVE), Guidance(scale=3.0))
    towards = by_hand(flux, positive.txt, positive.vec)
    away = by_hand(flux, NEGATIVE.txt, NEGATIVE.vec)
    np.testing.assert_allclose(guided, away + 3 * (towards - away), atol=3 * BOUND)


def test_normalized_attention_guidance_needs_the_images_in_both_prompts(flux):
    guidance = Guidance(nag=Nag())
    without = redux_condition(IMAGES)
    with pytest.raises(ValueError, match=r"got 3 and 11\. Add the same number"):
        evaluate(flux, without.add(POSITIVE), without.add_to_negative(NEGATIVE), guidance)
    condition = redux_condition(IMAGES, in_negative=True)
    negative = condition.add_to_negative(NEGATIVE)
    np.testing.assert_array_equal(negative.txt[TEXT:], IMAGES.reshape(-1, CONTEXT))
    guided = evaluate(flux, condition.add(POSITIVE), negative, guidance)
    assert jnp.isfinite(guided).all()


def test_another_image_or_weight_compiles_nothing(flux):
    traces = []

    @eqx.filter_jit
    def run(condition):
        traces.append(None)
        return condition.add(POSITIVE).txt

    for scale in (0.3, 1.0):
        run(redux_condition(scale * IMAGES, weights=scale, text_weight=scale))
    assert len(traces) == 1


def test_gradients_reach_the_pixels_of_the_image(networks):
    siglip, redux = networks

    @jax.jit
    @jax.grad
    def gradient(pixels):
        tokens = redux(siglip(pixels))[None]
        return jnp.sum(redux_condition(tokens).add(POSITIVE).txt ** 2)

    found = gradient(draw(9, 9, 3))
    # The last row and column are beyond the last whole patch of 4 pixels.
    assert (np.abs(found[:8, :8]).min(axis=(0, 1)) > 0).all()
    np.testing.assert_array_equal(found[8], 0)


def test_each_image_is_embedded_by_itself(networks):
    images = [jnp.clip(draw(12, 7, 3, seed=seed), -1, 1) for seed in (1, 2)]
    siglip, redux = networks
    together = redux_tokens(siglip, redux, images)
    assert together.shape == (2, TOKENS, CONTEXT)
    encoded = jax.jit(lambda pixels: redux(siglip(pixels)))
    for image, tokens in zip(images, together, strict=True):
        expected = encoded(siglip_pixels(image, SIGLIP))
        np.testing.assert_allclose(tokens, expected, rtol=1e-4, atol=1e-5)


def test_an_encoder_takes_patches_row_by_row():
    siglip = random_network(Siglip, SIGLIP)
    # One patch differs: before any attention, so does only its token.
    zeros = jax.tree.map(jnp.zeros_like, siglip.blocks)
    without_blocks = eqx.tree_at(lambda one: one.blocks, siglip, zeros)
    pixels = draw(9, 9, 3)
    other = np.array(pixels)
    other[4:8, 0:4] += 1
    encoded = jax.jit(lambda pixels: without_blocks(pixels))
    changed = np.not_equal(encoded(other), encoded(pixels))
    np.testing.assert_array_equal(changed.any(axis=1), [False, False, True, False])


def test_the_middle_of_an_image_is_cropped():
    gray = np.zeros((4, 8, 3), np.float32)
    gray[:, 2:6] = 1
    np.testing.assert_array_equal(
        siglip_pixels(gray, SiglipConfig(image_size=4, patch=2), crop=True), 1
    )
    # White is 1, which CLIP's mean and deviation of each color make of it.
    white = (1 - np.float32([0.48145466, 0.4578275, 0.40821073])) / np.float32(
        [0.26862954, 0.26130258, 0.27577711]
    )
    pixels = clip_pixels(gray, ClipVisionConfig(image_size=4, patch=2))
    np.testing.assert_allclose(pixels, np.broadcast_to(white, (4, 4, 3)), rtol=1e-6)


def test_what_does_not_fit_is_an_error(networks):
    siglip, redux = networks
    with pytest.raises(ValueError, match="takes one of append, sum"):
        redux_condition(IMAGES, rule="mean")
    with pytest.raises(ValueError, match=r"takes a number or a float array \[images\]"):
        redux_condition(IMAGES, weights=[1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match='is for rule="sum"'):
        redux_condition(IMAGES, pooled_weights=1.0)
    with pytest.raises(ValueError, match=r"`redux_condition\(text_weight\)` needs finite"):
        redux_condition(IMAGES, text_weight=float("nan"))
    with pytest.raises(ValueError, match=r"`siglip_pixels\(image\)` needs pixels that are finite"):
        siglip_pixels(jnp.full((4, 4, 3), jnp.nan))
    with pytest.raises(ValueError, match="tokens of 7 features, and the prompt of 12"):
        redux_condition(IMAGES[..., :7]).add(POSITIVE)
    with pytest.raises(ValueError, match="needs at least one image"):
        redux_tokens(siglip, redux, [])
    with pytest.raises(ValueError, match="takes 9x9 pixels, got 8x8"):
        siglip(draw(8, 8, 3))
    config = ClipVisionConfig(image_size=8, patch=4, width=4, heads=2, depth=1, mlp_width=4)
    vision = random_network(ClipVision, config)
    with pytest.raises(ValueError, match="takes 8x8 pixels, got 9x9"):
        vision(draw(9, 9, 3))
    with pytest.raises(ValueError, match="got a traced image"):
        jax.jit(siglip_pixels)(draw(8, 8, 3))
