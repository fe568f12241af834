"""Adapters: each format's deltas against dense NumPy, the laws of merging, and no key ever dropped in silence."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from adapters import KOHYA, PEFT, Draw, Sample, pair
from jax.sharding import NamedSharding, PartitionSpec
from layouts import write
from PIL import Image
from safetensors.numpy import load_file

from fluxjax import (
    T5,
    Clip,
    ClipConfig,
    Flux,
    FluxConfig,
    T5Config,
    WeightsError,
    attach,
    convert_weights,
    image_ids,
    init_lora,
    load_clip,
    load_flux,
    load_t5,
    merge,
    read_image,
    read_lora,
    unmerge,
    write_lora,
)
from fluxjax.checkpoint import names as tables
from fluxjax.checkpoint.fused import fused_parts
from fluxjax.checkpoint.weights import abstract, parameters_of
from fluxjax.cli.main import main as cli
from fluxjax.lora import merge_while_converting, trainable
from fluxjax.lora.merge import changes_of
from fluxjax.lora.terms import HadamardTerm, KronTerm
from fluxjax.lora.write import _nearest
from fluxjax.nets.stack import leaf_names
from fluxjax.nets.weight import Dense, Weight
from fluxjax.train.step import TrainState, make_step

CONFIG = FluxConfig(
    width=32, heads=2, double_depth=2, single_depth=3, mlp_width=128, context=24, pooled=8, in_channels=64, out_channels=64,
    rope_axes=(4, 6, 6), time_width=16,
)  # fmt: skip
WIDTH, HIDDEN = 32, 128


def weights(model) -> dict[str, np.ndarray]:
    """Return a network's leaves by name, in float64."""
    return {
        name: np.asarray(leaf, np.float64)
        for name, leaf in zip(leaf_names(model), jax.tree.leaves(model), strict=True)
    }


