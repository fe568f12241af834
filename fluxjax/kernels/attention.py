"""One attention function in front of the implementations."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from einops import rearrange

from fluxjax.arguments import convert_arguments
from fluxjax.kernels.blocks import BlockSizes, chip_of, default_device, even, named, round_up
from fluxjax.numeric import wide_dtype
from fluxjax.shapes import Array, Float, Int

Implementation = Literal["xla", "xla_chunked", "cudnn", "flash_tpu", "flash_gpu"]
IMPLEMENTATIONS = get_args(Implementation)
LOGITS = 2**29
"""Bytes of one example's float32 logits beyond which None takes xla_chunked rather than xla."""
_CHUNK = 2**26
"""Bytes of the logits that xla_chunked holds."""
_CACHE = 2**25
"""Bytes of all heads' logits from which CPUs take a head after another."""


@convert_arguments
def attention(
    q: Float[Array, "queries heads head_dim"],
    k: Float[Array, "keys heads head_dim"],
    v: Float[Array, "keys heads head_dim"],
    *,
    bias: Float[Array, "heads queries keys"] | None = None,
    causal: bool = False,
    scale: float | None = None,
    key_length: Int[Array, ""] | int | None = None,
    implementation: str | None = None,
    block_sizes: BlockSizes | str | None = None,
) -> Float[Array, "queries heads head_dim"]:
    """Mix the values by softmax(scale * q k^T + bias), the softmax and sums in float32.

    - "xla": two matmuls; holds the logits, heads x queries x keys in float32.
    - "xla_chunked": the same by chunks of queries, each computed again for a gradient: a sixth more work, and no more logits
      than 64 MiB an example.
    - "cudnn": NVIDIA GPUs; float16 or bfloat16; head_dim a multiple of 8 up to 128.
    - "flash_tpu": TPUs; bfloat16 or float32 (at the highest precision); neither bias nor causal. Its gradient does 3.5 times
      the forward's matmuls; no derivative but by reverse mode.
    - "flash_gpu": NVIDIA GPUs from Ampere on; float16 or bfloat16; head_dim up to 128; neither bias nor causal; gradients as of
      flash_tpu.

    **Arguments:** `q`, `k`, `v`: one dtype. `bias`: added to the logits. `causal`: a query sees the keys up to its own
    index. `scale`: on the logits, 1 / sqrt(head_dim) by default. `key_length`: keys from there on are padding that no query
    sees, of finite values; where it is 0, so is the result. `implementation`: one of the above, or None for the best that
    suits, which `select_attention` says. `block_sizes`: of flash_tpu, flash_gpu or xla_chunked, or a name of
    `fluxjax.kernels.blocks.PRESETS`.
    **Returns:** the mixed values, in the dtype of `q`.
    **Raises:** `ValueError` if `implementation` is unknown or does not suit, `block_sizes` do not, or `key_length` is a plain
    number and none of 1 to keys.
    **Source:** Vaswani et al. 2017, eq. 1.
    """
    chosen = _chosen(q, k, bias is not None, causal, implementation)
    if isinstance(key_length, int) and not 1 <= key_length <= len(k):
        raise ValueError(
            f"`attention(key_length={key_length})` must be 1 to {len(k)}, the number of keys."
        )
    length = None if key_length is None else jnp.asarray(key_length, jnp.int32)
    sizes = _sizes(block_sizes, implementation)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    match chosen:
        case "flash_tpu":
            from fluxjax.kernels.flash_tpu import (
                flash,  # Pallas takes a third of a second to import
            )

            return flash(
                q,
                k,
                v,
                scale=scale,
                key_length=length,
                block_sizes=sizes,
                chip=chip_of(default_device()),
            )
        case "flash_gpu":
            from fluxjax.kernels.flash_gpu import flash as flash_gpu

            return flash_gpu(
                q,
                k,
                v,
                scale=scale,
                key_length=length,
                block_sizes=sizes,
                hopper=_capability() == 9,
            )
        case "cudnn":
            mixed = _cudnn(q, k, v, bias, causal, scale, length)
        case "xla_chunked":
            mixed = _chunked(
                q, k, v, bias, causal, scale, length, None if sizes is None else sizes.q
            )
        case _:
            mixed = _xla(q, k, v, bias, causal, scale, length)
    return mixed if length is None else jnp.where(length > 0, mixed, jnp.zeros_like(mixed))


@dataclass(frozen=True)
class Attention:
    """An implementation of `attention` and its block sizes, for what takes an attention: (q, k, v) -> mixed values.

    **Raises:** `ValueError` for an unknown implementation, or for block sizes that it does not take.
    """

    implementation: str | None = None
    block_sizes: BlockSizes | str | None = None

    def __post_init__(self):
        _known(self.implementation)
        _sizes(self.block_sizes, self.implementation)

    def __call__(
        self,
        q: Float[Array, "queries heads head_dim"],
        k: Float[Array, "keys heads head_dim"],
        v: Float[Array, "keys heads head_dim"],
        txt_tokens: int = 0,
    ) -> Float[Array, "queries heads head_dim"]:
        return attention(q, k, v, implementation=self.implementation, block_sizes=self.block_sizes)


