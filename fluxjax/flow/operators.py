"""Measurements y = A(x0) + std noise: their operators, exact adjoints and linear systems.

    Measurement(Mask(mask), mask * image, std=0.05)                      # inpainting
    Measurement(Downsample(4, axes=(0, 1)), small_image, std=0.05)       # super-resolution
    Measurement(Blur(kernel, axes=(0, 1)), blurred_image, std=0.05)      # deblurring
    Measurement(Decoded(decode, Mask(mask)), mask * pixels, std=0.05)    # pixels of a latent

An operator sees x as the velocity does. For packed latents, pack masks and images alike, or
measure what is decoded.
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from fluxjax.arguments import convert_arguments
from fluxjax.flow.step import X
from fluxjax.numeric import check_count, check_finite, is_concrete_number, wide_dtype
from fluxjax.shapes import Array, Bool, Float, Scalar, ScalarLike

Y = Float[Array, "*measured"]
"""What is measured: an array of any shape."""

Map = Callable[[Array], Array]
"""A linear function of one array."""


_HALF_LOG_TAU = 0.5 * math.log(2 * math.pi)


class Operator(eqx.Module):
    """What is measured of an image: a function x -> y.

    - `linear`: whether it is linear. A nonlinear one is linearized where it is used, at the
      estimate of x0 (Gauss-Newton).
    """

    linear: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, x: X) -> Y:
        """Return what is measured of x, without noise, in the dtype of x."""

    def observed(self, y: Y) -> Y:
        """Return 1 where an entry of y is measured and 0 where it is not; by default all ones."""
        return jnp.ones_like(y)

    def gram(self, x: X) -> Y | None:
        """Return the diagonal of A A^T, in the shape of y, if A A^T is diagonal; else None.

        **Arguments:** `x`: an array of the shape that the operator takes.
        """
        return None


@convert_arguments
class Mask(Operator):
    """Every entry of x times its mask. y has the shape of x, and 0 where the mask is 0.

    Another mask of the same shape needs no new compilation.

    **Arguments:** `mask`: 1 where x is seen, 0 where it is hidden, or a factor in [0, 1]; it is
    broadcast to the shape of x.
    **Raises:** `ValueError` for values outside [0, 1], and for an x that the mask does not fit.
    """

    mask: Float[Array, "*mask"] | Bool[Array, "*mask"]

    def __check_init__(self):
        check_finite("Mask", mask=self.mask)
        if not is_concrete_number(self.mask):
            return
        values = np.asarray(self.mask, np.float64)
        if values.size and not (values.min() >= 0 and values.max() <= 1):
            raise ValueError(
                f"`Mask(mask)` needs values in [0, 1], got {values.min():g} to "
                f"{values.max():g}. 1 is seen and 0 is hidden; divide bytes by 255."
            )

    def __call__(self, x: X) -> Y:
        return x * self._broadcast(x)

    def observed(self, y: Y) -> Y:
        return (self._broadcast(y) != 0).astype(y.dtype)

    def gram(self, x: X) -> Y:
        return jnp.square(self._broadcast(x))

    def _broadcast(self, x: Array) -> Array:
        """Return the mask in the shape and dtype of x.

        **Raises:** `ValueError` for a mask that can't be broadcast to it.
        """
        mask = self.mask
        try:
            shape = np.broadcast_shapes(mask.shape, x.shape)
        except ValueError:
            shape = None
        if shape != x.shape:
            raise ValueError(
                f"`Mask(mask)` needs a mask that can be broadcast to x {list(x.shape)}, got "
                f"{list(mask.shape)}. Resize it, or pack it as the image is packed."
            )
        return jnp.broadcast_to(mask, x.shape).astype(x.dtype)


@convert_arguments
class Blur(Operator):
    """Convolution with a kernel; y has the shape of x.

    **Arguments:**

    - `kernel`: odd sizes, one for each axis; the middle entry is the weight of the pixel itself.
    - `axes`: of x that are blurred, in the order of the kernel's.
    - `circular`: whether x repeats beyond its borders; otherwise it is 0 there.

    **Raises:** `ValueError` for a kernel of an even size, or with other than one size per axis.
    """

    kernel: Float[Array, "*sizes"]
    axes: tuple[int, ...] = eqx.field(default=(-2, -1), static=True)
    circular: bool = eqx.field(default=True, static=True)

    def __check_init__(self):
        check_finite("Blur", kernel=self.kernel)
        sizes = self.kernel.shape
        if len(sizes) != len(self.axes) or not all(size % 2 for size in sizes):
            raise ValueError(
                f"`Blur(kernel)` needs one odd size for each of the axes {self.axes}, got "
                f"{list(sizes)}. Add zeros to an even kernel, or pass axes=."
            )

    def __call__(self, x: X) -> Y:
        last = tuple(range(-len(self.axes), 0))
        moved = jnp.moveaxis(x, self.axes, last)
        images = moved.reshape(-1, 1, *moved.shape[-len(last) :])
        margins = [(size // 2, size // 2) for size in self.kernel.shape]
        mode = "wrap" if self.circular else "constant"
        padded = jnp.pad(images, [(0, 0), (0, 0), *margins], mode=mode)
        # JAX's convolution does not flip its kernel.
        kernel = jnp.flip(self.kernel).astype(x.dtype)[None, None]
        strides = (1,) * len(last)
        precision = jax.lax.Precision.HIGHEST
        blurred = jax.lax.conv_general_dilated(
            padded, kernel, strides, "VALID", precision=precision
        )
        return jnp.moveaxis(blurred.reshape(moved.shape), last, self.axes)


@convert_arguments
class Downsample(Operator):
    """The mean of each block of `factor` entries along each axis: super-resolution's operator.

    **Arguments:** `factor`: at least 1. `axes`: of x that become shorter by the factor.
    **Raises:** `ValueError` for a factor below 1, and for sizes that it does not divide.
    """

    factor: int = eqx.field(static=True)
    axes: tuple[int, ...] = eqx.field(default=(-2, -1), static=True)

    def __check_init__(self):
        if self.factor < 1:
            raise ValueError(
                f"`Downsample(factor)` needs a whole number of at least 1, got {self.factor}. "
                "2 halves each size."
            )

    def __call__(self, x: X) -> Y:
        sizes = [x.shape[axis] for axis in self.axes]
        if any(size % self.factor for size in sizes):
            raise ValueError(
                f"`Downsample(factor={self.factor})` needs sizes that the factor divides, got "
                f"{sizes} on the axes {self.axes}. Crop x, or choose another factor."
            )
        for axis in self.axes:
            # The axis is split into blocks and the entries of a block.
            first = axis % x.ndim
            blocks = x.shape[first] // self.factor
            shape = (*x.shape[:first], blocks, self.factor, *x.shape[first + 1 :])
            x = x.reshape(shape).mean(first + 1)
        return x

    def gram(self, x: X) -> Y:
        y = jax.eval_shape(self, x)
        return jnp.full(y.shape, self.factor ** -len(self.axes), y.dtype)


@convert_arguments
class Composition(Operator):
    """One operator after another: outer(inner(x))."""

    outer: Operator
    inner: Operator

    @property
    def linear(self) -> bool:  # type: ignore[override]
        return self.outer.linear and self.inner.linear

    def __call__(self, x: X) -> Y:
        return self.outer(self.inner(x))

    def observed(self, y: Y) -> Y:
        return self.outer.observed(y)

    def gram(self, x: X) -> Y | None:
        # A mask scales the rows of the inner operator, so that these stay orthogonal.
        inner = self.inner.gram(x)
        if inner is None or not isinstance(self.outer, Mask):
            return None
        return self.outer.gram(inner) * inner


@convert_arguments
class LinearMap(Operator):
    """Any linear function x -> y, with the adjoint that JAX derives.

    **Arguments:** `function`: linear, or linear plus a constant; a pytree (such as `eqx.Partial`).
    """

    function: Map

    def __call__(self, x: X) -> Y:
        return self.function(x)


@convert_arguments
class Decoded(Operator):
    """What is measured of a decoded image: operator(decode(x)), such as the pixels of a latent.

    **Arguments:** `decode`: x -> image, differentiable, a pytree. `operator`: of the image.
    """

    linear = False
    decode: Map
    operator: Operator

    def __call__(self, x: X) -> Y:
        return self.operator(self.decode(x))

    def observed(self, y: Y) -> Y:
        return self.operator.observed(y)


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


@convert_arguments
class Measurement(eqx.Module):
    """What was measured: y = operator(x0) + std times standard normal noise.

    **Arguments:**

    - `operator`: what is measured of x0.
    - `y`: the measured values, in the shape of operator(x0). Where nothing was measured, such as
      under a mask, its entries are ignored.
    - `std`: of the noise, in the units of y; at least 0. Some methods need a positive one.

    **Raises:** `ValueError` for a std that is negative or not finite. A y of another shape is
    reported when the measurement is first used, since only then x is known.
    """

    operator: Operator
    y: Float[Array, "*measured"]
    std: ScalarLike

    def __check_init__(self):
        check_finite("Measurement", std=self.std)
        if is_concrete_number(self.std) and not np.all(np.asarray(self.std) >= 0):
            raise ValueError(
                f"`Measurement(std)` needs a deviation of at least 0, got {self.std}. 0 is a "
                "measurement without noise."
            )

    def check(self, x: X) -> None:
        """Check that y has the shape of what is measured of x.

        **Raises:** `ValueError` if it has another one.
        """
        measured = jax.eval_shape(self.operator, x)
        if measured.shape != self.y.shape:
            raise ValueError(
                f"`Measurement(y)` needs the shape that {type(self.operator).__name__} returns "
                f"for x {list(x.shape)}, {list(measured.shape)}, got {list(self.y.shape)}. "
                "Measure with the same operator, or reshape y."
            )

    def noise_std(self, call: str, dtype: DTypeLike) -> Scalar:
        """Return the std in a dtype for a method that divides by it.

        **Raises:** `ValueError` for a std of 0; a traced one fails when the program runs.
        """
        std = jnp.asarray(self.std, dtype)
        message = (
            f"`{call}` divides by the noise of the measurement and needs std above 0. Choose a "
            "small positive std, or a method that allows 0."
        )
        if is_concrete_number(self.std):
            if not np.all(np.asarray(self.std) > 0):
                raise ValueError(f"{message} Got {self.std}.")
            return std
        return eqx.error_if(std, std <= 0, message)

    def residual(self, value: Y) -> Y:
        """Return y - value in at least float32, 0 where nothing was measured.

        **Arguments:** `value`: operator(x0).
        """
        wide = value.astype(wide_dtype(value.dtype))
        difference = self.y.astype(wide.dtype) - wide
        return jnp.where(self.operator.observed(value) > 0, difference, 0)

    @convert_arguments
    def log_likelihood(self, x0: X) -> Scalar:
        """Return the log-density of y given x0, of the entries that were measured.

        **Raises:** `ValueError` for a std of 0.
        """
        residual = self.residual(self.operator(x0))
        std = self.noise_std("log_likelihood", residual.dtype)
        count = jnp.sum(self.operator.observed(residual))
        squares = jnp.sum(jnp.square(residual / std))
        return -0.5 * squares - count * (jnp.log(std) + _HALF_LOG_TAU)
