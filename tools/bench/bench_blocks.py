"""Compile one block of dev for devices that need not be here: the bytes that its kernels move.

A loop over a few stacked blocks is compiled, as the transformer runs them, and one iteration of it
counted. `block_budget.json` beside this file has the numbers that `tests/tools` hold programs to.
GPUs need jax's CUDA plugin with CUDA's packages, TPUs libtpu; both JAX_PLATFORMS=cpu.
"""

import argparse
import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import equinox as eqx
import jax
import jax.numpy as jnp
from bench_gpu_aot import GPUS, gpu_topology
from bench_parts import pretended
from bench_tpu import CHIPS, compiled_text, eight_bits
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from traffic import Traffic, loops

from fluxjax import Flux, FluxConfig
from fluxjax.kernels.chips import default_device
from fluxjax.nets.flux_attention import block_runner
from fluxjax.nets.flux_blocks import DoubleModulation
from fluxjax.nets.flux_prepare import without_modulation
from fluxjax.nets.flux_state import HiddenState, Modulation
from fluxjax.nets.layers import Rotation
from fluxjax.nets.quantized import EIGHT_BITS
from fluxjax.nets.scan import scan_blocks

BUDGET = Path(__file__).with_name("block_budget.json")
TARGETS = ("h200", "a100", "rtx4090", "v6e-4", "cpu")
_DEPTH = 4  # blocks of the stack, enough that XLA keeps the loop
_FP8 = ("h200", "rtx4090")


@dataclass(frozen=True, kw_only=True)
class BlockCase:
    """A block, and what it is compiled for.

    `target`: one of `TARGETS`. `block`: "double" or "single". `weights`: "bfloat16", "float32", or
    one of the 8-bit formats, beside activations in bfloat16. `img_tokens`, `txt_tokens`: of one
    image.
    """

    target: str
    block: str
    weights: str = "bfloat16"
    img_tokens: int = 4096
    txt_tokens: int = 512


def cases_of(target: str) -> list[BlockCase]:
    """Return the cases of a target."""
    # What XLA makes of bfloat16 on a CPU depends on the CPU's instructions.
    weights = ["float32"] if target == "cpu" else ["bfloat16", "int8"]
    if target in _FP8:
        weights.append("fp8")
    cases = []
    for block in ("double", "single"):
        cases += [BlockCase(target=target, block=block, weights=one) for one in weights]
    return cases


def missing_for(target: str) -> str | None:
    """Return what this installation lacks to compile for a target; None if it can."""
    if target == "cpu":
        return None
    plugins = ("libtpu",)
    if target in GPUS:
        plugins = ("jax_cuda13_plugin", "jax_cuda12_plugin")
    if all(importlib.util.find_spec(name) is None for name in plugins):
        return f"{' or '.join(plugins)} is not installed"
    if jax.config.jax_platforms != "cpu":
        return "JAX_PLATFORMS is not cpu, so that JAX would look for the device itself"
    return None


def compiled_block(case: BlockCase) -> tuple[Any, str]:
    """Return a compiled loop over blocks of one kind, and its text."""
    device, seen = _device(case.target)
    activations = jnp.float32 if case.weights == "float32" else jnp.bfloat16
    struct = partial(_struct, SingleDeviceSharding(device), activations)
    config = replace(FluxConfig.dev(), double_depth=_DEPTH, single_depth=_DEPTH)
    flux = eqx.filter_eval_shape(Flux, config, key=jax.random.key(0))
    flux = jax.tree.map(lambda leaf: struct(*leaf.shape), flux)
    if case.weights in EIGHT_BITS:
        flux = eight_bits(flux, EIGHT_BITS[case.weights])
    flux = jax.tree.map(lambda leaf: struct(*leaf.shape, dtype=leaf.dtype), flux)
    hidden = _hidden(case, config, struct)
    attention = "cudnn" if case.target in GPUS else None

    def run(blocks: Any, tokens: Any, hidden: HiddenState, modulation: Any) -> Any:
        runner = block_runner(hidden, attention, None)
        return scan_blocks(blocks, tokens, runner, inputs=(modulation, ()))

    double, single = without_modulation(flux.double, flux.single)
    blocks, tokens, modulation = double, (hidden.img, hidden.txt), hidden.modulation.double
    if case.block == "single":
        joint = struct(case.txt_tokens + case.img_tokens, config.width)
        blocks, tokens, modulation = single, joint, hidden.modulation.single
    with pretended(seen):
        lowered = jax.jit(run).lower(blocks, tokens, hidden, modulation)
    if case.target in CHIPS:
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        return compiled_text(lowered, {})
    # On a GPU XLA can choose Triton's products only by trying them.
    options = {"xla_gpu_enable_triton_gemm": False} if case.target in GPUS else None
    compiled = lowered.compile(compiler_options=options)
    return compiled, compiled.as_text()