def as_attention(choice: "str | Attention | None") -> Attention:
    """Return a choice by name as one."""
    return choice if isinstance(choice, Attention) else Attention(choice)


def resolved(choice: Any, q: Any, k: Any) -> str | None:
    """Return the implementation that a choice comes to for such heads (arrays, or shapes with a dtype): a name, None, an
    `Attention`, or what has one as its `implementation`; None if it is another function."""
    if callable(choice) and not isinstance(choice, Attention):
        if not hasattr(choice, "implementation"):
            return None
        choice = choice.implementation
    return as_attention(choice).implementation or select_attention(q, k)


def select_attention(
    q: Any, k: Any, *, bias: bool = False, causal: bool = False, platform: str | None = None
) -> Implementation:
    """Return the implementation that `attention` takes by default.

    **Arguments:** `q`, `k`: [tokens, heads, head_dim], arrays or shapes with a dtype (`jax.ShapeDtypeStruct`). `bias`,
    `causal`: whether there is one. `platform`: "cpu", "gpu" or "tpu"; this machine's by default.
    **Returns:** on TPUs, flash_tpu for bfloat16 and a head_dim of 128 or 256, from 1024 keys on; on NVIDIA GPUs, cudnn where
    it suits; else xla, or xla_chunked where an example's logits would take more than 512 MiB. flash_gpu is taken by its
    name alone: cudnn suits nearly all that it does, and is published as the faster.
    """
    platform = default_device().platform if platform is None else platform
    (queries, heads, dim), keys = q.shape, k.shape[0]
    if (
        dim in (128, 256)
        and keys >= 1024
        and q.dtype == jnp.bfloat16
        and not _refusal("flash_tpu", q, bias, causal, platform)
    ):
        return "flash_tpu"
    if not _refusal("cudnn", q, bias, causal, platform):
        return "cudnn"
    return "xla" if 4 * heads * queries * keys <= LOGITS else "xla_chunked"


def _chosen(q: Array, k: Array, bias: bool, causal: bool, name: str | None) -> str:
    if name is None:
        return select_attention(q, k, bias=bias, causal=causal)
    _known(name)
    refusal = _refusal(name, q, bias, causal, default_device().platform)
    if refusal:
        raise ValueError(
            f"`attention(implementation={name!r})` needs {refusal}. Pass implementation=None."
        )
    return name


def _known(name: str | None) -> None:
    if name is not None and name not in IMPLEMENTATIONS:
        raise ValueError(
            f"`attention(implementation={name!r})` is unknown. Choose one of {', '.join(IMPLEMENTATIONS)}, or None."
        )


def _refusal(name: str, q: Any, bias: bool, causal: bool, platform: str) -> str | None:
    """Return what an implementation needs and what came instead, if it does not suit."""
    dim = q.shape[-1]
    match name:
        case "cudnn" if not (
            platform == "gpu"
            and q.dtype in (jnp.float16, jnp.bfloat16)
            and dim % 8 == 0
            and dim <= 128
        ):
            return (
                "an NVIDIA GPU, float16 or bfloat16, and a head_dim that is a multiple of 8 up to 128, "
                f"got {platform}, {q.dtype}, {dim}"
            )
        case "flash_tpu" if platform != "tpu" or q.dtype not in (jnp.bfloat16, jnp.float32):
            return f"a TPU, and bfloat16 or float32, got {platform}, {q.dtype}"
        case "flash_gpu" if not (
            _capability() >= 8 and q.dtype in (jnp.float16, jnp.bfloat16) and dim <= 128
        ):
            gpu = f"{platform} {getattr(default_device(), 'compute_capability', '')}".strip()
            return (
                "an NVIDIA GPU of compute capability 8.0 or more, float16 or bfloat16, and a head_dim up to 128, "
                f"got {gpu}, {q.dtype}, {dim}"
            )
        case "flash_tpu" | "flash_gpu" if bias or causal:
            return f"an attention without bias that is not causal, got {'bias' if bias else 'causal=True'}"
        case _:
            return None


def _sizes(block_sizes: BlockSizes | str | None, implementation: str | None) -> BlockSizes | None:
    if block_sizes is None:
        return None
    sizes = named(block_sizes)
    if implementation not in ("flash_tpu", "flash_gpu", "xla_chunked"):
        raise ValueError(
            "`attention(block_sizes=…)` is for flash_tpu, flash_gpu and xla_chunked, "
            f"got implementation={implementation!r}. Name one."
        )
    if implementation == "xla_chunked" and sizes != BlockSizes(q=sizes.q):
        raise ValueError(
            f"`attention(implementation='xla_chunked')` takes `BlockSizes(q=…)` alone, got {sizes}."
        )
    return sizes


