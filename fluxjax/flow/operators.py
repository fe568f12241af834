"""Operators of measurements: what is measured of x0, from masks to what a network decodes.

An operator sees x as the velocity does. For packed latents, pack masks and images alike, or
measure what is decoded.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.arguments import convert_arguments
from fluxjax.flow.step import X
from fluxjax.numeric import check_finite, is_concrete_number
from fluxjax.shapes import Array, Bool, Float

Y = Float[Array, "*measured"]
"""What is measured: an array of any shape."""
Map = Callable[[Array], Array]
"""A linear function of one array."""


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
