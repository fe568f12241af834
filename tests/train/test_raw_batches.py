"""Batches of raw examples: what they hold, and what becomes of broken images."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples_on_disk import CAPTIONS, SIZES, WEIGHTS, png, write_folder, write_json

from fluxjax.generate.fill import fill_condition
from fluxjax.generate.image import decode_image
from fluxjax.generate.latents import pack_latents
from fluxjax.generate.reference_ids import reference_ids
from fluxjax.generate.text import encode_text, prompt_ids
from fluxjax.train import DataSettings, Encoders, RawBatches, open_batches
from fluxjax.train.buckets import resize_to_cover
from fluxjax.train.prepare import random_mask

SIZE = (32, 32)
packed = eqx.filter_jit(lambda vae, image: pack_latents(vae.encode(image)))


@pytest.fixture(scope="module")
def encoders(tiny):
    return Encoders(
        tiny.tokenizers, tiny.clip, tiny.t5, tiny.vae, jnp.float32, tiny.defaults, "tiny"
    )


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """JSON lines whose examples have a control image, a source and a mask."""
    path = tmp_path_factory.mktemp("all") / "examples" / "all.jsonl"
    kinds = {"control": "control", "source": "source", "mask": "mask"}
    return write_json(path, ("image", "prompt"), **kinds)


def first_batch(path, encoders, batch_size=5, **options):
    """Return the first batch of examples, and the numbers and images of its rows."""
    settings = DataSettings(
        sources=(str(path),), size=32, max_ratio=1, max_length=8, threads=1, **options
    )
    batches = RawBatches(settings, encoders, batch_size=batch_size)
    batch = next(batches)
    batches.close()
    return batch, batch.numbers.tolist()


def image(number: int, kind: str = "image") -> np.ndarray:
    return resize_to_cover(decode_image(png(number, kind), "png"), SIZE)


def test_a_batch_has_the_latents_and_the_text_of_its_examples(examples, encoders):
    batch, numbers = first_batch(examples, encoders)
    assert batch.size == SIZE
    for row, number in enumerate(numbers):
        expected = packed(encoders.vae, image(number))
        # The program differs, and so does the order of its sums.
        np.testing.assert_allclose(batch.latents[row], expected, atol=2e-4)
    ids = prompt_ids(encoders.tokenizers, [CAPTIONS[number] for number in numbers], max_length=8)
    text = encode_text(encoders.clip, encoders.t5, ids, dtype=jnp.float32)
    np.testing.assert_allclose(batch.text.txt, text.txt, atol=1e-5)
    np.testing.assert_allclose(batch.text.vec, text.vec, atol=1e-5)
    np.testing.assert_allclose(batch.weight, [WEIGHTS[number] for number in numbers])
    assert batch.concat is batch.reference is batch.mask is None


def test_fill_has_the_image_that_is_left_and_the_masks_pixels(examples, encoders):
    batch, numbers = first_batch(examples, encoders, condition="fill", masked_loss=True)
    for row, number in enumerate(numbers):
        gray = (decode_image(png(number, "mask"), "png").mean(axis=-1, keepdims=True) + 1) / 2
        mask = np.clip(resize_to_cover(gray, SIZE, smooth=True)[..., 0], 0, 1)
        expected = fill_condition(encoders.vae, image(number), np.round(mask), dtype=jnp.float32)
        np.testing.assert_allclose(batch.concat[row], expected.features, atol=2e-4)
        tokens = mask.reshape(2, 16, 2, 16).mean(axis=(1, 3)).reshape(-1)
        np.testing.assert_allclose(batch.mask[row], tokens, atol=1e-6)


def test_control_and_reference_have_the_latent_of_their_image(examples, encoders):
    control, numbers = first_batch(examples, encoders, condition="control")
    expected = packed(encoders.vae, image(numbers[0], "control"))
    np.testing.assert_allclose(control.concat[0], expected, atol=2e-4)
    edit, numbers = first_batch(examples, encoders, condition="reference")
    expected = packed(encoders.vae, image(numbers[0], "source"))
    np.testing.assert_allclose(edit.reference.tokens[0], expected, atol=2e-4)
    np.testing.assert_array_equal(edit.reference.ids, reference_ids([SIZE]))


def test_a_mirrored_example_is_mirrored_wholly(examples, encoders):
    options = {"condition": "control", "flip": True, "masked_loss": True}
    batch, numbers = first_batch(examples, encoders, **options)
    plain, same = first_batch(examples, encoders, **{**options, "flip": False})
    assert numbers == same
    mirrored = ~np.isclose(batch.mask, plain.mask).all(axis=1)
    assert 0 < mirrored.sum() < 5
    for row in np.flatnonzero(mirrored):
        expected = packed(encoders.vae, image(numbers[row])[:, ::-1])
        np.testing.assert_allclose(batch.latents[row], expected, atol=2e-4)
        expected = packed(encoders.vae, image(numbers[row], "control")[:, ::-1])
        np.testing.assert_allclose(batch.concat[row], expected, atol=2e-4)
        grid = np.asarray(plain.mask[row]).reshape(2, 2)[:, ::-1]
        np.testing.assert_allclose(batch.mask[row], grid.reshape(-1), atol=1e-6)


def test_drawn_latents_deviate_as_the_posterior_does(examples, encoders):
    drawn, numbers = first_batch(examples, encoders, sample_posterior=True)
    mean, _ = first_batch(examples, encoders)
    _, log_variance = eqx.filter_jit(encoders.vae.moments)(image(numbers[0]))
    deviation = encoders.vae.config.scale * jnp.exp(0.5 * pack_latents(log_variance))
    standard = (drawn.latents[0] - mean.latents[0]) / deviation
    # 256 normal draws: mean and deviation within four standard errors.
    assert abs(float(standard.mean())) < 4 / 16
    assert abs(float(standard.std()) - 1) < 4 / np.sqrt(512)


def test_random_masks_hide_rectangles_or_everything():
    masks = [random_mask(np.random.default_rng(seed), (32, 64)) for seed in range(100)]
    shares = np.array([mask.mean() for mask in masks])
    assert set(np.unique(masks)) == {0, 1}
    assert shares.min() > 0
    assert 2 <= (shares == 1).sum() < 40
    assert len(set(shares.tolist())) > 50


def test_broken_images_lose_their_weight_and_are_named(encoders, tmp_path):
    folder = write_folder(tmp_path / "folder")
    for number in (1, 3):
        (folder / f"{number}.png").write_bytes(png(number)[:-200])
    settings = DataSettings(sources=(str(folder),), size=32, max_ratio=1, max_length=8, threads=1)
    batches = open_batches(settings, encoders=encoders, batch_size=2)
    numbers, weights = [], []
    for _ in range(3):  # an epoch of five examples
        batch = next(batches)
        assert np.isfinite(batch.latents).all()
        numbers += batch.numbers.tolist()
        weights += batch.weight.tolist()
    batches.close()
    counted = {number for number, weight in zip(numbers, weights, strict=True) if weight}
    assert counted == {0, 2, 4}
    assert [line.split(":")[0] for line in sorted(batches.broken())] == ["1.png", "3.png"]
    strict = DataSettings(**{**vars(settings), "max_broken": 1})
    batches = open_batches(strict, encoders=encoders, batch_size=5)
    with pytest.raises(ValueError, match=r"2 examples can't be used.*1.png: .*; 3.png"):
        next(batches)
    batches.close()


def test_a_control_image_of_other_proportions_is_broken(encoders, tmp_path):
    path = write_json(tmp_path / "examples" / "all.jsonl", ("image", "prompt"), control="control")
    (path.parent / "0.control.png").write_bytes(png(3))
    with pytest.raises(ValueError, match="its control image has 60x30 pixels, other proportions"):
        first_batch(path, encoders, condition="control", max_broken=0)
    assert SIZES[3] == (30, 60)


def test_the_empty_captions_states_are_those_of_an_empty_prompt(examples, encoders):
    settings = DataSettings(
        sources=(str(examples),), size=32, max_length=8, threads=1, text_dtype="bfloat16"
    )
    empty = RawBatches(settings, encoders, batch_size=1).empty_text()
    ids = prompt_ids(encoders.tokenizers, [""], max_length=8)
    text = encode_text(encoders.clip, encoders.t5, ids, dtype=jnp.float32)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), text)
    assert empty.txt.dtype == jnp.bfloat16
    np.testing.assert_array_equal(empty.txt, rounded.txt)
    np.testing.assert_array_equal(empty.vec, rounded.vec)
