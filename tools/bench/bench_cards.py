"""Draw with FLUX.1-dev at full size in the memory of smaller cards, by the command line.

A checkpoint of random weights is written once. For each card, `fluxjax generate` then runs in a
process in which JAX takes as much of this GPU as it would take of that card, so the plan of memory
chooses what it would choose there. Speeds are those of this GPU.
"""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from bench_parts import gpu_bytes

from fluxjax import FluxConfig
from fluxjax.checkpoint.folders import CLIP_TOKENIZER_FOLDER, T5_TOKENIZER_FOLDER
from fluxjax.checkpoint.kinds import CLIP, FLUX, T5_XXL, VAE, Kind
from fluxjax.checkpoint.layouts import NetworkToWrite
from fluxjax.checkpoint.weights import Weights, abstract, parameters_of
from fluxjax.checkpoint.write import Target, write_networks
from fluxjax.generate.device_memory import POOL_FRACTION
from fluxjax.nets import ClipConfig, T5Config, VaeConfig

NETWORKS: tuple[tuple[Kind, Any], ...] = (
    (FLUX, FluxConfig.dev()),
    (CLIP, ClipConfig.large()),
    (T5_XXL, T5Config.xxl()),
    (VAE, VaeConfig.flux()),
)
SAMPLED = {"steps": 28, "guidance": 3.5, "height": 1024, "width": 1024, "max_length": 512}
"""How the checkpoint says that it is sampled: as dev."""
PROGRAM = """
import json, sys
from fluxjax.cli.main import main
try:
    main()  # with the arguments of this process, so that it sets XLA's options too
finally:
    import jax
    stats = jax.local_devices()[0].memory_stats() or {}
    print("memory:", json.dumps({
        "pool GB": stats.get("bytes_limit", 0) / 1e9,
        "peak GB": stats.get("peak_bytes_in_use", 0) / 1e9,
    }))
"""
"""Runs a command of fluxjax; prints the memory that JAX had on the device, and took of it."""


class RandomWeights(Weights):
    """Random bfloat16 weights of a network, drawn when they are read."""

    def __init__(self, network: Any):
        self.network = network
        self._shapes = {name: one.shape for name, one in parameters_of(network).items()}
        # One megabyte of numbers is repeated: the values do not matter, and drawing is slow.
        drawn = 0.02 * np.random.default_rng(0).standard_normal(2**19 + 7, np.float32)
        self._pool = drawn.astype(ml_dtypes.bfloat16)

    def dtype(self, name: str) -> np.dtype:
        return self._pool.dtype

    def read(self, name: str, rows: slice, dtype: np.dtype) -> np.ndarray:
        shape = (rows.stop - rows.start, *self._shapes[name][1:])
        count = -(-math.prod(shape) // self._pool.size)
        values = np.tile(self._pool, count)[: math.prod(shape)]
        return values.reshape(shape).astype(dtype, copy=False)


def write_model(folder: Path, tokenizers: Path) -> None:
    """Write a full-size checkpoint in the diffusers layout.

    **Arguments:** `tokenizers`: a folder with `clip-l` and `t5-xxl`, the files of the official
    tokenizers.
    """
    networks = []
    for kind, config in NETWORKS:
        network = abstract(kind.network, config)
        networks.append(NetworkToWrite(kind, RandomWeights(network), {}))

    def write_rest(temporary: Path) -> None:
        shutil.copytree(tokenizers / "clip-l", temporary / CLIP_TOKENIZER_FOLDER)
        shutil.copytree(tokenizers / "t5-xxl", temporary / T5_TOKENIZER_FOLDER)
        (temporary / "fluxjax.json").write_text(json.dumps(SAMPLED))

    write_networks(Target(folder), networks, "diffusers", write_rest=write_rest)


@contextmanager
def model_folder(options: argparse.Namespace) -> Iterator[Path]:
    """Yield the folder of the model: the one that was given, or a new one, deleted afterwards."""
    if options.model is not None:
        # Another process may be writing it: a folder has its name once it is complete.
        end = time.monotonic() + 60 * options.wait
        while not options.model.exists() and time.monotonic() < end:
            time.sleep(1)
        yield options.model
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as parent:
        folder = Path(parent) / "dev"
        write_model(folder, options.tokenizers)
        yield folder


def draw(
    model: Path, gigabytes: float, total: float, options: argparse.Namespace
) -> dict[str, Any]:
    """Draw an image in the memory of a card; return what it took.

    **Arguments:** `gigabytes`: of the card. `total`: bytes of this GPU; 0 where there is none,
    and JAX takes what it takes.
    """
    with tempfile.TemporaryDirectory(dir=options.folder) as output:
        words = ["generate", "a red star above a blue ring", "--model", str(model)]
        words += ["--steps", str(options.steps), "--output-dir", output]
        words += ["--compilation-cache", str(options.cache), *options.arguments]
        if options.size is not None:
            words += ["--height", str(options.size), "--width", str(options.size)]
        environment = dict(os.environ)
        if total:
            share = POOL_FRACTION * gigabytes * 1e9 / total
            environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{share:.4f}"
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *words],
            capture_output=True,
            text=True,
            env=environment,
            timeout=60 * options.minutes,
        )
        seconds = time.perf_counter() - start
    row = {"bench": "cards", "card GB": gigabytes, "seconds": round(seconds, 2)}
    printed = done.stdout + done.stderr
    for line in re.split(r"[\r\n]+", printed):
        if "`fluxjax plan` shows all" in line:
            row["plan"] = line
        if line.startswith("memory:"):
            row |= json.loads(line.removeprefix("memory:"))
        if line.startswith("load ") and " per step)" in line:
            # Such as: load 9.1 s, compile 8.3 s, encode 0.2 s, … (0.130 s per step)
            row |= {name: float(value) for name, value in re.findall(r"(\w+) ([\d.]+) s\b", line)}
            found = re.search(r"\(([\d.]+) s per step", line)
            row["per step"] = None if found is None else float(found[1])
    if done.returncode:
        row["error"] = " ".join(printed.split()[-60:])
    return row


