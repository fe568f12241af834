"""Conversion: every layout in and out, bit by bit, streamed, and safe against damage."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import equinox as eqx
import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from bench_load import sparse_file
from hypothesis import HealthCheck, given, settings, strategies as st
from layouts import export, write
from safetensors import safe_open
from safetensors.numpy import load_file

from fluxjax import (
    T5,
    Flux,
    FluxConfig,
    T5Config,
    WeightsError,
    convert_weights,
    inspect_weights,
    load_clip,
    load_flux,
    load_models,
    load_t5,
    load_tokenizers,
    load_vae,
)
from fluxjax.checkpoint import names as tables
from fluxjax.checkpoint.plan import Plan
from fluxjax.checkpoint.safetensors import read_header
from fluxjax.checkpoint.shipped import tiny_folder
from fluxjax.cli.main import main as cli
from fluxjax.cli.options import byte_count

LOADERS = {"flux": load_flux, "clip": load_clip, "t5": load_t5, "vae": load_vae}
CONFIG = FluxConfig(
    width=64, heads=2, double_depth=2, single_depth=2, mlp_width=256, context=64, pooled=64, in_channels=64,
    rope_axes=(8, 12, 12), time_width=256,
)  # fmt: skip


def networks(source) -> dict:
    return {name: load(source) for name, load in LOADERS.items()}


@pytest.fixture(scope="module")
def originals():
    return networks("tiny")


@pytest.fixture(scope="module")
def flux():
    leaves, structure = jax.tree.flatten(Flux(CONFIG, key=jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(
        structure, [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )


def test_every_layout_in_turn_and_back_is_bitwise_the_same(originals, tmp_path):
    source = "tiny"
    for number, layout in enumerate(["own", "comfy", "diffusers", "own", "diffusers", "comfy"]):
        source = convert_weights(source, tmp_path / f"{number}-{layout}", to=layout)
        assert eqx.tree_equal(networks(source), originals)
        assert inspect_weights(source).whole
    back = convert_weights(source, tmp_path / "back", to="diffusers")
    files = sorted(
        path for path in tiny_folder().glob("*/*.safetensors") if path.parent.name != "loras"
    )
    assert len(files) == 4
    for file in files:
        ours, theirs = load_file(back / file.relative_to(tiny_folder())), load_file(file)
        assert ours.keys() == theirs.keys()
        assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)


def test_one_file_holds_all_in_comfys_layout_and_one_network_in_others(originals, tmp_path):
    everything = convert_weights("tiny", tmp_path / "all.safetensors", to="comfy")
    assert eqx.tree_equal(networks(everything), originals)
    for layout in ("own", "bfl", "comfy"):
        one = convert_weights(
            everything, tmp_path / f"{layout}.safetensors", to=layout, only=["flux"]
        )
        assert eqx.tree_equal(load_flux(one), originals["flux"])
    with pytest.raises(WeightsError, match="holds one network, not flux, t5, clip, vae"):
        convert_weights("tiny", tmp_path / "x.safetensors", to="own")
    with pytest.raises(WeightsError, match="is a folder"):
        convert_weights("tiny", tmp_path / "x.safetensors", to="diffusers", only=["flux"])
    with pytest.raises(WeightsError, match="has no CLIP text encoder"):
        convert_weights("tiny", tmp_path / "x", to="bfl", only=["clip", "flux"])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["all.safetensors", "own.safetensors", "bfl.safetensors", "comfy.safetensors"]
    )


def test_one_file_beside_the_tokenizers_is_a_model(tmp_path):
    (tmp_path / "model").mkdir()
    everything = convert_weights("tiny", tmp_path / "model" / "all.safetensors", to="comfy")
    with pytest.raises(FileNotFoundError, match="comes without tokenizers"):
        load_models(str(everything))
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(tiny_folder() / name, tmp_path / "model" / name)
    assert load_models(str(tmp_path / "model")).flux.config.width == 192


@pytest.mark.parametrize("layout", ["own", "diffusers"])
def test_shards_keep_below_their_size_and_load_the_same(originals, tmp_path, layout):
    folder = convert_weights("tiny", tmp_path / "sharded", to=layout, shard_size=1_000_000)
    files = list(folder.rglob("*.safetensors"))
    assert len(files) > 10
    for file in files:
        tensors = read_header(file).tensors.values()
        assert sum(t.nbytes for t in tensors) <= 1_000_000 or len(tensors) == 1
    assert eqx.tree_equal(networks(folder), originals)
    with pytest.raises(ValueError, match="Shards need a folder"):
        convert_weights("tiny", tmp_path / "x", to="comfy", shard_size=1)


def test_the_tokenizers_and_defaults_come_along(tmp_path):
    folder = convert_weights("tiny", tmp_path / "own")
    assert (
        load_tokenizers(folder).t5.get_piece_size() == load_tokenizers("tiny").t5.get_piece_size()
    )
    again = convert_weights(folder, tmp_path / "again", to="diffusers")
    for name in (
        "model_index.json",
        "fluxjax.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
    ):
        assert json.loads((again / name).read_text()) == json.loads(
            (tiny_folder() / name).read_text()
        )


def test_the_own_layout_is_the_memory_and_is_mapped(originals, tmp_path, monkeypatch):
    path = convert_weights("tiny", tmp_path / "flux.safetensors", only=["flux"])
    stored = load_file(path)
    flux = originals["flux"]
    assert (
        stored["double.img.qkv.weight"].tobytes()
        == np.asarray(flux.double.img.qkv.weight.value).tobytes()
    )
    monkeypatch.setattr(Plan, "fill", None)  # nothing is read, all is mapped
    mapped = load_flux(path)
    with safe_open(path, "np") as file:
        about = json.loads(file.metadata()["fluxjax"])
    assert eqx.tree_equal(mapped, flux)
    assert about["origin"]["flux"] == {
        "files": ["diffusion_pytorch_model.safetensors"],
        "names": "diffusers",
    }
    # What is done with the arrays never reaches the file.
    before = path.read_bytes()
    donated = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf + 1, x), donate_argnums=0)(mapped)
    jax.block_until_ready(donated)
    assert path.read_bytes() == before


def test_a_dtype_casts_and_eight_bits_are_for_matrices_alone(originals, tmp_path):
    wide = convert_weights("tiny", tmp_path / "wide", to="comfy", dtype="float32")
    assert {leaf.dtype for leaf in jax.tree.leaves(load_t5(wide))} == {jnp.dtype("float32")}
    narrow = convert_weights(
        "tiny", tmp_path / "narrow.safetensors", to="comfy", dtype=jnp.float8_e4m3fn
    )
    flux = load_flux(narrow)
    assert flux.single.linear1.weight.value.dtype == jnp.float8_e4m3fn
    assert flux.single.linear1.bias.dtype == flux.single.query_norm.scale.dtype == jnp.bfloat16
    exact = originals["flux"].single.linear1.weight.value
    np.testing.assert_array_equal(
        np.asarray(flux.single.linear1.weight.value), np.asarray(exact.astype(jnp.float8_e4m3fn))
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(load_vae(narrow))} == {jnp.dtype("bfloat16")}
    assert load_clip(narrow).tokens.weight.dtype == jnp.bfloat16


def test_a_value_that_a_dtype_can_not_hold_is_named(flux, tmp_path):
    big = eqx.tree_at(
        lambda net: net.txt_in.weight.value, flux, flux.txt_in.weight.value.at[3, 4].set(1e6)
    )
    write(tmp_path / "flux.safetensors", export(big, tables.FLUX_DIFFUSERS))
    with pytest.raises(WeightsError, match=r"txt_in\.weight holds 1e\+06, which float16 can't"):
        load_flux(tmp_path / "flux.safetensors", config=CONFIG, dtype="float16")


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (FluxConfig.dev(), "dev"),
        (FluxConfig.schnell(), "schnell"),
        (FluxConfig(in_channels=384, out_channels=64), "Fill"),
        (FluxConfig(in_channels=128, out_channels=64), "Canny/Depth"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_variant_is_told_from_the_header_whatever_the_files_name(tmp_path, config, name):
    sparse_file(tmp_path / "model.safetensors", config)
    (network,) = inspect_weights(tmp_path / "model.safetensors").networks
    assert (network.kind, network.variant, network.whole, network.loads_as) == (
        "flux",
        name,
        True,
        "bfloat16",
    )
    if name == "dev":
        assert network.parameters == 11_901_408_320


def test_inspect_says_what_is_missing_and_what_is_extra(flux, tmp_path, capsys):
    tensors = export(flux, tables.FLUX_DIFFUSERS)
    del tensors["x_embedder.weight"]
    tensors["spare.weight"] = np.zeros(2, np.float32)
    write(tmp_path / "flux.safetensors", tensors)
    with pytest.raises(SystemExit) as end:
        cli.main(["inspect", str(tmp_path / "flux.safetensors")])
    assert end.value.code == 1
    assert "img_in.weight" in capsys.readouterr().out  # without it the size is not known
    write(
        tmp_path / "flux.safetensors",
        tensors,
        {"fluxjax": json.dumps({"parts": {"flux": CONFIG.__dict__}})},
    )
    (network,) = inspect_weights(tmp_path / "flux.safetensors").networks
    assert (list(network.problems["missing"]), list(network.problems["unexpected"])) == (
        ["x_embedder.weight"],
        ["spare.weight"],
    )


def scaled(
    tensors: dict[str, np.ndarray], *, newer: bool = False, rows: bool = False
) -> dict[str, np.ndarray]:
    """Return a checkpoint as ComfyUI's scaled fp8 has it, by its older or its newer names."""
    out: dict[str, np.ndarray] = (
        {} if newer else {"scaled_fp8": np.zeros(2, ml_dtypes.float8_e4m3fn)}
    )
    for name, tensor in tensors.items():
        if tensor.ndim != 2:
            out[name] = tensor.astype(ml_dtypes.bfloat16)
            continue
        stem = name.removesuffix("weight")
        scale = np.asarray(
            np.abs(tensor).max(1 if rows else None, keepdims=rows), np.float32
        ) / np.float32(448)
        out[name] = (tensor / scale).astype(ml_dtypes.float8_e4m3fn)
        out[stem + ("weight_scale" if newer else "scale_weight")] = np.asarray(scale)
        out[stem + ("input_scale" if newer else "scale_input")] = np.ones((), np.float32)
        if newer:
            out[stem + "comfy_quant"] = np.frombuffer(b'{"format": "float8_e4m3fn"}', np.uint8)
    return out


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(
    "names", [{}, {"newer": True}, {"rows": True}], ids=["older", "newer", "rows"]
)
def test_scaled_fp8_is_weight_times_scale(flux, tmp_path, prefix, names):
    stored = scaled(export(flux, tables.FLUX_BFL), **names)
    write(tmp_path / "flux.safetensors", {prefix + name: tensor for name, tensor in stored.items()})
    exact = load_flux(tmp_path / "flux.safetensors", config=CONFIG, dtype="float32")
    name = "single_blocks.1.linear1"
    scale = stored.get(f"{name}.scale_weight", stored.get(f"{name}.weight_scale"))
    expected = stored[f"{name}.weight"].astype(np.float32) * scale
    np.testing.assert_array_equal(exact.single.linear1.weight.value[1], expected)
    # e4m3 has 4 significant bits: at most 1/16 off, but for what falls below its normal range.
    np.testing.assert_allclose(
        exact.single.linear1.weight.value, flux.single.linear1.weight.value, rtol=1 / 16, atol=2e-4
    )
    default = load_flux(tmp_path / "flux.safetensors", config=CONFIG)
    assert default.single.linear1.weight.value.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        default.single.linear1.weight.value, exact.single.linear1.weight.value.astype(jnp.bfloat16)
    )


