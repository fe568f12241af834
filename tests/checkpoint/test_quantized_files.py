"""Files of scaled fp8 and GGUF: what they decode to, and into which layouts they convert."""

import sys

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from layouts import (
    Arrays,
    assert_same_network,
    cast_network,
    export,
    random_network,
    write,
    write_gguf,
)

from fluxjax import (
    T5,
    Flux,
    FluxConfig,
    WeightsError,
    convert_weights,
    inspect_weights,
    load_flux,
    load_t5,
)
from fluxjax.checkpoint import names as tables
from fluxjax.nets import T5Config, decode_weights

CONFIG = FluxConfig(
    width=64,
    heads=2,
    double_depth=2,
    single_depth=2,
    mlp_width=256,
    context=64,
    pooled=64,
    in_channels=64,
    rope_axes=(8, 12, 12),
    time_width=256,
)
Q8 = gguf.GGMLQuantizationType.Q8_0


@pytest.fixture(scope="module")
def flux():
    return random_network(Flux, CONFIG)


@pytest.fixture(scope="module")
def bfl(flux) -> Arrays:
    return export(flux, tables.FLUX_BFL)


def scaled(tensors: Arrays, *, newer: bool = False, rows: bool = False) -> Arrays:
    """Return a checkpoint in ComfyUI's scaled fp8, with its older or its newer names.

    `rows`: one scale per row in place of one for the tensor.
    """
    out: Arrays = {} if newer else {"scaled_fp8": np.zeros(2, ml_dtypes.float8_e4m3fn)}
    scale_name, input_name = "scale_weight", "scale_input"
    if newer:
        scale_name, input_name = "weight_scale", "input_scale"
    for name, tensor in tensors.items():
        if tensor.ndim != 2:
            out[name] = tensor.astype(ml_dtypes.bfloat16)
            continue
        stem = name.removesuffix("weight")
        largest = np.abs(tensor).max(1 if rows else None, keepdims=rows)
        scale = np.asarray(largest, np.float32) / np.float32(448)
        out[name] = (tensor / scale).astype(ml_dtypes.float8_e4m3fn)
        out[stem + scale_name] = np.asarray(scale)
        out[stem + input_name] = np.ones((), np.float32)
        if newer:
            out[stem + "comfy_quant"] = np.frombuffer(b'{"format": "float8_e4m3fn"}', np.uint8)
    return out


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(
    "names", [{}, {"newer": True}, {"rows": True}], ids=["older", "newer", "rows"]
)
def test_scaled_fp8_is_weight_times_scale(flux, bfl, tmp_path, prefix, names):
    stored = scaled(bfl, **names)
    write(tmp_path / "flux.safetensors", {prefix + name: tensor for name, tensor in stored.items()})
    loaded = load_flux(tmp_path / "flux.safetensors", config=CONFIG, dtype="float32")
    exact = np.asarray(loaded.single.linear1.weight.value)
    name = "single_blocks.1.linear1"
    scale = stored.get(f"{name}.scale_weight", stored.get(f"{name}.weight_scale"))
    expected = stored[f"{name}.weight"].astype(np.float32) * scale
    np.testing.assert_array_equal(exact[1], expected)
    # e4m3 has 4 significant bits: at most 1/16 off, but for what falls below its normal range.
    original = np.asarray(flux.single.linear1.weight.value)
    np.testing.assert_allclose(exact, original, rtol=1 / 16, atol=2e-4)
    default = load_flux(tmp_path / "flux.safetensors", config=CONFIG).single.linear1.weight.value
    assert default.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(default), exact.astype(ml_dtypes.bfloat16))


def test_a_scale_without_a_weight_or_of_another_shape_is_refused(bfl, tmp_path):
    path = tmp_path / "flux.safetensors"
    stored = scaled(bfl)
    stored["img_in.scale_weight"] = np.ones(7, np.float32)
    write(path, stored)
    rule = r"'img_in\.weight': .* needs one float scale, or one for each row, got .* \[7\]"
    with pytest.raises(WeightsError, match=rule):
        load_flux(path, config=CONFIG)
    # int8 of another quantization, which may be rotated too.
    stored["img_in.weight"] = stored["img_in.weight"].astype(np.int8)
    write(path, stored)
    rule = "is stored as int8 with a scale and no description of its format"
    with pytest.raises(WeightsError, match=rule):
        load_flux(path, config=CONFIG)
    del stored["img_in.weight"]
    write(path, stored)
    with pytest.raises(WeightsError, match=r"'img_in\.weight' has scales, and is missing"):
        load_flux(path, config=CONFIG)


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2], ids=str)
def test_plain_fp8_keeps_its_dtype_or_is_cast(flux, bfl, tmp_path, dtype):
    path = tmp_path / "flux.safetensors"
    write(path, {name: tensor.astype(dtype) for name, tensor in bfl.items()})
    kept = load_flux(path, config=CONFIG)
    assert_same_network(kept, cast_network(flux, dtype))
    cast = load_flux(path, config=CONFIG, dtype="bfloat16")
    assert_same_network(cast, cast_network(kept, ml_dtypes.bfloat16))


