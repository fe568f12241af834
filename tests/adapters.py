"""Adapter files of every format for the tests, and what they should change, in NumPy."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from layouts import write

from fluxjax import T5, Clip, Flux, FluxConfig, Lora, convert_weights
from fluxjax.checkpoint.fused import fused_parts
from fluxjax.checkpoint.weights import parameters_of
from fluxjax.lora import merge_while_converting
from fluxjax.lora.terms import FullTerm, LowRankTerm
from fluxjax.nets import ClipConfig, T5Config
from fluxjax.nets.stack import leaf_names
from fluxjax.nets.weight import AdaptedWeight, Weight

KOHYA = ("lora_down.weight", "lora_up.weight")
PEFT = ("lora_A.weight", "lora_B.weight")
XLABS = ("down.weight", "up.weight")

CONFIG = FluxConfig(
    width=32,
    heads=2,
    double_depth=2,
    single_depth=3,
    mlp_width=128,
    context=24,
    pooled=8,
    in_channels=64,
    out_channels=64,
    rope_axes=(4, 6, 6),
    time_width=16,
)
"""The transformer that the adapters of `FORMATS` fit; its MLP is 4 x width, as FLUX.1's is."""
CLIP_CONFIG = ClipConfig(vocabulary=30, width=32, heads=2, depth=2, mlp_width=64)
T5_CONFIG = T5Config(vocabulary=30, width=32, heads=2, head_dim=16, depth=2, mlp_width=48)


class Draw:
    """Normal float32 arrays from a seed."""

    def __init__(self, seed: int = 0):
        self.rng = np.random.default_rng(seed)

    def __call__(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape).astype(np.float32)


def random_network(make: type[eqx.Module], config, scale: float = 1.0, seed: int = 0):
    """Return a network of normal weights, made in NumPy, so that nothing is compiled for it."""
    draw = Draw(seed)
    shapes = eqx.filter_eval_shape(make, config, key=jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(scale * draw(*leaf.shape), jnp.float32), shapes)


def random_clip() -> Clip:
    return random_network(Clip, CLIP_CONFIG)


def random_t5() -> T5:
    return random_network(T5, T5_CONFIG)


def leaves(model: eqx.Module) -> dict[str, np.ndarray]:
    """Return a network's leaves by name."""
    named = zip(leaf_names(model), jax.tree.leaves(model), strict=True)
    return {name: np.asarray(leaf) for name, leaf in named}


def weights(model: eqx.Module) -> dict[str, np.ndarray]:
    """Return a network's leaves by name, in float64."""
    return {name: leaf.astype(np.float64) for name, leaf in leaves(model).items()}


def same_leaves(one: eqx.Module, other: eqx.Module) -> bool:
    """Return whether two networks are equal bit by bit. `eqx.tree_equal` compiles per shape."""
    if jax.tree.structure(one) != jax.tree.structure(other):
        return False
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(
        left.dtype == right.dtype
        and np.array_equal(
            np.asarray(left).view(f"u{left.dtype.itemsize}"),
            np.asarray(right).view(f"u{left.dtype.itemsize}"),
        )
        for left, right in pairs
    )


def effective(weight: Weight) -> np.ndarray:
    """Return the matrix that a weight amounts to, in float64."""
    if not isinstance(weight, AdaptedWeight):
        return np.asarray(weight.value, np.float64)
    product = np.asarray(weight.up, np.float64) @ np.asarray(weight.down, np.float64)
    return effective(weight.base) + product


def effective_weights(model: eqx.Module) -> dict[str, np.ndarray]:
    """Return as `weights` those of a network that adapters are attached to."""
    nodes = jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, Weight))
    plain = [effective(n) if isinstance(n, Weight) else np.asarray(n, np.float64) for n in nodes]
    structure = jax.tree.structure(model, is_leaf=lambda node: isinstance(node, Weight))
    names = jax.tree.leaves(
        jax.tree_util.tree_map_with_path(
            lambda path, _: ".".join(key.name for key in path),
            jax.tree.unflatten(structure, plain),
        )
    )
    return dict(zip(names, plain, strict=True))


@dataclass
class Sample:
    """The tensors and metadata of an adapter file, and what it should change.

    `expected`: a leaf, an index into it, and the difference given the base there. `values`: a
    leaf, an index, and the value that is set there at any scale other than 0.
    """

    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    expected: list[tuple[str, tuple, Callable]] = field(default_factory=list)
    values: list[tuple[str, tuple, np.ndarray]] = field(default_factory=list)

    def expect(self, leaf: str, index: tuple, delta) -> None:
        self.expected.append((leaf, index, delta if callable(delta) else lambda base: delta))


def saved(sample: Sample, path: Path) -> Path:
    """Write a sample to a file and return its path."""
    write(path, sample.tensors, sample.metadata)
    return path


