"""A small FLUX transformer and ControlNet of random weights, and inputs that fit them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from fluxjax import Flux, FluxConfig
from fluxjax.nets import ControlNet, ControlNetConfig
from fluxjax.nets.stack import is_stacked, path_name
from fluxjax.nets.weight import AdaptedWeight, Weight
from fluxjax.shapes import Array

TEXT, IMAGE = 3, 5
CONFIG = FluxConfig(
    in_channels=8,
    out_channels=8,
    width=32,
    heads=2,
    double_depth=3,
    single_depth=2,
    mlp_width=48,
    context=12,
    pooled=6,
    rope_axes=(4, 6, 6),
    time_width=16,
)
IDS = jnp.asarray(np.arange(IMAGE)[:, None] * np.float32([0, 1, 0]), jnp.float32)


def draw(*shape: int, seed: int = 0) -> Array:
    """Return normal random numbers of a shape."""
    return jnp.asarray(_numbers(shape, seed), jnp.float32)


def _numbers(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """In NumPy: JAX would compile a program for each shape.

    So does `jnp.asarray` of an array of another dtype, or without a dtype.
    """
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def randomized(make, config):
    """Return a network all of whose arrays are random, also those that start as zeros."""
    network = eqx.filter_eval_shape(make, config, key=jax.random.key(0))
    leaves, structure = jax.tree.flatten(network)
    rng = np.random.default_rng(1)
    drawn = [(0.2 * rng.normal(size=leaf.shape)).astype(leaf.dtype) for leaf in leaves]
    arrays = [jnp.asarray(values, values.dtype) for values in drawn]
    return jax.tree.unflatten(structure, arrays)


def adapted(flux: Flux, rank: int = 2) -> Flux:
    """Return a network with a random adapter beside each matrix of its stacked blocks."""

    def wrap(path, node):
        if not isinstance(node, Weight) or not is_stacked(path_name(path)):
            return node
        depth, out, features = node.shape
        down, up = _numbers((depth, rank, features), 1), _numbers((depth, out, rank), 2)
        scaled = [jnp.asarray(np.float32(0.1) * x, jnp.float32) for x in (down, up)]
        return AdaptedWeight(node, *scaled)

    def is_weight(node):
        return isinstance(node, Weight)

    return jax.tree_util.tree_map_with_path(wrap, flux, is_leaf=is_weight)


def small_flux(config: FluxConfig = CONFIG) -> Flux:
    """Return a network all of whose weights are random.

    The modulations of a new one are zeros, so that its blocks would do nothing.
    """
    return _random(Flux, config)


def small_controlnet(**changes) -> ControlNet:
    """Return a ControlNet for `CONFIG`'s transformer, all of whose weights are random.

    **Arguments:** fields of the config that differ: 2 double and 1 single block, no modes.
    """
    sizes = {name: value for name, value in vars(CONFIG).items() if name != "out_channels"}
    sizes |= {"double_depth": 2, "single_depth": 1, "modes": None}
    return _random(ControlNet, ControlNetConfig(**{**sizes, **changes}))


def _random(make, config):
    network = eqx.filter_eval_shape(make, config, key=jax.random.key(0))
    leaves, structure = jax.tree.flatten(network)
    arrays = []
    for number, leaf in enumerate(leaves):
        arrays.append(jnp.asarray(np.float32(0.2) * _numbers(leaf.shape, number), jnp.float32))
    return jax.tree.unflatten(structure, arrays)
