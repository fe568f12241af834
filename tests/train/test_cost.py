"""Operations by formula are those of the compiled program, and what does not fit is refused."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from program import read
from training import CONFIG, random_flux

from fluxjax import Flux, FluxConfig, image_ids, quantize
from fluxjax.train.cost import StepCost, TokenCounts, forward_flop, training_flop


def test_operations_by_formula_are_those_of_the_compiled_program():
    size, txt = (32, 48), 5
    tokens = TokenCounts(6, txt)
    ids = image_ids(*size)

    def velocity(flux, x, txt, vec):
        inputs = {"txt": txt, "vec": vec, "img_ids": ids, "guidance": 3.5}
        return flux(x, 0.5, **inputs, attention="xla")

    inputs = (jnp.zeros((6, 64)), jnp.zeros((txt, 24)), jnp.zeros(8))
    compiled = jax.jit(velocity).lower(random_flux(), *inputs).compile()
    counted = read(compiled.as_text()).flop
    # Modulation of vectors may be compiled to reductions, which are not counted.
    assert forward_flop(random_flux(), tokens) == pytest.approx(counted, rel=0.1)


def test_devs_operations_are_those_that_are_known():
    dev = eqx.filter_eval_shape(Flux, FluxConfig.dev(), key=jax.random.key(0))
    tokens = TokenCounts(4096, 512)
    forward = forward_flop(dev, tokens)
    assert forward == pytest.approx(74.4e12, rel=0.01)
    assert training_flop(dev, tokens) == pytest.approx(3 * forward)
    # Beside an adapter the gradients of the base's weights are not computed.
    assert training_flop(dev, tokens, {}) == pytest.approx(2 * 59.5e12 + 3 * 14.9e12, rel=0.01)


@pytest.mark.parametrize("format", ["int8", "nf4", "int4"])
def test_weights_of_fewer_bits_multiply_as_much(format):
    flux = random_flux(config=replace(CONFIG, width=64, heads=4, mlp_width=128))
    tokens = TokenCounts(6, 5)
    rounded = quantize(flux, format)
    assert training_flop(rounded, tokens, {}) == training_flop(flux, tokens, {})


def test_a_step_that_does_not_fit_is_refused():
    cost = StepCost(20 * 10**9, 10 * 10**9, 0, 1e12, 24 * 10**9)
    with pytest.raises(ValueError, match=r"needs 30\.000 GB on each device, which has 24\.000 GB"):
        cost.check()
    cost._replace(present=32 * 10**9).check()
    cost._replace(present=None).check()
    assert "30.000 GB" in cost.report()
