"""Compile full-size sampling for TPUs on a machine without one.

Measures the bytes on each device, and a step's operations and communication next to the formulas of
tools/bench/scaling.py. Needs libtpu beside jax, and JAX_PLATFORMS=cpu, so that JAX does not look
for a TPU.
"""

import argparse
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from bench_parts import DEVICE_MODULES, VARIANTS, pretended, sample_latents
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from program import read
from scaling import AXES, Work

from fluxjax import Flux, FluxConfig
from fluxjax.devices.mesh import make_mesh
from fluxjax.devices.run import ROWS
from fluxjax.devices.specs import specs
from fluxjax.devices.streamed import HostWeight
from fluxjax.generate import TextStates
from fluxjax.kernels.attention import IMPLEMENTATIONS
from fluxjax.nets.packed import PackedWeight
from fluxjax.nets.packed_formats import PACKED_FORMATS
from fluxjax.nets.quantized import EIGHT_BITS, QuantizedWeight
from fluxjax.nets.stack import is_rounded, is_stacked, path_name
from fluxjax.nets.weight import Dense

# By name: the topology, and the usable GiB of each device.
CHIPS = {
    "v6e-4": ({"topology_name": "v6e:2x2"}, 31.24),
    "v6e-8": ({"topology_name": "v6e:2x4"}, 31.24),
    "v6e-16": ({"topology_name": "v6e:4x4"}, 31.24),
    "v4-8": ({"topology_name": "v4:2x2x1", "chip_config_name": "megacore"}, 30.75),
    "v5e-4": ({"topology_name": "v5e:2x2"}, 15.75),
}
STREAM = "stream"
"""In place of a mesh axis: one device, to which blocks are streamed from the host's memory."""


def structs(tree: Any, shardings: Any) -> Any:
    """Return the shapes of a pytree with their shardings."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        tree,
        shardings,
    )


class Form(NamedTuple):
    """How a network is compiled.

    `stream`: whether its blocks are streamed. `attention`: an implementation. `heads`: whether
    queries, keys and values are made by their kernel. `quantize`: an 8-bit format.
    """

    stream: bool = False
    attention: str | None = None
    heads: bool = True
    quantize: str | None = None


def lowered(
    config: FluxConfig, txt_tokens: int, steps: int, mesh: Mesh, size: int, form: Form
) -> Any:
    """Lower the sampling of one image for each row of the mesh."""
    stream = form.stream
    flux = eqx.filter_eval_shape(Flux, config, key=jax.random.key(0))
    flux = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), flux)
    if form.quantize is not None:
        flux = eight_bits(flux, EIGHT_BITS[form.quantize])
    flux = structs(flux, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(flux, mesh)))
    if stream:
        flux = hosted(flux, NamedSharding(mesh, PartitionSpec(), memory_kind="pinned_host"))
    rows, everywhere = NamedSharding(mesh, ROWS), NamedSharding(mesh, PartitionSpec())
    images, side = mesh.shape["data"] * mesh.shape["fsdp"], size // 8

    def row(*shape: int, dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((images, *shape), dtype, sharding=rows)

    states = TextStates(
        row(txt_tokens, config.context, dtype=jnp.bfloat16), row(config.pooled, dtype=jnp.bfloat16)
    )
    noise = row(16, side, side, dtype=jnp.float32)
    times = jax.ShapeDtypeStruct((steps + 1,), jnp.float32, sharding=everywhere)
    scale = (
        jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)
        if config.guidance_embed
        else None
    )

    run = partial(sample_latents, attention=form.attention, mesh=None if stream else mesh)
    # Unless nets.heads sees a TPU too, it does not choose the kernel.
    modules = [name for name in DEVICE_MODULES if form.heads or name != "nets.heads"]
    with pretended(mesh.devices.flat[0], modules):
        return jax.jit(run).lower(flux, states, noise, times, scale)


def eight_bits(flux: Flux, dtype: Any) -> Flux:
    """Return the shapes of the result of `fluxjax.quantize`."""

    def place(path: Any, node: Any) -> Any:
        if not isinstance(node, Dense) or not is_rounded(path_name(path)):
            return node
        shape = node.value.shape
        parts = (jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(shape[:-1], jnp.float32))
        empty = QuantizedWeight(jnp.zeros((0, 0), jnp.int8), jnp.zeros(0))
        return eqx.tree_at(lambda weight: (weight.value, weight.scale), empty, parts)

    return jax.tree_util.tree_map_with_path(
        place, flux, is_leaf=lambda node: isinstance(node, Dense)
    )


def packed(flux: Flux, format: str) -> Flux:
    """Return the shapes of a network whose blocks' matrices are packed, where they divide."""
    sizes = PACKED_FORMATS[format]

    def place(path: Any, node: Any) -> Any:
        if not isinstance(node, Dense) or path[0].name not in ("double", "single"):
            return node
        *rows, features = node.value.shape
        shape = (*rows, features // sizes.values * sizes.nbytes)
        empty = PackedWeight(jnp.zeros((0, 0), jnp.uint8), format)
        struct = jax.ShapeDtypeStruct(shape, jnp.uint8)
        return eqx.tree_at(lambda weight: weight.value, empty, struct)

    return jax.tree_util.tree_map_with_path(
        place, flux, is_leaf=lambda node: isinstance(node, Dense)
    )


def hosted(flux: Flux, host: NamedSharding) -> Flux:
    """Return the shapes of the result of `fluxjax.stream_blocks`."""

    def place(path: Any, node: Any) -> Any:
        stays = isinstance(node, Dense) and is_stacked(path_name(path))
        if not stays:
            return node
        empty = HostWeight(Dense(jnp.zeros((0, 0))))
        return eqx.tree_at(lambda weight: weight.stored.value, empty, struct(node.value))

    def struct(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=host)

    return jax.tree_util.tree_map_with_path(
        place, flux, is_leaf=lambda node: isinstance(node, Dense)
    )


def compiled_text(lowered: Any, flags: dict[str, str]) -> tuple[Any, str]:
    """Compile a program; return it and its text, as the compiler dumps it.

    `as_text` fails on loops whose copies libtpu starts one iteration ahead.
    """
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(
            compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True, **flags}
        )
        (dump,) = Path(folder).glob("*.after_optimizations.txt")
        return compiled, dump.read_text()