def bench_cards(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Draw in the memory of each card, one after another."""
    rows = []
    total = gpu_bytes()
    with model_folder(options) as model, tempfile.TemporaryDirectory() as cache:
        options.cache = Path(cache)
        for gigabytes in options.cards:
            try:
                row = draw(model, gigabytes, total, options)
            except subprocess.TimeoutExpired:
                row = {"bench": "cards", "card GB": gigabytes, "error": "out of time"}
            rows.append({**row, "steps": options.steps, "arguments": " ".join(options.arguments)})
            print(rows[-1], flush=True)
    return rows


def write_command(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Write the checkpoint, and draw nothing."""
    start = time.perf_counter()
    write_model(options.to, options.tokenizers)
    seconds = time.perf_counter() - start
    nbytes = sum(path.stat().st_size for path in options.to.rglob("*") if path.is_file())
    return [{"bench": "cards-model", "seconds": round(seconds, 1), "GB": round(nbytes / 1e9, 2)}]


def add_commands(commands: Any) -> None:
    """Add the sub-commands."""
    cards = commands.add_parser(
        "cards", help="`generate` with full-size dev in the memory of smaller cards (writes 34 GB)"
    )
    cards.set_defaults(run=bench_cards)
    add = cards.add_argument
    add("--cards", nargs="+", type=float, default=[80, 80, 40, 32, 24, 16, 12, 8], help="in GB")
    add("--model", type=Path, help="a folder to draw with instead of a new one")
    add("--wait", type=float, default=0, help="minutes to wait for that folder to appear")
    add("--folder", type=Path, help="for temporary files (default: the system's)")
    add("--steps", type=int, default=28, help="(default: %(default)s)")
    add("--size", type=int, help="pixels along a side (default: the model's)")
    add("--minutes", type=float, default=5, help="for each card (default: %(default)s)")
    add("--arguments", nargs=argparse.REMAINDER, default=[], help="more options of `generate`")
    model = commands.add_parser("cards-model", help="write that checkpoint")
    model.set_defaults(run=write_command)
    model.add_argument("--to", type=Path, required=True, help="the new folder")
    for command in (cards, model):
        command.add_argument("--tokenizers", type=Path, help="folder of clip-l and t5-xxl")
        command.add_argument("--output", type=Path, help="append the rows as JSON lines")
