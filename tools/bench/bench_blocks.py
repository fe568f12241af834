"""scratch"""
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from bench_gpu_aot import GPUS, gpu_topology
from bench_parts import pretended
from bench_tpu import CHIPS, compiled_text, eight_bits
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from fluxjax import Flux, FluxConfig
from fluxjax.nets.flux_attention import block_runner
from fluxjax.nets.flux_blocks import DoubleModulation
from fluxjax.nets.flux_state import HiddenState, Modulation
from fluxjax.nets.flux_prepare import without_modulation
from fluxjax.nets.layers import Rotation
from fluxjax.nets.quantized import EIGHT_BITS
from fluxjax.nets.scan import scan_blocks

DEPTH = 4


def target_device(target):
    if target in GPUS:
        (device,) = gpu_topology(target).devices
        seen = SimpleNamespace(platform="gpu", compute_capability=f"{GPUS[target]['major']}.{GPUS[target]['minor']}")
        return device, seen
    if target == "cpu":
        d = jax.devices("cpu")[0]
        return d, d
    device = topologies.get_topology_desc(platform="tpu", **CHIPS[target][0]).devices[0]
    return device, device


def compiled_block(target, kind, weights, img_tokens=4096, txt_tokens=512):
    device, seen = target_device(target)
    where = SingleDeviceSharding(device)
    config = replace(FluxConfig.dev(), double_depth=DEPTH, single_depth=DEPTH)

    def struct(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    flux = eqx.filter_eval_shape(Flux, config, key=jax.random.key(0))
    flux = jax.tree.map(lambda leaf: struct(*leaf.shape), flux)
    flux = eight_bits(flux, EIGHT_BITS[weights]) if weights in EIGHT_BITS else flux
    flux = jax.tree.map(lambda leaf: struct(*leaf.shape, dtype=leaf.dtype), flux)
    double, single = without_modulation(flux.double, flux.single)
    width = config.width
    modulation = Modulation(
        DoubleModulation(struct(DEPTH, 6 * width), struct(DEPTH, 6 * width)), struct(DEPTH, 3 * width), None)
    tokens = img_tokens + txt_tokens
    rotation = Rotation(*(struct(tokens, 64, dtype=jnp.float32),) * 2)
    hidden = HiddenState(struct(img_tokens, width), struct(txt_tokens, width), modulation, rotation)
    attention = "cudnn" if target in GPUS else None

    def run_double(blocks, hidden):
        return scan_blocks(blocks, (hidden.img, hidden.txt), block_runner(hidden, attention, None),
            inputs=(hidden.modulation.double, ()))

    def run_single(blocks, hidden, joint):
        return scan_blocks(blocks, joint, block_runner(hidden, attention, None), inputs=(hidden.modulation.single, ()))

    with pretended(seen):
        if kind == "double":
            lowered = jax.jit(run_double).lower(double, hidden)
        else:
            lowered = jax.jit(run_single).lower(single, hidden, struct(tokens, width))
    if target in GPUS:
        compiled = lowered.compile(compiler_options={"xla_gpu_enable_triton_gemm": False})
        return compiled, compiled.as_text()
    if target == "cpu":
        compiled = lowered.compile()
        return compiled, compiled.as_text()
    return compiled_text(lowered, {})
