"""Compile training steps of full-size models for chips that are not there.

Each row has the memory on a device, and operations and communication beside their formulas. TPUs
need the libtpu wheel, GPUs JAX's CUDA plugin; JAX_PLATFORMS=cpu keeps JAX from looking for either.
One program takes minutes and some GB.
"""

import argparse
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
from bench_gpu_aot import GPUS, gpu_topology
from bench_parts import pretended
from bench_tpu import CHIPS, compiled_text
from jax.experimental import topologies
from program import read

from fluxjax.checkpoint.defaults import load_defaults
from fluxjax.devices.mesh import make_mesh
from fluxjax.train.config import TrainConfig, train_config
from fluxjax.train.cost import step_cost
from fluxjax.train.loop import lower_step
from fluxjax.train.setup import TrainingSetup, known_shapes, training_shapes

# What is called v5p-8 has 4 chips.
TPUS = {**CHIPS, "v5p-8": ({"topology_name": "v5p:2x2x1"}, 95.74)}
"""Topologies, and the GiB of memory that programs may use on a device."""
GPU_SHARE = 0.92
"""Of a GPU's memory, what programs may use: the rest is CUDA's and the driver's."""
FULL = {
    "model": "dev",
    "dtype": "bfloat16",
    "remat": True,
    "train": {"method": "full", "weights_dtype": "bfloat16"},
    "stochastic_rounding": True,
    "ema": 0.0,
}
LORA = {
    "model": "dev",
    "dtype": "bfloat16",
    "remat": True,
    "train": {"method": "lora", "rank": 16},
    "ema": 0.0,
}
ADAFACTOR = {"optimizer": {"name": "adafactor"}}


@dataclass(frozen=True)
class Program:
    """A training step: for a chip, on a mesh, of a configuration.

    `values`: of the configuration, without its batch and its size.
    """

    chip: str
    values: dict[str, Any]
    mesh: dict[str, int] = field(default_factory=dict)


def _lora(quantize: str | None = None) -> dict[str, Any]:
    return LORA if quantize is None else {**LORA, "train": {**LORA["train"], "quantize": quantize}}


PROGRAMS = {
    "v6e-8-adamw": Program("v6e-8", FULL, {"fsdp": 8}),
    "v6e-8-adamw-data2": Program("v6e-8", FULL, {"data": 2, "fsdp": 4}),
    "v6e-8-adafactor": Program("v6e-8", {**FULL, **ADAFACTOR}, {"fsdp": 8}),
    "v5p-8-adamw": Program("v5p-8", FULL, {"fsdp": 4}),
    "v5p-8-adamw-data2": Program("v5p-8", FULL, {"data": 2, "fsdp": 2}),
    "24gb-lora": Program("rtx4090", _lora()),
    "24gb-lora-int8": Program("rtx4090", _lora("int8")),
    "24gb-lora-nf4": Program("rtx4090", _lora("nf4")),
    "80gb-lora": Program("h100", _lora()),
    "80gb-lora-int8": Program("h100", _lora("int8")),
}


def devices_of(chip: str) -> list[Any]:
    """Return the devices of a topology, for which programs compile without them."""
    if chip in GPUS:
        return list(gpu_topology(chip).devices)
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return list(topologies.get_topology_desc(platform="tpu", **TPUS[chip][0]).devices)


def limit_of(chip: str) -> float:
    """Return the bytes of memory that programs may use on a device."""
    if chip in GPUS:
        return GPU_SHARE * GPUS[chip]["memory"]
    return TPUS[chip][1] * 2**30


def measured(name: str, batch: int, size: int) -> dict[str, Any]:
    """Compile a program; return its memory, operations and communication on a device."""
    program = PROGRAMS[name]
    devices = devices_of(program.chip)
    config = train_config({**program.values, "batch": batch, "data": {"size": size}})
    mesh = make_mesh(**program.mesh, devices=devices)
    setup = training_shapes(config, known_shapes(config), mesh, load_defaults(config.model))
    row = {
        "machine": program.chip,
        "devices": mesh.size,
        "program": name,
        "mesh": ",".join(f"{axis}={count}" for axis, count in program.mesh.items()),
        "size": size,
        "batch": batch,
        "limit GB": round(limit_of(program.chip) / 1e9, 1),
    }
    start = time.perf_counter()
    try:
        row |= _compiled(setup, config, devices[0], "gpu" if program.chip in GPUS else "tpu")
    except jax.errors.JaxRuntimeError as error:  # a row that does not fit is a result
        row |= {"error": " ".join(str(error).split())[:400]}
    return {**row, "compile s": round(time.perf_counter() - start, 1)}


def _compiled(
    setup: TrainingSetup, config: TrainConfig, device: Any, platform: str
) -> dict[str, Any]:
    pretend = SimpleNamespace(platform=platform, device_kind=device.device_kind)
    with pretended(pretend):
        lowered, flop = lower_step(setup, config)
    if platform == "tpu":
        compiled, text = compiled_text(lowered, {})
    else:
        compiled = lowered.compile()
        text = compiled.as_text()
    cost, found = step_cost(compiled, flop, jax.devices()[0]), read(text)
    return {
        "arguments GB": round(cost.arguments / 1e9, 2),
        "temporaries GB": round(cost.temporaries / 1e9, 2),
        "in all GB": round(cost.bytes / 1e9, 2),
        "TFLOP": round((found.flop + found.declared) / 1e12, 1),
        "TFLOP by formula": round(flop / setup.mesh.size / 1e12, 1),
        "GB sent": round(found.sent / 1e9, 2),
        "GB copied": round(found.copied / 1e9, 2),
        "collectives": {kind: f"{one.sent / 1e9:.2f} GB" for kind, one in found.moved.items()},
    }


def largest(name: str, size: int) -> list[dict[str, Any]]:
    """Return rows of growing batches, up to the largest one that fits.

    Memory is affine in the batch: two programs tell the largest, and it is compiled as well.
    """
    program = PROGRAMS[name]
    unit = program.mesh.get("data", 1) * program.mesh.get("fsdp", 1)
    rows = [measured(name, unit * count, size) for count in (1, 2)]
    if any("error" in row for row in rows):
        return rows
    first, second = (row["in all GB"] for row in rows)
    count = 1 + int((rows[0]["limit GB"] - first) / (second - first))
    if count > 2:
        rows.append(measured(name, unit * count, size))
    return rows


def bench_train(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Compile the named programs."""
    rows = []
    for name in options.programs:
        for size in options.sizes:
            if options.batches:
                found = [measured(name, batch, size) for batch in options.batches]
            else:
                found = largest(name, size)
            print(*found, sep="\n", flush=True)
            rows += found
    return rows


def add_commands(commands: Any) -> None:
    """Add the sub-command."""
    train = commands.add_parser(
        "train-aot", help="training steps of full-size dev, compiled without the devices"
    )
    add = train.add_argument
    add("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    add("--sizes", nargs="+", type=int, default=[512, 1024], help="pixels along a side")
    add("--batches", nargs="+", type=int, help="by default up to the largest that fits")
    add("--output", type=Path, help="append the rows as JSON lines to this file")
    train.set_defaults(run=bench_train)
