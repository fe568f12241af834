"""Meshes of the machine's CPU devices, and how far a result is from another."""

import math

import jax
import numpy as np

from fluxjax import make_mesh


def mesh_of(**sizes):
    """Return a mesh of as many devices as its sizes need."""
    return make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())])


def relative(found, expected):
    """Return |found - expected| / |expected|."""
    found, expected = np.asarray(found), np.asarray(expected)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
