"""A transformer whose input layer reads more features of each image token."""

from dataclasses import replace

import equinox as eqx
import jax.numpy as jnp

from fluxjax.arguments import convert_arguments
from fluxjax.nets.flux import Flux
from fluxjax.nets.weight import AdaptedWeight, Dense, Weight
from fluxjax.shapes import Array, Float


@convert_arguments
def widen_input(flux: Flux, features: int) -> Flux:
    """Return a transformer that reads more features of each image token, and ignores them.

    The matrix of `img_in` gets columns of zeros after its own, so that the velocity does not
    change. It is where training of a network begins that is conditioned on features appended to
    each token, such as FLUX.1 Fill, Canny and Depth.

    **Arguments:** `features`: how many are added, from 0 on: 64 for a control image, 320 for an
    image and its mask.
    **Raises:** `ValueError` for a negative number, or if `img_in` is not stored as an array.
    **Source:** Black Forest Labs 2024, FLUX.1 tools, whose LoRAs are added to such a network.
    """
    if features < 0:
        raise ValueError(
            f"`widen_input(features)` needs a number from 0 on, got {features}. Inputs can't be "
            "taken away."
        )
    if features == 0:
        return flux
    config = replace(flux.config, in_channels=flux.config.in_channels + features)
    weight = _widen(flux.img_in.weight, features)
    wide = eqx.tree_at(lambda network: network.img_in.weight, flux, weight)
    # A static field is no leaf, and `dataclasses.replace` would call `__init__`. `wide` is new, so
    # that nobody else sees it change.
    object.__setattr__(wide, "config", config)
    return wide


def _widen(weight: Weight, features: int) -> Weight:
    """Return a weight with zeros for further input features, so that they change nothing.

    **Raises:** `ValueError` for one that is stored in another way.
    """
    if isinstance(weight, Dense):
        return Dense(append_zero_columns(weight.value, features))
    if isinstance(weight, AdaptedWeight):
        down = append_zero_columns(weight.down, features)
        return AdaptedWeight(_widen(weight.base, features), down, weight.up)
    raise ValueError(
        f"`widen_input` needs an `img_in` stored as an array, got {type(weight).__name__}. "
        "Widen the network before its weights are rounded or moved."
    )


def append_zero_columns(
    matrix: Float[Array, "rows columns"], count: int
) -> Float[Array, "rows more_columns"]:
    """Return a matrix with columns of zeros after its own."""
    return jnp.pad(matrix, ((0, 0), (0, count)))
