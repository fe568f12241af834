"""Matmuls of 8 bits, against the numbers that 8 bits stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawing import encoded
from meshes import flux_inputs, mesh_of, relative, velocities
from small import CONFIG, IDS, IMAGE, TEXT, draw, small_flux

import fluxjax
from fluxjax import quantize, shard
from fluxjax.checkpoint.shipped import shipped_lora
from fluxjax.nets.activations import gelu, gelu_maxima
from fluxjax.nets.quantized import EIGHT_BITS, QuantizedWeight, round_rows

FORMATS = pytest.mark.parametrize("name", EIGHT_BITS)
# Half a step of 127, and half a unit in the last of 3 bits of mantissa.
ROUNDING = {"int8": 0.5 / 127, "fp8": 2**-4}


def dequantized(value, scale):
    """Return the numbers that 8 bits stand for, in float64."""
    value = np.asarray(value).astype(np.float32).astype(np.float64)
    return value * np.asarray(scale, np.float64)[..., None]


@FORMATS
def test_rows_are_rounded_to_the_nearest(name):
    x = np.asarray(draw(7, 50)) * np.float32(10.0) ** np.arange(-3, 4, dtype=np.float32)[:, None]
    x[2] = 0
    value, scale = round_rows(jnp.asarray(x), EIGHT_BITS[name])
    found, largest = dequantized(value, scale), np.abs(x).max(-1, keepdims=True)
    assert value.dtype == EIGHT_BITS[name]
    size = largest
    if name == "fp8":
        # Below its smallest normal number, e4m3 has even steps.
        size = np.maximum(np.abs(x), largest * 2**-6 / 448)
    assert np.all(np.abs(found - x) <= 1.0001 * ROUNDING[name] * size)
    assert not found[2].any()
    np.testing.assert_allclose(np.abs(found).max(-1), largest[:, 0], rtol=1e-6)


@FORMATS
def test_a_product_is_that_of_the_rounded_numbers(name):
    x, matrix = draw(3, 5, 40, seed=1), draw(6, 40, seed=2)
    weight = QuantizedWeight(*round_rows(matrix, EIGHT_BITS[name]))
    rounded = dequantized(weight.value, weight.scale)
    multiply = jax.jit(lambda weight, x: weight.matmul(x))
    expected = dequantized(*round_rows(x, EIGHT_BITS[name])) @ rounded.T
    assert relative(multiply(weight, x), expected) <= 1e-6
    program = multiply.lower(weight, x).as_text()
    (product,) = [line for line in program.splitlines() if "dot_general" in line]
    # CPUs multiply float8 as bfloat16, which has all of its numbers.
    assert product.count({"int8": "xi8>", "fp8": "xbf16>"}[name]) == 2
    # The gradient ignores the rounding of x.
    cotangent = draw(3, 5, 6, seed=3)
    slope = jax.grad(lambda x: jnp.vdot(weight.matmul(x), cotangent))(x)
    assert relative(slope, np.asarray(cotangent) @ rounded) <= 1e-6


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_largest_magnitude_of_gelu_is_known_before_gelu_is(dtype):
    rng = np.random.default_rng(0)
    rows = [
        rng.standard_normal((40, 30)),  # most of them decided by a positive number
        0.1 * rng.standard_normal((40, 30)),
        -2 * rng.random((200, 3)),  # on both sides of the minimum
        -0.75 - 0.01 * rng.random((40, 5)),
        -np.exp(rng.uniform(-8, 3, (40, 4))),
        np.zeros((1, 3)),
    ]
    for part in rows:
        x = jnp.asarray(part, dtype)
        found, expected = gelu_maxima(x), jnp.max(jnp.abs(gelu(x)), axis=-1)
        assert found.dtype == dtype
        # Near its minimum GELU is flat: what is nearest to it may be a rounding lower.
        step = 3 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(np.float64(found), np.float64(expected), rtol=step)


@FORMATS
def test_a_product_with_a_known_largest_magnitude_is_the_same(name):
    x, matrix = draw(3, 5, 40, seed=1), draw(6, 40, seed=2)
    weight = QuantizedWeight(*round_rows(matrix, EIGHT_BITS[name]))

    def largest():
        return jnp.max(jnp.abs(x), axis=-1)

    np.testing.assert_array_equal(weight.matmul(x, largest), weight.matmul(x))
    slopes = (
        jax.grad(lambda x, known=known: weight.matmul(x, known).sum())(x)
        for known in (largest, None)
    )
    np.testing.assert_array_equal(*slopes)


@FORMATS
def test_quantized_networks_are_near_the_plain_ones(tiny, name):
    flux, t5 = quantize(tiny.flux, name), quantize(tiny.t5, name)
    for network, loader in ((flux, fluxjax.load_flux), (t5, fluxjax.load_t5)):
        loaded = loader("tiny", dtype="float32", quantize=name)
        jax.tree.map(np.testing.assert_array_equal, network, loaded)
    blocks, plain = ((n.double, n.single, t.blocks) for n, t in ((flux, t5), (tiny.flux, tiny.t5)))
    nbytes, plain_bytes = (sum(x.nbytes for x in jax.tree.leaves(one)) for one in (blocks, plain))
    assert nbytes < 0.27 * plain_bytes
    found = encoded(tiny._replace(t5=t5), ["a red star"]).txt
    expected = encoded(tiny, ["a red star"]).txt
    assert 1e-4 < relative(found, expected) <= {"int8": 0.03, "fp8": 0.06}[name]
    rows, bound = flux_inputs(tiny.flux.config, 2), {"int8": 0.02, "fp8": 0.05}[name]
    expected = velocities(tiny.flux, rows)
    assert 1e-4 < relative(velocities(flux, rows), expected) <= bound
    # On a mesh a sum in another order rounds a few numbers to the other side, and those after
    # them: as near, but not the same.
    mesh = mesh_of(fsdp=2, tensor=2)
    assert relative(velocities(shard(flux, mesh), rows, mesh), expected) <= bound


def test_adapters_stand_beside_8_bits(tiny):
    lora = fluxjax.read_lora(shipped_lora("kraft"))
    flux, rows = quantize(tiny.flux, "int8"), flux_inputs(tiny.flux.config, 2)
    expected = velocities(fluxjax.attach(tiny.flux, [lora]), rows)
    assert relative(velocities(fluxjax.attach(flux, [lora]), rows), expected) <= 0.02
    assert relative(velocities(flux, rows), expected) > 0.04


def test_gradients_go_through_a_quantized_network():
    x, txt = draw(IMAGE, CONFIG.in_channels), draw(TEXT, CONFIG.context)

    @jax.jit
    def slope(flux, vec):
        def loss(vec):
            velocity = flux(x, 0.5, vec=vec, txt=txt, img_ids=IDS, guidance=1.0)
            return jnp.sum(velocity**2)

        return jax.grad(loss)(vec)

    flux, vec = small_flux(), draw(CONFIG.pooled)
    assert 1e-4 < relative(slope(quantize(flux, "int8"), vec), slope(flux, vec)) <= 0.1


def test_what_can_not_be_quantized_is_refused(tiny):
    flux = small_flux()
    with pytest.raises(ValueError, match=r"no format 'int3' to quantize to\. Choose one of int8"):
        quantize(flux, "int3")
    with pytest.raises(ValueError, match="has none that int4 takes"):
        quantize(flux, "int4")  # of 32 columns and 48
    kraft = fluxjax.read_lora(shipped_lora("kraft"))
    for network in (quantize(flux, "int8"), fluxjax.attach(tiny.flux, [kraft]), tiny.vae):
        with pytest.raises(ValueError, match="rounds plain matrices"):
            quantize(network, "int8")
    with pytest.raises(fluxjax.WeightsError, match="stored as Quantized"):
        fluxjax.merge(quantize(tiny.flux, "fp8"), [kraft])
    with pytest.raises(ValueError, match="Pass one of sharding="):
        fluxjax.load_flux("tiny", quantize="int8", stream=True)


def test_memory_is_freed_matrix_by_matrix():
    flux = small_flux()
    quantize(flux, "int8", donate=True)
    assert flux.double.img.qkv.weight.value.is_deleted()
    assert not flux.img_in.weight.value.is_deleted()
