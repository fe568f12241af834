"""Adapters from the difference of two networks: all of it, biases and norms too, in memory and in files."""

import equinox as eqx
import jax
import numpy as np
import pytest
from small import small_flux

from fluxjax import (
    T5,
    Clip,
    ClipConfig,
    Flux,
    Lora,
    T5Config,
    WeightsError,
    attach,
    init_lora,
    merge,
    read_lora,
    write_lora,
)
from fluxjax.checkpoint.weights import InMemoryWeights
from fluxjax.lora import extract_lora
from fluxjax.lora.read import Change
from fluxjax.lora.terms import FullTerm
from fluxjax.nets.stack import leaf_names

rng = np.random.default_rng(0)


def drawn(make, config) -> eqx.Module:
    shapes = eqx.filter_eval_shape(make, config, key=jax.random.key(0))
    return jax.tree.map(
        lambda leaf: jax.numpy.asarray(rng.standard_normal(leaf.shape), np.float32), shapes
    )


def tuned(model: eqx.Module) -> eqx.Module:
    """Return a network each of whose numbers is another."""
    return jax.tree.map(
        lambda leaf: leaf + jax.numpy.asarray(0.1 * rng.standard_normal(leaf.shape), leaf.dtype),
        model,
    )


NETWORKS = {
    "flux": small_flux,
    "clip": lambda: drawn(
        Clip, ClipConfig(vocabulary=30, width=32, heads=2, depth=2, mlp_width=64)
    ),
    "t5": lambda: drawn(
        T5, T5Config(vocabulary=30, width=32, heads=2, head_dim=16, depth=2, mlp_width=48)
    ),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_at_full_rank_the_base_and_what_is_extracted_are_the_tuned_network(network, tmp_path):
    base = NETWORKS[network]()
    target = tuned(base)
    found = extract_lora(
        InMemoryWeights(base), InMemoryWeights(target), network, rank=1000, to="kohya"
    )
    write_lora(tmp_path / "difference.safetensors", found, to="kohya")
    for lora in (found, read_lora(tmp_path / "difference.safetensors")):
        for name, ours, theirs in zip(
            leaf_names(base),
            jax.tree.leaves(merge(base, [lora])),
            jax.tree.leaves(target),
            strict=True,
        ):
            # Products of singular vectors in float32.
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=3e-6, err_msg=name)


def test_what_pefts_names_can_not_hold_is_told_before_the_work(tmp_path):
    base = small_flux()
    with pytest.raises(
        WeightsError,
        match=r"to img_in\.bias is a difference of a whole tensor.*PEFT's names have no place",
    ):
        extract_lora(InMemoryWeights(base), InMemoryWeights(tuned(base)), "flux", rank=1, to="peft")
    found = extract_lora(InMemoryWeights(base), InMemoryWeights(tuned(base)), "flux", rank=1)
    with pytest.raises(WeightsError, match="Write kohya's names"):
        write_lora(tmp_path / "x.safetensors", found)
    assert not (tmp_path / "x.safetensors").exists()
    clip = NETWORKS["clip"]()
    table = eqx.tree_at(lambda net: net.tokens.weight, clip, clip.tokens.weight + 1)
    found = extract_lora(InMemoryWeights(clip), InMemoryWeights(table), "clip", rank=1)
    with pytest.raises(WeightsError, match=r"to tokens\.weight is of a table"):
        write_lora(tmp_path / "x.safetensors", found)


def test_whole_differences_of_fused_parts_and_swapped_halves_keep_their_rows(tmp_path):
    base = drawn(Flux, NETWORKS["flux"]().config)
    part, last = (
        jax.numpy.asarray(rng.standard_normal(shape), np.float32) for shape in ((32, 32), (64,))
    )
    changes = {
        "double.0.img.qkv.weight": (Change(FullTerm(part), "k", False),),
        "final.modulation.bias": (Change(FullTerm(last), None, True),),
    }
    lora = Lora({"flux": changes}, "made")
    write_lora(tmp_path / "x.safetensors", lora, to="kohya")
    again = merge(base, [read_lora(tmp_path / "x.safetensors")])
    np.testing.assert_allclose(
        again.double.img.qkv.weight.value[0, 32:64],
        base.double.img.qkv.weight.value[0, 32:64] + part,
    )
    np.testing.assert_array_equal(
        again.double.img.qkv.weight.value[0, :32], base.double.img.qkv.weight.value[0, :32]
    )
    np.testing.assert_allclose(
        again.final.modulation.bias, base.final.modulation.bias + np.roll(last, 32)
    )


def test_networks_are_taken_too_and_have_to_be_of_the_named_kind():
    base = small_flux()
    lora = init_lora(base, 1, [r"double\.0\.img\.out"], key=jax.random.key(0))
    lora = jax.tree.map(lambda leaf: leaf + 0.1 if leaf.ndim == 2 else leaf, lora)
    tuned = merge(base, [lora])
    found = extract_lora(base, tuned, "flux", rank=np.int64(1))
    for one, other in zip(
        jax.tree.leaves(merge(base, [found])), jax.tree.leaves(tuned), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-5)  # float32's rounding of weights below 10
    with pytest.raises(
        ValueError,
        match=r"`extract_lora\(network\)` got 'foo', but these are the weights of 'flux'",
    ):
        extract_lora(base, tuned, "foo", rank=1)
    with pytest.raises(
        WeightsError, match="No adapter can be extracted from weights that are stored as Adapted"
    ):
        extract_lora(base, attach(base, [lora]), "flux", rank=1)


@pytest.mark.parametrize(
    ("number", "dtype", "told"),
    [(np.nan, "float32", "NaN or infinity"), (1e6, "float16", "float16 can't")],
)
def test_an_adapter_that_a_file_can_not_hold_is_not_written(tmp_path, number, dtype, told):
    lora = init_lora(small_flux(), 1, [r"double\.0\.img\.out"], key=jax.random.key(0))
    lora = jax.tree.map(lambda leaf: leaf + number if leaf.ndim == 2 else leaf, lora)
    with pytest.raises(WeightsError, match=told):
        write_lora(tmp_path / "a.safetensors", lora, dtype=dtype)
    assert not list(tmp_path.iterdir())