def test_a_scale_without_a_weight_or_of_another_shape_is_refused(flux, tmp_path):
    stored = scaled(export(flux, tables.FLUX_BFL))
    stored["img_in.scale_weight"] = np.ones(7, np.float32)
    write(tmp_path / "flux.safetensors", stored)
    with pytest.raises(
        WeightsError,
        match=r"'img_in\.weight': .* needs one float scale, or one for each row, got .* \[7\]",
    ):
        load_flux(tmp_path / "flux.safetensors", config=CONFIG)
    stored["img_in.weight"] = stored["img_in.weight"].astype(
        np.int8
    )  # of another quantization, perhaps rotated too
    write(tmp_path / "flux.safetensors", stored)
    with pytest.raises(
        WeightsError, match="is stored as int8 with a scale and no description of its format"
    ):
        load_flux(tmp_path / "flux.safetensors", config=CONFIG)
    del stored["img_in.weight"]
    write(tmp_path / "flux.safetensors", stored)
    with pytest.raises(WeightsError, match=r"'img_in\.weight' has scales, and is missing"):
        load_flux(tmp_path / "flux.safetensors", config=CONFIG)


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2], ids=str)
def test_plain_fp8_keeps_its_dtype_or_is_cast(flux, tmp_path, dtype):
    stored = {name: tensor.astype(dtype) for name, tensor in export(flux, tables.FLUX_BFL).items()}
    write(tmp_path / "flux.safetensors", stored)
    kept = load_flux(tmp_path / "flux.safetensors", config=CONFIG)
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {np.dtype(dtype)}
    cast = load_flux(tmp_path / "flux.safetensors", config=CONFIG, dtype="bfloat16")
    assert eqx.tree_equal(cast, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), kept))


