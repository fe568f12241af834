"""Measure full-size sampling on a GPU with random weights, in turns with diffusers on torch.

Dev and schnell at 1024x1024, by batch, format of the weights and attention; and the VAE's decoder.
A failure is a row as well, and the other rows go on.
"""

import argparse
import gc
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from bench_parts import (
    VARIANTS,
    diffusers_vae,
    error_line,
    random_flux,
    sample_latents,
    seconds_in_turns,
    seconds_of,
    summarize_times,
)
from bench_tpu import packed
from scaling import forward_flop
from torch_parts import (
    diffusers_flux,
    finish,
    library_versions,
    set_fastest_attention,
    torch_device,
)

import fluxjax
from fluxjax import FluxConfig, flow_times, initial_noise, quantize, unroll
from fluxjax.generate import TextStates, decode
from fluxjax.kernels import select_attention
from fluxjax.kernels.attention import IMPLEMENTATIONS
from fluxjax.nets.packed_formats import PACKED_FORMATS
from fluxjax.nets.rounding import QUANTIZATIONS

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory too

GGUF_FORMATS = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0")
FORMATS = ("bfloat16", *QUANTIZATIONS, *GGUF_FORMATS)
BACKENDS = ("native", "_native_cudnn", "flash", "_flash_3")
"""Attention implementations that diffusers may have; the fastest is used."""


class Contender(NamedTuple):
    """A row of the results, and a function that prepares its call.

    `make`: adds to the row what preparing the call shows (such as the compile time), and returns
    the call.
    """

    row: dict[str, Any]
    make: Callable[[dict[str, Any]], Callable[[], object]]


def matmul_ceiling(side: int, repeats: int) -> float:
    """Return the FLOP/s of a chain of square bfloat16 matmuls on random data."""
    length = 16
    a, b = jax.random.normal(jax.random.key(0), (2, side, side), jnp.bfloat16) / side**0.5
    chain = jax.jit(lambda a, b: jax.lax.fori_loop(0, length, lambda _, x: x @ b, a))
    jax.block_until_ready(chain(a, b))
    spent = [seconds_of(lambda: jax.block_until_ready(chain(a, b))) for _ in range(repeats)]
    return length * 2 * side**3 / min(spent)


class Form(NamedTuple):
    """How fluxjax is run: the format of its weights, whether blocks are unrolled, the attention."""

    weights: str
    unrolled: bool
    attention: str


def forms(options: argparse.Namespace, first: bool) -> list[Form]:
    """Return the forms that are run, the most important first.

    Unrolled blocks and further attention implementations are only run with the first batch.
    """
    attention, *others = options.attention
    stacked = [Form(weights, False, attention) for weights in options.weights]
    weights = (options.apart or options.weights) if options.unroll else ()
    apart = [form._replace(unrolled=True) for form in stacked if form.weights in weights]
    return stacked + first * (apart + [stacked[0]._replace(attention=other) for other in others])


class Networks:
    """A variant's networks, created when they are first needed and then kept.

    Dev's take 24 GB in bfloat16 and 12 GB in 8 bits.
    """

    def __init__(self, config: FluxConfig, options: argparse.Namespace):
        self.config, self.options = config, options
        self.made: dict[tuple[str, bool], fluxjax.Flux] = {}
        self.torch: Any = None
        self.backend = ""

    def ours(self, weights: str, unrolled: bool) -> fluxjax.Flux:
        """Return the transformer with this format of weights, its blocks stacked or unrolled."""
        if (weights, unrolled) not in self.made:
            if unrolled:
                flux = unroll(self.ours(weights, False))
            elif weights == "bfloat16":
                flux = random_flux(self.config)
            elif weights in GGUF_FORMATS:
                flux = random_packed(self.config, weights)
            elif "bfloat16" in self.options.weights:
                flux = quantize(self.ours("bfloat16", False), weights)
            else:
                flux = quantize(random_flux(self.config), weights, donate=True)
            self.made[weights, unrolled] = flux
        return self.made[weights, unrolled]

    def theirs(self, inputs: dict[str, Any]) -> Any:
        """Return diffusers' transformer with its fastest attention and compiled blocks.

        `torch.compiler.set_stance` turns compilation off again.
        """
        import torch

        def call() -> None:
            with torch.no_grad():
                made(**inputs)
            finish()

        if self.torch is None:
            made = diffusers_flux(self.config).eval()
            made.fuse_qkv_projections()
            self.backend = set_fastest_attention(made, BACKENDS, call)
            made.compile_repeated_blocks(
                mode=self.options.torch_mode, fullgraph=True, dynamic=False
            )
            self.torch = made  # kept only once all of this has succeeded
        return self.torch