@pytest.fixture(scope="module")
def flux():
    leaves, structure = jax.tree.flatten(Flux(CONFIG, key=jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(
        structure, [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )


def kohya() -> Sample:
    s, draw = Sample(), Draw()
    s.expect(
        "double.img.qkv.weight",
        (1,),
        pair(s, draw, "lora_unet_double_blocks_1_img_attn_qkv", KOHYA, (96, 32), 4, 2.0),
    )
    s.expect(
        "double.txt.mlp.down.weight",
        (0,),
        pair(s, draw, "lora_unet_double_blocks_0_txt_mlp_2", KOHYA, (32, 128), 2, 8.0),
    )
    s.expect(
        "single.linear1.weight",
        (2,),
        pair(s, draw, "lora_unet_single_blocks_2_linear1", KOHYA, (224, 32), 3, 1.0),
    )
    s.expect(
        "single.modulation.weight",
        (0,),
        pair(s, draw, "lora_unet_single_blocks_0_modulation_lin", KOHYA, (96, 32), 3),
    )
    s.expect("img_in.weight", (), pair(s, draw, "lora_unet_img_in", KOHYA, (32, 64), 2, 1.0))
    s.expect(
        "time_in.up.weight", (), pair(s, draw, "lora_unet_time_in_in_layer", KOHYA, (32, 16), 2)
    )
    s.expect(
        "final.linear.weight",
        (),
        pair(s, draw, "lora_unet_final_layer_linear", KOHYA, (64, 32), 5, 2.5),
    )
    final = "lora_unet_final_layer_adaLN_modulation_1"
    s.expect("final.modulation.weight", (), pair(s, draw, final, KOHYA, (64, 32), 2, 3.0))
    return s


def diffusers(prefix: str = "transformer.", flat: bool = False, ends=PEFT, alpha=None) -> Sample:
    s, draw = Sample(), Draw(1)

    def name(module: str) -> str:
        return prefix + (module.replace(".", "_") if flat else module)

    q, k, v, mlp = (
        (slice(i * WIDTH, (i + 1) * WIDTH) for i in range(3)),
        None,
        None,
        slice(3 * WIDTH, 3 * WIDTH + HIDDEN),
    )
    first, second, third = q
    del k, v
    for rows, part, rank in ((first, "to_q", 2), (third, "to_v", 5)):
        delta = pair(
            s, draw, name(f"transformer_blocks.1.attn.{part}"), ends, (32, 32), rank, alpha
        )
        s.expect("double.img.qkv.weight", (1, rows), delta)
    delta = pair(s, draw, name("transformer_blocks.0.attn.add_k_proj"), ends, (32, 32), 3, alpha)
    s.expect("double.txt.qkv.weight", (0, second), delta)
    delta = pair(s, draw, name("transformer_blocks.0.ff.net.0.proj"), ends, (128, 32), 3, alpha)
    s.expect("double.img.mlp.up.weight", (0,), delta)
    for rows, part in ((second, "attn.to_k"), (mlp, "proj_mlp")):
        shape = (rows.stop - rows.start, 32)
        s.expect(
            "single.linear1.weight",
            (2, rows),
            pair(s, draw, name(f"single_transformer_blocks.2.{part}"), ends, shape, 4, alpha),
        )
    delta = pair(s, draw, name("single_transformer_blocks.0.proj_out"), ends, (32, 160), 4, alpha)
    s.expect("single.linear2.weight", (0,), delta)
    # diffusers' last modulation is (scale, shift), ours (shift, scale).
    delta = pair(s, draw, name("norm_out.linear"), ends, (64, 32), 3, alpha)
    s.expect("final.modulation.weight", (), np.concatenate([delta[32:], delta[:32]]))
    s.expect("img_in.weight", (), pair(s, draw, name("x_embedder"), ends, (32, 64), 2, alpha))
    return s


def peft_metadata() -> Sample:
    s, draw = Sample(), Draw(2)
    settings = {
        "transformer.r": 4,
        "transformer.lora_alpha": 8,
        "transformer.alpha_pattern": {"proj_out": 2},
        "transformer.use_rslora": True,
    }
    s.metadata["lora_adapter_metadata"] = json.dumps(settings)
    delta = pair(s, draw, "transformer.transformer_blocks.0.attn.to_out.0", PEFT, (32, 32), 4)
    s.expect("double.img.out.weight", (0,), delta * 8 / 4**0.5)
    delta = pair(s, draw, "transformer.single_transformer_blocks.1.proj_out", PEFT, (32, 160), 4)
    s.expect("single.linear2.weight", (1,), delta * 2 / 4**0.5)
    return s


def bfl_names(prefix: str, ends=PEFT, alpha=None) -> Sample:
    s, draw = Sample(), Draw(3)
    s.expect(
        "double.txt.qkv.weight",
        (1,),
        pair(s, draw, f"{prefix}double_blocks.1.txt_attn.qkv", ends, (96, 32), 4, alpha),
    )
    s.expect(
        "double.img.out.weight",
        (0,),
        pair(s, draw, f"{prefix}double_blocks.0.img_attn.proj", ends, (32, 32), 2, alpha),
    )
    s.expect(
        "single.linear1.weight",
        (1,),
        pair(s, draw, f"{prefix}single_blocks.1.linear1", ends, (224, 32), 2, alpha),
    )
    s.expect(
        "guidance_in.down.weight",
        (),
        pair(s, draw, f"{prefix}guidance_in.out_layer", ends, (32, 32), 2, alpha),
    )
    return s


def control() -> Sample:
    s = bfl_names("")
    draw = Draw(4)
    bias, scale = draw(32), draw(16)
    s.tensors["double_blocks.0.img_attn.proj.lora_B.bias"] = bias
    s.expect("double.img.out.bias", (0,), bias.astype(np.float64))
    s.tensors["single_blocks.2.norm.query_norm.scale"] = scale
    s.values.append(("single.query_norm.scale", (2,), scale.astype(np.float64)))
    return s


def xlabs() -> Sample:
    s, draw, ends = Sample(), Draw(5), ("down.weight", "up.weight")
    s.expect(
        "double.img.qkv.weight",
        (0,),
        pair(s, draw, "double_blocks.0.processor.qkv_lora1", ends, (96, 32), 4),
    )
    s.expect(
        "double.txt.qkv.weight",
        (0,),
        pair(s, draw, "double_blocks.0.processor.qkv_lora2", ends, (96, 32), 4),
    )
    s.expect(
        "double.txt.out.weight",
        (1,),
        pair(s, draw, "double_blocks.1.processor.proj_lora2", ends, (32, 32), 4),
    )
    s.expect(
        "single.linear1.weight",
        (2, slice(0, 96)),
        pair(s, draw, "single_blocks.2.processor.qkv_lora", ends, (96, 32), 4),
    )
    s.expect(
        "single.linear2.weight",
        (2,),
        pair(s, draw, "single_blocks.2.processor.proj_lora", ends, (32, 160), 4),
    )
    return s


def lokr() -> Sample:
    s, draw = Sample(), Draw(6)
    w1, w2 = draw(4, 4), draw(24, 8)
    module = "lycoris_double_blocks_0_img_attn_qkv"
    s.tensors |= {
        f"{module}.lokr_w1": w1,
        f"{module}.lokr_w2": w2,
        f"{module}.alpha": np.float32(1e9).reshape(()),
    }
    s.expect(
        "double.img.qkv.weight", (0,), np.kron(w1.astype(np.float64), w2)
    )  # alpha counts for decomposed factors alone
    a, b = draw(8, 3), draw(3, 4)
    module = "lora_unet_single_blocks_1_linear2"
    w1 = draw(4, 40)
    s.tensors |= {f"{module}.lokr_w1": w1, f"{module}.lokr_w2_a": a, f"{module}.lokr_w2_b": b}
    s.tensors[f"{module}.alpha"] = np.float32(6).reshape(())
    s.expect(
        "single.linear2.weight",
        (1,),
        6 / 3 * np.kron(w1.astype(np.float64), a.astype(np.float64) @ b),
    )
    a, b, w2 = draw(4, 2), draw(2, 4), draw(8, 8)
    module = "lycoris_double_blocks_1_txt_attn_proj"
    s.tensors |= {f"{module}.lokr_w1_a": a, f"{module}.lokr_w1_b": b, f"{module}.lokr_w2": w2}
    s.expect("double.txt.out.weight", (1,), np.kron(a.astype(np.float64) @ b, w2))
    return s


def loha() -> Sample:
    s, draw = Sample(), Draw(7)
    module = "lycoris_transformer_blocks_0_attn_to_k"
    a1, b1, a2, b2 = draw(32, 3), draw(3, 32), draw(32, 3), draw(3, 32)
    s.tensors |= {
        f"{module}.hada_{name}": x
        for name, x in {"w1_a": a1, "w1_b": b1, "w2_a": a2, "w2_b": b2}.items()
    }
    s.tensors[f"{module}.alpha"] = np.float32(1.5).reshape(())
    delta = 1.5 / 3 * (a1.astype(np.float64) @ b1) * (a2.astype(np.float64) @ b2)
    s.expect("double.img.qkv.weight", (0, slice(32, 64)), delta)
    return s


def dora_difference(base, delta, magnitude, axis):
    changed = base + delta
    return magnitude * changed / np.linalg.norm(changed, axis=axis, keepdims=True) - base


def dora() -> Sample:
    s, draw = Sample(), Draw(8)
    module = "lora_unet_single_blocks_0_linear1"
    delta, rows = pair(s, draw, module, KOHYA, (224, 32), 4, 2.0), np.abs(draw(224, 1))
    s.tensors[f"{module}.dora_scale"] = rows
    s.expect("single.linear1.weight", (0,), lambda base: dora_difference(base, delta, rows, 1))
    module = "lora_unet_double_blocks_1_txt_mlp_0"
    other, columns = pair(s, draw, module, KOHYA, (128, 32), 4), np.abs(draw(1, 32))
    s.tensors[f"{module}.dora_scale"] = columns
    s.expect(
        "double.txt.mlp.up.weight", (1,), lambda base: dora_difference(base, other, columns, 0)
    )
    module = "transformer.norm_out.linear"
    last, magnitude = pair(s, draw, module, PEFT, (64, 32), 4), np.abs(draw(64))
    s.tensors[f"{module}.lora_magnitude_vector"] = magnitude

    def swapped(base):
        theirs = dora_difference(np.roll(base, 32, 0), last, magnitude[:, None], 1)
        return np.roll(theirs, 32, 0)

    s.expect("final.modulation.weight", (), swapped)
    return s


FORMATS: dict[str, Callable[[], Sample]] = {
    "kohya": kohya,
    "peft": diffusers,
    "peft, alpha tensors": lambda: diffusers(alpha=3.0),
    "peft, metadata": peft_metadata,
    "onetrainer": lambda: diffusers("lora_transformer_", flat=True, ends=KOHYA, alpha=2.0),
    "comfy": lambda: bfl_names("diffusion_model.", KOHYA, 2.0),
    "comfy, A and B": lambda: bfl_names("diffusion_model."),
    "fal": lambda: bfl_names("base_model.model."),
    "control": control,
    "xlabs": xlabs,
    "lokr": lokr,
    "loha": loha,
    "dora": dora,
}


def saved(sample: Sample, path: Path) -> Path:
    write(path, sample.tensors, sample.metadata)
    return path


def expected(model, sample: Sample, scale: float) -> dict[str, np.ndarray]:
    base = weights(model)
    out = {name: value.copy() for name, value in base.items()}
    for leaf, index, delta in sample.expected:
        out[leaf][index] += scale * delta(base[leaf][index])
    for leaf, index, value in sample.values if scale else ():
        out[leaf][index] = value
    return out


def assert_close(model, wanted: dict[str, np.ndarray], bound: float) -> None:
    for name, value in weights(model).items():
        error = np.linalg.norm(value - wanted[name]) / (np.linalg.norm(wanted[name]) or 1)
        assert error <= bound, (name, error)


# float32 against float64: the sums are of a few terms, so a few units in the last place.
EXACT = 1e-6


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("scale", [1.0, -0.7])
def test_each_format_adds_what_its_formula_says(flux, tmp_path, name, scale):
    sample = FORMATS[name]()
    lora = read_lora(saved(sample, tmp_path / "x.safetensors"))
    assert_close(merge(flux, [lora], [scale]), expected(flux, sample, scale), EXACT)


@pytest.mark.parametrize(
    "dtype", [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn], ids=str
)
def test_narrow_files_are_taken_at_their_values(flux, tmp_path, dtype):
    sample = bfl_names("diffusion_model.")
    sample.tensors = {name: tensor.astype(dtype) for name, tensor in sample.tensors.items()}
    down, up = (
        sample.tensors[f"diffusion_model.double_blocks.0.img_attn.proj.{end}"].astype(np.float64)
        for end in PEFT
    )
    merged = merge(flux, [read_lora(saved(sample, tmp_path / "x.safetensors"))])
    wanted = weights(flux)["double.img.out.weight"][0] + up @ down
    np.testing.assert_allclose(merged.double.img.out.weight.value[0], wanted, rtol=1e-5, atol=1e-5)


def test_control_widens_the_input_and_the_config(flux, tmp_path):
    sample = Sample()
    delta = pair(sample, Draw(9), "img_in", PEFT, (32, 128), 4)
    lora = read_lora(saved(sample, tmp_path / "control.safetensors"))
    narrow = read_lora(saved(diffusers(), tmp_path / "narrow.safetensors"))
    wide = merge(flux, [lora, narrow], [1.0, 0.0])
    assert (wide.config.in_channels, wide.config.out_channels) == (128, 64)
    wanted = delta.copy()
    wanted[:, :64] += weights(flux)["img_in.weight"]
    np.testing.assert_allclose(wide.img_in.weight.value, wanted, rtol=1e-5, atol=1e-6)
    # The input stays wide, with zeros: a network of this width that was never widened looks the same.
    back = unmerge(wide, [lora])
    np.testing.assert_allclose(
        back.img_in.weight.value[:, :64], flux.img_in.weight.value, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(back.img_in.weight.value[:, 64:], 0, atol=1e-6)


def test_the_encoders_are_adapted_too(tmp_path):
    clip = Clip(
        ClipConfig(vocabulary=30, width=32, heads=2, depth=2, mlp_width=64), key=jax.random.key(0)
    )
    t5 = T5(
        T5Config(vocabulary=30, width=32, heads=2, head_dim=16, depth=2, mlp_width=48),
        key=jax.random.key(1),
    )
    for clip_prefix, t5_prefix, flat, ends in (
        ("lora_te1_text_model_", "lora_te3_", True, KOHYA),
        ("text_encoder.text_model.", "text_encoder_2.", False, PEFT),
    ):
        sample, draw = Sample(), Draw(10)

        def name(module: str, flat: bool = flat) -> str:
            return module.replace(".", "_") if flat else module

        first = pair(
            sample, draw, clip_prefix + name("encoder.layers.1.self_attn.q_proj"), ends, (32, 32), 2
        )
        second = pair(
            sample,
            draw,
            t5_prefix + name("encoder.block.0.layer.1.DenseReluDense.wi_1"),
            ends,
            (48, 32),
            2,
        )
        lora = read_lora(saved(sample, tmp_path / "x.safetensors"))
        wanted = weights(clip)
        wanted["blocks.q.weight"][1] += first
        assert_close(merge(clip, [lora]), wanted, EXACT)
        wanted = weights(t5)
        wanted["blocks.up.weight"][0] += second
        assert_close(merge(t5, [lora]), wanted, EXACT)


ADDITIVE = [name for name in FORMATS if name not in ("dora", "control")]


@pytest.mark.parametrize("name", ADDITIVE)
def test_what_is_merged_can_be_taken_out_again(flux, tmp_path, name):
    lora = read_lora(saved(FORMATS[name](), tmp_path / "x.safetensors"))
    back = unmerge(merge(flux, [lora], [0.6]), [lora], [0.6])
    assert_close(back, weights(flux), EXACT)


@pytest.mark.parametrize("name", ["dora", "control"])
def test_what_can_not_be_subtracted_is_told(flux, tmp_path, name):
    lora = read_lora(saved(FORMATS[name](), tmp_path / "x.safetensors"))
    with pytest.raises(WeightsError, match="can't be subtracted"):
        unmerge(merge(flux, [lora]), [lora])


@pytest.mark.parametrize("name", FORMATS)
def test_scale_0_is_the_base_bit_by_bit(flux, tmp_path, name):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), flux)
    lora = read_lora(saved(FORMATS[name](), tmp_path / "x.safetensors"))
    assert eqx.tree_equal(merge(half, [lora], [0.0]), half)


def test_adapters_add_up_in_any_order_and_all_at_once(flux, tmp_path):
    a = read_lora(saved(kohya(), tmp_path / "a.safetensors"))
    b = read_lora(saved(diffusers(), tmp_path / "b.safetensors"))
    both, other, wanted = (
        merge(flux, [a, b], [0.5, -2.0]),
        merge(flux, [b, a], [-2.0, 0.5]),
        weights(flux),
    )
    for sample, scale in ((kohya(), 0.5), (diffusers(), -2.0)):
        for leaf, index, delta in sample.expected:
            wanted[leaf][index] += scale * delta(None)
    assert_close(both, wanted, EXACT)
    assert_close(other, wanted, EXACT)
    # In bfloat16 they are summed before the one cast.
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), flux)
    merged = merge(half, [a, b], [0.5, -2.0])
    total = weights(half)
    for sample, scale in ((kohya(), 0.5), (diffusers(), -2.0)):
        for leaf, index, delta in sample.expected:
            total[leaf][index] += scale * delta(None)
    assert_close(merged, total, 2**-8)