QUANTIZED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


def write_gguf(
    path: Path, arch: str, tensors: dict[str, np.ndarray], kinds: dict[str, str]
) -> None:
    """Write a GGUF file; what has a kind is given as that kind's bytes."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.5])
    for name, tensor in tensors.items():
        if name in kinds:
            writer.add_tensor(name, tensor, raw_dtype=gguf.GGMLQuantizationType[kinds[name]])
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_blocks(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """Return random bytes that are blocks of a kind, with finite scales."""
    block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    while True:
        raw = rng.integers(0, 256, (shape[0], shape[1] // block * nbytes), np.uint8)
        # A float16 has its exponent in the high byte's middle bits: away from infinity.
        halves = raw.reshape(-1, nbytes)
        halves[:, 1::2] &= 0b10111111
        with np.errstate(all="ignore"):
            if np.isfinite(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])).all():
                return raw


@pytest.mark.parametrize("kind", [*QUANTIZED, "F16", "BF16"])
def test_gguf_is_what_its_own_package_decodes(tmp_path, kind):
    config = FluxConfig(
        width=256,
        heads=2,
        double_depth=1,
        single_depth=1,
        mlp_width=512,
        context=256,
        pooled=256,
        in_channels=64,
    )
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape), eqx.filter_eval_shape(Flux, config, key=jax.random.key(0))
    )
    rng = np.random.default_rng(0)
    tensors, kinds, expected = export(zeros, tables.FLUX_BFL), {}, {}
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and name.startswith(("double_blocks", "single_blocks")):
            values = rng.standard_normal(tensor.shape, np.float32)
            if kind == "F16":
                tensors[name], expected[name] = values.astype(np.float16), values.astype(np.float16)
            elif kind == "BF16":
                expected[name] = values.astype(ml_dtypes.bfloat16)
                tensors[name], kinds[name] = expected[name].view(np.uint8), kind
            else:
                tensors[name], kinds[name] = random_blocks(rng, tensor.shape, kind), kind
                expected[name] = gguf.quants.dequantize(
                    tensors[name], gguf.GGMLQuantizationType[kind]
                )
    write_gguf(tmp_path / "flux.gguf", "flux", tensors, kinds)
    (network,) = inspect_weights(tmp_path / "flux.gguf").networks
    assert network.storage.keys() == {
        "float32",
        {"F16": "float16", "BF16": "bfloat16"}.get(kind, kind),
    }
    exact = load_flux(tmp_path / "flux.gguf", config=config, dtype="float32")
    for name, leaf in {
        "double_blocks.0.txt_mlp.0.weight": exact.double.txt.mlp.up.weight.value[0],
        "single_blocks.0.linear2.weight": exact.single.linear2.weight.value[0],
    }.items():
        np.testing.assert_array_equal(leaf, expected[name].astype(np.float32))
    default = load_flux(tmp_path / "flux.gguf", config=config).single.linear2.weight.value
    assert default.dtype == (jnp.float16 if kind == "F16" else jnp.bfloat16)


def test_a_t5_in_llamas_names_loads(tmp_path):
    config = T5Config(vocabulary=40, width=64, heads=4, head_dim=16, depth=2, mlp_width=96)
    t5 = T5(config, key=jax.random.key(3))
    named = export(t5, tables.T5_LLAMA)
    kinds = {name: "Q8_0" for name, tensor in named.items() if name.endswith("ffn_up.weight")}
    stored = {
        name: gguf.quants.quantize(tensor, gguf.GGMLQuantizationType.Q8_0)
        if name in kinds
        else tensor
        for name, tensor in named.items()
    }
    write_gguf(tmp_path / "t5.gguf", "t5encoder", stored, kinds)
    loaded = load_t5(tmp_path / "t5.gguf", dtype="float32")
    assert loaded.config == config
    up = np.asarray(loaded.blocks.up.weight.value)
    assert 0 < np.abs(up - np.asarray(t5.blocks.up.weight.value)).max() < 0.02
    same = eqx.tree_at(lambda net: net.blocks.up.weight.value, loaded, t5.blocks.up.weight.value)
    assert eqx.tree_equal(same, t5)


def test_gguf_converts_to_any_layout(flux, tmp_path):
    tensors = {name: np.asarray(t, np.float32) for name, t in export(flux, tables.FLUX_BFL).items()}
    kinds = {name: "Q8_0" for name, t in tensors.items() if t.ndim == 2}
    q8 = gguf.GGMLQuantizationType.Q8_0
    stored = {
        name: gguf.quants.quantize(t, q8) if name in kinds else t for name, t in tensors.items()
    }
    write_gguf(tmp_path / "flux.gguf", "flux", stored, kinds)
    with pytest.raises(WeightsError, match="does not tell their RoPE axes"):
        convert_weights(tmp_path / "flux.gguf", tmp_path / "x")
    config = FluxConfig(
        width=128, heads=1, double_depth=1, single_depth=1, mlp_width=512, context=64, pooled=64
    )
    big = export(Flux(config, key=jax.random.key(0)), tables.FLUX_BFL)
    kinds = {name: "Q8_0" for name, t in big.items() if t.ndim == 2}
    stored = {name: gguf.quants.quantize(t, q8) if name in kinds else t for name, t in big.items()}
    write_gguf(tmp_path / "flux.gguf", "flux", stored, kinds)
    for layout in ("own", "diffusers", "comfy"):
        folder = convert_weights(tmp_path / "flux.gguf", tmp_path / layout, to=layout)
        assert eqx.tree_equal(load_flux(folder), load_flux(tmp_path / "flux.gguf"))


def test_without_the_gguf_package_the_error_says_how_to_get_it(flux, tmp_path, monkeypatch):
    (tmp_path / "flux.gguf").write_bytes(b"GGUF" + bytes(64))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(WeightsError, match=r"pip install 'fluxjax\[gguf\]'"):
        load_flux(tmp_path / "flux.gguf")


SLICES = """
import sys
import jax, numpy as np, equinox as eqx
from jax.sharding import NamedSharding, PartitionSpec as P
import fluxjax
from fluxjax.convert.load import Plan
source = sys.argv[1]
whole = fluxjax.load_flux(source)
mesh = jax.make_mesh((4,), ("fsdp",))
def spec(leaf):
    axes = [i for i, n in enumerate(leaf.shape) if n % 4 == 0]
    return NamedSharding(mesh, P(*("fsdp" if axes and i == axes[-1] else None for i in range(leaf.ndim))))
