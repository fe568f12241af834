"""Compile the attention kernels for TPUs on a machine without one, and measure their VMEM.

The kernels are flash_tpu and the one that makes its queries, keys and values. A block size that
does not fit is an error in its row. Needs libtpu beside jax, and JAX_PLATFORMS=cpu, so that JAX
does not look for a TPU.
"""

import argparse
import os
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from fluxjax.kernels import qkv_tpu
from fluxjax.kernels.block_sizes import PRESETS
from fluxjax.kernels.flash_tpu import flash_attention_tpu
from fluxjax.kernels.flash_tpu_blocks import flash_vmem_bytes, tpu_block_sizes

TOPOLOGIES = {
    "v4": {"topology_name": "v4:2x2x1", "chip_config_name": "megacore"},
    "v5e": {"topology_name": "v5e:2x2"},
    "v5p": {"topology_name": "v5p:2x2x1"},
    "v6e": {"topology_name": "v6e:2x2"},
}
KERNELS = {"forward": ["forward"], "gradient": ["forward", "dq", "dkv"]}
# How a compiled program names a kernel, and says the VMEM that the compiler allocated for it.
_NAME = re.compile(r"(?:flash_)?(forward|dq|dkv|heads)\S* = .*custom-call\(")
_USED = re.compile(
    r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)"'
)


def used_vmem(program: str) -> dict[str, int]:
    """Return the bytes of VMEM that the compiler allocated for each kernel of a program."""
    found = {}
    for line in program.splitlines():
        name, used = _NAME.search(line), _USED.search(line)
        if name and used:
            found[name[1]] = int(used[1])
    return found


def run_of(flash: Callable, kind: str, **options: Any) -> Callable:
    """Return a function of q, k, v, the gradient of the result, and optionally a key length.

    It runs the forward pass, or the gradient, which includes it.
    """
    mix = partial(flash, scale=128**-0.5, **options)
    if kind == "forward":
        return lambda q, k, v, grad, length=None: mix(q, k, v, key_length=length)
    return lambda q, k, v, grad, length=None: jax.vjp(
        lambda *x: mix(*x, key_length=length), q, k, v
    )[1](grad)


def compiled_row(
    chip: str, device: Any, tokens: int, preset: str | None, kind: str, batch: int | None
) -> dict[str, Any]:
    """Compile flash_tpu for 24 heads of 128.

    **Arguments:** `preset`: block sizes, a name in `PRESETS`. `kind`: a key of `KERNELS`.
    """
    block_sizes = None if preset is None else PRESETS[preset]
    row = {
        "bench": "flash-aot",
        "chip": chip,
        "tokens": tokens,
        "batch": batch,
        "pass": kind,
        "blocks": preset or "default",
    }
    try:
        sizes = tpu_block_sizes(tokens, tokens, 128, jnp.bfloat16, chip, block_sizes)
    except ValueError as error:  # blocks that do not fit are a result
        return row | {"error": str(error)}
    computed = {
        kernel: flash_vmem_bytes(kernel, sizes[kernel], 128, jnp.bfloat16)
        for kernel in KERNELS[kind]
    }
    row["sizes"] = {kernel: sizes[kernel] for kernel in KERNELS[kind]}
    row["VMEM MiB by shapes"] = {
        kernel: round(size / 2**20, 1) for kernel, size in computed.items()
    }
    where, rows = SingleDeviceSharding(device), (batch,) if batch else ()
    x = jax.ShapeDtypeStruct((*rows, tokens, 24, 128), jnp.bfloat16, sharding=where)
    # Each example of a batch has its own key length, so that masking is compiled as well.
    lengths = [jax.ShapeDtypeStruct(rows, jnp.int32, sharding=where)] if batch else []
    start = time.perf_counter()
    run = run_of(flash_attention_tpu, kind, chip=chip, block_sizes=block_sizes)
    program = jax.jit(jax.vmap(run) if batch else run).lower(x, x, x, x, *lengths).compile()
    used = used_vmem(program.as_text())
    return row | {
        "VMEM MiB by compiler": {kernel: round(size / 2**20, 1) for kernel, size in used.items()},
        "temporaries MiB": round(program.memory_analysis().temp_size_in_bytes / 2**20, 1),
        "compile s": round(time.perf_counter() - start, 1),
    }


def heads_row(chip: str, device: Any, counts: list[int], batch: int | None) -> dict[str, Any]:
    """Compile the kernel that makes queries, keys and values from projections.

    **Arguments:** `counts`: tokens of one part, as in single blocks, or of two, as in double ones.
    """
    columns, width, rows = (21504 if len(counts) == 1 else 9216), 3072, (batch,) if batch else ()

    def struct(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    def run(projected: list[jax.Array], scale: jax.Array, factor: jax.Array) -> list[jax.Array]:
        parts = [(x, scale, scale) for x in projected]
        return qkv_tpu.fused_qkv_tpu(parts, (factor, factor), width=width, eps=1e-6, chip=chip)

    projected = [struct(*rows, count, columns) for count in counts]
    start, size = time.perf_counter(), qkv_tpu.qkv_block_tokens(counts, width, jnp.bfloat16, chip)
    mapped = jax.vmap(run, in_axes=(0, None, None)) if batch else run
    inputs = projected, struct(128), struct(sum(counts), 128, dtype=jnp.float32)
    used = used_vmem(jax.jit(mapped).lower(*inputs).compile().as_text())
    return {
        "bench": "flash-aot",
        "chip": chip,
        "tokens": counts,
        "batch": batch,
        "pass": "heads",
        "sizes": {"heads": size},
        "VMEM MiB by shapes": {
            "heads": round(
                qkv_tpu.qkv_vmem_bytes(size, width, jnp.bfloat16, len(counts)) / 2**20, 1
            )
        },
        "VMEM MiB by compiler": {kernel: round(size / 2**20, 1) for kernel, size in used.items()},
        "compile s": round(time.perf_counter() - start, 1),
    }


def bench_flash(options: argparse.Namespace) -> list[dict]:
    """Compile both passes for each chip, number of tokens and choice of blocks."""
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    found = []
    for chip in options.chips:
        device = topologies.get_topology_desc(platform="tpu", **TOPOLOGIES[chip]).devices[0]
        cases = [(tokens, None, None) for tokens in options.tokens] + [(1536, None, 2)]
        cases += [
            (4608, "trillium", None),
            (4608, "trillium-dev", None),
            (4352, "trillium-schnell", None),
        ]
        for tokens, preset, batch in cases:
            for kind in KERNELS:
                found.append(compiled_row(chip, device, tokens, preset, kind, batch))
                print(found[-1], flush=True)
        heads = [[tokens] for tokens in options.tokens] + [[512, 4096], [256, 4096]]
        for counts, batch in [*((counts, None) for counts in heads), ([512, 1024], 2)]:
            found.append(heads_row(chip, device, counts, batch))
            print(found[-1], flush=True)
    return found


def add_commands(commands: Any) -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "flash-aot", help="VMEM of the attention kernels for TPUs, without a TPU"
    )
    parser.set_defaults(run=bench_flash)
    parser.add_argument("--chips", nargs="+", choices=TOPOLOGIES, default=list(TOPOLOGIES))
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[4608, 4352, 1536, 4133, 77],
        help="(default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, help="append the rows as JSON lines to this file")
