"""Measure how long full-size sampling takes to trace and compile, and fluxjax to import.

No weights are needed: only shapes are traced, and nothing is run.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from bench_parts import VARIANTS, sample_latents

from fluxjax import Flux, FluxConfig
from fluxjax.generate import TextStates

IMPORT = """
import json, sys, time
start = time.perf_counter()
import jax, jax.numpy
middle = time.perf_counter()
import fluxjax
end = time.perf_counter()
optional = ("torch", "matplotlib", "diffrax", "optax", "transformers", "diffusers")
heavy = [name for name in optional if name in sys.modules]
print(json.dumps([middle - start, end - middle, heavy]))
"""
"""Prints the seconds of importing jax and fluxjax, and which heavy packages came along."""
IMPORTS = 5


def abstract_inputs(
    config: FluxConfig, txt_tokens: int, steps: int, size: int
) -> tuple[Flux, TextStates, *tuple[Any, ...]]:
    """Return the shapes that `sample_latents` takes for one image, with bfloat16 weights."""
    flux = eqx.filter_eval_shape(Flux, config, key=jax.random.key(0))
    flux = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), flux)
    states = TextStates(
        jax.ShapeDtypeStruct((1, txt_tokens, config.context), jnp.bfloat16),
        jax.ShapeDtypeStruct((1, config.pooled), jnp.bfloat16),
    )
    noise = jax.ShapeDtypeStruct((1, 16, size // 8, size // 8), jnp.float32)
    times = jax.ShapeDtypeStruct((steps + 1,), jnp.float32)
    guidance = None
    if config.guidance_embed:
        guidance = jax.ShapeDtypeStruct((), jnp.float32)
    return flux, states, noise, times, guidance


def compile_row(name: str, size: int) -> dict[str, Any]:
    """Trace, lower and compile the sampling of one image."""
    inputs = abstract_inputs(*VARIANTS[name], size)
    start = time.perf_counter()
    lowered = jax.jit(sample_latents).lower(*inputs)
    middle = time.perf_counter()
    lowered.compile()
    end = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {
        "bench": "compile",
        "variant": name,
        "size": size,
        "trace s": round(middle - start, 2),
        "compile s": round(end - middle, 2),
        "both s": round(end - start, 2),
        "peak GB": round(peak, 2),
    }


def import_row() -> dict[str, Any]:
    """Import the package in several new processes; the median counts."""
    jax_seconds, fluxjax_seconds = [], []
    for _ in range(IMPORTS):
        printed = subprocess.check_output([sys.executable, "-c", IMPORT])
        of_jax, of_fluxjax, heavy = json.loads(printed)
        jax_seconds.append(of_jax)
        fluxjax_seconds.append(of_fluxjax)
    return {
        "bench": "import",
        "jax s": round(statistics.median(jax_seconds), 2),
        "fluxjax beyond it s": round(statistics.median(fluxjax_seconds), 2),
        "heavy": heavy,
    }


def bench_compile(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Compile each variant, then import the package in new processes."""
    rows = [compile_row(name, options.size) for name in options.variants]
    return [*rows, import_row()]


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "compile", help="how long full-size sampling takes to trace and compile, and the import"
    )
    parser.set_defaults(run=bench_compile)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument(
        "--size", type=int, default=1024, help="pixels along a side (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="append the rows as JSON lines to this file")
