"""Restoration on a mesh: the same images as on one device, also by gradients of split networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import mesh_of, relative
from small import draw, small_flux

from fluxjax import Conditioning, Vae, image_ids, shard
from fluxjax.flow import Decoded, Downsample
from fluxjax.generate import Guidance, ImageBatch, Recipe, denoise
from fluxjax.generate.degradations import DecodePixels
from fluxjax.generate.restore_image import Measured
from fluxjax.nets import VaeConfig

VAE = VaeConfig(channels=(8,), groups=4, resnets=0, latent_channels=2)
"""Of one level, whose images have the size of the latent; the kernels are split over "fsdp"."""
IMAGES, SIZE = 4, 32


def restored(flux, vae, method, mesh=None, scale=1.0):
    """Return latents after two steps by a method that takes gradients of both networks."""
    decode = DecodePixels(vae, SIZE, SIZE, jnp.float32)
    change = Measured(
        operator=Decoded(decode, Downsample(2)),
        std=jnp.float32(0.1),
        size=jnp.float32(0.3),
        iterations=2,
        method=method,
    )
    prompt = draw(IMAGES, 3, 12, seed=1), draw(IMAGES, 6, seed=2)
    other = draw(IMAGES, 3, 12, seed=5), draw(IMAGES, 6, seed=6)
    batch = ImageBatch(
        draw(IMAGES, 2, 4, 4, seed=3),
        Conditioning(*prompt, image_ids(SIZE, SIZE), jnp.float32(2.0)),
        negative=Conditioning(*other, image_ids(SIZE, SIZE), jnp.float32(2.0)),
        keys=jax.random.split(jax.random.key(0), IMAGES),
        inputs=draw(IMAGES, 3, 2, 2, seed=4),
    )
    times = jnp.float32([0.9, 0.5, 0.0])
    recipe = Recipe(times, guidance=Guidance(scale), change=change, remat=True)
    return denoise(flux, batch, recipe, mesh=mesh)


@pytest.mark.parametrize(
    ("method", "sizes", "scale"),
    [
        ("pigdm", {"data": 2, "fsdp": 2}, 1.0),
        ("pigdm", {"tensor": 2}, 1.0),
        # Heads are exchanged for tokens: context divides the 2 heads.
        ("tmpd", {"fsdp": 2, "context": 2}, 1.0),
        # Ring attention, as each device has one head.
        ("tmpd", {"tensor": 2, "context": 2}, 1.0),
        ("dps", {"data": 2, "tensor": 2, "context": 2}, 1.5),
    ],
)
def test_pixels_are_restored_on_a_mesh_as_on_one_device(method, sizes, scale):
    flux, vae = small_flux(), Vae(VAE, key=jax.random.key(0))
    expected = restored(flux, vae, method, scale=scale)
    assert np.isfinite(expected).all()
    mesh = mesh_of(**sizes)
    found = restored(shard(flux, mesh), shard(vae, mesh), method, mesh, scale)
    # Sums in another order, and then divided by a variance of 0.01.
    assert relative(found, expected) <= 1e-4
