"""What is saved loads again: networks in every layout, and a whole model with tokenizers."""

import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from layouts import assert_same_network, cast_network, random_network
from small import CONFIG

import fluxjax
from fluxjax import WeightsError, attach, merge, quantize, save_models, unroll
from fluxjax.checkpoint.shipped import tiny_folder
from fluxjax.generate import save
from fluxjax.lora import init_lora
from fluxjax.nets.stack import leaf_names

LAYOUTS = [
    ("flux", "own", "flux"),
    ("flux", "own", "a.safetensors"),
    ("flux", "diffusers", "flux"),
    ("flux", "bfl", "flux"),
    ("flux", "comfy", "a.safetensors"),
    ("clip", "own", "clip.safetensors"),
    ("clip", "comfy", "clip"),
    ("t5", "diffusers", "t5"),
    ("vae", "bfl", "ae.safetensors"),
    ("vae", "diffusers", "vae"),
]


@pytest.fixture(scope="module")
def small() -> fluxjax.Flux:
    return random_network(fluxjax.Flux, CONFIG, scale=0.2)


@pytest.fixture(scope="module")
def shipped() -> dict:
    """The networks of the tiny model, mapped from their files."""
    loaders = (fluxjax.load_flux, fluxjax.load_clip, fluxjax.load_t5, fluxjax.load_vae)
    return {load.__name__.removeprefix("load_"): load("tiny") for load in loaders}


def moved(lora, step: float, least_axes: int):
    """Return an adapter with a number added to its leaves of at least so many axes."""
    leaves, structure = jax.tree.flatten(lora)
    arrays = [np.asarray(leaf) for leaf in leaves]
    added = [array + np.float32(step) if array.ndim >= least_axes else array for array in arrays]
    return jax.tree.unflatten(structure, [jnp.asarray(array, array.dtype) for array in added])


def assert_close(found, expected, tolerance: float) -> None:
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for name, (one, other) in zip(leaf_names(found), pairs, strict=True):
        # Sums over adapters are taken in another order: a few units in float32's last place.
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=tolerance, err_msg=name)


@pytest.mark.parametrize(("network", "to", "name"), LAYOUTS)
def test_a_network_that_is_saved_loads_the_same(shipped, tmp_path, network, to, name):
    model = shipped[network]
    assert save(model, str(tmp_path / name), to=to) == tmp_path / name
    assert_same_network(getattr(fluxjax, f"load_{network}")(tmp_path / name), model)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match="already exists"):
        save(model, tmp_path / name, to=to)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_dtype_rounds_and_one_that_can_not_hold_the_weights_leaves_nothing(small, tmp_path):
    save(small, tmp_path / "half.safetensors", dtype="bfloat16")
    half = fluxjax.load_flux(tmp_path / "half.safetensors")
    assert_same_network(half, cast_network(small, ml_dtypes.bfloat16))
    bias = jnp.asarray(np.asarray(small.img_in.bias) + np.float32(1e6))
    huge = eqx.tree_at(lambda net: net.img_in.bias, small, bias)
    for path in ("huge", "huge.safetensors"):
        with pytest.raises(WeightsError, match="which float16 can't"):
            save(huge, tmp_path / path, dtype=jnp.float16)
    for wrong in (
        "int8",
        "float64",
        "complex64",
        "no dtype",
        object,
        "float8_e4m3",
        "float8_e8m0fnu",
    ):
        with pytest.raises(
            ValueError,
            match=r"`save\(dtype\)` writes floats of 32 bits or fewer, got .*Pass float32",
        ):
            save(small, tmp_path / "x", dtype=wrong)
    assert [path.name for path in tmp_path.iterdir()] == ["half.safetensors"]


@pytest.mark.parametrize("name", ["", ".", "..", ".safetensors", "a.gguf", "a.pt"])
def test_a_path_without_a_name_or_of_another_format_is_refused(small, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"`save\(path\)` (needs a name|writes \.safetensors)"):
        save(small, name)
    assert list(tmp_path.iterdir()) == []


def test_attached_adapters_are_saved_merged(small, tmp_path):
    loras = [init_lora(small, 2, key=jax.random.key(seed)) for seed in (0, 1)]
    loras = [moved(lora, 0.1, least_axes=1) for lora in loras]
    attached = attach(attach(small, loras[:1], [0.5]), loras[1:])
    save(attached, tmp_path / "flux")
    expected = merge(small, loras, [0.5, 1.0])
    assert_close(fluxjax.load_flux(tmp_path / "flux"), expected, 1e-6)


