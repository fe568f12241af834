"""Weight files that are damaged or malicious: one clear error at once, or a right result."""

import json
import os
import random
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from layouts import export, random_network, write, write_gguf

from fluxjax import T5, Clip, WeightsError, inspect_weights, load_clip, load_flux, load_t5, load_vae
from fluxjax.checkpoint import configs, names as tables
from fluxjax.checkpoint.convert import convert_weights
from fluxjax.checkpoint.finite import all_finite
from fluxjax.nets import ClipConfig, T5Config

CONFIG = T5Config(vocabulary=8, width=8, heads=2, head_dim=4, depth=2, mlp_width=8)
FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")


@pytest.fixture(scope="module")
def named():
    """The weights of a T5 by transformers' names."""
    return export(random_network(T5, CONFIG), tables.T5_TRANSFORMERS)


def header_only(path, header: bytes, data: bytes = b""):
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -np.nan])
def test_one_value_that_is_not_finite_is_found_anywhere(dtype, bad):
    values = np.linspace(-3, 3, 700_000).astype(dtype).reshape(7, -1)
    largest = float(jnp.finfo(dtype).max)
    values[0, :2] = largest, -largest
    assert all_finite(values)
    assert all_finite(values[:, ::3])
    values[5, 9] = bad
    assert not all_finite(values)
    assert not all_finite(values[:, ::3])
    assert all_finite(values[:, 1::3])


def test_nan_and_infinity_in_weights_are_named_by_every_way_of_loading(named, tmp_path):
    key = "encoder.block.1.layer.0.SelfAttention.k.weight"
    bad = dict(named) | {
        key: np.where(np.arange(64).reshape(8, 8) == 37, np.float32(np.nan), named[key])
    }
    write(tmp_path / "t5.safetensors", bad)
    ways = ({}, {"dtype": "bfloat16"}, {"stream": True}, {"quantize": "int8"})
    message = rf"t5\.safetensors: '{key}' holds NaN or infinity"
    for way in ways:
        with pytest.raises(WeightsError, match=message):
            load_t5(tmp_path / "t5.safetensors", config=CONFIG, **way)
    with pytest.raises(WeightsError, match=message):
        convert_weights(tmp_path / "t5.safetensors", tmp_path / "own", to="own")
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize("load", [load_flux, load_clip, load_t5, load_vae])
@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("int8", "quantize='int8'"),
        ("fp8", "quantize='fp8'"),
        ("complex64", r"got complex64\. Weights are loaded as float32, bfloat16"),
        ("float64", "64-bit mode"),
        (np.float64, "64-bit mode"),
        ("float128", "Weights are loaded as"),
        ("no dtype", r"got 'no dtype'\. Weights are loaded as"),
        (object, "Weights are loaded as"),
    ],
)
def test_a_dtype_that_weights_are_not_loaded_as_is_refused(load, dtype, message):
    with pytest.raises(ValueError, match=rf"`{load.__name__}\(dtype.*{message}"):
        load("tiny", dtype=dtype)


def test_names_that_imitate_a_line_of_the_report_are_escaped(named, tmp_path):
    fake = "x\x1b[2K\n  whole: loads with load_t5 as float32\u202e"
    write(tmp_path / "t5.safetensors", dict(named) | {fake: named["shared.weight"]})
    text = str(inspect_weights(tmp_path / "t5.safetensors"))
    with pytest.raises(WeightsError) as error:
        load_t5(tmp_path / "t5.safetensors", config=CONFIG)
    for message in (text, str(error.value)):
        assert "\x1b" not in message
        assert "\u202e" not in message
        assert not any(line.startswith("  whole") for line in message.splitlines())
        assert r"x\x1b[2K\n" in message


def test_file_names_are_escaped_in_messages(tmp_path):
    folder = tmp_path / "x\x1b[2K\n  whole: loads with load_flux"
    folder.mkdir()
    write(folder / "a.safetensors", {"a.wscales": np.ones(1, np.float32)})
    index = folder / "b.safetensors.index.json"
    messages = [str(inspect_weights(folder))]
    for content in ("{", "[" * 100_000):
        index.write_text(content)
        with pytest.raises(WeightsError) as error:
            inspect_weights(folder)
        messages.append(str(error.value))
    assert "Nunchaku" in messages[0]
    assert not any("\x1b" in text or "\n  whole" in text for text in messages)


