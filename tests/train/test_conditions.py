"""Whole small trainings of what models read beside a caption: the loss of one batch falls."""

from dataclasses import replace

import jax.numpy as jnp
import optax
import pytest
from training import Training, batch_of

from fluxjax.train.config import MethodSettings
from fluxjax.train.objective import LossSettings

CASES = {
    # Fill reads the rest of the image and the mask, which says where the loss counts as well.
    "fill": ({"features": 320, "mask": True}, {"weighting": "min_snr"}),
    "control": ({"features": 64}, {"times": "uniform"}),
    "reference": ({"reference": True}, {"times": "uniform"}),
}


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_learns_a_batch_with_a_condition(name):
    batch_options, loss_options = CASES[name]
    features = batch_options.get("features", 0)
    method = MethodSettings(rank=4, targets=("img_in", "single.*"), extra_features=features)
    loss = LossSettings(guidance=(1.0, 1.0), shift=0.0, **loss_options)
    training = Training(method=method, loss=loss, optimizer=optax.adam(2e-2))
    batch, losses = batch_of(2, **batch_options), []
    for _ in range(20):
        # The same times and noise are drawn again.
        training.state = replace(training.state, step=jnp.zeros((), jnp.int32))
        losses.append(float(training.take(batch).loss))
    assert losses[-1] < 0.6 * losses[0]
