"""Networks on several devices, or on one that is too small: meshes, sharding, streaming."""

from fluxjax.devices.copies import mean_of_copies
from fluxjax.devices.local import local
from fluxjax.devices.mesh import make_mesh
from fluxjax.devices.offload import fetch, offload, residency
from fluxjax.devices.run import on_mesh
from fluxjax.devices.shard import shard
from fluxjax.devices.specs import shardings, specs
from fluxjax.devices.stream import stream_blocks
from fluxjax.devices.strip_grid import VaeStrips
from fluxjax.devices.tokens import TokenParallelFlux
from fluxjax.devices.vae_memory import choose_strips, limit_vae_memory, without_vae_limit
from fluxjax.devices.vae_rows import split_vae_rows
from fluxjax.devices.vae_strips import strip_vae

__all__ = [
    "TokenParallelFlux",
    "VaeStrips",
    "choose_strips",
    "fetch",
    "limit_vae_memory",
    "local",
    "make_mesh",
    "mean_of_copies",
    "offload",
    "on_mesh",
    "residency",
    "shard",
    "shardings",
    "specs",
    "split_vae_rows",
    "stream_blocks",
    "strip_vae",
    "without_vae_limit",
]
