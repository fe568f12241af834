"""Measure how an adapter is merged: time beside a plain pass over the same bytes, and the memory that it takes."""

import argparse
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from bench_parts import random_flux

import fluxjax
from fluxjax import Flux, FluxConfig, Lora
from fluxjax.checkpoint.weights import parameters_of
from fluxjax.nets.stack import leaf_names


def random_lora(flux: Flux, rank: int) -> Lora:
    """Return an adapter of every block's attention and MLP, whose factors are bfloat16 and not zero."""
    lora = fluxjax.init_lora(flux, rank, key=jax.random.key(0))
    return jax.tree.map(lambda x: (x + 0.01).astype(jnp.bfloat16) if x.ndim else x, lora)


@partial(jax.jit, donate_argnums=0)
def touched(leaf: jax.Array) -> jax.Array:
    """Read and write every value in its place."""
    return leaf + jnp.asarray(0.001, leaf.dtype)


def plain_pass(flux: Flux, names: set[str]) -> Flux:
    """Read and write the leaves that an adapter changes."""
    leaves, structure = jax.tree.flatten(flux)
    listed = leaf_names(flux)
    return jax.tree.unflatten(
        structure,
        [
            touched(leaf) if name in names else leaf
            for name, leaf in zip(listed, leaves, strict=True)
        ],
    )


def resident(name: str) -> int:
    """Return a figure of this process's memory, in bytes; 0 where the system tells none."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


def reset_peak() -> None:
    """Begin the peak of this process's memory anew, where the system can."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def bench_merge(options: argparse.Namespace) -> list[dict]:
    """Merge into a few blocks of the official width, in place and in turns with a plain pass; the fastest of each counts."""
    flux = random_flux(
        replace(FluxConfig.dev(), double_depth=options.blocks[0], single_depth=options.blocks[1])
    )
    lora = random_lora(flux, options.rank)
    slots = parameters_of(flux)
    changed = [slots[name] for name in lora.changes["flux"]]
    listed = leaf_names(flux)
    names = {listed[slot.leaf] for slot in changed}
    nbytes = sum(
        leaf.nbytes
        for name, leaf in zip(listed, jax.tree.leaves(flux), strict=True)
        if name in names
    )
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(flux))
    best = {"merge": float("inf"), "pass": float("inf")}
    peak = 0
    for _ in range(options.repeats + 1):  # the first compiles
        for what in best:
            jax.block_until_ready(flux)
            reset_peak()
            before, start = resident("VmRSS"), time.perf_counter()
            flux = (
                fluxjax.merge(flux, [lora], [0.5], donate=True)
                if what == "merge"
                else plain_pass(flux, names)
            )
            jax.block_until_ready(flux)
            spent = time.perf_counter() - start
            best[what] = min(best[what], spent)
            peak = max(peak, resident("VmHWM") - before) if what == "merge" else peak
    stats = jax.devices()[0].memory_stats() or {}
    on_device = stats.get("peak_bytes_in_use")
    return [
        {
            "bench": "lora-merge",
            "rank": options.rank,
            "blocks": list(options.blocks),
            "matrices": len(changed),
            "gigabytes": nbytes / 1e9,
            "merge_seconds": best["merge"],
            "pass_seconds": best["pass"],
            "merge_over_pass": best["merge"] / best["pass"],
            "host_peak_above_model_gigabytes": peak / 1e9,
            "device_peak_above_model_gigabytes": None
            if on_device is None
            else (on_device - whole) / 1e9,
        }
    ]


def add_commands(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "lora", help="merging an adapter, beside a plain pass over the same bytes"
    )
    command.set_defaults(run=bench_merge)
    command.add_argument(
        "--blocks",
        type=int,
        nargs=2,
        default=(2, 4),
        metavar=("DOUBLE", "SINGLE"),
        help="(default: 2 4)",
    )
    command.add_argument("--rank", type=int, default=16, help="(default: %(default)s)")
    command.add_argument("--repeats", type=int, default=3, help="(default: %(default)s)")
    command.add_argument("--output", type=Path, help="a file that JSON lines are appended to")
