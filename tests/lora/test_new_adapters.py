"""New LoKrs and DoRAs: they change nothing, are attached as they are merged, and are read back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import random_flux

from fluxjax import Flux, FluxConfig, WeightsError, attach, merge, read_lora, write_lora
from fluxjax.lora import init_dora, init_lokr, init_lora, trainable
from fluxjax.nets import RowScaledWeight, quantize

KEY = jax.random.key(0)
SIZES = dict(  # blocks of 64 values divide the columns
    width=64,
    heads=4,
    double_depth=1,
    single_depth=1,
    mlp_width=128,
    context=24,
    pooled=8,
    rope_axes=(4, 6, 6),
    time_width=16,
)
TARGETS = [r"double\.\d\.img\.(qkv|out)", r"single\.1\.linear1", r"final\.modulation"]


@pytest.fixture(scope="module")
def flux():
    return jax.tree.map(lambda leaf: jnp.asarray(0.5 * np.asarray(leaf)), random_flux())


def assert_near(found, expected, bound):
    found, expected = np.asarray(found), np.asarray(expected)
    assert np.linalg.norm(found - expected) <= bound * np.linalg.norm(expected)


def made(flux, kind):
    if kind == "lokr":
        return init_lokr(flux, 2, TARGETS, divisor=4, alpha=3.0, key=KEY)
    return init_dora(flux, 2, TARGETS, alpha=3.0, key=KEY)


def trained(lora, seed=0):
    """Return an adapter whose trained numbers have moved."""
    mask = trainable(lora)
    rng = np.random.default_rng(seed)

    def move(leaf, is_trained):
        if not is_trained:
            return leaf
        return leaf + 0.2 * rng.standard_normal(leaf.shape).astype(np.float32)

    return jax.tree.map(move, lora, mask)


@pytest.mark.parametrize("kind", ["lokr", "dora"])
def test_a_new_adapter_changes_nothing_and_a_trained_one_what_merging_does(flux, kind):
    lora = made(flux, kind)
    before = jax.tree.leaves(merge(flux, [lora]))
    for found, expected in zip(before, jax.tree.leaves(flux), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)
    moved = trained(lora)
    merged = merge(flux, [moved], [0.7])
    attached = attach(flux, [moved], [0.7])
    x = jax.random.normal(KEY, (5, 32))
    for block in range(2):
        weight = jax.tree.map(lambda leaf, b=block: leaf[b], attached.double.img.qkv.weight)
        expected = x @ merged.double.img.qkv.weight.value[block].T
        assert_near(weight.matmul(x), expected, 1e-5)
    is_dora = isinstance(attached.double.img.qkv.weight.base, RowScaledWeight)
    assert is_dora == (kind == "dora")


@pytest.mark.parametrize(("kind", "to"), [("lokr", "kohya"), ("dora", "kohya"), ("dora", "peft")])
def test_a_written_adapter_is_read_as_it_was(flux, tmp_path, kind, to):
    lora = trained(made(flux, kind))
    write_lora(tmp_path / "a.safetensors", lora, to=to)
    read = read_lora(tmp_path / "a.safetensors")
    found, expected = merge(flux, [read], [0.5]), merge(flux, [lora], [0.5])
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_near(one, other, 1e-6)


def test_a_lokr_is_refused_in_pefts_names_and_ranks_that_do_not_fit(flux, tmp_path):
    with pytest.raises(WeightsError, match=r"is a LoKr.*Write kohya's names"):
        write_lora(tmp_path / "a.safetensors", trained(made(flux, "lokr")), to="peft")
    with pytest.raises(ValueError, match="needs less than 8 for double"):
        init_lokr(flux, 8, TARGETS, divisor=4, key=KEY)
    with pytest.raises(ValueError, match="a divisor of at least 1"):
        init_lokr(flux, 2, TARGETS, divisor=0, key=KEY)
    with pytest.raises(ValueError, match="`init_dora` needs a rank of at least 1"):
        init_dora(flux, 0, TARGETS, key=KEY)


@pytest.mark.parametrize("format", ["int8", "nf4", "int4"])
def test_an_adapter_for_rounded_weights_has_the_shapes_of_the_plain_ones(format):
    network = Flux(FluxConfig(**SIZES), key=KEY)
    rounded = quantize(network, format)
    made = [init_lora(one, 2, key=KEY) for one in (rounded, network)]
    assert jax.tree.map(jnp.shape, made[0]) == jax.tree.map(jnp.shape, made[1])
    for one, other in zip(*map(jax.tree.leaves, made), strict=True):
        np.testing.assert_array_equal(one, other)
    attach(rounded, made[:1])
    with pytest.raises(WeightsError, match="`init_dora` takes the norms of rows"):
        init_dora(rounded, 2, key=KEY)


def test_a_dora_beside_rounded_weights_is_refused(flux):
    with pytest.raises(WeightsError, match=r"depends on the norms of its rows.*Merge it"):
        attach(quantize(flux, "int8"), [made(flux, "dora")])


def test_magnitudes_are_trained_and_constants_are_not(flux):
    for kind, constants in (("lokr", 1), ("dora", 1)):
        lora = made(flux, kind)
        (change,) = lora.changes["flux"]["final.modulation.weight"]
        flags = jax.tree.leaves(trainable(lora).changes["flux"]["final.modulation.weight"])
        assert flags.count(False) == constants
        assert len(flags) == len(jax.tree.leaves(change))
    same = init_lora(flux, 2, TARGETS, key=KEY)
    assert all(np.all(np.asarray(one[0].term.up) == 0) for one in same.changes["flux"].values())
