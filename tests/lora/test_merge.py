"""Adapters of every format merged into a transformer: the difference of each against NumPy."""

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from adapters import (
    FORMATS,
    KOHYA,
    PEFT,
    Draw,
    Sample,
    assert_close,
    bfl_names,
    changed_weights,
    diffusers,
    kohya,
    pair,
    random_clip,
    random_flux,
    random_t5,
    same_leaves,
    saved,
    weights,
)
from jax.sharding import NamedSharding, PartitionSpec
from layouts import cast_network

from fluxjax import Flux, WeightsError, merge, read_lora
from fluxjax.lora import unmerge

# float32 against float64: the sums are of a few terms, so a few units in the last place.
EXACT = 1e-6


@pytest.fixture(scope="module")
def flux() -> Flux:
    return random_flux()


@pytest.fixture(scope="module")
def half(flux) -> Flux:
    return cast_network(flux, jnp.bfloat16)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("scale", [1.0, -0.7])
def test_each_format_adds_what_its_formula_says(flux, tmp_path, name, scale):
    sample = FORMATS[name]()
    lora = read_lora(saved(sample, tmp_path / "x.safetensors"))
    merged = weights(merge(flux, [lora], [scale]))
    assert_close(merged, changed_weights(flux, sample, scale), EXACT)


@pytest.mark.parametrize(
    "dtype", [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn], ids=str
)
def test_files_of_narrow_dtypes_are_read_at_their_exact_values(flux, tmp_path, dtype):
    sample = bfl_names("diffusion_model.")
    sample.tensors = {name: tensor.astype(dtype) for name, tensor in sample.tensors.items()}
    stem = "diffusion_model.double_blocks.0.img_attn.proj"
    down, up = (sample.tensors[f"{stem}.{end}"].astype(np.float64) for end in PEFT)
    merged = merge(flux, [read_lora(saved(sample, tmp_path / "x.safetensors"))])
    expected = weights(flux)["double.img.out.weight"][0] + up @ down
    found = merged.double.img.out.weight.value[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_control_adapter_widens_the_input_and_the_config(flux, tmp_path):
    sample = Sample()
    delta = pair(sample, Draw(9), "img_in", PEFT, (32, 128), 4)
    lora = read_lora(saved(sample, tmp_path / "control.safetensors"))
    narrow = read_lora(saved(diffusers(), tmp_path / "narrow.safetensors"))
    wide = merge(flux, [lora, narrow], [1.0, 0.0])
    assert (wide.config.in_channels, wide.config.out_channels) == (128, 64)
    expected = delta.copy()
    expected[:, :64] += weights(flux)["img_in.weight"]
    np.testing.assert_allclose(wide.img_in.weight.value, expected, rtol=1e-5, atol=1e-6)
    # The input stays wide, with zeros: a network of this width that was never widened looks the
    # same.
    back = np.asarray(unmerge(wide, [lora]).img_in.weight.value)
    np.testing.assert_allclose(back[:, :64], flux.img_in.weight.value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(back[:, 64:], 0, atol=1e-6)


@pytest.mark.parametrize(
    ("clip_prefix", "t5_prefix", "flat", "ends"),
    [
        ("lora_te1_text_model_", "lora_te3_", True, KOHYA),
        ("text_encoder.text_model.", "text_encoder_2.", False, PEFT),
    ],
    ids=["kohya", "peft"],
)
def test_the_text_encoders_are_adapted_too(tmp_path, clip_prefix, t5_prefix, flat, ends):
    sample, draw = Sample(), Draw(10)

    def delta(prefix: str, module: str, shape: tuple[int, int]) -> np.ndarray:
        name = prefix + (module.replace(".", "_") if flat else module)
        return pair(sample, draw, name, ends, shape, 2)

    query = delta(clip_prefix, "encoder.layers.1.self_attn.q_proj", (32, 32))
    up = delta(t5_prefix, "encoder.block.0.layer.1.DenseReluDense.wi_1", (48, 32))
    lora = read_lora(saved(sample, tmp_path / "x.safetensors"))
    clip, t5 = random_clip(), random_t5()
    expected = weights(clip)
    expected["blocks.q.weight"][1] += query
    assert_close(weights(merge(clip, [lora])), expected, EXACT)
    expected = weights(t5)
    expected["blocks.up.weight"][0] += up
    assert_close(weights(merge(t5, [lora])), expected, EXACT)


NOT_ADDITIVE = ("dora", "control")


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in NOT_ADDITIVE])
def test_unmerge_undoes_merge(flux, tmp_path, name):
    lora = read_lora(saved(FORMATS[name](), tmp_path / "x.safetensors"))
    back = unmerge(merge(flux, [lora], [0.6]), [lora], [0.6])
    assert_close(weights(back), weights(flux), EXACT)


@pytest.mark.parametrize("name", NOT_ADDITIVE)
def test_adapters_that_can_not_be_subtracted_are_refused(flux, tmp_path, name):
    lora = read_lora(saved(FORMATS[name](), tmp_path / "x.safetensors"))
    with pytest.raises(WeightsError, match="can't be subtracted"):
        unmerge(flux, [lora])


# One format for each kind of term; the other formats differ only in how they name the terms.
KINDS_OF_TERMS = ("kohya", "control", "lokr", "loha", "dora")


