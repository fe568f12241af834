"""Editing as part of a program: compiled, batched, differentiated, guided and on a mesh."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from meshes import mesh_of

from fluxjax import DDIM, Euler, flow_times, on_mesh
from fluxjax.flow import (
    FireFlow,
    FlowEdit,
    Guided,
    ImageGuided,
    Inpaint,
    KeepHistory,
    Mixed,
    Projected,
    SlidingWindows,
    Steered,
    edit_mask,
    sample,
)

SIZE, STEPS, IMAGES = 6, 4, 8
KEY, TIMES = jax.random.key(0), flow_times(STEPS)


def network(x, t, condition):
    return jnp.sin(condition * x) - t * condition


def guided(text, scale, **options):
    conditions = jnp.full(SIZE, text), jnp.full(SIZE, -0.5)
    return Guided(network, *conditions, scale, **options)


class Inputs(eqx.Module):
    """What one edit gets: all of them values that may change without a compilation."""

    image: jax.Array
    mask: jax.Array
    noise: jax.Array
    text: jax.Array
    scale: jax.Array
    key: jax.Array


def inpaint(inputs):
    step = Inpaint(DDIM(0.5), inputs.image, inputs.mask, repeats=2)
    velocity = guided(inputs.text, inputs.scale)
    return sample(velocity, inputs.noise, TIMES, step=step, key=inputs.key).x


def remembered(inputs):
    """RePaint in jumps, with a memory that passes through all of the loops."""
    step = Inpaint(Euler(), inputs.image, inputs.mask, inputs.noise, repeats=2, jump=2)
    velocity = guided(inputs.text, inputs.scale, rule=Projected(momentum=-0.5))
    return sample(velocity, inputs.noise, TIMES, step=step, key=inputs.key).x


def flow_edit(inputs):
    step = FlowEdit(guided(0.2, 1.5), inputs.image, 2)
    velocity = guided(inputs.text, inputs.scale)
    return sample(velocity, inputs.image, TIMES[1:], step=step, key=inputs.key).x


def invert_and_blend(inputs):
    source, target = guided(0.2, 1.5), guided(inputs.text, inputs.scale)
    up = sample(source, inputs.image, TIMES[::-1], step=FireFlow(), history=True)
    mask = edit_mask(source, target, inputs.image, key=inputs.key, draws=2)
    step = KeepHistory(FireFlow(), up.history[::-1], 0.5 * (inputs.mask + mask))
    return sample(target, up.x, TIMES, step=step).x


def steer(inputs):
    velocity = guided(inputs.text, inputs.scale)
    up = sample(Steered(velocity, inputs.noise, 0.5, "noise"), inputs.image, TIMES[::-1]).x
    return sample(Steered(velocity, inputs.image, 0.9, "image", low=0.7), up, TIMES).x


def mix(inputs):
    texts = guided(inputs.text, inputs.scale), guided(0.3, 2.0)
    image = ImageGuided(network, *(jnp.full(SIZE, each) for each in (0.0, 0.4, 0.8)))

    def narrow(x, t):
        return network(x, t, inputs.text)

    windows = SlidingWindows(narrow, (4,), (2,))
    weights = [inputs.mask, 1 - inputs.mask, inputs.mask + 0.1, 0.2]
    return sample(Mixed([*texts, image, windows], weights), inputs.noise, TIMES).x


PROGRAMS = [inpaint, remembered, flow_edit, invert_and_blend, steer, mix]


def batch():
    rng = np.random.default_rng(0)
    normal = [jnp.float32(rng.normal(size=(IMAGES, SIZE))) for _ in range(2)]
    mask = jnp.float32(rng.uniform(size=(IMAGES, SIZE)) > 0.5)
    scale = jnp.linspace(1.5, 3.0, IMAGES)
    text = jnp.linspace(0.5, 1.0, IMAGES)
    return Inputs(normal[0], mask, normal[1], text, scale, jax.random.split(KEY, IMAGES))


def row(inputs, number):
    return jax.tree.map(lambda leaf: leaf[number], inputs)


@pytest.mark.parametrize("program", PROGRAMS)
def test_another_image_mask_prompt_scale_or_seed_compiles_nothing_and_batches(program):
    traces = []

    @eqx.filter_jit
    def run(inputs):
        traces.append(program)
        return program(inputs)

    inputs = batch()
    alone = jnp.stack([run(row(inputs, number)) for number in range(3)])
    assert len(traces) == 1
    batched = eqx.filter_jit(jax.vmap(program))(inputs)
    # Sums of batches are computed in another order.
    np.testing.assert_allclose(batched[:3], alone, rtol=1e-4, atol=1e-5)
    assert jnp.abs(alone[0] - alone[1]).max() > 1e-3


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_batch_may_be_split_over_a_mesh(program):
    inputs = batch()
    run = eqx.filter_jit(jax.vmap(program))
    rows = NamedSharding(mesh_of(data=8), PartitionSpec("data"))
    spread = run(jax.device_put(inputs, rows))
    assert len(spread.sharding.device_set) == 8
    expected = run(inputs)
    np.testing.assert_allclose(spread, expected, rtol=1e-4, atol=1e-5)
    mapped = on_mesh(
        lambda networks, rows, rest: jax.vmap(program)(rows), mesh_of(data=8), (), inputs, ()
    )
    np.testing.assert_allclose(mapped, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("program", PROGRAMS)
def test_gradients_are_those_of_finite_differences(program):
    with jax.enable_x64(True):
        wide = lambda leaf: leaf.astype(jnp.float64) if eqx.is_inexact_array(leaf) else leaf  # noqa: E731
        inputs = jax.tree.map(wide, row(batch(), 1))
        place = lambda inputs: (inputs.image, inputs.text)  # noqa: E731

        @jax.jit
        def loss(parts):
            result = program(eqx.tree_at(place, inputs, parts))
            return jnp.sum(jnp.square(result))

        parts = place(inputs)
        gradient = jax.jit(jax.grad(loss))(parts)
        direction = jnp.sin(jnp.arange(SIZE, dtype=jnp.float64)), jnp.float64(0.3)
        moved = [
            loss(jax.tree.map(lambda part, way: part + sign * 1e-5 * way, parts, direction))  # noqa: B023
            for sign in (1, -1)
        ]
        slope = (moved[0] - moved[1]) / 2e-5
        products = jax.tree.map(lambda one, way: jnp.sum(one * way), gradient, direction)
        # The error of finite differences: 1e-10 of the third derivative, and rounding by 1e-11.
        assert float(sum(products)) == pytest.approx(float(slope), rel=1e-5)
