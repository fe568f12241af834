"""Adapter files: names and endings of every format, errors, and damaged files."""

import json
import re
import time
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import (
    KOHYA,
    PEFT,
    Draw,
    Sample,
    pair,
    random_clip,
    random_flux,
    random_network,
    same_leaves,
)
from layouts import write
from safetensors.numpy import load, save

from fluxjax import (
    Flux,
    WeightsError,
    attach,
    load_flux,
    merge,
    read_lora,
)
from fluxjax.lora.base_terms import MagnitudeTerm
from fluxjax.lora.describe import describe_lora
from fluxjax.lora.merge import notes_of
from fluxjax.lora.names import find_place
from fluxjax.lora.peft_patterns import Patterns
from fluxjax.lora.terms import FullTerm, LowRankTerm, ReplacementTerm

KOHYA_PROJ, PEFT_OUT = (
    "lora_unet_double_blocks_0_img_attn_proj",
    "transformer.transformer_blocks.0.attn.to_out.0",
)


def read(tmp_path, tensors, metadata=None, **options):
    write(tmp_path / "x.safetensors", tensors, metadata or {})
    return read_lora(tmp_path / "x.safetensors", **options)


def low_rank(module: str, ends=KOHYA, shape=(32, 32), seed=0) -> dict[str, np.ndarray]:
    sample = Sample()
    pair(sample, Draw(seed), module, ends, shape, 4)
    return sample.tensors


OUT, QKV = "double.0.img.out.weight", "double.0.img.qkv.weight"


@pytest.mark.parametrize(
    ("module", "ends", "network", "weight"),
    [
        (
            "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
            KOHYA,
            "clip",
            "blocks.0.q.weight",
        ),
        ("transformer.double_blocks.0.img_attn.proj", PEFT, "flux", OUT),
        ("diffusion_model.transformer_blocks.0.attn.to_out.0", PEFT, "flux", OUT),
        ("base_model.model.transformer.transformer_blocks.0.attn.to_out.0", PEFT, "flux", OUT),
        (
            "base_model.model.text_model.encoder.layers.0.self_attn.q_proj",
            PEFT,
            "clip",
            "blocks.0.q.weight",
        ),
        (
            "base_model.model.encoder.block.0.layer.0.SelfAttention.q",
            PEFT,
            "t5",
            "blocks.0.q.weight",
        ),
        (
            "diffusion_model.double_blocks.0.processor.proj_lora1",
            ("down.weight", "up.weight"),
            "flux",
            OUT,
        ),
        (PEFT_OUT, ("lora_A", "lora_B"), "flux", OUT),
        (PEFT_OUT, ("lora_A.style.weight", "lora_B.style.weight"), "flux", OUT),
        (PEFT_OUT, ("lora.down.weight", "lora.up.weight"), "flux", OUT),
        (PEFT_OUT, ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"), "flux", OUT),
    ],
)
def test_every_prefix_and_ending_finds_its_weight(tmp_path, module, ends, network, weight):
    lora = read(tmp_path, low_rank(module, ends))
    assert {kind: list(changes) for kind, changes in lora.changes.items()} == {network: [weight]}


def test_processors_of_old_diffusers_find_their_weights(tmp_path):
    sides = dict(zip(("down", "up"), low_rank("x").values(), strict=True))
    stem = "transformer.transformer_blocks.0.attn"
    tensors = {
        f"{stem}.processor.{name}_lora.{end}.weight": x
        for name in ("to_out", "to_q")
        for end, x in sides.items()
    }
    tensors |= {f"{stem}.add_k_proj_lora.{end}.weight": x for end, x in sides.items()}
    lora = read(tmp_path, tensors)
    assert {name: change.part for name, (change,) in lora.changes["flux"].items()} == {
        OUT: None,
        QKV: "q",
        "double.0.txt.qkv.weight": "k",
    }


def delta_of(lora, weight, base, network="flux"):
    (change,) = lora.changes[network][weight]
    return np.asarray(change.term.delta(jnp.asarray(base)))


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((1, 32), 0), ((32, 1), 1), ((32,), 1), ((1, 32, 1, 1), 0), ((32, 1, 1, 1), 1)],
    ids=str,
)
def test_dora_scales_of_square_weights_are_of_the_axis_that_their_shape_says(tmp_path, shape, axis):
    magnitude, base = np.abs(Draw(3)(*shape)), Draw(4)(32, 32)
    pairs = low_rank(KOHYA_PROJ)
    lora = read(tmp_path, pairs | {f"{KOHYA_PROJ}.dora_scale": magnitude})
    down, up = pairs.values()
    changed = base.astype(np.float64) + up.astype(np.float64) @ down
    wide = magnitude.reshape((1, 32) if axis == 0 else (32, 1))
    wanted = wide * changed / np.linalg.norm(changed, axis=axis, keepdims=True)
    np.testing.assert_allclose(base + delta_of(lora, OUT, base), wanted, rtol=1e-4, atol=1e-5)