QUANTIZED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
GGUF_CONFIG = FluxConfig(
    width=256,
    heads=2,
    double_depth=1,
    single_depth=1,
    mlp_width=512,
    context=256,
    pooled=256,
    in_channels=64,
)


@pytest.fixture(scope="module")
def zeros() -> Arrays:
    return export(random_network(Flux, GGUF_CONFIG, scale=0.0), tables.FLUX_BFL)


def random_blocks(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """Return random bytes that are blocks of a kind, with finite scales."""
    block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    while True:
        raw = rng.integers(0, 256, (shape[0], shape[1] // block * nbytes), np.uint8)
        # A float16 has its exponent in the high byte's middle bits: away from infinity.
        halves = raw.reshape(-1, nbytes)
        halves[:, 1::2] &= 0b10111111
        with np.errstate(all="ignore"):
            values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
        if np.isfinite(values).all():
            return raw


def stored_as(
    kind: str, shape: tuple[int, ...], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return random bytes of a kind of storage, and the values that they stand for."""
    if kind in QUANTIZED:
        raw = random_blocks(rng, shape, kind)
        return raw, gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    values = rng.standard_normal(shape, np.float32)
    if kind == "F16":
        return values.astype(np.float16), values.astype(np.float16)
    values = values.astype(ml_dtypes.bfloat16)
    return values.view(np.uint8), values


@pytest.mark.parametrize("kind", [*QUANTIZED, "F16", "BF16"])
def test_gguf_is_what_its_own_package_decodes(zeros, tmp_path, kind):
    rng = np.random.default_rng(0)
    tensors, kinds, expected = dict(zeros), {}, {}
    for name, tensor in zeros.items():
        if tensor.ndim == 2 and name.startswith(("double_blocks", "single_blocks")):
            tensors[name], expected[name] = stored_as(kind, tensor.shape, rng)
            if kind != "F16":  # a NumPy dtype, so the array itself tells it
                kinds[name] = kind
    write_gguf(tmp_path / "flux.gguf", "flux", tensors, kinds)
    (network,) = inspect_weights(tmp_path / "flux.gguf").networks
    storage = {"F16": "float16", "BF16": "bfloat16"}.get(kind, kind)
    assert network.storage.keys() == {"float32", storage}
    exact = load_flux(tmp_path / "flux.gguf", config=GGUF_CONFIG, dtype="float32")
    found = export(exact, tables.FLUX_BFL)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values.astype(np.float32), err_msg=name)
    default = load_flux(tmp_path / "flux.gguf", config=GGUF_CONFIG).single.linear2.weight
    if kind in QUANTIZED:
        assert default.format == kind
    else:
        assert default.value.dtype == (jnp.float16 if kind == "F16" else jnp.bfloat16)


def quantized(tensors: Arrays, names: list[str]) -> tuple[Arrays, dict[str, str]]:
    """Return tensors with the named ones as blocks of Q8_0, and the kinds of these."""
    stored = dict(tensors)
    for name in names:
        stored[name] = gguf.quants.quantize(tensors[name], Q8)
    return stored, dict.fromkeys(names, "Q8_0")


def test_a_t5_in_llamas_names_loads(tmp_path):
    config = T5Config(vocabulary=40, width=64, heads=4, head_dim=16, depth=2, mlp_width=96)
    t5 = random_network(T5, config, scale=0.1)
    named = export(t5, tables.T5_LLAMA)
    ups = [name for name in named if name.endswith("ffn_up.weight")]
    write_gguf(tmp_path / "t5.gguf", "t5encoder", *quantized(named, ups))
    loaded = load_t5(tmp_path / "t5.gguf", dtype="float32")
    assert loaded.config == config
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(t5)]
    for name, found, expected in zip(
        names, jax.tree.leaves(loaded), jax.tree.leaves(t5), strict=True
    ):
        difference = np.abs(np.asarray(found) - np.asarray(expected)).max()
        if name == ".blocks.up.weight.value":
            assert 0 < difference < 0.02  # rounded to 8 bits
        else:
            assert difference == 0, name


def test_gguf_converts_to_any_layout(bfl, tmp_path):
    path = tmp_path / "flux.gguf"
    matrices = [name for name, tensor in bfl.items() if tensor.ndim == 2]
    write_gguf(path, "flux", *quantized(bfl, matrices))
    with pytest.raises(WeightsError, match="does not tell their RoPE axes"):
        convert_weights(path, tmp_path / "x")
    config = FluxConfig(
        width=128, heads=1, double_depth=1, single_depth=1, mlp_width=512, context=64, pooled=64
    )
    big = export(random_network(Flux, config), tables.FLUX_BFL)
    write_gguf(
        path, "flux", *quantized(big, [name for name, tensor in big.items() if tensor.ndim == 2])
    )
    expected = decode_weights(load_flux(path))
    for layout in ("own", "diffusers", "comfy"):
        folder = convert_weights(path, tmp_path / layout, to=layout)
        assert_same_network(load_flux(folder), expected)


def test_without_the_gguf_package_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    (tmp_path / "flux.gguf").write_bytes(b"GGUF" + bytes(64))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(WeightsError, match=r"pip install 'fluxjax\[gguf\]'"):
        load_flux(tmp_path / "flux.gguf")
