"""FlowEdit and DiffEdit's mask, on Gaussian priors in closed form."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import PIXELS, Normal, falling_times, g8

from fluxjax import flow_times
from fluxjax.flow import FlowEdit, Guided, Projected, edit_mask, evaluation_times, sample

KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def problem():
    """Return a source and a target of one covariance, and an image of neither."""
    source = g8("mask").prior
    i = jnp.arange(PIXELS, dtype=jnp.float64)
    return source, Normal(jnp.cos(i), source.covariance), jnp.sin(2 * i)


def edit(source, target, image, times, key=KEY, **options):
    step = FlowEdit(source, image, **options)
    return eqx.filter_jit(sample)(target, image, times, step=step, key=key).x - image


@pytest.mark.parametrize("averages", [1, 3])
def test_equal_prompts_keep_the_image_to_the_last_bit(averages):
    image = jnp.float32([0.1, -1.3, 7.7, 1e-3]) / 3
    weights = jnp.float32(np.random.default_rng(0).normal(size=(4, 4)))

    def network(x, t, condition):
        return jnp.tanh(weights @ x + t) * condition + jax.nn.softmax(x - condition)

    velocity = Guided(network, jnp.float32([1.0]), jnp.float32([0.2]), 3.0)
    step = FlowEdit(velocity, image, averages)
    for compiled in (False, True):
        run = eqx.filter_jit(sample) if compiled else sample
        edited = run(velocity, image, flow_times(28)[4:], step=step, key=KEY).x
        np.testing.assert_array_equal(edited, image)


@pytest.mark.parametrize("steps", [1, 4, 28])
def test_between_gaussians_of_one_covariance_the_shift_is_exact_at_any_number_of_steps(steps):
    source, target, image = problem()
    change = edit(source, target, image, falling_times(steps))
    np.testing.assert_allclose(change, target.mean - source.mean, atol=1e-14)


def test_a_later_start_gives_a_part_of_the_shift():
    source, target, image = problem()
    shift = target.mean - source.mean
    errors = []
    for steps in (50, 200):
        times = falling_times(steps)[steps // 2 :]
        # (1 - (1 - t) F) shift at t = 1/2, with F = sqrt(covariance / covariance of x_t).
        factor = jnp.sqrt(source.values / (0.25 * source.values + 0.25))
        expected = shift - 0.5 * source.vectors @ (factor * (source.vectors.T @ shift))
        change = edit(source, target, image, times)
        errors.append(float(jnp.abs(change - expected).max()))
    assert errors[1] < 0.01
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)  # of order 1


def test_the_change_is_carried_without_the_rounding_of_the_image():
    """On an image of large numbers, whose sum with each change would round."""
    source, target, _ = problem()
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (source, target))
    image = jnp.full(PIXELS, 1e4, jnp.float32)

    def shifted(velocity):
        return lambda x, t: velocity(x - 1e4, t)

    steps = 400
    times = jnp.linspace(1, 0, steps + 1, dtype=jnp.float32)
    step = FlowEdit(shifted(single[0]), image)
    state = step.init(image)

    def move(carry, interval):
        x, state, key = carry
        key, step_key = jax.random.split(key)
        x, state, _ = step(shifted(single[1]), x, *interval, state, key=step_key)
        return (x, state, key), None

    intervals = times[:-1], times[1:]
    (_, state, _), _ = jax.lax.scan(move, (image, state, KEY), intervals)
    # x itself is rounded to 1e-3 at each step; the velocities to some 1e-3, without a direction.
    np.testing.assert_allclose(state.change, single[1].mean - single[0].mean, atol=2e-3)


def test_averages_reduce_the_noise_of_the_change():
    """Where the covariances differ, the change depends on the noise: its variance is 1 / n."""
    source, _, image = problem()
    target = Normal(source.mean, 0.2 * source.covariance)
    keys, times = jax.random.split(KEY, 400), falling_times(4)

    def spread(averages):
        changes = jax.vmap(lambda key: edit(source, target, image, times, key, averages=averages))
        return float(jnp.mean(jnp.var(changes(keys), 0)))

    # 400 draws of 8 numbers that depend on each other: within 20 % or so.
    assert spread(1) / spread(4) == pytest.approx(4, rel=0.3)


def test_both_velocities_are_evaluated_at_the_start_of_each_step():
    source, target, image = problem()
    times, calls = falling_times(5), []

    def counted(velocity):
        def field(x, t):
            jax.debug.callback(lambda t: calls.append(float(t)), t)
            return velocity(x, t)

        return field

    step = FlowEdit(counted(source), image, averages=3)
    drawn = sample(counted(target), image, times, step=step, key=KEY)
    jax.effects_barrier()
    assert len(calls) == drawn.evaluations == 2 * 3 * 5
    np.testing.assert_allclose(np.unique(calls), np.unique(evaluation_times(step, times)))


@pytest.mark.parametrize("averages", [1, 2])
def test_the_memories_of_both_velocities_are_kept_apart(averages):
    image = jnp.linspace(-1.0, 1.0, 3)

    def network(x, t, condition):
        return condition - t * x

    def guided(positive, scale):
        return Guided(network, positive, -jnp.ones(3), scale, Projected(momentum=-0.5))

    source, target = guided(jnp.ones(3), 1.5), guided(jnp.arange(3.0), 4.0)
    times = falling_times(3)
    drawn = sample(target, image, times, step=FlowEdit(source, image, averages), key=KEY)
    # The same by hand.
    change, memories = jnp.zeros(3), [source.init(image), target.init(image)]
    for number in range(3):
        t, u = times[number], times[number + 1]
        key = jax.random.fold_in(KEY, number)
        keys = [key] if averages == 1 else jax.random.split(key, averages)
        total = jnp.zeros(3)
        for one in keys:
            there = (1 - t) * image + t * jax.random.normal(one, (3,))
            low, memories[0] = source(there, t, memory=memories[0])
            high, memories[1] = target(there + change, t, memory=memories[1])
            total += high - low
        change += (u - t) * total / averages
    np.testing.assert_allclose(drawn.x, image + change, rtol=1e-12)
    np.testing.assert_allclose(drawn.memory.rule, memories[1].rule, rtol=1e-12)


def diagonal(mean):
    return Normal(jnp.asarray(mean, jnp.float64), jnp.diag(jnp.linspace(0.5, 1.5, PIXELS)))


def test_the_mask_of_an_edit_is_where_the_means_differ():
    mean, changed = np.linspace(-1, 1, PIXELS), np.float64([0, 0, 2, 0, 0, 2, 0, 0])
    image = jnp.ones(PIXELS)
    mask = edit_mask(diagonal(mean), diagonal(mean + changed), image, key=KEY)
    np.testing.assert_array_equal(mask, changed > 0)


def test_a_mask_is_empty_where_nothing_differs_or_everything_alike():
    image = jnp.ones(PIXELS)
    prior = diagonal(np.linspace(-1, 1, PIXELS))
    np.testing.assert_array_equal(edit_mask(prior, prior, image, key=KEY), np.zeros(PIXELS))

    def shifted(x, t):
        return prior(x, t) + 1

    np.testing.assert_array_equal(edit_mask(prior, shifted, image, key=KEY), np.zeros(PIXELS))


def test_channels_share_a_mask_and_it_shrinks_with_the_ratio():
    image = jnp.zeros((3, 4))
    amount = jnp.float64([[0, 0, 0, 0], [0, 8, 0, 0], [3, 3, 3, 3]])

    def mask(**options):
        return edit_mask(lambda x, t: -x, lambda x, t: amount - x, image, key=KEY, **options)

    np.testing.assert_array_equal(mask(axis=-1), [[0], [0], [1]])  # of means 0, 2, 3 over 5/3
    np.testing.assert_array_equal(mask(axis=-1, ratio=1.1), [[0], [1], [1]])
    np.testing.assert_array_equal(mask(), (amount > 1.5 * 20 / 12).astype(float))


def test_misuse_names_the_remedy():
    source, target, image = problem()
    times = falling_times(2)
    with pytest.raises(ValueError, match=r"`FlowEdit\(averages\)` needs at least 1"):
        FlowEdit(source, image, 0)
    with pytest.raises(ValueError, match="Pass key="):
        sample(target, image, times, step=FlowEdit(source, image))
    with pytest.raises(ValueError, match=r"`FlowEdit\(image\)` needs the shape of x, \[8\]"):
        sample(target, image, times, step=FlowEdit(source, image[:3]), key=KEY)
    with pytest.raises(ValueError, match="rising times"):
        sample(target, image, times[::-1], step=FlowEdit(source, image), key=KEY)
    with pytest.raises(ValueError, match=r"`FlowEdit\(velocity\)` needs a velocity that returns"):
        sample(target, image, times, step=FlowEdit(lambda x, t: x[:3], image), key=KEY)
    with pytest.raises(ValueError, match=r"`edit_mask\(t\)` needs numbers in \[0, 1\]"):
        edit_mask(source, target, image, key=KEY, t=1.5)
    with pytest.raises(ValueError, match=r"`edit_mask\(draws\)` needs at least 1"):
        edit_mask(source, target, image, key=KEY, draws=0)
