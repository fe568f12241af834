"""Matrices that files store in few bits stay packed, and are written so to GGUF files."""

import gguf
import jax
import numpy as np
import pytest
from layouts import assert_same_network, export, random_network, write, write_gguf
from meshes import flux_inputs, relative, velocities

from fluxjax import (
    Flux,
    FluxConfig,
    WeightsError,
    attach,
    convert_weights,
    load_flux,
    merge,
    offload,
    save,
    stream_blocks,
)
from fluxjax.checkpoint import names as tables
from fluxjax.checkpoint.bitsandbytes_4bit import QuantState, decode_four_bits
from fluxjax.checkpoint.gguf_rounding import round_to_gguf
from fluxjax.generate.network_bytes import bytes_of_source
from fluxjax.lora import init_lora
from fluxjax.nets import GroupedWeight, PackedWeight, decode_weights
from fluxjax.nets.packed_formats import NF4_CODES

CONFIG = FluxConfig(
    width=256,
    heads=2,
    double_depth=2,
    single_depth=3,
    mlp_width=512,
    context=64,
    pooled=64,
    in_channels=64,
)
KIND = gguf.GGMLQuantizationType


@pytest.fixture(scope="module")
def bfl():
    return export(random_network(Flux, CONFIG, scale=0.05), tables.FLUX_BFL)


def rounded(tensors, kind_of):
    """Return tensors with some rounded to block formats, and the formats of these.

    `kind_of`: from a name to a format, or None for a tensor that is kept.
    """
    stored, kinds = {}, {}
    for name, tensor in tensors.items():
        kind = kind_of(name) if tensor.ndim == 2 and "_blocks." in name else None
        stored[name] = tensor if kind is None else round_to_gguf(tensor, kind)
        if kind is not None:
            kinds[name] = kind
    return stored, kinds


@pytest.fixture(scope="module")
def mixed(bfl, tmp_path_factory):
    """A file in which blocks differ: the last single block has 8 bits, its `linear1` 16."""

    def kind_of(name):
        if name.startswith("single_blocks.2."):
            return None if "linear1" in name else "Q8_0"
        return "Q4_K"

    path = tmp_path_factory.mktemp("mixed") / "flux.gguf"
    write_gguf(path, "flux", *rounded(bfl, kind_of))
    return path


def test_a_file_of_several_formats_keeps_each_blocks_own(bfl, mixed):
    flux, plain = load_flux(mixed, config=CONFIG), load_flux(mixed, config=CONFIG, dtype="float32")
    qkv, linear1 = flux.double.img.qkv.weight, flux.single.linear1.weight
    assert isinstance(qkv, PackedWeight)
    assert isinstance(linear1, GroupedWeight)
    # Byte by byte, and nothing twice.
    raw = round_to_gguf(bfl["double_blocks.1.img_attn.qkv.weight"], "Q4_K")
    np.testing.assert_array_equal(qkv.value[1], raw)
    shapes = [leaf.shape for leaf in jax.tree.leaves(linear1.stacks)]
    assert shapes == [(2, 1280, 144), (1, 1280, 256)]
    assert_same_network(decode_weights(flux, "float32"), plain)
    rows = flux_inputs(CONFIG, 1)
    expected = velocities(plain, rows)
    assert relative(velocities(flux, rows), expected) <= 1e-6
    assert relative(velocities(load_flux(mixed, config=CONFIG, stream=True), rows), expected) < 0.01
    with pytest.raises(WeightsError, match="decodes packed ones; or attach the adapters"):
        merge(flux, [init_lora(flux, rank=2, key=jax.random.key(0))])


def test_a_file_of_several_formats_is_streamed_from_host_memory(bfl, mixed):
    flux = load_flux(mixed, config=CONFIG)
    streamed = stream_blocks(offload(flux))
    linear1 = streamed.single.linear1.weight
    assert linear1.shape == (3, 1280, 256)
    (kind,) = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(linear1)}
    assert kind == "pinned_host"
    # The bytes are those of the file, and rows of 4 bits are padded to the length of float32.
    raw = round_to_gguf(bfl["single_blocks.1.linear1.weight"], "Q4_K")
    np.testing.assert_array_equal(linear1.stored.value[1, :, :144], raw)
    assert linear1.stored.value.shape == (3, 1280, 1024)
    rows = flux_inputs(CONFIG, 1)
    expected = velocities(flux, rows)
    assert relative(velocities(streamed, rows), expected) <= 1e-6
    lora = init_lora(flux, rank=2, key=jax.random.key(0))
    assert relative(velocities(attach(streamed, [lora]), rows), expected) <= 1e-6


def test_a_scale_that_is_not_finite_is_refused(bfl, tmp_path):
    stored, kinds = rounded(bfl, lambda name: "Q4_K")
    name = "single_blocks.1.linear2.weight"
    stored[name][3, 146:148] = np.float16([np.inf]).view(np.uint8)  # an offset of its second block
    write_gguf(tmp_path / "flux.gguf", "flux", stored, kinds)
    for options in ({}, {"stream": True}):
        with pytest.raises(WeightsError, match=rf"'{name}' holds NaN or infinity"):
            load_flux(tmp_path / "flux.gguf", config=CONFIG, **options)


