"""Weights that other programs store in fewer bits are decoded as their own code decodes them."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from layouts import export, random_network, write

from fluxjax import T5, WeightsError, inspect_weights, load_t5
from fluxjax.checkpoint import names as tables
from fluxjax.checkpoint.safetensors import read_header
from fluxjax.checkpoint.scaled_formats import untile
from fluxjax.generate import load_ip_adapter
from fluxjax.nets import T5Config

CONFIG = T5Config(vocabulary=40, width=64, heads=4, head_dim=16, depth=2, mlp_width=96)
NAME = "encoder.block.1.layer.1.DenseReluDense.wi_0.weight"


@pytest.fixture(scope="module")
def named():
    """The weights of a T5 by transformers' names."""
    return export(random_network(T5, CONFIG), tables.T5_TRANSFORMERS)


def load_weight(path):
    """Return the weight `NAME` of a file as fluxjax loads it."""
    network = load_t5(path, config=CONFIG, dtype="float32")
    return np.asarray(network.blocks.gate.weight.value[1])


def nibble_pairs(packed: np.ndarray, high_first: bool) -> np.ndarray:
    halves = (packed >> 4, packed & 15) if high_first else (packed & 15, packed >> 4)
    return np.stack(halves, -1).reshape(len(packed), -1)


def tiled_by_definition(scales: np.ndarray) -> np.ndarray:
    """Return scales in the order of cuBLAS, each placed by the documented formula."""
    rows, blocks = scales.shape
    out = np.zeros((-(-rows // 128) * 128) * (-(-blocks // 4) * 4), scales.dtype)
    tiles_across = -(-blocks // 4)
    for row in range(rows):
        for block in range(blocks):
            tile = (row // 128) * tiles_across + block // 4
            out[tile * 512 + (row % 32) * 16 + (row % 128) // 32 * 4 + block % 4] = scales[
                row, block
            ]
    return out


@pytest.mark.parametrize("shape", [(96, 4), (200, 6), (128, 4), (1, 1)])
def test_untile_inverts_the_documented_order_of_scales(shape):
    scales = np.arange(shape[0] * shape[1], dtype=np.uint32).reshape(shape)
    np.testing.assert_array_equal(untile(tiled_by_definition(scales), *shape), scales)


@pytest.mark.parametrize("described", ["tensor", "metadata", None], ids=str)
def test_nvfp4_is_the_value_times_both_scales(named, tmp_path, described):
    rng = np.random.default_rng(0)
    packed = rng.integers(0, 256, (96, 32), np.uint8)
    scale = np.abs(rng.standard_normal((96, 4))).astype(ml_dtypes.float8_e4m3fn)
    second = np.float32(0.037)
    tiled = described is not None
    stem = NAME.removesuffix("weight")
    stored = dict(named) | {
        NAME: packed,
        stem + "weight_scale": tiled_by_definition(scale).reshape(128, 4) if tiled else scale,
        stem + "weight_scale_2": np.asarray(second),
        stem + "input_scale": np.ones((), np.float32),
    }
    metadata = None
    if described == "tensor":
        stored[stem + "comfy_quant"] = np.frombuffer(b'{"format": "nvfp4"}', np.uint8)
    elif described == "metadata":
        metadata = {
            "_quantization_metadata": json.dumps({"layers": {stem[:-1]: {"format": "nvfp4"}}})
        }
    write(tmp_path / "t5.safetensors", stored, metadata)
    codes = nibble_pairs(packed, high_first=tiled).astype(np.uint8)
    values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    expected = values * np.repeat(second * scale.astype(np.float32), 16, axis=1)
    np.testing.assert_array_equal(load_weight(tmp_path / "t5.safetensors"), expected)
    (network,) = inspect_weights(tmp_path / "t5.safetensors").networks
    assert network.whole
    assert "nvfp4" in network.storage
    assert network.parameters == sum(tensor.size for tensor in named.values())


def test_mxfp8_is_the_value_times_a_power_of_two(named, tmp_path):
    rng = np.random.default_rng(0)
    weight = torch.from_numpy(rng.standard_normal((96, 64)).astype(np.float32)).to(
        torch.float8_e4m3fn
    )
    exponents = rng.integers(110, 140, (96, 2), np.uint8)
    stem = NAME.removesuffix("weight")
    stored = dict(named) | {
        NAME: weight.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn),
        stem + "weight_scale": tiled_by_definition(exponents),
        stem + "comfy_quant": np.frombuffer(b'{"format": "mxfp8"}', np.uint8),
    }
    write(tmp_path / "t5.safetensors", stored)
    scale = (
        torch.from_numpy(exponents).view(torch.float8_e8m0fnu).float().repeat_interleave(32, dim=1)
    )
    np.testing.assert_array_equal(
        load_weight(tmp_path / "t5.safetensors"), (weight.float() * scale).numpy()
    )


@pytest.mark.parametrize("rows", [True, False])
def test_int8_of_comfyui_is_the_value_times_the_scale_and_refused_if_rotated(named, tmp_path, rows):
    rng = np.random.default_rng(0)
    weight = rng.integers(-127, 128, (96, 64)).astype(np.int8)
    scale = np.asarray(rng.random((96, 1) if rows else ()), np.float32)
    stem = NAME.removesuffix("weight")
    stored = dict(named) | {NAME: weight, stem + "weight_scale": scale}
    description = {"format": "int8_tensorwise"}
    stored[stem + "comfy_quant"] = np.frombuffer(json.dumps(description).encode(), np.uint8)
    write(tmp_path / "t5.safetensors", stored)
    np.testing.assert_array_equal(
        load_weight(tmp_path / "t5.safetensors"), weight.astype(np.float32) * scale
    )
    for other in (description | {"convrot": True}, {"format": "asym_w4a8_int8"}):
        stored[stem + "comfy_quant"] = np.frombuffer(json.dumps(other).encode(), np.uint8)
        write(tmp_path / "t5.safetensors", stored)
        with pytest.raises(WeightsError, match="which fluxjax can't decode"):
            load_weight(tmp_path / "t5.safetensors")


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
def test_4_bit_weights_are_decoded_as_bitsandbytes_does(named, tmp_path, kind, nested):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.from_numpy(np.array(named[NAME]))
    packed, state = functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=nested, quant_type=kind
    )
    stored = dict(named) | {NAME: packed.numpy()}
    stored |= {f"{NAME}.{key}": value.numpy() for key, value in state.as_dict(packed=True).items()}
    write(tmp_path / "t5.safetensors", stored)
    state.dtype = torch.float32
    expected = functional.dequantize_4bit(packed, state).numpy()
    # The order of the two multiplications differs, by one rounding.
    weight = load_weight(tmp_path / "t5.safetensors")
    np.testing.assert_allclose(weight, expected, rtol=1e-6, atol=1e-7)
    (network,) = inspect_weights(tmp_path / "t5.safetensors").networks
    assert kind.upper() in network.storage
    assert network.parameters == sum(tensor.size for tensor in named.values())
    del stored[f"{NAME}.absmax"]
    write(tmp_path / "t5.safetensors", stored)
    with pytest.raises(WeightsError, match="do not fit together"):
        load_weight(tmp_path / "t5.safetensors")


def test_8_bit_weights_are_decoded_as_bitsandbytes_does(named, tmp_path):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight, scale, _ = functional.int8_vectorwise_quant(
        torch.from_numpy(np.array(named[NAME])).half()
    )
    stem = NAME.removesuffix("weight")
    stored = dict(named) | {
        NAME: weight.numpy(),
        stem + "SCB": scale.numpy(),
        stem + "weight_format": np.uint8(0),
    }
    write(tmp_path / "t5.safetensors", stored)
    expected = functional.int8_vectorwise_dequant(weight, scale).numpy()
    # The order of the two multiplications differs, by one rounding.
    weight = load_weight(tmp_path / "t5.safetensors")
    np.testing.assert_allclose(weight, expected, rtol=1e-6)


def test_the_command_in_the_error_for_a_pickle_converts_it(named, tmp_path):
    torch.save(
        {name: torch.from_numpy(np.array(tensor)) for name, tensor in named.items()},
        tmp_path / "pytorch_model.bin",
    )
    with pytest.raises(WeightsError, match="is a pickle") as error:
        load_t5(tmp_path, config=CONFIG)
    code = str(error.value).split("python -c '")[1].split("'")[0]
    arguments = [sys.executable, "-c", code, "pytorch_model.bin", "model.safetensors"]
    subprocess.run(arguments, cwd=tmp_path, check=True)
    np.testing.assert_array_equal(load_weight(tmp_path / "model.safetensors"), named[NAME])


def test_the_command_in_that_error_joins_the_names_of_dictionaries_in_a_dictionary(tmp_path):
    values = {"proj": {"0": torch.ones(2)}, "ip": {"1.weight": torch.zeros(3)}}
    torch.save(values, tmp_path / "ip-adapter.bin")
    with pytest.raises(WeightsError, match="is a pickle") as error:
        load_ip_adapter(tmp_path / "ip-adapter.bin")
    code = str(error.value).split("python -c '")[1].split("'")[0]
    arguments = [sys.executable, "-c", code, "ip-adapter.bin", "model.safetensors"]
    subprocess.run(arguments, cwd=tmp_path, check=True)
    header = read_header(tmp_path / "model.safetensors")
    assert {name: one.shape for name, one in header.tensors.items()} == {
        "proj.0": (2,),
        "ip.1.weight": (3,),
    }
