"""What is saved loads again: single networks in every layout, and a whole model with its tokenizers."""

import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import small_flux

import fluxjax
from fluxjax import WeightsError, attach, init_lora, merge, quantize, save_models, unroll
from fluxjax.checkpoint.shipped import tiny_folder
from fluxjax.generate import save
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
    return small_flux()


@pytest.mark.parametrize(("network", "to", "name"), LAYOUTS)
def test_a_network_that_is_saved_loads_the_same(tiny, tmp_path, network, to, name):
    model = getattr(tiny, network)
    assert save(model, str(tmp_path / name), to=to) == tmp_path / name
    assert eqx.tree_equal(getattr(fluxjax, f"load_{network}")(tmp_path / name), model)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match="already exists"):
        save(model, tmp_path / name, to=to)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_dtype_rounds_and_one_that_can_not_hold_the_weights_leaves_nothing(small, tmp_path):
    save(small, tmp_path / "half.safetensors", dtype="bfloat16")
    half = fluxjax.load_flux(tmp_path / "half.safetensors")
    assert eqx.tree_equal(half, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), small))
    huge = eqx.tree_at(lambda net: net.img_in.bias, small, small.img_in.bias + 1e6)
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


@pytest.mark.parametrize("name", ["", ".", "..", ".safetensors", "a.gguf"])
def test_a_path_without_a_name_or_of_another_format_is_refused(small, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"`save\(path\)` (needs a name|writes \.safetensors)"):
        save(small, name)
    assert list(tmp_path.iterdir()) == []


def test_attached_adapters_are_saved_merged(small, tmp_path):
    loras = [init_lora(small, 2, key=jax.random.key(seed)) for seed in (0, 1)]
    loras = [jax.tree.map(lambda leaf: leaf + 0.1 if leaf.ndim else leaf, lora) for lora in loras]
    attached = attach(attach(small, loras[:1], [0.5]), loras[1:])
    save(attached, tmp_path / "flux")
    wanted = merge(small, loras, [0.5, 1.0])
    found = fluxjax.load_flux(tmp_path / "flux")
    for name, ours, theirs in zip(
        leaf_names(found), jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6, err_msg=name)


def test_what_can_not_be_saved_as_it_is_is_told(small, tmp_path):
    mesh = fluxjax.make_mesh(tensor=2, devices=jax.devices()[:2])
    save(small, tmp_path / "small.safetensors")
    for network, told in (
        (quantize(small, "int8"), "is stored as Quantized. Save the network that was quantized"),
        (unroll(small), "unrolled. Save it before `unroll`"),
        (fluxjax.shard(small, mesh), "Save it before `shard`"),
        (fluxjax.load_flux(tmp_path / "small.safetensors", stream=True), "is stored as Filed"),
    ):
        with pytest.raises(WeightsError, match=told):
            save(network, tmp_path / "x")
    with pytest.raises(ValueError, match="needs a Flux, Clip, T5 or Vae, got Linear"):
        save(small.img_in, tmp_path / "x")
    with pytest.raises(ValueError, match="no layout 'onnx'"):
        save(small, tmp_path / "x", to="onnx")
    with pytest.raises(WeightsError, match="diffusers layout is a folder"):
        save(small, tmp_path / "x.safetensors", to="diffusers")
    with pytest.raises(ValueError, match="got traced ones"):
        jax.jit(
            lambda bias: (
                save(eqx.tree_at(lambda net: net.img_in.bias, small, bias), tmp_path / "x") and bias
            )
        )(small.img_in.bias)
    assert [path.name for path in tmp_path.iterdir()] == ["small.safetensors"]


def test_networks_in_host_memory_and_on_a_mesh_are_saved(small, tmp_path):
    save(fluxjax.offload(small), tmp_path / "host.safetensors")
    save(
        fluxjax.shard(small, fluxjax.make_mesh(fsdp=2, devices=jax.devices()[:2])),
        tmp_path / "mesh.safetensors",
    )
    for name in ("host", "mesh"):
        assert eqx.tree_equal(fluxjax.load_flux(tmp_path / f"{name}.safetensors"), small)


