"""One attention function in front of the implementations."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

import jax.numpy as jnp

from fluxjax.arguments import convert_arguments
from fluxjax.kernels.block_sizes import BlockSizes, resolve_block_sizes
from fluxjax.kernels.chips import compute_capability, default_device, tpu_chip_name
from fluxjax.kernels.cudnn_attention import cudnn_attention
from fluxjax.kernels.requirements import DeviceType, HasShape, target_of, unmet_requirement
from fluxjax.kernels.verified import is_verified
from fluxjax.kernels.xla_attention import (
    Heads,
    LogitOptions,
    chunked_attention,
    xla_attention,
)
from fluxjax.shapes import Array, Float, Int

Implementation = Literal["xla", "xla_chunked", "cudnn", "flash_tpu", "flash_gpu"]
"""The name of an implementation, as `attention` describes them."""

IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)

MAX_LOGIT_BYTES = 2**29
"""Bytes of one example's float32 logits up to which `select_attention` takes xla."""


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
    implementation: "str | Attention | None" = None,
) -> Float[Array, "queries heads head_dim"]:
    """Compute softmax(scale * q k^T + bias) v; the softmax and the sums are in float32.

    The implementations:

    - "xla": two matmuls; keeps the logits, heads x queries x keys, in memory in float32.
    - "xla_chunked": the same for one chunk of queries after another, at most 64 MiB of logits an
      example. The logits are computed again for a gradient, one sixth more work.
    - "cudnn": NVIDIA GPUs from Ampere on; float16 or bfloat16; head_dim a multiple of 8 up to 128.
    - "flash_tpu": TPUs; bfloat16, or float32 at the highest matmul precision; neither `bias` nor
      `causal`. Its gradient does 3.5 times the matmuls of the forward pass. Reverse mode only.
    - "flash_gpu": NVIDIA GPUs from Ampere on; float16 or bfloat16; head_dim up to 128; neither
      `bias` nor `causal`. Gradients as for flash_tpu.

    **Arguments:**

    - `q`, `k`, `v`: of one dtype.
    - `bias`: added to the logits.
    - `causal`: whether a query attends only to keys up to its own index.
    - `scale`: factor of the logits; 1 / sqrt(head_dim) by default.
    - `key_length`: keys from this index on are padding, which no query attends to; their values
      must be finite. The result is 0 where `key_length` is 0.
    - `implementation`: one of the above, an `Attention`, which has block sizes too, or None for
      the one that `select_attention` returns.

    **Returns:** the mixed values, in the dtype of `q`.
    **Raises:** `ValueError` if `implementation` is unknown or does not support these arguments, or
    if `key_length` is a Python number outside 1 to keys.
    **Source:** Vaswani et al. 2017, eq. 1.
    """
    configured = as_attention(implementation)
    chosen = choose_implementation(q, k, bias is not None, causal, configured.implementation)
    # A traced length cannot be checked, and may be 0.
    if isinstance(key_length, int) and not 1 <= key_length <= len(k):
        raise ValueError(
            f"`attention(key_length={key_length})` must be 1 to {len(k)}, the number of keys."
        )
    length = None if key_length is None else jnp.asarray(key_length, jnp.int32)
    sizes = _check_block_sizes(configured.block_sizes, configured.implementation)
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    options = LogitOptions(scale, causal, length)
    match chosen:
        case "flash_tpu" | "flash_gpu":
            return _flash_attention(chosen, q, k, v, options, sizes)
        case "cudnn":
            mixed = cudnn_attention(q, k, v, bias, options)
        case "xla_chunked":
            mixed = chunked_attention(q, k, v, bias, options, None if sizes is None else sizes.q)
        case _:
            mixed = xla_attention(q, k, v, bias, options)
    if length is None:
        return mixed
    # Without a key there is nothing to mix: the weights above were those of padding.
    return jnp.where(length > 0, mixed, jnp.zeros_like(mixed))


