"""Adapters written to files: read again, every difference is the same."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import small
from adapters import (
    FORMATS,
    KOHYA,
    PEFT,
    Draw,
    Sample,
    assert_close,
    changed_weights,
    dense_differences,
    diffusers,
    effective_weights,
    pair,
    random_flux,
    random_network,
    saved,
    weights,
)
from safetensors.numpy import load_file

from fluxjax import Flux, WeightsError, attach, merge, read_lora, write_lora
from fluxjax.lora import extract_lora, init_lora

# float32 against float64: the sums are of a few terms, so a few units in the last place.
EXACT = 1e-6


@pytest.fixture(scope="module")
def flux() -> Flux:
    return random_flux()


@pytest.mark.parametrize("name", ["kohya", "peft, alpha tensors", "onetrainer", "comfy", "xlabs"])
def test_converted_there_and_back_every_difference_stays(flux, tmp_path, name):
    lora = read_lora(saved(FORMATS[name](), tmp_path / "x.safetensors"))
    expected = dense_differences(flux, lora, "flux")
    for number, to in enumerate(("peft", "kohya", "peft")):
        write_lora(tmp_path / f"{number}.safetensors", lora, to=to)
        lora = read_lora(tmp_path / f"{number}.safetensors")
        assert lora.format == to
        assert_close(dense_differences(flux, lora, "flux"), expected, EXACT)


def test_a_split_adapter_keeps_its_ranks_there_and_back(tmp_path):
    original = diffusers()
    lora = read_lora(saved(original, tmp_path / "x.safetensors"))
    write_lora(tmp_path / "fused.safetensors", lora, to="kohya")
    fused = load_file(tmp_path / "fused.safetensors")
    assert fused["lora_unet_double_blocks_1_img_attn_qkv.lora_down.weight"].shape == (2 + 5, 32)
    write_lora(tmp_path / "split.safetensors", read_lora(tmp_path / "fused.safetensors"), to="peft")
    split = load_file(tmp_path / "split.safetensors")
    assert split.keys() == original.tensors.keys()
    assert all(np.array_equal(split[key], tensor) for key, tensor in original.tensors.items())


@pytest.mark.parametrize("name", ["loha", "control"])
def test_an_adapter_that_is_not_of_low_rank_is_not_written(tmp_path, name):
    lora = read_lora(saved(FORMATS[name](), tmp_path / "x.safetensors"))
    with pytest.raises(WeightsError, match="is not of low rank"):
        write_lora(tmp_path / "out.safetensors", lora)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("number", "dtype", "message"),
    [(np.nan, "float32", "NaN or infinity"), (1e6, "float16", "float16 can't")],
)
def test_an_adapter_of_numbers_that_the_file_can_not_hold_is_not_written(
    tmp_path, number, dtype, message
):
    sample = Sample()
    pair(sample, Draw(), "double_blocks.0.img_attn.proj", PEFT, (32, 32), 1)
    lora = read_lora(saved(sample, tmp_path / "x.safetensors"))
    lora = jax.tree.map(lambda leaf: leaf + number if leaf.ndim == 2 else leaf, lora)
    with pytest.raises(WeightsError, match=message):
        write_lora(tmp_path / "a.safetensors", lora, dtype=dtype)
    assert not (tmp_path / "a.safetensors").exists()


# A transformer whose MLP is 3 x width, as FLUX.2's is.
THREE = replace(small.CONFIG, mlp_width=96)


@pytest.fixture(scope="module")
def three() -> Flux:
    return random_network(Flux, THREE, scale=0.3)


def attention_adapter() -> Sample:
    """Return an adapter that changes q and v of a single block, which show no width of an MLP."""
    s, draw = Sample(), Draw(12)
    stem = "transformer.single_transformer_blocks.1.attn"
    for part, rows in (("q", slice(0, 32)), ("v", slice(64, 96))):
        delta = pair(s, draw, f"{stem}.to_{part}", PEFT, (32, 32), 2)
        s.expect("single.linear1.weight", (1, rows), delta)
    return s


def mlp_adapter() -> Sample:
    s = attention_adapter()
    draw, single = Draw(13), "transformer.single_transformer_blocks.0"
    delta = pair(s, draw, f"{single}.proj_mlp", PEFT, (96, 32), 3)
    s.expect("single.linear1.weight", (0, slice(96, 192)), delta)
    delta = pair(s, draw, f"{single}.proj_out", PEFT, (32, 32 + 96), 3)
    s.expect("single.linear2.weight", (0,), delta)
    double = "transformer.transformer_blocks.2"
    delta = pair(s, draw, f"{double}.ff.net.0.proj", PEFT, (96, 32), 3)
    s.expect("double.img.mlp.up.weight", (2,), delta)
    delta = pair(s, draw, f"{double}.ff_context.net.2", PEFT, (32, 96), 3)
    s.expect("double.txt.mlp.down.weight", (2,), delta)
    return s


def test_an_mlp_of_three_times_the_width_is_merged_attached_extracted_and_written(three, tmp_path):
    sample = mlp_adapter()
    lora = read_lora(saved(sample, tmp_path / "x.safetensors"))
    expected = changed_weights(three, sample, 1.0)
    merged = merge(three, [lora])
    assert_close(weights(merged), expected, EXACT)
    assert_close(effective_weights(attach(three, [lora])), expected, EXACT)
    differences = dense_differences(three, lora, "flux")
    extracted = extract_lora(three, merged, "flux", rank=4)
    for number, (adapter, to) in enumerate(((lora, "kohya"), (lora, "peft"), (extracted, "kohya"))):
        path = tmp_path / f"{number}.safetensors"
        write_lora(path, adapter, to=to)
        # Singular vectors in float32 are less exact than sums.
        bound = 1e-5 if adapter is extracted else EXACT
        assert_close(dense_differences(three, read_lora(path), "flux"), differences, bound)
    every = init_lora(three, 1, key=jax.random.key(0))
    shapes = {name: change.term.shape(()) for name, (change,) in every.changes["flux"].items()}
    assert shapes["single.0.linear1.weight"] == (3 * 32 + 96, 32)


def test_an_adapter_that_shows_no_mlp_takes_its_width_from_the_config(three, flux, tmp_path):
    lora = read_lora(saved(attention_adapter(), tmp_path / "x.safetensors"))
    path = tmp_path / "kohya.safetensors"
    for config, rows in ((None, 3 * 32 + 4 * 32), (three.config, 3 * 32 + 3 * 32)):
        write_lora(path, lora, to="kohya", config=config, overwrite=True)
        up = load_file(path)["lora_unet_single_blocks_1_linear1.lora_up.weight"]
        assert up.shape == (rows, 4)
    differences = dense_differences(three, lora, "flux")
    assert_close(dense_differences(three, read_lora(path), "flux"), differences, EXACT)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        ("single_blocks_0_linear1", (192, 32)),
        ("single_blocks_0_linear2", (32, 128)),
        ("double_blocks_0_img_mlp_0", (96, 32)),
        ("double_blocks_0_txt_mlp_2", (32, 96)),
    ],
)
def test_every_layer_of_an_mlp_shows_its_width(tmp_path, module, shape):
    sample = attention_adapter()
    pair(sample, Draw(14), f"lora_unet_{module}", KOHYA, shape, 1)
    lora = read_lora(saved(sample, tmp_path / "x.safetensors"))
    write_lora(tmp_path / "kohya.safetensors", lora, to="kohya")
    up = load_file(tmp_path / "kohya.safetensors")
    assert len(up["lora_unet_single_blocks_1_linear1.lora_up.weight"]) == 3 * 32 + 96
