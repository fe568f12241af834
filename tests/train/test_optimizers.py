"""Optimizers by name: their learning rates, what decays, and what Muon does to stacks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fluxjax.train.optimizers import (
    OPTIMIZERS,
    OptimizerSettings,
    is_decayed,
    learning_rates,
    make_optimizer,
)

RNG = np.random.default_rng(0)
WEIGHTS = {
    "double.img.out.weight": jnp.asarray(RNG.normal(size=(2, 6, 4)), jnp.float32),
    "img_in.weight": jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32),
    "img_in.bias": jnp.asarray(RNG.normal(size=6), jnp.float32),
}


def test_rates_rise_and_fall_as_the_schedule_says():
    settings = OptimizerSettings(learning_rate=1.0, schedule="cosine", warm_up=4, last_share=0.1)
    rate = learning_rates(settings, 24)
    rates = [float(rate(step)) for step in (0, 1, 3, 4, 14, 24)]
    # Half of the cosine lies between 1 and a tenth of it.
    assert rates == pytest.approx([0.25, 0.5, 1.0, 1.0, 0.55, 0.1], abs=1e-6)
    constant = learning_rates(OptimizerSettings(learning_rate=0.5), 10)
    assert float(constant(0)) == float(constant(9)) == 0.5


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_matrices_decay_and_biases_do_not(name):
    assert is_decayed({"a.weight": 0, "b.bias": 0, "c.scale": 0, "x.term.magnitude": 0}) == {
        "a.weight": True,
        "b.bias": False,
        "c.scale": False,
        "x.term.magnitude": False,
    }
    settings = OptimizerSettings(name=name, learning_rate=0.1, weight_decay=0.5)
    with jax.numpy_dtype_promotion("standard"):
        optimizer = make_optimizer(settings, 10)
        gradients = jax.tree.map(jnp.zeros_like, WEIGHTS)
        updates, _ = optimizer.update(gradients, optimizer.init(WEIGHTS), WEIGHTS)
    for key in ("double.img.out.weight", "img_in.weight"):
        np.testing.assert_allclose(updates[key], -0.05 * WEIGHTS[key], rtol=1e-4)
    np.testing.assert_allclose(updates["img_in.bias"], 0, atol=1e-7)


def test_muon_orthogonalizes_each_matrix_of_a_stack():
    settings = OptimizerSettings(name="muon", learning_rate=1.0, weight_decay=0.0, clip=None)
    with jax.numpy_dtype_promotion("standard"):
        optimizer = make_optimizer(settings, 10)
        updates, _ = optimizer.update(WEIGHTS, optimizer.init(WEIGHTS), WEIGHTS)
    for matrix in (*updates["double.img.out.weight"], updates["img_in.weight"]):
        values = np.linalg.svd(matrix, compute_uv=False)
        # Five steps of Newton-Schulz leave singular values between 0.7 and 1.2 of one number.
        assert values.max() < 1.8 * values.min()
    before = np.linalg.svd(WEIGHTS["img_in.weight"], compute_uv=False)
    assert before.max() > 1.8 * before.min()
