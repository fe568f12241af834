"""Measure the networks on a CPU, compared with diffusers and transformers on torch.

Both have the same weights and inputs, and are called in turns, twice each. fluxjax's programs are
compiled with the options of its command line.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from bench_parts import diffusers_vae
from scaling import forward_flop

import fluxjax
from fluxjax.cli.xla_options import compiler_options
from fluxjax.generate.latents import image_ids

DTYPES = ("float32", "bfloat16")


_PAUSE = 0.05
"""Seconds between the libraries.

On two cores torch's threads kept a core busy for up to 10 ms after their last work, and JAX's for
up to 4 ms.
"""


_LEAST_SECONDS = 1.0
"""A case gets so many turns that fluxjax's second calls take this many seconds in all.

A median of five calls of 25 ms would say little. `--repeats` is the least number of turns.
"""


_SPIN = """
import os, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
while os.getppid() == int(sys.argv[2]):
    sum(range(10_000))
"""
"""A program that runs on one core whenever it has nothing else to do, until its parent ends."""


class Case(NamedTuple):
    """What is compared; all calls are without arguments and return an output.

    `ours`: fluxjax's. `theirs`: torch's, by name. `flop`: of one call, if known. `more`: other ways
    of calling fluxjax.
    """

    ours: Callable[[], jax.Array]
    theirs: Mapping[str, Callable[[], Any]]
    flop: float | None = None
    more: Mapping[str, Callable[[], jax.Array]] = MappingProxyType({})


class Times(NamedTuple):
    """Seconds of a call, one number for each turn.

    `first`: after another library ran, and a pause. `again`: right after another call of its own.
    """

    first: list[float]
    again: list[float]


@contextmanager
def awake_cores() -> Iterator[None]:
    """Keep all cores from becoming idle, by processes that run only when a core has nothing to do.

    On a virtual machine a core that was idle takes long to run again, and during a call threads
    that wait for each other become idle often. After a pause of 0.05 s CLIP-L took 41 ms instead of
    25 with JAX, whose threads sleep while they wait, and 26 with torch, whose threads do not.
    Elsewhere than on Linux nothing is done.
    """
    spinning = []
    if hasattr(os, "SCHED_IDLE"):
        for core in sorted(os.sched_getaffinity(0)):
            command = [sys.executable, "-c", _SPIN, str(core), str(os.getpid())]
            spinning.append(subprocess.Popen(command))
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def in_turns(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Times]:
    """Return the times of each call, made in turns, so that other load affects all of them.

    A first call finds caches full of the other library's memory. Before it there is a pause, in
    which the other library's threads go to sleep: after their last work they look for more for some
    milliseconds, in which they take cores from whoever runs.
    """
    spent = {name: Times([], []) for name in calls}
    with awake_cores():
        for _ in range(repeats):
            for name, call in calls.items():
                time.sleep(_PAUSE)
                for times in spent[name]:
                    start = time.perf_counter()
                    call()
                    times.append(time.perf_counter() - start)
    return spent


def _torch(dtype: str) -> Any:
    import torch

    return getattr(torch, dtype)


def _compiled(
    module: Any, compile_too: bool, call: Callable[[Any], Any]
) -> dict[str, Callable[[], Any]]:
    """Return calls of a torch module as it is, and compiled."""
    import torch

    def run(module: Any) -> Any:
        with torch.no_grad():
            return call(module)

    calls = {"torch": lambda: run(module)}
    if compile_too:
        compiled = torch.compile(module)
        calls["torch.compile"] = lambda: run(compiled)
    return calls


def _blocked(call: Callable[..., jax.Array], *arguments: Any) -> Callable[[], jax.Array]:
    jitted = jax.jit(call, compiler_options=compiler_options(arguments))
    return lambda: jax.block_until_ready(jitted(*arguments))


def _normal(*shape: int, seed: int, dtype: str) -> tuple[jax.Array, Any]:
    """Return the same random values for JAX and for torch."""
    import torch

    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return jnp.asarray(values).astype(dtype), torch.from_numpy(values).to(_torch(dtype))


def flux(folder: Path, dtype: str, options: argparse.Namespace) -> Case:
    """The transformer with the official widths and a few blocks."""
    import diffusers
    import torch

    double, single = options.blocks
    theirs = diffusers.FluxTransformer2DModel(
        num_layers=double, num_single_layers=single, guidance_embeds=True
    )
    theirs.eval().save_pretrained(folder)
    theirs = theirs.to(_torch(dtype))
    ours = fluxjax.load_flux(folder, dtype=dtype)
    side = int(options.img_tokens**0.5)
    (x, their_x), (txt, their_txt), (vec, their_vec) = (
        _normal(*shape, seed=seed, dtype=dtype)
        for seed, shape in enumerate([(side * side, 64), (options.txt_tokens, 4096), (768,)])
    )
    ids = image_ids(16 * side, 16 * side)
    scalar = {
        "t": jnp.float32(0.5),
        "guidance": jnp.float32(4.0),
    }  # both are exact in bfloat16, in which torch gets them
    arguments = {
        "hidden_states": their_x[None],
        "encoder_hidden_states": their_txt[None],
        "pooled_projections": their_vec[None],
        "timestep": torch.tensor([0.5]).to(_torch(dtype)),
        "guidance": torch.tensor([4.0]).to(_torch(dtype)),
        "img_ids": torch.from_numpy(np.array(ids)).to(_torch(dtype)),
        "txt_ids": torch.zeros(options.txt_tokens, 3).to(_torch(dtype)),
        "return_dict": False,
    }

    def call(
        flux: fluxjax.Flux, x: jax.Array, txt: jax.Array, vec: jax.Array, scalar: dict
    ) -> jax.Array:
        return flux(x, txt=txt, vec=vec, img_ids=ids, **scalar)

    flop = forward_flop(ours.config, side * side, options.txt_tokens)
    theirs_calls = _compiled(theirs, options.compile, lambda module: module(**arguments)[0])
    inputs = (x, txt, vec, scalar)
    apart = (
        {"fluxjax, blocks apart": _blocked(call, fluxjax.unroll(ours), *inputs)}
        if options.unroll
        else {}
    )
    return Case(_blocked(call, ours, *inputs), theirs_calls, flop, apart)


def t5(folder: Path, dtype: str, options: argparse.Namespace) -> Case:
    """A layer of T5-XXL over 512 tokens."""
    import torch
    import transformers

    config = transformers.T5Config(
        vocab_size=1000,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=1,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    )
    theirs = transformers.T5EncoderModel(config).eval()
    theirs.save_pretrained(folder)
    ids = np.random.default_rng(0).integers(0, 1000, options.txt_tokens).astype(np.int32)
    ours = fluxjax.load_t5(folder, dtype=dtype)
    calls = _compiled(
        theirs.to(_torch(dtype)),
        options.compile,
        lambda module: module(torch.from_numpy(ids[None]).long()).last_hidden_state,
    )
    flop = 2 * options.txt_tokens * 4096 * (4 * 4096 + 3 * 10240) + 4 * options.txt_tokens**2 * 4096
    return Case(_blocked(lambda network, ids: network(ids), ours, jnp.asarray(ids)), calls, flop)


def clip(folder: Path, dtype: str, options: argparse.Namespace) -> Case:
    """CLIP-L's text encoder over 77 tokens."""
    import torch
    import transformers

    config = transformers.CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        eos_token_id=2,
    )
    theirs = transformers.CLIPTextModel(config).eval()
    theirs.save_pretrained(folder)
    ids = np.random.default_rng(0).integers(0, 49000, 77).astype(np.int32)
    ids[20:] = 49407
    ours = fluxjax.load_clip(folder, dtype=dtype)
    calls = _compiled(
        theirs.to(_torch(dtype)),
        options.compile,
        lambda module: module(torch.from_numpy(ids[None]).long()).pooler_output,
    )
    block = 2 * 77 * 768 * (4 * 768 + 2 * 3072) + 4 * 77**2 * 768
    # Of the last block only keys and values of all tokens are needed; the rest, of one, is little.
    flop = 11 * block + 2 * 77 * 768 * 2 * 768
    return Case(_blocked(lambda network, ids: network(ids), ours, jnp.asarray(ids)), calls, flop)


