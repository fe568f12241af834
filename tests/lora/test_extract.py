"""Adapters from the difference of two networks, biases and norms too, in memory and in files."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import Draw, dense_differences, leaves, random_clip, random_t5
from small import small_flux

from fluxjax import Flux, Lora, WeightsError, attach, merge, read_lora, write_lora
from fluxjax.checkpoint.weights import InMemoryWeights, parameters_of
from fluxjax.lora import extract, extract_lora, init_lora
from fluxjax.lora.adapter import Change
from fluxjax.lora.extract import nearest_low_rank
from fluxjax.lora.terms import FullTerm

NETWORKS = {"flux": small_flux, "clip": random_clip, "t5": random_t5}


@pytest.fixture(scope="module")
def flux() -> Flux:
    return small_flux()


def tuned(model: eqx.Module) -> eqx.Module:
    """Return a network each of whose numbers is another."""
    draw = Draw(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(np.asarray(leaf) + 0.1 * draw(*leaf.shape), leaf.dtype), model
    )


@pytest.mark.parametrize("network", NETWORKS)
def test_at_full_rank_the_base_and_what_is_extracted_are_the_tuned_network(network, tmp_path):
    base = NETWORKS[network]()
    target = tuned(base)
    # NumPy leaves: reading a block of a JAX array compiles a slice for each shape.
    weights = [InMemoryWeights(jax.tree.map(np.asarray, model)) for model in (base, target)]
    found = extract_lora(*weights, network, rank=1000, to="kohya")
    write_lora(tmp_path / "difference.safetensors", found, to="kohya")
    before, after = leaves(base), leaves(target)
    names = leaf_of_slots(base)
    for lora in (found, read_lora(tmp_path / "difference.safetensors")):
        differences = dense_differences(base, lora, network)
        assert differences.keys() == names.keys()
        for slot, (leaf, index) in names.items():
            ours = before[leaf][index] + differences[slot]
            # Products of singular vectors in float32.
            np.testing.assert_allclose(ours, after[leaf][index], rtol=1e-5, atol=3e-6, err_msg=slot)


def leaf_of_slots(model: eqx.Module) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the leaf of each slot of a network, and the slot's index in it."""
    names = list(leaves(model))
    return {
        name: (names[slot.leaf], () if slot.block is None else (slot.block,))
        for name, slot in parameters_of(model).items()
    }


def test_what_pefts_names_can_not_hold_is_an_error_before_the_work(flux, tmp_path):
    other = tuned(flux)
    message = r"to img_in\.bias is a difference of a whole tensor.*PEFT's names have no place"
    with pytest.raises(WeightsError, match=message):
        extract_lora(InMemoryWeights(flux), InMemoryWeights(other), "flux", rank=1, to="peft")
    found = extract_lora(InMemoryWeights(flux), InMemoryWeights(other), "flux", rank=1)
    with pytest.raises(WeightsError, match="Write kohya's names"):
        write_lora(tmp_path / "x.safetensors", found)
    assert not (tmp_path / "x.safetensors").exists()
    clip = random_clip()
    table = eqx.tree_at(lambda net: net.tokens.weight, clip, clip.tokens.weight + 1)
    found = extract_lora(InMemoryWeights(clip), InMemoryWeights(table), "clip", rank=1)
    with pytest.raises(WeightsError, match=r"to tokens\.weight is of a lookup table"):
        write_lora(tmp_path / "x.safetensors", found)


def test_whole_differences_of_fused_parts_and_swapped_halves_keep_their_rows(flux, tmp_path):
    draw = Draw(2)
    part, last = jnp.asarray(draw(32, 32)), jnp.asarray(draw(64))
    changes = {
        "double.0.img.qkv.weight": (Change(FullTerm(part), "k", False),),
        "final.modulation.bias": (Change(FullTerm(last), None, True),),
    }
    lora = Lora({"flux": changes}, "made")
    write_lora(tmp_path / "x.safetensors", lora, to="kohya")
    merged = leaves(merge(flux, [read_lora(tmp_path / "x.safetensors")]))
    name, before = "double.img.qkv.weight", leaves(flux)
    np.testing.assert_allclose(merged[name][0, 32:64], before[name][0, 32:64] + part)
    np.testing.assert_array_equal(merged[name][0, :32], before[name][0, :32])
    bias = "final.modulation.bias"
    np.testing.assert_allclose(merged[bias], before[bias] + np.roll(last, 32))


def test_networks_in_memory_have_to_be_of_the_named_kind(flux):
    lora = init_lora(flux, 1, [r"double\.0\.img\.out"], key=jax.random.key(0))
    lora = jax.tree.map(lambda leaf: leaf + 0.1 if leaf.ndim == 2 else leaf, lora)
    target = merge(flux, [lora])
    found = extract_lora(flux, target, "flux", rank=np.int64(1))
    merged, wanted = leaves(merge(flux, [found])), leaves(target)
    for name, value in merged.items():
        # float32's rounding of weights below 10.
        np.testing.assert_allclose(value, wanted[name], atol=1e-5, err_msg=name)
    message = r"`extract_lora\(network\)` got 'foo', but these are the weights of 'flux'"
    with pytest.raises(ValueError, match=message):
        extract_lora(flux, target, "foo", rank=1)
    message = "No adapter can be extracted from weights that are stored as Adapted"
    with pytest.raises(WeightsError, match=message):
        extract_lora(flux, attach(flux, [lora]), "flux", rank=1)


def test_a_large_matrix_is_projected_to_the_same_nearest_one(monkeypatch):
    # Sides of 1,024 and more are projected; here less, so that the exact decomposition is fast.
    monkeypatch.setattr(extract, "_LARGEST_EXACT_SIDE", 64)
    rng = np.random.default_rng(0)
    left = rng.standard_normal((200, 40)) * 0.9 ** np.arange(40)
    matrix = left @ rng.standard_normal((40, 240))
    matrix = (matrix + 0.01 * rng.standard_normal(matrix.shape)).astype(np.float32)
    term = nearest_low_rank(matrix, 8)
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    product = np.asarray(term.up, np.float64) @ np.asarray(term.down, np.float64)
    # Halko et al. bound the expected excess; four power iterations leave next to none.
    np.testing.assert_allclose(
        np.linalg.norm(matrix - product), np.linalg.norm(values[8:]), rtol=1e-4
    )
