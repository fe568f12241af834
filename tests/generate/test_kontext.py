"""Reference images of Kontext: their sizes, their positions, and what they change."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import monitoring

from fluxjax import Conditioning, DrawSettings, text_to_image
from fluxjax.generate import (
    References,
    ReferenceTokens,
    image_ids,
    kontext_condition,
    kontext_image,
    preferred_size,
    reference_ids,
)
from fluxjax.generate.autoencode import encode
from fluxjax.generate.kontext import nearest_size
from fluxjax.generate.latents import pack_latents
from fluxjax.zoo import ZOO

PROMPT = "a red star on white"
SETTINGS = DrawSettings(steps=1, height=32, width=48)


def picture(height, width, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (height, width, 3)).astype(np.float32)


@pytest.fixture
def programs():
    """The programs that XLA compiles, in a list that a test may clear."""
    compiled = []

    def listen(name, seconds, **_):
        if name == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    monitoring.register_event_duration_secs_listener(listen)
    yield compiled
    monitoring.unregister_event_duration_listener(listen)


def first_and_last(ids, sizes):
    """Return the first and the last position of each reference."""
    ids = np.asarray(ids).astype(int).tolist()
    found, start = [], 0
    for height, width in sizes:
        stop = start + height * width // 256
        found.append((ids[start], ids[stop - 1]))
        start = stop
    return found


def test_one_reference_has_index_1_and_its_own_rows_and_columns():
    expected = [[1, 0, 0], [1, 0, 1], [1, 0, 2], [1, 1, 0], [1, 1, 1], [1, 1, 2]]
    for placement in ("offset", "index"):
        ids = reference_ids([(32, 48)], placement=placement)
        np.testing.assert_array_equal(ids, expected)
        assert ids.dtype == jnp.float32
    beyond = reference_ids([(32, 48)], placement="uxo", size=(16, 64))
    np.testing.assert_array_equal(beyond, np.add(expected, [-1, 1, 4]))


def test_several_references_lie_side_by_side_or_have_indices_or_lie_on_a_diagonal():
    sizes = [(32, 48), (32, 32), (48, 16)]  # in tokens 2x3, 2x2, 3x1
    # The second makes the plane 4 high where it lies below, and 5 wide on the right. The third
    # would be 7 high below, and 4 wide on the right, so it lies there.
    offset = first_and_last(reference_ids(sizes), sizes)
    assert offset == [
        ([1, 0, 0], [1, 1, 2]),
        ([1, 2, 0], [1, 3, 1]),
        ([1, 0, 3], [1, 2, 3]),
    ]
    index = first_and_last(reference_ids(sizes, placement="index"), sizes)
    assert index == [
        ([1, 0, 0], [1, 1, 2]),
        ([2, 0, 0], [2, 1, 1]),
        ([3, 0, 0], [3, 2, 0]),
    ]
    diagonal = first_and_last(reference_ids(sizes, placement="uxo", size=(64, 16)), sizes)
    assert diagonal == [
        ([0, 4, 1], [0, 5, 3]),
        ([0, 6, 4], [0, 7, 5]),
        ([0, 8, 6], [0, 10, 6]),
    ]


def test_what_makes_no_positions_is_refused():
    for arguments, message in (
        (dict(sizes=[]), "at least one reference"),
        (dict(sizes=[(32, 40)]), "multiples of 16"),
        (dict(sizes=[(32, 32)], placement="left"), "one of offset, index, uxo, got 'left'"),
        (dict(sizes=[(32, 32)], placement="uxo"), "Pass its size"),
    ):
        with pytest.raises(ValueError, match=message):
            reference_ids(**arguments)
    with pytest.raises(ValueError, match="one of offset, index, uxo"):
        References(placement="left")


def test_the_preferred_size_has_the_nearest_proportions():
    assert preferred_size(500, 500) == (1024, 1024)
    assert preferred_size(1000, 1500) == (832, 1248)
    assert preferred_size(1500, 1000) == (1248, 832)
    assert preferred_size(10, 1000) == (672, 1568)
    assert preferred_size(1000, 10) == (1568, 672)


def test_references_are_resized_to_what_the_model_is_meant_for():
    image = jnp.zeros((40, 60, 3))
    small, large = ZOO["tiny"].defaults, ZOO["kontext"].defaults
    assert References().resize(image, small).shape == (32, 64, 3)
    assert References().resize(image, large).shape == (832, 1248, 3)
    assert References(preferred=False).resize(image, large).shape == (32, 64, 3)
    assert References(preferred=True).resize(image, small).shape == (832, 1248, 3)
    assert nearest_size(7, 41) == (16, 48)


def test_references_follow_the_noise_and_come_after_those_that_are_there(tiny):
    images = [picture(32, 48), picture(48, 16, seed=1)]
    condition = kontext_condition(tiny.vae, images, dtype=jnp.float32)
    latents = [encode(tiny.vae, jnp.asarray(image)[None], dtype=jnp.float32)[0] for image in images]
    expected = jnp.concatenate([pack_latents(latent) for latent in latents])
    np.testing.assert_array_equal(condition.reference.tokens, expected)
    states = Conditioning(jnp.zeros((2, 3, 8)), jnp.zeros((2, 5)), image_ids(32, 32))
    once = condition.add(states)
    assert once.reference is condition.reference  # shared by both images
    own = ReferenceTokens(jnp.ones((2, 4, 64)), jnp.zeros((4, 3)))
    both = condition.add(replace(states, reference=own)).reference
    assert both.tokens.shape == (2, 4 + len(expected), 64)
    np.testing.assert_array_equal(both.tokens[1, 4:], expected)
    np.testing.assert_array_equal(both.ids[4:], condition.reference.ids)


def test_an_edit_has_the_size_of_its_reference_and_depends_on_it(tiny, programs):
    image = jnp.asarray(picture(30, 44))
    references = References(preferred=False)
    key, own_size = jax.random.key(0), DrawSettings(steps=1)
    drawn = kontext_image(tiny, [image], PROMPT, key=key, references=references, settings=own_size)
    assert drawn.shape == (1, 32, 48, 3)
    conditions = []
    for one in (references.resize(image, tiny.defaults), picture(32, 48, seed=1)):
        conditions.append(kontext_condition(tiny.vae, [one], dtype=jnp.float32))
    images = []
    for condition in conditions:
        settings = replace(SETTINGS, conditions=(condition,))
        programs.clear()
        images.append(text_to_image(tiny, PROMPT, key=key, settings=settings))
    assert not programs  # another reference of the same size compiles nothing
    np.testing.assert_array_equal(drawn, images[0])
    assert np.abs(images[0] - images[1]).max() > 0.01


def test_what_is_no_reference_is_refused(tiny):
    with pytest.raises(ValueError, match="at least one image"):
        kontext_image(tiny, [], PROMPT, key=jax.random.key(0))
    with pytest.raises(ValueError, match="finite numbers"):
        kontext_condition(tiny.vae, [np.full((16, 16, 3), np.nan, np.float32)], dtype=jnp.float32)