@dataclass(frozen=True)
class Attention:
    """An implementation of `attention` with its block sizes, to pass where an attention is taken.

    It is a function of (q, k, v), the number of text tokens among them, which come first, and the
    number of these that are attended to; the others are padding.

    **Arguments:** `implementation`: a name, as of `attention`. `block_sizes`: for flash_tpu,
    flash_gpu and xla_chunked; sizes, or a name in `fluxjax.kernels.PRESETS`.
    **Raises:** `ValueError` for an unknown implementation, or for block sizes that do not fit it.
    """

    implementation: str | None = None
    block_sizes: BlockSizes | str | None = None

    def __post_init__(self):
        _check_name(self.implementation)
        _check_block_sizes(self.block_sizes, self.implementation)

    def __call__(
        self,
        q: Float[Array, "queries heads head_dim"],
        k: Float[Array, "keys heads head_dim"],
        v: Float[Array, "keys heads head_dim"],
        txt_tokens: int = 0,
        txt_length: Int[Array, ""] | None = None,
    ) -> Float[Array, "queries heads head_dim"]:
        if txt_length is None:
            return attention(q, k, v, implementation=self)
        # Padding has to be the last of the keys: the text goes after the image.
        k, v = (jnp.concatenate([x[txt_tokens:], x[:txt_tokens]]) for x in (k, v))
        key_length = len(k) - txt_tokens + txt_length
        return attention(q, k, v, key_length=key_length, implementation=self)


AttentionChoice = str | Attention | Callable[..., Array] | None
"""An implementation's name, an `Attention`, any function of (q, k, v, txt_tokens, …), or None."""


@runtime_checkable
class HasImplementation(Protocol):
    """A function that computes attention by an implementation that it names, such as `Nag`."""

    @property
    def implementation(self) -> str | Attention | None: ...


def as_attention(choice: str | Attention | None) -> Attention:
    """Return an `Attention`, given as such or as the name of an implementation.

    **Arguments:** `choice`: None for the implementation that `select_attention` returns.
    **Returns:** `choice`, if it is one, or a new one.
    **Raises:** `ValueError` for an unknown name.
    """
    if isinstance(choice, Attention):
        return choice
    return Attention(choice)


def resolve_implementation(choice: AttentionChoice, q: HasShape, k: HasShape) -> str | None:
    """Return the name of the implementation that computes a chosen attention for these shapes.

    **Arguments:** `choice`: an implementation's name, an `Attention`, or a function, whose
    attribute `implementation`, if it has one, is such a choice. `q`, `k`: [tokens, heads,
    head_dim].
    **Returns:** a name in `IMPLEMENTATIONS`; None for a function without that attribute.
    """
    if callable(choice) and not isinstance(choice, Attention):
        if not isinstance(choice, HasImplementation):
            return None
        choice = choice.implementation
    return as_attention(choice).implementation or select_attention(q, k)


def select_attention(
    q: HasShape,
    k: HasShape,
    *,
    bias: bool = False,
    causal: bool = False,
    platform: str | None = None,
    capability: float | None = None,
) -> Implementation:
    """Return the implementation that `attention` takes by default.

    flash_gpu is taken only if it is named: cudnn supports nearly all that it does, and is
    published as faster. On the default device, flash_tpu and cudnn are taken only after a block of
    them has given the values of xla there; that is checked once for a kind of device.

    **Arguments:** `q`, `k`: [tokens, heads, head_dim], arrays or `jax.ShapeDtypeStruct`. `bias`,
    `causal`: whether there is a bias or a causal mask. `platform`: "cpu", "gpu" or "tpu"; that of
    the default device by default. `capability`: the compute capability of an NVIDIA GPU, 0 for a
    GPU of another vendor; by default that of the default device, or 9.0 if it is no GPU.
    **Returns:** on TPUs, flash_tpu for bfloat16, a head_dim of 128 or 256, and at least 1024 keys;
    on NVIDIA GPUs of compute capability 8.0 or more, cudnn where it supports the arguments; else
    xla, or xla_chunked where the logits of one example would take more than 512 MiB.
    """
    device = default_device()
    target = target_of(device)
    if platform is not None:
        if capability is None:
            capability = target.capability if device.platform == platform else 9.0
        target = DeviceType(platform, capability)
    dim, keys = q.shape[-1], k.shape[0]
    # Other heads would be padded to 128 features, float32 takes several passes of the matmul unit,
    # and a few keys fill no block.
    fast_on_tpu = dim in (128, 256) and keys >= 1024 and q.dtype == jnp.bfloat16
    preferred: list[Implementation] = ["flash_tpu", "cudnn"] if fast_on_tpu else ["cudnn"]
    for name in preferred:
        if unmet_requirement(name, q, bias, causal, target) is not None:
            continue
        if platform is not None or is_verified(name, device):
            return name
    return plain_attention(q, k)


