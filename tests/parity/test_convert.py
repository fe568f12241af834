"""diffusers and transformers load what fluxjax writes, and the reverse, bit by bit."""

import json

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from layouts import assert_same_network
from safetensors.numpy import load_file

from fluxjax import convert_weights, inspect_weights, load_flux, load_vae
from fluxjax.checkpoint import configs
from fluxjax.checkpoint.shipped import tiny_folder
from fluxjax.nets import VaeConfig

LAYOUTS = ("own", "comfy", "diffusers", "own", "diffusers")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A checkpoint written by diffusers itself."""
    folder = tmp_path_factory.mktemp("reference")
    FluxPipeline.from_pretrained(tiny_folder(), torch_dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def test_a_diffusers_checkpoint_comes_back_bitwise_through_every_layout_and_diffusers_loads_it(
    reference, tmp_path
):
    source = reference
    for number, layout in enumerate(LAYOUTS):
        source = convert_weights(source, tmp_path / f"{number}-{layout}", to=layout)
    for file in sorted(reference.glob("*/*.safetensors")):
        assert_same_files(source / file.relative_to(reference), file)
    add_other_files(source, reference)
    before = FluxPipeline.from_pretrained(reference, torch_dtype=torch.bfloat16)
    after = FluxPipeline.from_pretrained(source, torch_dtype=torch.bfloat16)
    for part in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        assert_same_states(getattr(after, part), getattr(before, part))


def assert_same_files(found, expected) -> None:
    found, expected = load_file(found), load_file(expected)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].tobytes() == tensor.tobytes(), name


def assert_same_states(found, expected) -> None:
    found, expected = found.state_dict(), expected.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def add_other_files(folder, reference) -> None:
    """Add what the ComfyUI layout has no place for: the tokenizers and the scheduler."""
    for name in ("tokenizer", "tokenizer_2", "scheduler"):
        if not (folder / name).exists():
            (folder / name).symlink_to(reference / name)
    (folder / "model_index.json").write_text((reference / "model_index.json").read_text())


def fill_with_random_numbers(model) -> None:
    """Fill parameters with the same random numbers again and again, which is faster than drawing.

    Their count is a prime, so that no two rows of a tensor begin with the same number.
    """
    numbers = (0.02 * torch.randn(1_000_003)).to(torch.bfloat16)
    for shift, parameter in enumerate(model.parameters()):
        shifted = numbers.roll(shift)
        repeats = parameter.numel() // len(numbers) + 1
        parameter.data.copy_(shifted.repeat(repeats)[: parameter.numel()].view(parameter.shape))


def write_config(folder, config) -> str:
    """Write a config.json into a new folder and return the folder's path."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_diffusers_loads_a_single_file_of_the_transformer(tmp_path):
    # Its converter supports only dev's width, so one block of each kind at that width.
    config = {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 64,
        "guidance_embeds": True,
        "axes_dims_rope": [16, 56, 56],
    }
    torch.manual_seed(0)
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    fill_with_random_numbers(model)
    model.save_pretrained(tmp_path / "reference")
    target = tmp_path / "flux1-dev.safetensors"
    single = convert_weights(tmp_path / "reference", target, to="bfl")
    again = FluxTransformer2DModel.from_single_file(
        str(single), config=write_config(tmp_path / "config", config), torch_dtype=torch.bfloat16
    )
    assert_same_states(again, model)
    back = load_flux(single)
    assert back.config == configs.flux_from_json(config)
    found = np.asarray(back.single.linear2.weight.value[0]).view(np.uint16)
    expected = model.state_dict()["single_transformer_blocks.0.proj_out.weight"]
    np.testing.assert_array_equal(found, expected.view(torch.uint16).numpy())


def test_diffusers_loads_a_single_file_of_the_vae(tmp_path):
    small = VaeConfig(channels=(32, 64), groups=8, resnets=1, latent_channels=4)
    config = configs.vae_to_json(small)
    torch.manual_seed(0)
    model = AutoencoderKL.from_config(config)
    model.save_pretrained(tmp_path / "reference")
    single = convert_weights(tmp_path / "reference", tmp_path / "ae.safetensors", to="bfl")
    again = AutoencoderKL.from_single_file(
        str(single), config=write_config(tmp_path / "config", config)
    )
    assert_same_states(again, model)
    loaded = load_vae(single)
    assert_same_network(loaded, load_vae(tmp_path / "reference"))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert inspect_weights(single).networks[0].parameters == count
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded))
