"""What the measurements share: a transformer of random weights."""

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax import Flux, FluxConfig


def random_flux(config: FluxConfig) -> Flux:
    """Draw bfloat16 weights on the device, leaf by leaf, so that no float32 copy of the model ever exists."""
    abstract = eqx.filter_eval_shape(Flux, config, key=jax.random.key(0))
    leaves, structure = jax.tree.flatten(abstract)
    draw = jax.jit(lambda key, shape: 0.02 * jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return jax.tree.unflatten(structure, [draw(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)])