def test_scales_may_differ_by_network_and_by_block(flux, tmp_path):
    sample = kohya()
    lora = read_lora(saved(sample, tmp_path / "x.safetensors"))
    merged = merge(flux, [lora], [{"": 1.0, "double": 0.5, "double.1": 0.0}])
    wanted = weights(flux)
    for leaf, index, delta in sample.expected:
        wanted[leaf][index] += delta(None) * (
            0.0
            if leaf.startswith("double") and index == (1,)
            else 0.5
            if leaf.startswith("double")
            else 1.0
        )
    assert_close(merged, wanted, EXACT)


def test_a_scale_for_no_weight_is_told(flux, tmp_path):
    lora = read_lora(saved(kohya(), tmp_path / "x.safetensors"))
    with pytest.raises(ValueError, match="No weight of this Flux begins with 'doubel'"):
        merge(flux, [lora], [{"": 1.0, "doubel": 0.5}])


def test_merging_needs_shapes_alone_and_donates_when_told(flux, tmp_path):
    lora = read_lora(saved(kohya(), tmp_path / "x.safetensors"))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), flux)
    merged = eqx.filter_eval_shape(merge, abstract, [lora])
    assert eqx.tree_equal(merged, abstract)
    copy = jax.tree.map(jnp.copy, flux)
    merge(copy, [lora], donate=True)
    assert copy.double.img.qkv.weight.value.is_deleted()
    assert not flux.double.img.qkv.weight.value.is_deleted()


