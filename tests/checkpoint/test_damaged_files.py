"""Damaged and unknown files: each is one clear error, and takes little time and memory."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from layouts import export, random_network, write, write_gguf

from fluxjax import T5, WeightsError, convert_weights, inspect_weights, load_flux, load_t5
from fluxjax.checkpoint import names as tables
from fluxjax.checkpoint.safetensors import read_header
from fluxjax.nets import T5Config

CONFIG = T5Config(vocabulary=8, width=8, heads=2, head_dim=4, depth=2, mlp_width=8)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"], "is a LoRA, not a model"),
        (["lycoris_double_blocks_0_img_attn_qkv.lokr_w1"], "is a LoRA, not a model"),
        (["model.diffusion_model.input_blocks.1.0.weight"], "Stable Diffusion 1, 2 or XL"),
        (["double_stream_modulation_img.lin.weight", "txt_in.weight"], "FLUX.2"),
        (["distilled_guidance_layer.in_proj.weight", "nerf_blocks.0.norm.scale"], "Radiance"),
        (["joint_blocks.0.context_block.attn.qkv.weight"], "Stable Diffusion 3"),
        (["something.else"], "holds no network of FLUX: found something"),
    ],
)
def test_the_error_names_the_model_that_a_file_holds(tmp_path, names, message):
    write(tmp_path / "x.safetensors", {name: np.zeros((2, 2), np.float32) for name in names})
    with pytest.raises(WeightsError, match=message):
        load_flux(tmp_path / "x.safetensors")


def test_two_files_of_one_network_and_unknown_files_are_refused(tmp_path):
    t5 = random_network(T5, CONFIG)
    one, two = export(t5, tables.T5_TRANSFORMERS), export(t5, tables.T5_LLAMA)
    write(tmp_path / "one.safetensors", one)
    write(tmp_path / "two.safetensors", two)
    names = r"two T5 encoders, in one\.safetensors and two\.safetensors"
    with pytest.raises(WeightsError, match=names):
        inspect_weights(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    key = "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"
    write(tmp_path / "style.safetensors", {key: np.zeros((2, 4), np.float32)})
    assert load_t5(tmp_path).config == CONFIG
    message = r"style\.safetensors is a LoRA, not a model.*choose it with `only`"
    with pytest.raises(WeightsError, match=message):
        convert_weights(tmp_path, tmp_path / "out")
    report = inspect_weights(tmp_path)
    assert "is a LoRA" in str(report)
    assert list(report.unknown_files) == ["style.safetensors"]


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "pytorch_model.bin"])
def test_a_pickle_is_an_error_as_a_file_and_in_a_folder(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04" + bytes(60))
    for source in (tmp_path / name, tmp_path):
        with pytest.raises(WeightsError, match="is a pickle"):
            load_flux(source)


def write_raw(path: Path, header: object, data: bytes = bytes(64)) -> Path:
    """Write a safetensors file with any header, as JSON or as bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(first: int, last: int) -> dict:
    return {"dtype": "U8", "shape": [last - first], "data_offsets": [first, last]}


def own_metadata(text: str) -> dict:
    return {"__metadata__": {"fluxjax": text}}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry(0, 40), "b": entry(32, 64)}, "'a' and 'b' overlap"),
        (b'{"a": {"dtype": "U8"}, "a": {"dtype": "U8"}}', "names 'a' twice"),
        (b"[" * 100_000, "not JSON"),
        ({"a": {"dtype": "U8", "shape": [2**70], "data_offsets": [0, 8]}}, "is damaged"),
        ({"a": {"dtype": ["U8"], "shape": [8], "data_offsets": [0, 8]}}, "is damaged"),
        ({"a": [1]}, "is damaged"),
        ({"__metadata__": {"x": 1}}, "metadata is damaged"),
        (own_metadata("{"), "fluxjax's metadata is damaged"),
        (
            own_metadata('{"parts": {"flux": 3}, "layout": "own"}'),
            "its own config should hold an object",
        ),
        (
            own_metadata('{"parts": {"t5": {"depth": 1000000000}}, "layout": "own"}'),
            "'depth' should be an integer from 0 to 1000, got 1000000000",
        ),
    ],
)
def test_the_error_says_what_is_damaged_in_a_header(tmp_path, header, message):
    path = write_raw(tmp_path / "x.safetensors", header)
    load = load_t5 if b"t5" in path.read_bytes() else load_flux
    with pytest.raises(WeightsError, match=message):
        load(path)