shardings = jax.tree.map(spec, whole)
read, leaf = [], Plan.leaf
def counted(self, name, shape, dtype, index):
    out = leaf(self, name, shape, dtype, index)
    read.append(out.size)
    return out
Plan.leaf = counted
split = fluxjax.load_flux(source, sharding=shardings)
assert all(bool((np.asarray(a) == np.asarray(b)).all()) for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(split)))
assert all(a.sharding == b for a, b in zip(jax.tree.leaves(split), jax.tree.leaves(shardings)))
assert sum(read) == sum(x.size for x in jax.tree.leaves(whole)), (sum(read), "each value is read once")
assert max(read) <= max(x.size for x in jax.tree.leaves(whole)) // 4
"""


@pytest.mark.parametrize("layout", ["own", "diffusers", "bfl"])
def test_a_sharded_load_reads_a_slice_a_device(tmp_path, layout):
    source = convert_weights("tiny", tmp_path / "model", to=layout, only=["flux"])
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
    }
    subprocess.run([sys.executable, "-c", SLICES, str(source)], env=environment, check=True)


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_conversion_leaves_nothing(tmp_path, single, error):
    seen = []

    def stop(count):
        seen.append(count)
        if len(seen) == 20:
            raise error

    target = tmp_path / ("flux.safetensors" if single else "model")
    with pytest.raises(error):
        convert_weights("tiny", target, to="comfy", only=["flux"] if single else None, report=stop)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys, fluxjax.cli.main, fluxjax.weights
write = fluxjax.weights.write_sheets
def slow(folder, sheets, *, report, **rest):
    seen = []
    def hear(count):
        seen.append(count)
        if len(seen) == 20:
            assert list(folder.rglob("*.part"))
            os.kill(os.getpid(), signal.SIGTERM)
        report(count)
    write(folder, sheets, report=hear, **rest)
fluxjax.weights.write_sheets = slow
fluxjax.cli.main(["convert", "tiny", sys.argv[1]])
"""


