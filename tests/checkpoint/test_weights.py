"""Loading and exporting: bit by bit, all of a network or an error, and with little memory."""

import json
import shutil
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from layouts import assert_same_network, cast_network, export, random_network, write
from safetensors.numpy import load_file, save_file

import fluxjax
from fluxjax import Clip, Flux, FluxConfig, Vae, WeightsError, load_clip, load_flux, load_vae
from fluxjax.checkpoint import names as tables
from fluxjax.checkpoint.safetensors import read_header
from fluxjax.checkpoint.shipped import tiny_folder
from fluxjax.nets import ClipConfig, VaeConfig

CONFIG = FluxConfig(
    width=32,
    heads=2,
    double_depth=2,
    single_depth=3,
    mlp_width=128,
    context=24,
    pooled=8,
    in_channels=16,
    out_channels=16,
    rope_axes=(4, 6, 6),
)
VAE_CONFIG = VaeConfig(channels=(8, 16, 16, 24), groups=8, resnets=1)


@pytest.fixture(scope="module")
def flux():
    return random_network(Flux, CONFIG)


@pytest.fixture(scope="module")
def tensors(flux):
    return export(flux, tables.FLUX_BFL)


@pytest.fixture(scope="module")
def vae():
    return random_network(Vae, VAE_CONFIG)


@pytest.fixture
def bfl(tensors, tmp_path):
    path = tmp_path / "flux.safetensors"
    write(path, tensors)
    return path


def test_what_is_written_is_what_safetensors_reads(tensors, bfl):
    theirs = load_file(bfl)
    assert theirs.keys() == tensors.keys()
    assert all(np.array_equal(theirs[name], tensors[name]) for name in tensors)


def test_a_bfl_file_comes_back_bitwise(flux, bfl):
    assert_same_network(load_flux(bfl, config=CONFIG), flux)


def test_a_diffusers_file_comes_back_bitwise(flux, tmp_path):
    path = tmp_path / "flux.safetensors"
    write(path, export(flux, tables.FLUX_DIFFUSERS))
    assert_same_network(load_flux(path, config=CONFIG), flux)


def test_diffusers_last_modulation_is_scale_then_shift(flux, tensors):
    theirs = export(flux, tables.FLUX_DIFFUSERS)["norm_out.linear.bias"]
    shift, scale = np.split(tensors["final_layer.adaLN_modulation.1.bias"], 2)
    np.testing.assert_array_equal(theirs, np.concatenate([scale, shift]))


@pytest.mark.parametrize("dialect", [tables.vae_bfl(4), tables.VAE_DIFFUSERS], ids=lambda d: d.name)
def test_a_vae_comes_back_bitwise(dialect, vae, tmp_path):
    write(tmp_path / "ae.safetensors", export(vae, dialect))
    assert_same_network(load_vae(tmp_path / "ae.safetensors", config=VAE_CONFIG), vae)


def test_bfl_numbers_the_decoders_levels_finest_first(vae):
    names = export(vae, tables.vae_bfl(4))
    assert names["decoder.up.3.block.0.conv1.weight"].shape == (24, 24, 3, 3)
    assert names["decoder.up.0.block.1.conv1.weight"].shape == (8, 8, 3, 3)


def test_dtype_none_keeps_the_files_and_another_casts(bfl, tensors, flux, tmp_path):
    half = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    write(tmp_path / "half.safetensors", half)
    kept = load_flux(tmp_path / "half.safetensors", config=CONFIG)
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype(jnp.bfloat16)}
    assert_same_network(load_flux(bfl, config=CONFIG, dtype=jnp.bfloat16), kept)
    assert_same_network(kept, cast_network(flux, ml_dtypes.bfloat16))


def test_sharding_places_every_leaf():
    devices = jax.sharding.NamedSharding(
        jax.make_mesh((1,), ("data",)), jax.sharding.PartitionSpec()
    )
    vae = load_vae("tiny", sharding=devices)
    assert all(leaf.sharding == devices for leaf in jax.tree.leaves(vae))
    each = load_vae("tiny", sharding=jax.tree.map(lambda leaf: devices, vae))
    assert all(leaf.sharding == devices for leaf in jax.tree.leaves(each))


