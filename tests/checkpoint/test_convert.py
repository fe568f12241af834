"""Conversion: every layout in and out, bit by bit, tensor by tensor, and nothing left on errors."""

import json
import os
import shutil
import signal
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from bench_load import sparse_file
from layouts import assert_same_network, cast_network, export, random_network, write
from safetensors import deserialize, safe_open
from safetensors.numpy import load_file

from fluxjax import (
    Flux,
    FluxConfig,
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
from fluxjax.cli.main import main
from fluxjax.cli.options import byte_count

LOADERS = {"flux": load_flux, "clip": load_clip, "t5": load_t5, "vae": load_vae}
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


@pytest.fixture(scope="module")
def originals():
    return {name: load("tiny") for name, load in LOADERS.items()}


@pytest.fixture(scope="module")
def flux():
    return random_network(Flux, CONFIG)


def assert_same_networks(source, originals) -> None:
    for name, load in LOADERS.items():
        assert_same_network(load(source), originals[name])


def test_every_layout_in_turn_and_back_is_bitwise_the_same(originals, tmp_path):
    source = "tiny"  # in the layout of diffusers; each layout is then made from each other one
    for number, layout in enumerate(["own", "diffusers", "comfy", "own", "comfy"]):
        source = convert_weights(source, tmp_path / f"{number}-{layout}", to=layout)
        assert_same_networks(source, originals)
        assert inspect_weights(source).whole
    back = convert_weights(source, tmp_path / "back", to="diffusers")
    files = [path for path in tiny_folder().glob("*/*.safetensors") if path.parent.name != "loras"]
    # The model's four networks, a ControlNet, and the two networks of Redux.
    assert len(files) == 7
    for file in files:
        written = back / file.relative_to(tiny_folder())
        # Names, dtypes, shapes and bytes; NumPy itself has no float8.
        contents = [dict(deserialize(path.read_bytes())) for path in (written, file)]
        assert contents[0] == contents[1]


def test_one_file_holds_all_in_comfys_layout_and_one_network_in_others(originals, tmp_path):
    everything = convert_weights("tiny", tmp_path / "all.safetensors", to="comfy")
    assert_same_networks(everything, originals)
    for layout in ("own", "bfl", "comfy"):
        target = tmp_path / f"{layout}.safetensors"
        one = convert_weights(everything, target, to=layout, only=["flux"])
        assert_same_network(load_flux(one), originals["flux"])
    with pytest.raises(WeightsError, match="holds one network, not flux, t5, clip, vae"):
        convert_weights("tiny", tmp_path / "x.safetensors", to="own")
    with pytest.raises(WeightsError, match="is a folder"):
        convert_weights("tiny", tmp_path / "x.safetensors", to="diffusers", only=["flux"])
    with pytest.raises(WeightsError, match="has no CLIP text encoder"):
        convert_weights("tiny", tmp_path / "x", to="bfl", only=["clip", "flux"])
    with pytest.raises(
        ValueError, match=r"`convert_weights\(to\)` takes one of own, .* got 'onnx'"
    ):
        convert_weights("tiny", tmp_path / "x", to="onnx")
    with pytest.raises(ValueError, match="There is no network 'unet'"):
        convert_weights("tiny", tmp_path / "x", only="unet")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["all.safetensors", "bfl.safetensors", "comfy.safetensors", "own.safetensors"]


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
    assert_same_networks(folder, originals)
    with pytest.raises(ValueError, match="Shards need a folder"):
        convert_weights("tiny", tmp_path / "x", to="comfy", shard_size=1)


def test_the_tokenizers_and_defaults_come_along(tmp_path):
    folder = convert_weights("tiny", tmp_path / "own")
    pieces = load_tokenizers("tiny").t5.get_piece_size()
    assert load_tokenizers(folder).t5.get_piece_size() == pieces
    again = convert_weights(folder, tmp_path / "again", to="diffusers")
    for name in (
        "model_index.json",
        "fluxjax.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
    ):
        expected = json.loads((tiny_folder() / name).read_text())
        assert json.loads((again / name).read_text()) == expected


def test_the_own_layout_is_the_memory_and_is_mapped(originals, tmp_path, monkeypatch):
    path = convert_weights("tiny", tmp_path / "flux.safetensors", only=["flux"])
    stored = load_file(path)["double.img.qkv.weight"]
    flux = originals["flux"]
    assert stored.tobytes() == np.asarray(flux.double.img.qkv.weight.value).tobytes()
    monkeypatch.setattr(Plan, "fill", None)  # nothing is read, all is mapped
    mapped = load_flux(path)
    assert_same_network(mapped, flux)
    with safe_open(path, "np") as file:
        origin = json.loads(file.metadata()["fluxjax"])["origin"]["flux"]
    assert origin == {"files": ["diffusion_pytorch_model.safetensors"], "names": "diffusers"}
    # What is done with the arrays never reaches the file.
    before = path.read_bytes()
    leaves = jax.tree.leaves(mapped)
    add_one = jax.jit(lambda leaf: leaf + 1, donate_argnums=0)
    jax.block_until_ready(add_one(max(leaves, key=lambda leaf: leaf.nbytes)))
    assert path.read_bytes() == before


def test_a_dtype_casts_and_eight_bits_are_only_for_matrices(originals, tmp_path):
    wide = convert_weights("tiny", tmp_path / "wide", to="comfy", dtype="float32")
    assert_same_network(load_t5(wide), cast_network(originals["t5"], np.float32))
    dtype = ml_dtypes.float8_e4m3fn
    narrow = convert_weights("tiny", tmp_path / "narrow.safetensors", to="comfy", dtype=dtype)
    flux = load_flux(narrow)
    assert flux.single.linear1.weight.value.dtype == dtype
    assert flux.single.linear1.bias.dtype == flux.single.query_norm.scale.dtype == jnp.bfloat16
    exact = np.asarray(originals["flux"].single.linear1.weight.value)
    found = np.asarray(flux.single.linear1.weight.value)
    np.testing.assert_array_equal(found, exact.astype(dtype))
    assert {leaf.dtype for leaf in jax.tree.leaves(load_vae(narrow))} == {jnp.dtype("bfloat16")}
    assert load_clip(narrow).tokens.weight.dtype == jnp.bfloat16


def test_a_value_that_a_dtype_can_not_hold_is_named(flux, tmp_path):
    weight = np.array(flux.txt_in.weight.value)
    weight[3, 4] = 1e6
    big = eqx.tree_at(lambda net: net.txt_in.weight.value, flux, jnp.asarray(weight))
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
    ids=["dev", "schnell", "Fill", "Canny/Depth"],
)
def test_the_variant_is_read_from_the_header_whatever_the_files_name(tmp_path, config, name):
    sparse_file(tmp_path / "model.safetensors", config)
    (network,) = inspect_weights(tmp_path / "model.safetensors").networks
    found = (network.kind, network.variant, network.whole, network.loads_as)
    assert found == ("flux", name, True, "bfloat16")
    if name == "dev":
        assert network.parameters == 11_901_408_320


