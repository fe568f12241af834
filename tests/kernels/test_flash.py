"""One battery for the implementations of attention that never hold all logits, against float64."""

import itertools
import sys
from functools import cache, partial
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic_gpu.interpret.params import (
    InterpretGPUParams,  # public from JAX 0.11 on
)
from jax.sharding import Mesh, PartitionSpec

from fluxjax import attention
from fluxjax.kernels import flash_gpu, flash_mosaic, flash_tpu, select_attention
from fluxjax.kernels.blocks import CHIPS, PRESETS, BlockSizes, even, least_padded


def interpreted(q, k, v, *, key_length=None, block_sizes=BlockSizes(q=128)):
    """flash_tpu as attention has it, on this machine."""
    length = None if key_length is None else jnp.asarray(key_length, jnp.int32)
    scale = q.shape[-1] ** -0.5
    return flash_tpu.flash(
        q, k, v, scale=scale, chip="v4", key_length=length, block_sizes=block_sizes, interpret=True
    )


@cache
def compiled(jaxpr):
    shapes = [
        jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in (*jaxpr.constvars, *jaxpr.invars)
    ]
    consts = len(jaxpr.constvars)
    return (
        jax.jit(lambda *x: jax.core.eval_jaxpr(jaxpr, x[:consts], *x[consts:])[:0])
        .lower(*shapes)
        .compile()
    )


# JAX 0.10's interpreter of GPU kernels compiles each thread of each program again, which takes 20 times as long.
thread_map._run_jaxpr = lambda jaxpr, consts, *args: compiled(jaxpr)(*consts, *args)


def interpreted_gpu(q, k, v, *, key_length=None, block_sizes=BlockSizes(q=128), races=False):
    """flash_gpu, so too. The interpreter has no tensor cores, so that float32 passes."""
    length = None if key_length is None else jnp.asarray(key_length, jnp.int32)
    how = InterpretGPUParams(
        out_of_bounds_reads="uninitialized", uninitialized_memory="zero", detect_races=races
    )
    return flash_gpu.flash(
        q,
        k,
        v,
        scale=q.shape[-1] ** -0.5,
        key_length=length,
        block_sizes=block_sizes,
        interpret=how,
    )


def interpreted_triton(q, k, v, *, key_length=None, block_sizes=BlockSizes(q=64)):
    """flash_gpu as GPUs other than Hopper have it."""
    length = None if key_length is None else jnp.asarray(key_length, jnp.int32)
    inputs = {"key_length": length, "block_sizes": block_sizes, "hopper": False, "interpret": True}
    return flash_gpu.flash(q, k, v, scale=q.shape[-1] ** -0.5, **inputs)


def apart(q, k, v, **inputs):
    """xla as CPUs have it for large logits: a head after another."""
    with mock.patch.object(sys.modules["fluxjax.kernels.attention"], "_CACHE", 0):
        return attention(q, k, v, implementation="xla", **inputs)


IMPLEMENTATIONS = {
    "xla": partial(attention, implementation="xla"),
    "xla, heads apart": apart,
    "xla_chunked": partial(attention, implementation="xla_chunked", block_sizes=BlockSizes(q=48)),
    "flash_tpu": interpreted,
    "flash_gpu": interpreted_gpu,
    "flash_gpu, Triton": interpreted_triton,
}
every = pytest.mark.parametrize("name", IMPLEMENTATIONS)
blocked = pytest.mark.parametrize(
    "name", ["xla_chunked", "flash_tpu", "flash_gpu", "flash_gpu, Triton"]
)


def exact(q, k, v, grad, length=None):
    """Return attention and its gradients for q, k and v, in float64, each with the size of what it is summed of."""
    q, k, v, grad = (np.asarray(x, np.float64) for x in (q, k, v, grad))
    scale = q.shape[-1] ** -0.5
    logits = scale * np.einsum("qhd,khd->hqk", q, k)
    logits[..., len(k) if length is None else length :] = -np.inf
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("hqk,khd->qhd", weights, v)
    towards = np.einsum("qhd,khd->hqk", grad, v)
    slopes = scale * weights * (towards - (weights * towards).sum(-1, keepdims=True))
    dq, dk = np.einsum("hqk,khd->qhd", slopes, k), np.einsum("hqk,qhd->khd", slopes, q)
    dv = np.einsum("hqk,qhd->khd", weights, grad)
    largest = [
        np.abs(x).max() for x in (v, scale * towards.max() * k, scale * towards.max() * q, grad)
    ]
    return list(zip((mixed, dq, dk, dv), largest, strict=True))