def vae(folder: Path, dtype: str, options: argparse.Namespace) -> Case:
    """The VAE's decoder, an image of 512x512."""
    theirs = diffusers_vae()
    theirs.save_pretrained(folder)
    ours = fluxjax.load_vae(folder, dtype=dtype)
    side = options.image // 8
    z, their_z = _normal(16, side, side, seed=0, dtype=dtype)
    decoder = theirs.to(_torch(dtype)).decoder
    calls = _compiled(decoder, options.compile, lambda module: module(their_z[None]).movedim(1, -1))

    def call(vae: fluxjax.Vae, z: jax.Array) -> jax.Array:
        return vae.decoder(jnp.moveaxis(z, 0, -1))

    return Case(_blocked(call, ours, z), calls)


CASES: Mapping[str, Callable[[Path, str, argparse.Namespace], Case]] = {
    "flux": flux,
    "t5": t5,
    "clip": clip,
    "vae": vae,
}


def ceiling(dtype: str) -> dict[str, Callable[[], Any]]:
    """Return a matmul of the transformer's own size in both libraries."""
    import torch

    (a, their_a), (b, their_b) = (
        _normal(*shape, seed=0, dtype=dtype) for shape in [(1536, 3072), (12288, 3072)]
    )

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.lax.dot_general(
            a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        ).astype(a.dtype)

    return {
        "fluxjax": _blocked(product, a, b),
        "torch": lambda: torch.nn.functional.linear(their_a, their_b),
    }