def test_large_headers_are_refused_within_seconds(tmp_path):
    entry = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    many = ",".join(f'"n{i}":{entry}' for i in range(300_000))
    some = ",".join(f'"n{i}":{entry}' for i in range(19_000))
    escaped = ",".join(f'"n{i}":{entry}' for i in range(21_000)).replace(
        "data_offsets", r"data_offset\u0073"
    )
    cases = [
        ("more than 20,000 tensors", "{" + many + "}"),
        ("more than 20,000 tensors", "{" + escaped + "}"),
        ("names 'n18999' twice", "{" + some + f',"n18999":{entry}' + "}"),
        ("holds no network", "{" + some + "}"),
    ]
    for message, header in cases:
        path = header_only(tmp_path / "x.safetensors", header.encode())
        start = time.process_time()  # other processes may keep the machine busy
        with pytest.raises(WeightsError, match=message):
            load_flux(path)
        assert time.process_time() - start < 5


def test_a_pipe_is_not_opened(named, tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    for source in (tmp_path, tmp_path / "a.safetensors"):
        with pytest.raises(WeightsError, match="is not a regular file"):
            load_t5(source)


def test_an_index_without_files_is_refused(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(WeightsError, match="no weight_map from tensors"):
        load_t5(tmp_path)


@pytest.mark.parametrize("value", [10**9, -1, 2**70, 1.5, "4", None, True, [4], {"a": 1}])
def test_a_config_that_no_network_has_is_named_with_its_rule(value):
    good = configs.t5_to_json(CONFIG)
    assert configs.t5_from_json(good) == CONFIG
    with pytest.raises(WeightsError, match="'num_layers' should be an integer from 0 to 1000"):
        configs.t5_from_json(good | {"num_layers": value})


@pytest.mark.parametrize("counts", [(0, 2**40), (2**62, 0), (0, 2**62)])
def test_a_gguf_header_with_impossible_counts_is_refused_at_once(tmp_path, counts):
    tensors, pairs = (number.to_bytes(8, "little") for number in counts)
    (tmp_path / "x.gguf").write_bytes(
        b"GGUF" + (3).to_bytes(4, "little") + tensors + pairs + bytes(1000)
    )
    start = time.perf_counter()
    with pytest.raises(WeightsError, match="damaged within its header"):
        load_t5(tmp_path / "x.gguf")
    assert time.perf_counter() - start < 1


def test_a_gguf_array_of_too_many_strings_is_refused_at_once(tmp_path):
    key = (1).to_bytes(8, "little") + b"k" + (9).to_bytes(4, "little") + (8).to_bytes(4, "little")
    start = b"GGUF" + (3).to_bytes(4, "little") + bytes(8) + (1).to_bytes(8, "little") + key
    for count in (2**62, 2**24):
        with open(tmp_path / "x.gguf", "wb") as file:
            file.write(start + count.to_bytes(8, "little"))
            file.truncate(2**28)  # the rest of the file is zeros: empty strings
        begun = time.perf_counter()
        with pytest.raises(WeightsError, match="damaged within its header"):
            load_t5(tmp_path / "x.gguf")
        assert time.perf_counter() - begun < 1


def test_a_clip_with_its_vision_tower_loads_as_its_text_encoder(tmp_path):
    config = ClipConfig(
        vocabulary=16, positions=7, width=8, heads=2, depth=1, mlp_width=16, eos_token=15
    )
    stored = export(random_network(Clip, config), tables.CLIP_TRANSFORMERS)
    extra = (
        "vision_model.embeddings.class_embedding",
        "visual_projection.weight",
        "text_projection.weight",
        "logit_scale",
    )
    write(
        tmp_path / "model.safetensors",
        dict(stored) | {name: np.ones(3, np.float32) for name in extra},
    )
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "clip", "text_config": configs.clip_to_json(config)})
    )
    # Of the vision encoder there is only a part.
    whole = {network.kind: network.whole for network in inspect_weights(tmp_path).networks}
    assert whole == {"clip_vision": False, "clip": True}
    assert load_clip(tmp_path).config == config


