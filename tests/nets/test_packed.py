"""Packed weights, against the values that their bytes stand for."""

import equinox as eqx
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import relative
from small import draw

from fluxjax.nets import Dense, GroupedWeight, PackedWeight, decode_weights, quantize, unroll
from fluxjax.nets.mixed import MixedWeight, mixed_weight
from fluxjax.nets.packed_formats import NF4_CODES, PACKED_FORMATS, decode_rows
from fluxjax.nets.packed_rounding import ROUNDED_FORMATS, pack_rows
from fluxjax.nets.scan import scan_blocks
from fluxjax.nets.stack import Unrolled, block_at

OF_GGUF = [name for name in PACKED_FORMATS if hasattr(gguf.GGMLQuantizationType, name)]


def random_bytes(name: str, *rows: int, blocks: int = 2) -> np.ndarray:
    """Return rows of random bytes whose scales are finite."""
    packed = PACKED_FORMATS[name]
    rng = np.random.default_rng(len(name))
    raw = rng.integers(0, 256, (*rows, blocks, packed.nbytes), np.uint8)
    for scale in packed.scales:
        # The exponent's highest bit, without which no number is infinite or large.
        raw[..., scale + np.dtype(packed.scale_dtype).itemsize - 1] &= 0b10111111
    return raw.reshape(*rows, -1)


@pytest.mark.parametrize("name", OF_GGUF)
def test_values_are_those_of_the_gguf_package_bit_by_bit(name):
    kind = gguf.GGMLQuantizationType[name]
    packed = PACKED_FORMATS[name]
    assert gguf.GGML_QUANT_SIZES[kind] == (packed.values, packed.nbytes)
    rows = random_bytes(name, 5)
    expected = gguf.quants.dequantize(rows, kind)
    # Compiled, where products and sums may be fused.
    found = np.asarray(jax.jit(decode_rows, static_argnums=1)(rows, name))
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


# Half a step of the largest magnitude of a block, and half of the widest gap between codes.
STEPS = {"int8-128": 0.51 / 127, "int8-64": 0.51 / 127, "int4": 1.02 / 8, "nf4": 0.1521}


@pytest.mark.parametrize("name", ROUNDED_FORMATS)
def test_rows_are_rounded_to_the_nearest(name):
    x = np.asarray(draw(6, 256)) * np.float32(10.0) ** np.arange(-3, 3, dtype=np.float32)[:, None]
    x[2, :128] = 0
    rows = jax.jit(pack_rows, static_argnums=1)(x, name)
    found = np.asarray(decode_rows(rows, name))
    blocks = (6, -1, PACKED_FORMATS[name].values)
    largest = np.abs(x.reshape(blocks)).max(-1, keepdims=True)
    error = np.abs(found - x).reshape(blocks)
    assert np.all(error <= STEPS[name] * largest)
    assert not found[2, :128].any()


def test_nf4_takes_the_nearest_of_its_codes():
    x = np.linspace(-1, 1, 64, dtype=np.float32)[None]
    nearest = np.abs(x[0][:, None] - np.asarray(NF4_CODES, np.float32)).argmin(1)
    rows = np.asarray(pack_rows(jnp.asarray(x), "nf4"))[0, 4:]
    np.testing.assert_array_equal(np.stack([rows >> 4, rows & 15], 1).reshape(-1), nearest)


def test_a_product_and_its_gradient_are_those_of_the_values():
    weight = PackedWeight(jnp.asarray(random_bytes("Q4_K", 6)), "Q4_K")
    plain = Dense(decode_rows(weight.value, "Q4_K"))
    x, cotangent = draw(3, 512), draw(3, 6, seed=1)
    assert weight.shape == plain.shape == (6, 512)
    np.testing.assert_array_equal(weight.matmul(x), plain.matmul(x))
    slopes = [jax.grad(lambda x, w=w: jnp.vdot(w.matmul(x), cotangent))(x) for w in (weight, plain)]
    assert relative(*slopes) <= 1e-6


class Layer(eqx.Module):
    weight: PackedWeight | GroupedWeight | MixedWeight | Dense


def run(layers, x):
    def call(layer, x):
        return jnp.tanh(layer.weight.matmul(x) / 30).astype(x.dtype)

    return scan_blocks(layers, x, call)


