"""Measure full-size sampling on a GPU: dev and schnell at 1024x1024 by batch, weights and attention, beside diffusers on torch,
and the VAE's decoder. Random weights; what fails is a row too, and the next goes on."""

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from bench_model import random_flux
from scaling import forward_flop

import fluxjax
from fluxjax import FluxConfig, flow_times, initial_noise, quantize, select_attention, unroll
from fluxjax.generate import Text, decode, denoise
from fluxjax.kernels.attention import IMPLEMENTATIONS

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory too

VARIANTS = {"dev": (FluxConfig.dev(), 512, 28), "schnell": (FluxConfig.schnell(), 256, 4)}
FORMATS = ("bfloat16", "int8", "fp8")


_ENOUGH = 20
"""Seconds of measuring after which no repeat is begun."""


def timed(call: Callable[[], Any], repeats: int) -> list[float]:
    """Return the seconds of several calls, the first of all left out."""
    begun, spent = time.perf_counter(), []
    call()
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        spent.append(time.perf_counter() - start)
        if time.perf_counter() - begun > _ENOUGH:
            break
    return spent


def told(spent: list[float]) -> dict[str, float]:
    """Return the median, and the spread as a share of it."""
    median = statistics.median(spent)
    return {"seconds": median, "spread": round((max(spent) - min(spent)) / median, 3)}


def matmul_ceiling(side: int, repeats: int) -> float:
    """Return the FLOP/s of a chain of square bfloat16 matmuls on random data."""
    length = 16
    a, b = jax.random.normal(jax.random.key(0), (2, side, side), jnp.bfloat16) / side**0.5
    chain = jax.jit(lambda a, b: jax.lax.fori_loop(0, length, lambda _, x: x @ b, a))
    return length * 2 * side**3 / min(timed(lambda: jax.block_until_ready(chain(a, b)), repeats))


def config_of(name: str, options: argparse.Namespace) -> tuple[FluxConfig, int, int]:
    config, txt_tokens, steps = VARIANTS[name]
    if options.blocks:
        config = replace(config, double_depth=options.blocks[0], single_depth=options.blocks[1])
    return config, txt_tokens, options.steps or steps


