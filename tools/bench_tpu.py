"""Compile full-size sampling for TPUs ahead of time, without one: bytes a device and the collectives of the program.

Needs libtpu beside jax, and JAX_PLATFORMS=cpu, so that nothing looks for a TPU.
"""

import argparse
import os
import re
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fluxjax import Flux, FluxConfig
from fluxjax.generate import Text, denoise
from fluxjax.shard import ROWS, make_mesh, specs

# Name, chips, usable GiB of each device.
CHIPS = {
    "v6e-4": ({"topology_name": "v6e:2x2"}, 31.24),
    "v6e-8": ({"topology_name": "v6e:2x4"}, 31.24),
    "v4-8": ({"topology_name": "v4:2x2x1", "chip_config_name": "megacore"}, 30.75),
}
VARIANTS = {"dev": (FluxConfig.dev(), 512, 28), "schnell": (FluxConfig.schnell(), 256, 4)}
_COLLECTIVE = re.compile(
    r"= (?P<type>.*?) (?P<kind>all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(-start)?\("
)
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1, "f16": 2}


def structs(tree: Any, shardings: Any) -> Any:
    """Return shapes on their devices."""
    return jax.tree.map(lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree, shardings)


def lowered(config: FluxConfig, txt_tokens: int, steps: int, mesh: Mesh, size: int) -> Any:
    """Return one image a row of the mesh, lowered."""
    flux = eqx.filter_eval_shape(Flux, config, key=jax.random.key(0))
    flux = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), flux)
    flux = structs(flux, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(flux, mesh)))
    rows, everywhere = NamedSharding(mesh, ROWS), NamedSharding(mesh, PartitionSpec())
    images, side = mesh.shape["data"] * mesh.shape["fsdp"], size // 8

    def row(*shape: int, dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((images, *shape), dtype, sharding=rows)

    text = Text(row(txt_tokens, config.context, dtype=jnp.bfloat16), row(config.pooled, dtype=jnp.bfloat16))
    noise = row(16, side, side, dtype=jnp.float32)
    times = jax.ShapeDtypeStruct((steps + 1,), jnp.float32, sharding=everywhere)
    scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere) if config.guidance_embed else None

    def run(flux: Flux, text: Text, noise: Any, times: Any, scale: Any) -> Any:
        return denoise.__wrapped__(flux, text, noise, times, scale, mesh=mesh)

    return jax.jit(run).lower(flux, text, noise, times, scale)


def collectives(program: str) -> dict[str, tuple[int, float]]:
    """Return how often each kind stands in a compiled program, and the bytes that come out of one run of each."""
    found: dict[str, list[float]] = defaultdict(list)
    for match in _COLLECTIVE.finditer(program):
        shapes = _SHAPE.findall(match["type"])
        # Of an asynchronous one's pair of operand and result, the larger is what it makes.
        sizes = [_BYTES.get(dtype, 4) * _product(dims) for dtype, dims in shapes]
        found[match["kind"]].append(max(sizes, default=0))
    return {kind: (len(sizes), sum(sizes)) for kind, sizes in found.items()}


def _product(dims: str) -> int:
    total = 1
    for dim in filter(None, dims.split(",")):
        total *= int(dim)
    return total


def bench_tpu(options: argparse.Namespace) -> list[dict]:
    """Compile each variant for each machine, data-parallel and FSDP."""
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    rows = []
    for chip in options.chips:
        where, limit = CHIPS[chip]
        devices = topologies.get_topology_desc(platform="tpu", **where).devices
        for variant in options.variants:
            for axis in options.axes:
                mesh = make_mesh(**{axis: -1}, devices=devices)
                row = {"machine": chip, "devices": len(devices), "model": variant, "mesh": axis, "limit GiB": limit}
                try:
                    row |= measured(*VARIANTS[variant], mesh, options.size)
                except Exception as error:  # a row that does not fit is a result
                    row |= {"error": str(error).splitlines()[0][:200]}
                print(row, flush=True)
                rows.append(row)
    return rows


def add_commands(commands: Any) -> None:
    """Add the sub-command."""
    tpu = commands.add_parser("tpu-aot", help="full-size dev and schnell compiled for TPUs, without one")
    tpu.set_defaults(run=bench_tpu)
    tpu.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    tpu.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    tpu.add_argument("--axes", nargs="+", choices=("data", "fsdp"), default=["data", "fsdp"])
    tpu.add_argument("--size", type=int, default=1024, help="pixels along a side (default: %(default)s)")
    tpu.add_argument("--output", type=Path, help="a file that JSON lines are appended to")


def measured(config: FluxConfig, txt_tokens: int, steps: int, mesh: Mesh, size: int) -> dict[str, Any]:
    start = time.perf_counter()
    compiled = lowered(config, txt_tokens, steps, mesh, size).compile()
    memory, gib = compiled.memory_analysis(), 2**30
    moved = collectives(compiled.as_text())
    return {
        "compile s": round(time.perf_counter() - start, 1),
        "arguments GiB": round(memory.argument_size_in_bytes / gib, 2),
        "temporaries GiB": round(memory.temp_size_in_bytes / gib, 2),
        "collectives": {kind: f"{count} x, {total / 1e6:.1f} MB" for kind, (count, total) in moved.items()},
    }
