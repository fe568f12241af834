"""Compile each stage of drawing at full size for an NVIDIA GPU, without one: the memory it takes.

The rows are what the formulas of `fluxjax.generate.stage_memory` are checked against. Needs what
`gpu-aot` needs.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from bench_gpu_aot import GPUS, gpu_topology
from bench_parts import VARIANTS, pretended, sample_latents
from bench_tpu import eight_bits, hosted
from jax.sharding import SingleDeviceSharding

from fluxjax import Clip, Flux, Vae
from fluxjax.generate import TextStates, decode, encode, encode_text
from fluxjax.generate.text import PromptIds
from fluxjax.nets import ClipConfig, T5Config, VaeConfig
from fluxjax.nets.quantized import EIGHT_BITS
from fluxjax.nets.t5 import T5

STREAMED = "streamed"
"""In place of a format of weights: bfloat16 in the host's memory, fetched block by block."""


class Stage(NamedTuple):
    """A stage, and what it is compiled for.

    `stage`: "text", "denoise", "decode" or "encode". `size`: pixels along a side of an image.
    `batch`: images, or prompts. `tokens`: of each prompt. `weights`: their format.
    """

    stage: str
    size: int = 1024
    batch: int = 1
    tokens: int = 512
    weights: str = "bfloat16"


STAGES = (
    *(Stage("denoise", size) for size in (512, 768, 1024, 1536, 2048, 4096)),
    *(Stage("denoise", batch=batch) for batch in (2, 4, 16, 64)),
    *(Stage("denoise", size, weights="int8") for size in (512, 1024, 2048)),
    *(Stage("denoise", size, weights="fp8") for size in (512, 1024, 2048)),
    *(Stage("denoise", size, weights=STREAMED) for size in (512, 1024, 2048)),
    Stage("denoise", batch=4, weights="int8"),
    Stage("denoise", tokens=1241),
    *(Stage("decode", size) for size in (512, 1024, 2048, 4096)),
    Stage("decode", batch=4),
    *(Stage("encode", size) for size in (512, 1024, 2048)),
    *(Stage("text", batch=batch) for batch in (1, 4, 16)),
    Stage("text", tokens=256),
    Stage("text", weights="int8"),
    Stage("text", weights=STREAMED),
)


def bench_memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Compile each stage, and print its row at once; one that fails is a row as well."""
    (device,) = gpu_topology(options.chip).devices
    where = SingleDeviceSharding(device)
    major, minor = GPUS[options.chip]["major"], GPUS[options.chip]["minor"]
    gpu = SimpleNamespace(platform="gpu", compute_capability=f"{major}.{minor}")
    found = []
    for stage in STAGES:
        if stage.stage not in options.stages:
            continue
        row = {"bench": "memory-aot", "chip": options.chip, **stage._asdict()}
        start = time.perf_counter()
        try:
            with pretended(gpu):
                lowered = _LOWER[stage.stage](stage, where)
            program = lowered.compile(compiler_options={"xla_gpu_enable_triton_gemm": False})
            memory = program.memory_analysis()
            row |= {
                "arguments": memory.argument_size_in_bytes,
                "host arguments": memory.host_argument_size_in_bytes,
                "results": memory.output_size_in_bytes,
                "temporaries": memory.temp_size_in_bytes,
            }
        except Exception as error:
            row["error"] = str(error).splitlines()[0][:200]
        row["compile s"] = round(time.perf_counter() - start, 1)
        found.append(row)
        print(row, flush=True)
    return found


def _struct(where: SingleDeviceSharding, *shape: int, dtype: Any = jnp.bfloat16) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)


def _network(kind: Any, config: Any, weights: str, where: SingleDeviceSharding) -> Any:
    """Return the shapes of a network whose weights have a format."""
    network = eqx.filter_eval_shape(kind, config, key=jax.random.key(0))
    network = jax.tree.map(lambda leaf: _struct(where, *leaf.shape), network)
    if weights in EIGHT_BITS:
        network = eight_bits(network, EIGHT_BITS[weights])
        network = jax.tree.map(lambda leaf: _struct(where, *leaf.shape, dtype=leaf.dtype), network)
    if weights == STREAMED:
        (device,) = where.device_set
        network = hosted(network, SingleDeviceSharding(device, memory_kind="pinned_host"))
    return network


def _lower_denoise(stage: Stage, where: SingleDeviceSharding) -> Any:
    config, _, steps = VARIANTS["dev"]
    flux = _network(Flux, config, stage.weights, where)
    states = TextStates(
        _struct(where, stage.batch, stage.tokens, config.context),
        _struct(where, stage.batch, config.pooled),
    )
    side = stage.size // 8
    noise = _struct(where, stage.batch, 16, side, side, dtype=jnp.float32)
    times = _struct(where, steps + 1, dtype=jnp.float32)
    guidance = _struct(where, dtype=jnp.float32)
    return jax.jit(sample_latents).lower(flux, states, noise, times, guidance)


def _lower_decode(stage: Stage, where: SingleDeviceSharding) -> Any:
    vae = _network(Vae, VaeConfig.flux(), stage.weights, where)
    side = stage.size // 8
    latents = _struct(where, stage.batch, 16, side, side, dtype=jnp.float32)
    return jax.jit(partial(decode, dtype=jnp.bfloat16)).lower(vae, latents)


def _lower_encode(stage: Stage, where: SingleDeviceSharding) -> Any:
    vae = _network(Vae, VaeConfig.flux(), stage.weights, where)
    images = _struct(where, stage.batch, stage.size, stage.size, 3, dtype=jnp.float32)
    return jax.jit(partial(encode, dtype=jnp.bfloat16)).lower(vae, images)


def _lower_text(stage: Stage, where: SingleDeviceSharding) -> Any:
    clip = _network(Clip, ClipConfig(), "bfloat16", where)
    t5 = _network(T5, T5Config(), stage.weights, where)
    ids = PromptIds(
        _struct(where, stage.batch, 77, dtype=jnp.int32),
        _struct(where, stage.batch, stage.tokens, dtype=jnp.int32),
    )
    return jax.jit(partial(encode_text, dtype=jnp.bfloat16)).lower(clip, t5, ids)


_LOWER: dict[str, Callable[[Stage, SingleDeviceSharding], Any]] = {
    "denoise": _lower_denoise,
    "decode": _lower_decode,
    "encode": _lower_encode,
    "text": _lower_text,
}


def add_commands(commands: Any) -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "memory-aot", help="the memory of each stage of drawing with dev on a GPU, without one"
    )
    parser.set_defaults(run=bench_memory)
    parser.add_argument("--chip", choices=GPUS, default="h200")
    parser.add_argument("--stages", nargs="+", choices=list(_LOWER), default=list(_LOWER))
    parser.add_argument("--output", type=Path, help="append the rows as JSON lines to this file")