def _capability() -> float:
    """Return an NVIDIA GPU's compute capability, such as 9.0, and 0 of other devices."""
    try:
        return float(getattr(default_device(), "compute_capability", 0))
    except ValueError:  # AMD's have names
        return 0.0


def _xla(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None,
    causal: bool,
    scale: float,
    length: Array | None,
) -> Array:
    """Attention with all of its logits. On CPUs large ones are computed a head after another: plain matmuls, of logits that
    stay in the cache, took 0.6 of the time of those batched over 24 heads of 1536 tokens."""

    def mix(q: Array, k: Array, v: Array, bias: Array | None) -> Array:
        return _head(q, k, v, bias, causal, scale, length)

    def together() -> Array:
        return jax.vmap(mix, in_axes=(1, 1, 1, 0), out_axes=1)(q, k, v, bias)

    def apart() -> Array:
        heads = (*(jnp.swapaxes(x, 0, 1) for x in (q, k, v)), bias)
        return jnp.swapaxes(jax.lax.map(lambda head: mix(*head), heads), 0, 1)

    if q.shape[1] == 1 or 4 * q.shape[1] * len(q) * len(k) < _CACHE:
        return together()
    return jax.lax.platform_dependent(cpu=apart, default=together)


def _head(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None,
    causal: bool,
    scale: float,
    length: Array | None,
    start: Any = 0,
) -> Array:
    """One head's attention as two matmuls, [queries, head_dim], of queries from `start` on; on XLA:CPU, one training step of a
    small FLUX took 0.82 of its time with `jax.nn.dot_product_attention`, whose operands are transposed."""
    wide = wide_dtype(q.dtype)
    logits = scale * jnp.einsum("qd,kd->qk", q, k, preferred_element_type=wide)
    if bias is not None:
        logits = logits + bias.astype(wide)
    keys = jnp.arange(k.shape[0])
    if causal:
        logits = jnp.where(start + jnp.arange(q.shape[0])[:, None] >= keys, logits, -jnp.inf)
    if length is not None:
        # Finite, so that a length of 0 gives numbers, which `attention` sets to 0.
        logits = jnp.where(keys < length, logits, jnp.finfo(wide).min)
    weights = jax.nn.softmax(logits).astype(v.dtype)
    return jnp.einsum("qk,kd->qd", weights, v, preferred_element_type=wide).astype(q.dtype)


def _chunked(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None,
    causal: bool,
    scale: float,
    length: Array | None,
    chunk: int | None,
) -> Array:
    """`_xla`, a head and a chunk of its queries after another, each recomputed for a gradient."""
    queries, keys = len(q), len(k)
    size = even(queries, max(1, _CHUNK // (4 * keys))) if chunk is None else min(chunk, queries)
    missing = round_up(queries, size) - queries
    starts = jnp.arange(0, queries, size)

    # In a loop nothing is moved across its turns, so that the barriers against that would only cost.
    @partial(jax.checkpoint, prevent_cse=False)
    def mix(start: Array, q: Array, k: Array, v: Array, bias: Array | None) -> Array:
        return _head(q, k, v, bias, causal, scale, length, start)

    def one(head: tuple) -> Array:
        q, k, v, bias = head
        if len(starts) == 1:
            return mix(starts[0], q, k, v, bias)
        q = rearrange(jnp.pad(q, ((0, missing), (0, 0))), "(chunks q) d -> chunks q d", q=size)
        if bias is not None:
            bias = rearrange(
                jnp.pad(bias, ((0, missing), (0, 0))), "(chunks q) k -> chunks q k", q=size
            )
        # A gradient sums over the chunks in the dtype of what enters the loop.
        wide = k.astype(wide_dtype(k.dtype)), v.astype(wide_dtype(v.dtype))

        def part(chunk: tuple) -> Array:
            start, q, bias = chunk
            return mix(start, q, wide[0].astype(k.dtype), wide[1].astype(v.dtype), bias)

        return rearrange(jax.lax.map(part, (starts, q, bias)), "chunks q d -> (chunks q) d")[
            :queries
        ]

    heads = (*(jnp.swapaxes(x, 0, 1) for x in (q, k, v)), bias)
    return jnp.swapaxes(jax.lax.map(one, heads), 0, 1)


def _cudnn(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None,
    causal: bool,
    scale: float,
    length: Array | None,
) -> Array:
    bias = None if bias is None else bias[None].astype(q.dtype)
    lengths = None if length is None else length[None]
    return jax.nn.dot_product_attention(
        q[None],
        k[None],
        v[None],
        bias=bias,
        is_causal=causal,
        scale=scale,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )[0]
