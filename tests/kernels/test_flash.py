"""One battery for all implementations of attention, against float64.

Interpreting the kernels for Hopper takes most of its time, so that shapes are just large enough:
more blocks than buffers, a last block that is not full, and blocks that are all padding.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st
from implementations import (
    BLOCKED,
    IMPLEMENTATIONS,
    exact,
    flash_mosaic,
    flash_tpu,
    operands,
    values_and_gradients,
    xla_head_by_head,
)
from jax.sharding import Mesh, PartitionSpec

from fluxjax import attention
from fluxjax.kernels import Attention
from fluxjax.kernels.block_sizes import BlockSizes
from fluxjax.kernels.flash_gpu import flash_attention_gpu

every = pytest.mark.parametrize("name", IMPLEMENTATIONS)
blocked = pytest.mark.parametrize("name", BLOCKED)


def check(found_all, expected_all, size=1.0):
    """Compare values and gradients with those of `exact`."""
    # Logits grow as size², and float32 resolves them to 1e-7 of that: the weights' relative error.
    rtol = 3e-6 * max(1, size**2)
    for found, (expected, terms) in zip(found_all, expected_all, strict=True):
        atol = rtol * max(terms, np.abs(expected).max())
        np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


SHAPES = {
    "queries": st.integers(1, 140),
    "keys": st.integers(1, 140),
    "heads": st.integers(1, 2),
    "dim": st.sampled_from([8, 64]),
    "seed": st.integers(0, 99),
    "size": st.sampled_from([0.1, 1.0, 10.0]),
}


@every
@settings(max_examples=1)  # each shape compiles; the examples below reach every branch
@given(**SHAPES, part=st.floats(0, 1))
@example(queries=130, keys=150, heads=2, dim=128, seed=0, size=1.0, part=1.0)
@example(queries=1, keys=130, heads=1, dim=8, seed=1, size=10.0, part=1.0)
@example(queries=70, keys=264, heads=1, dim=64, seed=2, size=1.0, part=0.6)
def test_values_and_gradients_equal_float64(name, queries, keys, heads, dim, seed, size, part):
    length = None if part == 1 else 1 + int(part * (keys - 1))
    *inputs, grad = operands(queries, keys, heads, dim, seed, size)
    found = values_and_gradients(IMPLEMENTATIONS[name])(grad, length, *inputs)
    check(found, exact(*inputs, grad, length), size)


@every
def test_bfloat16_is_as_near_as_its_roundings(name):
    # Whole blocks, so that nothing is masked.
    *inputs, grad = operands(256, 128, 1, 128, 4, dtype=jnp.bfloat16)
    implementation = IMPLEMENTATIONS[name]
    if name == "xla_chunked":  # by 16 chunks, over which gradients are summed
        chunks = Attention("xla_chunked", BlockSizes(q=16))
        implementation = partial(attention, implementation=chunks)
    found_all = values_and_gradients(implementation)(grad, None, *inputs)
    for found, (expected, _) in zip(found_all, exact(*inputs, grad), strict=True):
        assert found.dtype == jnp.bfloat16
        # The weights or their gradients, and the result, are rounded to 2^-9 of them; sums are not.
        error = np.asarray(found, np.float64) - expected
        assert np.linalg.norm(error) < 2 * 2**-9 * np.linalg.norm(expected)


@blocked
def test_vmap_takes_a_length_an_example_and_keys_that_all_share(name):
    lengths = np.array([140, 17])
    q, k, v, grad = operands(2 * 70, 140, 1, 64, 5)
    q, grad = q.reshape(2, 70, 1, 64), grad.reshape(2, 70, 1, 64)
    run = values_and_gradients(IMPLEMENTATIONS[name])
    batched = jax.jit(jax.vmap(run, (0, 0, 0, None, None)))(grad, jnp.asarray(lengths), q, k, v)
    for index, length in enumerate(lengths):
        found = [x[index] for x in batched]
        check(found, exact(q[index], k, v, grad[index], length))


@blocked
def test_a_mesh_and_a_loop_change_nothing(name):
    implementation = IMPLEMENTATIONS[name]
    q, k, v, grad = operands(70, 70, 2, 64, 6)
    # The interpreter of kernels for Hopper has devices wait for each other, which XLA runs one
    # after another.
    devices = jax.devices()[: 1 if name == "flash_gpu, Mosaic" else 2]
    mesh, heads = Mesh(np.array(devices), ("tensor",)), PartitionSpec(None, "tensor")

    def twice(q, k, v):
        return jax.lax.scan(lambda x, _: (implementation(x, k, v), None), q, length=2)[0]

    @jax.jit
    def run(q, grad):
        sharded = jax.shard_map(twice, mesh=mesh, in_specs=heads, out_specs=heads, check_vma=False)
        mixed, pull = jax.vjp(lambda q: sharded(q, k, v), q)
        return mixed, *pull(grad)

    (once, _), *_ = exact(q, k, v, grad)
    mixed, dq_of_second, *_ = exact(once, k, v, grad)
    _, dq, *_ = exact(q, k, v, dq_of_second[0])
    check(run(q, grad), [mixed, dq])


@every
def test_padding_is_not_seen_and_of_no_keys_there_are_no_values(name):
    q, k, v, grad = operands(5, 140, 1, 64, 7)
    padded_k, padded_v = (x.at[9:].set(1e30) for x in (k, v))
    run = values_and_gradients(IMPLEMENTATIONS[name])
    found = run(grad, jnp.int32(9), q, padded_k, padded_v)
    expected = run(grad, jnp.int32(9), q, k, v)
    jax.tree.map(np.testing.assert_array_equal, found[:3], expected[:3])
    assert not any(np.any(x[9:]) for x in found[2:])
    assert not any(np.any(x) for x in run(grad, jnp.int32(0), q, k, v))
    jax.tree.map(
        np.testing.assert_array_equal,
        run(grad, jnp.int32(999), q, k, v),
        run(grad, jnp.int32(140), q, k, v),
    )


def test_vmap_of_flash_tpu_is_an_axis_of_its_grid():
    x = jnp.zeros((3, 256, 2, 128))
    program = str(jax.make_jaxpr(jax.vmap(flash_tpu))(x, x, x, key_length=jnp.array([1, 2, 3])))
    assert program.count("pallas_call[") == 1
    assert "grid=(3, 2, 2, 2)" in program


def test_vmap_of_flash_gpu_is_an_axis_of_its_programs_and_copies_nothing():
    x, k = jnp.zeros((3, 256, 2, 128)), jnp.zeros((256, 2, 128))
    program = str(jax.make_jaxpr(jax.vmap(flash_mosaic, (0, None, None)))(x, k, k))
    assert "f32[3,256,2,128] = mpmd_map" in program
    assert "f32[3,256,2,128] = broadcast" not in program


def test_warpgroups_of_flash_gpu_wait_for_each_other(capsys):
    # Three steps of each kernel, so that both slots of the rings are used again.
    *inputs, grad = operands(130, 150, 1, 64, 10)
    run = values_and_gradients(partial(flash_mosaic, detect_races=True))
    jax.block_until_ready(run(grad, 140, *inputs))
    assert "RACE" not in capsys.readouterr().out


@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_flash_gpu_takes_scales_that_are_not_positive(scale):
    q, k, v, _ = operands(20, 40, 1, 64, 11)
    found = flash_attention_gpu(
        q, k, v, scale=scale, block_sizes=BlockSizes(q=16), hopper=False, interpret=True
    )
    expected = jax.jit(partial(attention, scale=scale, implementation="xla"))(q, k, v)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_chunks_take_bias_and_causality():
    q, k, v, _ = operands(23, 23, 2, 8, 8)
    bias = jax.random.normal(jax.random.key(9), (2, 23, 23))
    options = {"bias": bias, "causal": True, "scale": 0.7, "key_length": 20}
    chunked = partial(attention, implementation=Attention("xla_chunked", BlockSizes(q=5)))
    xla = partial(attention, implementation="xla")
    expected = jax.jit(partial(xla, **options))(q, k, v)
    for implementation in (chunked, xla_head_by_head):
        found = jax.jit(partial(implementation, **options))(q, k, v)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_chunks_hold_no_matrix_of_all_logits():
    q = jax.ShapeDtypeStruct((4096, 4, 128), jnp.bfloat16)
    for implementation, has_all_logits in (("xla", True), ("xla_chunked", False)):
        attend = partial(attention, implementation=implementation)

        def total(q, k, v, attend=attend):
            return attend(q, k, v).sum().astype(jnp.float32)

        program = str(jax.make_jaxpr(jax.grad(total, (0, 1, 2)))(q, q, q))
        assert ("4,4096,4096]" in program) == has_all_logits