def bench_tpu(options: argparse.Namespace) -> list[dict]:
    """Compile each variant for each machine, split over each axis."""
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    rows, flags = [], dict(flag.split("=") for flag in options.flags)
    for chip in options.chips:
        where, limit = CHIPS[chip]
        devices = topologies.get_topology_desc(platform="tpu", **where).devices
        for variant in options.variants:
            for axis in options.axes:
                stream = axis == STREAM
                mesh = (
                    make_mesh(devices=devices[:1])
                    if stream
                    else make_mesh(**{axis: -1}, devices=devices)
                )
                form = Form(stream, options.attention, options.heads, options.quantize)
                row = {
                    "machine": chip,
                    "devices": mesh.size,
                    "model": variant,
                    "mesh": axis,
                    "limit GiB": limit,
                    **flags,
                }
                row |= {
                    "attention": options.attention or "default",
                    "heads": "kernel" if options.heads else "xla",
                }
                row |= {"quantize": options.quantize}
                try:
                    row |= measured(*VARIANTS[variant], mesh, options.size, flags, form)
                    row |= expected(
                        *VARIANTS[variant], "data" if stream else axis, mesh.size, options.size, row
                    )
                except Exception as error:  # a row that does not fit is a result
                    row |= {"error": str(error).splitlines()[0][:200]}
                print(row, flush=True)
                rows.append(row)
    return rows


def add_commands(commands: Any) -> None:
    """Add the sub-command."""
    tpu = commands.add_parser(
        "tpu-aot", help="full-size dev and schnell compiled for TPUs, without a TPU"
    )
    tpu.set_defaults(run=bench_tpu)
    tpu.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    tpu.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    tpu.add_argument("--axes", nargs="+", choices=[*AXES, STREAM], default=list(AXES))
    tpu.add_argument(
        "--size", type=int, default=1024, help="pixels along a side (default: %(default)s)"
    )
    tpu.add_argument(
        "--attention",
        choices=IMPLEMENTATIONS,
        help="(default: that of a TPU: flash_tpu, or ring attention)",
    )
    tpu.add_argument(
        "--xla-heads",
        dest="heads",
        action="store_false",
        help="make queries, keys and values by XLA instead of the kernel",
    )
    tpu.add_argument("--quantize", choices=EIGHT_BITS, help="8-bit weights and matmuls")
    tpu.add_argument(
        "--flags", nargs="+", default=[], metavar="NAME=VALUE", help="flags of the compiler"
    )
    tpu.add_argument("--output", type=Path, help="append the rows as JSON lines to this file")


def measured(
    config: FluxConfig,
    txt_tokens: int,
    steps: int,
    mesh: Mesh,
    size: int,
    flags: dict[str, str],
    form: Form,
) -> dict[str, Any]:
    """Return the memory of a compiled program, and a step's operations and communication."""
    start = time.perf_counter()
    compiled, text = compiled_text(lowered(config, txt_tokens, steps, mesh, size, form), flags)
    memory, gib = compiled.memory_analysis(), 2**30
    step = read(text).times(1 / steps)
    return {
        "compile s": round(time.perf_counter() - start, 1),
        "arguments GiB": round(memory.argument_size_in_bytes / gib, 2),
        "temporaries GiB": round(memory.temp_size_in_bytes / gib, 2),
        "host GiB": round(memory.host_argument_size_in_bytes / gib, 2),
        "TFLOP": round(step.flop / 1e12, 3),
        "kernels' TFLOP": round(step.declared / 1e12, 3),
        "TOP of 8 bits": round(step.eight / 1e12, 3),
        "GB copied": round(step.copied / 1e9, 2),
        "GB sent": round(step.sent / 1e9, 4),
        "collectives": {
            kind: f"{moved.count:.1f} x, {moved.asynchronous:.1f} asynchronous, "
            f"{moved.sent / 1e9:.4f} GB sent"
            for kind, moved in step.moved.items()
        },
    }


def expected(
    config: FluxConfig,
    txt_tokens: int,
    steps: int,
    axis: str,
    chips: int,
    size: int,
    row: dict[str, Any],
) -> dict[str, Any]:
    """Return a step's costs by the formulas, and how the compiled program's compare."""
    cost = AXES[axis](Work(config, (size // 16) ** 2, txt_tokens, steps), chips)
    if cost is None:
        return {}
    computed = row["TFLOP"] + row["kernels' TFLOP"] + row["TOP of 8 bits"]
    return {
        "TFLOP by formula": round(cost.flop / 1e12, 3),
        "GB sent by formula": round(cost.sent / 1e9, 4),
        "TFLOP ratio": round(computed / (cost.flop / 1e12), 4),
        "GB sent ratio": round(row["GB sent"] / (cost.sent / 1e9), 4) if cost.sent else None,
    }
