"""Decide on a GPU, within 25 minutes, what fluxjax does by default there: `python tools/probe.py`.

Measured are attention (errors, repeatability, speed), dev at full size with random weights by
format of the weights, unrolled blocks, products computed apart from their biases ("the barrier"),
streamed blocks, 8 bits in a pool of 20 GB, and diffusers where it is installed. Each section is a
process of its own with a time limit, so that one that hangs or crashes loses only its rows. At the
end each decision is printed with its numbers.

`--small` runs all of it at tiny sizes, on a CPU too.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent / "bench"))

Row = dict[str, Any]
TOKENS = ((4608, None), (4133, None), (4352, None), (4608, 4333), (1536, None), (77, None))
SMALL_TOKENS = ((64, None), (33, None))
DECIDING = (4608, 4133)
"""Tokens whose speeds decide on the default attention."""
POOL = 20e9
"""Bytes of the pool in which 8 bits are to fit, as on a card of 24 GB."""


class Section(NamedTuple):
    """A part of the probe.

    `minutes`: the most that it takes. `run`: called with the options and a function that keeps a
    row. `environment`: of its process, from the bytes of the device.
    """

    minutes: float
    run: Callable[[argparse.Namespace, Callable[[Row], None]], None]
    environment: Callable[[float], dict[str, str]] = lambda total: {}


def attention_rows(name: str) -> Callable[[argparse.Namespace, Callable[[Row], None]], None]:
    """Return a section that measures one implementation of attention."""

    def run(options: argparse.Namespace, keep: Callable[[Row], None]) -> None:
        from bench_attention import rows_of

        small = options.small
        settings = argparse.Namespace(
            heads=1 if small else 24, repeats=2 if small else 20, batches=1 if small else 5
        )
        taken = {"cudnn": "xla", "flash_gpu": "xla_chunked"}[name] if small else name
        for tokens, length in SMALL_TOKENS if small else TOKENS:
            for row in rows_of(taken, tokens, length, settings):
                keep({**row, "implementation": name})

    return run


def gpu_options(options: argparse.Namespace, **changes: Any) -> argparse.Namespace:
    """Return the options of `tools/bench gpu`, at tiny sizes with --small."""
    import bench_gpu

    parser = argparse.ArgumentParser()
    bench_gpu.add_commands(parser.add_subparsers())
    words = ["gpu", "--variants", "dev", "--parts", "transformer", "--no-diffusers"]
    words += ["--programs", str(options.folder / "programs")]
    words += ["--steps", "2", "--repeats", "2", "--size", "64"] if options.small else []
    words += [] if options.small else ["--steps", "8"]
    found = parser.parse_args(words)
    vars(found).update(changes)
    return found


def variant() -> Any:
    """Return dev's config, or the tiny one that `use_small_sizes` put in its place."""
    from bench_parts import VARIANTS

    return VARIANTS["dev"][0]


def use_small_sizes() -> None:
    """Replace dev by a network that a CPU runs in a moment."""
    from bench_parts import VARIANTS

    from fluxjax import FluxConfig

    tiny = FluxConfig(
        width=64,
        heads=2,
        double_depth=1,
        single_depth=2,
        mlp_width=128,
        context=16,
        pooled=8,
        rope_axes=(8, 12, 12),
        time_width=16,
    )
    VARIANTS["dev"] = (tiny, 8, 2)


def measure_forms(options: argparse.Namespace, keep: Callable[[Row], None]) -> None:
    """Measure dev in bfloat16 and fp8, by both attentions, stacked and unrolled, in turns."""
    import bench_gpu

    settings = gpu_options(options, weights=["bfloat16", "fp8"], apart=["bfloat16"])
    settings.attention = ["best"] if options.small else ["best", "flash_gpu"]
    networks = bench_gpu.Networks(variant(), settings)
    contenders = bench_gpu.transformer_group(networks, "dev", 1, settings)
    for row in bench_gpu.measure_in_turns(contenders, 60 * 7, settings):
        keep({"section": "forms", **row, **described_program(settings.programs, row)})


def described_program(folder: Path, row: Row) -> Row:
    """Return what the compiled program of a row copies and calls."""
    parts = [str(row[key]) for key in ("variant", "weights", "blocks", "attention", "batch")]
    path = folder / f"{'-'.join(parts)}.txt".replace(" ", "-")
    if not path.exists():
        return {}
    text = path.read_text()
    return {
        "weight copies": weight_copies(text),
        "products by Triton": text.count("__triton_gemm"),
        "products with a bias": text.count('"epilogue":"BIAS"'),
    }


