"""Fill and control images: features of each token, what they change, what is refused."""

import itertools
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from channels import with_appended
from drawing import KEY

from fluxjax import Conditioning, DrawSettings, text_to_image
from fluxjax.generate import (
    ConcatCondition,
    Margins,
    canny_edges,
    control_condition,
    fill_around,
    fill_condition,
    fill_image,
    image_ids,
    mask_features,
    resize_image,
)
from fluxjax.generate.autoencode import encode
from fluxjax.generate.latents import pack_latents
from fluxjax.generate.masks import pad_image
from fluxjax.lora import init_lora
from fluxjax.lora.attach import attach

PROMPT = "a red star on white"
SETTINGS = DrawSettings(steps=1)
SIZE = (25, 30)


def picture(height, width, seed=0):
    values = np.random.default_rng(seed).uniform(-1, 1, (height, width, 3))
    return jnp.asarray(values, jnp.float32)


@pytest.fixture(scope="module")
def fill(tiny):
    """The tiny model, with random weights for what Fill reads beside the latent."""
    return tiny._replace(flux=with_appended(tiny.flux, 320))


def mask_of(seed=0):
    """Return a soft mask that keeps the left half."""
    values = np.random.default_rng(seed).uniform(0, 1, SIZE)
    values[:, :16] = 0
    return jnp.asarray(values, jnp.float32)


def test_each_feature_of_a_mask_is_the_pixel_that_the_formula_says():
    height, width = 32, 48
    mask = np.random.default_rng(0).uniform(size=(height, width)).astype(np.float32)
    features = mask_features(mask)
    assert features.shape == (6, 256)
    for row in range(2):
        for column in range(3):
            for py, px, dy, dx in np.ndindex(8, 8, 2, 2):
                found = features[row * 3 + column, (py * 8 + px) * 4 + dy * 2 + dx]
                pixel = mask[16 * row + 8 * dy + py, 16 * column + 8 * dx + px]
                if found != pixel:
                    raise AssertionError((row, column, py, px, dy, dx))
    with pytest.raises(ValueError, match="multiples of 16"):
        mask_features(mask[:, :40])


def test_a_fill_condition_is_the_kept_part_and_the_mask(tiny):
    image, mask = pad_image(picture(*SIZE)), pad_image(mask_of())
    for soft in (True, False):
        shown = mask if soft else jnp.round(mask)
        condition = fill_condition(tiny.vae, image, mask, dtype=jnp.float32, soft=soft)
        latent = encode(tiny.vae, (image * (1 - shown[..., None]))[None], dtype=jnp.float32)[0]
        np.testing.assert_array_equal(condition.features[:, :64], pack_latents(latent))
        np.testing.assert_array_equal(condition.features[:, 64:], mask_features(shown))


def test_filling_keeps_pixels_and_depends_on_what_is_kept(fill):
    image, mask = picture(*SIZE), mask_of()
    drawn = fill_image(fill, image, mask, PROMPT, key=KEY, settings=SETTINGS)
    assert drawn.shape == (1, *SIZE, 3)
    np.testing.assert_array_equal(drawn[0, :, :16], image[:, :16])
    # As the features say: pixels under a mask of 1 have no effect.
    black = jnp.where(mask[..., None] == 1, -1, image)
    same = fill_image(fill, black, mask, PROMPT, key=KEY, settings=SETTINGS)
    np.testing.assert_array_equal(same, drawn)
    other = fill_image(fill, -image, mask, PROMPT, key=KEY, settings=SETTINGS)
    assert np.abs(other - drawn)[:, :, 16:].max() > 0.01
    condition = fill_condition(fill.vae, pad_image(image), pad_image(mask), dtype=jnp.float32)
    settings = DrawSettings(steps=1, height=32, width=32, conditions=(condition,))
    plain = text_to_image(fill, PROMPT, key=KEY, settings=settings)
    np.testing.assert_array_equal(plain[:, :25, 16:30], drawn[:, :, 16:])


def test_outpainting_draws_around_the_image(fill):
    image, margins = picture(*SIZE), Margins(left=2, bottom=7)
    drawn = fill_around(fill, image, PROMPT, key=KEY, margins=margins, settings=SETTINGS)
    assert drawn.shape == (1, 32, 32, 3)
    np.testing.assert_array_equal(drawn[0, :25, 2:], image)


def test_features_are_joined_after_those_that_are_there():
    first, second = ConcatCondition(jnp.ones((4, 3))), ConcatCondition(jnp.zeros((4, 2)))
    states = Conditioning(jnp.zeros((2, 3, 8)), jnp.zeros((2, 5)), image_ids(32, 32))
    both = second.add(first.add(states)).concat
    np.testing.assert_array_equal(both, [[1, 1, 1, 0, 0]] * 4)
    own = replace(states, concat=jnp.ones((2, 4, 3)))
    assert second.add(own).concat.shape == (2, 4, 5)
    with pytest.raises(ValueError, match="features of 4 tokens, and the images that are drawn"):
        first.add(replace(states, img_ids=image_ids(32, 48)))


