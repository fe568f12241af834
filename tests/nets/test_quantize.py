"""Matmuls of 8 bits, against the numbers that 8 bits stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import CONFIG, IDS, IMAGE, TEXT, draw, small_flux
from test_shard import drawn, mesh_of, relative

import fluxjax
from fluxjax import quantize, shard
from fluxjax.generate.draw import denoise
from fluxjax.generate.text import encode_text, prompt_ids
from fluxjax.nets.quantized import EIGHT_BITS, QuantizedWeight, round_rows

FORMATS = pytest.mark.parametrize("name", EIGHT_BITS)
# Half a step of 127, and half a unit of 3 bits of mantissa.
NEAR = {"int8": 0.5 / 127, "fp8": 2**-4}


def whole(value, scale):
    """Return what 8 bits stand for, in float64."""
    return (
        np.asarray(value.astype(jnp.float32), np.float64) * np.asarray(scale, np.float64)[..., None]
    )


@FORMATS
def test_rows_are_rounded_to_the_nearest(name):
    x = np.asarray(draw(7, 50)) * np.float32(10.0) ** np.arange(-3, 4, dtype=np.float32)[:, None]
    x[2] = 0
    value, scale = round_rows(jnp.asarray(x), EIGHT_BITS[name])
    found, largest = whole(value, scale), np.abs(x).max(-1, keepdims=True)
    assert value.dtype == EIGHT_BITS[name]
    size = (
        largest if name == "int8" else np.maximum(np.abs(x), largest * 2**-6 / 448)
    )  # below, e4m3 has even steps
    assert np.all(np.abs(found - x) <= 1.0001 * NEAR[name] * size)
    assert not found[2].any()
    np.testing.assert_allclose(np.abs(found).max(-1), largest[:, 0], rtol=1e-6)


@FORMATS
def test_a_product_is_that_of_the_rounded_numbers(name):
    x, w = draw(3, 5, 40, seed=1), draw(6, 40, seed=2)
    weight = QuantizedWeight(*round_rows(w, EIGHT_BITS[name]))
    expected = whole(*round_rows(x, EIGHT_BITS[name])) @ whole(weight.value, weight.scale).T
    assert relative(weight.matmul(x), jnp.asarray(expected, jnp.float32)) <= 1e-6
    text = jax.jit(lambda weight, x: weight.matmul(x)).lower(weight, x).as_text()
    (dot,) = [line for line in text.splitlines() if "dot_general" in line]
    assert dot.count({"int8": "xi8>", "fp8": "xf8E4M3FN>"}[name]) == 2
    # A gradient passes the rounding by.
    slope = jax.grad(lambda x: jnp.vdot(weight.matmul(x), draw(3, 5, 6, seed=3)))(x)
    plain = jnp.asarray(
        np.asarray(draw(3, 5, 6, seed=3)) @ whole(weight.value, weight.scale), jnp.float32
    )
    assert relative(slope, plain) <= 1e-6


@FORMATS
def test_networks_of_8_bits_are_near(tiny, name):
    flux, t5 = quantize(tiny.flux, name), quantize(tiny.t5, name)
    for network, loaded in ((flux, fluxjax.load_flux), (t5, fluxjax.load_t5)):
        jax.tree.map(
            np.testing.assert_array_equal, network, loaded("tiny", dtype="float32", quantize=name)
        )
    blocks = (flux.double, flux.single, t5.blocks)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(blocks)) < 0.27 * sum(
        leaf.nbytes
        for leaf in jax.tree.leaves((tiny.flux.double, tiny.flux.single, tiny.t5.blocks))
    )
    ids = prompt_ids(tiny.tokenizers, ["a red star"], max_length=13)
    found, expected = (
        encode_text(tiny.clip, one, ids, dtype=jnp.float32).txt for one in (t5, tiny.t5)
    )
    assert 1e-4 < relative(found, expected) <= {"int8": 0.03, "fp8": 0.06}[name]
    inputs = drawn(tiny, 2)
    expected, bound = denoise(tiny.flux, *inputs), {"int8": 0.02, "fp8": 0.03}[name]
    found = denoise(flux, *inputs)
    assert 1e-4 < relative(found, expected) <= bound
    # On a mesh a sum in another order rounds a few numbers to the other side, and those after them: as near, not the same.
    mesh = mesh_of(fsdp=2, tensor=2)
    assert relative(denoise(shard(flux, mesh), *inputs, mesh=mesh), expected) <= bound


def test_adapters_stand_beside_8_bits(tiny):
    lora = fluxjax.read_lora(fluxjax.checkpoint.shipped.shipped_lora("kraft"))
    flux, inputs = quantize(tiny.flux, "int8"), drawn(tiny, 2)
    expected = denoise(fluxjax.attach(tiny.flux, [lora]), *inputs)
    assert relative(denoise(fluxjax.attach(flux, [lora]), *inputs), expected) <= 0.02
    assert relative(denoise(flux, *inputs), expected) > 0.04


def test_gradients_go_through_a_network_of_8_bits():
    flux = small_flux()

    @jax.jit
    def slope(flux):
        x, inputs = (
            draw(IMAGE, CONFIG.in_channels),
            dict(txt=draw(TEXT, CONFIG.context), img_ids=IDS, guidance=1.0),
        )
        return jax.grad(lambda vec: jnp.sum(flux(x, 0.5, vec=vec, **inputs) ** 2))(
            draw(CONFIG.pooled)
        )

    assert 1e-4 < relative(slope(quantize(flux, "int8")), slope(flux)) <= 0.1


def test_what_can_not_be_rounded_is_told(tiny):
    flux = small_flux()
    with pytest.raises(ValueError, match=r"no format 'int4' of 8 bits\. Choose one of int8, fp8"):
        quantize(flux, "int4")
    kraft = fluxjax.read_lora(fluxjax.checkpoint.shipped.shipped_lora("kraft"))
    for network in (quantize(flux, "int8"), fluxjax.attach(tiny.flux, [kraft]), tiny.vae):
        with pytest.raises(ValueError, match="rounds plain matrices"):
            quantize(network, "int8")
    with pytest.raises(ValueError, match="Quantized weights have no streamed form"):
        fluxjax.stream_blocks(quantize(flux, "int8"))
    with pytest.raises(fluxjax.WeightsError, match="stored as Quantized"):
        fluxjax.merge(quantize(tiny.flux, "fp8"), [kraft])
    with pytest.raises(ValueError, match="Pass one of sharding="):
        fluxjax.load_flux("tiny", quantize="int8", stream=True)


def test_memory_is_given_free_matrix_by_matrix():
    flux = small_flux()
    quantize(flux, "int8", donate=True)
    assert flux.double.img.qkv.weight.value.is_deleted()
    assert not flux.img_in.weight.value.is_deleted()
