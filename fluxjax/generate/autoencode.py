"""Images to latents and back, a batch at once."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from fluxjax.devices.run import on_mesh
from fluxjax.devices.vae_rows import split_vae_rows
from fluxjax.nets.vae import Vae
from fluxjax.shapes import Array, Float


@eqx.filter_jit
def decode(
    vae: Vae,
    latents: Float[Array, "images latent_channels rows columns"],
    *,
    dtype: DTypeLike,
    mesh: Mesh | None = None,
) -> Float[Array, "images height width 3"]:
    """Decode latents one after another, in activations of `dtype`; images are float32 in [-1, 1], clipped, and NaN where the
    network gives infinity. `mesh`: of devices; the VAE is then from `shard`, images are shared over "data" and "fsdp", and the
    rows of each over the other axes."""

    def run(vae: Vae, latents: Array, rest: None) -> Array:
        return jax.lax.map(
            lambda one: _clipped(vae.decode(one.astype(dtype)).astype(jnp.float32)), latents
        )

    return _autoencoded(run, vae, latents, mesh)


def _clipped(image: Array) -> Array:
    return jnp.where(jnp.isfinite(image), jnp.clip(image, -1, 1), jnp.nan)


@eqx.filter_jit
def encode(
    vae: Vae,
    images: Float[Array, "images height width 3"],
    *,
    dtype: DTypeLike,
    keys: Array | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, "images latent_channels rows columns"]:
    """Encode images of [-1, 1] one after another, in activations of `dtype`, to float32. `keys`: one an image, to sample the
    posterior, whose mean is given without. `mesh`: as for `decode`. **Raises:** `ValueError` for sizes that are not multiples
    of 8."""

    def run(vae: Vae, rows: tuple[Array, Array | None], rest: None) -> Array:
        return jax.lax.map(
            lambda row: vae.encode(row[0].astype(dtype), key=row[1]).astype(jnp.float32), rows
        )

    return _autoencoded(run, vae, (images, keys), mesh)


def _autoencoded(
    run: Callable[[Any, Any, Any], Array], vae: Vae, rows: Any, mesh: Mesh | None
) -> Array:
    if mesh is None:
        return run(vae, rows, None)
    shared = [axis for axis in ("tensor", "context") if mesh.shape[axis] > 1]
    return on_mesh(
        lambda vae, rows, rest: run(split_vae_rows(vae, shared) if shared else vae, rows, rest),
        mesh,
        vae,
        rows,
    )
