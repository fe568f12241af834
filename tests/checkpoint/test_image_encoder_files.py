"""Files of image encoders: recognized in every layout they come in, converted, and read back."""

import json

import numpy as np
import pytest
from layouts import assert_same_network, export, random_network, write

from fluxjax.checkpoint import WeightsError, convert_weights, inspect_weights
from fluxjax.checkpoint.kinds import CLIP, CLIP_VISION, IP_ADAPTER, REDUX, SIGLIP, dialect_for
from fluxjax.generate import (
    load_clip,
    load_clip_vision,
    load_ip_adapter,
    load_redux,
    load_siglip,
)
from fluxjax.nets import (
    ClipConfig,
    ClipVisionConfig,
    IpAdapterConfig,
    ReduxConfig,
    SiglipConfig,
)

CONFIGS = {
    "siglip": SiglipConfig(image_size=9, patch=4, width=8, heads=2, depth=2, mlp_width=6),
    "clip_vision": ClipVisionConfig(
        image_size=8, patch=4, width=8, heads=2, depth=2, mlp_width=6, embedding=5
    ),
    "redux": ReduxConfig(features=8, hidden=36, context=12),
    "xlabs": IpAdapterConfig(features=5, tokens=2, context=6, width=128, double_depth=3),
    "instantx": IpAdapterConfig(
        features=5,
        hidden=7,
        tokens=2,
        context=6,
        width=128,
        double_depth=2,
        single_depth=1,
        joins_attention=True,
    ),
}
KINDS = {
    "siglip": SIGLIP,
    "clip_vision": CLIP_VISION,
    "redux": REDUX,
    "xlabs": IP_ADAPTER,
    "instantx": IP_ADAPTER,
}
LOADERS = {
    "siglip": load_siglip,
    "clip_vision": load_clip_vision,
    "redux": load_redux,
    "xlabs": load_ip_adapter,
    "instantx": load_ip_adapter,
}


@pytest.fixture(scope="module")
def networks():
    found = {}
    for name, config in CONFIGS.items():
        found[name] = random_network(KINDS[name].network, config)
    return found


def tensors_of(name, network):
    return export(network, dialect_for(KINDS[name].dialects[0], CONFIGS[name]))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("layout", ["own", "diffusers", "comfy"])
def test_every_layout_comes_back_bit_by_bit(tmp_path, networks, name, layout):
    source = tmp_path / "source.safetensors"
    write(source, tensors_of(name, networks[name]))
    # The file has no config, and so small ones are not guessed.
    settings = tmp_path / "config.json"
    settings.write_text(json.dumps(KINDS[name].to_json(CONFIGS[name])))
    written = convert_weights(tmp_path, tmp_path / "written", to=layout)
    assert_same_network(LOADERS[name](written), networks[name])
    report = inspect_weights(written)
    assert report.whole
    assert [network.kind for network in report.networks] == [KINDS[name].name]


def test_siglip_is_read_with_and_without_the_prefix_of_its_keys(tmp_path, networks):
    tensors = tensors_of("siglip", networks["siglip"])
    assert all(key.startswith("vision_model.") for key in tensors)
    short = {key.removeprefix("vision_model."): array for key, array in tensors.items()}
    write(tmp_path / "short.safetensors", short)
    found = load_siglip(tmp_path / "short.safetensors", config=CONFIGS["siglip"])
    assert_same_network(found, networks["siglip"])


def test_a_whole_siglip_is_read_without_its_text_encoder(tmp_path, networks):
    tensors = tensors_of("siglip", networks["siglip"])
    tensors["text_model.embeddings.token_embedding.weight"] = np.zeros((3, 8), np.float32)
    tensors["text_model.encoder.layers.0.self_attn.q_proj.weight"] = np.zeros((8, 8), np.float32)
    tensors["logit_bias"] = np.zeros(1, np.float32)
    write(tmp_path / "model.safetensors", tensors)
    settings = {"model_type": "siglip", "vision_config": SIGLIP.to_json(CONFIGS["siglip"])}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert_same_network(load_siglip(tmp_path), networks["siglip"])
    assert [network.kind for network in inspect_weights(tmp_path).networks] == ["siglip"]


