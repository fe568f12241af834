"""ControlNets in files: recognized, described, loaded in every way, and written in each layout."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hub import Hub, run, serve
from layouts import assert_same_network, export, random_network, write

from fluxjax import Flux, FluxConfig, WeightsError, convert_weights, inspect_weights
from fluxjax.checkpoint.controlnet_names import CONTROLNET_DIFFUSERS, CONTROLNET_XLABS
from fluxjax.checkpoint.detect import open_source
from fluxjax.checkpoint.kinds import flux_variant
from fluxjax.checkpoint.names import FLUX_BFL
from fluxjax.generate import load_controlnet
from fluxjax.nets import ControlNet, ControlNetConfig, QuantizedWeight

# FLUX.1's heads, so that shapes tell the config.
SIZES = {
    "width": 128,
    "heads": 1,
    "mlp_width": 512,
    "context": 12,
    "pooled": 6,
    "double_depth": 2,
    "single_depth": 0,
    "modes": None,
}
CONFIGS = {
    "union": ControlNetConfig(**{**SIZES, "single_depth": 2, "modes": 3}),
    "pro 2.0": ControlNetConfig(**{**SIZES, "guidance_embed": False}),
    "xlabs": ControlNetConfig(**SIZES, hint_image=True),
}
NETWORKS = {name: random_network(ControlNet, config) for name, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file of each network, by its name and its dialect's."""
    folder = tmp_path_factory.mktemp("files")
    paths = {}
    for name, network in NETWORKS.items():
        dialects = [CONTROLNET_DIFFUSERS] + [CONTROLNET_XLABS] * (name == "xlabs")
        for dialect in dialects:
            path = folder / f"{name} {dialect.name}.safetensors"
            write(path, export(network, dialect))
            paths[name, dialect.name] = path
    return paths


CASES = [*((name, "diffusers") for name in CONFIGS), ("xlabs", "xlabs")]


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_a_file_tells_what_it_is_and_loads_bit_by_bit(files, case):
    (summary,) = inspect_weights(files[case]).networks
    assert (summary.kind, summary.names, summary.whole) == ("controlnet", case[1], True)
    assert "whole: loads with load_controlnet as float32" in str(summary)
    assert_same_network(load_controlnet(files[case]), NETWORKS[case[0]])


@pytest.mark.parametrize("name", CONFIGS)
def test_every_layout_that_there_is_comes_back_bit_by_bit(files, tmp_path, name):
    source = files[name, "diffusers"]
    # The folder of diffusers has a config.json, with the config that the shapes do not tell.
    layouts = ["own", "diffusers", "comfy", *(["bfl"] * (name == "xlabs")), "diffusers"]
    for number, layout in enumerate(layouts):
        source = convert_weights(source, tmp_path / f"{number}", to=layout)
        assert_same_network(load_controlnet(source), NETWORKS[name])
    assert (source / "controlnet" / "config.json").is_file()


def test_only_xlabs_networks_have_a_layout_of_their_own(files, tmp_path):
    with pytest.raises(WeightsError, match="XLabs' ControlNets only"):
        convert_weights(files["union", "diffusers"], tmp_path / "new", to="bfl")
    names = export(NETWORKS["xlabs"], CONTROLNET_XLABS)
    assert {"input_hint_block.14.weight", "pos_embed_input.bias", "img_in.weight"} <= names.keys()


def test_it_loads_in_other_dtypes_quantized_streamed_and_sharded(files):
    path = files["union", "diffusers"]
    assert load_controlnet(path, dtype="bfloat16").img_in.bias.dtype == jnp.bfloat16
    quantized = load_controlnet(path, quantize="int8")
    assert isinstance(quantized.double.img.qkv.weight, QuantizedWeight)
    assert isinstance(quantized.double_residual.weight, QuantizedWeight)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    assert load_controlnet(path, sharding=place).img_in.bias.sharding == place
    streamed = load_controlnet(path, stream=True)
    block = streamed.double_residual.weight.reader.read(1)
    np.testing.assert_array_equal(block, NETWORKS["union"].double_residual.weight.value[1])


def test_one_for_inpainting_is_refused_in_one_line(tmp_path):
    tensors = export(NETWORKS["pro 2.0"], CONTROLNET_DIFFUSERS)
    weight = tensors["controlnet_x_embedder.weight"]
    tensors["controlnet_x_embedder.weight"] = np.pad(weight, ((0, 0), (0, 4)))
    write(tmp_path / "inpainting.safetensors", tensors)
    for use in (load_controlnet, lambda path: convert_weights(path, tmp_path / "new")):
        with pytest.raises(WeightsError, match="ControlNet for inpainting") as error:
            use(tmp_path / "inpainting.safetensors")
        assert "\n" not in str(error.value)
    assert "ControlNet for inpainting" in str(inspect_weights(tmp_path / "inpainting.safetensors"))


def test_a_transformer_is_still_one_and_what_is_missing_is_listed(files, tmp_path):
    sizes = {name: value for name, value in SIZES.items() if name != "modes"}
    tensors = export(random_network(Flux, FluxConfig(**sizes)), FLUX_BFL)
    del tensors["img_in.weight"]
    write(tmp_path / "flux.safetensors", tensors)
    assert list(open_source(tmp_path / "flux.safetensors").networks) == ["flux"]
    tensors = export(NETWORKS["union"], CONTROLNET_DIFFUSERS)
    del tensors["controlnet_single_blocks.1.bias"]
    write(tmp_path / "damaged.safetensors", tensors)
    with pytest.raises(WeightsError, match=r"1 missing: controlnet_single_blocks\.1\.bias"):
        load_controlnet(tmp_path / "damaged.safetensors")


def test_a_wrong_config_is_an_error(files, tmp_path):
    folder = convert_weights(files["xlabs", "diffusers"], tmp_path / "folder", to="diffusers")
    config = folder / "controlnet" / "config.json"
    text = config.read_text()
    assert '"conditioning_embedding_channels": 16' in text
    config.write_text(text.replace('channels": 16', 'channels": 8'))
    with pytest.raises(WeightsError, match="packs 16"):
        load_controlnet(folder)


def test_a_repository_holds_it_in_its_root(files, tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(files["union", "diffusers"].read_bytes())
    with serve(Hub(folder)) as hub:
        done = run(hub.url, tmp_path, "download", "owner/model", "--only", "controlnet")
    assert done.returncode == 0, done.stderr
    assert_same_network(load_controlnet(done.stdout.strip()), NETWORKS["union"])


def test_published_sizes_have_names(files):
    (summary,) = inspect_weights(files["union", "diffusers"]).networks
    assert summary.variant == "2 double and 2 single blocks"
    assert flux_variant(ControlNetConfig.union()) == "Union, Union-Pro"
    assert flux_variant(replace(ControlNetConfig.xlabs(), double_depth=3)).startswith("3 double")
