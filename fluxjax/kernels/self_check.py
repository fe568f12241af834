"""One block of a kernel, run on a device and compared with the same computation in plain JAX."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from fluxjax.kernels.chips import tpu_chip_name
from fluxjax.kernels.cudnn_attention import cudnn_attention
from fluxjax.kernels.xla_attention import LogitOptions, xla_attention
from fluxjax.shapes import Array

MOST_ERROR = 0.02
"""Relative error that a right kernel stays far below: in bfloat16 they have 2e-3 to 4e-3."""
_TOKENS = 320
_TXT_TOKENS = 64
_HEADS = 2
_HEAD_DIM = 128
_EPS = 1e-6
_MOST_REASON = 200
"""Characters of a compiler's error that are repeated."""
_KEY_LENGTH = 290
"""Ends within a block, so that masking is checked too."""

Computation = Callable[..., Array]
"""A traceable function of arrays."""


class BlockCheck(NamedTuple):
    """A kernel, what it should compute, and the arrays that both are given."""

    kernel: Computation
    reference: Computation
    inputs: Sequence[np.ndarray]


def failure_of(check: BlockCheck, device: jax.Device) -> str | None:
    """Compile and run a kernel, and compare what it returns with its reference.

    It may be called while another function is traced: it runs in a thread of its own, which knows
    nothing of that.

    **Arguments:** `device`: on which both run.
    **Returns:** why the kernel can't be used, on one line; None if it can.
    **Raises:** what the reference raises: then nothing is known of the kernel.
    """
    with ThreadPoolExecutor(1, "fluxjax-check") as pool:
        return pool.submit(_failure_here, check, device).result()


def _failure_here(check: BlockCheck, device: jax.Device) -> str | None:
    """Run the check in this thread. Arguments and result as of `failure_of`."""
    with jax.default_device(device):
        expected = _computed(check.reference, check.inputs)
        try:
            found = _computed(check.kernel, check.inputs)
        except Exception as error:  # compilers raise all kinds
            first_line = f"{type(error).__name__}: {error}".split("\n")[0]
            return f"it does not run ({first_line[:_MOST_REASON]})"
    difference = np.linalg.norm(found - expected)
    distance = float(difference / np.linalg.norm(expected))
    if math.isnan(distance) or distance > MOST_ERROR:
        return f"its values are wrong (relative error {distance:.2g})"
    return None


def _computed(function: Computation, inputs: Sequence[np.ndarray]) -> np.ndarray:
    """Compile a function and run it."""
    return np.asarray(jax.jit(function)(*inputs), np.float32)


def block_check(name: str, device: jax.Device) -> BlockCheck:
    """Return the check of a kernel that is a default on this kind of device.

    **Arguments:** `name`: "cudnn", "flash_tpu" or "qkv_tpu".
    """
    if name == "qkv_tpu":
        return _qkv_check(tpu_chip_name(device))
    inputs = [_draw(seed, _TOKENS, _HEADS, _HEAD_DIM) for seed in range(3)]

    def reference(q: Array, k: Array, v: Array) -> Array:
        return xla_attention(q, k, v, None, _logit_options())

    def by_cudnn(q: Array, k: Array, v: Array) -> Array:
        return cudnn_attention(q, k, v, None, _logit_options())

    def by_flash(q: Array, k: Array, v: Array) -> Array:
        from fluxjax.kernels.flash_tpu import flash_attention_tpu

        options = _logit_options()
        return flash_attention_tpu(
            q,
            k,
            v,
            scale=options.scale,
            key_length=options.key_length,
            chip=tpu_chip_name(device),
        )

    kernel = by_flash if name == "flash_tpu" else by_cudnn
    return BlockCheck(kernel, reference, inputs)


def _logit_options() -> LogitOptions:
    """Return what is done to the logits; called by each function, as its array is traced there."""
    return LogitOptions(1 / math.sqrt(_HEAD_DIM), False, jnp.int32(_KEY_LENGTH))


def _draw(seed: int, *shape: int) -> np.ndarray:
    """Return normally distributed numbers in bfloat16."""
    values = np.random.default_rng(seed).normal(size=shape)
    return values.astype(ml_dtypes.bfloat16)


def _qkv_check(chip: str) -> BlockCheck:
    """Return the check of the kernel for q, k and v, with the two parts of a double block."""
    width = _HEADS * _HEAD_DIM
    img_tokens = _TOKENS - _TXT_TOKENS
    rng = np.random.default_rng(9)
    angles = rng.uniform(0, 6, (_TOKENS, _HEAD_DIM // 2))
    inputs = [
        np.cos(angles).astype(np.float32),
        np.sin(angles).astype(np.float32),
        _draw(0, _TXT_TOKENS, 3 * width),
        _draw(1, img_tokens, 3 * width),
        *(_draw(seed, _HEAD_DIM) for seed in range(2, 6)),
    ]

    def kernel(cos: Array, sin: Array, txt: Array, img: Array, *scales: Array) -> Array:
        from fluxjax.kernels.qkv_tpu import fused_qkv_tpu, rotation_factors

        parts = [(txt, scales[0], scales[1]), (img, scales[2], scales[3])]
        factors = rotation_factors(cos, sin)
        qkv = fused_qkv_tpu(parts, factors, width=width, eps=_EPS, chip=chip)
        return jnp.stack(qkv)

    def reference(cos: Array, sin: Array, txt: Array, img: Array, *scales: Array) -> Array:
        txt_qkv = _plain_qkv(txt, *scales[:2])
        img_qkv = _plain_qkv(img, *scales[2:])
        q, k, v = jnp.concatenate([txt_qkv, img_qkv], axis=1)
        rotated_q = _rotated(q, cos, sin)
        rotated_k = _rotated(k, cos, sin)
        joined = jnp.stack([rotated_q, rotated_k, v])
        return joined.reshape(3, _TOKENS, width)

    return BlockCheck(kernel, reference, inputs)


def _plain_qkv(projected: Array, q_scale: Array, k_scale: Array) -> Array:
    """Return q, k and v, [3, tokens, heads, head_dim], of which q and k are normed."""
    wide = projected.astype(jnp.float32)
    by_token = wide.reshape(len(projected), 3, _HEADS, _HEAD_DIM)
    q, k, v = jnp.swapaxes(by_token, 0, 1)

    def normed(x: Array, scale: Array) -> Array:
        mean_square = jnp.mean(x * x, axis=-1, keepdims=True)
        inverse_rms = jax.lax.rsqrt(mean_square + _EPS)
        return x * inverse_rms * scale.astype(jnp.float32)

    return jnp.stack([normed(q, q_scale), normed(k, k_scale), v])


def _rotated(x: Array, cos: Array, sin: Array) -> Array:
    """Return heads whose adjacent features are rotated by a token's angles."""
    even = x[..., ::2]
    odd = x[..., 1::2]
    cos, sin = cos[:, None], sin[:, None]
    rotated_even = even * cos - odd * sin
    rotated_odd = odd * cos + even * sin
    pairs = jnp.stack([rotated_even, rotated_odd], axis=-1)
    return pairs.reshape(x.shape)
