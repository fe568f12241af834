"""Exact moments of steps that draw noise inside, for velocities that are affine in x.

The keys of a run are replaced by numbers that name each place where noise is drawn, so that the
step becomes a function of x and of all its noise, affine in both.
"""

import contextlib
from unittest import mock

import jax
import jax.numpy as jnp
from problems import PIXELS

_BRANCHES = 64
"""More than any step splits a key into."""


def branch(*path):
    """Return the number of the key that the splits along a path lead to."""
    number = 0
    for index in path:
        number = number * _BRANCHES + index + 1
    return number


def _key(number):
    # In the form of a legacy key, which the annotations take.
    return jnp.stack([jnp.uint32(0), jnp.asarray(number, jnp.uint32)])


@contextlib.contextmanager
def _named_noise(names, noise):
    """`noise`: [places, PIXELS], what is drawn at the keys whose numbers are `names`."""

    def split(key, num=2):
        numbers = key[1] * _BRANCHES + jnp.arange(num, dtype=jnp.uint32) + 1
        return jax.vmap(_key)(numbers)

    def normal(key, shape, dtype):
        assert shape == (PIXELS,)
        return (jnp.asarray(names, jnp.uint32) == key[1]).astype(dtype) @ noise

    with mock.patch("jax.random.split", split), mock.patch("jax.random.normal", normal):
        yield


def moments_of_step(step, velocity, times, names, start):
    """Return the exact mean and covariance of x at the last time.

    **Arguments:** `names`: from `branch`, of the keys at which the step draws noise. `start`: the
    mean and the covariance at the first time. Steps without a state.
    """
    places = len(names)

    def advance(moments, interval):
        mean, covariance = moments

        def move(inputs):
            noise = inputs[PIXELS:].reshape(places, PIXELS)
            with _named_noise(names, noise):
                x = inputs[:PIXELS]
                end = step(velocity, x, *interval, step.init(x), key=_key(0))[0]
            return end, end

        inputs = jnp.concatenate([mean, jnp.zeros(places * PIXELS)])
        columns, end = jax.jacfwd(move, has_aux=True)(inputs)
        of_x, of_noise = columns[:, :PIXELS], columns[:, PIXELS:]
        return (end, of_x @ covariance @ of_x.T + of_noise @ of_noise.T), None

    return jax.lax.scan(advance, start, (times[:-1], times[1:]))[0]