# Files with a few bytes changed, at random places with fixed seeds.


@pytest.fixture
def traced_once(monkeypatch):
    """Trace the network of a config once: most of the changed files have the same config."""
    trace, known = eqx.filter_eval_shape, {}

    def trace_once(make, config, *, key):
        if (make, config) not in known:
            known[make, config] = trace(make, config, key=key)
        return known[make, config]

    monkeypatch.setattr(eqx, "filter_eval_shape", trace_once)


def own_layout(folder, named):
    write(folder / "named.safetensors", named)
    path = convert_weights(folder / "named.safetensors", folder / "t5.safetensors")
    (folder / "named.safetensors").unlink()
    return path


def transformers_folder(folder, named):
    write(folder / "model.safetensors", named)
    (folder / "config.json").write_text(json.dumps(configs.t5_to_json(CONFIG)))
    return folder / "model.safetensors"


def config_file(folder, named):
    transformers_folder(folder, named)
    return folder / "config.json"


def index_file(folder, named):
    names = sorted(named)
    for part in range(2):
        write(folder / f"m{part}.safetensors", {name: named[name] for name in names[part::2]})
    index = {"weight_map": {name: f"m{i % 2}.safetensors" for i, name in enumerate(names)}}
    (folder / "m.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(configs.t5_to_json(CONFIG)))
    return folder / "m.safetensors.index.json"


def gguf_file(folder, named):
    write_gguf(
        folder / "t5.gguf",
        "t5encoder",
        export(random_network(T5, CONFIG), tables.T5_LLAMA),
        {},
    )
    return folder / "t5.gguf"


def scaled_file(folder, named):
    key = "encoder.block.0.layer.0.SelfAttention.q.weight"
    stem = key.removesuffix("weight")
    stored = dict(named) | {
        key: (named[key] * 9).astype(ml_dtypes.float8_e4m3fn),
        stem + "weight_scale": np.float32(1 / 9),
    }
    stored[stem + "comfy_quant"] = np.frombuffer(b'{"format": "float8_e4m3fn"}', np.uint8)
    write(folder / "t5.safetensors", stored)
    return folder / "t5.safetensors"


def changed_bytes(content: bytes, rng: random.Random, header: int) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(min(header, len(changed)))
        new = rng.choice(
            [bytes([rng.randrange(256)]), b"", b"9", b'"', b"-", b"e9", b"\xff\xff", b"[", b"null"]
        )
        changed[place : place + rng.randint(0, 2)] = new
    return bytes(changed[: rng.choice([None, None, None, rng.randrange(len(content))])])


@pytest.mark.parametrize(
    "make",
    [own_layout, transformers_folder, config_file, index_file, gguf_file, scaled_file],
    ids=lambda make: make.__name__,
)
def test_three_hundred_changed_files_load_or_are_refused(named, traced_once, tmp_path, make):
    path = make(tmp_path, named)
    content, rng = path.read_bytes(), random.Random(make.__name__)
    load_t5(tmp_path)
    header = (
        8 + int.from_bytes(content[:8], "little") + 64 if path.suffix == ".safetensors" else 2000
    )
    messages: list[str] = []
    for _ in range(300):
        path.write_bytes(changed_bytes(content, rng, header))
        start = time.perf_counter()
        try:
            str(inspect_weights(tmp_path))
            network = load_t5(tmp_path)
            assert all_leaves_finite(network)
            assert type(network) is T5
        except (WeightsError, OSError) as error:
            messages.append(str(error))
        assert time.perf_counter() - start < 5
    assert 20 < len(messages) < 300
    assert not any("\x1b" in message for message in messages)


def all_leaves_finite(network) -> bool:
    return all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(network))
