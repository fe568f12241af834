"""How the matrices of blocks may be stored in fewer bits, as data that memory is planned with."""

from dataclasses import dataclass

import jax

from fluxjax.kernels.chips import has_fp8_products


@dataclass(frozen=True, kw_only=True)
class WeightStorage:
    """A format that matrices of blocks are rounded to.

    `name`: as of `quantize`. `bits`: of a weight, scales included. `error`: relative error of the
    velocity, as measured on the tiny model (`tools/measure/measure_quantized.py`). `needs_fp8`:
    whether a device has to multiply fp8, since others would convert the weights in each step.
    """

    name: str
    bits: float
    error: float
    needs_fp8: bool = False

    def works_on(self, device: jax.Device) -> bool:
        """Return whether a device multiplies this format without converting it."""
        return not self.needs_fp8 or has_fp8_products(device)


STORAGES = (
    WeightStorage(name="int8", bits=8.01, error=0.013),
    WeightStorage(name="fp8", bits=8.01, error=0.029, needs_fp8=True),
)
"""The formats, the most exact first."""


def storage_named(name: str) -> WeightStorage:
    """Return a format. **Raises:** `ValueError` for an unknown name."""
    for storage in STORAGES:
        if storage.name == name:
            return storage
    known = ", ".join(storage.name for storage in STORAGES)
    raise ValueError(f"There is no storage {name!r} of weights. Choose one of {known}.")


def check_storage(name: str, device: jax.Device) -> None:
    """**Raises:** `ValueError` for a format that an accelerator only converts to a wider one."""
    if device.platform == "cpu" or storage_named(name).works_on(device):
        return
    raise ValueError(
        f"--quantize {name} needs a device that multiplies fp8 (NVIDIA from compute capability "
        f"8.9, as RTX 40 and H100), and {device.device_kind} would convert the weights in every "
        "step. Use --quantize int8."
    )