def test_what_does_not_go_together_is_refused(tiny, fill):
    image, mask = picture(*SIZE), mask_of()
    options = dict(key=KEY, settings=SETTINGS)
    with pytest.raises(ValueError, match=r"got 320 features .* this model takes none"):
        fill_image(tiny, image, mask, PROMPT, **options)
    with pytest.raises(ValueError, match=r"got none of the 320 features .* `fill_image`"):
        text_to_image(fill, PROMPT, key=KEY, settings=DrawSettings(steps=1, height=32, width=32))
    with pytest.raises(ValueError, match=r"fill_image\(mask\)` needs one value for each"):
        fill_image(fill, image, mask[:20], PROMPT, **options)
    with pytest.raises(ValueError, match=r"needs values in \[0, 1\]"):
        fill_image(fill, image, 2 * mask, PROMPT, **options)
    with pytest.raises(ValueError, match="multiples of 16"):
        fill_condition(tiny.vae, image, mask, dtype=jnp.float32)
    with pytest.raises(ValueError, match="multiples of 16"):
        control_condition(tiny.vae, image, dtype=jnp.float32)
    sized = DrawSettings(steps=1, height=32, width=32)
    with pytest.raises(ValueError, match="Leave height and width out"):
        fill_image(fill, image, mask, PROMPT, key=KEY, settings=sized)
    control = control_condition(tiny.vae, pad_image(image), dtype=jnp.float32)
    twice = replace(SETTINGS, conditions=(control,))
    with pytest.raises(ValueError, match="got 384 of the 320 features"):
        fill_image(fill, image, mask, PROMPT, key=KEY, settings=twice)


def test_another_image_mask_or_scale_of_an_adapter_compiles_nothing(tiny):
    """A widened adapter that is attached inside of the compiled function."""
    lora = init_lora(tiny.flux, 2, ["img_in"], extra_features=64, key=jax.random.key(1))
    leaves, structure = jax.tree.flatten(lora)
    lora = jax.tree.unflatten(structure, [leaf + 0.1 for leaf in leaves])
    states = Conditioning(jnp.zeros((3, 128)), jnp.zeros(128), image_ids(32, 32), 3.5)
    traces = []

    @eqx.filter_jit
    def velocity(flux, lora, scale, condition, x):
        traces.append(1)
        given = condition.add(states)
        tokens = jnp.concatenate([x, given.concat], axis=-1)
        inputs = dict(txt=given.txt, vec=given.vec, img_ids=given.img_ids, guidance=3.5)
        return attach(flux, [lora], [scale])(tokens, 0.5, **inputs)

    x, found = jnp.ones((4, 64)), []
    for seed, scale in ((0, 1.0), (1, 1.0), (1, 0.5), (1, 0.0)):
        condition = control_condition(tiny.vae, picture(32, 32, seed), dtype=jnp.float32)
        found.append(velocity(tiny.flux, lora, jnp.float32(scale), condition, x))
    assert len(traces) == 1
    for one, other in itertools.pairwise(found):
        assert np.abs(one - other).max() > 0


def test_images_are_resized_by_lanczos_and_stay_in_range():
    image = picture(40, 60)
    assert resize_image(image, 40, 60) is image
    smaller = resize_image(image, 20, 30)
    assert smaller.shape == (20, 30, 3)
    assert float(jnp.abs(resize_image(jnp.sign(image), 80, 120)).max()) == 1
    # A constant stays one, and a wide gradient keeps its values.
    np.testing.assert_allclose(resize_image(jnp.full((9, 7, 3), 0.3), 4, 16), 0.3, atol=1e-6)
    ramp = jnp.broadcast_to(jnp.linspace(-0.8, 0.8, 64)[:, None, None], (64, 4, 3))
    np.testing.assert_allclose(
        resize_image(ramp, 32, 4)[4:-4, 0, 0], (ramp[::2] + ramp[1::2])[4:-4, 0, 0] / 2, atol=1e-3
    )


def test_canny_finds_the_border_of_a_square():
    pytest.importorskip("cv2")
    image = np.full((32, 48, 3), -1, np.float32)
    image[8:24, 8:24] = 1
    edges = canny_edges(image)
    assert set(np.unique(edges)) == {-1.0, 1.0}
    assert edges.shape == (32, 48, 3)
    rows, columns = np.nonzero(np.asarray(edges[..., 0]) > 0)
    assert {rows.min(), columns.min()} <= {7, 8}
    assert {rows.max(), columns.max()} <= {23, 24}
    assert (np.asarray(edges)[12:20, 12:20] == -1).all()
    assert (canny_edges(0.1 * image) == -1).all()  # 25 levels are below both thresholds
    assert (canny_edges(0.1 * image, low=10, high=20) > 0).any()
    with pytest.raises(ValueError, match="0 <= low <= high"):
        canny_edges(image, low=200, high=50)
