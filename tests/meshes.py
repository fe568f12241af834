"""Meshes of the machine's CPU devices, and one evaluation of a transformer on them."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from fluxjax import Flux, image_ids, make_mesh, on_mesh
from fluxjax.devices import TokenParallelFlux

HEIGHT, WIDTH = 48, 80
"""An image of 15 tokens, which neither 2 nor 4 divide."""


def mesh_of(**sizes):
    """Return a mesh of as many devices as its sizes need."""
    return make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())])


def relative(found, expected):
    """Return |found - expected| / |expected|."""
    found, expected = np.asarray(found), np.asarray(expected)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def flux_inputs(config, images, txt_tokens=13):
    """Return random inputs of a batch: x, txt and vec, of which the first images stay the same."""
    rows = []
    for number in range(images):
        rng = np.random.default_rng(number)
        x = rng.normal(size=(HEIGHT * WIDTH // 256, config.in_channels))
        txt = rng.normal(size=(txt_tokens, config.context))
        rows.append((x, txt, rng.normal(size=config.pooled)))
    columns = [np.stack(column).astype(np.float32) for column in zip(*rows, strict=True)]
    return tuple(jnp.asarray(column, jnp.float32) for column in columns)


def velocities(flux: Flux, rows, mesh=None, **options):
    """Return the velocity of each image. `rows`: from `flux_inputs`; `flux`: from `shard`."""
    if mesh is None:
        return _on_one_device(flux, rows, options)

    # A function of its own at each call: tests replace what it calls.
    def run(flux, rows, options):
        splits_tokens = mesh.shape["context"] > 1
        return _velocities(TokenParallelFlux(flux) if splits_tokens else flux, rows, options)

    return on_mesh(run, mesh, flux, rows, options)


def _velocities(network, rows, options):
    ids, t = image_ids(HEIGHT, WIDTH), jnp.float32(0.5)

    def velocity(x, txt, vec):
        given = {"txt": txt, "vec": vec, "img_ids": ids, "guidance": jnp.float32(3.5)}
        return network.velocity(x, t, network.prepare(t[None], **given), **options)

    return jax.vmap(velocity)(*rows)


_on_one_device = eqx.filter_jit(_velocities)