def test_magnitudes_of_a_fused_weights_part_are_of_the_parts_rows(tmp_path):
    stem = "transformer.transformer_blocks.0.attn.to_k"
    lora = read(
        tmp_path, low_rank(stem, PEFT) | {f"{stem}.lora_magnitude_vector": np.ones(32, np.float32)}
    )
    ((change,),) = lora.changes["flux"].values()
    assert (change.part, change.term.by_row, change.term.rows) == ("k", True, 32)


def test_dora_leaves_zero_rows_and_columns_zero():
    term = LowRankTerm(jnp.zeros((3, 1)), jnp.zeros((1, 3)), jnp.float32(1))
    base = jnp.zeros((3, 3)).at[1:, 1:].set(2.0)
    for by_row in (True, False):
        result = base + MagnitudeTerm(term, jnp.full((3,), 5.0), by_row).delta(base)
        assert jnp.all(jnp.isfinite(result))
        np.testing.assert_array_equal(result[0] if by_row else result[:, 0], 0)
        np.testing.assert_allclose(
            jnp.linalg.norm(result[1:, 1:], axis=1 if by_row else 0), 5, rtol=1e-6
        )


def test_differences_and_values_of_weights_biases_and_norms_are_read(tmp_path):
    draw = Draw(5)
    tensors = {
        f"{KOHYA_PROJ}.diff": draw(32, 32),
        f"{KOHYA_PROJ}.diff_b": draw(32),
        "lora_unet_double_blocks_0_img_attn_norm_query_norm.w_norm": draw(16),
        "lora_te1_text_model_encoder_layers_0_layer_norm1.diff": draw(32),
        "lora_te1_text_model_encoder_layers_0_layer_norm1.diff_b": draw(32),
        "lora_te1_text_model_final_layer_norm.w_norm": draw(32),
        "lora_te1_text_model_final_layer_norm.b_norm": draw(32),
        "diffusion_model.single_blocks.0.linear2.set_weight": draw(32, 160),
    }
    lora = read(tmp_path, tensors)
    full = {OUT, "double.0.img.out.bias", "double.0.img.query_norm.scale"}
    kinds = {name: type(change.term) for name, (change,) in lora.changes["flux"].items()}
    assert kinds == dict.fromkeys(full, FullTerm) | {"single.0.linear2.weight": ReplacementTerm}
    assert set(lora.changes["clip"]) == {
        "blocks.0.norm1.scale",
        "blocks.0.norm1.bias",
        "norm.scale",
        "norm.bias",
    }
    np.testing.assert_array_equal(
        delta_of(lora, "norm.bias", np.zeros(32), "clip"), tensors[list(tensors)[-2]]
    )
    clip = random_clip()
    merged = merge(clip, [lora])
    np.testing.assert_allclose(
        merged.norm.bias - clip.norm.bias, tensors[list(tensors)[-2]], rtol=1e-5, atol=1e-6
    )


def test_trained_norms_of_diffusers_control_are_set(tmp_path):
    norm = "transformer.single_transformer_blocks.0.attn.norm_q.weight"
    values = Draw(6)(16)
    lora = read(tmp_path, low_rank(PEFT_OUT, PEFT) | {norm: values})
    np.testing.assert_allclose(
        delta_of(lora, "single.0.query_norm.scale", np.ones(16)), values - 1, rtol=1e-6
    )