def test_a_terminated_conversion_leaves_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "model")], capture_output=True
    )
    assert done.returncode == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


FULL_DISK = """
import resource, sys, fluxjax.cli.main
resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, 4_000_000))
fluxjax.cli.main(["convert", "tiny", sys.argv[1], *sys.argv[2:]])
"""


@pytest.mark.parametrize("single", [True, False])
def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, single):
    target = tmp_path / ("flux.safetensors" if single else "model")
    arguments = [str(target), "--only", "flux"] if single else [str(target)]
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "There is not enough disk space for" in done.stderr
    assert "Free some, or write elsewhere" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_is_at_the_destination_stays(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("mine")
    (tmp_path / "flux.safetensors").write_text("mine")
    for target in ("model", "flux.safetensors"):
        with pytest.raises(FileExistsError, match="Remove it, or choose another"):
            convert_weights("tiny", tmp_path / target, only=["flux"])
    assert (
        (tmp_path / "flux.safetensors").read_text()
        == (tmp_path / "model" / "mine.txt").read_text()
        == "mine"
    )
    (tmp_path / "empty").mkdir()
    assert load_flux(convert_weights("tiny", tmp_path / "empty", only=["flux"])).config.width == 192


def test_two_of_one_network_and_strangers_are_refused(flux, tmp_path):
    write(tmp_path / "one.safetensors", export(flux, tables.FLUX_BFL))
    write(tmp_path / "two.safetensors", export(flux, tables.FLUX_DIFFUSERS))
    with pytest.raises(
        WeightsError, match=r"two FLUX transformers, in one\.safetensors and two\.safetensors"
    ):
        inspect_weights(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    write(
        tmp_path / "style.safetensors",
        {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": np.zeros((2, 4), np.float32)},
    )
    assert eqx.tree_equal(load_flux(tmp_path, config=CONFIG), flux)
    with pytest.raises(
        WeightsError, match=r"style\.safetensors is a LoRA, not a model.*choose it with `only`"
    ):
        convert_weights(tmp_path, tmp_path / "out")
    assert "is a LoRA" in str(inspect_weights(tmp_path))


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"], "is a LoRA, not a model"),
        (["lycoris_double_blocks_0_img_attn_qkv.lokr_w1"], "is a LoRA, not a model"),
        (["model.diffusion_model.input_blocks.1.0.weight"], "Stable Diffusion 1, 2 or XL"),
        (["double_stream_modulation_img.lin.weight", "txt_in.weight"], "FLUX.2"),
        (["distilled_guidance_layer.in_proj.weight"], "Chroma"),
        (["joint_blocks.0.context_block.attn.qkv.weight"], "Stable Diffusion 3"),
        (["something.else"], "holds no network of FLUX: found something"),
    ],
)
def test_what_is_no_network_of_flux_is_named(tmp_path, names, told):
    write(tmp_path / "x.safetensors", {name: np.zeros((2, 2), np.float32) for name in names})
    with pytest.raises(WeightsError, match=told):
        load_flux(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "pytorch_model.bin"])