def mixed_layers():
    """Four blocks of 512 x 512 in three storages, and the same as plain float32."""
    formats = ["Q4_K", "Q6_K", "Q4_K", None]
    rng = np.random.default_rng(0)
    scaled = {}
    for name in ("Q4_K", "Q6_K"):
        rows = random_bytes(name, formats.count(name), 512).reshape(-1, PACKED_FORMATS[name].nbytes)
        for scale in PACKED_FORMATS[name].scales:
            rows[:, scale : scale + 2] = np.float16([2e-4]).view(np.uint8)
        value = jnp.asarray(rows.reshape(formats.count(name), 512, -1))
        scaled[name] = PackedWeight(value, name)
    scaled[None] = Dense(jnp.asarray(rng.normal(size=(1, 512, 512)), jnp.float16))
    groups = [list(scaled).index(name) for name in formats]
    mixed = Layer(GroupedWeight.of_stacks(groups, list(scaled.values())))
    return mixed, decode_weights(mixed, jnp.float32)


def test_blocks_of_several_storages_each_read_their_own():
    mixed, plain = mixed_layers()
    assert mixed.weight.shape == plain.weight.shape == (4, 512, 512)
    # The order of the blocks is that of the network, and not of the stacks.
    second = np.asarray(decode_rows(mixed.weight.stacks.content[1].value[0], "Q6_K"))
    np.testing.assert_array_equal(plain.weight.value[1], second)
    x = draw(2, 512)
    expected = jax.jit(run)(plain, x)
    assert relative(eqx.filter_jit(run)(mixed, x), expected) <= 1e-6
    unrolled = Unrolled(tuple(Layer(mixed.weight.block(number)) for number in range(4)))
    assert relative(eqx.filter_jit(run)(unrolled, x), expected) <= 1e-6
    over_images = eqx.filter_jit(eqx.filter_vmap(run, in_axes=(None, 0)))
    assert relative(over_images(mixed, x[None])[0], expected) <= 1e-6


def test_blocks_of_several_storages_as_one_array_of_bytes_multiply_the_same():
    grouped, _ = mixed_layers()
    mixed = Layer(mixed_weight(grouped.weight))
    assert mixed.weight.shape == (4, 512, 512)
    assert mixed.weight.ways == ("Q4_K", "Q6_K", "float16")
    assert mixed.weight.value.shape == (4, 512, 1024)  # float16 is the longest
    for row in (0, 1, 3):
        grouped_row, mixed_row = (x.weight for x in (block_at(grouped, row), block_at(mixed, row)))
        x = draw(2, 512)
        expected = eqx.filter_jit(lambda weight, x: weight.matmul(x))(grouped_row, x)
        found = eqx.filter_jit(lambda weight, x: weight.matmul(x))(mixed_row, x)
        np.testing.assert_array_equal(found, expected)
    x = draw(2, 512)
    expected = eqx.filter_jit(run)(grouped, x)
    assert relative(eqx.filter_jit(run)(mixed, x), expected) <= 1e-6
    assert relative(eqx.filter_jit(run)(unroll_layers(mixed), x), expected) <= 1e-6


def unroll_layers(layers):
    return Unrolled(tuple(block_at(layers, number) for number in range(4)))


@pytest.mark.parametrize("name", ["Q4_K", "mixed"])
def test_no_second_copy_of_all_blocks_is_made(name):
    """The temporaries hold some matrices of one block, and not those of all."""
    depth = 16
    layers = Layer(PackedWeight(jnp.asarray(random_bytes("Q4_K", depth, 512)), "Q4_K"))
    if name == "mixed":
        stacks = [PackedWeight(layers.weight.value[:8], "Q4_K") for _ in range(2)]
        layers = Layer(GroupedWeight.of_stacks([0, 1] * 8, stacks))
    program = eqx.filter_jit(run).lower(layers, jnp.ones((4, 512), jnp.bfloat16)).compile()
    one = 512 * 512 * 4
    assert program.compiled.memory_analysis().temp_size_in_bytes <= 3 * one


def test_int8_takes_blocks_of_64_where_128_do_not_divide_the_columns(tiny):
    flux = quantize(tiny.flux, "int8-128")
    assert flux.double.img.qkv.weight.format == "int8-64"  # of 192 columns
    assert flux.double.img.mlp.down.weight.format == "int8-128"  # of 768
    apart = unroll(flux).single.blocks[1].linear1.weight
    np.testing.assert_array_equal(apart.value, flux.single.linear1.weight.value[1])
