"""Exact adjoints of operators, and the linear systems of their measurements."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fluxjax.arguments import convert_arguments
from fluxjax.flow.operators import Map, Operator, Y
from fluxjax.flow.step import X
from fluxjax.numeric import check_count
from fluxjax.shapes import Array, ScalarLike


class Linearized(NamedTuple):
    """An operator near one x0: A(x0) + J (x - x0), with J its Jacobian at x0.

    - `value`: A(x0).
    - `forward`: the function d -> J d, from the shape of x to that of y.
    - `backward`: its exact adjoint.
    - `gram`: the diagonal of J J^T in the shape of y if J J^T is diagonal; else None.
    """

    value: Array
    forward: Map
    backward: Map
    gram: Array | None


@convert_arguments
def adjoint(operator: Operator, like: X) -> Map:
    """Return the exact adjoint of a linear operator, a function y -> x.

    **Arguments:** `like`: an array of the shape and dtype of x.
    **Raises:** `ValueError` for an operator that is not linear.
    """
    if not operator.linear:
        raise ValueError(
            f"`adjoint(operator)` needs a linear operator, got {type(operator).__name__}. Use "
            "`linearize(operator, x0).backward`."
        )
    measured = jax.eval_shape(operator, like)
    transpose = jax.linear_transpose(operator, like)

    def backward(y: Array) -> Array:
        try:
            return transpose(y.astype(measured.dtype))[0]
        # What JAX raises depends on where in the program it meets something that is not linear.
        except (NotImplementedError, AssertionError) as error:
            raise ValueError(
                "`adjoint(operator)` needs a linear operator, and JAX can not transpose this one. "
                "Use `linearize(operator, x0).backward`, or `Decoded` for a decoder."
            ) from error

    return backward


@convert_arguments
def linearize(operator: Operator, x0: X) -> Linearized:
    """Return an operator near x0, by its Jacobian there, which is exact if it is linear."""
    value, forward = jax.linearize(operator, x0)
    transpose = jax.linear_transpose(forward, x0)

    def backward(y: Array) -> Array:
        return transpose(y.astype(value.dtype))[0]

    return Linearized(value, forward, backward, operator.gram(x0))


@convert_arguments
def solve_normal(
    forward: Map,
    backward: Map,
    covariance: Map | ScalarLike,
    std: ScalarLike,
    r: Y,
    iterations: int,
    *,
    gram: Y | None = None,
) -> Y:
    """Return (A K A^T + std^2)^-1 r: with a number K and a known `gram` exactly, otherwise by CG.

    Conjugate gradients stop where the curvature of A K A^T is not positive, as it may be with the
    covariance of a network, and where nothing is left to solve.

    **Arguments:**

    - `forward`, `backward`, `gram`: A, A^T, and the diagonal of A A^T if that is diagonal; those
      of `linearize`.
    - `covariance`: K, either a number or a symmetric linear function from x to x.
    - `std`: of the noise of the measurement, at least 0. With 0, what A does not see is left 0.
    - `r`: the right-hand side.
    - `iterations`: of conjugate gradients. Each applies A, K and A^T once.

    **Raises:** `ValueError` for fewer than 1 iteration.
    **Source:** Hestenes & Stiefel 1952.
    """
    check_count("solve_normal", iterations=iterations)
    variance = jnp.square(jnp.asarray(std, r.dtype))
    if callable(covariance):
        apply_covariance = covariance
    else:
        factor = jnp.asarray(covariance, r.dtype)
        if gram is not None:
            return divide_or_zero(r, factor * gram.astype(r.dtype) + variance)

        def apply_covariance(x: Array) -> Array:
            return factor.astype(x.dtype) * x

    def semidefinite(p: Array) -> Array:
        return forward(apply_covariance(backward(p))).astype(p.dtype)

    return _conjugate_gradients(semidefinite, variance, r, iterations)


@convert_arguments
def pseudo_inverse(
    forward: Map, backward: Map, r: Y, iterations: int, *, gram: Y | None = None
) -> Array:
    """Return A^+ r, the smallest x whose A x is nearest to r.

    **Arguments:** as for `solve_normal`. Without `gram`, it is computed by `iterations` conjugate
    gradients on A^T A x = A^T r; that has a solution even where A A^T has none.
    **Raises:** `ValueError` for fewer than 1 iteration.
    **Source:** Hestenes & Stiefel 1952 (least squares).
    """
    check_count("pseudo_inverse", iterations=iterations)
    if gram is not None:
        return backward(divide_or_zero(r, gram.astype(r.dtype)))
    projected = backward(r)
    none = jnp.zeros((), projected.dtype)
    return _conjugate_gradients(lambda x: backward(forward(x)), none, projected, iterations)


def divide_or_zero(numerator: Array, denominator: Array) -> Array:
    """Return numerator / denominator, and 0 where the denominator is not positive."""
    positive = denominator > 0
    return jnp.where(positive, numerator / jnp.where(positive, denominator, 1), 0)


class _Search(NamedTuple):
    """Conjugate gradients between two iterations.

    - `residual`: of the solution so far, r - (S + shift) solution.
    - `direction`: of the next step.
    - `running`: whether no iteration has stopped the search.
    """

    solution: Array
    residual: Array
    direction: Array
    running: Array


def _conjugate_gradients(semidefinite: Map, shift: Array, r: Array, iterations: int) -> Array:
    """Return (S + shift)^-1 r for a symmetric S."""

    def improve(search: _Search, _: None) -> tuple[_Search, None]:
        solution, residual, p, running = search
        image = semidefinite(p)
        curvature = jnp.vdot(p, image)
        square = jnp.vdot(residual, residual)
        total = curvature + shift * jnp.vdot(p, p)
        # A loop of fixed length, which has reverse-mode gradients; once it has stopped, it adds 0.
        running = running & (curvature >= 0) & (total > 0) & (square > rounding)
        length = jnp.where(running, square / jnp.where(running, total, 1), 0)
        solution = solution + length * p
        residual = residual - length * (image + shift * p)
        ratio = jnp.where(running, jnp.vdot(residual, residual) / jnp.where(running, square, 1), 0)
        return _Search(solution, residual, residual + ratio * p, running), None

    # What is left below this is rounding; where S is singular, it would be divided by almost 0.
    square = jnp.vdot(r, r)
    rounding = jnp.square(8 * jnp.finfo(r.dtype).eps) * square
    start = _Search(jnp.zeros_like(r), r, r, square > 0)
    end, _ = jax.lax.scan(improve, start, length=iterations)
    return end.solution