def test_a_pickle_is_told_as_a_file_and_in_a_folder(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04" + bytes(60))
    for source in (tmp_path / name, tmp_path):
        with pytest.raises(WeightsError, match="is a pickle"):
            load_flux(source)


def raw(path: Path, header: object, data: bytes = bytes(64)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(first: int, last: int) -> dict:
    return {"dtype": "U8", "shape": [last - first], "data_offsets": [first, last]}


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ({"a": entry(0, 40), "b": entry(32, 64)}, "'a' and 'b' overlap"),
        (b'{"a": {"dtype": "U8"}, "a": {"dtype": "U8"}}', "names 'a' twice"),
        (b"[" * 100_000, "not JSON"),
        ({"a": {"dtype": "U8", "shape": [2**70], "data_offsets": [0, 8]}}, "is damaged"),
        ({"a": {"dtype": ["U8"], "shape": [8], "data_offsets": [0, 8]}}, "is damaged"),
        ({"a": [1]}, "is damaged"),
        ({"__metadata__": {"x": 1}}, "metadata is damaged"),
        ({"__metadata__": {"fluxjax": "{"}}, "fluxjax's metadata is damaged"),
        (
            {"__metadata__": {"fluxjax": '{"parts": {"flux": 3}, "layout": "own"}'}},
            "its own config should hold an object",
        ),
        (
            {
                "__metadata__": {
                    "fluxjax": '{"parts": {"t5": {"depth": 1000000000}}, "layout": "own"}'
                }
            },
            "'depth' should be an integer from 0 to 1000, got 1000000000",
        ),
    ],
)
def test_a_damaged_header_is_told(tmp_path, header, told):
    path = raw(tmp_path / "x.safetensors", header)
    with pytest.raises(WeightsError, match=told):
        load_t5(path) if b"t5" in path.read_bytes() else load_flux(path)


