"""The activations of the networks, computed in at least float32 and rounded once.

Each has several operations. If every one of them were rounded to bfloat16, errors would add up:
near x = -2 little is left of the 8 bits of 1 + tanh(x) in a GELU. On CPUs the roundings would also
take most of the time. For a gradient only x is kept; the rest is computed again.
"""

from collections.abc import Callable, Mapping
from functools import partial, wraps

import jax
import jax.numpy as jnp

from fluxjax.kernels.chips import default_device
from fluxjax.numeric import wide_dtype
from fluxjax.shapes import Array, Float

Activation = Callable[[Array], Array]

_GELU_LOWEST = -0.7524614
"""Where `gelu` is lowest."""


def _rounded_once(function: Activation) -> Activation:
    """Return `function`, computed in at least float32 and rounded to the dtype of x."""

    # Without a checkpoint, a gradient would keep arrays in float32 for each block. Inside a scan
    # the barriers that `prevent_cse` adds have no use.
    @partial(jax.checkpoint, prevent_cse=False)
    @wraps(function)
    def activation(x: Array) -> Array:
        if default_device().platform == "gpu":
            # XLA computes it in float32 there by itself. With explicit casts it would also write
            # the result in float32 before an int8 product: 9 % more bytes for a double block.
            return function(x)
        return function(x.astype(wide_dtype(x.dtype))).astype(x.dtype)

    return activation


@_rounded_once
def gelu(x: Array) -> Array:
    """GELU in its tanh form.

    **Source:** Hendrycks & Gimpel 2016.
    """
    return jax.nn.gelu(x, approximate=True)


@_rounded_once
def exact_gelu(x: Array) -> Array:
    """x Φ(x), with the distribution function Φ of the normal distribution.

    **Source:** Hendrycks & Gimpel 2016.
    """
    return jax.nn.gelu(x, approximate=False)


@_rounded_once
def quick_gelu(x: Array) -> Array:
    """x sigmoid(1.702 x), CLIP's approximation of GELU.

    **Source:** Hendrycks & Gimpel 2016.
    """
    return x * jax.nn.sigmoid(1.702 * x)


@_rounded_once
def silu(x: Array) -> Array:
    """x sigmoid(x).

    **Source:** Elfwing et al. 2017.
    """
    return jax.nn.silu(x)


ACTIVATIONS: Mapping[str, Activation] = {
    "quick_gelu": quick_gelu,
    "gelu": exact_gelu,
    "gelu_tanh": gelu,
}
"""The activations of encoders' MLPs, by the names that configs have for them."""


def gelu_maxima(x: Float[Array, "*batch features"]) -> Float[Array, "*batch"]:
    """Return the largest magnitude of gelu(x) along the last axis, in the dtype of x.

    It is found by comparisons of x: GELU falls to its minimum, and rises from there on.
    """
    lowest, infinity = jnp.asarray(_GELU_LOWEST, x.dtype), jnp.asarray(jnp.inf, x.dtype)
    largest = jnp.abs(gelu(jnp.max(x, axis=-1)))
    # Of negative numbers those next to the minimum are the largest, on both sides of it.
    below = jnp.max(jnp.where(x <= lowest, x, -infinity), axis=-1)
    above = jnp.min(jnp.where(x >= lowest, x, infinity), axis=-1)
    for nearest in (below, above):
        found = jnp.where(jnp.isfinite(nearest), jnp.abs(gelu(nearest)), 0)
        largest = jnp.maximum(largest, found)
    return largest