def operands(queries, keys, heads, dim, seed, size=1.0, dtype=jnp.float32):
    names = jax.random.split(jax.random.key(seed), 4)
    tokens = (queries, keys, keys, queries)
    return [
        (size * jax.random.normal(key, (count, heads, dim))).astype(dtype)
        for key, count in zip(names, tokens, strict=True)
    ]


def values_and_gradients(name):
    @jax.jit
    def run(grad, length, *inputs):
        mixed, pull = jax.vjp(lambda *x: IMPLEMENTATIONS[name](*x, key_length=length), *inputs)
        return mixed, *pull(grad)

    return run


def check(name, queries, keys, heads, dim, seed, size, length):
    *inputs, grad = operands(queries, keys, heads, dim, seed, size)
    run = values_and_gradients(name)
    # Logits grow as size², and float32 resolves them to 1e-7 of that, which is the relative error of the weights.
    rtol = 3e-6 * max(1, size**2)
    for found, (wanted, largest) in zip(
        run(grad, length, *inputs), exact(*inputs, grad, length), strict=True
    ):
        np.testing.assert_allclose(
            found, wanted, rtol=0, atol=rtol * max(largest, np.abs(wanted).max())
        )


SHAPES = {
    "queries": st.integers(1, 200), "keys": st.integers(1, 200), "heads": st.integers(1, 2),
    "dim": st.sampled_from([8, 128]), "seed": st.integers(0, 99), "size": st.sampled_from([0.1, 1.0, 10.0]),
}  # fmt: skip


@every
@settings(max_examples=2)  # each shape compiles; the examples below reach every branch
@given(**SHAPES, part=st.floats(0, 1))
@example(queries=257, keys=300, heads=2, dim=128, seed=0, size=1.0, part=1.0)
@example(queries=1, keys=130, heads=1, dim=8, seed=1, size=10.0, part=1.0)
@example(queries=130, keys=384, heads=1, dim=128, seed=2, size=1.0, part=0.4)
def test_values_and_gradients_equal_float64(name, queries, keys, heads, dim, seed, size, part):
    length = None if part == 1 else 1 + int(part * (keys - 1))
    check(name, queries, keys, heads, dim, seed, size, length)


def test_bfloat16_is_as_near_as_its_roundings():
    *inputs, grad = operands(700, 300, 1, 128, 4, dtype=jnp.bfloat16)
    wanted_all = exact(*inputs, grad)
    for name in IMPLEMENTATIONS:
        for found, (wanted, _) in zip(
            values_and_gradients(name)(grad, None, *inputs), wanted_all, strict=True
        ):
            assert found.dtype == jnp.bfloat16
            # The weights or their slopes, and the result, are rounded to 2^-9 of them; sums are not, of 15 chunks either.
            error = np.asarray(found, np.float64) - wanted
            assert np.linalg.norm(error) < 2 * 2**-9 * np.linalg.norm(wanted), name


@blocked
def test_vmap_takes_a_length_an_example_and_keys_that_all_share(name):
    mix = IMPLEMENTATIONS[name]
    q, k, v, _ = operands(3 * 130, 200, 1, 128, 5)
    q, lengths = q.reshape(3, 130, 1, 128), jnp.array([200, 17, 130])

    def total(q, k, v, length):
        return (mix(q, k, v, key_length=length) ** 2).sum()

    axes = (0, None, None, 0)
    batched = jax.jit(jax.vmap(jax.value_and_grad(total, (0, 1, 2)), axes))(q, k, v, lengths)
    one = jax.jit(jax.value_and_grad(total, (0, 1, 2)))
    for index in range(3):
        alone = one(q[index], k, v, lengths[index])
        for found, wanted in zip(jax.tree.leaves(batched), jax.tree.leaves(alone), strict=True):
            # XLA sums a batch in another order.
            np.testing.assert_allclose(found[index], wanted, rtol=1e-5, atol=1e-5)