def random_packed(config: FluxConfig, format: str) -> fluxjax.Flux:
    """Return a transformer whose blocks' matrices are random blocks of GGUF, on the device.

    Their codes are random bits, and all of their scales the same small number.
    """
    sizes = PACKED_FORMATS[format]
    scale = jnp.full(1, 2e-4, sizes.scale_dtype).view(jnp.uint8)

    @partial(jax.jit, static_argnums=1)
    def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        *rows, row_bytes = shape
        blocks = jax.random.bits(key, (*rows, row_bytes // sizes.nbytes, sizes.nbytes), jnp.uint8)
        for first in sizes.scales:
            blocks = blocks.at[..., first : first + scale.size].set(scale)
        return blocks.reshape(shape)

    shapes = packed(eqx.filter_eval_shape(fluxjax.Flux, config, key=jax.random.key(0)), format)
    leaves, structure = jax.tree.flatten(shapes)
    drawn = []
    for number, leaf in enumerate(leaves):
        key = jax.random.key(number)
        if leaf.dtype == jnp.uint8:
            drawn.append(draw(key, leaf.shape))
        else:
            drawn.append(0.02 * jax.random.normal(key, leaf.shape, jnp.bfloat16))
    return jax.tree.unflatten(structure, drawn)


def fluxjax_contender(
    networks: Networks, form: Form, batch: int, txt_tokens: int, steps: int
) -> Contender:
    """Return the contender that runs fluxjax's sampling loop, one compiled program."""
    config, options = networks.config, networks.options
    tokens = (options.size // 16) ** 2
    heads = jax.ShapeDtypeStruct((tokens + txt_tokens, config.heads, config.head_dim), jnp.bfloat16)
    attention = None if form.attention == "best" else form.attention

    def make(row: dict[str, Any]) -> Callable[[], object]:
        txt, vec = (
            jnp.zeros((batch, *shape), jnp.bfloat16)
            for shape in [(txt_tokens, config.context), (config.pooled,)]
        )
        noise = jnp.stack(
            [initial_noise(jax.random.key(i), options.size, options.size) for i in range(batch)]
        )
        guidance = jnp.float32(3.5) if config.guidance_embed else None
        flux = networks.ours(form.weights, form.unrolled)
        arguments = (flux, TextStates(txt, vec), noise, flow_times(steps, tokens=tokens), guidance)
        return _compiled(
            row, options.programs, eqx.filter_jit(sample_latents), *arguments, attention=attention
        )

    row = {
        "what": "fluxjax",
        "weights": form.weights,
        "attention": attention or select_attention(heads, heads),
    }
    return Contender(row | {"blocks": "apart" if form.unrolled else "stacked"}, make)


def _compiled(
    row: dict[str, Any], folder: Path | None, function: Any, *arguments: Any, **options: Any
) -> Callable[[], object]:
    """Compile a jitted function and return a call of it.

    Adds the compile time and the memory to the row. With a folder, the optimized program is written
    there.
    """
    start = time.perf_counter()
    compiled = function.lower(*arguments, **options).compile()
    row["compile s"] = round(time.perf_counter() - start, 2)
    if folder is not None:
        names = [
            str(row[key])
            for key in ("variant", "weights", "blocks", "attention", "batch")
            if key in row
        ]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{'-'.join(names)}.txt".replace(" ", "-")).write_text(
            compiled.compiled.as_text()
        )
    memory = compiled.compiled.memory_analysis()
    if memory is not None:
        held = (
            memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        )
        row["memory GB"] = round((held + memory.temp_size_in_bytes) / 1e9, 2)
        row["temporaries GB"] = round(memory.temp_size_in_bytes / 1e9, 2)
    return lambda: jax.block_until_ready(compiled(*arguments, **options))


def diffusers_contender(
    networks: Networks, compiled: bool, batch: int, txt_tokens: int, steps: int
) -> Contender:
    """Return the contender that calls diffusers' transformer once for each step."""
    config, tokens = networks.config, (networks.options.size // 16) ** 2

    def make(row: dict[str, Any]) -> Callable[[], object]:
        import torch

        with torch.device(torch_device()):
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
        network = networks.theirs(inputs)
        row["attention"] = networks.backend
        return _torch_call(row, lambda: network(**inputs), compiled, steps)

    row = {
        "what": "diffusers",
        "weights": "bfloat16",
        "compiled": networks.options.torch_mode if compiled else False,
    }
    return Contender(row, make)


def _torch_call(
    row: dict[str, Any], call: Callable[[], Any], compiled: bool, steps: int = 1
) -> Callable[[], object]:
    import torch

    def run(steps: int = steps) -> None:
        with torch.no_grad(), torch.compiler.set_stance("default" if compiled else "force_eager"):
            for _ in range(steps):
                call()
        finish()

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    run(1)
    row |= {"compile s": round(time.perf_counter() - start, 2)} if compiled else {}
    if torch.cuda.is_available():
        row["memory GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return run


def transformer_group(
    networks: Networks, name: str, batch: int, options: argparse.Namespace
) -> list[Contender]:
    """Return the contenders of a variant and batch.

    They are in the order in which they are prepared while there is time.
    """
    _, txt_tokens, steps = VARIANTS[name]
    size = batch, txt_tokens, options.steps or steps
    ours = [
        fluxjax_contender(networks, form, *size)
        for form in forms(options, batch == options.batches[0])
    ]
    theirs = [
        diffusers_contender(networks, compiled, *size)
        for compiled in (True, False)
        if options.beside
    ]
    found = ours[: len(options.weights)] + theirs + ours[len(options.weights) :]
    tokens = (options.size // 16) ** 2
    work = {
        "steps": size[2],
        "TFLOP": batch * size[2] * forward_flop(networks.config, tokens, txt_tokens) / 1e12,
    }
    return [
        contender._replace(row={"variant": name, "batch": batch, **contender.row, **work})
        for contender in found
    ]


def vae_group(options: argparse.Namespace) -> list[Contender]:
    """Return the contenders for decoding an image."""
    side = options.size // 8

    def make_ours(row: dict[str, Any]) -> Callable[[], object]:
        vae = jax.tree.map(
            lambda x: x.astype(jnp.bfloat16),
            fluxjax.Vae(fluxjax.nets.VaeConfig.flux(), key=jax.random.key(0)),
        )
        latents = jax.random.normal(jax.random.key(1), (1, 16, side, side))
        return _compiled(row, options.programs, decode, vae, latents, dtype=jnp.bfloat16)

    def make_theirs(compiled: bool) -> Callable[[dict[str, Any]], Callable[[], object]]:
        def make(row: dict[str, Any]) -> Callable[[], object]:
            import torch

            with torch.device(torch_device()):
                vae = diffusers_vae()
                latents = torch.randn(1, 16, side, side, dtype=torch.bfloat16)
            vae = vae.to(torch.bfloat16, memory_format=torch.channels_last)
            decoder = torch.compile(vae.decoder) if compiled else vae.decoder
            return _torch_call(row, lambda: decoder(latents), compiled)

        return make

    common = {"variant": "VAE decode", "batch": 1}
    theirs = [
        Contender(
            {**common, "what": "diffusers", "weights": "bfloat16", "compiled": compiled},
            make_theirs(compiled),
        )
        for compiled in (True, False)
        if options.beside
    ]
    return [Contender({**common, "what": "fluxjax", "weights": "bfloat16"}, make_ours), *theirs]


def measure_in_turns(
    contenders: list[Contender], seconds: float, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Prepare all calls in at most about 0.6 of the time, then time them in turns, at least once.

    **Arguments:** `seconds`: the time for all of this.
    """
    begun, calls = time.perf_counter(), dict[int, Callable[[], object]]()
    for number, (row, make) in enumerate(contenders):
        if time.perf_counter() - begun > 0.6 * seconds:
            row["left out"] = "its share of --minutes is spent"
            continue
        print(f"making {row}", flush=True)
        try:
            calls[number] = make(row)
            # Printed at once, so that the log has it even if a later contender hangs.
            print(f"made; {seconds_of(calls[number]):.3f} s the first time: {row}", flush=True)
        except Exception as error:
            calls.pop(number, None)
            row["error"] = error_line(error)
    spent, errors = seconds_in_turns(
        calls, options.repeats, lambda: time.perf_counter() - begun > seconds
    )
    for number, text in errors.items():
        contenders[number].row["error"] = text
    for number, times in spent.items():
        row, call = contenders[number].row, calls[number]
        row |= summarize_times(times)
        print(f"timed: {row}", flush=True)  # printed before the profiler, which may crash
        if options.profile and row["what"] == "fluxjax":
            try:
                with jax.profiler.trace(str(options.profile)):
                    call()
            except Exception as error:
                print(f"no profile: {error_line(error)}", flush=True)
    return [row for row, _ in contenders]


def compared(rows: list[dict[str, Any]], ceiling: float) -> Iterator[dict[str, Any]]:
    """Add the share of the matmul ceiling, and fluxjax's speed relative to diffusers' fastest."""
    theirs = min(
        (row["seconds"] for row in rows if row["what"] == "diffusers" and "seconds" in row),
        default=None,
    )
    for row in rows:
        work = row.pop("TFLOP", None)
        if "seconds" in row and work is not None:
            row["TFLOP/s"] = work / row["seconds"]
            row["share of matmul"] = round(row["TFLOP/s"] * 1e12 / ceiling, 3)
        if "seconds" in row and row["what"] == "fluxjax" and theirs is not None:
            row["ratio"] = round(theirs / row["seconds"], 3)
        yield row


def bench_gpu(options: argparse.Namespace) -> list[dict]:
    """Measure the VAE, then each variant and batch, and print the rows of each at once."""
    end = time.perf_counter() + 60 * options.minutes
    ceiling = matmul_ceiling(options.matmul, options.repeats)
    common = {
        "bench": "gpu",
        "size": options.size,
        "matmul TFLOP/s": round(ceiling / 1e12, 1),
        **library_versions("torch", "diffusers"),
        "flags": os.environ.get("XLA_FLAGS", ""),
    }
    rows: list[dict[str, Any]] = []

    def add(contenders: list[Contender], share: float) -> None:
        found = measure_in_turns(contenders, share * max(0.0, end - time.perf_counter()), options)
        for row in compared(found, ceiling):
            rows.append({**common, **row})
            print(rows[-1], flush=True)

    if "vae" in options.parts:
        add(vae_group(options), 0.1 if len(options.parts) > 1 else 1)
    for number, name in enumerate(options.variants if "transformer" in options.parts else ()):
        config = VARIANTS[name][0]
        if options.blocks:
            config = replace(config, double_depth=options.blocks[0], single_depth=options.blocks[1])
        networks = Networks(config, options)
        for turn, batch in enumerate(options.batches):
            left = (len(options.variants) - number) * len(options.batches) - turn
            # The first batch gets more time because it compiles more.
            add(
                transformer_group(networks, name, batch, options),
                (1.4 if left > 1 and not turn else 1) / left,
            )
        del networks
        jax.clear_caches()
        gc.collect()
    return rows


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add the sub-command."""
    gpu = commands.add_parser(
        "gpu", help="full-size dev and schnell at 1024x1024, compared with diffusers"
    )
    gpu.set_defaults(run=bench_gpu)
    gpu.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    gpu.add_argument("--weights", nargs="+", choices=FORMATS, default=["bfloat16", "fp8"])
    gpu.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    gpu.add_argument(
        "--attention",
        nargs="+",
        choices=["best", *IMPLEMENTATIONS],
        default=["best", "flash_gpu", "xla_chunked"],
    )
    gpu.add_argument(
        "--minutes",
        type=float,
        default=7.0,
        help="after which no new row is started (default: %(default)s)",
    )
    gpu.add_argument(
        "--no-unroll", dest="unroll", action="store_false", help="leave out unrolled blocks"
    )
    gpu.add_argument(
        "--apart",
        nargs="+",
        choices=FORMATS,
        help="formats of weights that also run with unrolled blocks (default: those of --weights)",
    )
    gpu.add_argument(
        "--parts", nargs="+", choices=["vae", "transformer"], default=["vae", "transformer"]
    )
    gpu.add_argument(
        "--torch-mode",
        default="max-autotune-no-cudagraphs",
        help="mode of torch.compile (default: %(default)s)",
    )
    gpu.add_argument(
        "--no-diffusers", dest="beside", action="store_false", help="leave out diffusers"
    )
    gpu.add_argument(
        "--size", type=int, default=1024, help="pixels along a side (default: %(default)s)"
    )
    gpu.add_argument("--steps", type=int, help="Euler steps (default: the variant's)")
    gpu.add_argument(
        "--blocks",
        type=int,
        nargs=2,
        metavar=("DOUBLE", "SINGLE"),
        help="fewer blocks, for a small machine",
    )
    gpu.add_argument(
        "--repeats",
        type=int,
        default=3,
        help="timings; the median counts (default: %(default)s)",
    )
    gpu.add_argument(
        "--matmul",
        type=int,
        default=8192,
        help="side of the matrices that measure the matmul ceiling (default: %(default)s)",
    )
    gpu.add_argument(
        "--profile", type=Path, metavar="DIR", help="write a profiler trace of each row's call"
    )
    gpu.add_argument(
        "--programs", type=Path, metavar="DIR", help="write fluxjax's compiled programs"
    )
    gpu.add_argument("--output", type=Path, help="append the rows as JSON lines to this file")