def test_a_bias_of_lora_b_is_scaled_as_its_factors_are(tmp_path):
    bias = Draw(7)(32)
    tensors = low_rank(PEFT_OUT, PEFT) | {
        f"{PEFT_OUT}.lora_B.bias": bias,
        f"{PEFT_OUT}.alpha": np.float32(2).reshape(()),
    }
    lora = read(tmp_path, tensors)
    np.testing.assert_allclose(
        delta_of(lora, "double.0.img.out.bias", np.zeros(32)), bias / 2, rtol=1e-6
    )


def test_a_reshaped_weight_has_to_be_of_the_shape_that_its_factors_have(tmp_path):
    tensors = low_rank("diffusion_model.img_in", PEFT, (32, 128))
    lora = read(tmp_path, tensors | {"diffusion_model.img_in.reshape_weight": np.array([32, 128])})
    assert lora.changes["flux"]["img_in.weight"][0].term.columns == 128
    with pytest.raises(
        WeightsError,
        match=r"diffusion_model.img_in is reshaped to \[32, 64\], but changes \[32, 128\]",
    ):
        read(tmp_path, tensors | {"diffusion_model.img_in.reshape_weight": np.array([32, 64])})


def test_what_has_no_effect_on_flux_is_left_out_with_a_line_each(tmp_path):
    tensors = low_rank(KOHYA_PROJ) | low_rank("lora_te1_text_projection", shape=(32, 32))
    tensors |= {
        "bundle_emb.gloss\x1b[2J.clip_l": Draw()(4, 32),
        "bundle_emb.gloss\x1b[2J.t5": Draw()(4, 32),
    }
    lora = read(tmp_path, tensors)
    assert list(lora.changes["flux"]) == [OUT]
    assert set(lora.changes) == {"flux"}
    assert lora.notes == (
        "Its 1 bundled embeddings (textual inversion) are left out: gloss\\x1b[2J.",
        "lora_te1_text_projection is left out: FLUX does not use CLIP's projection, "
        "so it has no effect.",
    )
    assert all(note in str(describe_lora(tmp_path / "x.safetensors")) for note in lora.notes)


def test_the_guidance_of_a_dev_adapter_has_no_effect_on_schnell(tmp_path):
    tensors = low_rank(KOHYA_PROJ) | low_rank("lora_unet_guidance_in_out_layer")
    lora, without = read(tmp_path, tensors), read(tmp_path, low_rank(KOHYA_PROJ))
    dev = random_flux()
    schnell = random_network(Flux, replace(dev.config, guidance_embed=False))
    assert notes_of(dev, lora) == ()
    (note,) = notes_of(schnell, lora)
    assert note.startswith("Its guidance_in is left out")
    for combine in (merge, attach):
        assert same_leaves(combine(schnell, [lora]), combine(schnell, [without]))


def test_without_strict_a_module_that_is_not_wholly_known_is_left_out_whole(tmp_path):
    strange = f"{KOHYA_PROJ}.lora_kernel.weight"
    other = low_rank("lora_unet_double_blocks_0_txt_attn_proj")
    tensors = low_rank(KOHYA_PROJ) | other | {strange: Draw()(2, 2)}
    lora, unused = read(tmp_path, tensors, strict=False)
    assert list(lora.changes["flux"]) == ["double.0.txt.out.weight"]
    assert set(unused) == tensors.keys() - other.keys()


