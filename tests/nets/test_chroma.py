"""Chroma: padding of the text that is left out, storages of its weights, and what it refuses."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chroma import CONFIG, IDS, LENGTH, TEXT, inputs, small_chroma, velocity
from meshes import mesh_of, relative
from small import draw

from fluxjax import Flux, on_mesh, shard, stream_blocks
from fluxjax.devices import TokenParallelFlux
from fluxjax.devices.specs import array_role, tensor_axis
from fluxjax.kernels import Attention, Nag, isolated_attention
from fluxjax.nets import Chroma, ChromaConfig, DegradedBlocks, FluxConfig, quantize, unroll
from fluxjax.nets.quantized import QuantizedWeight

# The sums are over the same numbers, of which some are zeros.
BOUND = 1e-6


@pytest.fixture(scope="module")
def chroma():
    return small_chroma()


@pytest.fixture(scope="module")
def expected(chroma):
    """The velocity of the text without its padding."""
    x, txt = inputs()
    return velocity(chroma, x, txt[:LENGTH])


def isolated(*arguments):
    return isolated_attention(*arguments)


@pytest.mark.parametrize(
    "attention", [None, "xla_chunked", isolated], ids=["xla", "xla_chunked", "isolated"]
)
def test_padding_that_is_left_out_equals_trimmed_text(chroma, expected, attention):
    x, txt = inputs()
    if callable(attention):
        expected = velocity(chroma, x, txt[:LENGTH], None, attention)
    for padding in (0.0, 7.0):  # whatever its states are
        padded = txt.at[LENGTH:].set(padding)
        found = velocity(chroma, x, padded, jnp.int32(LENGTH), attention)
        assert relative(found, expected) <= BOUND
    whole = velocity(chroma, x, txt, jnp.int32(TEXT), attention)
    assert relative(whole, velocity(chroma, x, txt, None, attention)) <= BOUND
    assert relative(whole, expected) > 1e-3


def test_nag_leaves_out_the_padding_of_each_prompt():
    image, lengths = 5, (2, 3)
    q, k, v = np.asarray(draw(3, 2 * TEXT + image, 2, 8))
    away = Nag(3.0)
    found = jax.jit(lambda *qkv: away(*qkv, 2 * TEXT, jnp.int32(lengths)))(q, k, v)
    plain = jax.jit(Attention().__call__)

    def alone(start, length):
        rows = np.r_[start : start + length, 2 * TEXT : 2 * TEXT + image]
        return plain(q[rows], k[rows], v[rows])[length:]

    negative, positive = alone(0, lengths[0]), alone(TEXT, lengths[1])
    combined = jax.jit(away.combine)(positive, negative)
    np.testing.assert_allclose(found[2 * TEXT :], combined, atol=1e-6)


@pytest.mark.parametrize(
    "sizes",
    [dict(context=2), dict(context=4), dict(fsdp=2, tensor=2)],
    ids=["context", "ring", "tensor"],
)
def test_on_a_mesh_padding_is_left_out_as_on_one_device(chroma, expected, sizes):
    mesh = mesh_of(**sizes)
    x, txt = inputs()
    length = jnp.int32([LENGTH])

    def run(network, rows, shared):
        if mesh.shape["context"] > 1:
            network = TokenParallelFlux(network)

        def one(x, txt, length):
            t = jnp.float32(0.5)
            prepared = network.prepare(t[None], txt=txt, img_ids=IDS)
            return network.velocity(x, t, network.with_txt_length(prepared, length))

        return jax.vmap(one)(*rows)

    rows = (x[None], txt[None], length)
    found = on_mesh(run, mesh, shard(chroma, mesh), rows, None, fill=True)[0]
    assert relative(found, expected) <= 1e-5


def test_every_matrix_of_stacked_layers_has_a_rule_for_meshes():
    network = eqx.filter_eval_shape(Chroma, CONFIG, key=jax.random.key(0))
    leaves = jax.tree_util.tree_flatten_with_path(network)[0]
    roles = [(array_role(path), leaf) for path, leaf in leaves if leaf.ndim > 2]
    assert len(roles) == 12
    assert all(tensor_axis(role) is not None for role, _ in roles)


def test_streamed_and_unrolled_it_computes_the_same(chroma, expected):
    x, txt = inputs()
    for other in (stream_blocks(chroma), eqx.filter_jit(unroll)(chroma)):
        found = velocity(other, x, txt, jnp.int32(LENGTH))
        assert relative(found, expected) <= BOUND


def test_quantization_rounds_its_blocks_and_not_its_approximator(chroma, expected):
    x, txt = inputs()
    rounded = quantize(chroma, "int8")
    assert isinstance(rounded.single.linear1.weight, QuantizedWeight)
    assert not isinstance(rounded.approximator.mlp.up.weight, QuantizedWeight)
    found = velocity(rounded, x, txt, jnp.int32(LENGTH))
    assert 0 < relative(found, expected) <= 0.05


def test_skipped_blocks_leave_their_input(chroma):
    x, txt = inputs()
    every = DegradedBlocks(CONFIG, double=range(2), single=range(3))

    @eqx.filter_jit
    def without_blocks(chroma):
        t = jnp.float32(0.5)
        hidden = chroma.embed(x, t, chroma.prepare(t[None], txt=txt, img_ids=IDS))
        return chroma.predict(hidden.img, hidden)

    found = velocity(chroma, x, txt, None, None, every)
    np.testing.assert_allclose(found, without_blocks(chroma), atol=1e-5)


def test_the_modulation_depends_on_the_time_and_a_time_not_prepared_is_nan(chroma):
    x, txt = inputs()

    @eqx.filter_jit
    def values(chroma):
        prepared = chroma.prepare(jnp.float32([1.0, 0.25]), txt=txt, img_ids=IDS)
        both = [prepared.at(jnp.float32(t)).final for t in (1.0, 0.25)]
        return both, chroma.velocity(x, 0.5, prepared)

    both, never_prepared = values(chroma)
    assert relative(*both) > 1e-3
    assert np.isnan(never_prepared).all()


def test_what_it_does_not_read_is_refused(chroma):
    x, txt = inputs()
    given = {"txt": txt, "img_ids": IDS}
    with pytest.raises(ValueError, match=r"reads no pooled text.*got vec="):
        chroma.prepare(jnp.ones(1), vec=jnp.ones(3), **given)
    with pytest.raises(ValueError, match=r"takes no distilled guidance.*got guidance="):
        chroma.prepare(jnp.ones(1), guidance=3.5, **given)
    with pytest.raises(ValueError, match=r"`Chroma\(txt_length\)` is 0 to 6"):
        chroma(x, 0.5, **given, txt_length=7)
    with pytest.raises(ValueError, match="takes no number of text tokens"):
        chroma(x, 0.5, **given, txt_length=3, attention=lambda q, k, v, txt_tokens: v)
    with pytest.raises(ValueError, match="got inputs that do not fit its config: txt has 5"):
        chroma(x, 0.5, txt=draw(3, 5), img_ids=IDS)
    with pytest.raises(ValueError, match="needs a multiple of 8"):
        ChromaConfig(approximator_features=12)


@pytest.mark.parametrize(
    ("make", "config", "count"),
    [(Chroma, ChromaConfig.hd(), 8_899_983_424), (Flux, FluxConfig.lite(), 8_163_264_064)],
    ids=["Chroma1-HD", "lite-8B"],
)
def test_the_published_numbers_of_parameters(make, config, count):
    network = eqx.filter_eval_shape(make, config, key=jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(network)) == count