def _device(target: str) -> tuple[Any, Any]:
    """Return a device to compile for, and what the traced code takes for the default device."""
    if target == "cpu":
        device = default_device()
        return device, device
    if target in CHIPS:
        where, _ = CHIPS[target]
        device = topologies.get_topology_desc(platform="tpu", **where).devices[0]
        return device, device
    (device,) = gpu_topology(target).devices
    capability = f"{GPUS[target]['major']}.{GPUS[target]['minor']}"
    seen = mock.Mock(spec=jax.Device, platform="gpu", compute_capability=capability)
    return device, seen


def _struct(where: Any, activations: Any, *shape: int, dtype: Any = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype or activations, sharding=where)


def _hidden(case: BlockCase, config: FluxConfig, struct: Any) -> HiddenState:
    """Return the shapes of what goes through the blocks."""
    width, pairs = config.width, sum(config.rope_axes) // 2
    of_stream = struct(_DEPTH, 6 * width)
    modulation = Modulation(DoubleModulation(of_stream, of_stream), struct(_DEPTH, 3 * width), None)
    angles = struct(case.txt_tokens + case.img_tokens, pairs, dtype=jnp.float32)
    return HiddenState(
        struct(case.img_tokens, width),
        struct(case.txt_tokens, width),
        modulation,
        Rotation(angles, angles),
    )


def block_traffic(text: str) -> Traffic:
    """Return the traffic of one block: of an iteration of the loop that moves the most."""
    return loops(text)[0]


def measure(case: BlockCase) -> dict[str, Any]:
    """Return a row of what a block moves and needs."""
    compiled, text = compiled_block(case)
    moved = block_traffic(text)
    kinds = {kind: round(count / 1e6, 1) for kind, count in moved.kinds.items() if count >= 5e4}
    return {
        "jax": jax.__version__,
        **asdict(case),
        "MB moved": round(moved.moved / 1e6, 1),
        "kernels": int(moved.kernels),
        "temporaries MB": round(compiled.memory_analysis().temp_size_in_bytes / 1e6, 1),
        "MB by kind": kinds,
    }


def budget_of(case: BlockCase) -> dict[str, Any] | None:
    """Return the row of the budget for a case and this version of JAX, if there is one."""
    wanted = {"jax": jax.__version__, **asdict(case)}
    for row in json.loads(BUDGET.read_text()):
        if all(row[name] == value for name, value in wanted.items()):
            return row
    return None


def write_budget(rows: Sequence[dict[str, Any]]) -> None:
    """Put rows into the budget, in place of those of the same cases."""

    def key(row: dict[str, Any]) -> tuple[str, ...]:
        names = ("target", "block", "weights", "img_tokens", "txt_tokens", "jax")
        return tuple(str(row[name]) for name in names)

    kept = {key(row): row for row in json.loads(BUDGET.read_text())} if BUDGET.exists() else {}
    kept |= {key(row): row for row in rows}
    lines = [json.dumps(kept[one]) for one in sorted(kept)]
    BUDGET.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def bench_blocks(options: argparse.Namespace) -> list[dict]:
    """Compile the blocks of each target that this installation can compile for."""
    rows = []
    for target in options.targets:
        lacking = missing_for(target)
        if lacking is not None:
            print(f"{target}: {lacking}", flush=True)
            continue
        for case in cases_of(target):
            rows.append(measure(case))
            print(rows[-1], flush=True)
    if options.write:
        write_budget(rows)
    return rows


def add_commands(commands: Any) -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "blocks", help="bytes that one block's kernels move, compiled for devices, without them"
    )
    parser.set_defaults(run=bench_blocks)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--write", action="store_true", help=f"put the rows into {BUDGET.name}")
    parser.add_argument("--output", type=Path, help="append the rows as JSON lines to this file")
