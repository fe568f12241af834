"""A VAE over strips is the whole one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_shard import mesh_of, relative

import fluxjax
from fluxjax import shard
from fluxjax.devices import vae_rows as tiles
from fluxjax.generate.autoencode import decode, encode
from fluxjax.nets.vae import Vae, VaeConfig

# The norms' sums are taken in another order.
BOUND = 1e-5
MESHES = {
    "rows that 2 do not divide": dict(context=2),
    "a part of each axis": dict(tensor=2, context=2),
    "more devices than rows": dict(context=8),
    "images too": dict(data=2, context=2),
    "weights too": dict(fsdp=2, context=2),
}


@pytest.fixture(scope="module")
def vae():
    return Vae(VaeConfig(channels=(8, 16), resnets=1, groups=4), key=jax.random.key(0))


def drawn(images):
    pixels = jax.random.uniform(jax.random.key(1), (images, 10, 6, 3), minval=-1, maxval=1)
    return pixels, jax.random.normal(jax.random.key(2), (images, 16, 5, 3))


@pytest.mark.parametrize("name", MESHES)
def test_a_vae_over_strips_is_the_whole_one(vae, name):
    mesh = mesh_of(**MESHES[name])
    pixels, latents = drawn(3)
    placed = shard(vae, mesh)
    parts = [(leaf.addressable_shards[0].data.size, leaf.size) for leaf in jax.tree.leaves(placed)]
    assert (
        sum(part for part, _ in parts)
        <= 1.1 * sum(whole for _, whole in parts) / mesh.shape["fsdp"]
    )
    for keys in (None, jax.random.split(jax.random.key(3), 3)):
        expected = encode(vae, pixels, dtype=jnp.float32, keys=keys)
        assert (
            relative(encode(placed, pixels, dtype=jnp.float32, keys=keys, mesh=mesh), expected)
            <= BOUND
        )
    expected = decode(vae, latents, dtype=jnp.float32)
    assert jnp.mean(jnp.abs(expected) < 1) > 0.01
    assert relative(decode(placed, latents, dtype=jnp.float32, mesh=mesh), expected) <= BOUND


def test_the_tiny_models_vae_too(tiny):
    mesh = mesh_of(context=4)
    expected = encode(tiny.vae, jnp.tile(drawn(1)[0], (1, 4, 4, 1)), dtype=jnp.float32)
    found = decode(shard(tiny.vae, mesh), expected, dtype=jnp.float32, mesh=mesh)
    np.testing.assert_allclose(found, decode(tiny.vae, expected, dtype=jnp.float32), atol=1e-5)


@pytest.mark.parametrize("part", ["halo", "means", "mix", "real"])
def test_without_one_of_its_exchanges_it_is_another(vae, monkeypatch, part):
    """Each is replaced by what one device would do alone."""
    alone = {
        "halo": (
            tiles._Strip,
            lambda self, x, above, below: jnp.pad(x, ((above, below), (0, 0), (0, 0))),
        ),
        "means": (tiles._SplitNorm, fluxjax.nets.vae.GroupNorm.means),
        "mix": (tiles._SplitAttention, fluxjax.nets.vae.CellAttention.mix),
        "real": (tiles._Strip, lambda self, x: jnp.ones((len(x), 1, 1), bool)),
    }
    monkeypatch.setattr(alone[part][0], part, alone[part][1])
    mesh, (_, latents) = mesh_of(context=2), drawn(1)
    found = decode.__wrapped__(shard(vae, mesh), latents, dtype=jnp.float32, mesh=mesh)
    assert relative(found, decode(vae, latents, dtype=jnp.float32)) > 100 * BOUND
