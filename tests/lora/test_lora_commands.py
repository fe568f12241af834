"""Adapters on whole checkpoints: the commands, and merging while weights are converted."""

import json
from pathlib import Path

import numpy as np
import pytest
from adapters import (
    KOHYA,
    PEFT,
    Draw,
    Sample,
    assert_close,
    changed_weights,
    convert_merged,
    pair,
    same_leaves,
    saved,
    weights,
)
from PIL import Image

from fluxjax import (
    WeightsError,
    convert_weights,
    load_clip,
    load_flux,
    load_t5,
    merge,
    read_image,
    read_lora,
)
from fluxjax.cli.main import main as run_cli

# float32 against float64: the sums are of a few terms, so a few units in the last place.
EXACT = 1e-6


def tiny_adapter(path: Path) -> Sample:
    """Write an adapter of the tiny model's transformer and CLIP, and return what it changes."""
    s, draw = Sample(), Draw(11)
    delta = pair(s, draw, "lora_unet_single_blocks_3_linear1", KOHYA, (1344, 192), 4, 0.2)
    s.expect("single.linear1.weight", (3,), delta)
    pair(s, draw, "lora_te1_text_model_encoder_layers_0_mlp_fc1", KOHYA, (512, 128), 2, 0.1)
    saved(s, path)
    return s


def test_generate_merges_adapters_before_it_draws(tmp_path, capsys):
    tiny_adapter(tmp_path / "style.safetensors")
    cache = ["--compilation-cache", str(tmp_path / "cache")]
    draw = ["generate", "a red star", "--steps", "1", "--output-dir", str(tmp_path), *cache]
    run_cli(draw)
    run_cli([*draw, "--lora", f"{tmp_path}/style.safetensors:0"])
    run_cli([*draw, "--lora", f"mine={tmp_path}/style.safetensors:0.5"])
    plain, zero, half = (read_image(tmp_path / f"flux_{i}.png") for i in range(3))
    np.testing.assert_array_equal(plain, zero)
    assert np.abs(half - plain).max() > 0.05
    with Image.open(tmp_path / "flux_2.png") as image:
        assert image.text["lora"] == "mine:0.5"
    for wrong in ("hub:owner/repo", ":2"):
        with pytest.raises(SystemExit) as end:
            run_cli([*draw, "--lora", wrong])
        assert end.value.code == 2
    assert "needs an adapter, as FILE:SCALE" in capsys.readouterr().err


def test_lora_merge_writes_what_merge_returns(tmp_path, capsys):
    sample = tiny_adapter(tmp_path / "style.safetensors")
    style = f"{tmp_path}/style.safetensors"
    out = tmp_path / "out"
    run_cli(["lora", "merge", "tiny", f"{style}:0.5", "-o", str(out), "--to", "diffusers"])
    lora, flux = read_lora(style), load_flux("tiny")
    merged = load_flux(out)
    assert same_leaves(merged, merge(flux, [lora], [0.5]))
    assert same_leaves(load_clip(out), merge(load_clip("tiny"), [lora], [0.5]))
    assert same_leaves(load_t5(out), load_t5("tiny"))
    assert_close(weights(merged), changed_weights(flux, sample, 0.5), 2**-8)
    with pytest.raises(WeightsError, match="changes clip too, which is not converted"):
        convert_merged("tiny", tmp_path / "x", lora)
    capsys.readouterr()
    run_cli(["lora", "inspect", style])
    described = capsys.readouterr().out
    assert "style.safetensors: kohya" in described
    assert "flux: 1 weights in single (1 blocks); LowRank" in described
    assert "rank 4, alpha / rank 0.05" in described


def test_a_control_adapter_widens_a_checkpoint_and_its_config(tmp_path):
    sample = Sample()
    pair(sample, Draw(9), "img_in", PEFT, (192, 128), 4)
    lora = read_lora(saved(sample, tmp_path / "control.safetensors"))
    convert_merged("tiny", tmp_path / "out", lora, to="diffusers")
    wide = load_flux(tmp_path / "out")
    assert wide.config.in_channels == 128
    assert same_leaves(wide, merge(load_flux("tiny"), [lora]))
    config = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())
    assert config["out_channels"] == 64


def test_lora_extract_finds_the_adapter_that_was_merged_and_otherwise_the_nearest_one(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    sample = Sample()
    pair(sample, Draw(30), "lora_unet_double_blocks_1_img_attn_qkv", KOHYA, (576, 192), 3, 0.03)
    pair(sample, Draw(31), "lora_unet_single_blocks_0_linear2", KOHYA, (192, 960), 5, 0.05)
    lora = read_lora(saved(sample, tmp_path / "x.safetensors"))
    convert_weights("tiny", "base", only=["flux"], dtype="float32")
    convert_merged("base", "tuned", lora)
    extract = ["lora", "extract", "base", "tuned", "-o"]
    run_cli([*extract, "found.safetensors", "--rank", "5", "--to", "kohya"])
    found = read_lora("found.safetensors")
    assert found.changes["flux"].keys() == lora.changes["flux"].keys()
    base, tuned = load_flux("base"), weights(load_flux("tuned"))
    assert_close(weights(merge(base, [found])), tuned, EXACT)
    # A lower rank leaves exactly the singular values beyond it.
    run_cli([*extract, "less.safetensors", "--rank", "2"])
    name = "single.linear2.weight"
    less = weights(merge(base, [read_lora("less.safetensors")]))[name][0]
    values = np.linalg.svd(tuned[name][0] - weights(base)[name][0], compute_uv=False)
    error = np.linalg.norm(tuned[name][0] - less)
    np.testing.assert_allclose(error, np.linalg.norm(values[2:]), rtol=1e-4)
    with pytest.raises(SystemExit):  # equal checkpoints
        run_cli(["lora", "extract", "base", "base", "-o", "none.safetensors", "--rank", "2"])
    with pytest.raises(SystemExit):  # an existing file
        run_cli([*extract, "less.safetensors", "--rank", "2"])