def ours(
    flux: Any, batch: int, txt_tokens: int, steps: int, attention: str | None, options: argparse.Namespace
) -> dict[str, Any]:
    """Compile and run the sampling loop."""
    config, side = flux.config, options.size
    text = Text(jnp.zeros((batch, txt_tokens, config.context), jnp.bfloat16), jnp.zeros((batch, config.pooled), jnp.bfloat16))
    noise = jnp.stack([initial_noise(jax.random.key(i), side, side) for i in range(batch)])
    guidance = jnp.float32(3.5) if config.guidance_embed else None
    arguments = (flux, text, noise, flow_times(steps, tokens=(side // 16) ** 2), guidance)
    start = time.perf_counter()
    compiled = denoise.lower(*arguments, attention=attention).compile()
    row: dict[str, Any] = {"compile s": round(time.perf_counter() - start, 2)}

    def run() -> None:
        jax.block_until_ready(compiled(*arguments, attention=attention))

    row |= told(timed(run, options.repeats))
    if options.profile:
        with jax.profiler.trace(str(options.profile)):
            run()
    memory = jax.devices()[0].memory_stats() or {}
    analysis = compiled.compiled.memory_analysis()
    if analysis is not None:
        row["temporaries GB"] = round(analysis.temp_size_in_bytes / 1e9, 2)
    return row | ({"peak GB so far": round(memory["peak_bytes_in_use"] / 1e9, 1)} if "peak_bytes_in_use" in memory else {})


class Form(NamedTuple):
    """How fluxjax is run: its weights, whether blocks are apart, the batch and the attention."""

    weights: str
    unrolled: bool
    batch: int
    attention: str


def forms(options: argparse.Namespace) -> list[Form]:
    """Return what is run, what matters most first: the first batch and attention, then other attentions, then batches."""
    (batch, *batches), (attention, *attentions) = options.batches, options.attention
    first = [Form(weights, False, batch, attention) for weights in options.weights]
    apart = [form._replace(unrolled=True) for form in first if options.unroll]
    others = [first[0]._replace(attention=other) for other in attentions]
    return first + apart + others + [form._replace(batch=more) for more in batches for form in first]


def made(config: FluxConfig, form: Form) -> fluxjax.Flux:
    flux = random_flux(config)
    flux = flux if form.weights == "bfloat16" else quantize(flux, form.weights, donate=True)
    return unroll(flux, donate=True) if form.unrolled else flux


def rows_of_ours(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    config, txt_tokens, steps = config_of(name, options)
    tokens = (options.size // 16) ** 2
    flux, kind = None, None
    for form in forms(options):
        heads = jax.ShapeDtypeStruct((tokens + txt_tokens, config.heads, config.head_dim), jnp.bfloat16)
        best = form.attention == "best"
        row = {
            "what": "fluxjax",
            "variant": name,
            "weights": form.weights,
            "batch": form.batch,
            "steps": steps,
            "attention": select_attention(heads, heads) if best else form.attention,
            "blocks": "apart" if form.unrolled else "stacked",
        }
        if time.perf_counter() > options.until:
            yield row | _LEFT_OUT
            continue
        try:
            if kind != form[:2]:
                flux = None  # before there is another
                gc.collect()
                flux, kind = made(config, form), form[:2]
            row |= ours(flux, form.batch, txt_tokens, steps, None if best else form.attention, options)
            row["TFLOP/s"] = form.batch * steps * forward_flop(config, tokens, txt_tokens) / row["seconds"] / 1e12
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        yield row
    del flux
    gc.collect()


_LEFT_OUT = {"left out": "its share of --minutes is spent"}


def rows_of_theirs(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """diffusers' transformer, as its pipeline calls it a step, compiled or not."""
    import diffusers
    import torch

    config, txt_tokens, steps = config_of(name, options)
    device, tokens = "cuda" if torch.cuda.is_available() else "cpu", (options.size // 16) ** 2
    with torch.device(device):
        network = diffusers.FluxTransformer2DModel(
            num_layers=config.double_depth, num_single_layers=config.single_depth, guidance_embeds=config.guidance_embed
        )
        network = network.to(torch.bfloat16).eval()
        for batch in options.batches:
            inputs = {
                "hidden_states": torch.randn(batch, tokens, 64, dtype=torch.bfloat16),
                "encoder_hidden_states": torch.zeros(batch, txt_tokens, 4096, dtype=torch.bfloat16),
                "pooled_projections": torch.zeros(batch, 768, dtype=torch.bfloat16),
                "timestep": torch.full((batch,), 0.5, dtype=torch.bfloat16),
                "guidance": torch.full((batch,), 3.5) if config.guidance_embed else None,
                "img_ids": torch.zeros(tokens, 3, dtype=torch.bfloat16),
                "txt_ids": torch.zeros(txt_tokens, 3, dtype=torch.bfloat16),
                "return_dict": False,
            }
            for compiled in (False, True):
                call = torch.compile(network, mode="max-autotune-no-cudagraphs") if compiled else network
                row = {"what": "diffusers", "variant": name, "weights": "bfloat16", "batch": batch, "steps": steps}
                row |= {"compiled": compiled}

                if time.perf_counter() > options.until:
                    yield row | _LEFT_OUT
                    continue

                def run(call: Any = call, inputs: dict = inputs) -> None:
                    with torch.no_grad():
                        for _ in range(steps):
                            call(**inputs)
                    if device == "cuda":
                        torch.cuda.synchronize()

                try:
                    row |= told(timed(run, options.repeats))
                    row["TFLOP/s"] = batch * steps * forward_flop(config, tokens, txt_tokens) / row["seconds"] / 1e12
                except Exception as error:
                    row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                yield row
    del network
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def vae_row(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    vae = jax.tree.map(lambda x: x.astype(jnp.bfloat16), fluxjax.Vae(fluxjax.VaeConfig.flux(), key=jax.random.key(0)))
    latents = jax.random.normal(jax.random.key(1), (1, 16, options.size // 8, options.size // 8))
    compiled = decode.lower(vae, latents, dtype=jnp.bfloat16).compile()
    spent = timed(lambda: jax.block_until_ready(compiled(vae, latents, dtype=jnp.bfloat16)), options.repeats)
    yield {"what": "fluxjax", "variant": "VAE decode", "weights": "bfloat16", "batch": 1, **told(spent)}


def bench_gpu(options: argparse.Namespace) -> list[dict]:
    """Run every row, fluxjax's and diffusers' of a variant after each other, and show each as it comes."""
    ceiling = matmul_ceiling(options.matmul, options.repeats)
    rows: list[dict[str, Any]] = []

    def add(found: Iterator[dict[str, Any]]) -> None:
        while True:
            try:
                row = next(found)
            except StopIteration:
                return
            except Exception as error:  # as of a package that is not there
                row = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
            if "TFLOP/s" in row:
                row["share of matmul"] = round(row["TFLOP/s"] * 1e12 / ceiling, 3)
            row = {"bench": "gpu", "size": options.size, "matmul TFLOP/s": round(ceiling / 1e12, 1), **row}
            print(row, flush=True)
            rows.append(row)

    start, parts = time.perf_counter(), [(vae_row(options), 0.1)]
    for name in options.variants:
        # A step of any variant takes as long; dev has more.
        share = 0.9 * VARIANTS[name][2] ** 0.5 / sum(VARIANTS[other][2] ** 0.5 for other in options.variants)
        parts.append((rows_of_ours(name, options), share * (0.55 if options.beside else 1)))
        if options.beside:
            parts.append((rows_of_theirs(name, options), 0.45 * share))
    spent = 0.0
    for part, share in parts:
        spent += share
        options.until = start + 60 * options.minutes * spent
        add(part)
        jax.clear_caches()
    return rows + ratios(rows)


def ratios(rows: list[dict]) -> list[dict]:
    """Return how many times faster fluxjax's best is than diffusers', by variant and batch, of bfloat16."""

    def best(what: str, variant: str, batch: int) -> float | None:
        found = [
            row["seconds"]
            for row in rows
            if (row.get("what"), row.get("variant"), row.get("batch")) == (what, variant, batch)
            and row.get("weights") == "bfloat16"
            and "seconds" in row
        ]
        return min(found, default=None)

    found = []
    for variant, batch in dict.fromkeys((row.get("variant"), row.get("batch")) for row in rows):
        ours, theirs = best("fluxjax", variant, batch), best("diffusers", variant, batch)
        if ours is not None and theirs is not None:
            found.append(
                {"bench": "gpu", "what": "ratio", "variant": variant, "batch": batch, "ratio": round(theirs / ours, 3)}
            )
    return found


def add_commands(commands: argparse._SubParsersAction) -> None:
    gpu = commands.add_parser("gpu", help="full-size dev and schnell at 1024x1024, random weights, beside diffusers")
    gpu.set_defaults(run=bench_gpu)
    gpu.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    gpu.add_argument("--weights", nargs="+", choices=FORMATS, default=["bfloat16", "fp8"])
    gpu.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    gpu.add_argument("--attention", nargs="+", choices=["best", *IMPLEMENTATIONS], default=["best", "flash_gpu", "xla_chunked"])
    gpu.add_argument("--minutes", type=float, default=7.0, help="after which no row is begun (default: %(default)s)")
    gpu.add_argument("--no-unroll", dest="unroll", action="store_false", help="leave blocks that are apart out")
    gpu.add_argument("--no-diffusers", dest="beside", action="store_false", help="leave torch out")
    gpu.add_argument("--size", type=int, default=1024, help="pixels along a side (default: %(default)s)")
    gpu.add_argument("--steps", type=int, help="Euler steps (default: the variant's)")
    gpu.add_argument("--blocks", type=int, nargs=2, metavar=("DOUBLE", "SINGLE"), help="fewer blocks, for a small machine")
    gpu.add_argument("--repeats", type=int, default=3, help="runs, of which the median counts (default: %(default)s)")
    gpu.add_argument("--matmul", type=int, default=8192, help="side of the ceiling's matrices (default: %(default)s)")
    gpu.add_argument("--profile", type=Path, metavar="DIR", help="write a trace of a run of each row")
    gpu.add_argument("--output", type=Path, help="a file that JSON lines are appended to")
