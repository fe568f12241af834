"""A training step on a mesh is the step on one device."""

import jax
import numpy as np
import pytest
from meshes import mesh_of
from training import Training, batch_of

# Sums in another order, through four blocks and their gradients.
BOUND = 1e-5
MESHES = {
    "data": dict(data=8),
    "fsdp": dict(fsdp=8),
    "tensor": dict(tensor=2),
    "context, heads exchanged": dict(context=2),
    "context, ring": dict(context=4),
    "data and fsdp": dict(data=2, fsdp=4),
    "fsdp, tensor and context": dict(fsdp=2, tensor=2, context=2),
}


@pytest.fixture(scope="module")
def expected():
    training = Training()
    metrics = training.take(batch_of(11))
    return training.state, metrics


def worst(found, expected):
    """Return the largest relative error of an array of two pytrees."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        worst = max(worst, np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))
    return worst


@pytest.mark.parametrize("name", MESHES)
def test_a_step_on_a_mesh_is_the_step_on_one_device(expected, name):
    training = Training(mesh_of(**MESHES[name]))
    # 11 rows: a number that no mesh here divides.
    metrics = training.take(batch_of(11))
    state, on_one = expected
    assert worst(metrics, on_one) <= BOUND
    print(
        name,
        worst(training.state.model, state.model),
        worst(training.state.optimizer, state.optimizer),
    )
    assert worst(training.state.model, state.model) <= BOUND
    assert worst(training.state.ema, state.ema) <= BOUND
    assert worst(training.state.optimizer, state.optimizer) <= BOUND