def test_vmap_of_flash_tpu_is_an_axis_of_its_grid():
    x = jnp.zeros((3, 256, 2, 128))
    program = str(jax.make_jaxpr(jax.vmap(interpreted))(x, x, x, key_length=jnp.array([1, 2, 3])))
    assert program.count("pallas_call[") == 1
    assert "grid=(3, 2, 2, 2)" in program


@blocked
def test_a_mesh_and_a_loop_change_nothing(name):
    mix = jax.jit(IMPLEMENTATIONS[name])
    q, k, v, _ = operands(70, 70, 2, 128, 6)
    # The interpreter of GPU kernels has devices wait for each other that XLA runs one after another.
    devices = jax.devices()[: 1 if name == "flash_gpu" else 2]
    mesh, heads = Mesh(np.array(devices), ("tensor",)), PartitionSpec(None, "tensor")

    def twice(q, k, v):
        return jax.lax.scan(lambda x, _: (mix(x, k, v), None), q, length=2)[0]

    sharded = jax.shard_map(twice, mesh=mesh, in_specs=heads, out_specs=heads, check_vma=False)
    wanted = mix(mix(q, k, v), k, v)
    np.testing.assert_allclose(jax.jit(sharded)(q, k, v), wanted, atol=1e-6)
    grads = [jax.jit(jax.grad(lambda q: f(q, k, v).sum()))(q) for f in (sharded, twice)]  # noqa: B023
    np.testing.assert_allclose(*grads, atol=1e-6)


@every
def test_padding_is_not_seen_and_of_no_keys_there_are_no_values(name):
    q, k, v, grad = operands(5, 140, 1, 128, 7)
    padded = [x.at[9:].set(1e30) for x in (k, v)]
    run = values_and_gradients(name)
    found, wanted = run(grad, jnp.int32(9), q, *padded), run(grad, jnp.int32(9), q, k, v)
    jax.tree.map(np.testing.assert_array_equal, found[:3], wanted[:3])
    assert not any(x[9:].any() for x in found[2:])
    assert not any(x.any() for x in run(grad, jnp.int32(0), q, k, v))
    jax.tree.map(
        np.testing.assert_array_equal,
        run(grad, jnp.int32(999), q, k, v),
        run(grad, jnp.int32(140), q, k, v),
    )


def test_vmap_of_flash_gpu_is_an_axis_of_its_programs_and_copies_nothing():
    x, k = jnp.zeros((3, 256, 2, 128)), jnp.zeros((256, 2, 128))
    program = str(jax.make_jaxpr(jax.vmap(interpreted_gpu, (0, None, None)))(x, k, k))
    assert "f32[3,256,2,128] = mpmd_map" in program
    assert "f32[3,256,2,128] = broadcast" not in program


def test_warpgroups_of_flash_gpu_wait_for_each_other(capsys):
    inputs = operands(300, 300, 1, 64, 10)
    jax.block_until_ready(
        jax.vjp(partial(interpreted_gpu, races=True, key_length=280), *inputs[:3])[1](inputs[3])
    )
    assert "RACE" not in capsys.readouterr().out


@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_flash_gpu_takes_scales_that_are_not_positive(scale):
    q, k, v, _ = operands(70, 90, 1, 64, 11)
    found = flash_gpu.flash(q, k, v, scale=scale, hopper=False, interpret=True)
    np.testing.assert_allclose(
        found, attention(q, k, v, scale=scale, implementation="xla"), atol=1e-5
    )


