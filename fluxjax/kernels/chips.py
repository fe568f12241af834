"""What the kernels need to know about the device that they run on."""

from contextlib import suppress
from dataclasses import dataclass

import jax


@dataclass(frozen=True, kw_only=True)
class TpuChip:
    """Limits of one kind of TPU.

    **Arguments:** `vmem_bytes`: VMEM of one core. `largest_block`: most tokens of a block that
    flash_tpu chooses by itself.
    """

    vmem_bytes: int
    largest_block: int


TPU_CHIPS = {
    "v4": TpuChip(vmem_bytes=16 * 2**20, largest_block=512),
    "v5e": TpuChip(vmem_bytes=128 * 2**20, largest_block=1024),
    "v5p": TpuChip(vmem_bytes=64 * 2**20, largest_block=1024),
    "v6e": TpuChip(vmem_bytes=128 * 2**20, largest_block=2176),
}
"""The known TPUs, by their short names."""

_PEAK_TFLOPS = {
    "v4": 275.0,
    "v5e": 197.0,
    "v5p": 459.0,
    "v6e": 918.0,
    "A100": 312.0,
    "H100": 989.0,
    "H200": 989.0,
    "H20": 148.0,
    "B200": 2250.0,
    "L40S": 362.0,
    "RTX 4090": 165.0,
    "RTX 5090": 209.0,
}
"""Dense products of bfloat16 by data sheet, in TFLOP per second of one device. For GPUs, by what
their `device_kind` holds as a word."""

_SHORT_NAMES = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}
"""Short names by JAX's `device_kind`."""


def default_device() -> jax.Device:
    """Return the device on which arrays are created by default."""
    # The attribute is defined only when jax is imported, so that mypy does not know it.
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    if isinstance(device, jax.Device):
        return device
    return jax.devices(device)[0]


def tpu_chip_name(device: jax.Device) -> str:
    """Return a key of `TPU_CHIPS` for a device; unknown devices get v4, whose blocks are smallest.

    **Arguments:** `device`: a TPU.
    **Returns:** such as "v6e".
    """
    return _SHORT_NAMES.get(device.device_kind, "v4")


def compute_capability(device: jax.Device) -> float:
    """Return the compute capability of an NVIDIA GPU.

    **Arguments:** `device`: of any kind.
    **Returns:** such as 9.0 for Hopper; 0.0 for other devices.
    """
    try:
        return float(getattr(device, "compute_capability", 0))
    except ValueError:  # AMD GPUs have names here, such as "gfx942"
        return 0.0


def peak_flops(device: jax.Device) -> float | None:
    """Return the floating-point operations per second of dense bfloat16 products, by data sheet.

    **Arguments:** `device`: of any kind.
    **Returns:** None for a device that is not known, as a CPU.
    """
    kind = device.device_kind
    short = _SHORT_NAMES.get(kind)
    if short is not None:
        return 1e12 * _PEAK_TFLOPS[short]
    words = f" {kind.replace('-', ' ')} "
    for name, peak in _PEAK_TFLOPS.items():
        if f" {name} " in words and device.platform == "gpu":
            return 1e12 * peak
    return None


FLASH_CAPABILITY = 8.0
"""Compute capability from which cuDNN has flash attention, and GPUs multiply bfloat16: Ampere."""
FP8_CAPABILITY = 8.9
"""Compute capability from which NVIDIA GPUs multiply fp8: Ada and Hopper."""
_FP8_PREFIXES = ("TPU v7", "TPU7")
"""Of `device_kind`: the TPUs that multiply fp8."""
_FP8_AMD = ("gfx942", "gfx950", "gfx12")
"""Names of the AMD GPUs that multiply fp8."""


def has_fp8_products(device: jax.Device) -> bool:
    """Return whether a device multiplies fp8; others convert it to a wider dtype at each use."""
    if device.platform == "tpu":
        return device.device_kind.startswith(_FP8_PREFIXES)
    name = str(getattr(device, "compute_capability", ""))
    return compute_capability(device) >= FP8_CAPABILITY or name.startswith(_FP8_AMD)


def local_twin(device: jax.Device) -> jax.Device | None:
    """Return a device of the same kind that this process can run programs on.

    **Returns:** None for a device that is only compiled for, as that of a topology.
    """
    with suppress(RuntimeError):  # there is no such platform
        for own in jax.local_devices(backend=device.platform):
            if own.device_kind == device.device_kind:
                return own
    return None