def test_one_error_lists_all_that_is_missing_unexpected_and_misshapen(tensors, tmp_path):
    wrong = dict(tensors)
    del wrong["img_in.bias"], wrong["double_blocks.1.txt_mlp.2.weight"]
    wrong["lora.weight"] = wrong["img_in.weight"]
    wrong["final_layer.linear.bias"] = np.zeros(5, np.float32)
    wrong["single_blocks.3.linear1.bias"] = wrong["single_blocks.2.linear1.bias"]
    write(tmp_path / "wrong.safetensors", wrong)
    with pytest.raises(WeightsError) as caught:
        load_flux(tmp_path / "wrong.safetensors", config=CONFIG)
    message = str(caught.value)
    assert "2 missing: double_blocks.1.txt_mlp.2.weight, img_in.bias" in message
    assert "2 unexpected: lora.weight, single_blocks.3.linear1.bias" in message
    assert "1 misshapen: final_layer.linear.bias is [5], not [16]" in message


def test_a_tensor_named_twice_and_one_of_integers_are_refused(tmp_path):
    config = ClipConfig(vocabulary=8, positions=4, width=8, heads=2, depth=1, mlp_width=16)
    named = export(random_network(Clip, config), tables.CLIP_TRANSFORMERS)
    named["final_layer_norm.weight"] = named["text_model.final_layer_norm.weight"]
    named["text_model.final_layer_norm.bias"] = named["text_model.final_layer_norm.bias"].astype(
        np.int8
    )
    write(tmp_path / "clip.safetensors", named)
    with pytest.raises(
        WeightsError,
        match=r"1 misshapen: .*is int8, not a float\n  1 repeated: final_layer_norm\.weight",
    ):
        load_clip(tmp_path / "clip.safetensors", config=config)


def test_stacked_tensors_of_several_dtypes_take_the_widest(tensors, tmp_path, flux):
    mixed = dict(tensors)
    for name, dtype in (
        ("double_blocks.0.img_mlp.0.weight", np.float16),
        ("double_blocks.1.img_mlp.0.weight", ml_dtypes.bfloat16),
    ):
        mixed[name] = mixed[name].astype(dtype)
    write(tmp_path / "mixed.safetensors", mixed)
    weight = load_flux(tmp_path / "mixed.safetensors", config=CONFIG).double.img.mlp.up.weight.value
    assert weight.dtype == jnp.float32
    np.testing.assert_allclose(weight, flux.double.img.mlp.up.weight.value, rtol=2**-8)


def test_a_missing_part_of_a_fused_weight_is_named(flux, tmp_path):
    theirs = export(flux, tables.FLUX_DIFFUSERS)
    del theirs["transformer_blocks.0.attn.to_k.weight"]
    write(tmp_path / "flux.safetensors", theirs)
    with pytest.raises(WeightsError, match=r"1 missing: transformer_blocks\.0\.attn\.to_k\.weight"):
        load_flux(tmp_path / "flux.safetensors", config=CONFIG)


@pytest.mark.parametrize("keep", [0, 4, 8, 300, -1])
def test_a_truncated_file_is_a_clear_error(bfl, keep):
    content = bfl.read_bytes()
    bfl.write_bytes(content[:keep])
    with pytest.raises(WeightsError, match=r"truncated|not a safetensors file"):
        load_flux(bfl, config=CONFIG)


@pytest.mark.parametrize("start", [b"PK\x03\x04" + bytes(60), b"\x80\x02}q\x00" + bytes(60)])
def test_a_pickle_is_refused_unread(tmp_path, start):
    path = tmp_path / "flux.safetensors"
    path.write_bytes(start)
    with pytest.raises(WeightsError, match="is a pickle"):
        load_flux(path, config=CONFIG)


