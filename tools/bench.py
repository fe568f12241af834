"""Measure fluxjax. `gpu`: the full-size transformer at random weights, against this machine's own matmul ceiling. `cpu`: the
networks beside torch's. `weights`, `weights-full`: loading and converting. `lora`: merging an adapter. `tpu-aot`: what TPUs
would hold and move, compiled without one; `flash-aot`: the attention kernels' VMEM, so too. `stream`: dev a block at a time
from its file, in little memory. `compile`: tracing, compiling, importing.

Each run prints a table and appends its rows, with versions and machine, as JSON lines.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import bench_compile
import bench_cpu
import bench_flash
import bench_lora
import bench_stream
import bench_tpu
import bench_weights
import jax
import jax.numpy as jnp
from bench_model import random_flux
from scaling import forward_flop

import fluxjax
from fluxjax import FluxConfig, flow_times, initial_noise
from fluxjax.generate import Text, denoise
from fluxjax.kernels.attention import select_attention

VARIANTS = {"dev": (FluxConfig.dev(), 512, 28), "schnell": (FluxConfig.schnell(), 256, 4)}


def timed(call: Callable[[], jax.Array], repeats: int) -> float:
    """Return the least seconds of several calls."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        best = min(best, time.perf_counter() - start)
    return best


def matmul_ceiling(side: int, repeats: int) -> float:
    """Return the FLOP/s of a chain of square bfloat16 matmuls on random data."""
    length = 16
    a, b = jax.random.normal(jax.random.key(0), (2, side, side), jnp.bfloat16) / side**0.5
    chain = jax.jit(lambda a, b: jax.lax.fori_loop(0, length, lambda _, x: x @ b, a))
    jax.block_until_ready(chain(a, b))
    return length * 2 * side**3 / timed(lambda: chain(a, b), repeats)


def bench_gpu(options: argparse.Namespace) -> list[dict]:
    """Compile and run every variant's sampling loop."""
    rows = []
    ceiling = matmul_ceiling(options.matmul, options.repeats)
    for name in options.variants:
        config, txt_tokens, steps = VARIANTS[name]
        if options.blocks:
            config = replace(config, double_depth=options.blocks[0], single_depth=options.blocks[1])
        steps = options.steps or steps
        flux = random_flux(config)
        text = Text(jnp.zeros((1, txt_tokens, config.context), jnp.bfloat16), jnp.zeros((1, config.pooled), jnp.bfloat16))
        noise = initial_noise(jax.random.key(1), options.size, options.size)[None]
        img_tokens = (options.size // 16) ** 2
        guidance = jnp.float32(3.5) if config.guidance_embed else None
        arguments = (flux, text, noise, flow_times(steps, tokens=img_tokens), guidance)
        heads = jax.ShapeDtypeStruct((txt_tokens + img_tokens, config.heads, config.head_dim), jnp.bfloat16)
        start = time.perf_counter()
        compiled = denoise.lower(*arguments).compile()
        compile_seconds = time.perf_counter() - start
        jax.block_until_ready(compiled(*arguments))
        step_seconds = timed(lambda: compiled(*arguments), options.repeats) / steps  # noqa: B023
        speed = forward_flop(config, img_tokens, txt_tokens) / step_seconds
        memory = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        rows.append(
            {
                "bench": "gpu",
                "variant": name,
                "size": options.size,
                "blocks": [config.double_depth, config.single_depth],
                "steps": steps,
                "attention": select_attention(heads, heads),
                "compile_seconds": compile_seconds,
                "seconds_per_step": step_seconds,
                "tflop_per_second": speed / 1e12,
                "matmul_tflop_per_second": ceiling / 1e12,
                "share_of_matmul": speed / ceiling,
                "peak_gigabytes": None if memory is None else memory / 1e9,
            }
        )
        del flux, arguments, compiled
    return rows


def machine() -> dict:
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "host": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "fluxjax": fluxjax.__version__,
    }


def show(rows: list[dict]) -> None:
    for row in rows:
        cells = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()]
        print("  ".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="BENCH")
    gpu = commands.add_parser("gpu", help="full-size dev and schnell at 1024x1024, random bfloat16 weights")
    gpu.set_defaults(run=bench_gpu)
    gpu.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    gpu.add_argument("--size", type=int, default=1024, help="pixels along a side (default: %(default)s)")
    gpu.add_argument("--steps", type=int, help="Euler steps (default: the variant's)")
    gpu.add_argument("--blocks", type=int, nargs=2, metavar=("DOUBLE", "SINGLE"), help="fewer blocks, for a small machine")
    gpu.add_argument("--repeats", type=int, default=3, help="runs, of which the fastest counts (default: %(default)s)")
    gpu.add_argument("--matmul", type=int, default=8192, help="side of the ceiling's matrices (default: %(default)s)")
    gpu.add_argument("--output", type=Path, help="a file that JSON lines are appended to")
    bench_cpu.add_commands(commands)
    bench_compile.add_commands(commands)
    bench_weights.add_commands(commands)
    bench_lora.add_commands(commands)
    bench_tpu.add_commands(commands)
    bench_stream.add_commands(commands)
    bench_flash.add_commands(commands)
    options = parser.parse_args()
    rows = [{**row, **machine()} for row in options.run(options)]
    show(rows)
    if options.output:
        with open(options.output, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
