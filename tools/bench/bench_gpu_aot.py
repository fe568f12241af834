"""Compile for NVIDIA GPUs on a machine without one.

flash_gpu: whether it compiles, and on Hopper its registers and shared memory. Full-size dev: its
memory, and the library calls that its matmuls become. Needs jax's CUDA plugin with CUDA's packages,
absl-py, and JAX_PLATFORMS=cpu, so that JAX does not look for a GPU.
"""

import argparse
import os
import re
import tempfile
import time
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from bench_flash import KERNELS, run_of
from bench_parts import pretended, sample_latents
from bench_tpu import eight_bits, packed
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding

from fluxjax import Flux, FluxConfig, Vae, unroll
from fluxjax.devices import choose_strips, strip_vae
from fluxjax.generate import TextStates
from fluxjax.kernels.flash_gpu import flash_attention_gpu
from fluxjax.nets import VaeConfig
from fluxjax.nets.packed_formats import PACKED_FORMATS
from fluxjax.nets.quantized import EIGHT_BITS

# From the data sheets: compute capability, multiprocessors and their GHz, bytes of memory, bytes
# per second of memory bandwidth, bytes of L2 cache, of shared memory that a thread block may use.
GPUS: dict[str, dict[str, Any]] = {
    "h100": {
        "name": "NVIDIA H100 80GB HBM3",
        "major": 9,
        "minor": 0,
        "cores": 132,
        "clock": 1.98,
        "memory": 84978434048,
        "bandwidth": 3352320000000,
        "cache": 52428800,
        "shared": 232448,
    },
    "h200": {
        "name": "NVIDIA H200",
        "major": 9,
        "minor": 0,
        "cores": 132,
        "clock": 1.98,
        "memory": 150754820096,
        "bandwidth": 4800000000000,
        "cache": 52428800,
        "shared": 232448,
    },
    "a100": {
        "name": "NVIDIA A100-SXM4-80GB",
        "major": 8,
        "minor": 0,
        "cores": 108,
        "clock": 1.41,
        "memory": 85899345920,
        "bandwidth": 2039000000000,
        "cache": 41943040,
        "shared": 166912,
    },
    "rtx4090": {
        "name": "NVIDIA GeForce RTX 4090",
        "major": 8,
        "minor": 9,
        "cores": 128,
        "clock": 2.52,
        "memory": 25769803776,
        "bandwidth": 1008000000000,
        "cache": 75497472,
        "shared": 101376,
    },
}
_TARGET = """
platform_name: "CUDA"
device_description_str: "{name}"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 9 }}
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: {cores}
  fpus_per_core: 128
  clock_rate_ghz: {clock}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {shared}
  shared_memory_per_core: {per_core}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: {cache}
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
}}
"""


def gpu_topology(kind: str, devices: int = 1) -> Any:
    """Return a topology of GPUs of a kind of `GPUS`, for which programs compile without one."""
    target = _TARGET.format(**GPUS[kind], per_core=GPUS[kind]["shared"] + 1024)
    return topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=target, topology=f"1x1x{devices}"
    )


def named_device(device: Any) -> AbstractContextManager:
    """Return the context in which JAX from 0.11 on lowers Triton's kernels for an absent GPU."""
    if not hasattr(device, "core_count") or jax.__version_info__ < (0, 11):
        return nullcontext()
    mesh = Mesh(np.array([device]), ("all",)).abstract_mesh
    return jax.sharding.use_abstract_mesh(mesh)


def kernels_of(folder: Path) -> dict[str, dict[str, int]]:
    """Return the registers and shared memory of Mosaic's kernels.

    They are read from the files that its compiler dumps to a folder, which are only those of
    kernels that it had not compiled before.
    """
    found = {}
    for report in sorted(folder.glob("flash_*.ptxas")):
        (name,) = re.findall(r"flash_([a-z]+)_", report.name)
        text, module = report.read_text(), report.with_suffix(".mlir-passes.log").read_text()
        found[name] = {
            # For each thread at the start of the kernel, before the warpgroups reallocate them.
            "registers": int(re.findall(r"Used (\d+) registers", text)[0]),
            "spilled bytes": sum(int(size) for size in re.findall(r"(\d+) bytes spill", text)),
            "shared memory": int(re.findall(r"dynamic_shared_memory_size %c(\d+)_i32", module)[0]),
        }
    return found


