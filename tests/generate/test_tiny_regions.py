"""Regional prompts of the shipped model: an analytic checker finds each region's object."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawing import encoded
from scenes import find

import fluxjax
from fluxjax.generate import Region, regional_condition

BASE = "a red star left of a green heart on white"
PROMPTS = [BASE, "a red star left of a blue heart on white"]
REGIONS = [Region(box=(0, 0, 0.5, 1)), Region(box=(0.5, 0, 1, 1))]


@pytest.mark.parametrize("options", [{"until": 1.0}, {"rule": "mix"}])
def test_each_half_has_the_object_of_its_own_prompt(tiny, options):
    states = encoded(tiny, PROMPTS, max_length=24)
    halves = regional_condition(states, REGIONS, height=128, width=128, **options)
    settings = fluxjax.DrawSettings(conditions=(halves,), dtype=jnp.float32)
    (image,) = fluxjax.text_to_image(tiny, BASE, key=jax.random.key(0), settings=settings)
    # Nothing is green, as the base prompt and the left region's would have it.
    background, found = find(np.asarray(image))
    assert background == "white"
    left, right = sorted(found, key=lambda one: one.x)
    assert left.color == "red"
    assert (right.color, right.shape) == ("blue", "heart")