def test_every_key_is_used_or_named(flux, tmp_path):
    sample = kohya()
    sample.tensors["lora_unet_double_blocks_0_img_attn_typo.lora_down.weight"] = np.zeros(
        (2, 32), np.float32
    )
    path = saved(sample, tmp_path / "x.safetensors")
    with pytest.raises(
        WeightsError,
        match=r"1 keys that fluxjax has no place for: lora_unet_double_blocks_0_img_attn_typo",
    ):
        read_lora(path)
    lora, unused = read_lora(path, strict=False)
    assert unused == ["lora_unet_double_blocks_0_img_attn_typo.lora_down.weight"]
    assert_close(merge(flux, [lora]), expected(flux, kohya(), 1.0), EXACT)


@pytest.mark.parametrize(
    ("key", "told"),
    [
        (
            "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",
            "Stable Diffusion 1 or XL",
        ),
        ("lora_unet_input_blocks_4_1_proj_in.lora_down.weight", "Stable Diffusion XL"),
        ("diffusion_model.double_stream_modulation_img.lin.lora_A.weight", "FLUX.2"),
        ("diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_A.weight", "Stable Diffusion 3"),
        ("something.lora_A.weight", "no format that fluxjax knows"),
        ("double_blocks.0.img_attn.qkv.weight", "pass a LoRA, not a model"),
    ],
)
def test_a_file_for_another_model_is_named(tmp_path, key, told):
    write(tmp_path / "x.safetensors", {key: np.zeros((2, 2), np.float32)})
    with pytest.raises(WeightsError, match=told):
        read_lora(tmp_path / "x.safetensors")


def test_an_adapter_that_does_not_fit_lists_what_does_not(flux, tmp_path):
    sample, draw = Sample(), Draw()
    pair(sample, draw, "lora_unet_double_blocks_7_img_attn_qkv", KOHYA, (96, 32), 4)
    pair(sample, draw, "lora_unet_double_blocks_0_img_attn_proj", KOHYA, (48, 32), 4)
    lora = read_lora(saved(sample, tmp_path / "x.safetensors"))
    with pytest.raises(
        WeightsError,
        match=r"double\.7\.img\.qkv\.weight is not in it; .* is \[32, 32\], the adapter's \[48, 32\]",
    ):
        merge(flux, [lora])
    half = {key: tensor for key, tensor in sample.tensors.items() if "lora_up" not in key}
    write(tmp_path / "half.safetensors", half)
    with pytest.raises(WeightsError, match="comes without its up"):
        read_lora(tmp_path / "half.safetensors")


LOW_RANK = ("kohya", "peft, metadata", "onetrainer", "control", "xlabs", "loha")


