"""The implementations of attention as the tests run them: kernels of accelerators interpreted."""

import sys
import threading
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic.interpret import thread_map

# Public from JAX 0.11 on.
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from fluxjax import attention
from fluxjax.kernels import Attention
from fluxjax.kernels.block_sizes import BlockSizes
from fluxjax.kernels.flash_gpu import flash_attention_gpu
from fluxjax.kernels.flash_tpu import flash_attention_tpu

MOSAIC_SIZES = BlockSizes(q=128, kv=64, q_dkv=64, kv_dkv=128)
"""The smallest blocks that the kernels for Hopper take."""

_compiled = {}
_compiling = threading.Lock()


def run_thread(jaxpr, consts, *args):
    """Run the program of one thread, which is compiled once and not for every thread of a grid.

    JAX 0.10's interpreter of GPU kernels compiles it each time, which takes 20 times as long. The
    lock is for threads that start together.
    """
    with _compiling:
        if jaxpr not in _compiled:
            shapes = []
            for variable in (*jaxpr.constvars, *jaxpr.invars):
                shapes.append(jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype))
            program = jax.jit(partial(_evaluate, jaxpr)).lower(*shapes)
            _compiled[jaxpr] = program.compile()
    return _compiled[jaxpr](*consts, *args)


def _evaluate(jaxpr, *args):
    consts = len(jaxpr.constvars)
    jax.core.eval_jaxpr(jaxpr, args[:consts], *args[consts:])
    return []


thread_map._run_jaxpr = run_thread


def _common(q, key_length):
    length = None if key_length is None else jnp.asarray(key_length, jnp.int32)
    return {"scale": q.shape[-1] ** -0.5, "key_length": length}


def flash_tpu(q, k, v, *, key_length=None, block_sizes=BlockSizes(q=128)):
    return flash_attention_tpu(
        q, k, v, **_common(q, key_length), chip="v4", block_sizes=block_sizes, interpret=True
    )


def flash_mosaic(q, k, v, *, key_length=None, block_sizes=MOSAIC_SIZES, detect_races=False):
    """flash_gpu as Hopper has it. The interpreter has no tensor cores, so it takes float32."""
    parameters = InterpretGPUParams(
        out_of_bounds_reads="uninitialized",
        uninitialized_memory="zero",
        detect_races=detect_races,
    )
    return flash_attention_gpu(
        q, k, v, **_common(q, key_length), block_sizes=block_sizes, interpret=parameters
    )


def flash_triton(q, k, v, *, key_length=None, block_sizes=BlockSizes(q=64)):
    """flash_gpu as GPUs other than Hopper have it."""
    return flash_attention_gpu(
        q,
        k,
        v,
        **_common(q, key_length),
        block_sizes=block_sizes,
        hopper=False,
        interpret=True,
    )


def xla_head_by_head(q, k, v, **options):
    """xla as CPUs compute large logits: one head after another."""
    with mock.patch.object(sys.modules["fluxjax.kernels.xla_attention"], "CPU_CACHE_BYTES", 0):
        return attention(q, k, v, implementation="xla", **options)


IMPLEMENTATIONS = {
    "xla": partial(attention, implementation="xla"),
    "xla, head by head": xla_head_by_head,
    "xla_chunked": partial(attention, implementation=Attention("xla_chunked", BlockSizes(q=48))),
    "flash_tpu": flash_tpu,
    "flash_gpu, Mosaic": flash_mosaic,
    "flash_gpu, Triton": flash_triton,
}

BLOCKED = ["xla_chunked", "flash_tpu", "flash_gpu, Mosaic", "flash_gpu, Triton"]
"""Those that never hold all logits."""


def exact(q, k, v, grad, length=None):
    """Return attention and its gradients for q, k and v, in float64.

    Each comes with the size of the numbers that it is a sum of.
    """
    q, k, v, grad = (np.asarray(x, np.float64) for x in (q, k, v, grad))
    scale = q.shape[-1] ** -0.5
    logits = scale * np.einsum("qhd,khd->hqk", q, k)
    if length is not None:
        logits[..., length:] = -np.inf
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("hqk,khd->qhd", weights, v)
    weight_grads = np.einsum("qhd,khd->hqk", grad, v)
    means = (weights * weight_grads).sum(-1, keepdims=True)
    logit_grads = scale * weights * (weight_grads - means)
    dq = np.einsum("hqk,khd->qhd", logit_grads, k)
    dk = np.einsum("hqk,qhd->khd", logit_grads, q)
    dv = np.einsum("hqk,qhd->khd", weights, grad)
    largest = scale * weight_grads.max()
    terms = (v, largest * k, largest * q, grad)
    sizes = [np.abs(x).max() for x in terms]
    return list(zip((mixed, dq, dk, dv), sizes, strict=True))


def operands(queries, keys, heads, dim, seed, size=1.0, dtype=jnp.float32):
    """Return random q, k, v, and a gradient of the mixed values."""
    rng = np.random.default_rng(seed)
    drawn = []
    for tokens in (queries, keys, keys, queries):
        numbers = (size * rng.standard_normal((tokens, heads, dim))).astype(np.dtype(dtype))
        drawn.append(jnp.asarray(numbers, dtype))
    return drawn


def values_and_gradients(implementation):
    """Return a jitted function: (gradient, key_length, q, k, v) -> mixed values, dq, dk, dv."""

    @jax.jit
    def run(grad, length, *inputs):
        mixed, pull = jax.vjp(lambda *x: implementation(*x, key_length=length), *inputs)
        return mixed, *pull(grad)

    return run
