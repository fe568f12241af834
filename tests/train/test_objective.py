"""The loss of an example: its times, its weights, its mask and its conditions."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import mesh_of
from training import EMPTY, KEY, LOSS, Training, batch_of, random_flux

from fluxjax.flow.times import resolution_mu
from fluxjax.nets.widen import widen_input
from fluxjax.train.loss import flow_matching_loss, min_snr_weight
from fluxjax.train.mesh_step import row_example
from fluxjax.train.objective import Evaluation, LossSettings, draw, example_loss
from fluxjax.train.place import place_batch
from fluxjax.zoo import Defaults

FLOAT32 = Evaluation(dtype=jnp.float32)


def examples(batch):
    rows, shared = place_batch(batch, EMPTY, mesh_of())
    return [
        row_example(jax.tree.map(lambda leaf, i=i: leaf[i], rows), shared)
        for i in range(len(batch.latents))
    ]


def test_the_times_of_training_are_those_of_sampling_by_default():
    assert LossSettings().mu(4096) == pytest.approx(resolution_mu(4096))
    tiny = Defaults(base_shift=2.0, max_shift=2.65)
    assert LossSettings().for_model(tiny, takes_guidance=False).mu(256) == pytest.approx(2.0)
    schnell = Defaults(shift=False, guidance=None)
    assert LossSettings().for_model(schnell, takes_guidance=False).mu(4096) == 0
    assert LossSettings().for_model(tiny, takes_guidance=True).guidance == (1.0, 1.0)
    with pytest.raises(ValueError, match="which this one does not"):
        LossSettings(guidance=(1.0, 2.0)).for_model(schnell, takes_guidance=False)


def test_draws_depend_on_the_place_and_the_key_alone():
    settings = LossSettings(times="uniform", shift=0.0, guidance=(2.0, 3.0), caption_dropout=0.25)
    (example,) = examples(batch_of(1))
    many = jax.jit(
        jax.vmap(lambda key: draw(example, settings, key)._replace(noise=jnp.zeros(())))
    )(jax.random.split(jax.random.key(0), 4000))
    # 4,000 draws: five standard errors.
    assert float(many.t.mean()) == pytest.approx(0.5, abs=5 * 0.29 / 4000**0.5)
    assert float(many.dropped.mean()) == pytest.approx(0.25, abs=5 * 0.43 / 4000**0.5)
    assert 2 <= float(many.guidance.min()) < float(many.guidance.max()) <= 3


def test_a_mask_weighs_tokens_and_none_left_is_no_loss():
    x0, noise, t = jnp.zeros((3, 2)), jnp.ones((3, 2)), jnp.float32(0.5)
    velocity = lambda x, t: jnp.array([[1.0, 1.0], [2.0, 2.0], [4.0, 4.0]])  # noqa: E731
    assert float(flow_matching_loss(velocity, x0, t, noise)) == pytest.approx((0 + 1 + 9) / 3)
    weights = jnp.array([1.0, 3.0, 0.0])
    assert float(flow_matching_loss(velocity, x0, t, noise, weights)) == pytest.approx(0.75)
    assert float(flow_matching_loss(velocity, x0, t, noise, jnp.zeros(3))) == 0


def test_min_snr_is_the_weight_of_the_error_of_x0():
    t = np.linspace(0.05, 0.95, 7)
    ratio = np.square((1 - t) / t)
    found = [float(min_snr_weight(one, 5.0)) for one in t]
    np.testing.assert_allclose(found, np.minimum(ratio, 5) * t**2, rtol=1e-5)


@pytest.mark.parametrize("kind", ["concat", "reference"])
def test_what_an_example_is_conditioned_on_reaches_the_network(kind):
    if kind == "concat":
        network = widen_input(random_flux(), 64)
        # Its columns of zeros would ignore what they read.
        noise = 0.1 * jax.random.normal(KEY, network.img_in.weight.value.shape)
        network = eqx.tree_at(
            lambda one: one.img_in.weight.value, network, replace_fn=lambda value: value + noise
        )
        batch = batch_of(2, features=64)
    else:
        network, batch = random_flux(), batch_of(2, reference=True)
    first, second = examples(batch)
    draws = draw(first, LOSS, jax.random.key(0))

    @jax.jit
    def loss(example):
        return example_loss(network, example, draws, LOSS, FLOAT32)

    changed = second.concat if kind == "concat" else second.reference
    field = {"concat": lambda one: one.concat, "reference": lambda one: one.reference}[kind]
    other = eqx.tree_at(field, first, changed)
    assert abs(float(loss(other)) - float(loss(first))) > 1e-4


def test_examples_count_by_their_weights():
    """So prior preservation is a weight of the examples of the class."""
    batch = batch_of(3)
    loss = float(Training().take(batch).loss)
    draw_key, _ = jax.random.split(jax.random.fold_in(KEY, 0))

    @jax.jit
    def loss_of(example):
        draws = draw(example, LOSS, draw_key)
        return example_loss(random_flux(), example, draws, LOSS, FLOAT32)

    alone = np.array([float(loss_of(example)) for example in examples(batch)])
    weight = np.asarray(batch.weight)
    assert loss == pytest.approx(float(np.sum(weight * alone) / weight.sum()), rel=1e-5)
