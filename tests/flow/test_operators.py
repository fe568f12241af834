"""The laws of operators: adjoints, linear systems against dense algebra, shapes, errors."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fluxjax.flow import (
    Blur,
    Composition,
    Decoded,
    Downsample,
    LinearMap,
    Mask,
    Measurement,
    adjoint,
    linearize,
    pseudo_inverse,
    solve_normal,
)

ROWS, COLUMNS = 4, 6


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def draw(*shape, seed=0):
    return jnp.float64(numbers(*shape, seed=seed))


def soft_mask():
    return Mask(jnp.float64(np.abs(np.sin(numbers(ROWS, COLUMNS, seed=3)))))


def operators():
    """Return operators of images [2, 4, 6] by name; call it where float64 is enabled."""
    # No frequency is lost, so that conjugate gradients keep their digits.
    kernel = numbers(3, 5, seed=1)
    kernel[1, 2] += 6.0
    kernel, middle, first = map(jnp.asarray, (kernel, kernel[:, :3], kernel[0]))
    return {
        "mask": soft_mask(),
        "circular blur": Blur(kernel),
        "blur of other axes": Blur(middle, axes=(0, 2), circular=False),
        "blur along one axis": Blur(first, axes=(1,)),
        "block mean": Downsample(2),
        "block mean of one axis": Downsample(2, axes=(0,)),
        "blurred, then shrunk": Composition(Downsample(2), Blur(kernel)),
        "shrunk, then masked": Composition(Mask(jnp.float64([1, 0, 0.5])), Downsample(2)),
        "any linear function": LinearMap(eqx.Partial(jnp.einsum, "axb,ay->yb", draw(2, 5))),
    }


NAMES = (
    "mask",
    "circular blur",
    "blur of other axes",
    "blur along one axis",
    "block mean",
    "block mean of one axis",
    "blurred, then shrunk",
    "shrunk, then masked",
)
ALL = pytest.mark.parametrize("name", NAMES)


def named(name):
    return operators()[name], draw(2, ROWS, COLUMNS, seed=5)


@eqx.filter_jit
def applied(operator, x):
    return operator(x)


@eqx.filter_jit
def columns_of(operator, x):
    """Return what an operator makes of each unit vector, one per row."""
    units = jnp.eye(x.size, dtype=x.dtype).reshape(x.size, *x.shape)
    return jax.lax.map(lambda unit: operator(unit).ravel(), units)


def dense(operator, x):
    """Return the matrix of an operator."""
    return np.asarray(columns_of(operator, x)).T


@eqx.filter_jit
def adjoints(operator, x, y):
    """Return the operator of x, and its adjoint and the one of its linearization of y."""
    return operator(x), adjoint(operator, x)(y), linearize(operator, x).backward(y)


@ALL
def test_the_adjoint_passes_the_dot_product_test(name):
    with jax.enable_x64(True):
        operator, x = named(name)
        y = draw(*jax.eval_shape(operator, x).shape, seed=7)
        value, backward, of_linearized = map(np.asarray, adjoints(operator, x, y))
        assert backward.shape == x.shape
        # Rounding of sums of some 50 products.
        np.testing.assert_allclose(np.vdot(value, y), np.vdot(x, backward), rtol=1e-12)
        np.testing.assert_allclose(of_linearized, backward, rtol=1e-12)


@ALL
def test_a_known_gram_is_the_diagonal_of_a_times_its_transpose(name):
    with jax.enable_x64(True):
        operator, x = named(name)
        matrix = dense(operator, x)
        gram = eqx.filter_jit(type(operator).gram)(operator, x)
        assert (gram is None) == ("blur" in name)
        if gram is not None:
            np.testing.assert_allclose(np.diag(gram.ravel()), matrix @ matrix.T, atol=1e-14)


@eqx.filter_jit
def solutions(operator, x, r, std, iterations):
    """Return A^T of what solves the normal equations, without the Gram matrix and with it."""
    near = linearize(operator, 0 * x)
    found = []
    for gram in (None, near.gram):
        solved = solve_normal(near.forward, near.backward, 0.7, std, r, iterations, gram=gram)
        found.append(near.backward(solved).ravel())
    return found


@ALL
@pytest.mark.parametrize("std", [0.3, 0.0])
def test_the_normal_equations_are_solved_as_by_dense_algebra(name, std):
    with jax.enable_x64(True):
        operator, x = named(name)
        matrix = dense(operator, x)
        # Without noise the system has a solution only for what the operator can measure.
        seen = applied(operator, x)
        r = draw(*seen.shape, seed=9) if std else seen
        system = 0.7 * matrix @ matrix.T + std**2 * np.eye(len(matrix))
        expected = matrix.T @ np.linalg.pinv(system, rcond=1e-10) @ np.ravel(r)
        for found in solutions(operator, x, r, jnp.float64(std), matrix.shape[0]):
            # A blur's smallest eigenvalues lose some digits in conjugate gradients.
            np.testing.assert_allclose(found, expected, atol=1e-6)


@eqx.filter_jit
def pseudo_inverses(operator, x, r, iterations):
    """Return the pseudo-inverse of r without the Gram matrix and with it."""
    near = linearize(operator, 0 * x)
    maps = near.forward, near.backward
    return [pseudo_inverse(*maps, r, iterations, gram=gram) for gram in (None, near.gram)]


@ALL
def test_the_pseudo_inverse_is_that_of_dense_algebra(name):
    with jax.enable_x64(True):
        operator, x = named(name)
        r = draw(*jax.eval_shape(operator, x).shape, seed=9)
        matrix = dense(operator, x)
        expected = np.linalg.pinv(matrix, rcond=1e-10) @ np.ravel(r)
        for found in pseudo_inverses(operator, x, r, 3 * len(matrix)):
            np.testing.assert_allclose(found.ravel(), expected, atol=1e-5)


def test_a_covariance_that_is_a_function_is_solved_by_conjugate_gradients():
    with jax.enable_x64(True):
        operator, x = named("shrunk, then masked")
        root = numbers(x.size, x.size, seed=11)
        covariance = root @ root.T / x.size
        matrix = dense(operator, x)
        system = matrix @ covariance @ matrix.T + 0.2**2 * np.eye(len(matrix))

        def apply(w):
            return (covariance @ w.ravel()).reshape(w.shape)

        @jax.jit
        def solution(x):
            near = linearize(operator, x)
            r = draw(*near.value.shape, seed=9) * operator.observed(near.value)
            return r, solve_normal(near.forward, near.backward, apply, 0.2, r, 12)

        r, solved = solution(x)
        np.testing.assert_allclose(solved.ravel(), np.linalg.solve(system, r.ravel()), atol=1e-9)
        # Hidden entries stay exactly 0.
        np.testing.assert_array_equal(solved[..., 1], 0)


def test_conjugate_gradients_stop_where_the_covariance_is_not_positive():
    with jax.enable_x64(True):
        signs = np.float64([2.0, 1.0, -5.0])
        r = np.float64([1.0, 1.0, 0.5])
        mask = Mask(jnp.ones(3))

        @jax.jit
        def solutions(r):
            near = linearize(mask, jnp.zeros(3))
            maps = near.forward, near.backward
            of_signs = solve_normal(*maps, lambda w: signs * w, 0.1, r, 8)
            return of_signs, solve_normal(*maps, lambda w: -w, 2.0, r, 8)

        solved, negative = solutions(r)
        # The second direction has negative curvature, so the first step is kept: all directions
        # along r, with r^T r / r^T V r.
        step = (r @ r) / (r @ (signs * r) + 0.01 * (r @ r))
        np.testing.assert_allclose(solved, step * r, rtol=1e-12)
        np.testing.assert_array_equal(negative, 0)


def test_a_composition_is_one_operator_after_another():
    with jax.enable_x64(True):
        outer, inner = Downsample(2), soft_mask()
        x = draw(2, ROWS, COLUMNS)
        y = draw(2, 2, 3, seed=2)
        both = Composition(outer, inner)

        @jax.jit
        def values(x, y):
            one_by_one = outer(inner(x)), adjoint(inner, x)(adjoint(outer, x)(y))
            return (both(x), adjoint(both, x)(y)), one_by_one

        (value, backward), (expected_value, expected_backward) = values(x, y)
        np.testing.assert_array_equal(value, expected_value)
        np.testing.assert_allclose(backward, expected_backward, rtol=1e-14)
        assert both.linear
        assert not Composition(outer, Decoded(jnp.tanh, inner)).linear


def test_a_decoded_operator_is_linearized_with_its_jacobian():
    with jax.enable_x64(True):
        matrix, x = draw(24, 5), draw(5, seed=1)

        def decode(z):
            return jnp.tanh(matrix @ z).reshape(ROWS, COLUMNS)

        operator = Decoded(decode, Downsample(2))
        y = draw(2, 3, seed=2)

        @jax.jit
        def values(x, y):
            near = linearize(operator, x)
            assert near.gram is None
            found = near.value, near.forward(x), near.backward(y)
            return found, operator(x), jax.jacobian(operator)(x)

        (value, forward, backward), expected, jacobian = values(x, y)
        np.testing.assert_allclose(value, expected, rtol=1e-14)
        np.testing.assert_allclose(forward, np.dot(jacobian, x), rtol=1e-12)
        np.testing.assert_allclose(backward, np.einsum("ab,abx->x", y, jacobian))
        with pytest.raises(ValueError, match="linear operator, got Decoded"):
            adjoint(operator, x)


def test_a_linear_decoder_gives_an_exact_operator():
    with jax.enable_x64(True):
        matrix, x, origin = draw(24, 5), draw(5, seed=1), jnp.zeros(5)
        operator = Decoded(lambda z: (matrix @ z + 1).reshape(ROWS, COLUMNS), Downsample(2))
        near = linearize(operator, origin)
        np.testing.assert_allclose(near.value + near.forward(x), operator(x), rtol=1e-13)


def test_any_linear_function_may_add_a_constant():
    with jax.enable_x64(True):
        matrix, x = draw(3, 5), draw(5, seed=1)
        near = linearize(LinearMap(lambda z: matrix @ z + 2), x)
        np.testing.assert_allclose(near.forward(x), matrix @ x, rtol=1e-14)
        np.testing.assert_allclose(near.value, matrix @ x + 2, rtol=1e-14)
        y = draw(3, seed=2)
        np.testing.assert_allclose(near.backward(y), matrix.T @ y, rtol=1e-14)


def test_operators_keep_the_dtype_of_x():
    image = jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.bfloat16)
    kernel = jnp.asarray(np.full((3, 3), 1 / 9, np.float32))

    def there_and_back(operator, x):
        y = operator(x)
        return y, adjoint(operator, x)(y)

    for operator in (Mask(jnp.ones(COLUMNS, bool)), Blur(kernel), Downsample(2)):
        y, x = eqx.filter_eval_shape(there_and_back, operator, image)
        assert y.dtype == jnp.bfloat16
        assert x.dtype == jnp.bfloat16


def test_blur_is_numpys_convolution():
    with jax.enable_x64(True):
        x, kernel = draw(9), draw(3, seed=1)
        expected = np.convolve(x, kernel, "same")
        found = applied(Blur(kernel, (0,), circular=False), x)
        np.testing.assert_allclose(found, expected, atol=1e-14)
        by_fft = np.fft.ifft(np.fft.fft(x) * np.fft.fft(kernel, 9)).real
        circular = applied(Blur(kernel, (0,)), x)
        np.testing.assert_allclose(circular, np.roll(by_fft, -1), atol=1e-14)


def test_another_mask_measurement_or_std_does_not_recompile():
    traces = []

    @eqx.filter_jit
    def residual(measurement, x):
        traces.append(None)
        return measurement.residual(measurement.operator(x))

    x = jnp.ones(3)
    first = residual(Measurement(Mask(jnp.ones(3)), 2 * x, jnp.float32(0.1)), x)
    mask = Mask(jnp.float32([1, 0, 0.5]))
    second = residual(Measurement(mask, jnp.float32([3, jnp.nan, 1]), jnp.float32(0)), x)
    assert len(traces) == 1
    np.testing.assert_array_equal(first, 1)
    # What is hidden is ignored, whatever y holds there.
    np.testing.assert_array_equal(second, [2, 0, 0.5])


def test_a_measurement_of_another_shape_is_an_error():
    x = jnp.ones((ROWS, COLUMNS))
    fits = Measurement(Downsample(2), jnp.ones((2, 3)), 0.1)
    fits.check(x)
    with pytest.raises(ValueError, match=r"Downsample returns for x \[4, 6\], \[2, 3\], got \[3"):
        Measurement(Downsample(2), jnp.ones((3, 2)), 0.1).check(x)


def test_a_std_that_a_method_divides_by_has_to_be_positive():
    def std_of(std):
        return Measurement(Mask(jnp.ones(2)), jnp.ones(2), std).noise_std("dps", jnp.float32)

    assert std_of(0.1).dtype == jnp.float32
    with pytest.raises(ValueError, match="`dps` divides by the noise"):
        std_of(0)
    with pytest.raises(eqx.EquinoxRuntimeError, match="needs std above 0"):
        jax.block_until_ready(eqx.filter_jit(std_of)(jnp.float32(0)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mask(jnp.float32([0, 2])), r"in \[0, 1\], got 0 to 2"),
        (lambda: Mask(jnp.float32([0, jnp.nan])), "finite"),
        (lambda: Mask(jnp.ones((3, 2)))(jnp.ones((4, 2))), r"broadcast to x \[4, 2\], got \[3, 2"),
        (lambda: Mask(jnp.ones((5, 4, 2)))(jnp.ones((4, 2))), r"got \[5, 4, 2\]"),
        (lambda: Blur(jnp.ones((2, 3))), r"one odd size for each of the axes \(-2, -1\), got \[2"),
        (lambda: Blur(jnp.ones(3)), "one odd size"),
        (lambda: Downsample(0), "at least 1, got 0"),
        (lambda: Downsample(4)(jnp.ones((4, 6))), r"sizes that the factor divides, got \[4, 6\]"),
        (lambda: Measurement(Downsample(2), jnp.ones(2), -1.0), "at least 0, got -1.0"),
        (lambda: Measurement(Downsample(2), jnp.ones(2), float("nan")), "finite"),
        (lambda: solve_normal(abs, abs, 1.0, 1.0, jnp.ones(2), 0), "at least 1, got 0"),
        (lambda: pseudo_inverse(abs, abs, jnp.ones(2), 0), "at least 1, got 0"),
        (
            lambda: adjoint(LinearMap(jnp.square), jnp.ones(2))(jnp.ones(2)),
            "JAX can not transpose this one",
        ),
    ],
)
def test_bad_input_is_a_clear_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()
