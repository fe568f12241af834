"""Choosing measurements: how much a measurement would tell about x0, from draws of x0.

The expected information gain of a measurement y = A(x0) + std noise is the mutual information of
x0 and y, in nats. Draws of the prior give the gain of the first measurement; draws of the posterior
given all past measurements give the gain of the next.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.arguments import convert_arguments
from fluxjax.flow.operators import Operator
from fluxjax.numeric import check_count, check_positive, wide_dtype
from fluxjax.shapes import Array, Bool, Float, PRNGKeyArray, Scalar, ScalarLike


@convert_arguments
def moment_gain(draws: Float[Array, "draws *shape"], operator: Operator, std: ScalarLike) -> Scalar:
    """Return the information gain as if what is measured were normally distributed.

    It is 1/2 log det(1 + cov(A x0) / std^2): exact for normal x0 and a linear operator, and
    otherwise an upper bound, but for the error of the covariance of the draws. Differentiable in
    the operator's arrays.

    **Arguments:** `draws`: of x0. `operator`: what would be measured. `std`: of its noise, above 0.
    **Returns:** the gain in nats.
    **Raises:** `ValueError` for fewer than 2 draws, or a std that is not positive.
    **Source:** Cover & Thomas 2006, theorem 8.6.5 (the normal distribution maximizes entropy).
    """
    _check_draws("moment_gain", draws, std)
    scaled = _scaled(draws, operator, std)
    # Both products have the same determinant of 1 + product; the smaller one is cheaper.
    if scaled.shape[0] > scaled.shape[1]:
        scaled = scaled.T
    return _half_log_det(_product_with_transpose(scaled))


@convert_arguments
def contrastive_gain(
    draws: Float[Array, "draws *shape"],
    operator: Operator,
    std: ScalarLike,
    *,
    key: PRNGKeyArray,
) -> Scalar:
    """Return a lower bound of the information gain, which needs no normal distribution.

    Each draw is measured once, and its likelihood is compared with that of all draws: prior
    contrastive estimation. The bound is at most the log of the number of draws, and differentiable
    in the operator's arrays.

    **Arguments:** as for `moment_gain`. `key`: for the noise of the measurements.
    **Returns:** the gain in nats; a random number, whose mean is a lower bound.
    **Raises:** as `moment_gain`.
    **Source:** Foster et al. 2020 (1911.00294), eq. 12.
    """
    _check_draws("contrastive_gain", draws, std)
    values = _measured(draws, operator)
    deviation = jnp.asarray(std, values.dtype)
    noisy = values + deviation * jax.random.normal(key, values.shape, values.dtype)

    def log_likelihoods(y: Array) -> Array:
        """Return the log-density of y given each draw, up to a constant."""
        return -0.5 * jnp.sum(jnp.square((y - values) / deviation), 1)

    # One row at a time: all pairs of draws at once would need draws^2 times the size of y.
    pairs = jax.lax.map(log_likelihoods, noisy)
    return jnp.mean(jnp.diagonal(pairs) - jax.nn.logsumexp(pairs, 1)) + np.log(len(draws))


class MeasurementChoice(NamedTuple):
    """The result of `choose_measurements`.

    - `numbers`: of the chosen candidates, in the order in which they were chosen.
    - `gains`: what each adds to the information gain of those before it, in nats.
    """

    numbers: Array
    gains: Array


@convert_arguments
def choose_measurements(
    draws: Float[Array, "draws *shape"], candidates: Operator, std: ScalarLike, count: int
) -> MeasurementChoice:
    """Choose measurements greedily: each time the candidate that adds most to `moment_gain`.

    The chosen ones are taken to be made together, from the same draws. To use what each measurement
    shows, choose one, measure, draw anew from the posterior, and choose again.

    **Arguments:**

    - `draws`: of x0, in any case fewer than some thousand: a matrix of draws x draws is decomposed
      for each candidate.
    - `candidates`: an operator whose arrays have a leading axis of candidates, such as
      `Mask(window_masks(...))`.
    - `std`: of the noise of each, above 0.
    - `count`: how many to choose. The same one may be chosen again, with noise of its own.

    **Raises:** as `moment_gain`, and `ValueError` for a count below 1 or candidates without arrays.
    **Source:** Krause et al. 2008, algorithm 1.
    """
    _check_draws("choose_measurements", draws, std)
    check_count("choose_measurements", count=count)
    arrays, static = eqx.partition(candidates, eqx.is_array)
    if not jax.tree.leaves(arrays):
        raise ValueError(
            "`choose_measurements(candidates)` needs an operator whose arrays have a leading axis "
            f"of candidates, got {type(candidates).__name__} without arrays. Pass Mask(masks)."
        )

    def gram_of(arrays: Operator) -> Array:
        return _product_with_transpose(_scaled(draws, eqx.combine(arrays, static), std))

    def choose(total: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        before = _half_log_det(total)
        gains = jax.lax.map(lambda one: _half_log_det(total + gram_of(one)), arrays) - before
        number = jnp.argmax(gains)
        best = jax.tree.map(lambda leaf: leaf[number], arrays)
        return total + gram_of(best), (number, gains[number])

    dtype = wide_dtype(draws.dtype)
    nothing = jnp.zeros((len(draws), len(draws)), dtype)
    _, (numbers, gains) = jax.lax.scan(choose, nothing, length=count)
    return MeasurementChoice(numbers, gains)


@convert_arguments
def window_masks(
    shape: tuple[int, ...], size: int, stride: int | None = None
) -> Bool[Array, "windows *shape"]:
    """Return the masks of all square windows of an array, in row-major order.

    **Arguments:** `shape`: of the array. Windows extend over `size` entries of the last two axes
    (of the only one, if there is one), and over the whole of the others. `stride`: between windows,
    by default `size`.
    **Raises:** `ValueError` for a size or stride below 1, or a size that does not fit.
    """
    stride = size if stride is None else stride
    check_count("window_masks", size=size, stride=stride)
    axes = range(max(len(shape) - 2, 0), len(shape))
    if not shape or any(shape[axis] < size for axis in axes):
        raise ValueError(
            f"`window_masks(size={size})` does not fit an array of {list(shape)}. Choose a smaller "
            "window."
        )
    positions = [range(0, shape[axis] - size + 1, stride) for axis in axes]
    corners = np.stack(np.meshgrid(*positions, indexing="ij"), -1).reshape(-1, len(positions))
    masks = np.zeros((len(corners), *shape), bool)
    for mask, corner in zip(masks, corners, strict=True):
        window = tuple(slice(start, start + size) for start in corner)
        mask[(..., *window)] = True
    return jnp.asarray(masks)


def _measured(draws: Array, operator: Operator) -> Float[Array, "draws measured"]:
    """Return what the operator measures of each draw, as rows."""
    dtype = wide_dtype(draws.dtype)
    values = jax.vmap(operator)(draws.astype(dtype))
    return values.reshape(len(draws), -1)


def _scaled(draws: Array, operator: Operator, std: ScalarLike) -> Float[Array, "draws measured"]:
    """Return B, where B^T B is the covariance of what is measured, over std^2."""
    values = _measured(draws, operator)
    scale = jnp.asarray(std, values.dtype) * np.sqrt(len(draws) - 1).astype(values.dtype)
    return (values - values.mean(0)) / scale


def _product_with_transpose(rows: Float[Array, "rows columns"]) -> Float[Array, "rows rows"]:
    return jnp.matmul(rows, rows.T, precision=jax.lax.Precision.HIGHEST)


def _half_log_det(gram: Array) -> Scalar:
    """Return 1/2 log det(1 + gram) of a positive semidefinite matrix."""
    root = jnp.linalg.cholesky(jnp.eye(len(gram), dtype=gram.dtype) + gram)
    return jnp.sum(jnp.log(jnp.diagonal(root)))


def _check_draws(call: str, draws: Array, std: ScalarLike) -> None:
    check_positive(call, std=std)
    if len(draws) < 2:
        raise ValueError(f"`{call}(draws)` needs at least 2 draws, got {len(draws)}. Draw more.")
