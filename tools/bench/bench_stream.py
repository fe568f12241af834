"""Measure block streaming: dev at full size from its file, and the memory that sampling takes.

The weights are random, in bfloat16.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import replace
from pathlib import Path

from bench_load import random_file

from fluxjax import FluxConfig

RUN = """
import json, sys, threading, time
import equinox as eqx
import jax, jax.numpy as jnp
import fluxjax
from fluxjax.generate import Recipe, TextStates, denoise, initial_noise, prompt_batch
path, size, steps, what, options = sys.argv[1:]
size, steps, options = int(size), int(steps), json.loads(options)
peak = {"RssAnon": 0, "VmRSS": 0}
def watch():
    while True:
        for line in open("/proc/self/status"):
            name, _, rest = line.partition(":")
            if name in peak:
                peak[name] = max(peak[name], 1024 * int(rest.split()[0]))
        time.sleep(0.02)
threading.Thread(target=watch, daemon=True).start()
start = time.perf_counter()
config = fluxjax.FluxConfig(**options)
flux = fluxjax.load_flux(path, config=config, stream=what == "streamed")
loaded = time.perf_counter() - start
def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)
states = TextStates(draw(1, 1, 512, config.context), draw(2, 1, config.pooled))
noise = initial_noise(jax.random.key(0), size, size)[None]
batch = prompt_batch(states, None, noise=noise, keys=None, distilled=jnp.float32(3.5))
inputs = (flux, batch, Recipe(fluxjax.flow_times(steps)))
start = time.perf_counter()
compiled = eqx.filter_jit(denoise).lower(*inputs).compile()
compile_seconds = time.perf_counter() - start
seconds = []
for _ in range(2):
    start = time.perf_counter()
    x = jax.block_until_ready(compiled(*inputs))
    seconds.append(time.perf_counter() - start)
assert bool(jnp.isfinite(x).all())
print(json.dumps({
    "load_seconds": loaded,
    "compile_seconds": compile_seconds,
    "step_seconds": min(seconds) / steps,
    "peak_anonymous_gigabytes": peak["RssAnon"] / 1e9,
    "peak_resident_gigabytes": peak["VmRSS"] / 1e9,
    "mean": float(x.mean()),
    "std": float(x.std()),
}))
"""
"""Loads the file and samples twice; prints the seconds and the peak memory."""


def bench_stream(options: argparse.Namespace) -> list[dict]:
    """Sample in a new process whose memory is watched."""
    config = FluxConfig.dev()
    blocks = options.blocks or (config.double_depth, config.single_depth)
    config = replace(config, double_depth=blocks[0], single_depth=blocks[1])
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "flux1-dev.safetensors"
        random_file(path, config)
        depths = json.dumps({"double_depth": blocks[0], "single_depth": blocks[1]})
        for weights in ["streamed", "kept"] if options.beside else ["streamed"]:
            arguments = [str(path), str(options.size), str(options.steps), weights, depths]
            command = [sys.executable, "-c", textwrap.dedent(RUN), *arguments]
            out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            shape = {
                "bench": "stream",
                "weights": weights,
                "blocks": list(blocks),
                "size": options.size,
                "steps": options.steps,
            }
            rows.append({**shape, "gigabytes": path.stat().st_size / 1e9, **json.loads(out.stdout)})
    return rows


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add the sub-command."""
    stream = commands.add_parser(
        "stream", help="dev at full size from its file, one block at a time (writes 24 GB)"
    )
    stream.set_defaults(run=bench_stream)
    stream.add_argument(
        "--blocks",
        type=int,
        nargs=2,
        metavar=("DOUBLE", "SINGLE"),
        help="fewer blocks, for a small machine",
    )
    stream.add_argument(
        "--beside", action="store_true", help="also measure it with all weights in memory"
    )
    stream.add_argument(
        "--size", type=int, default=256, help="pixels along a side (default: %(default)s)"
    )
    stream.add_argument("--steps", type=int, default=1, help="(default: %(default)s)")
    stream.add_argument(
        "--folder", type=Path, help="folder for the file (default: the system's temporary folder)"
    )
    stream.add_argument("--output", type=Path, help="append the rows as JSON lines to this file")
