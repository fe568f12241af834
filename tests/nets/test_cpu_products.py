"""What is computed in another way on CPUs: single rows, and blocks read from a stack."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import draw

from fluxjax.nets.quantized import QuantizedWeight, round_rows
from fluxjax.nets.scan import map_blocks
from fluxjax.nets.weight import Dense, multiply_rows

OUT, FEATURES = 5, 12
FLOAT8 = jnp.dtype(jnp.float8_e4m3fn)


def operands(dtype, shape):
    if dtype == "int8":
        numbers = np.random.default_rng(0)
        x = jnp.asarray(numbers.integers(-127, 128, shape), dtype)
        return x, jnp.asarray(numbers.integers(-127, 128, (OUT, FEATURES)), dtype)
    return draw(*shape).astype(dtype), draw(OUT, FEATURES, seed=1).astype(dtype)


@pytest.mark.parametrize("shape", [(FEATURES,), (1, FEATURES), (1, 1, FEATURES), (3, FEATURES)])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float32"])
def test_products_of_one_row_and_of_several_are_those_of_float64(dtype, shape):
    x, matrix = operands(dtype, shape)
    wide = jnp.dtype("int32" if dtype == "int8" else "float32")
    found = multiply_rows(x, matrix, wide)
    expected = np.asarray(x, np.float64) @ np.asarray(matrix, np.float64).T
    assert found.dtype == wide
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_the_derivatives_of_a_product_of_one_row_are_the_operands():
    x, matrix = operands("bfloat16", (FEATURES,))
    factors = draw(OUT, seed=2)

    def weighted_sum(x, matrix):
        return jnp.sum(factors * Dense(matrix).matmul(x))

    by_x, by_matrix = jax.grad(weighted_sum, (0, 1))(x, matrix)
    factors, x, matrix = (np.asarray(each, np.float64) for each in (factors, x, matrix))
    # Both are rounded to bfloat16, which has 8 bits; so are the factors on the way.
    np.testing.assert_allclose(np.float64(by_x), factors @ matrix, rtol=2**-6, atol=2**-7)
    np.testing.assert_allclose(np.float64(by_matrix), np.outer(factors, x), rtol=2**-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_single_row_of_narrow_numbers_is_multiplied_as_one_of_two(dtype):
    x, matrix = operands(dtype, (FEATURES,))
    program = jax.make_jaxpr(lambda x: multiply_rows(x, matrix, jnp.dtype("float32")))(x)
    products = [each for each in program.eqns if each.primitive.name == "dot_general"]
    assert [product.outvars[0].aval.shape for product in products] == [(2, OUT)]


def test_products_of_float8_are_those_of_its_numbers():
    x, matrix = draw(3, FEATURES), draw(OUT, FEATURES, seed=1)
    value, scale = round_rows(matrix, FLOAT8)
    rows, row_scale = round_rows(x, FLOAT8)
    found = QuantizedWeight(value, scale).matmul(x)
    exact = np.asarray(rows, np.float64) @ np.asarray(value, np.float64).T
    expected = exact * np.float64(row_scale)[:, None] * np.float64(scale)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_blocks_are_read_from_a_stack_bit_by_bit(dtype):
    """Also infinities, NaN of every kind and the smallest numbers."""
    bits = jnp.arange(2**16, dtype=jnp.uint16).reshape(8, -1)
    stacked = Dense(jax.lax.bitcast_convert_type(bits, dtype)[:, None])

    def bits_of(block):
        return jax.lax.bitcast_convert_type(block.value, jnp.uint16)

    found = jax.jit(lambda blocks: map_blocks(blocks, bits_of))(stacked)
    np.testing.assert_array_equal(found[:, 0], bits)