@pytest.mark.parametrize("length", [0x80, 0x280, 0x580, 0x4B50])
def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path, length):
    header = json.dumps({"a": entry(0, 64)}).encode()
    assert list(read_header(raw(tmp_path / "x.safetensors", header.ljust(length))).tensors) == ["a"]


def test_an_absurd_header_length_takes_no_memory(tmp_path):
    path = tmp_path / "x.safetensors"
    for length in (2**63, 10**8 + 1, 10**7 + 1):
        path.write_bytes(length.to_bytes(8, "little") + bytes(100))
        with pytest.raises(
            WeightsError, match=r"not a safetensors file|truncated within its header"
        ):
            read_header(path)


def test_the_index_of_a_file_outside_or_damaged_is_refused(tmp_path):
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


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A whole small T5 in the own layout, and the bytes of its header."""
    t5 = T5(
        T5Config(vocabulary=8, width=8, heads=2, head_dim=4, depth=2, mlp_width=8),
        key=jax.random.key(0),
    )
    folder = tmp_path_factory.mktemp("small")
    write(folder / "named.safetensors", export(t5, tables.T5_TRANSFORMERS))
    path = convert_weights(folder / "named.safetensors", folder / "t5.safetensors")
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return folder, content, 8 + length


def loads_or_tells(path: Path) -> None:
    """Load a file; nothing but a `WeightsError` may come of it, and no memory beyond the file's and Python's own."""
    tracemalloc.start()
    try:
        load_t5(path)
    except WeightsError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 100 * path.stat().st_size + 5_000_000


MUTATED = settings(
    max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
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


@MUTATED
@given(st.data())
def test_a_header_with_changed_bytes_loads_or_is_told(small, data):
    folder, content, start = small
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, start - 1))
        changed[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    path = folder / "changed.safetensors"
    path.write_bytes(changed[: data.draw(st.sampled_from([None, start - 1, start + 5]))])
    loads_or_tells(path)


@MUTATED
@given(st.data())
def test_a_header_with_changed_values_loads_or_is_told(small, data):
    folder, content, start = small
    header = json.loads(content[8:start])
    table = header
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(sorted(table)))
        inner = table[key]
        if key == "__metadata__" and data.draw(st.booleans()):
            about = json.loads(inner["fluxjax"])
            config = about["parts"]["t5"]
            config[data.draw(st.sampled_from(sorted(config)))] = data.draw(JSON)
            inner["fluxjax"] = json.dumps(about)
        elif isinstance(inner, dict) and data.draw(st.booleans()):
            inner[data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = data.draw(JSON)
        else:
            header[data.draw(st.just(key) | st.text(max_size=8))] = data.draw(JSON)
            break
    loads_or_tells(raw(folder / "changed.safetensors", header, content[start:]))


@settings(
    max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
@given(st.data())
def test_a_damaged_gguf_loads_or_is_told(small, data):
    folder = small[0]
    whole = folder / "t5.gguf"
    if not whole.exists():
        write_gguf(
            whole, "t5encoder", export(load_t5(folder / "t5.safetensors"), tables.T5_LLAMA), {}
        )
    changed = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, min(len(changed), 1500) - 1))
        changed[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    path = folder / "changed.gguf"
    path.write_bytes(changed[: data.draw(st.sampled_from([None, 700, 1500]))])
    loads_or_tells(path)


def test_the_command_line_converts_and_inspects(tmp_path, capsys):
    cli.main(
        [
            "convert",
            "tiny",
            str(tmp_path / "model"),
            "--to",
            "comfy",
            "--only",
            "vae",
            "--only",
            "flux",
        ]
    )
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "ae.safetensors",
        "flux1-dev.safetensors",
    ]
    cli.main(["inspect", str(tmp_path / "model")])
    out = capsys.readouterr().out
    assert "flux: FLUX transformer (dev, of another size), 5,244,864 parameters" in out
    assert "whole: loads with load_vae as bfloat16" in out
    with pytest.raises(SystemExit) as end:
        cli.main(["convert", "tiny", str(tmp_path / "model")])
    assert end.value.code == 2
    for size, ok in {"3GB": 3_000_000_000, "1.5kB": 1500, "7": 7}.items():
        assert byte_count(size) == ok