def weight_copies(text: str) -> int:
    """Return how many instructions of a program copy slices of 4 MB or more out of a stack."""
    from program import parse, size

    count = 0
    for name, computation in parse(text).computations.items():
        if re.match(r"fused_|wrapped_", name):
            continue  # of which only the caller writes to memory
        for line in computation.lines.values():
            is_slice = "dynamic-slice" in line.name or "dynamic_slice" in line.name
            if is_slice and "update" not in line.name and size(line.type) >= 4e6:
                count += 1
    return count


def measure_barrier(options: argparse.Namespace, keep: Callable[[Row], None]) -> None:
    """Measure products apart from their biases and together with them, at batch 1 and 4."""
    import bench_gpu
    import jax

    settings = gpu_options(options, weights=["bfloat16"])
    networks = bench_gpu.Networks(variant(), settings)
    _, txt_tokens, steps = bench_gpu.VARIANTS["dev"]
    for batch in (1, 4):
        contenders = []
        for barrier in (True, False):
            form = bench_gpu.Form("bfloat16", False, "best")
            size = batch, txt_tokens, settings.steps or steps
            plain = bench_gpu.fluxjax_contender(networks, form, *size)

            def make(row: Row, plain: Any = plain, barrier: bool = barrier) -> Any:
                jax.clear_caches()  # or the other contender's trace would be taken
                if barrier:
                    return plain.make(row)
                with mock.patch("fluxjax.nets.weight.without_epilogue", lambda product: product):
                    return plain.make(row)

            about = {"variant": f"barrier {barrier}", "batch": batch, **plain.row}
            contenders.append(plain._replace(row=about, make=make))
        for row in bench_gpu.measure_in_turns(contenders, 60 * 2.5, settings):
            barrier_row = {"section": "barrier", "barrier": row["variant"] == "barrier True"}
            keep({**row, **barrier_row, **described_program(settings.programs, row)})


def measure_streaming(options: argparse.Namespace, keep: Callable[[Row], None]) -> None:
    """Measure two steps with all weights on the device, and with streamed blocks."""
    import equinox as eqx
    import jax
    from bench_parts import random_flux, sample_latents, seconds_of

    from fluxjax import offload, stream_blocks

    flux = random_flux(variant())
    sample = eqx.filter_jit(sample_latents)
    for streamed in (False, True):
        if streamed:
            flux = stream_blocks(offload(flux))
        inputs = random_inputs(options, steps=2)
        call = lambda flux=flux, inputs=inputs: jax.block_until_ready(sample(flux, *inputs))  # noqa: E731
        call()
        seconds = min(seconds_of(call) for _ in range(2)) / 2
        keep({"section": "streaming", "streamed": streamed, "seconds per step": seconds})


def random_inputs(options: argparse.Namespace, steps: int) -> tuple[Any, ...]:
    """Return what `sample_latents` takes after the network."""
    import jax
    import jax.numpy as jnp
    from bench_parts import VARIANTS

    from fluxjax import flow_times, initial_noise
    from fluxjax.generate import TextStates

    config, txt_tokens, _ = VARIANTS["dev"]
    side = 64 if options.small else 1024
    txt = jnp.zeros((1, txt_tokens, config.context), jnp.bfloat16)
    states = TextStates(txt, jnp.zeros((1, config.pooled), jnp.bfloat16))
    noise = initial_noise(jax.random.key(0), side, side)[None]
    times = flow_times(steps, tokens=(side // 16) ** 2)
    return states, noise, times, jnp.float32(3.5)


def measure_pool(options: argparse.Namespace, keep: Callable[[Row], None]) -> None:
    """Draw an image with dev in int8 in the memory of a card of 24 GB; report the peak."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    from bench_parts import random_flux, sample_latents, seconds_of

    from fluxjax import Vae, quantize
    from fluxjax.generate import decode
    from fluxjax.nets import VaeConfig

    one = variant()
    flux = quantize(random_flux(one), "int8", donate=True) if options.small else None
    if flux is None:
        flux = random_eight_bits(one)
    config = VaeConfig(channels=(8, 8, 8, 8), groups=4) if options.small else VaeConfig.flux()
    vae = jax.tree.map(lambda x: x.astype(jnp.bfloat16), Vae(config, key=jax.random.key(0)))
    sample = eqx.filter_jit(sample_latents)

    def draw() -> Any:
        latents = sample(flux, *random_inputs(options, steps=4))
        return jax.block_until_ready(decode(vae, latents, dtype=jnp.bfloat16))

    draw()
    stats = jax.devices()[0].memory_stats() or {}
    row = {"section": "pool", "seconds of 4 steps": seconds_of(draw)}
    row |= {"pool GB": stats.get("bytes_limit", 0) / 1e9}
    keep(row | {"peak GB": stats.get("peak_bytes_in_use", 0) / 1e9})


def random_eight_bits(config: Any) -> Any:
    """Return a transformer in int8 of random weights, which never has them in bfloat16."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    from bench_tpu import eight_bits

    from fluxjax import Flux

    abstract = eqx.filter_eval_shape(Flux, config, key=jax.random.key(0))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), abstract)
    shapes = eight_bits(abstract, jnp.int8)

    def draw(leaf: Any) -> Any:
        if leaf.dtype == jnp.int8:
            return jax.random.randint(jax.random.key(0), leaf.shape, -100, 100, jnp.int8)
        return jnp.full(leaf.shape, 2e-4, leaf.dtype)

    return jax.tree.map(draw, shapes)


