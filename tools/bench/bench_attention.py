"""Measure the implementations of attention on this device: how far values and gradients are from
float32's, whether calls repeat bit by bit, and their speed.

Each implementation runs in a process of its own, with a time limit: a kernel that never ends, or
that takes the process with it, costs its own rows alone.
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
_INPUTS = 4  # sets of them, so that no call finds all of its own in a cache
_BATCH_SECONDS = 0.05  # of calls that are timed together, so that the host's part is small


def drawn(seed: int, tokens: int, heads: int) -> list[jax.Array]:
    """Return q, k, v and the gradient of the result, of normal numbers in bfloat16."""
    keys = jax.random.split(jax.random.key(seed), 4)
    return [jax.random.normal(key, (tokens, heads, HEAD_DIM), jnp.bfloat16) for key in keys]


def exact(
    q: jax.Array, k: jax.Array, v: jax.Array, grad: jax.Array, length: int
) -> tuple[jax.Array, ...]:
    """Return the result and the gradients of q, k and v in float32, a head after another, so that logits fit."""

    def mix(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        logits = jnp.matmul(q, k.T, precision="highest") / HEAD_DIM**0.5
        weights = jax.nn.softmax(jnp.where(jnp.arange(len(k)) < length, logits, -jnp.inf))
        return jnp.matmul(weights, v, precision="highest")

    def head(inputs: list[jax.Array]) -> tuple[jax.Array, ...]:
        q, k, v, grad = (x.astype(jnp.float32) for x in inputs)
        mixed, pull = jax.vjp(mix, q, k, v)
        return (mixed, *pull(grad))

    found = jax.lax.map(head, [jnp.swapaxes(x, 0, 1) for x in (q, k, v, grad)])
    return tuple(jnp.swapaxes(x, 0, 1) for x in found)


def passes(
    implementation: str, length: int | None
) -> dict[str, Callable[..., tuple[jax.Array, ...]]]:
    """Return the compiled functions of (q, k, v, gradient): the forward pass, and the gradient, which has it too."""
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
def errors(found: tuple[jax.Array, ...], reference: tuple[jax.Array, ...]) -> list[jax.Array]:
    """Return ||found - reference|| / ||reference|| of each result; NaN stays NaN."""
    norm = jnp.linalg.norm
    pairs = zip(found, reference, strict=True)
    return [norm((x.astype(jnp.float32) - y).ravel()) / norm(y.ravel()) for x, y in pairs]


@jax.jit
def same(found: tuple[jax.Array, ...], first: tuple[jax.Array, ...]) -> jax.Array:
    return jnp.stack([jnp.all(x == y) for x, y in zip(found, first, strict=True)])


def timed(
    call: Callable[..., Any], inputs: list[list[jax.Array]], batches: int
) -> tuple[float, float]:
    """Return the median seconds of a call, over batches of calls that are sent off together, and the batches' spread."""

    def many(count: int) -> None:
        for number in range(count):
            found = call(*inputs[number % len(inputs)])
        jax.block_until_ready(found)

    many(len(inputs))
    count = max(3, min(500, round(_BATCH_SECONDS / seconds_of(partial(many, 5)) * 5)))
    spent = [seconds_of(partial(many, count)) / count for _ in range(batches)]
    median = statistics.median(spent)
    return median, (max(spent) - min(spent)) / median


def measured(
    name: str, tokens: int, length: int | None, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return a row of the forward pass and one of the gradient; what fails is a row too."""
    seen = tokens if length is None else length
    inputs = [drawn(seed, tokens, options.heads) for seed in range(_INPUTS)]
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
            far = [float(x) for x in errors(first, reference[: len(first)])]
            row["relative error"] = dict(
                zip(RESULTS, (float(f"{x:.3g}") for x in far), strict=False)
            )
            again = [same(call(*inputs[0]), first) for _ in range(options.repeats)]
            counts = [int(x) for x in jnp.stack(again).sum(0)]
            row["bitwise equal"] = dict(zip(RESULTS, counts, strict=False)) | {
                "of": options.repeats
            }
            median, spread = timed(call, inputs, options.batches)
            # The usual count: 2 products forward, and 5 more for the gradient.
            flop = (1 if kind == "forward" else 3.5) * 4 * tokens * seen * options.heads * HEAD_DIM
            row |= {"microseconds": round(1e6 * median, 1), "spread": round(spread, 3)}
            row["TFLOP/s"] = round(flop / median / 1e12, 1)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        rows.append(row)
    return rows


def bench_here(options: argparse.Namespace) -> None:
    """Measure in this process, and write each row as it comes, so that a later kernel that hangs leaves it."""
    for tokens, length in options.cases:
        for name in options.implementations:
            rows = measured(name, tokens, length, options)
            with options.rows.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            print(*rows, sep="\n", flush=True)


def bench_attention(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure each implementation in a process of its own, after another."""
    if options.rows is not None:
        bench_here(options)
        return []
    found: list[dict[str, Any]] = []
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
            ended = _ended([sys.executable, sys.argv[0], "attention", *arguments], options.seconds)
            found += [json.loads(line) for line in rows.read_text().splitlines()]
            if ended:
                found.append({"bench": "attention", "implementation": name, "error": ended})
    return found


def _ended(command: list[str], seconds: float) -> str | None:
    """Run a command, and return why it did not end well, if so."""
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ
    try:
        code = subprocess.run(command, timeout=seconds, env=environment).returncode
    except subprocess.TimeoutExpired:
        return f"was ended after {seconds:g} s"
    return f"ended with code {code}" if code else None


def _case(text: str) -> tuple[int, int | None]:
    tokens, _, length = text.partition("/")
    return int(tokens), int(length) if length else None


def add_commands(commands: Any) -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "attention", help="attention's implementations on this device: errors, repeats, speed"
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
        "--repeats", type=int, default=20, help="calls compared bit by bit (default: %(default)s)"
    )
    parser.add_argument(
        "--batches",
        type=int,
        default=7,
        help="timings, of which the median counts (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=120,
        help="of an implementation's process (default: %(default)s)",
    )
    parser.add_argument(
        "--rows", type=Path, help=argparse.SUPPRESS
    )  # a child's, which measures in its own process
    parser.add_argument("--output", type=Path, help="append the rows as JSON lines to this file")