def _error(found: Any, expected: Any) -> float:
    found, expected = (
        np.asarray(value, np.float64).reshape(-1)
        for value in (found, expected.detach().float().numpy())
    )
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def bench_cpu(options: argparse.Namespace) -> list[dict]:
    """Compare each case in each dtype; an error is a row as well, and the others go on."""
    import torch

    torch.set_num_threads(options.threads or torch.get_num_threads())
    rows = []
    for dtype in options.dtypes:
        spent = in_turns(ceiling(dtype), 3 * options.repeats)
        flop = 2 * 1536 * 3072 * 12288
        best = {name: flop / min(times.again) for name, times in spent.items()}
        print(
            f"{dtype} matmul: "
            + ", ".join(f"{name} {flops / 1e9:.0f} GFLOP/s" for name, flops in best.items()),
            flush=True,
        )
        for name in options.cases:
            row: dict[str, Any] = {
                "bench": "cpu",
                "case": name,
                "dtype": dtype,
                "torch": torch.__version__,
            }
            row |= {
                f"{library} matmul GFLOP/s": round(flops / 1e9, 1)
                for library, flops in best.items()
            }
            try:
                with tempfile.TemporaryDirectory() as folder:
                    row |= compared(
                        CASES[name](Path(folder), dtype, options), options.repeats, best["fluxjax"]
                    )
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            print(row, flush=True)
            rows.append(row)
    return rows


def compared(case: Case, repeats: int, ceiling: float) -> dict[str, Any]:
    """Return a case's median times and their spread, fluxjax's relative error and speed.

    "ratio" is how many times faster fluxjax is than the fastest of torch's calls, "ratio of first
    calls" the same after another library ran.
    """
    calls = {"fluxjax": case.ours, **case.more, **case.theirs}
    error = _error(case.ours(), case.theirs["torch"]())
    for call in calls.values():
        call()  # compiles
    start = time.perf_counter()
    case.ours()
    turns = max(repeats, round(_LEAST_SECONDS / (time.perf_counter() - start)))
    spent = in_turns(calls, turns)
    median = {name: statistics.median(times.again) for name, times in spent.items()}
    first = {name: statistics.median(times.first) for name, times in spent.items()}
    share = (
        {}
        if case.flop is None
        else {"share of matmul": round(case.flop / median["fluxjax"] / ceiling, 3)}
    )
    return {
        "relative error": float(f"{error:.2g}"),
        **{f"{name} s": round(seconds, 4) for name, seconds in median.items()},
        "spread": {
            name: round((max(times.again) - min(times.again)) / median[name], 2)
            for name, times in spent.items()
        },
        "turns": turns,
        "ratio": _ratio(median, case),
        "ratio of first calls": _ratio(first, case),
        **share,
    }


def _ratio(seconds: Mapping[str, float], case: Case) -> float:
    """Return the time of the fastest of torch's calls over that of fluxjax."""
    return round(min(seconds[name] for name in case.theirs) / seconds["fluxjax"], 2)


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add the sub-command."""
    cpu = commands.add_parser(
        "cpu",
        help="the networks on a CPU, compared with torch (needs the extra `parity`)",
    )
    cpu.set_defaults(run=bench_cpu)
    cpu.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    cpu.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    cpu.add_argument(
        "--blocks",
        type=int,
        nargs=2,
        default=(1, 2),
        metavar=("DOUBLE", "SINGLE"),
        help="(default: 1 2)",
    )
    cpu.add_argument(
        "--unroll", action="store_true", help="also the transformer with unrolled blocks"
    )
    cpu.add_argument(
        "--img-tokens", type=int, default=1024, help="a square number (default: %(default)s)"
    )
    cpu.add_argument("--txt-tokens", type=int, default=512, help="(default: %(default)s)")
    cpu.add_argument(
        "--image",
        type=int,
        default=512,
        help="pixels along a side of the VAE's image (default: %(default)s)",
    )
    cpu.add_argument(
        "--repeats",
        type=int,
        default=5,
        help="timings of each call, at least (default: %(default)s)",
    )
    cpu.add_argument("--threads", type=int, help="of torch (default: torch's own choice)")
    cpu.add_argument(
        "--no-compile", dest="compile", action="store_false", help="leave torch.compile out"
    )
    cpu.add_argument("--output", type=Path, help="append the rows as JSON lines to this file")
