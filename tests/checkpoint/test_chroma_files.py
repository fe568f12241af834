"""Files of Chroma: every layout in and out, told apart from FLUX.1's, and what is refused."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from chroma import CONFIG, small_chroma
from layouts import assert_same_network, export, write

from fluxjax import WeightsError, convert_weights, inspect_weights, load_flux
from fluxjax.checkpoint.chroma_names import CHROMA_BFL, CHROMA_DIFFUSERS
from fluxjax.checkpoint.configs import chroma_to_json
from fluxjax.checkpoint.shape_configs import chroma_from_shapes
from fluxjax.generate import load_chroma, save
from fluxjax.nets import ChromaConfig
from fluxjax.nets.quantized import QuantizedWeight

HEADERS = Path(__file__).parents[3] / "shared" / "reference" / "family_headers.json.gz"
MARKER = "distilled_guidance_layer.layers.0.in_layer.weight"


@pytest.fixture(scope="module")
def chroma():
    return small_chroma()


def test_every_layout_in_turn_and_back_is_bitwise_the_same(chroma, tmp_path):
    source = save(chroma, tmp_path / "first")
    for number, layout in enumerate(["diffusers", "bfl", "own", "comfy", "diffusers"]):
        source = convert_weights(source, tmp_path / f"{number}-{layout}", to=layout)
        assert_same_network(load_chroma(source), chroma)
        report = inspect_weights(source)
        assert report.whole
        assert [one.kind for one in report.networks] == ["chroma"]
        assert report.networks[0].variant == "Chroma1, of another size"
    assert json.loads((source / "transformer" / "config.json").read_text())["_class_name"] == (
        "ChromaTransformer2DModel"
    )
    assert (tmp_path / "1-bfl" / "chroma1.safetensors").is_file()


def test_loaded_in_8_bits_or_streamed_it_is_the_same_network(chroma, tmp_path):
    source = save(chroma, tmp_path / "one")
    rounded = load_chroma(source, quantize="int8")
    assert isinstance(rounded.double.img.qkv.weight, QuantizedWeight)
    assert not isinstance(rounded.approximator.mlp.up.weight, QuantizedWeight)
    streamed = load_chroma(source, stream=True)
    np.testing.assert_array_equal(
        streamed.approximator.mlp.up.weight.reader.read(1),
        chroma.approximator.mlp.up.weight.value[1],
    )


def test_keys_are_the_blocks_of_flux_and_the_approximators(chroma):
    bfl, diffusers = export(chroma, CHROMA_BFL), export(chroma, CHROMA_DIFFUSERS)
    for keys in (bfl, diffusers):
        assert not [key for key in keys if "mod" in key or "_in.in_layer" in key or "norm1" in key]
    assert bfl.keys() & diffusers.keys() == {
        f"distilled_guidance_layer.{layer}_proj.{kind}"
        for layer in ("in", "out")
        for kind in ("weight", "bias")
    }
    np.testing.assert_array_equal(
        bfl["distilled_guidance_layer.norms.1.scale"], chroma.approximator.norm.scale[1]
    )


def test_a_file_of_flux_is_not_taken_for_chroma_nor_the_other_way_round(chroma, tmp_path):
    write(tmp_path / "chroma.safetensors", export(chroma, CHROMA_BFL))
    with pytest.raises(WeightsError, match="no FLUX transformer, but a Chroma transformer"):
        load_flux(tmp_path / "chroma.safetensors")
    with pytest.raises(WeightsError, match="no Chroma transformer, but a FLUX transformer"):
        load_chroma("tiny")


def test_radiance_is_refused_by_its_name(chroma, tmp_path):
    tensors = export(chroma, CHROMA_BFL) | {"nerf_blocks.0.norm.scale": np.ones(3, np.float32)}
    write(tmp_path / "radiance.safetensors", tensors)
    with pytest.raises(WeightsError, match="Chroma Radiance, which works on pixels"):
        load_chroma(tmp_path / "radiance.safetensors")
    assert not inspect_weights(tmp_path / "radiance.safetensors").whole


def test_missing_tensors_are_listed(chroma, tmp_path):
    tensors = export(chroma, CHROMA_BFL)
    del tensors["distilled_guidance_layer.norms.1.scale"], tensors["img_in.bias"]
    write(tmp_path / "x.safetensors", tensors)
    (tmp_path / "config.json").write_text(json.dumps(chroma_to_json(CONFIG)))
    with pytest.raises(WeightsError, match=r"(?s)missing.*norms\.1\.scale"):
        load_chroma(tmp_path)


def test_the_published_files_shapes_tell_the_config():
    if not HEADERS.exists():
        pytest.skip(f"{HEADERS} with the official headers is not there")
    headers = json.loads(gzip.decompress(HEADERS.read_bytes()))
    for name, dialect in (
        ("bfl/chroma1-hd", CHROMA_BFL),
        ("diffusers/chroma1-hd.transformer", CHROMA_DIFFUSERS),
    ):
        shapes = {}
        for key, entry in headers[name].items():
            found = dialect.find(key)
            assert found is not None, key
            shapes[found[0]] = tuple(entry["shape"])
        assert dialect.marker in headers[name]
        assert chroma_from_shapes(shapes) == ChromaConfig.hd()
