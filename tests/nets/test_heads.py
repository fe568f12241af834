"""The TPU kernel from projections to queries, keys and values, interpreted, against float64."""

from contextlib import ExitStack, contextmanager
from functools import partial
from unittest import mock

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bench_parts import pretended

import fluxjax
from fluxjax import Flux, FluxConfig
from fluxjax.devices.ring import RingAttention
from fluxjax.devices.ulysses import UlyssesAttention
from fluxjax.kernels import Nag, flash_tpu, qkv_tpu
from fluxjax.kernels.attention import Attention, resolve_implementation
from fluxjax.kernels.chips import TPU_CHIPS
from fluxjax.kernels.guided_attention import isolated_attention
from fluxjax.nets.heads import Projection, prepare_rotation, query_key_value
from fluxjax.nets.layers import RmsNorm, Rotation

WIDTH = 256
"""Of two heads."""


@contextmanager
def on_a_tpu():
    """Choose as on a TPU v4, and interpret its kernels."""
    tpu = mock.Mock(spec=jax.Device, platform="tpu", device_kind="TPU v4")
    with ExitStack() as stack:
        stack.enter_context(pretended(tpu, ("kernels.attention", "nets.heads")))
        for module, name in ((qkv_tpu, "fused_qkv_tpu"), (flash_tpu, "flash_attention_tpu")):
            run = mock.Mock(side_effect=partial(getattr(module, name), interpret=True))
            stack.enter_context(mock.patch.object(module, name, run))
        yield


def inputs(counts, columns, dtype=jnp.float32):
    """Return random projections of each part, and a rotation for all tokens."""
    rng = np.random.default_rng(0)

    def norm():
        scale = jnp.asarray(1 + 0.1 * rng.standard_normal(128), dtype)
        return eqx.tree_at(lambda norm: norm.scale, RmsNorm(128), scale)

    parts = []
    for count in counts:
        projected = jnp.asarray(3 * rng.standard_normal((count, columns)), dtype)
        parts.append(Projection(projected, norm(), norm()))
    angles = rng.uniform(0, 6.3, (sum(counts), 64)).astype(np.float32)
    return parts, Rotation(jnp.asarray(np.cos(angles)), jnp.asarray(np.sin(angles)))


def exact(parts, rotation):
    """Return q, k and v in float64: pairs of features as complex numbers, turned by their angle."""
    turns = (np.float64(rotation.cos) + 1j * np.float64(rotation.sin))[:, None]

    def columns_of(part, number):
        x = np.float64(part.projected)[:, number * WIDTH :][:, :WIDTH].reshape(-1, 2, 128)
        if number == 2:
            return x
        scale = np.float64((part.query_norm, part.key_norm)[number].scale)
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * scale

    q, k, v = (np.concatenate([columns_of(part, number) for part in parts]) for number in range(3))
    rotated = []
    for x in (q, k):
        pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * turns
        rotated.append(np.stack([pairs.real, pairs.imag], -1).reshape(x.shape))
    return [*rotated, v]


SHAPES = [
    ([300], 3 * WIDTH),
    ([77], 3 * WIDTH + 200),
    ([48, 270], 3 * WIDTH),
    ([128, 1], 3 * WIDTH),
]


@pytest.mark.parametrize(("counts", "columns"), SHAPES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_heads_equal_float64(counts, columns, dtype):
    parts, rotation = inputs(counts, columns, dtype)
    with on_a_tpu():
        found = query_key_value(parts, prepare_rotation(rotation), WIDTH, fused=True)
        assert qkv_tpu.fused_qkv_tpu.called
    # In bfloat16 both features of a pair are rounded after the norm, and their sum is: 2^-8 each.
    atol = 2e-6 if dtype == jnp.float32 else 3 * 2**-8
    for x, wanted in zip(found, exact(parts, rotation), strict=True):
        assert x.dtype == dtype
        assert x.shape == wanted.shape
        np.testing.assert_allclose(np.float64(x), wanted, rtol=0, atol=atol * np.abs(wanted).max())


def test_gradients_are_those_of_what_is_not_fused():
    parts, rotation = inputs([32, 70], 3 * WIDTH)
    rng = np.random.default_rng(1)
    grads = tuple(jnp.asarray(rng.standard_normal((3, 102, 2, 128)), jnp.float32))

    def pulled(fused):
        def run(parts, rotation):
            return query_key_value(parts, prepare_rotation(rotation), WIDTH, fused=fused)

        return jax.jit(lambda *given: jax.vjp(run, *given)[1](grads))(parts, rotation)

    with on_a_tpu():
        found = pulled(True)
        assert qkv_tpu.fused_qkv_tpu.called
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, pulled(False))


