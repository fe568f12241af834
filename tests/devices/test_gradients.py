"""Gradients of the velocity on a mesh, as methods of restoration take them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import mesh_of
from small import CONFIG, IDS, IMAGE, TEXT, draw, small_flux

from fluxjax import Conditioning, flux_velocity, on_mesh, shard
from fluxjax.devices import TokenParallelFlux

ROWS = draw(4, IMAGE, 8, seed=1), draw(4, IMAGE, 8, seed=2)


def pulled_back(flux, rows, rest):
    """Return, for each row (x, w), the gradient of <w, velocity(x)> with respect to x."""
    condition = Conditioning(draw(TEXT, 12), draw(6), IDS, jnp.float32(2.0))
    velocity = flux_velocity(flux, condition, remat=True)

    def one(x, w):
        return jax.vjp(lambda x: velocity(x, jnp.float32(0.6)), x)[1](w)[0]

    return jax.vmap(one)(*rows)


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2}, {"tensor": 2}, {"context": 2}])
def test_gradients_on_a_mesh_are_those_on_one_device(sizes):
    flux, mesh = small_flux(), mesh_of(**sizes)
    expected = jax.jit(pulled_back)(flux, ROWS, None)

    def run(flux, rows, rest):
        network = TokenParallelFlux(flux) if mesh.shape["context"] > 1 else flux
        return pulled_back(network, rows, rest)

    found = on_mesh(run, mesh, shard(flux, mesh), ROWS)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