def nf4_tensors(name, shape, block):
    """Return a weight as bitsandbytes stores it, by its tensors' names."""
    rng = np.random.default_rng(0)
    size = shape[0] * shape[1]
    state = b'{"quant_type": "nf4", "shape": [%d, %d], "blocksize": %d}' % (*shape, block)
    return {
        name: rng.integers(0, 256, (size // 2, 1), np.uint8),
        f"{name}.quant_map": np.asarray(NF4_CODES, np.float32),
        f"{name}.absmax": rng.uniform(0.1, 1, size // block).astype(np.float32),
        f"{name}.quant_state.bitsandbytes__nf4": np.frombuffer(state, np.uint8),
    }


@pytest.mark.parametrize("block", [64, 128])
def test_nf4_stays_packed_with_the_same_values(bfl, tmp_path, block):
    name, stored = "double_blocks.1.img_attn.proj.weight", dict(bfl)
    for number in range(2):
        one = f"double_blocks.{number}.img_attn.proj.weight"
        stored |= nf4_tensors(one, bfl[one].shape, block)
    write(tmp_path / "flux.safetensors", stored)
    weight = load_flux(tmp_path / "flux.safetensors", config=CONFIG).double.img.out.weight
    assert weight.format == "nf4"
    arrays = {
        "weight": stored[name],
        "quant_map": stored[f"{name}.quant_map"],
        "absmax": stored[f"{name}.absmax"],
    }
    expected = decode_four_bits(arrays, state=QuantState((256, 256), block, None, 0.0))
    decoded = decode_weights(weight, "float32").value
    np.testing.assert_array_equal(decoded[1].reshape(-1), expected)


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q4_0"])
def test_blocks_are_those_of_the_gguf_package_byte_by_byte(kind):
    values = np.random.default_rng(0).standard_normal((9, 512), np.float32)
    values[0, :40] = 0
    values[1] = np.round(values[1] * 4) / 4  # halfway between codes
    values[2, :64] *= 1e-7
    expected = gguf.quants.quantize(values, KIND[kind])
    np.testing.assert_array_equal(round_to_gguf(values, kind), expected)


def searched(part):
    """Round 32 values with a scale and an offset that are searched for, one loop per choice."""
    weights = np.sqrt(np.mean(part**2)) + np.abs(part)
    low = min(part.min(), 0.0)
    best = (np.inf, 0.0, 0.0)
    for level in [15.0, *(14 + 0.1 * np.arange(21))]:
        codes = np.clip(np.round(level / (part.max() - low) * (part - low)), 0, 15)
        matrix = np.stack([codes, -np.ones(32)], 1) * np.sqrt(weights)[:, None]
        scale, offset = np.linalg.lstsq(matrix, part * np.sqrt(weights), rcond=None)[0]
        if offset < 0:
            scale, offset = (weights * codes) @ part / ((weights * codes) @ codes), 0.0
        error = weights @ (scale * codes - offset - part) ** 2
        best = min(best, (error, scale, offset))
    _, scale, offset = best
    return scale * np.clip(np.round((part + offset) / scale), 0, 15) - offset


def test_q4_k_is_about_as_near_as_a_search_without_rounded_scales():
    values = np.random.default_rng(0).standard_normal((4, 256), np.float32)
    found = gguf.quants.dequantize(round_to_gguf(values, "Q4_K"), KIND.Q4_K)
    best = np.stack([searched(part) for part in values.astype(np.float64).reshape(-1, 32)])
    error = relative(found, values)
    # The scales of the format are themselves rounded to 6 bits.
    assert error <= 1.03 * relative(best.reshape(values.shape), values)
    smallest = values.reshape(-1, 32).min(1, keepdims=True)
    step = (values.reshape(-1, 32).max(1, keepdims=True) - smallest) / 15
    even = np.round((values.reshape(-1, 32) - smallest) / step) * step + smallest
    assert error < 0.95 * relative(even.reshape(values.shape), values)


def test_a_written_gguf_file_is_read_by_its_package_and_by_fluxjax(tmp_path):
    path = convert_weights("tiny", tmp_path / "t.gguf", to="gguf", dtype="Q4_K", only="flux")
    reader = gguf.GGUFReader(path)
    assert reader.get_field("general.architecture").contents() == "flux"
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    # 192 columns do not divide into blocks of 256, 768 do.
    assert kinds["double_blocks.0.img_attn.qkv.weight"] == "Q5_0"
    assert kinds["double_blocks.0.img_mlp.2.weight"] == "Q4_K"
    assert kinds["img_in.weight"] == "BF16"
    assert kinds["img_in.bias"] == "F32"
    flux = load_flux(path)
    assert flux.double.txt.mlp.down.weight.format == "Q4_K"
    packed = sum(leaf.nbytes for leaf in jax.tree.leaves(flux) if leaf.dtype == np.uint8)
    assert bytes_of_source("flux", path).matrices == packed  # as memory is planned
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    raw = by_name["single_blocks.3.linear1.weight"].data
    np.testing.assert_array_equal(flux.single.linear1.weight.value[3], raw)
    with pytest.raises(FileExistsError):
        convert_weights("tiny", path, to="gguf", only="flux")
    plain = save(load_flux("tiny"), tmp_path / "plain.gguf", to="gguf")
    expected = load_flux("tiny", dtype="float32")
    assert_same_network(load_flux(plain, dtype="float32"), expected)


def test_what_a_gguf_file_can_not_hold_is_refused(tmp_path):
    for options, rule in (
        ({"to": "gguf"}, "holds one transformer"),
        ({"to": "gguf", "only": "flux", "dtype": "float8_e4m3fn"}, "can't write float8_e4m3fn"),
        ({"to": "bfl", "only": "flux"}, "or choose the layout gguf"),
    ):
        with pytest.raises((ValueError, WeightsError), match=rule):
            convert_weights("tiny", tmp_path / "x.gguf", **options)
    with pytest.raises(ValueError, match=r"End the name in \.gguf"):
        convert_weights("tiny", tmp_path / "x.safetensors", to="gguf", only="flux")
    with pytest.raises(ValueError, match="is for the layout gguf"):
        convert_weights("tiny", tmp_path / "x.safetensors", to="bfl", only="flux", dtype="Q4_K")
    assert not list(tmp_path.iterdir())