def plain_attention(q: HasShape, k: HasShape) -> Implementation:
    """Return the implementation in plain JAX, which forward-mode gradients go through as well.

    Kernels have reverse-mode gradients only: `jax.jvp` and `jax.linearize` of them fail.

    **Arguments:** as for `select_attention`.
    **Returns:** xla, or xla_chunked where the logits of one example would take more than 512 MiB.
    """
    (queries, heads, _), keys = q.shape, k.shape[0]
    logit_bytes = 4 * heads * queries * keys
    return "xla" if logit_bytes <= MAX_LOGIT_BYTES else "xla_chunked"


def choose_implementation(q: Array, k: Array, bias: bool, causal: bool, name: str | None) -> str:
    """Return the named implementation, after checks, or the default one.

    **Arguments:** `bias`, `causal`: whether there is a bias or a causal mask. `name`: None for the
    one that `select_attention` returns.
    **Raises:** `ValueError` for one that is unknown or does not support these.
    """
    if name is None:
        return select_attention(q, k, bias=bias, causal=causal)
    _check_name(name)
    unmet = unmet_requirement(name, q, bias, causal, target_of(default_device()))
    if unmet is not None:
        raise ValueError(
            f"`attention(implementation={name!r})` needs {unmet}. Pass implementation=None."
        )
    return name


def _check_name(name: str | None) -> None:
    if name is not None and name not in IMPLEMENTATIONS:
        raise ValueError(
            f"`attention(implementation={name!r})` is unknown. "
            f"Choose one of {', '.join(IMPLEMENTATIONS)}, or None."
        )


def _check_block_sizes(
    block_sizes: BlockSizes | str | None,
    implementation: str | None,
) -> BlockSizes | None:
    """Return the sizes, of a preset for its name, after a check that they fit."""
    if block_sizes is None:
        return None
    sizes = resolve_block_sizes(block_sizes)
    if implementation not in ("flash_tpu", "flash_gpu", "xla_chunked"):
        raise ValueError(
            "`Attention(block_sizes=…)` is for flash_tpu, flash_gpu and xla_chunked, "
            f"got implementation={implementation!r}. Name one of these implementations."
        )
    if implementation == "xla_chunked" and sizes != BlockSizes(q=sizes.q):
        raise ValueError(
            "`attention(implementation='xla_chunked')` takes only `BlockSizes(q=…)`, "
            f"got {sizes}. Leave out the other sizes."
        )
    return sizes


def _flash_attention(
    name: str,
    q: Array,
    k: Array,
    v: Array,
    options: LogitOptions,
    sizes: BlockSizes | None,
) -> Heads:
    """Run one of the kernels, chosen and compiled for the default device."""
    # Imported here, since Pallas takes a third of a second to import.
    if name == "flash_tpu":
        from fluxjax.kernels.flash_tpu import flash_attention_tpu

        return flash_attention_tpu(
            q,
            k,
            v,
            scale=options.scale,
            key_length=options.key_length,
            block_sizes=sizes,
            chip=tpu_chip_name(default_device()),
        )
    from fluxjax.kernels.flash_gpu import flash_attention_gpu

    return flash_attention_gpu(
        q,
        k,
        v,
        scale=options.scale,
        key_length=options.key_length,
        block_sizes=sizes,
        hopper=compute_capability(default_device()) == 9,
    )