def flash_row(
    kind: str, device: Any, tokens: int, batch: int | None, kind_of_pass: str
) -> dict[str, Any]:
    """Compile a pass of flash_gpu for 24 heads of 128; `kind_of_pass` is a key of `KERNELS`."""
    from fluxjax.kernels import (  # the first one needs absl; the other benches run without it
        flash_mosaic_blocks,
        flash_triton,
    )

    where, rows = SingleDeviceSharding(device), (batch,) if batch else ()
    x = jax.ShapeDtypeStruct((*rows, tokens, 24, 128), jnp.bfloat16, sharding=where)
    # Each example of a batch has its own key length, so that masking is compiled as well.
    lengths = [jax.ShapeDtypeStruct(rows, jnp.int32, sharding=where)] if batch else []
    hopper = GPUS[kind]["major"] == 9
    run = run_of(flash_attention_gpu, kind_of_pass, hopper=hopper)
    if hopper:
        sizes = flash_mosaic_blocks.mosaic_block_sizes(tokens, tokens, 128)
    else:
        sizes = flash_triton.triton_block_sizes(tokens, tokens, 128)
    sizes = {kernel: sizes[kernel] for kernel in KERNELS[kind_of_pass]}
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, MOSAIC_GPU_DUMP_TO=folder),
    ):
        start = time.perf_counter()
        with named_device(device):
            lowered = jax.jit(jax.vmap(run) if batch else run).lower(x, x, x, x, *lengths)
        program = lowered.compile()
        seconds = time.perf_counter() - start
        kernels = kernels_of(Path(folder))
    row = {
        "bench": "gpu-aot",
        "chip": kind,
        "what": "flash_gpu",
        "tokens": tokens,
        "batch": batch,
        "pass": kind_of_pass,
        "sizes": sizes,
        "temporaries MiB": round(program.memory_analysis().temp_size_in_bytes / 2**20, 1),
        "compile s": round(seconds, 1),
    }
    if not hopper:
        return row
    computed = {
        kernel: flash_mosaic_blocks.smem_bytes(kernel, block, 128)
        for kernel, block in sizes.items()
    }
    return row | {"shared memory by shapes": computed, "kernels": kernels}