@pytest.mark.parametrize("name", FORMATS)
def test_scale_0_is_the_base_bit_by_bit(flux, half, tmp_path, name):
    lora = read_lora(saved(FORMATS[name](), tmp_path / "x.safetensors"))
    assert same_leaves(merge(flux, [lora], [0.0]), flux)
    if name in KINDS_OF_TERMS:
        assert same_leaves(merge(half, [lora], [0.0]), half)


def test_adapters_add_up_in_any_order_and_are_rounded_once(flux, half, tmp_path):
    a = read_lora(saved(kohya(), tmp_path / "a.safetensors"))
    b = read_lora(saved(diffusers(), tmp_path / "b.safetensors"))

    def expected(model) -> dict[str, np.ndarray]:
        total = weights(model)
        for sample, scale in ((kohya(), 0.5), (diffusers(), -2.0)):
            for leaf, index, delta in sample.expected:
                total[leaf][index] += scale * delta(None)
        return total

    assert_close(weights(merge(flux, [a, b], [0.5, -2.0])), expected(flux), EXACT)
    assert_close(weights(merge(flux, [b, a], [-2.0, 0.5])), expected(flux), EXACT)
    # In bfloat16 the error is that of one rounding, 2^-9, and not that of two.
    assert_close(weights(merge(half, [a, b], [0.5, -2.0])), expected(half), 2**-8)


def test_scales_may_differ_by_network_and_by_block(flux, tmp_path):
    sample = kohya()
    lora = read_lora(saved(sample, tmp_path / "x.safetensors"))
    merged = merge(flux, [lora], [{"": 1.0, "double": 0.5, "double.1": 0.0}])
    expected = weights(flux)
    for leaf, index, delta in sample.expected:
        scale = 0.5 if leaf.startswith("double") else 1.0
        if leaf.startswith("double") and index == (1,):
            scale = 0.0
        expected[leaf][index] += scale * delta(None)
    assert_close(weights(merged), expected, EXACT)


def test_a_scale_for_no_weight_is_an_error(flux, tmp_path):
    lora = read_lora(saved(kohya(), tmp_path / "x.safetensors"))
    with pytest.raises(ValueError, match="No weight of this Flux begins with 'doubel'"):
        merge(flux, [lora], [{"": 1.0, "doubel": 0.5}])


def test_merging_needs_only_shapes_and_donates_if_it_may(flux, tmp_path):
    sample = bfl_names("diffusion_model.")
    lora = read_lora(saved(sample, tmp_path / "x.safetensors"))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), flux)
    assert eqx.tree_equal(eqx.filter_eval_shape(merge, abstract, [lora]), abstract)
    copy = jax.tree.map(lambda leaf: jnp.asarray(np.array(leaf), leaf.dtype), flux)
    merge(copy, [lora], donate=True)
    assert copy.double.img.out.weight.value.is_deleted()
    assert not flux.double.img.out.weight.value.is_deleted()


def test_every_key_is_used_or_listed(flux, tmp_path):
    sample, unknown = kohya(), "lora_unet_double_blocks_0_img_attn_typo.lora_down.weight"
    sample.tensors[unknown] = np.zeros((2, 32), np.float32)
    path = saved(sample, tmp_path / "x.safetensors")
    message = r"1 keys that fluxjax has no place for: lora_unet_double_blocks_0_img_attn_typo"
    with pytest.raises(WeightsError, match=message):
        read_lora(path)
    lora, unused = read_lora(path, strict=False)
    assert unused == [unknown]
    assert_close(weights(merge(flux, [lora])), changed_weights(flux, kohya(), 1.0), EXACT)


def test_an_adapter_that_does_not_fit_lists_what_does_not(flux, tmp_path):
    sample, draw = Sample(), Draw()
    pair(sample, draw, "lora_unet_double_blocks_7_img_attn_qkv", KOHYA, (96, 32), 4)
    pair(sample, draw, "lora_unet_double_blocks_0_img_attn_proj", KOHYA, (48, 32), 4)
    lora = read_lora(saved(sample, tmp_path / "x.safetensors"))
    message = (
        r"double\.7\.img\.qkv\.weight is not in it; "
        r".* is \[32, 32\], the adapter's \[48, 32\]"
    )
    with pytest.raises(WeightsError, match=message):
        merge(flux, [lora])


def test_sharded_weights_merge_to_the_same_and_stay_sharded(flux, tmp_path):
    # Weights of a stack and single ones, of which two and three axes are split.
    sample = bfl_names("")
    lora = read_lora(saved(sample, tmp_path / "x.safetensors"))
    mesh = jax.make_mesh((2,), ("fsdp",))

    def sharding(leaf) -> NamedSharding:
        # The last axis that two devices can share.
        even = [axis for axis, length in enumerate(leaf.shape) if length % 2 == 0]
        last = max(even, default=None)
        axes = ("fsdp" if axis == last else None for axis in range(leaf.ndim))
        return NamedSharding(mesh, PartitionSpec(*axes))

    shardings = jax.tree.map(sharding, flux)
    merged = merge(jax.device_put(flux, shardings), [lora], [0.5], donate=True)
    assert jax.tree.all(
        jax.tree.map(
            lambda leaf, kept: leaf.sharding.is_equivalent_to(kept, leaf.ndim), merged, shardings
        )
    )
    assert_close(weights(merged), changed_weights(flux, sample, 0.5), EXACT)