@eqx.filter_jit
def velocity(model, x):
    ids, draw = image_ids(32, 48), Draw(20)
    txt, vec = jnp.asarray(draw(5, 24)), jnp.asarray(draw(8))
    return model(x, 0.6, txt=txt, vec=vec, img_ids=ids, guidance=3.5)


@pytest.fixture(scope="module")
def moderate(flux):
    """The network at the size of weights that training gives, so that its output moves with an adapter but is not chaotic."""
    return jax.tree.map(lambda leaf: 0.5 * leaf, flux)


@pytest.mark.parametrize("name", LOW_RANK)
def test_an_attached_adapter_gives_what_the_merged_one_gives(moderate, tmp_path, name):
    lora = read_lora(saved(FORMATS[name](), tmp_path / "x.safetensors"))
    x = jnp.asarray(Draw(21)(6, 64))
    base, merged, attached = (
        velocity(m, x)
        for m in (moderate, merge(moderate, [lora], [0.1]), attach(moderate, [lora], [0.1]))
    )
    # The LoHa changes the keys of one block alone, so that little comes out of it.
    assert jnp.linalg.norm(merged - base) > 1e-4 * jnp.linalg.norm(base)
    assert jnp.linalg.norm(attached - merged) < 1e-2 * jnp.linalg.norm(merged - base)
    # The product is taken in another order, over six layers in float32.
    assert jnp.linalg.norm(attached - merged) <= 1e-5 * jnp.linalg.norm(merged)


def test_another_scale_or_adapter_of_the_same_ranks_compiles_nothing(moderate, tmp_path):
    traces = []

    @eqx.filter_jit
    def run(model, loras, scales, x):
        traces.append(1)
        return velocity(attach(model, loras, scales), x)

    x = jnp.asarray(Draw(21)(6, 64))
    first = read_lora(saved(kohya(), tmp_path / "a.safetensors"))
    second = jax.tree.map(lambda leaf: -leaf, first)
    for lora, scale in ((first, 0.1), (first, 0.3), (second, 0.1)):
        out = run(moderate, [lora], [jnp.float32(scale)], x)
        wanted = velocity(merge(moderate, [lora], [scale]), x)
        assert jnp.linalg.norm(out - wanted) <= 1e-5 * jnp.linalg.norm(wanted)
    assert len(traces) == 1


def test_each_image_of_a_batch_has_its_own_adapter_and_scale(moderate, tmp_path):
    first = read_lora(saved(kohya(), tmp_path / "a.safetensors"))
    second = jax.tree.map(lambda leaf: leaf[..., ::-1] if leaf.ndim else leaf, first)
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), first, second)
    scales, xs = jnp.array([0.1, -0.2]), jnp.asarray(Draw(22)(2, 6, 64))
    batch = jax.vmap(lambda lora, scale, x: velocity(attach(moderate, [lora], [scale]), x))(
        both, scales, xs
    )
    for i, lora in enumerate((first, second)):
        wanted = velocity(merge(moderate, [lora], [float(scales[i])]), xs[i])
        assert jnp.linalg.norm(batch[i] - wanted) <= 1e-5 * jnp.linalg.norm(wanted)


@pytest.mark.parametrize("name", ["lokr", "dora"])
def test_what_has_no_low_rank_form_is_told(flux, tmp_path, name):
    lora = read_lora(saved(FORMATS[name](), tmp_path / "x.safetensors"))
    with pytest.raises(WeightsError, match=r"has no low-rank form\. Merge it instead"):
        attach(flux, [lora])


@pytest.mark.parametrize(
    ("term", "rank"),
    [
        (
            HadamardTerm(
                *(
                    jnp.asarray(Draw(i)(*shape))
                    for i, shape in enumerate([(8, 2), (2, 6), (8, 3), (3, 6)])
                ),
                jnp.float32(0.5),
            ),
            6,
        ),
        (
            KronTerm(
                (jnp.asarray(Draw(1)(4, 3)),),
                (jnp.asarray(Draw(2)(2, 2)), jnp.asarray(Draw(3)(2, 5))),
                jnp.float32(0.5),
            ),
            6,
        ),
        (
            KronTerm(
                (jnp.asarray(Draw(1)(4, 2)), jnp.asarray(Draw(4)(2, 3))),
                (jnp.asarray(Draw(2)(2, 2)), jnp.asarray(Draw(3)(2, 5))),
                jnp.float32(0.5),
            ),
            4,
        ),
    ],
    ids=["loha", "lokr of a whole first factor", "lokr"],
)
def test_lohas_and_lokrs_are_products_of_the_rank_that_they_amount_to(term, rank):
    up, down = term.factors()
    assert up.shape[1] == down.shape[0] == rank
    np.testing.assert_allclose(up @ down, term.delta(jnp.zeros(())), rtol=1e-5, atol=1e-5)


def tiny_adapter(path: Path) -> Sample:
    """Write an adapter of the tiny model's transformer and CLIP, and return what it should add."""
    s, draw = Sample(), Draw(11)
    s.expect(
        "single.linear1.weight",
        (3,),
        pair(s, draw, "lora_unet_single_blocks_3_linear1", KOHYA, (1344, 192), 4, 0.2),
    )
    s.expect("final.modulation.bias", (), np.zeros(384))
    pair(s, draw, "lora_te1_text_model_encoder_layers_0_mlp_fc1", KOHYA, (512, 128), 2, 0.1)
    saved(s, path)
    return s


def test_the_command_line_merges_while_it_draws(tmp_path, capsys):
    tiny_adapter(tmp_path / "style.safetensors")
    draw = [
        "generate",
        "a red star",
        "--steps",
        "2",
        "--output-dir",
        str(tmp_path),
        "--compilation-cache",
        str(tmp_path / "cache"),
    ]
    for adapter in (
        [],
        ["--lora", f"{tmp_path}/style.safetensors:0"],
        ["--lora", f"mine={tmp_path}/style.safetensors:0.5"],
    ):
        cli.main([*draw, *adapter])
    plain, zero, half = (read_image(tmp_path / f"flux_{i}.png") for i in range(3))
    np.testing.assert_array_equal(plain, zero)
    assert np.abs(half - plain).max() > 0.05
    with Image.open(tmp_path / "flux_2.png") as image:
        assert image.text["lora"] == "mine:0.5"
    for wrong in ("hub:owner/repo", ":2"):
        with pytest.raises(SystemExit) as end:
            cli.main([*draw, "--lora", wrong])
        assert end.value.code == 2
    assert "needs an adapter, as FILE:SCALE" in capsys.readouterr().err


