"""What each implementation of attention needs of the device and of its arguments."""

from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.kernels.chips import FLASH_CAPABILITY, compute_capability


@runtime_checkable
class HasShape(Protocol):
    """An array, or what stands for one: `jax.ShapeDtypeStruct`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...


class DeviceType(NamedTuple):
    """A kind of device. `platform`: "cpu", "gpu" or "tpu". `capability`: the compute capability of
    an NVIDIA GPU, 0 for others. `model`: AMD's name of the GPU, for messages."""

    platform: str
    capability: float = 0.0
    model: str = ""

    def __str__(self) -> str:
        return f"{self.platform} {self.model or (self.capability or '')}".strip()


def target_of(device: jax.Device) -> DeviceType:
    """Return the kind of a device."""
    model = str(getattr(device, "compute_capability", ""))
    return DeviceType(device.platform, compute_capability(device), model)


def unmet_requirement(
    name: str, q: HasShape, bias: bool, causal: bool, target: DeviceType
) -> str | None:
    """Return what an implementation needs and what it got instead; None if it supports these.

    **Arguments:** `name`: of the implementation. `q`: [tokens, heads, head_dim]. `bias`, `causal`:
    whether there is a bias or a causal mask.
    """
    dim = q.shape[-1]
    half_precision = q.dtype in (jnp.float16, jnp.bfloat16)
    # cuDNN's flash attention, and bfloat16 in the matmul units, come with Ampere.
    is_new_gpu = target.platform == "gpu" and target.capability >= FLASH_CAPABILITY
    if name == "cudnn" and not (is_new_gpu and half_precision and dim % 8 == 0 and dim <= 128):
        return (
            "an NVIDIA GPU of compute capability 8.0 or more, float16 or bfloat16, and a head_dim "
            f"that is a multiple of 8 up to 128, got {target}, {q.dtype}, {dim}"
        )
    if name == "flash_tpu" and (
        target.platform != "tpu" or q.dtype not in (jnp.bfloat16, jnp.float32)
    ):
        return f"a TPU, and bfloat16 or float32, got {target}, {q.dtype}"
    if name == "flash_gpu" and not (is_new_gpu and half_precision and dim <= 128):
        return (
            "an NVIDIA GPU of compute capability 8.0 or more, float16 or bfloat16, and a "
            f"head_dim up to 128, got {target}, {q.dtype}, {dim}"
        )
    if name in ("flash_tpu", "flash_gpu") and (bias or causal):
        got = "a bias" if bias else "causal=True"
        return f"an attention without bias that is not causal, got {got}"
    return None