def test_chunks_take_bias_and_causality():
    q, k, v, _ = operands(23, 23, 2, 8, 8)
    inputs = {
        "bias": jax.random.normal(jax.random.key(9), (2, 23, 23)),
        "causal": True,
        "scale": 0.7,
        "key_length": 20,
    }
    chunked = attention(
        q, k, v, **inputs, implementation="xla_chunked", block_sizes=BlockSizes(q=5)
    )
    for found in (chunked, apart(q, k, v, **inputs)):
        np.testing.assert_allclose(
            found, attention(q, k, v, **inputs, implementation="xla"), atol=1e-6
        )


def test_chunks_hold_no_matrix_of_all_logits():
    q = jax.ShapeDtypeStruct((4096, 4, 128), jnp.bfloat16)
    for implementation, held in (("xla", True), ("xla_chunked", False)):
        mix = partial(attention, implementation=implementation)
        program = str(
            jax.make_jaxpr(jax.grad(lambda *x: mix(*x).sum().astype(jnp.float32), (0, 1, 2)))(
                q, q, q
            )
        )  # noqa: B023
        assert ("4,4096,4096]" in program) == held


def test_none_takes_what_suits():
    def chosen(tokens, dim, platform, dtype=jnp.bfloat16, **given):
        x = jax.ShapeDtypeStruct((tokens, 24, dim), dtype)
        return select_attention(x, x, platform=platform, **given)

    assert chosen(4608, 128, "tpu") == "flash_tpu"
    assert chosen(4608, 128, "tpu", causal=True) == "xla_chunked"
    assert chosen(4608, 128, "tpu", jnp.float32) == "xla_chunked"
    assert chosen(256, 128, "tpu") == "xla"
    assert chosen(4608, 128, "gpu") == "cudnn"
    assert chosen(4608, 192, "gpu") == "xla_chunked"
    assert chosen(4608, 128, "gpu", jnp.float32) == "xla_chunked"
    assert chosen(1024, 128, "cpu") == "xla"
    assert chosen(4608, 128, "cpu") == "xla_chunked"
    assert select_attention(jnp.zeros((1, 1, 1)), jnp.zeros((1, 1, 1))) == "xla"


def test_what_does_not_suit_is_refused():
    x = jnp.zeros((256, 1, 128))
    with pytest.raises(ValueError, match=r"'flash_tpu'.* needs a TPU, .*got cpu, float32"):
        attention(x, x, x, implementation="flash_tpu")
    with pytest.raises(ValueError, match=r"key_length=257.*1 to 256"):
        attention(x, x, x, key_length=257)
    with pytest.raises(
        ValueError, match=r"'flash_gpu'.* needs an NVIDIA GPU .*got cpu, float32, 128"
    ):
        attention(x, x, x, implementation="flash_gpu")
    with pytest.raises(
        ValueError, match=r"is for flash_tpu, flash_gpu and xla_chunked, got implementation='xla'"
    ):
        attention(x, x, x, implementation="xla", block_sizes=BlockSizes(q=128))
    with pytest.raises(ValueError, match=r"BlockSizes\(q=…\)` alone"):
        attention(x, x, x, implementation="xla_chunked", block_sizes=BlockSizes(q=128, kv=128))
    with pytest.raises(ValueError, match=r"no block sizes 'best'. Choose one of trillium, "):
        attention(x, x, x, implementation="xla_chunked", block_sizes="best")
    with pytest.raises(ValueError, match="at least one token"):
        BlockSizes(q=0)
    with pytest.raises(ValueError, match=r"multiples of 128 tokens, got \(128, 100\) for dq"):
        interpreted(x, x, x, block_sizes=BlockSizes(q=128, kv_dq=100))
    with pytest.raises(ValueError, match="bfloat16 or float32, got float16"):
        interpreted(*[x.astype(jnp.float16)] * 3)
    with pytest.raises(ValueError, match="bfloat16 or float16, got float32"):
        flash_gpu.flash(x, x, x, scale=1.0)
    with pytest.raises(ValueError, match="head_dim of at most 128, got 192"):
        interpreted_gpu(*[jnp.zeros((256, 1, 192))] * 3)
    with pytest.raises(ValueError, match=r"multiples of 128 and 64 for forward, got \(64, 64\)"):
        interpreted_gpu(x, x, x, block_sizes=BlockSizes(q=64))
    with pytest.raises(ValueError, match=r"multiples of 64 and 128 for dkv, got \(128, 64\)"):
        interpreted_gpu(x, x, x, block_sizes=BlockSizes(q=128, kv=64))
    with pytest.raises(
        ValueError, match=r"powers of two on this GPU, 16 at least, got \(192, 192\) for forward"
    ):
        interpreted_triton(x, x, x, block_sizes=BlockSizes(q=192))