@pytest.mark.parametrize(
    ("counts", "dim", "dtype", "why"),
    [
        ([50, 70], 128, jnp.float32, "a first part that is not of whole tiles"),
        ([32, 32, 32], 128, jnp.float32, "three parts"),
        ([32], 64, jnp.float32, "heads of another width"),
        ([32], 128, jnp.float16, "another dtype"),
    ],
)
def test_what_does_not_suit_is_not_fused(counts, dim, dtype, why):
    assert not qkv_tpu.fused_qkv_supported(counts, WIDTH, dim, dtype, "v4"), why


def test_what_does_not_suit_is_made_all_the_same():
    parts, rotation = inputs([50, 70], 3 * WIDTH)
    with on_a_tpu():
        found = query_key_value(parts, prepare_rotation(rotation), WIDTH, fused=True)
        assert not qkv_tpu.fused_qkv_tpu.called
    for x, wanted in zip(found, exact(parts, rotation), strict=True):
        np.testing.assert_allclose(x, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p", "v6e"])
@pytest.mark.parametrize("counts", [[4608], [512, 4096], [256, 4096], [4133]])
def test_blocks_of_dev_fit_a_chips_memory(chip, counts):
    size = qkv_tpu.qkv_block_tokens(counts, 3072, jnp.bfloat16, chip)
    assert size >= 128
    needed = qkv_tpu.qkv_vmem_bytes(size, 3072, jnp.bfloat16, len(counts))
    assert needed <= TPU_CHIPS[chip].vmem_bytes


def test_a_network_takes_the_kernel_where_it_takes_flash_tpu():
    config = FluxConfig(
        width=256, heads=2, double_depth=2, single_depth=2, mlp_width=256, context=32, pooled=16
    )
    rng = np.random.default_rng(1)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    # All weights are drawn: the blocks of a new network are the identity, whatever they attend to.
    shapes = eqx.filter_eval_shape(Flux, config, key=jax.random.key(0))
    flux = jax.tree.map(lambda leaf: 0.06 * draw(*leaf.shape), shapes)
    x, txt, vec = draw(2, 32, 64), draw(2, 16, 32), draw(2, 16)
    ids = fluxjax.image_ids(16 * 8, 16 * 4)

    def run(attention):
        def one(x, txt, vec):
            given = {"txt": txt, "vec": vec, "img_ids": ids, "guidance": jnp.float32(3.5)}
            return flux(x, jnp.float32(0.5), **given, attention=attention)

        return jax.jit(jax.vmap(one))(x, txt, vec)

    with on_a_tpu():
        found = run("flash_tpu")
        # The blocks of each kind are traced once, of two parts and of one.
        assert [len(call.args[0]) for call in qkv_tpu.fused_qkv_tpu.call_args_list] == [2, 1]
        wanted = run("xla")
        assert len(qkv_tpu.fused_qkv_tpu.call_args_list) == 2
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


def test_a_choice_of_attention_comes_to_an_implementation():
    long, short = (jax.ShapeDtypeStruct((tokens, 24, 128), jnp.bfloat16) for tokens in (4608, 77))
    with on_a_tpu():
        for choice in (None, Attention(), Nag(), UlyssesAttention("context", 512, 4096)):
            assert resolve_implementation(choice, long, long) == "flash_tpu"
            assert resolve_implementation(choice, short, short) == "xla"
        assert resolve_implementation("xla", long, long) == "xla"
        assert (
            resolve_implementation(
                UlyssesAttention("context", 512, 4096, "xla_chunked"), long, long
            )
            == "xla_chunked"
        )
        assert resolve_implementation(RingAttention("context", 512, 4096), long, long) is None
        assert resolve_implementation(isolated_attention, long, long) is None


@pytest.mark.parametrize("counts", [[300], [48, 270], [77, 270]])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_on_gpus_heads_are_turned_by_matrices_with_the_same_result(counts, dtype):
    parts, rotation = inputs(counts, 3 * WIDTH, dtype)
    gpu = mock.Mock(spec=jax.Device, platform="gpu")

    def run(parts, rotation):
        return query_key_value(parts, prepare_rotation(rotation), WIDTH)

    def both():
        # A function of its own: what is compiled once is not traced for another device.
        return jax.jit(lambda *given: (run(*given), jax.vjp(run, *given)[1](run(*given))))

    expected = both()(parts, rotation)
    with pretended(gpu, ("nets.heads",)):
        program = str(jax.make_jaxpr(run)(parts, rotation))
        found = both()(parts, rotation)
    # An odd number of tokens is padded, in a kernel of its own.
    assert ("select_n" in program) == (sum(counts) % 2 == 0)
    # Sums of the same two products, which may be rounded in another order.
    atol = 1e-6 if dtype == jnp.float32 else 2**-8
    for x, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.dtype == wanted.dtype
        scale = np.abs(np.float64(wanted)).max()
        np.testing.assert_allclose(np.float64(x), np.float64(wanted), rtol=0, atol=4 * atol * scale)