def test_a_network_that_can_not_be_saved_as_it_is_is_refused(small, tmp_path):
    mesh = fluxjax.make_mesh(tensor=2, devices=jax.devices()[:2])
    save(small, tmp_path / "small.safetensors")
    for network, message in (
        (
            quantize(small, "int8"),
            "is stored as QuantizedWeight. Save the network that was quantized",
        ),
        (unroll(small), "unrolled. Save it before `unroll`"),
        (fluxjax.shard(small, mesh), "Save it before `shard`"),
        (fluxjax.load_flux(tmp_path / "small.safetensors", stream=True), "is stored as FileWeight"),
    ):
        with pytest.raises(WeightsError, match=message):
            save(network, tmp_path / "x")
    with pytest.raises(ValueError, match="needs a network of FLUX, got Linear"):
        save(small.img_in, tmp_path / "x")
    with pytest.raises(ValueError, match="got 'onnx'"):
        save(small, tmp_path / "x", to="onnx")
    with pytest.raises(WeightsError, match="diffusers layout is a folder"):
        save(small, tmp_path / "x.safetensors", to="diffusers")

    def save_with_bias(bias):
        save(eqx.tree_at(lambda net: net.img_in.bias, small, bias), tmp_path / "x")
        return bias

    with pytest.raises(ValueError, match="got traced ones"):
        jax.eval_shape(save_with_bias, small.img_in.bias)
    assert [path.name for path in tmp_path.iterdir()] == ["small.safetensors"]


def test_networks_in_host_memory_and_on_a_mesh_are_saved(small, tmp_path):
    save(fluxjax.offload(small), tmp_path / "host.safetensors")
    save(
        fluxjax.shard(small, fluxjax.make_mesh(fsdp=2, devices=jax.devices()[:2])),
        tmp_path / "mesh.safetensors",
    )
    for name in ("host", "mesh"):
        assert_same_network(fluxjax.load_flux(tmp_path / f"{name}.safetensors"), small)


@pytest.mark.parametrize("to", ["own", "diffusers"])
def test_a_model_that_is_saved_loads_the_same_after_its_source_is_gone(tmp_path, to):
    ignored = shutil.ignore_patterns("loras")
    shutil.copytree(tiny_folder(), tmp_path / "source", ignore=ignored)
    models = fluxjax.load_models(str(tmp_path / "source"), dtype="float32")
    shutil.rmtree(tmp_path / "source")
    changed = jnp.asarray(np.asarray(models.flux.img_in.bias) * np.float32(1.01))
    flux = eqx.tree_at(lambda net: net.img_in.bias, models.flux, changed)
    tuned = models._replace(flux=flux)
    assert save_models(tuned, str(tmp_path / "tuned"), to=to) == tmp_path / "tuned"
    again = fluxjax.load_models(str(tmp_path / "tuned"))
    for name in ("flux", "clip", "t5", "vae"):
        assert_same_network(getattr(again, name), getattr(tuned, name))
    assert again.defaults == tuned.defaults
    for folder in ("tokenizer", "tokenizer_2"):
        for path in (tiny_folder() / folder).iterdir():
            assert (tmp_path / "tuned" / folder / path.name).read_bytes() == path.read_bytes()
    prompt = "a red star, ünïcode ⭐"
    found = fluxjax.tokenize(again.tokenizers, prompt)
    expected = fluxjax.tokenize(tuned.tokenizers, prompt)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(FileExistsError):
        save_models(tuned, tmp_path / "tuned", to=to)


def test_a_model_goes_to_a_folder_with_tokenizers(tiny, tmp_path):
    with pytest.raises(ValueError, match="writes a folder"):
        save_models(tiny, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"takes one of own, diffusers, got 'bfl'"):
        save_models(tiny, tmp_path / "x", to="bfl")
    made = fluxjax.generate.Tokenizers(tiny.tokenizers.clip, tiny.tokenizers.t5)
    with pytest.raises(WeightsError, match="not read from files"):
        save_models(tiny._replace(tokenizers=made), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_an_attached_adapter_is_rounded_once_to_the_dtype_that_is_written(small, tmp_path):
    base = cast_network(small, ml_dtypes.bfloat16)
    lora = init_lora(small, 1, [r"double\.0\.img\.out"], key=jax.random.key(0))
    lora = moved(lora, 0.01, least_axes=2)
    expected = merge(cast_network(base, np.float32), [lora])
    attached = attach(base, [lora])
    found = fluxjax.load_flux(save(attached, tmp_path / "a.safetensors", dtype="float32"))
    assert_close(found, expected, 1e-7)


@pytest.mark.parametrize("dtype", ["nonsense", "int8", "float4_e2m1fn", "float8_e8m0fnu"])
def test_a_dtype_that_is_not_written_is_one_clear_error(small, tmp_path, dtype):
    lora = init_lora(small, 1, [r"double\.0\.img\.out"], key=jax.random.key(0))
    calls = {
        "save": lambda: save(small, tmp_path / "a", dtype=dtype),
        "write_lora": lambda: fluxjax.write_lora(tmp_path / "a", lora, dtype=dtype),
        "convert_weights": lambda: fluxjax.convert_weights("tiny", tmp_path / "a", dtype=dtype),
    }
    for call, run in calls.items():
        message = rf"`{call}\(dtype\)` writes floats of 32 bits or fewer, got '?{dtype}"
        with pytest.raises(ValueError, match=message):
            run()
    assert not list(tmp_path.iterdir())
