"""A function on a mesh is compiled once for the same function, mesh and shapes."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import monitoring
from meshes import mesh_of

from fluxjax import on_mesh, shard
from fluxjax.nets.layers import Linear


@pytest.fixture
def compilations():
    """Count XLA's compilations, in a list of one number that a test may set to 0."""
    count = [0]

    def listen(event, duration, **_):
        count[0] += event == "/jax/core/compile/backend_compile_duration"

    monitoring.register_event_duration_secs_listener(listen)
    yield count
    monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def layer():
    return Linear(4, 6, key=jax.random.key(0))


def test_a_second_call_compiles_nothing(layer, compilations):
    mesh = mesh_of(data=2, fsdp=2)
    placed, rows = shard(layer, mesh), np.ones((5, 4), np.float32)
    traces = []

    def run(layer, rows, scale):
        traces.append(1)
        return layer(rows) * scale

    first = on_mesh(run, mesh, placed, rows, jnp.float32(2))
    assert compilations[0] > 0
    np.testing.assert_allclose(first, 2 * layer(jnp.asarray(rows)), rtol=1e-5)
    second_rest = jnp.float32(3)
    compilations[0] = 0
    for _ in range(2):
        second = on_mesh(run, mesh, placed, rows + 1, second_rest)
    assert compilations[0] == 0
    assert len(traces) == 1
    np.testing.assert_allclose(second, 3 * layer(jnp.asarray(rows) + 1), rtol=1e-5)
    # Another mesh, and other shapes, are other programs.
    other = mesh_of(data=4)
    found = on_mesh(run, other, shard(layer, other), rows, jnp.float32(2))
    np.testing.assert_allclose(found, first, rtol=1e-6)
    assert on_mesh(run, mesh, placed, rows[:4], second_rest).shape == (4, 6)
    assert len(traces) == 3


def test_inside_of_jit_it_is_part_of_the_program(layer):
    mesh = mesh_of(data=2)

    @eqx.filter_jit
    @eqx.debug.assert_max_traces(max_traces=1)
    def outer(layer, rows):
        return 2 * on_mesh(lambda layer, rows, _: layer(rows), mesh, layer, rows)

    rows = jnp.ones((3, 4))
    np.testing.assert_allclose(outer(shard(layer, mesh), rows), 2 * layer(rows), rtol=1e-5)
    assert "jit(_run)" not in outer.lower(shard(layer, mesh), rows).as_text()
    outer(shard(layer, mesh), rows + 1)


def test_a_function_may_be_a_pytree_of_arrays(layer):
    mesh = mesh_of(data=2)

    def scaled(scale, layer, rows, rest):
        return scale * layer(rows)

    placed, rows = shard(layer, mesh), jnp.ones((2, 4))
    for scale in (2.0, 3.0):
        found = on_mesh(eqx.Partial(scaled, jnp.float32(scale)), mesh, placed, rows)
        np.testing.assert_allclose(found, scale * layer(rows), rtol=1e-5)


def test_fewer_rows_than_devices_are_refused_unless_they_are_filled_up(layer):
    mesh = mesh_of(data=4)
    placed, rows = shard(layer, mesh), jnp.ones((2, 4))

    def run(layer, rows, _):
        return layer(rows)

    with pytest.raises(ValueError, match="A batch of 2 leaves some of data x fsdp = 4 devices"):
        on_mesh(run, mesh, placed, rows)
    assert on_mesh(run, mesh, placed, rows, fill=True).shape == (2, 6)
