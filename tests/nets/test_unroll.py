"""Unrolled blocks compute what stacked ones do, and programs hold no second copy of a stack."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawing import encoded
from meshes import flux_inputs, mesh_of, relative, velocities
from small import CONFIG, IDS, IMAGE, TEXT, adapted, draw, small_flux

import fluxjax
from fluxjax import Flux, FluxConfig, quantize, shard, unroll
from fluxjax.checkpoint.shipped import shipped_lora
from fluxjax.nets import DegradedBlocks

SHALLOW = replace(CONFIG, double_depth=2, single_depth=1)
INPUTS = dict(txt=draw(TEXT, CONFIG.context), vec=draw(CONFIG.pooled), img_ids=IDS, guidance=2.0)


@pytest.fixture(scope="module")
def flux():
    return small_flux(SHALLOW)


@pytest.fixture(scope="module")
def kraft():
    return fluxjax.read_lora(shipped_lora("kraft"))


@pytest.mark.parametrize(
    "options",
    [{}, {"remat": True}, {"degraded": DegradedBlocks(SHALLOW, double=[1], single=[0])}],
    ids=["plain", "remat", "degraded"],
)
def test_values_and_gradients_are_those_of_stacked_blocks(flux, options):
    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def run(flux):
        return jnp.sum(flux(draw(IMAGE, 8), 0.5, **INPUTS, **options) ** 2)

    value, gradient = run(flux)
    unrolled_value, unrolled_gradient = run(unroll(flux))
    np.testing.assert_allclose(unrolled_value, value, rtol=1e-5)

    def check(stacked, unrolled):
        bound = 1e-4 * np.abs(stacked).max()
        np.testing.assert_allclose(unrolled, stacked, rtol=1e-3, atol=bound)

    jax.tree.map(check, unroll(gradient), unrolled_gradient)


@pytest.mark.parametrize("unrolls", [False, True])
def test_the_first_block_and_the_rest_are_all_blocks(flux, unrolls):
    """As a step cache runs them."""
    network = unroll(flux) if unrolls else flux

    @eqx.filter_jit
    def run(flux):
        prepared = flux.prepare(jnp.float32([0.5]), **INPUTS)
        hidden = flux.embed(draw(IMAGE, 8), 0.5, prepared)
        img, txt = flux.first(hidden)
        rest = flux.blocks(hidden._replace(img=img, txt=txt), start=1)
        return rest, flux.blocks(hidden)

    rest, whole = run(network)
    np.testing.assert_allclose(rest, whole, rtol=1e-4, atol=1e-5)


def test_encoders_can_be_unrolled(tiny):
    texts = ["a red star"]
    found = encoded(tiny._replace(t5=unroll(tiny.t5), clip=unroll(tiny.clip)), texts)
    expected = encoded(tiny, texts)
    np.testing.assert_allclose(found.txt, expected.txt, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.vec, expected.vec, rtol=1e-4, atol=1e-5)


def test_adapted_and_sharded_networks_can_be_unrolled(flux):
    rows = flux_inputs(SHALLOW, 2)
    network = adapted(flux)
    expected = velocities(network, rows)
    assert relative(velocities(flux, rows), expected) > 0.01
    np.testing.assert_allclose(velocities(unroll(network), rows), expected, atol=1e-4)
    for sizes, shards_first in ((dict(fsdp=2), False), (dict(tensor=2), True)):
        mesh = mesh_of(**sizes)
        placed = unroll(shard(network, mesh)) if shards_first else shard(unroll(network), mesh)
        np.testing.assert_allclose(velocities(placed, rows, mesh), expected, atol=1e-4)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_kind_may_have_no_block_left_to_run(depth):
    network = small_flux(replace(SHALLOW, double_depth=depth))

    @eqx.filter_jit
    def run(flux):
        prepared = flux.prepare(jnp.float32([0.5]), **INPUTS)
        hidden = flux.embed(draw(IMAGE, 8), 0.5, prepared)
        if depth:
            # A step cache runs the only double block by itself.
            img, txt = flux.first(hidden)
            hidden = hidden._replace(img=img, txt=txt)
        return flux.blocks(hidden, start=depth)

    np.testing.assert_allclose(run(unroll(network)), run(network), atol=1e-5)


def test_the_order_of_changes_is_told(flux, tiny, kraft):
    with pytest.raises(ValueError, match=r"Quantize before `unroll`"):
        quantize(unroll(flux), "int8")
    for network in (tiny.vae, unroll(flux)):
        with pytest.raises(ValueError, match=r"takes stacked blocks apart, and this \w+ has none"):
            unroll(network)
    with pytest.raises(fluxjax.WeightsError):
        fluxjax.merge(unroll(tiny.flux), [kraft])


def test_donated_stacks_are_freed():
    flux = small_flux()
    unrolled = unroll(flux, donate=True)
    assert flux.double.img.qkv.weight.value.is_deleted()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(unrolled))


def test_a_program_of_16_bits_holds_no_stack_in_float32():
    """XLA:CPU would make one before the loop."""
    config = FluxConfig(
        width=256,
        heads=2,
        double_depth=1,
        single_depth=12,
        mlp_width=1024,
        context=16,
        pooled=16,
        rope_axes=(16, 56, 56),
    )
    flux = eqx.filter_eval_shape(Flux, config, key=jax.random.key(0))
    flux = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), flux)
    inputs = dict(img_ids=jnp.zeros((8, 3)), guidance=1.0, vec=jnp.zeros(16))

    def run(flux, x, txt):
        return flux(x, 0.5, txt=txt, **inputs)

    x = jax.ShapeDtypeStruct((8, 64), jnp.float32)
    txt = jax.ShapeDtypeStruct((8, 16), jnp.bfloat16)
    memory = jax.jit(run).lower(flux, x, txt).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.5 * memory.argument_size_in_bytes
