"""Measure the memory of restoration on a GPU without one: from programs compiled for it.

One evaluation of the conditioned velocity of full-size dev in bfloat16, or one step by decoupled,
with and without rematerialization of the transformer's blocks and the decoder's layers.
Prints a JSON line for each program. Needs jax's CUDA plugin with CUDA's packages, and
JAX_PLATFORMS=cpu, so that JAX does not look for a GPU.
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from fluxjax import Conditioning, Flux, FluxConfig, Vae, flux_velocity
from fluxjax.flow import (
    Conditioned,
    Correction,
    Decoupled,
    Mask,
    Measurement,
    Operator,
    dps,
    pigdm,
    tmpd,
)
from fluxjax.generate.degradations import DecodePixels, Shrunk
from fluxjax.nets import VaeConfig

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))
from bench_gpu_aot import GPUS, gpu_topology  # found by the line above
from bench_parts import pretended

CORRECTIONS = {"dps": dps, "pigdm": pigdm, "tmpd": tmpd}
ATTENTION = {
    "velocity": "cudnn",
    "decoupled": "cudnn",
    "dps": "cudnn",
    "pigdm": "cudnn",
    "tmpd": "xla_chunked",
}
"""What `restore_image` chooses on a GPU: only attention in plain JAX has forward-mode gradients."""
FACTOR = 4
"""Of the super-resolution whose pixels are measured."""


class Networks(eqx.Module):
    """What a program gets of the model: the transformer and, for pixels, the VAE."""

    flux: Flux
    vae: Vae | None


class Inputs(eqx.Module):
    """The other arguments of a program: `x` and `t`, what is measured, and the prompt's.

    `prompt`: the arguments of `Conditioning`, which checks that they are arrays.
    """

    x: Any
    t: Any
    y: Any
    mask: Any
    prompt: tuple[Any, ...]


def evaluate(
    networks: Networks, inputs: Inputs, *, method: str, remat: bool, size: int
) -> jax.Array:
    """Return one evaluation of a velocity, the prior's or conditioned, or one decoupled step."""
    condition = Conditioning(*inputs.prompt)
    velocity = flux_velocity(networks.flux, condition, attention=ATTENTION[method], remat=remat)
    if method == "velocity":
        return velocity(inputs.x, inputs.t)
    operator: Operator = Mask(inputs.mask)
    if networks.vae is not None:
        decode = DecodePixels(networks.vae, size, size, jnp.bfloat16, remat=remat)
        operator = Shrunk(FACTOR).of_tokens(decode, size, size)
    # A traced deviation would be checked by a callback, which needs a GPU.
    measurement = Measurement(operator, inputs.y, 0.02)
    if method == "decoupled":
        step = Decoupled(measurement)
        half = inputs.t / 2
        return step(velocity, inputs.x, inputs.t, half, None, key=jax.random.key(0))[0]
    correction: Correction = CORRECTIONS[method]()
    return Conditioned(velocity, measurement, correction)(inputs.x, inputs.t)


def measure(kind: str, method: str, measured: str, remat: bool, size: int) -> dict[str, Any]:
    """Compile one program for a kind of GPU, and return its row."""
    (device,) = gpu_topology(kind).devices
    where = SingleDeviceSharding(device)

    def struct(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def bfloat16(network: Any) -> Any:
        return jax.tree.map(lambda leaf: struct(*leaf.shape, dtype=jnp.bfloat16), network)

    config, tokens = FluxConfig.dev(), (size // 16) ** 2
    vae = None
    if measured == "pixels":
        vae = bfloat16(eqx.filter_eval_shape(Vae, VaeConfig.flux(), key=jax.random.key(0)))
    flux = bfloat16(eqx.filter_eval_shape(Flux, config, key=jax.random.key(0)))
    x = struct(tokens, config.in_channels)
    small = size // FACTOR
    prompt = (
        struct(512, config.context, dtype=jnp.bfloat16),
        struct(config.pooled, dtype=jnp.bfloat16),
        struct(tokens, 3),
        struct(),
    )
    y = x if vae is None else struct(3, small, small)
    gpu = SimpleNamespace(
        platform="gpu", compute_capability=f"{GPUS[kind]['major']}.{GPUS[kind]['minor']}"
    )
    start = time.perf_counter()
    with pretended(gpu):
        run = jax.jit(partial(evaluate, method=method, remat=remat, size=size))
        lowered = run.lower(Networks(flux, vae), Inputs(x, struct(), y, x, prompt))
    # Nothing may be tried on a GPU to choose the fastest.
    program = lowered.compile(
        compiler_options={"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}
    )
    memory = program.memory_analysis()
    return {
        "chip": kind,
        "size": size,
        "method": method,
        "measured": measured,
        "remat": remat,
        "attention": ATTENTION[method],
        "arguments_gb": round(memory.argument_size_in_bytes / 1e9, 2),
        "temporaries_gb": round(memory.temp_size_in_bytes / 1e9, 2),
        "compile_s": round(time.perf_counter() - start, 1),
        "jax": jax.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chip", choices=GPUS, default="h100")
    parser.add_argument("--methods", nargs="+", choices=ATTENTION, default=[*ATTENTION])
    parser.add_argument("--measured", nargs="+", default=["latent", "pixels"])
    parser.add_argument("--remat", nargs="+", choices=["no", "yes"], default=["no", "yes"])
    parser.add_argument("--size", type=int, default=1024, help="side of the image in pixels")
    options = parser.parse_args()
    for measured in options.measured:
        for method in options.methods:
            if method == "velocity" and measured == "pixels":
                continue  # it measures nothing
            # A velocity without a gradient keeps nothing.
            for remat in ["no"] if method == "velocity" else options.remat:
                row = measure(options.chip, method, measured, remat == "yes", options.size)
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