def test_the_command_line_merges_into_a_checkpoint_as_merge_does(tmp_path, capsys):
    sample = tiny_adapter(tmp_path / "style.safetensors")
    cli.main(
        [
            "lora",
            "merge",
            "tiny",
            f"{tmp_path}/style.safetensors:0.5",
            "-o",
            str(tmp_path / "out"),
            "--to",
            "diffusers",
        ]
    )
    lora, flux = read_lora(tmp_path / "style.safetensors"), load_flux("tiny")
    assert eqx.tree_equal(load_flux(tmp_path / "out"), merge(flux, [lora], [0.5]))
    assert eqx.tree_equal(load_clip(tmp_path / "out"), merge(load_clip("tiny"), [lora], [0.5]))
    assert eqx.tree_equal(load_t5(tmp_path / "out"), load_t5("tiny"))
    assert_close(load_flux(tmp_path / "out"), expected(flux, sample, 0.5), 2**-8)
    with pytest.raises(WeightsError, match="changes clip too, which is not converted"):
        convert_weights(
            "tiny", tmp_path / "x", only=["flux"], transform=merge_while_converting([lora])
        )
    cli.main(["lora", "inspect", f"{tmp_path}/style.safetensors"])
    out = capsys.readouterr().out
    assert "style.safetensors: kohya" in out
    assert "flux: 1 weights in single (1 blocks); LowRank" in out
    assert "rank 4, alpha / rank 0.05" in out


def test_a_control_adapter_widens_a_checkpoint_and_its_config(tmp_path):
    sample = Sample()
    pair(sample, Draw(9), "img_in", PEFT, (192, 128), 4)
    lora = read_lora(saved(sample, tmp_path / "control.safetensors"))
    convert_weights(
        "tiny",
        tmp_path / "out",
        to="diffusers",
        only=["flux"],
        transform=merge_while_converting([lora]),
    )
    wide = load_flux(tmp_path / "out")
    assert wide.config.in_channels == 128
    assert eqx.tree_equal(wide, merge(load_flux("tiny"), [lora]))
    assert (
        json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())["out_channels"]
        == 64
    )


@pytest.mark.parametrize("name", ["kohya", "peft, alpha tensors", "onetrainer", "comfy", "xlabs"])
def test_converted_there_and_back_every_delta_stays(flux, tmp_path, name):
    lora, x = read_lora(saved(FORMATS[name](), tmp_path / "x.safetensors")), tmp_path
    wanted = weights(merge(flux, [lora], [0.7]))
    for number, to in enumerate(("peft", "kohya", "peft")):
        write_lora(x / f"{number}.safetensors", lora, to=to)
        lora = read_lora(x / f"{number}.safetensors")
        assert lora.format == to
        assert_close(merge(flux, [lora], [0.7]), wanted, EXACT)


def test_a_split_adapter_keeps_its_ranks_there_and_back(tmp_path):
    original = diffusers()
    write_lora(
        tmp_path / "fused.safetensors",
        read_lora(saved(original, tmp_path / "x.safetensors")),
        to="kohya",
    )
    fused = load_file(tmp_path / "fused.safetensors")
    assert fused["lora_unet_double_blocks_1_img_attn_qkv.lora_down.weight"].shape == (2 + 5, 32)
    write_lora(tmp_path / "split.safetensors", read_lora(tmp_path / "fused.safetensors"), to="peft")
    split = load_file(tmp_path / "split.safetensors")
    assert {key: tensor.shape for key, tensor in split.items()} == {
        key: tensor.shape for key, tensor in original.tensors.items()
    }
    assert all(np.array_equal(split[key], tensor) for key, tensor in original.tensors.items())


@pytest.mark.parametrize("name", ["lokr", "loha", "dora", "control"])
def test_what_is_not_of_low_rank_is_not_written(tmp_path, name):
    lora = read_lora(saved(FORMATS[name](), tmp_path / "x.safetensors"))
    with pytest.raises(WeightsError, match="is not of low rank"):
        write_lora(tmp_path / "out.safetensors", lora)
    assert not (tmp_path / "out.safetensors").exists()


def test_extraction_finds_the_adapter_that_was_merged_and_else_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sample = Sample()
    pair(sample, Draw(30), "lora_unet_double_blocks_1_img_attn_qkv", KOHYA, (576, 192), 3, 0.03)
    pair(sample, Draw(31), "lora_unet_single_blocks_0_linear2", KOHYA, (192, 960), 5, 0.05)
    lora = read_lora(saved(sample, tmp_path / "x.safetensors"))
    convert_weights("tiny", "base", only=["flux"], dtype="float32")
    convert_weights("base", "tuned", only=["flux"], transform=merge_while_converting([lora]))
    cli.main(
        [
            "lora",
            "extract",
            "base",
            "tuned",
            "-o",
            "found.safetensors",
            "--rank",
            "5",
            "--to",
            "kohya",
        ]
    )
    found = read_lora("found.safetensors")
    assert found.changes["flux"].keys() == lora.changes["flux"].keys()
    assert_close(merge(load_flux("base"), [found]), weights(load_flux("tuned")), EXACT)
    # A lower rank leaves the singular values beyond it, and no less.
    cli.main(["lora", "extract", "base", "tuned", "-o", "less.safetensors", "--rank", "2"])
    base, tuned = (
        weights(load_flux(name))["single.linear2.weight"][0] for name in ("base", "tuned")
    )
    less = weights(merge(load_flux("base"), [read_lora("less.safetensors")]))[
        "single.linear2.weight"
    ][0]
    values = np.linalg.svd(tuned - base, compute_uv=False)
    np.testing.assert_allclose(np.linalg.norm(tuned - less), np.linalg.norm(values[2:]), rtol=1e-4)
    with pytest.raises(SystemExit):
        cli.main(["lora", "extract", "base", "base", "-o", "none.safetensors", "--rank", "2"])
    with pytest.raises(SystemExit):
        cli.main(["lora", "extract", "base", "tuned", "-o", "less.safetensors", "--rank", "2"])


