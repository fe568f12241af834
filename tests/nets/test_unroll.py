"""Blocks taken apart compute what stacked ones do, and programs hold no second copy of stacks."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import CONFIG, IDS, IMAGE, TEXT, draw, small_flux
from test_shard import drawn, mesh_of

import fluxjax
from fluxjax import Flux, FluxConfig, Guided, quantize, shard, unroll
from fluxjax.flow import sample
from fluxjax.generate import CachedFlux, FirstBlock
from fluxjax.generate.draw import denoise
from fluxjax.nets import DegradedBlocks

INPUTS = dict(txt=draw(TEXT, CONFIG.context), vec=draw(CONFIG.pooled), img_ids=IDS, guidance=2.0)


@pytest.fixture(scope="module")
def flux():
    return small_flux()


@pytest.mark.parametrize(
    "options",
    [{}, {"remat": True}, {"degraded": DegradedBlocks(CONFIG, double=[1], single=[0])}],
    ids=["plain", "remat", "degraded"],
)
def test_values_and_gradients_are_those_of_stacked_blocks(flux, options):
    @eqx.filter_jit
    def run(flux):
        return eqx.filter_value_and_grad(
            lambda flux: jnp.sum(flux(draw(IMAGE, 8), 0.5, **INPUTS, **options) ** 2)
        )(flux)

    (value, slopes), (other, others) = run(flux), run(unroll(flux))
    np.testing.assert_allclose(other, value, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-4 * np.abs(a).max()),
        unroll(slopes),
        others,
    )


def test_what_else_takes_a_network_takes_blocks_apart(flux, tiny):
    def cached(flux):
        velocity = Guided(
            CachedFlux(flux, FirstBlock(jnp.float32(0.5)), IDS, 2.0), (INPUTS["txt"], INPUTS["vec"])
        )
        return eqx.filter_jit(sample)(velocity, draw(IMAGE, 8), fluxjax.flow_times(4)).x

    np.testing.assert_allclose(cached(unroll(flux)), cached(flux), atol=1e-5)
    ids, states = jnp.arange(7), eqx.filter_jit(lambda t5, ids: t5(ids))
    np.testing.assert_allclose(
        states(unroll(tiny.t5), ids), states(tiny.t5, ids), rtol=1e-4, atol=1e-5
    )
    inputs, kraft = (
        drawn(tiny, 2),
        fluxjax.read_lora(fluxjax.checkpoint.shipped.shipped_lora("kraft")),
    )
    adapted = fluxjax.attach(tiny.flux, [kraft])
    expected = denoise(adapted, *inputs)
    np.testing.assert_allclose(denoise(unroll(adapted), *inputs), expected, atol=1e-4)
    for mesh in (mesh_of(fsdp=2), mesh_of(tensor=2)):
        for there in (shard(unroll(adapted), mesh), unroll(shard(adapted, mesh))):
            np.testing.assert_allclose(denoise(there, *inputs, mesh=mesh), expected, atol=1e-4)


@pytest.mark.parametrize("depth", [0, 1])
def test_of_a_kind_there_may_be_no_block_left_to_run(depth):
    network = Flux(replace(CONFIG, double_depth=depth), key=jax.random.key(0))
    x, inputs = draw(IMAGE, 8), (INPUTS["txt"], INPUTS["vec"])

    @eqx.filter_jit
    def run(flux):
        if not depth:
            return flux(x, 0.5, **INPUTS)
        cached = CachedFlux(
            flux, FirstBlock(jnp.float32(0.1)), IDS, 2.0
        )  # runs the only double block by itself
        return sample(Guided(cached, inputs), x, fluxjax.flow_times(3)).x

    np.testing.assert_allclose(run(unroll(network)), run(network), atol=1e-5)


def test_what_comes_before_is_told(flux, tiny):
    with pytest.raises(ValueError, match=r"Quantize before `unroll`"):
        quantize(unroll(flux), "int8")
    for network in (tiny.vae, unroll(flux)):
        with pytest.raises(ValueError, match=r"takes stacked blocks apart, and this \w+ has none"):
            unroll(network)
    with pytest.raises(fluxjax.WeightsError):
        fluxjax.merge(
            unroll(tiny.flux), [fluxjax.read_lora(fluxjax.checkpoint.shipped.shipped_lora("kraft"))]
        )


def test_donated_stacks_are_given_free():
    flux = small_flux()
    apart = unroll(flux, donate=True)
    assert flux.double.img.qkv.weight.value.is_deleted()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(apart))


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

    shapes = jax.ShapeDtypeStruct((8, 64), jnp.float32), jax.ShapeDtypeStruct((8, 16), jnp.bfloat16)
    memory = jax.jit(run).lower(flux, *shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.5 * memory.argument_size_in_bytes