def measure_diffusers(options: argparse.Namespace, keep: Callable[[Row], None]) -> None:
    """Measure diffusers, compiled, beside fluxjax in bfloat16; nothing where it is missing."""
    import bench_gpu

    try:
        import diffusers  # noqa: F401
        import torch
    except ImportError as error:
        keep({"section": "diffusers", "left out": str(error)})
        return
    if options.small or not torch.cuda.is_available():
        keep({"section": "diffusers", "left out": "no GPU for torch"})
        return
    settings = gpu_options(options, weights=["bfloat16"], beside=True, unroll=False)
    settings.attention = ["best"]
    networks = bench_gpu.Networks(variant(), settings)
    for row in bench_gpu.measure_in_turns(
        bench_gpu.transformer_group(networks, "dev", 1, settings), 60 * 4, settings
    ):
        keep({"section": "diffusers", **row})


def pool_environment(total: float) -> dict[str, str]:
    """Return the environment in which JAX takes `POOL` bytes of a device of `total`."""
    fraction = min(0.95, POOL / total) if total else 0.75
    preallocated = {"XLA_PYTHON_CLIENT_PREALLOCATE": "true"}
    return {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{fraction:.3f}", **preallocated}


SECTIONS: dict[str, Section] = {
    "attention-cudnn": Section(2.5, attention_rows("cudnn")),
    "attention-flash_gpu": Section(2.5, attention_rows("flash_gpu")),
    "forms": Section(8, measure_forms),
    "barrier": Section(6, measure_barrier),
    "streaming": Section(1.5, measure_streaming),
    "pool": Section(1.5, measure_pool, pool_environment),
    "diffusers": Section(3, measure_diffusers),
}


def decide_attention(rows: Sequence[Row]) -> str:
    """Decide whether flash_gpu is the default, stays opt-in, or is deleted."""
    measured: dict[tuple[str, int], Row] = {}
    distances, unstable, failed = [0.0], 0, []
    for row in rows:
        if "implementation" not in row:
            continue
        if "error" in row:
            if row["implementation"] == "flash_gpu":
                failed.append(row["error"])
            continue
        if row["implementation"] == "flash_gpu":
            distances += row["relative error"].values()
            equal = dict(row["bitwise equal"])
            unstable += any(count < equal["of"] for count in equal.values())
        if row["pass"] == "forward" and row["key_length"] is None:
            measured[row["implementation"], row["tokens"]] = row
    ratios = {}
    for (name, tokens), row in measured.items():
        other = measured.get(("cudnn", tokens))
        # Speeds are 0 where nothing was timed.
        if name == "flash_gpu" and other is not None and other["TFLOP/s"] > 0:
            ratios[tokens] = row["TFLOP/s"] / other["TFLOP/s"]
    worst = max(distances, key=lambda distance: (math.isnan(distance), distance))
    numbers = ", ".join(f"{ratio:.2f} x cudnn at {tokens}" for tokens, ratio in ratios.items())
    numbers = f"error {worst:.1e}, {unstable} rows not bitwise equal, {numbers or 'no speeds'}"
    if failed:
        return f"attention: look at flash_gpu, which fails ({failed[0]})"
    deciding = [ratios[tokens] for tokens in DECIDING if tokens in ratios]
    if len(deciding) < len(DECIDING):
        return f"attention: undecided ({numbers})"
    if not worst <= 5e-3 or min(deciding) < 0.9:
        return f"attention: delete flash_gpu ({numbers})"
    if unstable == 0 and min(deciding) >= 1.05:
        return f"attention: make flash_gpu the default ({numbers})"
    return f"attention: cudnn stays the default, flash_gpu opt-in ({numbers})"


def _seconds(rows: Sequence[Row], **wanted: Any) -> float | None:
    for row in rows:
        if "seconds" in row and all(row.get(key) == value for key, value in wanted.items()):
            return row["seconds"]
    return None


def _ratio(
    name: str, slow: float | None, fast: float | None, least: float, yes: str, no: str
) -> str:
    if slow is None or fast is None:
        return f"{name}: undecided (not measured)"
    ratio = slow / fast
    return f"{name}: {yes if ratio >= least else no} ({ratio:.3f} x, needed {least:g} x)"


def decide_forms(rows: Sequence[Row]) -> list[str]:
    """Decide on fp8 and on unrolled blocks."""
    stacked = {"section": "forms", "blocks": "stacked"}
    bfloat16 = _seconds(rows, **stacked, weights="bfloat16")
    fp8 = _seconds(rows, **stacked, weights="fp8")
    unrolled = _seconds(rows, section="forms", blocks="apart", weights="bfloat16")
    return [
        _ratio("fp8", bfloat16, fp8, 1.25, "advise it", "do not advise it"),
        _ratio("unrolled blocks", bfloat16, unrolled, 1.05, "advise them", "keep stacked blocks"),
    ]


def decide_barrier(rows: Sequence[Row]) -> str:
    """Decide on products apart from their biases: with no copies, and at least 1 % faster."""
    of_one = {"section": "barrier", "batch": 1}
    copies = None
    for row in rows:
        if row.get("section") == "barrier" and row["barrier"] and "weight copies" in row:
            copies = row["weight copies"] if row["batch"] == 1 else copies
    apart, joined = (_seconds(rows, **of_one, barrier=barrier) for barrier in (True, False))
    decided = _ratio("barrier", joined, apart, 1.01, "keep it", "drop it")
    batch = [_seconds(rows, section="barrier", batch=4, barrier=one) for one in (False, True)]
    at_four = "" if None in batch else f", {batch[0] / batch[1]:.3f} x at batch 4"  # type: ignore[operator]
    return f"{decided[:-1]}{at_four}, {copies} weight copies)" if copies is not None else decided


def decide_streaming(rows: Sequence[Row]) -> str:
    """Report what streaming costs for each step."""
    found = {row["streamed"]: row for row in rows if row.get("section") == "streaming"}
    if len(found) < 2:
        return "streaming: undecided (not measured)"
    kept, streamed = (found[which]["seconds per step"] for which in (False, True))
    return f"streaming: {streamed:.2f} s a step beside {kept:.2f} ({streamed / kept:.1f} x)"


def decide_pool(rows: Sequence[Row]) -> str:
    """Report whether int8 fits into the pool."""
    for row in rows:
        if row.get("section") == "pool" and "peak GB" in row:
            return f"int8 in a small pool: fits ({row['peak GB']:.1f} of {row['pool GB']:.1f} GB)"
    return "int8 in a small pool: does not fit, or was not measured"


def decisions(rows: Sequence[Row]) -> list[str]:
    """Return each decision with its numbers."""
    return [
        decide_attention(rows),
        decide_barrier(rows),
        *decide_forms(rows),
        decide_streaming(rows),
        decide_pool(rows),
    ]


def run_section(name: str, options: argparse.Namespace) -> None:
    """Run a section in this process; each row is kept at once."""
    if options.small:
        use_small_sizes()

    def keep(row: Row) -> None:
        with options.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)

    SECTIONS[name].run(options, keep)


