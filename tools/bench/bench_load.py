"""Measure how weights are loaded and converted: speed beside a plain copy of the same bytes, and memory at full size."""

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
    """Return the tensors of a BFL file of this config."""
    slots = parameters_of(abstract(fluxjax.Flux, config))
    return {
        key: shape_in_file(slot.shape, row.layout)
        for name, slot in slots.items()
        for key, row in FLUX_BFL.keys(name)
    }


def random_file(path: Path, config: FluxConfig) -> None:
    """Write a BFL file of random bfloat16 values."""
    pool = np.random.default_rng(0).standard_normal(2**20, np.float32).astype(BFLOAT16)

    def draw(shape: tuple[int, ...]) -> OutputTensor:
        return OutputTensor(BFLOAT16, shape, lambda: [np.resize(pool, shape)])

    write_safetensors(path, {name: draw(shape) for name, shape in bfl_shapes(config).items()})


def sparse_file(path: Path, config: FluxConfig) -> int:
    """Write the header of a BFL file and leave its data a hole; return its size."""
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
    os.sync()  # what is still to be written of earlier calls is not this one's
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def touch(network: fluxjax.Flux) -> None:
    """Read every byte of a network's memory once; a mapped file is read only then."""
    for leaf in jax.tree.leaves(network):
        np.bitwise_or.reduce(
            np.asarray(leaf).reshape(-1).view(np.uint64 if leaf.nbytes % 8 == 0 else np.uint8)
        )


def bench_speed(options: argparse.Namespace) -> list[dict]:
    """Convert and load a file of a few blocks of the official widths, beside a plain copy of its bytes; the fastest counts."""
    config = replace(
        FluxConfig.dev(), double_depth=options.blocks[0], single_depth=options.blocks[1]
    )
    spent: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source, copy = Path(folder) / "flux1-dev.safetensors", Path(folder) / "copy"
        random_file(source, config)
        nbytes = source.stat().st_size
        for _ in range(options.repeats):
            spent.setdefault("copy", []).append(seconds(lambda: shutil.copyfile(source, copy)))
            copy.unlink()
            for to in ("own", "diffusers", "bfl"):
                target = Path(folder) / to
                convert = partial(fluxjax.convert_weights, source, target, to=to)
                spent.setdefault(f"convert to {to}", []).append(seconds(convert))
                spent.setdefault(f"load {to}", []).append(
                    seconds(lambda: touch(fluxjax.load_flux(target)))
                )  # noqa: B023
                shutil.rmtree(target)
    best = {name: min(times) for name, times in spent.items()}
    return [
        {
            "bench": "load",
            "what": name,
            "bytes": nbytes,
            "gb_per_second": nbytes / t / 1e9,
            "over_copy": best["copy"] / t,
        }
        for name, t in best.items()
    ]


FULL = """
import json, sys, time
import fluxjax
def status(name):
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])
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


def bench_full(options: argparse.Namespace) -> list[dict]:
    """Convert dev at full size, from a sparse file, in a process of its own whose peak memory is measured."""
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
    speed = commands.add_parser("load", help="loading and converting, beside a plain copy")
    speed.set_defaults(run=bench_speed)
    speed.add_argument(
        "--blocks",
        type=int,
        nargs=2,
        default=(2, 4),
        metavar=("DOUBLE", "SINGLE"),
        help="(default: 2 4)",
    )
    speed.add_argument("--repeats", type=int, default=3, help="(default: %(default)s)")
    full = commands.add_parser(
        "load-full", help="dev at full size from a sparse file: peak memory (writes 24 GB)"
    )
    full.set_defaults(run=bench_full)
    full.add_argument(
        "--to", nargs="+", default=["own", "diffusers"], help="layouts (default: own diffusers)"
    )
    for command in (speed, full):
        command.add_argument(
            "--folder",
            type=Path,
            help="where the files are written (default: the temporary folder)",
        )
        command.add_argument("--output", type=Path, help="a file that JSON lines are appended to")
