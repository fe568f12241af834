"""ControlNets and their residuals in the transformer's blocks, by rules written out by hand."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layouts import cast_network
from small import CONFIG, IDS, IMAGE, TEXT, draw, small_controlnet, small_flux

from fluxjax import attach, quantize, unroll
from fluxjax.lora import init_lora
from fluxjax.nets import ControlNet, ControlNetConfig, ControlResiduals, DegradedBlocks
from fluxjax.nets.flux_control import residual_numbers

X, T = draw(IMAGE, 8, seed=1), 0.6
TEXT_INPUTS = {"txt": draw(TEXT, 12, seed=3), "vec": draw(6, seed=4), "img_ids": IDS}
INPUTS = {**TEXT_INPUTS, "guidance": 2.0}
LATENT = draw(IMAGE, 8, seed=7)


@pytest.fixture(scope="module")
def flux():
    return small_flux()


@pytest.fixture(scope="module")
def net():
    return small_controlnet()


def random_residuals(double, single, *, tokens=IMAGE, repeated=False):
    width = CONFIG.width
    of_double, of_single = draw(double, tokens, width, seed=5), draw(single, tokens, width, seed=6)
    return ControlResiduals(of_double, of_single, repeated)


@eqx.filter_jit
def velocity(flux, control=(), x=X, **options):
    inputs = dict(INPUTS)
    if len(x) > IMAGE:
        inputs["img_ids"] = jnp.concatenate([IDS, IDS + 1])[: len(x)]
    return flux(x, T, **inputs, control=control, **options)


@eqx.filter_jit
def residuals_of(net, x=X, condition=LATENT, **options):
    return net(x, T, condition=condition, **INPUTS, **options)


@pytest.mark.parametrize(
    ("residuals", "depth", "repeated", "expected"),
    [
        (5, 19, False, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4]),
        (6, 19, False, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4]),
        (10, 38, False, [block // 4 for block in range(38)]),
        (2, 19, True, [0, 1] * 9 + [0]),
        (4, 3, False, [0, 1, 2]),
    ],
    ids=[
        "Union",
        "Union-Pro 2.0: the sixth is unused",
        "Union, single",
        "XLabs",
        "more than blocks",
    ],
)
def test_each_block_gets_its_residual(residuals, depth, repeated, expected):
    assert residual_numbers(residuals, depth, repeated=repeated).tolist() == expected


@pytest.mark.parametrize("unrolls", [False, True])
def test_residuals_are_added_after_their_blocks(flux, unrolls):
    """A residual after the last single block of a transformer that does nothing else to it."""
    control = random_residuals(2, 2)
    network = eqx.filter_jit(unroll)(flux) if unrolls else flux

    @eqx.filter_jit
    def run(network):
        prepared = flux.prepare(jnp.float32([T]), **INPUTS)
        hidden = flux.embed(X, T, prepared)
        skipped = DegradedBlocks(CONFIG, double=range(3), single=range(2))
        return hidden.img, network.blocks(hidden, degraded=skipped, control=(control,))

    start, found = run(network)
    # Of three double blocks the first two get residual 0; each of two single blocks its own.
    double, single = np.asarray(control.double), np.asarray(control.single)
    expected = start + 2 * double[0] + double[1] + single[0] + single[1]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_several_add_up_and_a_reference_gets_nothing(flux):
    first, second = random_residuals(2, 1), random_residuals(1, 0, repeated=True)
    x = draw(IMAGE + 3, 8, seed=8)

    def padded(residuals):
        rows = ((0, 0), (0, 3), (0, 0))
        return ControlResiduals(
            jnp.pad(residuals.double, rows), jnp.pad(residuals.single, rows), residuals.repeated
        )

    found = velocity(flux, (first, second), x=x)
    expected = velocity(flux, (padded(first), padded(second)), x=x)
    np.testing.assert_array_equal(found, expected)
    assert np.abs(found - velocity(flux, (first,), x=x)).max() > 1e-3


def test_every_residual_has_a_gradient_but_the_unused_one():
    """Of three for four blocks the third is for none, as the sixth of Union-Pro 2.0."""
    network = small_flux(replace(CONFIG, double_depth=4, single_depth=2))
    control = random_residuals(3, 2)

    @eqx.filter_jit
    def gradient(network, control, **options):
        def loss(control):
            return jnp.sum(network(X, T, **INPUTS, control=(control,), **options) ** 2)

        return eqx.filter_grad(loss)(control)

    found = gradient(network, control)
    by_residual = np.abs(found.double).max(axis=(1, 2))
    assert (by_residual[:2] > 0).all()
    assert by_residual[2] == 0
    assert (np.abs(found.single).max(axis=(1, 2)) > 0).all()
    again = gradient(network, control, remat=True)
    np.testing.assert_allclose(again.double, found.double, rtol=1e-3, atol=1e-4)


def test_every_weight_of_a_controlnet_has_a_gradient(flux):
    net = small_controlnet(modes=3, guidance_embed=False)

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(net):
        mode = jnp.int32(1)
        control = net(X, T, condition=LATENT, **TEXT_INPUTS, mode=mode)
        return jnp.sum(flux(X, T, **INPUTS, control=(control,)) ** 2)

    for path, leaf in jax.tree_util.tree_flatten_with_path(gradient(net))[0]:
        assert np.abs(leaf).max() > 0, path


def test_a_new_controlnet_changes_nothing():
    config = small_controlnet(double_depth=1, single_depth=0).config
    # Compiled, so that no other weight is drawn.
    residual = jax.jit(lambda key: ControlNet(config, key=key).double_residual)(jax.random.key(0))
    assert not np.any(residual.weight.value)
    assert not np.any(residual.bias)


def test_modes_differ_and_one_that_there_is_not_is_nan():
    net = small_controlnet(modes=4)
    first, second, missing = (residuals_of(net, mode=jnp.int32(mode)) for mode in (0, 3, 4))
    assert np.abs(first.double - second.double).max() > 1e-3
    assert np.isnan(missing.double).all()


def test_without_single_blocks_there_are_no_single_residuals(flux):
    net = small_controlnet(single_depth=0)
    residuals = residuals_of(net)
    assert residuals.single.shape == (0, IMAGE, 32)
    assert np.abs(velocity(flux, (residuals,)) - velocity(flux)).max() > 1e-3
    unrolled = residuals_of(eqx.filter_jit(unroll)(net))
    np.testing.assert_allclose(unrolled.double, residuals.double, atol=1e-5)
    half = cast_network(net, jnp.bfloat16)
    np.testing.assert_allclose(residuals_of(half).double, residuals.double, rtol=0.1, atol=0.2)


def test_an_image_is_reduced_to_the_image_tokens():
    """Of 5 tokens in a row: 16x80 pixels."""
    net = small_controlnet(single_depth=0, hint_image=True)
    image = jnp.tanh(draw(16, 80, 3, seed=9))
    residuals = residuals_of(net, condition=image)
    assert residuals.repeated
    assert residuals.double.shape == (2, IMAGE, 32)
    with pytest.raises(ValueError, match=r"image, \[height, width, 3\]"):
        residuals_of(net, condition=LATENT)
    with pytest.raises(ValueError, match="of the image's size"):
        residuals_of(net, condition=image[:, :64])


def test_stored_otherwise_it_computes_the_same(net):
    plain = residuals_of(net)
    lora = init_lora(net, 2, [r"double\..*\.qkv", "double_residual.*"], key=jax.random.key(0))
    for other in (eqx.filter_jit(unroll)(net), attach(net, [lora])):
        np.testing.assert_allclose(residuals_of(other).double, plain.double, atol=1e-4)
    # Adapters of random numbers do something; 8 bits are close.
    moved = jax.jit(lambda lora: jax.tree.map(lambda leaf: leaf + 0.1, lora))(lora)
    assert np.abs(residuals_of(attach(net, [moved])).double - plain.double).max() > 1e-3
    rounded = residuals_of(quantize(net, "int8"))
    scale = np.abs(plain.double).max()
    assert 0 < np.abs(rounded.double - plain.double).max() < 0.1 * scale


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"mode": 1}, "has no modes"),
        ({"modes": 3}, {}, "needs `mode=`"),
        ({"modes": 3}, {"mode": 3}, "is 0 to 2, got 3"),
        ({}, {"condition": LATENT[:3]}, r"got float32\[3, 8\]"),
        ({}, {"condition": draw(16, 80, 3)}, "takes a packed latent"),
        ({"context": 7}, {}, "txt has 12 features, not 7"),
        ({"guidance_embed": False}, {}, "has no guidance embedder"),
    ],
)
def test_what_does_not_fit_is_an_error(changes, options, message):
    with pytest.raises(ValueError, match=message):
        small_controlnet(**changes)(X, T, **{"condition": LATENT, **INPUTS, **options})


def test_residuals_of_another_width_or_image_are_an_error(flux):
    wide = ControlResiduals(jnp.zeros((1, IMAGE, 8)), jnp.zeros((0, IMAGE, 8)), False)
    for control in (wide, random_residuals(1, 0, tokens=IMAGE + 1)):
        with pytest.raises(ValueError, match="of this transformer's width"):
            velocity(flux, (control,))


def test_configs_that_can_not_be_are_errors():
    with pytest.raises(ValueError, match="at least one double"):
        ControlNetConfig(double_depth=0)
    with pytest.raises(ValueError, match="multiple of 4"):
        ControlNetConfig(hint_image=True, in_channels=6)