@pytest.mark.parametrize("length", [0x80, 0x280, 0x580, 0x4B50])
def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path, length):
    header = json.dumps({"a": entry(0, 64)}).encode()
    path = write_raw(tmp_path / "x.safetensors", header.ljust(length))
    assert list(read_header(path).tensors) == ["a"]


def test_an_absurd_header_length_takes_no_memory(tmp_path):
    path = tmp_path / "x.safetensors"
    for length in (2**63, 10**8 + 1, 10**7 + 1):
        path.write_bytes(length.to_bytes(8, "little") + bytes(100))
        message = r"not a safetensors file|truncated within its header"
        with pytest.raises(WeightsError, match=message):
            read_header(path)


def test_an_index_that_is_damaged_or_names_paths_outside_is_refused(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    for content in (
        "[]",
        "{",
        '{"weight_map": 3}',
        '{"weight_map": {"x": 3}}',
        '{"weight_map": {"x": ["y"]}}',
    ):
        index.write_text(content)
        with pytest.raises(WeightsError, match=r"not an index of shards|is not JSON"):
            load_flux(tmp_path)
    for path in ("../x.safetensors", "/etc/passwd", "a/../../x.safetensors", ".."):
        index.write_text(json.dumps({"weight_map": {"x": path}}))
        with pytest.raises(WeightsError, match="outside its folder"):
            load_flux(tmp_path)


# Random damage.


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with a small T5 in the own layout, the file's bytes and the length of its header."""
    folder = tmp_path_factory.mktemp("small")
    t5 = random_network(T5, CONFIG)
    write(folder / "named.safetensors", export(t5, tables.T5_TRANSFORMERS))
    path = convert_weights(folder / "named.safetensors", folder / "t5.safetensors")
    content = path.read_bytes()
    return folder, content, 8 + int.from_bytes(content[:8], "little")


def load_or_error(path: Path) -> None:
    """Load a file, which may be damaged.

    Nothing but a `WeightsError` may be raised, and no memory used beyond the file's and Python's.
    """
    tracemalloc.start()
    try:
        load_t5(path)
    except WeightsError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 100 * path.stat().st_size + 5_000_000


def damaging(examples: int):
    """Return settings for so many examples, the same in every run."""
    return settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["F32", "U8", "blocks.up.weight"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=6,
)


def change_bytes(data, content: bytes, stop: int) -> bytearray:
    """Return bytes with one to four changes before `stop`."""
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, stop - 1))
        changed[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    return changed


@damaging(1000)
@given(st.data())
def test_a_header_with_changed_bytes_loads_or_is_an_error(small, data):
    folder, content, start = small
    changed = change_bytes(data, content, start)
    path = folder / "changed.safetensors"
    path.write_bytes(changed[: data.draw(st.sampled_from([None, start - 1, start + 5]))])
    load_or_error(path)


@damaging(1000)
@given(st.data())
def test_a_header_with_changed_values_loads_or_is_an_error(small, data):
    folder, content, start = small
    header = json.loads(content[8:start])
    keys = sorted(header)
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(keys))
        value = header[key]
        if key == "__metadata__" and data.draw(st.booleans()):
            about = json.loads(value["fluxjax"])
            config = about["parts"]["t5"]
            config[data.draw(st.sampled_from(sorted(config)))] = data.draw(JSON)
            value["fluxjax"] = json.dumps(about)
        elif isinstance(value, dict) and data.draw(st.booleans()):
            value[data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = data.draw(JSON)
        else:
            header[data.draw(st.just(key) | st.text(max_size=8))] = data.draw(JSON)
            break
    load_or_error(write_raw(folder / "changed.safetensors", header, content[start:]))


@pytest.fixture(scope="module")
def small_gguf(small) -> bytes:
    path = small[0] / "t5.gguf"
    write_gguf(path, "t5encoder", export(random_network(T5, CONFIG), tables.T5_LLAMA), {})
    return path.read_bytes()


@damaging(300)
@given(st.data())
def test_a_damaged_gguf_loads_or_is_an_error(small, small_gguf, data):
    changed = change_bytes(data, small_gguf, min(len(small_gguf), 1500))
    path = small[0] / "changed.gguf"
    path.write_bytes(changed[: data.draw(st.sampled_from([None, 700, 1500]))])
    load_or_error(path)
