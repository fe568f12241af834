"""Measure how long full-size sampling takes to trace and compile, without weights, and what importing the package costs."""

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

from fluxjax import Flux, FluxConfig
from fluxjax.generate.draw import denoise
from fluxjax.generate.text import Text

VARIANTS = {"dev": (FluxConfig.dev(), 512, 28), "schnell": (FluxConfig.schnell(), 256, 4)}
IMPORT = """
import json, sys, time
start = time.perf_counter()
import jax, jax.numpy
middle = time.perf_counter()
import fluxjax
end = time.perf_counter()
heavy = [name for name in ("torch", "matplotlib", "diffrax", "optax", "transformers", "diffusers") if name in sys.modules]
print(json.dumps([middle - start, end - middle, heavy]))
"""


def abstract_inputs(config: FluxConfig, txt_tokens: int, steps: int, size: int) -> tuple[Any, ...]:
    """Return the shapes of what `denoise` takes, for one image, the weights in bfloat16."""
    flux = eqx.filter_eval_shape(Flux, config, key=jax.random.key(0))
    flux = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), flux)
    shape = jax.ShapeDtypeStruct
    text = Text(
        shape((1, txt_tokens, config.context), jnp.bfloat16),
        shape((1, config.pooled), jnp.bfloat16),
    )
    noise, times = (
        shape((1, 16, size // 8, size // 8), jnp.float32),
        shape((steps + 1,), jnp.float32),
    )
    return flux, text, noise, times, shape((), jnp.float32) if config.guidance_embed else None


def bench_compile(options: argparse.Namespace) -> list[dict]:
    """Trace, lower and compile each variant; nothing is run. Then import the package in new processes."""
    rows: list[dict[str, Any]] = []
    for name in options.variants:
        inputs = abstract_inputs(*VARIANTS[name], options.size)
        start = time.perf_counter()
        lowered = jax.jit(lambda *inputs: denoise.__wrapped__(*inputs)).lower(*inputs)
        middle = time.perf_counter()
        lowered.compile()
        end = time.perf_counter()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        seconds = {
            "trace s": round(middle - start, 2),
            "compile s": round(end - middle, 2),
            "both s": round(end - start, 2),
        }
        rows.append(
            {
                "bench": "compile",
                "variant": name,
                "size": options.size,
                **seconds,
                "peak GB": round(peak, 2),
            }
        )
    found = [json.loads(subprocess.check_output([sys.executable, "-c", IMPORT])) for _ in range(5)]
    jax_seconds, own = (round(statistics.median(one[i] for one in found), 2) for i in range(2))
    rows.append(
        {"bench": "import", "jax s": jax_seconds, "fluxjax beyond it s": own, "heavy": found[0][2]}
    )
    return rows


def add_commands(commands: argparse._SubParsersAction) -> None:
    compile_ = commands.add_parser(
        "compile", help="tracing and compiling full-size sampling, and importing"
    )
    compile_.set_defaults(run=bench_compile)
    compile_.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    compile_.add_argument(
        "--size", type=int, default=1024, help="pixels along a side (default: %(default)s)"
    )
    compile_.add_argument("--output", type=Path, help="a file that JSON lines are appended to")