@pytest.mark.parametrize("to", ["own", "diffusers"])
def test_a_model_that_is_saved_draws_the_same_after_its_source_is_gone(tmp_path, to):
    shutil.copytree(tiny_folder(), tmp_path / "source", ignore=shutil.ignore_patterns("loras"))
    models = fluxjax.load_models(str(tmp_path / "source"), dtype="float32")
    shutil.rmtree(tmp_path / "source")
    tuned = models._replace(flux=jax.tree.map(lambda leaf: leaf * 1.01, models.flux))
    assert save_models(tuned, str(tmp_path / "tuned"), to=to) == tmp_path / "tuned"
    again = fluxjax.load_models(str(tmp_path / "tuned"))
    for name in ("flux", "clip", "t5", "vae"):
        assert eqx.tree_equal(getattr(again, name), getattr(tuned, name)), name
    assert again.defaults == tuned.defaults
    for folder in ("tokenizer", "tokenizer_2"):
        for path in (tiny_folder() / folder).iterdir():
            assert (tmp_path / "tuned" / folder / path.name).read_bytes() == path.read_bytes()
    prompt = "a red star, ünïcode ⭐"
    for ours, theirs in zip(
        fluxjax.tokenize(again.tokenizers, prompt),
        fluxjax.tokenize(tuned.tokenizers, prompt),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)
    if to == "own":
        images = [
            fluxjax.text_to_image(m, prompt, key=jax.random.key(0), steps=1, height=32, width=32)
            for m in (tuned, again)
        ]
        np.testing.assert_array_equal(*images)
    with pytest.raises(FileExistsError):
        save_models(tuned, tmp_path / "tuned", to=to)


def test_a_model_goes_to_a_folder_with_tokenizers(tiny, tmp_path):
    with pytest.raises(ValueError, match="writes a folder"):
        save_models(tiny, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"no layout 'bfl' here\. Choose one of own, diffusers"):
        save_models(tiny, tmp_path / "x", to="bfl")
    made = fluxjax.generate.Tokenizers(tiny.tokenizers.clip, tiny.tokenizers.t5)
    with pytest.raises(WeightsError, match="not read from files"):
        save_models(tiny._replace(tokenizers=made), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_an_attached_adapter_is_rounded_once_to_the_dtype_that_is_written(small, tmp_path):
    base = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), small)
    lora = init_lora(small, 1, [r"double\.0\.img\.out"], key=jax.random.key(0))
    lora = jax.tree.map(lambda leaf: leaf + 0.01 if leaf.ndim == 2 else leaf, lora)
    expected = merge(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), base), [lora])
    found = fluxjax.load_flux(
        save(attach(base, [lora]), tmp_path / "a.safetensors", dtype="float32")
    )
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["", "..", ".safetensors", "a.pt", "a.gguf"])
def test_a_destination_without_a_name_or_of_another_kind_is_refused(small, tmp_path, name):
    with pytest.raises(ValueError, match=r"`save\(path\)` (needs a name|writes .safetensors)"):
        save(small, name if name in ("", "..") else tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["nonsense", "int8", "float4_e2m1fn", "float8_e8m0fnu"])
def test_a_dtype_that_is_not_written_is_one_clear_error(small, tmp_path, dtype):
    lora = init_lora(small, 1, [r"double\.0\.img\.out"], key=jax.random.key(0))
    calls = {
        "save": lambda: save(small, tmp_path / "a", dtype=dtype),
        "write_lora": lambda: fluxjax.write_lora(tmp_path / "a", lora, dtype=dtype),
        "convert_weights": lambda: fluxjax.convert_weights("tiny", tmp_path / "a", dtype=dtype),
    }
    for call, run in calls.items():
        with pytest.raises(
            ValueError, match=rf"`{call}\(dtype\)` writes floats of 32 bits or fewer, got '?{dtype}"
        ):
            run()
    assert not list(tmp_path.iterdir())
