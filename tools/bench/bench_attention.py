"""Measure the implementations of attention on this device.

For each: how far values and gradients are from those in float32, whether repeated calls agree
bitwise, and the speed. Each runs in its own process with a time limit, so that a kernel that hangs
or crashes only loses its own rows.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from bench_parts import seconds_of

from fluxjax import attention
from fluxjax.kernels.attention import IMPLEMENTATIONS

HEAD_DIM = 128
RESULTS = ("forward", "dq", "dk", "dv")
_INPUTS = 4
"""Sets of inputs that calls alternate between, so that no call finds all of its own in a cache."""
_BATCH_SECONDS = 0.05
"""Calls are timed in batches of about this length, so that the host's overhead is small."""


def random_inputs(seed: int, tokens: int, heads: int) -> list[jax.Array]:
    """Return random q, k, v and gradient of the result, standard normal in bfloat16."""
    keys = jax.random.split(jax.random.key(seed), 4)
    return [jax.random.normal(key, (tokens, heads, HEAD_DIM), jnp.bfloat16) for key in keys]


def exact(
    q: jax.Array, k: jax.Array, v: jax.Array, grad: jax.Array, length: int
) -> tuple[jax.Array, ...]:
    """Return the result and the gradients of q, k and v, in float32.

    It computes one head at a time, so that the logits fit into memory.
    """

    def mix(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        logits = jnp.matmul(q, k.T, precision="highest") / HEAD_DIM**0.5
        weights = jax.nn.softmax(jnp.where(jnp.arange(len(k)) < length, logits, -jnp.inf))
        return jnp.matmul(weights, v, precision="highest")

    def head(inputs: list[jax.Array]) -> tuple[jax.Array, ...]:
        q, k, v, grad = (x.astype(jnp.float32) for x in inputs)
        mixed, pull = jax.vjp(mix, q, k, v)
        return (mixed, *pull(grad))

    results = jax.lax.map(head, [jnp.swapaxes(x, 0, 1) for x in (q, k, v, grad)])
    return tuple(jnp.swapaxes(x, 0, 1) for x in results)


def passes(
    implementation: str, length: int | None
) -> dict[str, Callable[..., tuple[jax.Array, ...]]]:
    """Return the jitted functions of (q, k, v, gradient of the result).

    "forward" is the forward pass alone; "gradient" includes it.
    """
    mix = partial(attention, implementation=implementation, key_length=length)

    def forward(q: jax.Array, k: jax.Array, v: jax.Array, grad: jax.Array) -> tuple[jax.Array, ...]:
        return (mix(q, k, v),)

    def gradient(
        q: jax.Array, k: jax.Array, v: jax.Array, grad: jax.Array
    ) -> tuple[jax.Array, ...]:
        mixed, pull = jax.vjp(mix, q, k, v)
        return (mixed, *pull(grad))

    return {"forward": jax.jit(forward), "gradient": jax.jit(gradient)}


@jax.jit
def errors(results: tuple[jax.Array, ...], reference: tuple[jax.Array, ...]) -> list[jax.Array]:
    """Return ||result - reference|| / ||reference|| of each result; NaN stays NaN."""
    norm = jnp.linalg.norm
    pairs = zip(results, reference, strict=True)
    return [norm((x.astype(jnp.float32) - y).ravel()) / norm(y.ravel()) for x, y in pairs]


@jax.jit
def same(results: tuple[jax.Array, ...], first: tuple[jax.Array, ...]) -> jax.Array:
    """Return which results are bitwise equal to the first ones."""
    return jnp.stack([jnp.all(x == y) for x, y in zip(results, first, strict=True)])


def timed(
    call: Callable[..., Any], inputs: list[list[jax.Array]], batches: int
) -> tuple[float, float]:
    """Return the median seconds of a call, and the spread over batches relative to it.

    The calls of a batch are dispatched together.
    """

    def many(count: int) -> None:
        for number in range(count):
            results = call(*inputs[number % len(inputs)])
        jax.block_until_ready(results)

    many(len(inputs))
    count = max(3, min(500, round(_BATCH_SECONDS / seconds_of(partial(many, 5)) * 5)))
    spent = [seconds_of(partial(many, count)) / count for _ in range(batches)]
    median = statistics.median(spent)
    return median, (max(spent) - min(spent)) / median


def rows_of(
    name: str, tokens: int, length: int | None, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return one row for the forward pass and one for the gradient; an error is a row as well."""
    seen = tokens if length is None else length
    inputs = [random_inputs(seed, tokens, options.heads) for seed in range(_INPUTS)]
    reference = jax.jit(partial(exact, length=seen))(*inputs[0])
    rows = []
    for kind, call in passes(name, length).items():
        row = {
            "bench": "attention",
            "implementation": name,
            "tokens": tokens,
            "key_length": length,
            "pass": kind,
        }
        row |= {"heads": options.heads, "head_dim": HEAD_DIM, "dtype": "bfloat16"}
        try:
            first = call(*inputs[0])
            distances = [float(x) for x in errors(first, reference[: len(first)])]
            rounded = [float(f"{x:.3g}") for x in distances]
            row["relative error"] = dict(zip(RESULTS, rounded, strict=False))
            again = [same(call(*inputs[0]), first) for _ in range(options.repeats)]
            counts = [int(x) for x in jnp.stack(again).sum(0)]
            row["bitwise equal"] = dict(zip(RESULTS, counts, strict=False)) | {
                "of": options.repeats
            }
            median, spread = timed(call, inputs, options.batches)
            # By convention: 2 matmuls forward, and 5 more for the gradient.
            flop = (1 if kind == "forward" else 3.5) * 4 * tokens * seen * options.heads * HEAD_DIM
            row |= {"microseconds": round(1e6 * median, 1), "spread": round(spread, 3)}
            row["TFLOP/s"] = round(flop / median / 1e12, 1)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        rows.append(row)
    return rows


def bench_here(options: argparse.Namespace) -> None:
    """Measure in this process; each row is written at once, in case a later kernel hangs."""
    for tokens, length in options.cases:
        for name in options.implementations:
            rows = rows_of(name, tokens, length, options)
            with options.rows.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            print(*rows, sep="\n", flush=True)


def bench_attention(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure each implementation in its own process, one after another."""
    if options.rows is not None:
        bench_here(options)
        return []
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.implementations:
            rows = Path(folder) / f"{name}.jsonl"
            rows.touch()
            arguments = [
                "--implementations",
                name,
                "--rows",
                str(rows),
                "--heads",
                str(options.heads),
            ]
            arguments += [
                "--repeats",
                str(options.repeats),
                "--batches",
                str(options.batches),
                "--cases",
            ]
            arguments += [
                f"{tokens}" if length is None else f"{tokens}/{length}"
                for tokens, length in options.cases
            ]
            ended = _run_process(
                [sys.executable, sys.argv[0], "attention", *arguments], options.seconds
            )
            results += [json.loads(line) for line in rows.read_text().splitlines()]
            if ended:
                results.append({"bench": "attention", "implementation": name, "error": ended})
    return results


def _run_process(command: list[str], seconds: float) -> str | None:
    """Run a command; return how it failed, or None if it succeeded."""
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ
    try:
        code = subprocess.run(command, timeout=seconds, env=environment).returncode
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:g} s"
    return f"exited with code {code}" if code else None


def _case(text: str) -> tuple[int, int | None]:
    tokens, _, length = text.partition("/")
    return int(tokens), int(length) if length else None


def add_commands(commands: Any) -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "attention",
        help="errors, repeatability and speed of the attention implementations on this device",
    )
    parser.set_defaults(run=bench_attention)
    names = ["cudnn", "flash_gpu", "xla_chunked"]
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=names)
    cases = [(4608, None), (4133, None), (4352, None), (4608, 4333), (1536, None), (77, None)]
    parser.add_argument(
        "--cases", nargs="+", type=_case, metavar="TOKENS[/KEY_LENGTH]", default=cases
    )
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument(
        "--repeats",
        type=int,
        default=20,
        help="calls that are compared bitwise (default: %(default)s)",
    )
    parser.add_argument(
        "--batches",
        type=int,
        default=7,
        help="timings; the median counts (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=120,
        help="time limit of an implementation (default: %(default)s)",
    )
    parser.add_argument(
        "--rows", type=Path, help=argparse.SUPPRESS
    )  # a child's, which measures in its own process
    parser.add_argument("--output", type=Path, help="append the rows as JSON lines to this file")
