"""Restoration on a mesh: the same images as on one device, or a refusal that says what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import mesh_of, relative
from small import draw, small_flux

from fluxjax import Conditioning, Vae, image_ids, shard
from fluxjax.flow import Decoded, Downsample
from fluxjax.generate import ImageBatch, Recipe, denoise
from fluxjax.generate.degradations import DecodePixels
from fluxjax.generate.restore_image import Measured, check_mesh_of
from fluxjax.nets import VaeConfig

VAE = VaeConfig(channels=(8,), groups=4, resnets=0, latent_channels=2)
"""Of one level, whose images have the size of the latent; the kernels are split over "fsdp"."""
IMAGES, SIZE = 4, 32


def restored(flux, vae, mesh=None):
    """Return latents after two steps by pigdm, which takes gradients of both networks."""
    decode = DecodePixels(vae, SIZE, SIZE, jnp.float32)
    change = Measured(
        operator=Decoded(decode, Downsample(2)),
        std=jnp.float32(0.1),
        size=jnp.float32(0.3),
        iterations=2,
        method="pigdm",
    )
    prompt = draw(IMAGES, 3, 12, seed=1), draw(IMAGES, 6, seed=2)
    batch = ImageBatch(
        draw(IMAGES, 2, 4, 4, seed=3),
        Conditioning(*prompt, image_ids(SIZE, SIZE), jnp.float32(2.0)),
        keys=jax.random.split(jax.random.key(0), IMAGES),
        inputs=draw(IMAGES, 3, 2, 2, seed=4),
    )
    times = jnp.float32([0.9, 0.5, 0.0])
    return denoise(flux, batch, Recipe(times, change=change, remat=True), mesh=mesh)


def test_pixels_are_restored_on_a_mesh_as_on_one_device():
    flux, vae = small_flux(), Vae(VAE, key=jax.random.key(0))
    expected = restored(flux, vae)
    assert np.isfinite(expected).all()
    mesh = mesh_of(data=2, fsdp=2)
    found = restored(shard(flux, mesh), shard(vae, mesh), mesh)
    # Sums in another order, and then divided by a variance of 0.01.
    assert relative(found, expected) <= 1e-4


def test_gradients_of_a_transformer_that_is_split_are_refused():
    split = mesh_of(tensor=2, context=2)
    with pytest.raises(ValueError, match=r"over tensor=2 and context=2\. Use a mesh of data="):
        check_mesh_of("tmpd", split)
    with pytest.raises(ValueError, match="`restore_image` by pigdm takes gradients"):
        check_mesh_of("pigdm", mesh_of(data=2, context=2))
    for method, mesh in (("decoupled", split), ("pigdm", mesh_of(data=2, fsdp=2)), ("dps", None)):
        check_mesh_of(method, mesh)