def test_inspect_says_what_is_missing_and_what_is_extra(flux, tmp_path, capsys):
    path = tmp_path / "flux.safetensors"
    tensors = export(flux, tables.FLUX_DIFFUSERS)
    del tensors["x_embedder.weight"]
    tensors["spare.weight"] = np.zeros(2, np.float32)
    write(path, tensors)
    with pytest.raises(SystemExit) as end:
        main(["inspect", str(path)])
    assert end.value.code == 1
    assert "img_in.weight" in capsys.readouterr().out  # without it the size is not known
    write(path, tensors, {"fluxjax": json.dumps({"parts": {"flux": CONFIG.__dict__}})})
    (network,) = inspect_weights(path).networks
    assert list(network.problems["missing"]) == ["x_embedder.weight"]
    assert list(network.problems["unexpected"]) == ["spare.weight"]


SLICES = """
import sys

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import fluxjax
from fluxjax.checkpoint.plan import Plan

mesh = jax.make_mesh((4,), ("fsdp",))


def sharding(leaf):
    axes = [axis for axis, size in enumerate(leaf.shape) if size % 4 == 0]
    names = ["fsdp" if axes and axis == axes[-1] else None for axis in range(leaf.ndim)]
    return NamedSharding(mesh, PartitionSpec(*names))


sizes = []
read_leaf = Plan.leaf


def counted(self, name, shape, dtype, index):
    values = read_leaf(self, name, shape, dtype, index)
    sizes.append(values.size)
    return values


for source in sys.argv[1:]:
    Plan.leaf = read_leaf
    whole = fluxjax.load_flux(source)
    shardings = jax.tree.map(sharding, whole)
    Plan.leaf = counted
    sizes.clear()
    split = fluxjax.load_flux(source, sharding=shardings)
    leaves = [jax.tree.leaves(tree) for tree in (whole, split, shardings)]
    for expected, found, place in zip(*leaves, strict=True):
        assert found.sharding == place
        assert np.asarray(found).tobytes() == np.asarray(expected).tobytes()
    every_value = [leaf.size for leaf in leaves[0]]
    assert sum(sizes) == sum(every_value), "each value is read once"
    assert max(sizes) <= max(every_value) // 4
    print("read", source)
"""


