"""Adapters of every linear layer of dev, by the headers of their files: each meets its weight."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import KOHYA, PEFT, XLABS

from fluxjax import Flux, FluxConfig, Lora, merge, read_lora
from fluxjax.checkpoint import names as tables
from fluxjax.checkpoint.fused import fused_parts
from fluxjax.checkpoint.weights import abstract, parameters_of
from fluxjax.lora.changes import changes_of

RANK = 1
CONFIG = FluxConfig.dev()


def in_bfloat16(config: FluxConfig) -> Flux:
    """Return the shapes of a transformer."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), abstract(Flux, config)
    )


DEV = in_bfloat16(CONFIG)
DEV_SLOTS = parameters_of(DEV)
# Blocks of a kind are traced alike, so the merge is traced for the first one of each.
ONE_BLOCK = in_bfloat16(replace(CONFIG, double_depth=1, single_depth=1))
Shapes = dict[str, tuple[int, ...]]
Meets = Callable[[str, int], bool]
"""Whether an adapter should change a weight, by its name and its number of axes."""


def modules_at_full_size(prefix: str, dialect, flat: bool) -> dict[str, tuple[int, int]]:
    """Return the linear layers of dev with their shapes, in a dialect's names."""
    parts, modules = fused_parts(CONFIG), {}
    for name, slot in DEV_SLOTS.items():
        if len(slot.shape) != 2:
            continue
        for key, row in dialect.keys(name):
            rows = slot.shape[0]
            if row.part is not None:
                rows = parts[row.part].stop - parts[row.part].start
            module = key.removesuffix(".weight")
            if flat:
                module = module.replace(".", "_")
            modules[prefix + module] = (rows, slot.shape[1])
    return modules


def low_rank(module: str, rows: int, columns: int, ends=PEFT) -> Shapes:
    return {f"{module}.{ends[0]}": (RANK, columns), f"{module}.{ends[1]}": (rows, RANK)}


def lokr_shapes(module: str, rows: int, columns: int) -> Shapes:
    return {
        f"{module}.lokr_w1": (16, 16),
        f"{module}.lokr_w2_a": (rows // 16, RANK),
        f"{module}.lokr_w2_b": (RANK, columns // 16),
    }


def loha_shapes(module: str, rows: int, columns: int) -> Shapes:
    ups = {f"{module}.hada_w{i}_a": (rows, RANK) for i in (1, 2)}
    return ups | {f"{module}.hada_w{i}_b": (RANK, columns) for i in (1, 2)}


def dora_shapes(module: str, rows: int, columns: int) -> Shapes:
    return low_rank(module, rows, columns, KOHYA) | {f"{module}.dora_scale": (rows, 1)}


def every_layer(prefix: str, dialect, flat: bool, shapes=low_rank, **options):
    """Return an adapter of every linear layer, and which of dev's weights it should meet."""
    tensors: Shapes = {}
    for module, (rows, columns) in modules_at_full_size(prefix, dialect, flat).items():
        tensors |= shapes(module, rows, columns, **options)
    return tensors, lambda name, axes: axes == 2


def xlabs() -> tuple[Shapes, Meets]:
    """XLabs train the attention of all 57 blocks."""
    tensors: Shapes = {}
    for block in range(19):
        for stream in (1, 2):
            stem = f"double_blocks.{block}.processor"
            tensors |= low_rank(f"{stem}.qkv_lora{stream}", 9216, 3072, XLABS)
            tensors |= low_rank(f"{stem}.proj_lora{stream}", 3072, 3072, XLABS)
    for block in range(38):
        tensors |= low_rank(f"single_blocks.{block}.processor.qkv_lora", 9216, 3072, XLABS)
        tensors |= low_rank(f"single_blocks.{block}.processor.proj_lora", 3072, 15360, XLABS)
    pattern = r"(double\.\d+\.(img|txt)\.(qkv|out)|single\.\d+\.linear[12])\.weight"
    return tensors, lambda name, axes: re.fullmatch(pattern, name) is not None


def control() -> tuple[Shapes, Meets]:
    """BFL's Control adapters change every weight, bias and norm, and widen the input."""
    tensors: Shapes = {}
    for module, (rows, columns) in modules_at_full_size("", tables.FLUX_BFL, False).items():
        tensors |= low_rank(module, rows, 128 if module == "img_in" else columns)
        tensors[f"{module}.lora_B.bias"] = (rows,)
    norms = [f"double_blocks.{i}.{side}_attn" for i in range(19) for side in ("img", "txt")]
    norms += [f"single_blocks.{i}" for i in range(38)]
    for norm in norms:
        for which in ("query", "key"):
            tensors[f"{norm}.norm.{which}_norm.scale"] = (128,)
    return tensors, lambda name, axes: True


FULL_SIZE = {
    "kohya": lambda: every_layer("lora_unet_", tables.FLUX_BFL, True, ends=KOHYA),
    "peft": lambda: every_layer("transformer.", tables.FLUX_DIFFUSERS, False),
    "onetrainer": lambda: every_layer("lora_transformer_", tables.FLUX_DIFFUSERS, True, ends=KOHYA),
    "comfy": lambda: every_layer("diffusion_model.", tables.FLUX_BFL, False, ends=KOHYA),
    "fal": lambda: every_layer("base_model.model.", tables.FLUX_BFL, False),
    "lokr": lambda: every_layer("lycoris_", tables.FLUX_BFL, True, lokr_shapes),
    "loha": lambda: every_layer("lora_unet_", tables.FLUX_BFL, True, loha_shapes),
    "dora": lambda: every_layer("lora_unet_", tables.FLUX_BFL, True, dora_shapes),
    "xlabs": xlabs,
    "control": control,
}
FORMAT_OF = {"lokr": "lycoris", "loha": "kohya", "dora": "kohya", "control": "bfl"}


def write_zeros(path: Path, tensors: Shapes) -> None:
    """Write a bfloat16 file of zeros, which take no space on the disk."""
    header, offset = {}, 0
    for key, shape in tensors.items():
        end = offset + 2 * int(np.prod(shape))
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_at_full_size_every_weight_is_met_by_name_and_shape(tmp_path, name):
    tensors, meets = FULL_SIZE[name]()
    write_zeros(tmp_path / "x.safetensors", tensors)
    lora = read_lora(tmp_path / "x.safetensors")
    assert lora.format == FORMAT_OF.get(name, name)
    changes = changes_of(DEV, [lora], [1.0])  # raises if one does not fit
    expected = {weight for weight, slot in DEV_SLOTS.items() if meets(weight, len(slot.shape))}
    assert changes.keys() == expected
    slots = parameters_of(ONE_BLOCK)
    kept = {name: change for name, change in lora.changes["flux"].items() if name in slots}
    first = Lora({"flux": kept}, lora.format)
    # On shapes alone, nothing is read and nothing allocated.
    merged = jax.eval_shape(lambda model: merge(model, [first]), ONE_BLOCK)
    assert merged.config.in_channels == (128 if name == "control" else 64)
    assert merged.config.out_channels == 64
