"""Compile training steps of full-size models for chips that are not there, and print their memory.

TPUs need the libtpu wheel, GPUs JAX's CUDA plugin; JAX_PLATFORMS=cpu keeps JAX from looking for
either. One program at a time: each takes minutes and some GB.
"""

import argparse
import json
import time
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
from bench_gpu_aot import gpu_topology
from bench_parts import pretended
from bench_tpu import CHIPS
from jax.experimental import topologies

from fluxjax.checkpoint.defaults import load_defaults
from fluxjax.devices.mesh import make_mesh
from fluxjax.train.config import train_config
from fluxjax.train.loop import compile_step
from fluxjax.train.setup import known_shapes, training_shapes

V5P = {"topology_name": "v5p:2x2x1"}  # what is called v5p-8 has 4 chips
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
    "attention": "xla_chunked",
    "data": {"size": 512},
}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "v6e-8 adafactor": (
        "v6e-8",
        {**FULL, "batch": 8, "optimizer": {"name": "adafactor"}, "data": {"size": 512}},
    ),
    "v6e-8 adamw": ("v6e-8", {**FULL, "batch": 8, "data": {"size": 512}}),
    "v5p-8 adamw": ("v5p-8", {**FULL, "batch": 8, "data": {"size": 1024}}),
    "24 GB lora": ("rtx4090", {**LORA, "batch": 1, "train": {**LORA["train"], "quantize": "int8"}}),
    "80 GB lora": ("h100", {**LORA, "batch": 4}),
}
"""The programs, by name: the chip, and the configuration."""


def chips(name: str) -> list[Any]:
    """Return the devices of a topology, for which programs compile without them."""
    if name == "v5p-8":
        return list(topologies.get_topology_desc(platform="tpu", **V5P).devices)
    if name in CHIPS:
        return list(topologies.get_topology_desc(platform="tpu", **CHIPS[name][0]).devices)
    return list(gpu_topology(name).devices)


def row(name: str) -> dict[str, Any]:
    """Compile a program of `ROWS` and return its memory on each device, in GB."""
    chip, values = ROWS[name]
    devices = chips(chip)
    config = train_config(values)
    mesh = make_mesh(fsdp=len(devices), devices=devices)
    setup = training_shapes(config, known_shapes(config), mesh, load_defaults(config.model))
    platform = "tpu" if chip.startswith("v") else "gpu"
    pretend = SimpleNamespace(platform=platform, device_kind=devices[0].device_kind)
    start = time.perf_counter()
    with pretended(pretend), mock.patch("fluxjax.train.cost.memory_bytes", return_value=None):
        cost = compile_step(setup, config)
    return {
        "bench": "train",
        "what": name,
        "chip": chip,
        "devices": len(devices),
        "arguments GB": round(cost.arguments / 1e9, 2),
        "temporaries GB": round(cost.temporaries / 1e9, 2),
        "in all GB": round(cost.bytes / 1e9, 2),
        "TFLOP a step": round(cost.flop / 1e12, 1),
        "compile s": round(time.perf_counter() - start, 1),
        "jax": jax.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", choices=ROWS)
    for name in parser.parse_args().names:
        print(json.dumps(row(name)), flush=True)


if __name__ == "__main__":
    main()
