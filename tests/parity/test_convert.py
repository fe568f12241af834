"""diffusers and transformers load what fluxjax writes, and fluxjax what they write, bit by bit."""

import json

import equinox as eqx
import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from safetensors.numpy import load_file

from fluxjax import VaeConfig, convert_weights, inspect_weights, load_flux, load_vae
from fluxjax.checkpoint import configs
from fluxjax.checkpoint.shipped import tiny_folder

LAYOUTS = ("own", "comfy", "diffusers", "own", "diffusers")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A checkpoint written by diffusers itself."""
    folder = tmp_path_factory.mktemp("theirs")
    FluxPipeline.from_pretrained(tiny_folder(), torch_dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def test_a_diffusers_checkpoint_comes_back_bitwise_through_every_layout_and_diffusers_loads_it(
    theirs, tmp_path
):
    source = theirs
    for number, layout in enumerate(LAYOUTS):
        source = convert_weights(source, tmp_path / f"{number}-{layout}", to=layout)
    for file in sorted(theirs.glob("*/*.safetensors")):
        original, ours = load_file(file), load_file(source / file.relative_to(theirs))
        assert original.keys() == ours.keys()
        assert all(original[name].tobytes() == ours[name].tobytes() for name in original)
    before, after = (
        FluxPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
        for folder in (theirs, with_rest(source, theirs))
    )
    for part in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        states = (getattr(pipeline, part).state_dict() for pipeline in (before, after))
        assert all(
            torch.equal(a, b) for a, b in zip(*(state.values() for state in states), strict=True)
        )


def with_rest(folder, theirs):
    """Add what the ComfyUI layout has no place for: the tokenizers and the scheduler."""
    for name in ("tokenizer", "tokenizer_2", "scheduler"):
        if not (folder / name).exists():
            (folder / name).symlink_to(theirs / name)
    (folder / "model_index.json").write_text((theirs / "model_index.json").read_text())
    return folder


def test_diffusers_loads_our_single_file_of_the_transformer(tmp_path):
    # Its converter knows dev's width alone, so one block of each kind at that width.
    config = {
        "_class_name": "FluxTransformer2DModel", "patch_size": 1, "in_channels": 64, "num_layers": 1, "num_single_layers": 1,
        "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 64, "pooled_projection_dim": 64,
        "guidance_embeds": True, "axes_dims_rope": [16, 56, 56],
    }  # fmt: skip
    torch.manual_seed(0)
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    model.save_pretrained(tmp_path / "theirs")
    single = convert_weights(tmp_path / "theirs", tmp_path / "flux1-dev.safetensors", to="bfl")
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text(json.dumps(config))
    again = FluxTransformer2DModel.from_single_file(
        str(single), config=str(tmp_path / "config"), torch_dtype=torch.bfloat16
    )
    expected, found = model.state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    back = load_flux(single)
    assert back.config == configs.flux_from_json(config)
    last = np.asarray(back.single.linear2.weight.value[0]).view(np.uint16)
    np.testing.assert_array_equal(
        last, expected["single_transformer_blocks.0.proj_out.weight"].view(torch.uint16).numpy()
    )


def test_diffusers_loads_our_single_file_of_the_vae(tmp_path):
    config = configs.vae_to_json(
        VaeConfig(channels=(32, 64), groups=8, resnets=1, latent_channels=4)
    )
    torch.manual_seed(0)
    model = AutoencoderKL.from_config(config)
    model.save_pretrained(tmp_path / "theirs")
    single = convert_weights(tmp_path / "theirs", tmp_path / "ae.safetensors", to="bfl")
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text(json.dumps(config))
    again = AutoencoderKL.from_single_file(str(single), config=str(tmp_path / "config"))
    expected, found = model.state_dict(), again.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert eqx.tree_equal(load_vae(single), load_vae(tmp_path / "theirs"))
    assert inspect_weights(single).networks[0].parameters == sum(
        p.numel() for p in model.parameters()
    )
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(load_vae(single)))
