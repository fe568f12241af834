"""A VAE whose rows are split among devices computes what the whole one does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import mesh_of, relative

from fluxjax import on_mesh, shard
from fluxjax.devices import split_vae_rows
from fluxjax.devices.vae_rows import RowStrip
from fluxjax.generate.autoencode import decode, encode
from fluxjax.nets.rows import WHOLE
from fluxjax.nets.vae import Vae, VaeConfig

# The norms' sums are taken in another order.
BOUND = 1e-5
MESHES = {
    "rows that 2 do not divide": dict(context=2),
    "a part of each axis": dict(tensor=2, context=2),
    "more devices than rows": dict(context=8),
    "weights too": dict(fsdp=2, context=2),
}


@pytest.fixture(scope="module")
def vae():
    network = jax.eval_shape(
        lambda key: Vae(VaeConfig(channels=(8, 16), resnets=1, groups=4), key=key),
        jax.random.key(0),
    )
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(
            rng.normal(size=leaf.shape, scale=0.2).astype(leaf.dtype), leaf.dtype
        ),
        network,
    )


@pytest.fixture(scope="module")
def batch():
    """Three images, and three latents, of 5 rows."""
    rng = np.random.default_rng(1)
    pixels = rng.uniform(-1, 1, size=(3, 10, 6, 3))
    return jnp.asarray(pixels, jnp.float32), jnp.asarray(
        rng.normal(size=(3, 16, 5, 3)), jnp.float32
    )


def both_ways(vae, pixels, latents, keys):
    """Return the mean latent and a sampled one of each image, and the image of each latent."""

    def one(pixels, latent, key):
        return vae.encode(pixels), vae.encode(pixels, key=key), vae.decode(latent)

    return jax.vmap(one)(pixels, latents, keys)


KEYS = jax.random.split(jax.random.key(3), 3)


@pytest.fixture(scope="module")
def expected(vae, batch):
    return jax.jit(both_ways)(vae, *batch, KEYS)


@pytest.mark.parametrize("name", MESHES)
def test_on_a_mesh_it_is_the_whole_one(vae, batch, expected, name):
    mesh = mesh_of(**MESHES[name])
    placed = shard(vae, mesh)
    parts = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(placed))
    whole = sum(leaf.size for leaf in jax.tree.leaves(placed))
    assert parts <= 1.1 * whole / mesh.shape["fsdp"]

    def run(vae, batch, _):
        return both_ways(split_vae_rows(vae), *batch)

    found = on_mesh(run, mesh, placed, (*batch, KEYS))
    for one, wanted in zip(found, expected, strict=True):
        assert relative(one, wanted) <= BOUND


def test_encode_and_decode_take_a_mesh(vae, batch, expected):
    mesh = mesh_of(data=2, context=2)
    pixels, latents = batch
    found = encode(shard(vae, mesh), pixels, dtype=jnp.float32, keys=KEYS, mesh=mesh)
    assert relative(found, expected[1]) <= BOUND
    images = jnp.clip(expected[2], -1, 1)
    assert jnp.mean(jnp.abs(images) < 1) > 0.01
    found = decode(shard(vae, mesh), latents, dtype=jnp.float32, mesh=mesh)
    assert relative(found, images) <= BOUND


def test_of_the_tiny_model_too(tiny, batch):
    """Its VAE has four resolutions."""
    mesh, latents = mesh_of(context=4), batch[1][:1]
    found = decode(shard(tiny.vae, mesh), latents, dtype=jnp.float32, mesh=mesh)
    np.testing.assert_allclose(found, decode(tiny.vae, latents, dtype=jnp.float32), atol=1e-5)


WITHOUT = {
    "with_halo": lambda self, x, above, below: jnp.pad(x, ((above, below), (0, 0), (0, 0))),
    "channel_means": lambda self, x: WHOLE.channel_means(x),
    "all_cells": lambda self, x: x,
    "is_real": lambda self, x: jnp.ones((len(x), 1, 1), bool),
}


@pytest.mark.parametrize("method", WITHOUT)
def test_without_one_of_its_exchanges_it_is_another(vae, batch, monkeypatch, method):
    """Each is replaced by what one device would do without the others."""
    monkeypatch.setattr(RowStrip, method, WITHOUT[method])
    mesh, latents = mesh_of(context=2), batch[1][:1]

    def run(vae, latents, _):
        return jax.vmap(split_vae_rows(vae).decode)(latents)

    found = on_mesh(run, mesh, shard(vae, mesh), latents)
    expected = jax.jit(lambda vae, latents: jax.vmap(vae.decode)(latents))(vae, latents)
    assert relative(found, expected) > 100 * BOUND