def test_a_sharded_load_reads_only_each_devices_slice(tmp_path):
    sources = []
    for layout in ("own", "diffusers", "bfl"):
        sources.append(convert_weights("tiny", tmp_path / layout, to=layout, only=["flux"]))
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SLICES, *map(str, sources)]
    done = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(sources)


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_conversion_leaves_nothing(tmp_path, single, error):
    counts = []

    def stop(written, total):
        counts.append((written, total))
        if len(counts) == 20:
            raise error

    target = tmp_path / ("flux.safetensors" if single else "model")
    only = ["flux"] if single else None
    with pytest.raises(error):
        convert_weights("tiny", target, to="comfy", only=only, progress=stop)
    assert list(tmp_path.iterdir()) == []
    written = [count for count, _ in counts]
    assert written == sorted(set(written))  # the bytes so far
    assert len({total for _, total in counts}) == 1


def test_the_last_progress_is_the_total(tmp_path):
    counts = []
    path = convert_weights(
        "tiny", tmp_path / "clip", only="clip", progress=lambda *count: counts.append(count)
    )
    tensors = read_header(path / "clip.safetensors").tensors.values()
    nbytes = sum(tensor.nbytes for tensor in tensors)
    assert counts[-1] == (nbytes, nbytes)


# A process that is ended by SIGTERM in the middle of writing, and then one whose disk is full.
ENDED = """
import os
import resource
import signal
import sys

import fluxjax.checkpoint.write as writing
from fluxjax.cli.main import main

write = writing.write_safetensors
calls = []


def write_until_terminated(path, tensors, metadata, *, report):
    def count(nbytes):
        calls.append(nbytes)
        if len(calls) == 20:
            assert list(path.parent.parent.rglob("*.part"))
            os.kill(os.getpid(), signal.SIGTERM)
        report(nbytes)

    write(path, tensors, metadata, report=count)


if sys.argv[1] == "terminated":
    writing.write_safetensors = write_until_terminated
    main(["convert", "tiny", sys.argv[2]])
resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, 4_000_000))
for arguments in ([sys.argv[2]], [sys.argv[2] + ".safetensors", "--only", "flux"]):
    try:
        main(["convert", "tiny", *arguments])
    except SystemExit as end:
        print("exit code", end.code)
"""


def test_a_terminated_conversion_leaves_nothing(tmp_path):
    command = [sys.executable, "-c", ENDED, "terminated", str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path):
    command = [sys.executable, "-c", ENDED, "full", str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.count("exit code 2") == 2, done.stderr
    assert done.stderr.count("There is not enough disk space for") == 2
    assert done.stderr.count("Free some space, or write elsewhere") == 2
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_is_at_the_destination_stays(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("mine")
    (tmp_path / "flux.safetensors").write_text("mine")
    for target in ("model", "flux.safetensors"):
        with pytest.raises(FileExistsError, match="Remove it, or choose another"):
            convert_weights("tiny", tmp_path / target, only=["flux"])
    assert (tmp_path / "flux.safetensors").read_text() == "mine"
    assert (tmp_path / "model" / "mine.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert load_flux(convert_weights("tiny", tmp_path / "empty", only=["flux"])).config.width == 192


def test_the_command_line_converts_and_inspects(tmp_path, capsys):
    model = str(tmp_path / "model")
    main(["convert", "tiny", model, "--to", "comfy", "--only", "vae", "--only", "flux"])
    names = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert names == ["ae.safetensors", "flux1-dev.safetensors"]
    main(["inspect", model])
    out = capsys.readouterr().out
    assert "flux: FLUX transformer (dev, of another size), 5,244,864 parameters" in out
    assert "whole: loads with load_vae as bfloat16" in out
    with pytest.raises(SystemExit) as end:
        main(["convert", "tiny", model])
    assert end.value.code == 2
    for size, nbytes in {"3GB": 3_000_000_000, "1.5kB": 1500, "7": 7}.items():
        assert byte_count(size) == nbytes
