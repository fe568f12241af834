"""What memory a machine has for drawing: what JAX takes of the device's, and the host's."""

import os
from dataclasses import dataclass

import jax

from fluxjax.generate.limits import available_host_bytes, memory_bytes
from fluxjax.generate.storages import STORAGES
from fluxjax.kernels.chips import FLASH_CAPABILITY, compute_capability

POOL_FRACTION = 0.75
"""Of a GPU's memory that JAX takes by default."""
LARGE_FRACTION = 0.92
"""Of a GPU's memory that JAX can take where no other program uses it."""
FRACTION_VARIABLES = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")


@dataclass(frozen=True, kw_only=True)
class MachineMemory:
    """The memory of a device and of its host.

    `device`: its name. `is_cpu`: whether both are the same. `pool`: bytes that JAX can use; None if
    that is not known. `total`: bytes of the device, where JAX takes a part of them only; else the
    same. `host`: bytes that the host has free; None if that is not known. `storages`: the formats
    whose products the device computes. `plain_attention`: whether no kernel of attention runs
    there.
    """

    device: str
    is_cpu: bool = False
    pool: int | None
    total: int | None
    host: int | None
    storages: tuple[str, ...]
    plain_attention: bool = False

    @property
    def larger_pool(self) -> int | None:
        """Bytes that JAX could use if it took more of the device; None if it does not matter."""
        if self.pool is None or self.total is None or self.pool >= LARGE_FRACTION * self.total:
            return None
        return int(LARGE_FRACTION * self.total)


def machine_memory(device: jax.Device) -> MachineMemory:
    """Return the memory that there is for a device of this process."""
    pool = memory_bytes(device)
    total = pool
    if pool is not None and device.platform == "gpu":
        total = int(pool / pool_fraction())
    names = []
    for storage in STORAGES:
        if device.platform == "cpu" or storage.works_on(device):
            names.append(storage.name)
    is_old_gpu = device.platform == "gpu" and compute_capability(device) < FLASH_CAPABILITY
    return MachineMemory(
        device=device.device_kind,
        is_cpu=device.platform == "cpu",
        pool=pool,
        total=total,
        host=available_host_bytes(),
        storages=tuple(names),
        plain_attention=device.platform == "cpu" or is_old_gpu,
    )


def imagined_machine(total: int) -> MachineMemory:
    """Return the memory of an NVIDIA GPU, from Ampere on, of so many bytes, in an unknown host."""
    return MachineMemory(
        device="an NVIDIA GPU",
        pool=int(pool_fraction() * total),
        total=total,
        host=None,
        storages=tuple(storage.name for storage in STORAGES if not storage.needs_fp8),
    )


def pool_fraction() -> float:
    """Return which part of a GPU's memory JAX takes."""
    for name in FRACTION_VARIABLES:
        try:
            fraction = float(os.environ.get(name, ""))
        except ValueError:
            continue
        if 0 < fraction <= 1:
            return fraction
    return POOL_FRACTION