def test_a_large_matrix_is_projected_to_the_same_nearest_one():
    rng = np.random.default_rng(0)
    matrix = (rng.standard_normal((1100, 40)) * 0.9 ** np.arange(40)) @ rng.standard_normal(
        (40, 1200)
    )
    matrix = (matrix + 0.01 * rng.standard_normal(matrix.shape)).astype(np.float32)
    term = _nearest(matrix, 8)
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    error = np.linalg.norm(
        matrix - np.asarray(term.up, np.float64) @ np.asarray(term.down, np.float64)
    )
    # Halko et al. bound the expected excess; four power iterations leave next to none.
    np.testing.assert_allclose(error, np.linalg.norm(values[8:]), rtol=1e-4)


Shapes = dict[str, tuple[int, ...]]


def modules_at_full_size(prefix: str, dialect, flat: bool) -> dict[str, tuple[int, int]]:
    """Return the linear layers of dev with their shapes, in a dialect's names."""
    parts, modules = fused_parts(FluxConfig.dev()), {}
    for name, slot in parameters_of(abstract(Flux, FluxConfig.dev())).items():
        for key, row in dialect.keys(name) if len(slot.shape) == 2 else ():
            rows = (
                slot.shape[0] if row.part is None else parts[row.part].stop - parts[row.part].start
            )
            module = key.removesuffix(".weight")
            modules[prefix + (module.replace(".", "_") if flat else module)] = (rows, slot.shape[1])
    return modules


def low_rank(module: str, rows: int, columns: int, ends=PEFT) -> Shapes:
    return {f"{module}.{ends[0]}": (16, columns), f"{module}.{ends[1]}": (rows, 16)}


def lokr_shapes(module: str, rows: int, columns: int) -> Shapes:
    return {
        f"{module}.lokr_w1": (16, 16),
        f"{module}.lokr_w2_a": (rows // 16, 16),
        f"{module}.lokr_w2_b": (16, columns // 16),
    }


def loha_shapes(module: str, rows: int, columns: int) -> Shapes:
    pairs = {f"{module}.hada_w{i}_a": (rows, 16) for i in (1, 2)}
    return pairs | {f"{module}.hada_w{i}_b": (16, columns) for i in (1, 2)}


def dora_shapes(module: str, rows: int, columns: int) -> Shapes:
    return low_rank(module, rows, columns, KOHYA) | {f"{module}.dora_scale": (rows, 1)}


def full(
    prefix: str, dialect, flat: bool, shapes=low_rank, **options
) -> tuple[Shapes, Callable[[str, int], bool]]:
    """Return an adapter of every linear layer, and which of dev's weights it should meet, by name and dimensions."""
    modules = modules_at_full_size(prefix, dialect, flat)
    tensors = [shapes(module, *shape, **options) for module, shape in modules.items()]
    return {
        key: shape for one in tensors for key, shape in one.items()
    }, lambda name, dimensions: dimensions == 2


def full_xlabs() -> tuple[Shapes, Callable[[str, int], bool]]:
    """XLabs train the attention of all 57 blocks."""
    tensors: Shapes = {}
    ends = ("down.weight", "up.weight")
    for block in range(19):
        for stream in (1, 2):
            stem = f"double_blocks.{block}.processor"
            tensors |= low_rank(f"{stem}.qkv_lora{stream}", 9216, 3072, ends)
            tensors |= low_rank(f"{stem}.proj_lora{stream}", 3072, 3072, ends)
    for block in range(38):
        tensors |= low_rank(f"single_blocks.{block}.processor.qkv_lora", 9216, 3072, ends)
        tensors |= low_rank(f"single_blocks.{block}.processor.proj_lora", 3072, 15360, ends)
    pattern = r"(double\.\d+\.(img|txt)\.(qkv|out)|single\.\d+\.linear[12])\.weight"
    return tensors, lambda name, dimensions: re.fullmatch(pattern, name) is not None


def full_control() -> tuple[Shapes, Callable[[str, int], bool]]:
    """BFL's Control adapters change every weight, bias and norm, and widen the input."""
    modules, tensors = modules_at_full_size("", tables.FLUX_BFL, False), {}
    for module, (rows, columns) in modules.items():
        tensors |= low_rank(module, rows, 128 if module == "img_in" else columns) | {
            f"{module}.lora_B.bias": (rows,)
        }
    norms = [f"double_blocks.{i}.{side}_attn" for i in range(19) for side in ("img", "txt")]
    norms += [f"single_blocks.{i}" for i in range(38)]
    tensors |= {
        f"{norm}.norm.{which}_norm.scale": (128,) for norm in norms for which in ("query", "key")
    }
    return tensors, lambda name, dimensions: True


FULL = {
    "kohya": full("lora_unet_", tables.FLUX_BFL, True, ends=KOHYA),
    "peft": full("transformer.", tables.FLUX_DIFFUSERS, False),
    "onetrainer": full("lora_transformer_", tables.FLUX_DIFFUSERS, True, ends=KOHYA),
    "comfy": full("diffusion_model.", tables.FLUX_BFL, False, ends=KOHYA),
    "fal": full("base_model.model.", tables.FLUX_BFL, False),
    "lokr": full("lycoris_", tables.FLUX_BFL, True, lokr_shapes),
    "loha": full("lora_unet_", tables.FLUX_BFL, True, loha_shapes),
    "dora": full("lora_unet_", tables.FLUX_BFL, True, dora_shapes),
    "xlabs": full_xlabs(),
    "control": full_control(),
}


@pytest.mark.parametrize("name", FULL)
def test_at_full_size_every_target_is_met_by_name_and_shape(tmp_path, name):
    tensors, meets = FULL[name]
    header, offset = {}, 0
    for key, shape in tensors.items():
        span = (offset, offset := offset + 2 * int(np.prod(shape)))
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": span}
    text = json.dumps(header).encode()
    with open(tmp_path / "x.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    lora = read_lora(tmp_path / "x.safetensors")
    assert lora.format == {
        "lokr": "lycoris",
        "loha": "kohya",
        "dora": "kohya",
        "control": "bfl",
    }.get(name, name)
    dev = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16),
        abstract(Flux, FluxConfig.dev()),
    )
    wanted = changes_of(dev, [lora], [1.0])  # raises if one does not fit
    assert wanted.keys() == {
        name for name, slot in parameters_of(dev).items() if meets(name, len(slot.shape))
    }
    # On shapes alone, nothing is read and nothing allocated.
    merged = jax.eval_shape(lambda dev: merge(dev, [lora]), dev)
    assert merged.config.in_channels == (128 if name == "control" else 64)
    assert merged.config.out_channels == 64


def test_a_new_adapter_changes_nothing_and_training_moves_its_factors_alone(moderate):
    lora = init_lora(
        moderate,
        2,
        [r"double\.\d+\.img\.qkv", r"single\.2\.linear1"],
        alpha=4.0,
        key=jax.random.key(0),
    )
    assert set(lora.changes["flux"]) == {
        "double.0.img.qkv.weight",
        "double.1.img.qkv.weight",
        "single.2.linear1.weight",
    }
    assert eqx.tree_equal(merge(moderate, [lora]), moderate)
    x = jnp.asarray(Draw(23)(6, 64))
    target = velocity(moderate, x) + 0.1

    def loss(lora, model, *, key):
        del key
        return jnp.mean(jnp.square(velocity(attach(model, [lora]), x) - target))

    # Weight decay would move alpha / rank, if that were trained.
    optimizer, spec = optax.adamw(1e-2, weight_decay=0.1), trainable(lora)
    state = TrainState.create(lora, optimizer, trainable=spec)
    step = make_step(loss, optimizer, ema_decay=0.9, trainable=spec)
    losses = []
    with jax.numpy_dtype_promotion("standard"):  # optax promotes
        for _ in range(40):
            state, value = step(state, moderate, key=jax.random.key(0))
            losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]
    for (change,) in state.model.changes["flux"].values():
        assert float(change.term.factor) == 2.0
        assert jnp.any(change.term.up != 0)
    with pytest.raises(ValueError, match=r"\['doubel.*'\] match no matrix of this network"):
        init_lora(moderate, 2, ["doubel.*"], key=jax.random.key(0))
    with pytest.raises(ValueError, match="a rank of at least 1, got 0"):
        init_lora(moderate, 0, key=jax.random.key(0))
    every = init_lora(moderate, 1, key=jax.random.key(0)).changes["flux"]
    assert (
        len(every) == 2 * 8 + 3 * 2
    )  # two streams of four matrices a double block, two matrices a single one


