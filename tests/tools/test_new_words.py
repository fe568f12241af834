"""How the tiny model is taught a new shape and a new colour: its examples, and what is trained."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import new_words
import numpy as np
import pytest
import scenes
from new_words import (
    COLOR,
    NEW,
    SHAPE,
    WORDINGS,
    Examples,
    draw_batch,
    outline_weights,
    tokens_of,
    write_examples,
)


@pytest.fixture(autouse=True)
def _new_words(monkeypatch):
    """The new words for the time of a test, with NumPy's rules for dtypes, as of the tool."""
    monkeypatch.setattr(scenes, "SHAPES", dict(scenes.SHAPES))
    monkeypatch.setattr(scenes, "COLORS", dict(scenes.COLORS))
    new_words.extend_scenes()
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_the_new_shape_is_read_as_such_in_each_colour_and_size():
    rng = np.random.default_rng(0)
    for kind in NEW:
        for _ in range(20):
            scene = new_words.scene_of(kind, rng)
            assert scenes.check(scenes.render(scene, 128, 128, rng), scene)["all"]


def test_all_captions_of_an_image_say_the_same(tmp_path):
    captions = write_examples(tmp_path / "new", 9, NEW, wordings=4)
    rows = [json.loads(line) for line in captions.read_text().splitlines()]
    assert len(rows) == 9 * 4
    assert len(list((tmp_path / "new").glob("*.png"))) == 9
    known = (*scenes.SHAPES, *scenes.BACKGROUNDS, "small", "large", "inside")
    for number in range(9):
        mine = rows[4 * number : 4 * number + 4]
        assert {row["image"] for row in mine} == {f"{number:04d}-0.png"}
        said = {
            tuple(sorted(set(row["prompt"].replace(",", "").split()) & set(known))) for row in mine
        }
        # Only a white background may be left unsaid.
        assert len({tuple(word for word in words if word != "white") for words in said}) == 1
        expected = {SHAPE: [SHAPE], COLOR: [COLOR], "both": [SHAPE, COLOR]}[NEW[number % 3]]
        assert all(word in row["prompt"] for word in expected for row in mine)


def test_an_image_in_other_colours_is_the_one_that_is_drawn_in_them():
    rng = np.random.default_rng(1)
    changed_backgrounds = new_colors = 0
    for number in range(60):
        scene = new_words.training_scene(NEW[number % 3], rng)
        other = new_words.in_other_colors(scene, rng)
        shapes = [[(thing.size, thing.shape) for thing in one.things] for one in (scene, other)]
        assert shapes[0] == shapes[1]
        assert other.relation == scene.relation
        assert not other.held_out
        assert {SHAPE, COLOR} & {word for t in other.things for word in (t.shape, t.color)}
        image, expected = (
            scenes.render(one, 128, 128, np.random.default_rng(number)) for one in (scene, other)
        )
        found = new_words.recolored(image, scene, other)
        np.testing.assert_allclose(found, expected, atol=1e-4)
        changed_backgrounds += other.background != scene.background
        new_colors += any(thing.color == COLOR for thing in other.things)
    assert 15 < changed_backgrounds < 45
    assert new_colors > 20


def test_each_image_is_written_in_as_many_palettes(tmp_path):
    captions = write_examples(tmp_path / "new", 3, NEW, wordings=2, palettes=4)
    rows = [json.loads(line) for line in captions.read_text().splitlines()]
    assert len(rows) == 3 * 4 * 2
    assert len({row["image"] for row in rows}) == 3 * 4


def test_tokens_count_more_where_an_outline_passes():
    images = np.full((2, 128, 128, 3), -1, np.float32)
    # A corner of the rectangle lies in each of four tokens, with 14 pixels of both its sides.
    images[1, 18:46, 34:62, 0] = 1
    found = outline_weights(images).reshape(2, 8, 8)
    expected = np.ones((2, 8, 8))
    expected[1, 1:3, 2:4] = 1 + new_words.OUTLINES
    np.testing.assert_allclose(found, expected)


def random_examples(models, count, seed):
    rng = np.random.default_rng(seed)
    images = rng.uniform(-1, 1, (count, 128, 128, 3)).astype(np.float32)
    latents = rng.standard_normal((count, 64, 64)).astype(np.float32)
    ids = tokens_of(models, [f"a {color} star" for color in scenes.COLORS][:count] * WORDINGS)
    split = jax.tree.map(lambda x: x.reshape(-1, WORDINGS, *x.shape[1:]), ids)
    return Examples(images, latents, outline_weights(images), split)


def test_half_of_a_batch_is_of_each_group_and_few_captions_are_dropped(tiny):
    groups = random_examples(tiny, 4, 0), random_examples(tiny, 4, 1)
    empty = jax.tree.map(lambda x: x[:1], tokens_of(tiny, [""]))
    rng, dropped = np.random.default_rng(0), []
    for _ in range(200):
        batch = draw_batch(groups, empty, rng)
        for number, group in enumerate(groups):
            half = slice(8 * number, 8 * number + 8)
            for latents, weights in zip(batch.latents[half], batch.weights[half], strict=True):
                (row,) = np.flatnonzero((group.latents == latents).all((1, 2)))
                np.testing.assert_array_equal(weights, group.weights[row])
        dropped.append((batch.ids.t5 == empty.t5).all(1).mean())
    assert np.mean(dropped) == pytest.approx(new_words.DROPPED, abs=0.012)  # 3 deviations


def test_each_token_counts_in_the_loss_as_its_weight_says(tiny):
    examples = random_examples(tiny, 2, 0)
    ids = jax.tree.map(lambda leaf: leaf[:, 0], examples.ids)
    networks = tiny.flux, tiny.clip, tiny.t5
    evaluate = jax.jit(new_words.loss)

    def loss_of(weights):
        batch = new_words.Batch(examples.latents, np.float32(weights), ids)
        return float(evaluate(networks, batch, key=jax.random.key(0)))

    first = np.broadcast_to(np.arange(64) < 32, (2, 64))
    halves = loss_of(first), loss_of(~first)
    assert halves[0] != pytest.approx(halves[1], rel=1e-3)
    assert loss_of(np.ones((2, 64))) == pytest.approx(np.mean(halves), rel=1e-5)
    assert loss_of(1 + 2.0 * first) == pytest.approx(np.average(halves, weights=(3, 1)), rel=1e-5)


def changed(before, after) -> bool:
    arrays = (jax.tree.leaves(eqx.filter(one, eqx.is_array)) for one in (before, after))
    return any(bool(jnp.any(old != new)) for old, new in zip(*arrays, strict=True))


def test_the_transformer_and_both_text_encoders_are_trained_and_then_the_decoder(tiny, monkeypatch):
    groups = random_examples(tiny, 4, 0), random_examples(tiny, 4, 1)
    trained = new_words.train(tiny, groups, 2)
    for name in ("flux", "clip", "t5"):
        assert changed(getattr(tiny, name), getattr(trained, name))
    assert not changed(tiny.vae, trained.vae)
    monkeypatch.setattr(new_words, "DECODER_STEPS", 2)
    both = new_words.train_decoder(trained, groups)
    assert changed(trained.vae.decoder, both.vae.decoder)
    assert not changed(trained.vae.encoder, both.vae.encoder)
    assert not changed(trained.flux, both.flux)