def test_other_files_and_other_networks_are_named_in_the_error(tmp_path, bfl):
    text = tmp_path / "notes.safetensors"
    text.write_text("these are notes, and long enough for a header")
    with pytest.raises(WeightsError, match="not a safetensors file"):
        load_flux(text)
    with pytest.raises(WeightsError, match="holds no VAE, but a FLUX transformer"):
        load_vae(bfl)
    with pytest.raises(FileNotFoundError, match="Pass a known model"):
        load_flux("no-such-model")


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}, "does not fit its offsets"),
        ({"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}, "is damaged"),
        ({"dtype": "F31", "shape": [4], "data_offsets": [0, 16]}, "dtype F31"),
        ({"dtype": "F32", "shape": [4]}, "is damaged"),
        ({"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}, "is truncated"),
    ],
)
def test_the_error_says_how_a_header_is_damaged(tmp_path, entry, problem):
    header = json.dumps({"x": entry}).encode()
    path = tmp_path / "bad.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(WeightsError, match=problem):
        read_header(path)


def test_sharded_files_are_read_through_their_index(tmp_path, tensors, flux):
    names = sorted(tensors)
    for part in range(2):
        save_file(
            {name: tensors[name] for name in names[part::2]}, tmp_path / f"model-{part}.safetensors"
        )
    index = {"weight_map": {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same_network(load_flux(tmp_path, config=CONFIG), flux)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"model-1\.safetensors, which is missing"):
        load_flux(tmp_path, config=CONFIG)
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "../../secret.safetensors"}})
    )
    with pytest.raises(WeightsError, match="outside its folder"):
        load_flux(tmp_path, config=CONFIG)


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "x.safetensors"
    write(path, {"a": np.ones(3, np.float32)})
    with pytest.raises(KeyError):
        write(path, {"a": np.ones(3, np.complex128)})
    assert load_file(path)["a"].tolist() == [1, 1, 1]
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_folder_without_defaults_is_sampled_as_its_configs_say(tmp_path):
    shutil.copytree(tiny_folder(), tmp_path / "model")
    folder = tmp_path / "model"
    (folder / "fluxjax.json").unlink()
    dev = fluxjax.checkpoint.load_defaults(folder)
    assert (dev.steps, dev.guidance, dev.max_length, dev.shift) == (28, 3.5, 512, True)
    assert (dev.base_shift, dev.max_shift) == (2.0, 2.65)
    config, scheduler = (
        folder / "transformer" / "config.json",
        folder / "scheduler" / "scheduler_config.json",
    )
    config.write_text(json.dumps(json.loads(config.read_text()) | {"guidance_embeds": False}))
    scheduler.write_text(json.dumps({"use_dynamic_shifting": False, "shift": 1.0}))
    schnell = fluxjax.checkpoint.load_defaults(folder)
    assert (schnell.steps, schnell.guidance, schnell.max_length, schnell.shift) == (
        4,
        None,
        256,
        False,
    )
    scheduler.write_text(json.dumps({"use_dynamic_shifting": False, "shift": 3.0}))
    with pytest.raises(WeightsError, match=r"static shift of 3\.0"):
        fluxjax.checkpoint.load_defaults(folder)


MEMORY = """
import ctypes, gc, pathlib, sys
import jax
import fluxjax
from fluxjax.checkpoint.safetensors import read_header

path, config = pathlib.Path(sys.argv[1]), fluxjax.FluxConfig(
    width=768, heads=6, double_depth=3, single_depth=6, mlp_width=3072, context=64, pooled=64)
largest = max(tensor.nbytes for tensor in read_header(path).tensors.values())

def status(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return 1024 * int(line.split()[1])

fluxjax.load_flux("tiny", dtype="float32")  # so that JAX's own memory is taken before
for dtype in sys.argv[2:]:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed must not be counted as memory in use
    open("/proc/self/clear_refs", "w").write("5")  # resets the peak
    before = status("VmRSS")
    flux = fluxjax.load_flux(path, config=config, dtype=dtype)
    result = sum(leaf.nbytes for leaf in jax.tree.leaves(flux))
    print((status("VmHWM") - before - result) / largest)
    del flux
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_less_than_three_of_the_largest_tensor_above_the_result(tmp_path):
    config = FluxConfig(
        width=768, heads=6, double_depth=3, single_depth=6, mlp_width=3072, context=64, pooled=64
    )
    abstract = eqx.filter_eval_shape(Flux, config, key=jax.random.key(0))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, ml_dtypes.bfloat16), abstract)
    path = tmp_path / "large.safetensors"
    write(path, export(zeros, tables.FLUX_DIFFUSERS))
    command = [sys.executable, "-c", MEMORY, str(path), "bfloat16", "float32"]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    ratios = [float(line) for line in out.stdout.split()]
    assert len(ratios) == 2
    assert max(ratios) < 3