def run_in_process(name: str, options: argparse.Namespace, seconds: float) -> str | None:
    """Run a section in a new process; return how it failed, if it did."""
    words = [sys.executable, __file__, "--section", name, "--rows", str(options.rows)]
    words += ["--folder", str(options.folder)] + ["--small"] * options.small
    from bench_parts import gpu_bytes

    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
    environment |= SECTIONS[name].environment(gpu_bytes())
    try:
        code = subprocess.run(words, timeout=seconds, env=environment).returncode
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    return f"exited with code {code}" if code else None


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=25.0, help="(default: %(default)s)")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--small", action="store_true", help="tiny sizes, also on a CPU")
    parser.add_argument("--folder", type=Path, default=Path("probe"), help="for programs")
    parser.add_argument("--rows", type=Path, help="file of the rows (default: in the folder)")
    parser.add_argument("--here", action="store_true", help="run all in this process")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    options.folder.mkdir(parents=True, exist_ok=True)
    options.rows = options.rows or options.folder / "rows.jsonl"
    if options.section is not None:
        run_section(options.section, options)
        return
    options.rows.write_text("")
    end = time.monotonic() + 60 * options.minutes
    for name in options.sections:
        left = end - time.monotonic()
        if left < 30:
            print(f"{name}: left out, the time is spent", flush=True)
        elif options.here:
            run_section(name, options)
        else:
            failed = run_in_process(name, options, min(left, 60 * SECTIONS[name].minutes))
            if failed is not None:
                print(f"{name}: {failed}", flush=True)
    rows = [json.loads(line) for line in options.rows.read_text().splitlines()]
    print("\n".join(["", *decisions(rows)]), flush=True)


if __name__ == "__main__":
    main()