def test_flash_gpu_is_mosaic_on_hopper_and_triton_elsewhere(monkeypatch):
    module, x = sys.modules["fluxjax.kernels.attention"], jnp.zeros((256, 1, 128), jnp.bfloat16)
    gpu = SimpleNamespace(platform="gpu", compute_capability="7.5")
    monkeypatch.setattr(module, "default_device", lambda: gpu)
    mix = partial(attention, implementation="flash_gpu", block_sizes=BlockSizes(q=128))
    with pytest.raises(
        ValueError,
        match=r"'flash_gpu'.* needs an NVIDIA GPU of compute capability 8.0.*got gpu 7.5, bfloat16",
    ):
        mix(x, x, x)
    for gpu.compute_capability, mosaic in (("8.0", False), ("9.0", True), ("12.0", False)):
        program = jax.make_jaxpr(lambda *inputs: mix(*inputs))(
            x, x, x
        )  # another function, of which none is kept
        assert ("barrier" in str(program)) == mosaic
    with pytest.raises(ValueError, match="without bias that is not causal, got causal=True"):
        mix(x, x, x, causal=True)
    gpu.compute_capability = "gfx942"
    with pytest.raises(ValueError, match="got gpu gfx942"):
        mix(x, x, x)


def test_blocks_that_a_chip_cannot_hold_are_refused_with_their_bytes():
    fits = partial(
        flash_tpu.blocks, 4608, 4608, 128, jnp.bfloat16, block_sizes=PRESETS["trillium-dev"]
    )
    assert set(fits("v6e").values()) == {(1536, 1536)}
    with pytest.raises(
        ValueError,
        match=r"1536 queries and 1536 keys takes 2\d,\d+,\d+ bytes of VMEM \(forward\), of 16,777,216",
    ):
        fits("v4")


def test_blocks_that_hopper_cannot_hold_are_refused_with_their_bytes():
    blocks, size = flash_mosaic.blocks, flash_mosaic.smem_bytes
    assert blocks(4608, 77, 128) == {"forward": (128, 128), "dq": (128, 128), "dkv": (64, 128)}
    for dim in (64, 128):
        assert all(
            size(*block, dim) <= flash_mosaic.SMEM for block in blocks(4608, 4608, dim).items()
        )
    with pytest.raises(
        ValueError, match=r"512 queries and 512 keys takes 660,480 bytes .*\(forward\), of 232,448"
    ):
        blocks(4608, 4608, 128, PRESETS["trillium"])


def test_default_blocks_fit_every_chip_and_waste_little():
    for chip, dim, dtype in itertools.product(CHIPS, (64, 128, 512), (jnp.bfloat16, jnp.float32)):
        for tokens in (77, 1536, 4133, 4352, 4608):
            for block in flash_tpu.blocks(tokens, tokens, dim, dtype, chip).values():
                assert block[0] % 128 == 0
                assert block[0] <= CHIPS[chip].block
                # From 1 to 1.14 times the tokens, of which 128 at most are the tail of a single block.
                assert -(-tokens // block[0]) * block[0] < max(1.14 * tokens, tokens + 128)
    # As published for v6e.
    for tokens, size in ((4608, 1536), (4352, 2176)):
        assert set(flash_tpu.blocks(tokens, tokens, 128, jnp.bfloat16, "v6e").values()) == {
            (size, size)
        }
    assert flash_tpu.blocks(4608, 77, 128, jnp.bfloat16, "v5e")["forward"] == (768, 128)
    assert [even(10, 4), even(4, 4), least_padded(300, 100, 50)] == [4, 4, 100]
