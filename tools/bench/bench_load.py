"""Measure how weights are loaded and converted.

Speed is compared with a plain copy of the same bytes; memory is measured at full size.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

import fluxjax
from fluxjax import FluxConfig
from fluxjax.checkpoint.names import FLUX_BFL
from fluxjax.checkpoint.safetensors_writer import OutputTensor, write_safetensors
from fluxjax.checkpoint.tensor_layout import shape_in_file
from fluxjax.checkpoint.weights import abstract, parameters_of

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def bfl_shapes(config: FluxConfig) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the tensors in a BFL file of this config."""
    shapes = {}
    for name, slot in parameters_of(abstract(fluxjax.Flux, config)).items():
        for key, row in FLUX_BFL.keys(name):
            shapes[key] = shape_in_file(slot.shape, row.layout)
    return shapes


def random_file(path: Path, config: FluxConfig) -> None:
    """Write a BFL file of random bfloat16 values."""
    pool = np.random.default_rng(0).standard_normal(2**20, np.float32).astype(BFLOAT16)

    def draw(shape: tuple[int, ...]) -> OutputTensor:
        return OutputTensor(BFLOAT16, shape, lambda: [np.resize(pool, shape)])

    write_safetensors(path, {name: draw(shape) for name, shape in bfl_shapes(config).items()})


def sparse_file(path: Path, config: FluxConfig) -> int:
    """Write a BFL file with a complete header whose data is a hole in the file.

    **Returns:** the size of the data in bytes.
    """
    header, offset = {}, 0
    for name, shape in bfl_shapes(config).items():
        nbytes = 2 * int(np.prod(shape))
        header[name] = {
            "dtype": "BF16",
            "shape": shape,
            "data_offsets": (offset, offset := offset + nbytes),
        }
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return offset


def seconds(call: Callable[[], object]) -> float:
    """Return how many seconds a call takes."""
    os.sync()  # so that this call does not wait for data that earlier ones wrote
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def touch(network: fluxjax.Flux) -> None:
    """Read every byte of a network once; a memory-mapped file is read only then."""
    for leaf in jax.tree.leaves(network):
        dtype = np.uint64 if leaf.nbytes % 8 == 0 else np.uint8
        np.bitwise_or.reduce(np.asarray(leaf).reshape(-1).view(dtype))


def bench_speed(options: argparse.Namespace) -> list[dict]:
    """Convert and load a file of a few blocks of the official widths; the fastest time counts."""
    double, single = options.blocks
    config = replace(FluxConfig.dev(), double_depth=double, single_depth=single)
    spent: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source = Path(folder) / "flux1-dev.safetensors"
        random_file(source, config)
        nbytes = source.stat().st_size
        for _ in range(options.repeats):
            for name, call_seconds in time_calls(source, Path(folder)).items():
                spent.setdefault(name, []).append(call_seconds)
    best = {name: min(times) for name, times in spent.items()}
    rows = []
    for name, shortest in best.items():
        rows.append(
            {
                "bench": "load",
                "what": name,
                "bytes": nbytes,
                "gb_per_second": nbytes / shortest / 1e9,
                "over_copy": best["copy"] / shortest,
            }
        )
    return rows


def time_calls(source: Path, folder: Path) -> dict[str, float]:
    """Return the seconds of copying a file, of converting it, and of loading the results."""
    copy = folder / "copy"
    spent = {"copy": seconds(partial(shutil.copyfile, source, copy))}
    copy.unlink()
    for layout in ("own", "diffusers", "bfl"):
        target = folder / layout
        convert = partial(fluxjax.convert_weights, source, target, to=layout)
        spent[f"convert to {layout}"] = seconds(convert)
        spent[f"load {layout}"] = seconds(partial(load_all, target))
        shutil.rmtree(target)
    return spent


def load_all(path: Path) -> None:
    """Load a transformer, and read all of it."""
    touch(fluxjax.load_flux(path))


FULL = """
import json, sys, time
import fluxjax
def status(name):
    for line in open("/proc/self/status"):
        if line.startswith(name):
            return 1024 * int(line.split()[1])
before = status("VmRSS")
start = time.perf_counter()
whole = fluxjax.inspect_weights(sys.argv[1]).whole
inspected = time.perf_counter() - start
start = time.perf_counter()
fluxjax.convert_weights(sys.argv[1], sys.argv[2], to=sys.argv[3])
converted = time.perf_counter() - start
print(json.dumps({
    "whole": whole,
    "inspect_seconds": inspected,
    "convert_seconds": converted,
    "peak_gigabytes_above_import": (status("VmHWM") - before) / 1e9,
}))
"""
"""Inspects and converts a file; prints the seconds and the peak memory."""


def bench_full(options: argparse.Namespace) -> list[dict]:
    """Convert dev at full size from a sparse file, in a new process, and measure its memory."""
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source = Path(folder) / "flux1-dev.safetensors"
        nbytes = sparse_file(source, FluxConfig.dev())
        for to in options.to:
            target = Path(folder) / to
            command = [sys.executable, "-c", textwrap.dedent(FULL), str(source), str(target), to]
            out = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append({"bench": "load-full", "to": to, "bytes": nbytes, **json.loads(out.stdout)})
            shutil.rmtree(target)
    return rows


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add the sub-commands."""
    speed = commands.add_parser(
        "load", help="speed of loading and converting, relative to a plain copy"
    )
    speed.set_defaults(run=bench_speed)
    speed.add_argument(
        "--blocks",
        type=int,
        nargs=2,
        default=(2, 4),
        metavar=("DOUBLE", "SINGLE"),
        help="of the transformer (default: 2 4)",
    )
    speed.add_argument("--repeats", type=int, default=3, help="(default: %(default)s)")
    full = commands.add_parser(
        "load-full", help="peak memory of converting dev at full size (writes 24 GB)"
    )
    full.set_defaults(run=bench_full)
    full.add_argument(
        "--to",
        nargs="+",
        default=["own", "diffusers"],
        help="layouts to convert to (default: own diffusers)",
    )
    for command in (speed, full):
        command.add_argument(
            "--folder",
            type=Path,
            help="folder for the files (default: the system's temporary folder)",
        )
        command.add_argument(
            "--output", type=Path, help="append the rows as JSON lines to this file"
        )