def test_both_encoders_of_a_whole_clip_are_found_in_its_file(tmp_path, networks):
    config = ClipConfig(
        vocabulary=9, positions=7, width=4, heads=2, depth=1, mlp_width=6, eos_token=8
    )
    text = random_network(CLIP.network, config, seed=1)
    tensors = export(text, CLIP.dialects[0])
    tensors |= tensors_of("clip_vision", networks["clip_vision"])
    tensors["logit_scale"] = np.zeros((), np.float32)
    tensors["text_projection.weight"] = np.zeros((5, 4), np.float32)
    tensors["vision_model.embeddings.position_ids"] = np.arange(5)[None]
    write(tmp_path / "model.safetensors", tensors)
    settings = {
        "text_config": CLIP.to_json(config),
        "vision_config": CLIP_VISION.to_json(CONFIGS["clip_vision"]),
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert_same_network(load_clip_vision(tmp_path), networks["clip_vision"])
    assert_same_network(load_clip(tmp_path), text)
    report = inspect_weights(tmp_path)
    assert report.whole
    assert {network.kind for network in report.networks} == {"clip", "clip_vision"}
    assert not report.unknown_tensors


def test_reduxs_folder_holds_encoder_and_embedder(tmp_path, networks):
    for name, folder in (("siglip", "image_encoder"), ("redux", "image_embedder")):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "model.safetensors", tensors_of(name, networks[name]))
        settings = json.dumps(KINDS[name].to_json(CONFIGS[name]))
        (tmp_path / folder / "config.json").write_text(settings)
    # BFL's file lies beside; the one in its folder is taken.
    write(tmp_path / "flux1-redux-dev.safetensors", tensors_of("redux", networks["redux"]))
    assert_same_network(load_redux(tmp_path), networks["redux"])
    assert_same_network(load_siglip(tmp_path), networks["siglip"])
    assert inspect_weights(tmp_path).whole


def test_redux_is_written_with_bfls_names_and_the_encoders_are_not(tmp_path, networks):
    write(tmp_path / "redux.safetensors", tensors_of("redux", networks["redux"]))
    source, destination = tmp_path / "redux.safetensors", tmp_path / "bfl"
    written = convert_weights(source, destination, to="bfl")
    assert [path.name for path in written.iterdir()] == ["flux1-redux-dev.safetensors"]
    assert_same_network(load_redux(written), networks["redux"])
    (tmp_path / "siglip").mkdir()
    write(tmp_path / "siglip" / "model.safetensors", tensors_of("siglip", networks["siglip"]))
    settings = json.dumps(SIGLIP.to_json(CONFIGS["siglip"]))
    (tmp_path / "siglip" / "config.json").write_text(settings)
    with pytest.raises(WeightsError, match="BFL layout has no SigLIP vision encoder"):
        convert_weights(tmp_path / "siglip", tmp_path / "none", to="bfl")


def test_the_names_of_an_ip_adapter_are_those_of_its_maker(tmp_path, networks):
    # XLabs' blocks are counted; InstantX's would have to be FLUX.1's 57.
    for name, key in (
        ("xlabs", "double_blocks.2.processor.ip_adapter_double_stream_k_proj.bias"),
        ("instantx", "ip_adapter.2.to_v_ip.weight"),
    ):
        tensors = tensors_of(name, networks[name])
        assert key in tensors
        write(tmp_path / f"{name}.safetensors", tensors)
        found = load_ip_adapter(tmp_path / f"{name}.safetensors", config=CONFIGS[name])
        assert_same_network(found, networks[name])
    with pytest.raises(WeightsError, match=r"An IP-Adapter for 3 blocks is not FLUX\.1's"):
        load_ip_adapter(tmp_path / "instantx.safetensors")
    assert load_ip_adapter(tmp_path / "xlabs.safetensors").config == CONFIGS["xlabs"]


def test_what_a_file_does_not_tell_is_an_error(tmp_path, networks):
    for name, text in (("siglip", "is not so400m"), ("clip_vision", "is not ViT-L")):
        write(tmp_path / f"{name}.safetensors", tensors_of(name, networks[name]))
        with pytest.raises(WeightsError, match=text):
            LOADERS[name](tmp_path / f"{name}.safetensors")
    with pytest.raises(WeightsError, match="holds no Redux embedder, but a SigLIP vision encoder"):
        load_redux(tmp_path / "siglip.safetensors")
    tensors = tensors_of("clip_vision", networks["clip_vision"])
    del tensors["visual_projection.weight"]
    write(tmp_path / "no_projection.safetensors", tensors)
    with pytest.raises(WeightsError, match=r"1 missing: visual_projection\.weight"):
        load_clip_vision(tmp_path / "no_projection.safetensors", config=CONFIGS["clip_vision"])
    other = {"hidden_act": "relu", **REDUX.to_json(CONFIGS["redux"])}
    assert REDUX.from_json(other) == CONFIGS["redux"]
    wrong = SIGLIP.to_json(CONFIGS["siglip"]) | {"hidden_act": "relu"}
    with pytest.raises(WeightsError, match=r"'relu' is not one of.*image_encoder"):
        SIGLIP.from_json(wrong)
