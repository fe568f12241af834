"""IP-Adapters: keys and values of an image, and where the blocks of a transformer add them."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layouts import random_network
from small import CONFIG, IDS, IMAGE, TEXT, draw, small_flux

from fluxjax import Flux, stream_blocks, unroll
from fluxjax.kernels import Nag
from fluxjax.nets import DegradedBlocks, ImagePrompt, IpAdapter, IpAdapterConfig
from fluxjax.nets.image_prompt import for_image_tokens
from fluxjax.nets.layers import standardize

SIZES = dict(features=5, tokens=3, context=7, width=32, head_dim=16, double_depth=3)
XLABS = IpAdapterConfig(**SIZES)
INSTANTX = IpAdapterConfig(**SIZES, hidden=6, single_depth=2, joins_attention=True)
CONFIGS = {"xlabs": XLABS, "instantx": INSTANTX}
EMBEDDING = draw(5, seed=7)
X, T = draw(IMAGE, 8), jnp.float32(0.6)
INPUTS = dict(txt=draw(TEXT, 12, seed=3), vec=draw(6, seed=4), img_ids=IDS, guidance=2.0)
# The same sums in programs that are compiled apart.
BOUND = 1e-5


@pytest.fixture(scope="module")
def flux():
    return small_flux()


@pytest.fixture(scope="module")
def prompts() -> dict[str, ImagePrompt]:
    found = {}
    for name, config in CONFIGS.items():
        adapter = random_network(IpAdapter, config, scale=0.5)
        found[name] = jax.jit(adapter.__call__)(EMBEDDING)
    return found


@eqx.filter_jit
def evaluate(flux, prompt=None, x=X, **options):
    image_prompts = [] if prompt is None else [prompt]
    return flux(x, T, **INPUTS, image_prompts=image_prompts, **options)


@eqx.filter_jit
def first(flux, *prompts):
    """Return the image's tokens before and after the first double block."""
    prepared = flux.with_image_prompts(flux.prepare(T[None], **INPUTS), prompts)
    hidden = flux.embed(X, T, prepared)
    return hidden.img, flux.first(hidden)[0]


def scaled(prompt, factor):
    return replace(prompt, scales=prompt.scales * factor)


def test_keys_and_values_are_those_of_the_formula():
    adapter = random_network(IpAdapter, XLABS)
    prompt = adapter(EMBEDDING)
    tokens = (adapter.project.weight.value @ EMBEDDING + adapter.project.bias).reshape(3, 7)
    tokens = standardize(tokens, 1e-5) * adapter.norm.scale + adapter.norm.bias
    for layer, found in ((adapter.blocks.k, prompt.double.k), (adapter.blocks.v, prompt.double.v)):
        expected = jnp.einsum("tc,dwc->dtw", tokens, layer.weight.value) + layer.bias[:, None]
        np.testing.assert_allclose(found.reshape(3, 3, 32), expected, rtol=1e-4, atol=1e-4)
    assert prompt.single is None