def transformer_row(
    kind: str, device: Any, weights: str, unrolled: bool, batch: int
) -> dict[str, Any]:
    """Compile 28 steps of dev at 1024x1024, with attention by cuDNN.

    Matmuls are left to cuBLAS, because XLA can choose faster ones in Triton only by trying them on
    a GPU.
    """
    config, where = FluxConfig.dev(), SingleDeviceSharding(device)

    def struct(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    flux = eqx.filter_eval_shape(Flux, config, key=jax.random.key(0))
    flux = jax.tree.map(lambda leaf: struct(*leaf.shape), flux)
    flux = eight_bits(flux, EIGHT_BITS[weights]) if weights in EIGHT_BITS else flux
    flux = packed(flux, weights) if weights in PACKED_FORMATS else flux
    flux = eqx.filter_eval_shape(unroll, flux) if unrolled else flux
    flux = jax.tree.map(lambda leaf: struct(*leaf.shape, dtype=leaf.dtype), flux)
    states = TextStates(struct(batch, 512, config.context), struct(batch, config.pooled))
    inputs = (
        struct(batch, 16, 128, 128, dtype=jnp.float32),
        struct(29, dtype=jnp.float32),
        struct(dtype=jnp.float32),
    )
    gpu = SimpleNamespace(
        platform="gpu", compute_capability=f"{GPUS[kind]['major']}.{GPUS[kind]['minor']}"
    )
    with pretended(gpu):
        run = jax.jit(partial(sample_latents, attention="cudnn"))
        lowered = run.lower(flux, states, *inputs)
    start = time.perf_counter()
    program = lowered.compile(compiler_options={"xla_gpu_enable_triton_gemm": False})
    memory, text = program.memory_analysis(), program.as_text()
    return {
        "bench": "gpu-aot",
        "chip": kind,
        "what": "dev, 28 steps",
        "weights": weights,
        "blocks": "apart" if unrolled else "stacked",
        "batch": batch,
        "compile s": round(time.perf_counter() - start, 1),
        "arguments GB": round(memory.argument_size_in_bytes / 1e9, 2),
        "temporaries GB": round(memory.temp_size_in_bytes / 1e9, 2),
        "calls": dict(Counter(re.findall(r'custom_call_target="([^"]+)"', text))),
        "with a bias": text.count('"epilogue":"BIAS"'),
    }


def vae_row(kind: str, device: Any, call: str, side: int, memory: float | None) -> dict[str, Any]:
    """Compile the VAE's `call`, "decode" or "encode", of a square image in bfloat16.

    `memory`: bytes that it may need, from which strips are chosen; None runs the whole image.
    """
    config, where = VaeConfig.flux(), SingleDeviceSharding(device)

    def struct(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=where)

    vae = eqx.filter_eval_shape(Vae, config, key=jax.random.key(0))
    vae = jax.tree.map(lambda leaf: struct(*leaf.shape), vae)
    cells = side // config.factor
    x = struct(16, cells, cells) if call == "decode" else struct(side, side, 3)
    strips = None
    if memory is not None:
        strips = choose_strips(config, side, side, dtype=jnp.bfloat16, memory=memory)

    def run(vae: Vae, x: jax.Array) -> jax.Array:
        return getattr(vae if strips is None else strip_vae(vae, strips), call)(x)

    gpu = SimpleNamespace(
        platform="gpu", compute_capability=f"{GPUS[kind]['major']}.{GPUS[kind]['minor']}"
    )
    with pretended(gpu):
        lowered = jax.jit(run).lower(vae, x)
    start = time.perf_counter()
    program = lowered.compile()
    return {
        "bench": "gpu-aot",
        "chip": kind,
        "what": f"VAE, {call}",
        "jax": jax.__version__,
        "side": side,
        "strips": None if strips is None else asdict(strips),
        "temporaries GB": round(program.memory_analysis().temp_size_in_bytes / 1e9, 3),
        "compile s": round(time.perf_counter() - start, 1),
    }


def bench_gpu_aot(options: argparse.Namespace) -> list[dict]:
    """Compile for each kind of GPU, and print each row at once."""
    found = []
    for kind in options.chips:
        (device,) = gpu_topology(kind).devices
        for call, side, memory in _VAES if options.vae else ():
            found.append(vae_row(kind, device, call, side, memory))
            print(found[-1], flush=True)
        if options.vae:
            continue
        for tokens, batch in [
            *((tokens, None) for tokens in options.tokens),
            *([(1536, 2)] if options.tokens else []),
        ]:
            for kind_of_pass in KERNELS:
                found.append(flash_row(kind, device, tokens, batch, kind_of_pass))
                print(found[-1], flush=True)
        for weights, unrolled, batch in _TRANSFORMERS if GPUS[kind]["major"] == 9 else ():
            found.append(transformer_row(kind, device, weights, unrolled, batch))
            print(found[-1], flush=True)
    return found


_TRANSFORMERS = [
    ("bfloat16", False, 1),
    ("bfloat16", False, 4),
    ("bfloat16", True, 1),
    ("int8", False, 1),
    ("fp8", False, 1),
    ("fp8", True, 1),
    ("Q4_K", False, 1),
    ("nf4", False, 1),
]


_VAES = [
    ("decode", 1024, None),
    ("decode", 1024, 1e9),
    ("decode", 2048, None),
    ("decode", 2048, 1.5e9),
    ("decode", 4096, None),
    ("decode", 4096, 1.5e9),
    ("decode", 4096, 3e9),
    ("decode", 4096, 6e9),
    ("encode", 4096, None),
    ("encode", 4096, 1.5e9),
]


def add_commands(commands: Any) -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "gpu-aot", help="flash_gpu and full-size dev compiled for NVIDIA GPUs, without one"
    )
    parser.set_defaults(run=bench_gpu_aot)
    parser.add_argument("--chips", nargs="+", choices=GPUS, default=["h200", "a100", "rtx4090"])
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="*",
        default=[4608, 4352, 1536, 4133, 77],
        help="(default: %(default)s)",
    )
    parser.add_argument("--vae", action="store_true", help="only the VAE, whole and in strips")
    parser.add_argument("--output", type=Path, help="append the rows as JSON lines to this file")
