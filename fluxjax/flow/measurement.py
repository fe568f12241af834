"""Measurements y = A(x0) + std noise.

    Measurement(Mask(mask), mask * image, std=0.05)                      # inpainting
    Measurement(Downsample(4, axes=(0, 1)), small_image, std=0.05)       # super-resolution
    Measurement(Blur(kernel, axes=(0, 1)), blurred_image, std=0.05)      # deblurring
    Measurement(Decoded(decode, Mask(mask)), mask * pixels, std=0.05)    # pixels of a latent

The operators are those of `fluxjax.flow.operators`, or custom ones.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from fluxjax.arguments import convert_arguments
from fluxjax.flow.operators import Operator, Y
from fluxjax.flow.step import X
from fluxjax.numeric import check_finite, is_concrete_number, wide_dtype
from fluxjax.shapes import Array, Float, Scalar, ScalarLike

_HALF_LOG_TAU = 0.5 * math.log(2 * math.pi)


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
