"""Networks whose input layer reads further features of each token, with random weights for them."""

import equinox as eqx
import jax.numpy as jnp
from small import draw

from fluxjax import Flux
from fluxjax.nets.weight import Dense
from fluxjax.nets.widen import widen_input


def with_appended(flux: Flux, features: int, *, scale: float = 0.3) -> Flux:
    """Return a network that reads `features` more of each token: 320 as Fill, 64 as Canny."""
    wide = widen_input(flux, features)
    value = wide.img_in.weight.value
    random = scale * draw(value.shape[0], features) / features**0.5
    value = value.at[:, -features:].set(jnp.asarray(random, value.dtype))
    return eqx.tree_at(lambda network: network.img_in.weight, wide, Dense(value))