ODD = {
    "two endings": (
        low_rank(PEFT_OUT, PEFT) | low_rank(PEFT_OUT, KOHYA),
        r"one tensor twice: .*to_out\.0\.lora_(A|B)\.weight and .*lora_(down|up)\.weight",
    ),
    "two adapters' names": (
        low_rank(PEFT_OUT, PEFT)
        | low_rank(PEFT_OUT, ("lora_A.default.weight", "lora_B.default.weight")),
        "one tensor twice",
    ),
    "two formats": (
        low_rank(PEFT_OUT, PEFT) | low_rank(KOHYA_PROJ),
        r"changes double\.0\.img\.out\.weight twice",
    ),
    "a fused weight and its part": (
        low_rank("lora_unet_double_blocks_0_img_attn_qkv", shape=(96, 32))
        | low_rank("transformer.transformer_blocks.0.attn.to_q", PEFT),
        r"changes double\.0\.img\.qkv\.weight twice, under two names: "
        r"lora_unet.* and transformer\.",
    ),
    "rank 0": (
        {
            f"{KOHYA_PROJ}.{KOHYA[0]}": np.zeros((0, 32)),
            f"{KOHYA_PROJ}.{KOHYA[1]}": np.zeros((32, 0)),
        },
        "is empty",
    ),
    "alpha NaN": (
        low_rank(KOHYA_PROJ) | {f"{KOHYA_PROJ}.alpha": np.float32("nan").reshape(())},
        "alpha has to be one finite",
    ),
    "alpha infinity": (
        low_rank(KOHYA_PROJ) | {f"{KOHYA_PROJ}.alpha": np.float32("inf").reshape(())},
        "one finite number",
    ),
    "alphas": (
        low_rank(KOHYA_PROJ) | {f"{KOHYA_PROJ}.alpha": np.ones(3, np.float32)},
        "one finite number",
    ),
    "NaN": (
        low_rank(KOHYA_PROJ) | {f"{KOHYA_PROJ}.{KOHYA[1]}": np.full((32, 4), np.nan, np.float32)},
        r"proj\.lora_up\.weight holds NaN or infinity",
    ),
    "beyond float32": (
        low_rank(KOHYA_PROJ) | {f"{KOHYA_PROJ}.{KOHYA[1]}": np.full((32, 4), 1e300)},
        r"proj\.lora_up\.weight holds NaN or infinity",
    ),
    "integers": (
        low_rank(KOHYA_PROJ) | {f"{KOHYA_PROJ}.{KOHYA[1]}": np.ones((32, 4), np.int8)},
        "has dtype int8",
    ),
    "magnitudes of a wrong size": (
        low_rank(KOHYA_PROJ) | {f"{KOHYA_PROJ}.dora_scale": np.ones((1, 7), np.float32)},
        r"dora_scale has shape \[1, 7\], which does not fit 32 columns",
    ),
    "a vector for a matrix": (
        {f"{KOHYA_PROJ}.diff": np.ones(32, np.float32)},
        r"proj\.diff has shape \[32\]",
    ),
    "no bias": (
        {"lora_te3_encoder_block_0_layer_0_SelfAttention_q.diff_b": np.ones(32, np.float32)},
        r"blocks\.0\.q\.weight has no bias for lora_te3_.*diff_b to change",
    ),
    "a norm's factors": (
        low_rank("double_blocks.0.img_attn.norm.query_norm"),
        "is a norm's vector",
    ),
    "OFT of PEFT without options": (
        {
            "base_model.model.transformer_blocks.0.attn.to_q.oft_R.weight": np.ones(
                (4, 28), np.float32
            )
        },
        "options are in adapter_config.json",
    ),
    "a butterfly that is none": (
        {f"{KOHYA_PROJ}.oft_blocks": np.ones((9, 4, 8, 8), np.float32)},
        "do not fit together",
    ),
    "Nunchaku's model": (
        {"transformer_blocks.0.qkv_proj.wscales": np.ones((2, 2))},
        r"Nunchaku \(SVDQuant\)",
    ),
    "Nunchaku's LoRA": (
        {"transformer_blocks.0.qkv_proj.lora_down": np.ones((2, 2))},
        r"Nunchaku \(SVDQuant\) LoRA",
    ),
    "NF4": (
        {
            f"{PEFT_OUT}.weight": np.ones((2, 2), np.uint8),
            f"{PEFT_OUT}.weight.quant_state.bitsandbytes__nf4": np.ones(2, np.uint8),
        },
        "an NF4 model of bitsandbytes",
    ),
    "escape sequences": (
        low_rank(KOHYA_PROJ) | {"a\x1b[2J\nwhole.lora_A.weight": np.ones((2, 2))},
        r"a\\x1b\[2J\\nwhole",
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_what_can_not_be_read_exactly_is_refused_by_name(tmp_path, name):
    tensors, message = ODD[name]
    with pytest.raises(WeightsError, match=message) as error:
        read(tmp_path, tensors)
    assert "\n" not in str(error.value)


SETTINGS = {
    "not JSON": ("{", "is not JSON"),
    "a list": ("[1]", "is not a table"),
    "deep": ("[" * 100_000, "is not JSON"),
    "alpha of text": ('{"lora_alpha": "8"}', "lora_alpha has to be a finite number, not 8"),
    "alpha NaN": (
        '{"transformer.lora_alpha": NaN}',
        "lora_alpha has to be a finite number, not NaN",
    ),
    "alpha without end": (
        '{"lora_alpha": 1' + 400 * "0" + "}",
        "lora_alpha has to be a finite number",
    ),
    "patterns that are a number": ('{"alpha_pattern": 3}', "alpha_pattern has to be a table"),
    "patterns that are a list": ('{"alpha_pattern": ["to_q"]}', "alpha_pattern has to be a table"),
    "patterns of text": ('{"alpha_pattern": {"to_q": "x"}}', "alpha_pattern has to be a table"),
    "patterns of null": ('{"rank_pattern": {"to_q": null}}', "rank_pattern has to be a table"),
    "rsLoRA of text": ('{"use_rslora": "yes"}', "use_rslora has to be true or false, not yes"),
    "another method": ('{"peft_type": "VERA"}', "does not read PEFT's VERA adapters"),
    "PiSSA": ('{"init_lora_weights": "pissa_niter_4"}', "changes the base weights too"),
    "nested repetitions": ('{"alpha_pattern": {"(a+)+$": 1}}', "may take too long"),
    "many repetitions": ('{"alpha_pattern": {".*.*.*.*x": 1}}', "may take too long"),
    "many alternatives": (json.dumps({"alpha_pattern": {"(.|.)" * 40: 1}}), "may take too long"),
    "no expression": ('{"alpha_pattern": {"a(b": 1}}', "is not a valid regular expression"),
    "DoRA without magnitudes": ('{"use_dora": true}', "comes without its magnitudes"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_are_damaged_are_refused_at_once(tmp_path, name):
    text, message = SETTINGS[name]
    begun = time.monotonic()
    with pytest.raises(WeightsError, match=message) as error:
        read(tmp_path, low_rank(PEFT_OUT, PEFT), {"lora_adapter_metadata": text})
    assert "\n" not in str(error.value)
    assert time.monotonic() - begun < 5


def test_patterns_of_null_are_none(tmp_path):
    metadata = {"lora_adapter_metadata": '{"lora_alpha": 2, "alpha_pattern": null, "r": null}'}
    lora = read(tmp_path, low_rank(PEFT_OUT, PEFT), metadata)
    assert float(lora.changes["flux"][OUT][0].term.factor) == 0.5


PATTERNS = (
    "to_q",
    "attn.to_q",
    "0.attn.to_q",
    "o_q",
    "^attn.to_q",
    "^transformer_blocks.0.attn.to_q",
    r".*attn\.to_[qk]",
    r"blocks\.[0-9]+\.attn.*",
    "(to_q|to_k)",
    "transformer_blocks.0",
    "",
    "attn.to_q$",
    r"(?:single_)?transformer.*",
)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_match_as_pefts_do(pattern):
    for name in (
        "transformer_blocks.0.attn.to_q",
        "single_transformer_blocks.11.attn.to_q",
        "to_q",
        "x.ato_q",
    ):
        theirs = re.match(rf"(.*\.)?({pattern})$", name) is not None
        if pattern.endswith(")?transformer.*"):
            with pytest.raises(WeightsError, match="may take too long"):
                Patterns({pattern: 1.0})
        else:
            assert (Patterns({pattern: 1.0}).find(name, 0.0) == 1.0) == theirs


def test_the_slowest_patterns_that_are_run_take_no_second():
    patterns = Patterns({f"{'.*' * 2}{i}x": 1.0 for i in range(7)})
    begun = time.process_time()
    for block in range(57):
        for layer in range(10):
            assert (
                patterns.find(
                    f"single_transformer_blocks.{block}.attn.processor.{'y' * 30}.{layer}", 0.0
                )
                == 0.0
            )
    assert time.process_time() - begun < 5


def test_a_model_of_nunchaku_is_not_taken_for_an_adapter(tmp_path):
    stem = "transformer_blocks.0.qkv_proj"
    write(
        tmp_path / "x.safetensors",
        {f"{stem}.{name}": np.ones((2, 2), np.float32) for name in ("wscales", "lora_down")},
    )
    with pytest.raises(WeightsError, match=r"is a Nunchaku \(SVDQuant\) model"):
        load_flux(tmp_path / "x.safetensors")


def test_a_folder_needs_one_adapter(tmp_path):
    with pytest.raises(WeightsError, match=r"needs one adapter in the folder .* and found none"):
        read_lora(tmp_path)
    for name in ("a", "b"):
        write(tmp_path / f"{name}.safetensors", low_rank(KOHYA_PROJ))
    with pytest.raises(WeightsError, match=r"found several: a\.safetensors, b\.safetensors"):
        read_lora(tmp_path)
    write(tmp_path / "pytorch_lora_weights.safetensors", low_rank(PEFT_OUT, PEFT))
    assert list(read_lora(tmp_path).changes["flux"]) == [OUT]


def test_blocks_that_no_network_has_are_not_found():
    assert find_place("double_blocks.999.img_attn.qkv") is not None
    assert find_place("double_blocks.1000.img_attn.qkv") is None


def test_a_file_of_more_tensors_than_an_adapter_has_is_refused_at_once(tmp_path):
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    text = json.dumps({f"model.layers.{i}.lora_A.weight": entry for i in range(20_001)}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(WeightsError, match="more than 20,000 tensors"):
        read_lora(tmp_path / "x.safetensors")


def whole_file() -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return an adapter of many kinds of terms."""
    draw = Draw(8)
    tensors = low_rank(PEFT_OUT, PEFT) | low_rank(
        "lora_unet_single_blocks_0_linear2", shape=(32, 160)
    )
    tensors["lora_unet_single_blocks_0_linear2.alpha"] = np.float32(2).reshape(())
    tensors["lora_unet_single_blocks_0_linear2.dora_scale"] = draw(1, 160)
    tensors |= {
        f"lycoris_txt_in.{name}": draw(4, 4) for name in ("lokr_w1_a", "lokr_w1_b", "lokr_w2")
    }
    shapes = dict(hada_w1_a=(32, 2), hada_w1_b=(2, 32), hada_w2_a=(32, 2), hada_w2_b=(2, 32))
    tensors |= {
        f"lora_unet_double_blocks_0_txt_attn_proj.{name}": draw(*shape)
        for name, shape in shapes.items()
    }
    tensors |= {
        "diffusion_model.time_in.in_layer.oft_blocks": draw(4, 8, 8),
        "diffusion_model.img_in.diff_b": draw(32),
    }
    tensors |= {
        f"diffusion_model.time_in.out_layer.{n}.weight": draw(4, 4)
        for n in ("a1", "a2", "b1", "b2")
    }
    settings = {
        "transformer.lora_alpha": 3,
        "transformer.alpha_pattern": {"to_q": 2},
        "transformer.use_rslora": False,
    }
    return tensors, {"lora_adapter_metadata": json.dumps(settings)}


OTHER_VALUES = {
    "flat": lambda value: value.reshape(-1),
    "narrow": lambda value: np.atleast_1d(value)[..., :1].copy(),
    "empty": lambda value: np.zeros((0, *value.shape[1:]), np.float32),
    "NaN": lambda value: np.full_like(value, np.nan),
    "huge": lambda value: np.full_like(value, 3e38),
    "integers": lambda value: value.astype(np.int32),
}
OTHER_KEYS = ("dropped", "cut off", "another ending", "swapped", "settings")


def mutate(rng: np.random.Generator) -> bytes:
    """Return an adapter file with one or two things wrong, or only odd."""
    tensors, metadata = whole_file()
    tensors = {key: np.array(value) for key, value in tensors.items()}
    for _ in range(rng.integers(1, 3)):
        key, other = (str(name) for name in rng.choice(list(tensors), 2))
        way = str(rng.choice([*OTHER_VALUES, *OTHER_KEYS]))
        if way in OTHER_VALUES:
            tensors[key] = OTHER_VALUES[way](tensors[key])
        elif way == "dropped":
            del tensors[key]
        elif way == "cut off":
            tensors[key[: rng.integers(len(key))] + "x.lora_A"] = tensors.pop(key)
        elif way == "another ending":
            tensors[f"{key.partition('.')[0]}.{other.rpartition('.')[2]}"] = tensors.pop(key)
        elif way == "swapped":
            tensors[key], tensors[other] = tensors[other], tensors[key]
        else:
            metadata["lora_adapter_metadata"] = damaged_settings(rng)
    content = bytearray(save(tensors, metadata))
    for _ in range(rng.integers(0, 4) if rng.random() < 0.3 else 0):
        content[rng.integers(len(content) if rng.random() < 0.5 else 400)] ^= 1 << int(
            rng.integers(8)
        )
    return bytes(content[: rng.integers(len(content))] if rng.random() < 0.05 else content)


def damaged_settings(rng: np.random.Generator) -> str:
    values = [
        None,
        "x",
        [],
        {},
        0,
        -1,
        1e308,
        float("nan"),
        {"to_q": "y"},
        {"(.+)+": 2},
        {"to_out.0": 5},
        True,
    ]
    keys = [
        "lora_alpha",
        "r",
        "alpha_pattern",
        "rank_pattern",
        "use_rslora",
        "peft_type",
        "use_dora",
        "init_lora_weights",
    ]
    return json.dumps(
        {f"transformer.{rng.choice(keys)}": values[rng.integers(len(values))] for _ in range(2)}
    )


STEMS = {
    "single.0.linear2.weight": "lora_unet_single_blocks_0_linear2",
    "txt_in.weight": "lycoris_txt_in",
    "double.0.txt.out.weight": "lora_unet_double_blocks_0_txt_attn_proj",
    "time_in.up.weight": "diffusion_model.time_in.in_layer",
    "time_in.down.weight": "diffusion_model.time_in.out_layer",
    "img_in.bias": "diffusion_model.img_in",
}


def stored(content: bytes) -> dict[str, dict[str, bytes]]:
    """Return the tensors that belong to each weight, as bytes."""
    tensors = {
        key: repr((value.shape, value.dtype)).encode() + value.tobytes()
        for key, value in load(content).items()
    }
    return {
        weight: {key: x for key, x in tensors.items() if key.startswith(f"{stem}.")}
        for weight, stem in STEMS.items()
    }


def test_300_damaged_files_are_read_right_or_refused_in_one_line(tmp_path):
    rng, path, outcomes = (
        np.random.default_rng(16),
        tmp_path / "x.safetensors",
        {"read": 0, "refused": 0},
    )
    path.write_bytes(save({key: np.array(value) for key, value in whole_file()[0].items()}))
    whole, original = read_lora(path).changes["flux"], stored(path.read_bytes())
    assert whole.keys() - {OUT} == STEMS.keys()
    for _ in range(300):
        path.write_bytes(mutate(rng))
        begun, message = time.monotonic(), None
        try:
            lora = read_lora(path)
        except WeightsError as error:
            message = str(error)
        outcomes["read" if message is None else "refused"] += 1
        assert time.monotonic() - begun < 5
        if message is not None:
            assert message.isprintable()
            continue
        assert all(
            np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(lora)
        )
        for weight, tensors in stored(path.read_bytes()).items():
            # What is as it was means what it meant; what is gone changes nothing.
            if tensors == original[weight]:
                assert eqx.tree_equal(lora.changes["flux"][weight], whole[weight])
            elif not tensors:
                assert weight not in lora.changes["flux"]
    assert min(outcomes.values()) > 20


def test_a_hundred_thousand_patterns_are_looked_up_and_the_first_still_wins():
    names = {f"module{number}": 1.0 for number in range(100_000)}
    found = Patterns({r"to_(q|k)": 2.0, "attn.to_q": 3.0, "to_v": 4.0, r"to_(v)": 5.0, **names})
    assert [found.find(f"blocks.0.attn.{name}", 9.0) for name in ("to_q", "to_v", "to_out")] == [
        2.0,
        4.0,
        9.0,
    ]
    start = time.monotonic()
    for number in range(1000):
        found.find(f"blocks.{number}.attn.to_out", 9.0)
    assert time.monotonic() - start < 2  # compared one by one, it takes over a minute
