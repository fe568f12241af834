"""Measure the time and memory of merging an adapter, relative to a plain pass over the weights."""

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
    """Return an adapter of all blocks' attention and MLPs; its bfloat16 factors are not zero."""
    lora = fluxjax.lora.init_lora(flux, rank, key=jax.random.key(0))
    return jax.tree.map(lambda x: (x + 0.01).astype(jnp.bfloat16) if x.ndim else x, lora)


@partial(jax.jit, donate_argnums=0)
def add_constant(leaf: jax.Array) -> jax.Array:
    """Read and write every value in place."""
    return leaf + jnp.asarray(0.001, leaf.dtype)


def plain_pass(flux: Flux, names: set[str]) -> Flux:
    """Read and write the leaves that an adapter changes."""
    leaves, structure = jax.tree.flatten(flux)
    listed = leaf_names(flux)
    changed = []
    for name, leaf in zip(listed, leaves, strict=True):
        changed.append(add_constant(leaf) if name in names else leaf)
    return jax.tree.unflatten(structure, changed)


def resident(name: str) -> int:
    """Return a number of /proc/self/status in bytes, as "VmRSS"; 0 where the system has none."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


def reset_peak() -> None:
    """Reset the recorded peak of this process's memory, where the system can."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def changed_leaves(flux: Flux, lora: Lora) -> tuple[set[str], int]:
    """Return the names of the leaves that an adapter changes, and their bytes."""
    slots, listed = parameters_of(flux), leaf_names(flux)
    names = {listed[slots[name].leaf] for name in lora.changes["flux"]}
    nbytes = 0
    for name, leaf in zip(listed, jax.tree.leaves(flux), strict=True):
        if name in names:
            nbytes += leaf.nbytes
    return names, nbytes


def device_peak(flux: Flux) -> float | None:
    """Return the peak of the device's memory beside the model in GB, if the device reports it."""
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" not in stats:
        return None
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(flux))
    return (stats["peak_bytes_in_use"] - whole) / 1e9


def bench_merge(options: argparse.Namespace) -> list[dict]:
    """Merge into a few blocks of the official width, in turns with a plain pass over the leaves.

    Both work in place; the shortest time of each counts.
    """
    double, single = options.blocks
    flux = random_flux(replace(FluxConfig.dev(), double_depth=double, single_depth=single))
    lora = random_lora(flux, options.rank)
    names, nbytes = changed_leaves(flux, lora)
    best = {"merge": float("inf"), "pass": float("inf")}
    peak = 0
    for _ in range(options.repeats + 1):  # the first one compiles
        for what in best:
            jax.block_until_ready(flux)
            reset_peak()
            before, start = resident("VmRSS"), time.perf_counter()
            if what == "merge":
                flux = fluxjax.merge(flux, [lora], [0.5], donate=True)
            else:
                flux = plain_pass(flux, names)
            jax.block_until_ready(flux)
            best[what] = min(best[what], time.perf_counter() - start)
            if what == "merge":
                peak = max(peak, resident("VmHWM") - before)
    return [
        {
            "bench": "lora-merge",
            "rank": options.rank,
            "blocks": list(options.blocks),
            "matrices": len(lora.changes["flux"]),
            "gigabytes": nbytes / 1e9,
            "merge_seconds": best["merge"],
            "pass_seconds": best["pass"],
            "merge_over_pass": best["merge"] / best["pass"],
            "host_peak_above_model_gigabytes": peak / 1e9,
            "device_peak_above_model_gigabytes": device_peak(flux),
        }
    ]


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add the sub-command."""
    command = commands.add_parser(
        "lora", help="merging an adapter, relative to a plain pass over the weights"
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
    command.add_argument("--output", type=Path, help="append the rows as JSON lines to this file")