class Int8(Weight):
    """A weight of bytes with a scale a row, as a quantized network has."""

    value: jax.Array
    scale: jax.Array

    @property
    def shape(self):
        return self.value.shape

    def matmul(self, x):
        return Dense(self.value.astype(jnp.float32) * self.scale[..., None]).matmul(x)


def quantized(weight: Dense) -> Int8:
    scale = jnp.max(jnp.abs(weight.value), axis=-1) / 127
    return Int8(jnp.round(weight.value / scale[..., None]).astype(jnp.int8), scale)


def test_adapters_stand_beside_quantized_and_beside_adapted_weights(moderate, tmp_path):
    def is_weight(node):
        return isinstance(node, Weight)

    small = jax.tree.map(
        lambda node: quantized(node) if is_weight(node) else node, moderate, is_leaf=is_weight
    )
    rounded = jax.tree.map(
        lambda node: (
            Dense(node.value.astype(jnp.float32) * node.scale[..., None])
            if is_weight(node)
            else node
        ),
        small,
        is_leaf=is_weight,
    )
    first, second = (
        read_lora(saved(FORMATS[name](), tmp_path / f"{name}.safetensors"))
        for name in ("kohya", "peft, metadata")
    )
    x = jnp.asarray(Draw(21)(6, 64))
    wanted = velocity(merge(rounded, [first, second], [0.1, 0.05]), x)
    # Two calls, so that the second stands beside weights that are adapted already.
    out = velocity(attach(attach(small, [first], [0.1]), [second], [0.05]), x)
    assert jnp.linalg.norm(out - wanted) <= 1e-5 * jnp.linalg.norm(wanted)
    assert jnp.linalg.norm(out - velocity(small, x)) > 1e-2 * jnp.linalg.norm(wanted)
    with pytest.raises(
        WeightsError, match=r"stored as Int8\. Merge into the plain ones before, or `attach`"
    ):
        merge(small, [first])


def test_sharded_weights_merge_to_the_same_and_stay_sharded(flux, tmp_path):
    lora = read_lora(saved(kohya(), tmp_path / "x.safetensors"))
    mesh = jax.make_mesh((2,), ("fsdp",))

    def sharding(leaf) -> NamedSharding:
        # The last axis that two devices can share.
        axis = max((i for i, n in enumerate(leaf.shape) if n % 2 == 0), default=None)
        return NamedSharding(
            mesh, PartitionSpec(*("fsdp" if i == axis else None for i in range(leaf.ndim)))
        )

    shardings = jax.tree.map(sharding, flux)
    split = jax.device_put(flux, shardings)
    merged = merge(split, [lora], [0.5], donate=True)
    assert jax.tree.all(
        jax.tree.map(
            lambda leaf, kept: leaf.sharding.is_equivalent_to(kept, leaf.ndim), merged, shardings
        )
    )
    for ours, whole in zip(
        weights(merged).values(), weights(merge(flux, [lora], [0.5])).values(), strict=True
    ):
        np.testing.assert_allclose(ours, whole, rtol=1e-6, atol=1e-6)