def test_normalized_keys_and_values_have_a_mean_square_of_1(prompts):
    for blocks in (prompts["instantx"].double, prompts["instantx"].single):
        for x in blocks:
            # Without the 1e-5 in the root it would be 1 exactly.
            np.testing.assert_allclose(np.mean(np.square(x), axis=-1), 1, atol=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_scale_0_is_bitwise_the_base(flux, prompts, name):
    base = evaluate(flux)
    np.testing.assert_array_equal(evaluate(flux, scaled(prompts[name], 0.0)), base)
    assert np.abs(evaluate(flux, prompts[name]) - base).max() > 0.01


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_reach_the_keys_values_and_scale_of_every_block(flux, prompts, name):
    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(prompt):
        return jnp.sum(evaluate(flux, prompt) ** 2)

    found = gradient(prompts[name])
    for kind in (found.double, found.single):
        for x in kind or ():
            assert (np.abs(x).max(axis=(1, 2, 3)) > 1e-6).all()
    assert (np.abs(found.scales) > 1e-6).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_unrolled_streamed_or_rematerialized_give_the_same(flux, prompts, name):
    expected = evaluate(flux, prompts[name])
    for other in (eqx.filter_jit(unroll)(flux), stream_blocks(flux)):
        np.testing.assert_allclose(evaluate(other, prompts[name]), expected, atol=BOUND)
    found = evaluate(flux, prompts[name], remat=True)
    np.testing.assert_allclose(found, expected, atol=BOUND)


def test_what_an_adapter_of_xlabs_adds_is_not_gated(flux, prompts):
    """With zero modulation the blocks pass the image on: only the prompt changes it."""
    zeros = jax.tree.map(jnp.zeros_like, flux.double.img.modulation)
    still = eqx.tree_at(lambda one: one.double.img.modulation, flux, zeros)
    before, after = first(still, prompts["xlabs"])
    assert np.abs(after - before).max() > 0.01
    before, after = first(still, prompts["instantx"])
    np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_of_a_reference_get_nothing(flux, prompts, name):
    """In the first block, after which they attend to tokens that have changed."""
    own = IMAGE - 2
    limited = for_image_tokens(prompts[name], own, 2)
    _, base = first(flux)
    _, img = first(flux, limited)
    np.testing.assert_array_equal(img[own:], base[own:])
    assert (np.abs(img[:own] - base[:own]).max(axis=1) > 1e-3).all()
    # In single blocks the text's tokens come first, and get their share.
    if name == "instantx":
        (block,) = limited.in_single(TEXT)
        np.testing.assert_array_equal(block.token_weights[0], [1] * (TEXT + own) + [0, 0])


def test_two_prompts_add_up_in_one_block(flux, prompts):
    prompt = prompts["xlabs"]
    base = first(flux)[1]
    once = first(flux, prompt)[1] - base
    np.testing.assert_allclose(first(flux, prompt, prompt)[1] - base, 2 * once, atol=BOUND)
    doubled = first(flux, scaled(prompt, 2.0))[1] - base
    np.testing.assert_allclose(doubled, 2 * once, atol=BOUND)


def test_blocks_that_are_skipped_do_not_attend_to_a_prompt(flux, prompts):
    prompt = prompts["xlabs"]
    blocks = DegradedBlocks(CONFIG, double=[0, 2])
    skipped = evaluate(flux, prompt, degraded=blocks)
    without = replace(prompt, scales=prompt.scales.at[jnp.array([0, 2])].set(0.0))
    np.testing.assert_allclose(evaluate(flux, without, degraded=blocks), skipped, atol=BOUND)
    assert np.abs(skipped - evaluate(flux, degraded=blocks)).max() > 1e-3


def test_normalized_attention_guidance_leaves_the_prompt_as_it_is(flux, prompts):
    """With both halves of the text alike it changes nothing."""
    txt = INPUTS["txt"]
    doubled = INPUTS | {"txt": jnp.concatenate([txt, txt])}
    found = eqx.filter_jit(flux)(
        X, T, **doubled, image_prompts=[prompts["instantx"]], attention=Nag()
    )
    np.testing.assert_allclose(found, evaluate(flux, prompts["instantx"]), atol=BOUND)


def test_prompts_for_other_blocks_or_heads_are_errors(flux):
    for change, text in (
        (dict(double_depth=2), "keys of 2 double blocks with 2 heads of 16, and it has 3"),
        (dict(head_dim=8), "with 4 heads of 8"),
    ):
        adapter = random_network(IpAdapter, replace(XLABS, **change))
        with pytest.raises(ValueError, match=text):
            eqx.filter_eval_shape(evaluate, flux, adapter(EMBEDDING))
    adapter = random_network(IpAdapter, replace(INSTANTX, single_depth=1))
    with pytest.raises(ValueError, match="keys of 1 single blocks"):
        eqx.filter_eval_shape(evaluate, flux, adapter(EMBEDDING))
    with pytest.raises(ValueError, match="takes 5 features, got 4"):
        adapter(EMBEDDING[:4])
    with pytest.raises(ValueError, match="adapters that join the attention"):
        IpAdapterConfig(single_depth=3)
    with pytest.raises(ValueError, match="a width of whole heads"):
        IpAdapterConfig(width=100)


def test_a_transformer_without_prompts_has_none_in_what_is_prepared(flux):
    prepared = eqx.filter_eval_shape(flux.prepare, jnp.ones(1), **INPUTS)
    assert prepared.image_prompts == ()
    names = Flux.with_image_prompts(flux, prepared, [])
    assert jax.tree.structure(names) == jax.tree.structure(prepared)