def changed_weights(model: eqx.Module, sample: Sample, scale: float) -> dict[str, np.ndarray]:
    """Return the weights of a network with a sample merged into them."""
    base = weights(model)
    changed = {name: value.copy() for name, value in base.items()}
    for leaf, index, delta in sample.expected:
        changed[leaf][index] += scale * delta(base[leaf][index])
    for leaf, index, value in sample.values if scale else ():
        changed[leaf][index] = value
    return changed


def assert_close(
    found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], bound: float
) -> None:
    """Assert that all weights are equal up to a relative error."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        error = np.linalg.norm(value - expected[name]) / (np.linalg.norm(expected[name]) or 1)
        assert error <= bound, (name, error)


def dense_differences(model: eqx.Module, lora: Lora, network: str) -> dict[str, np.ndarray]:
    """Return what an adapter of low-rank terms and full differences adds to each weight."""
    slots, parts = parameters_of(model), fused_parts(model.config)
    total = {}
    for name, changes in lora.changes[network].items():
        total[name] = np.zeros(slots[name].shape)
        for change in changes:
            rows = slice(None) if change.part is None else parts[change.part]
            delta = _dense(change.term)
            total[name][rows] += np.roll(delta, len(delta) // 2, axis=0) if change.swap else delta
    return total


def _dense(term: LowRankTerm | FullTerm) -> np.ndarray:
    if isinstance(term, FullTerm):
        return np.asarray(term.value, np.float64)
    up, down = np.asarray(term.up, np.float64), np.asarray(term.down, np.float64)
    return float(term.factor) * up @ down


def convert_merged(source, destination, lora: Lora, scale: float = 1.0, **options) -> None:
    """Convert the transformer of a checkpoint with an adapter merged into it."""
    convert_weights(
        source,
        destination,
        only=["flux"],
        transform=merge_while_converting([lora], [scale]),
        **options,
    )


def pair(
    sample: Sample,
    draw: Draw,
    module: str,
    ends: tuple[str, str],
    shape: tuple[int, int],
    rank: int,
    alpha: float | None = None,
) -> np.ndarray:
    """Add a low-rank pair to a sample and return its difference in float64."""
    down, up = draw(rank, shape[1]), draw(shape[0], rank)
    sample.tensors[f"{module}.{ends[0]}"] = down
    sample.tensors[f"{module}.{ends[1]}"] = up
    factor = 1.0
    if alpha is not None:
        sample.tensors[f"{module}.alpha"] = np.float32(alpha).reshape(())
        factor = alpha / rank
    return factor * up.astype(np.float64) @ down.astype(np.float64)


def kohya() -> Sample:
    s, draw = Sample(), Draw()

    def add(leaf: str, index: tuple, module: str, *shape_rank_alpha) -> None:
        s.expect(leaf, index, pair(s, draw, f"lora_unet_{module}", KOHYA, *shape_rank_alpha))

    add("double.img.qkv.weight", (1,), "double_blocks_1_img_attn_qkv", (96, 32), 4, 2.0)
    add("double.txt.mlp.down.weight", (0,), "double_blocks_0_txt_mlp_2", (32, 128), 2, 8.0)
    add("single.linear1.weight", (2,), "single_blocks_2_linear1", (224, 32), 3, 1.0)
    add("single.modulation.weight", (0,), "single_blocks_0_modulation_lin", (96, 32), 3)
    add("img_in.weight", (), "img_in", (32, 64), 2, 1.0)
    add("time_in.up.weight", (), "time_in_in_layer", (32, 16), 2)
    add("final.linear.weight", (), "final_layer_linear", (64, 32), 5, 2.5)
    add("final.modulation.weight", (), "final_layer_adaLN_modulation_1", (64, 32), 2, 3.0)
    return s


def diffusers(
    prefix: str = "transformer.",
    flat: bool = False,
    ends: tuple[str, str] = PEFT,
    alpha: float | None = None,
) -> Sample:
    s, draw = Sample(), Draw(1)
    q, k, v = slice(0, 32), slice(32, 64), slice(64, 96)
    mlp = slice(96, 96 + CONFIG.mlp_width)

    def delta(module: str, shape: tuple[int, int], rank: int) -> np.ndarray:
        name = prefix + (module.replace(".", "_") if flat else module)
        return pair(s, draw, name, ends, shape, rank, alpha)

    double, single = "transformer_blocks", "single_transformer_blocks"
    qkv = "double.img.qkv.weight"
    s.expect(qkv, (1, q), delta(f"{double}.1.attn.to_q", (32, 32), 2))
    s.expect(qkv, (1, v), delta(f"{double}.1.attn.to_v", (32, 32), 5))
    text_key = delta(f"{double}.0.attn.add_k_proj", (32, 32), 3)
    s.expect("double.txt.qkv.weight", (0, k), text_key)
    up = delta(f"{double}.0.ff.net.0.proj", (128, 32), 3)
    s.expect("double.img.mlp.up.weight", (0,), up)
    linear1 = "single.linear1.weight"
    s.expect(linear1, (2, k), delta(f"{single}.2.attn.to_k", (32, 32), 4))
    s.expect(linear1, (2, mlp), delta(f"{single}.2.proj_mlp", (128, 32), 4))
    s.expect("single.linear2.weight", (0,), delta(f"{single}.0.proj_out", (32, 160), 4))
    # diffusers' last modulation is (scale, shift), ours (shift, scale).
    modulation = delta("norm_out.linear", (64, 32), 3)
    s.expect("final.modulation.weight", (), np.concatenate([modulation[32:], modulation[:32]]))
    s.expect("img_in.weight", (), delta("x_embedder", (32, 64), 2))
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


def bfl_names(prefix: str, ends: tuple[str, str] = PEFT, alpha: float | None = None) -> Sample:
    s, draw = Sample(), Draw(3)

    def add(leaf: str, index: tuple, module: str, shape: tuple[int, int], rank: int) -> None:
        s.expect(leaf, index, pair(s, draw, prefix + module, ends, shape, rank, alpha))

    add("double.txt.qkv.weight", (1,), "double_blocks.1.txt_attn.qkv", (96, 32), 4)
    add("double.img.out.weight", (0,), "double_blocks.0.img_attn.proj", (32, 32), 2)
    add("single.linear1.weight", (1,), "single_blocks.1.linear1", (224, 32), 2)
    add("guidance_in.down.weight", (), "guidance_in.out_layer", (32, 32), 2)
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
    s, draw = Sample(), Draw(5)

    def add(leaf: str, index: tuple, module: str, shape: tuple[int, int]) -> None:
        s.expect(leaf, index, pair(s, draw, module, XLABS, shape, 4))

    double, single = "double_blocks", "single_blocks.2.processor"
    add("double.img.qkv.weight", (0,), f"{double}.0.processor.qkv_lora1", (96, 32))
    add("double.txt.qkv.weight", (0,), f"{double}.0.processor.qkv_lora2", (96, 32))
    add("double.txt.out.weight", (1,), f"{double}.1.processor.proj_lora2", (32, 32))
    add("single.linear1.weight", (2, slice(0, 96)), f"{single}.qkv_lora", (96, 32))
    add("single.linear2.weight", (2,), f"{single}.proj_lora", (32, 160))
    return s


def lokr() -> Sample:
    s, draw = Sample(), Draw(6)
    w1, w2 = draw(4, 4), draw(24, 8)
    module = "lycoris_double_blocks_0_img_attn_qkv"
    s.tensors |= {f"{module}.lokr_w1": w1, f"{module}.lokr_w2": w2}
    # Alpha counts only for decomposed factors.
    s.tensors[f"{module}.alpha"] = np.float32(1e9).reshape(())
    s.expect("double.img.qkv.weight", (0,), np.kron(w1.astype(np.float64), w2))
    a, b = draw(8, 3), draw(3, 4)
    module = "lora_unet_single_blocks_1_linear2"
    w1 = draw(4, 40)
    s.tensors |= {f"{module}.lokr_w1": w1, f"{module}.lokr_w2_a": a, f"{module}.lokr_w2_b": b}
    s.tensors[f"{module}.alpha"] = np.float32(6).reshape(())
    delta = 6 / 3 * np.kron(w1.astype(np.float64), a.astype(np.float64) @ b)
    s.expect("single.linear2.weight", (1,), delta)
    a, b, w2 = draw(4, 2), draw(2, 4), draw(8, 8)
    module = "lycoris_double_blocks_1_txt_attn_proj"
    s.tensors |= {f"{module}.lokr_w1_a": a, f"{module}.lokr_w1_b": b, f"{module}.lokr_w2": w2}
    s.expect("double.txt.out.weight", (1,), np.kron(a.astype(np.float64) @ b, w2))
    return s


def loha() -> Sample:
    s, draw = Sample(), Draw(7)
    module = "lycoris_transformer_blocks_0_attn_to_k"
    a1, b1, a2, b2 = draw(32, 3), draw(3, 32), draw(32, 3), draw(3, 32)
    factors = {"w1_a": a1, "w1_b": b1, "w2_a": a2, "w2_b": b2}
    s.tensors |= {f"{module}.hada_{name}": value for name, value in factors.items()}
    s.tensors[f"{module}.alpha"] = np.float32(1.5).reshape(())
    delta = 1.5 / 3 * (a1.astype(np.float64) @ b1) * (a2.astype(np.float64) @ b2)
    s.expect("double.img.qkv.weight", (0, slice(32, 64)), delta)
    return s


def dora_difference(base, delta, magnitude, axis: int):
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
"""Adapter files for a transformer of `CONFIG`, by format."""


def random_flux() -> Flux:
    """Return the transformer that the adapters of `FORMATS` fit."""
    return random_network(Flux, CONFIG, scale=0.3)
