"""Images of any size, masks as images, and a larger canvas."""

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from fluxjax.flow.normal_equations import adjoint
from fluxjax.generate import (
    Blurred,
    Hidden,
    Margins,
    Shrunk,
    cell_mask,
    extend_canvas,
    mask_tokens,
    pack_latents,
    pad_image,
    paste_kept,
    read_mask,
)


@pytest.fixture
def image():
    return np.random.default_rng(0).uniform(-1, 1, (21, 35, 3)).astype(np.float32)


def test_padding_mirrors_to_multiples_of_16_and_cropping_undoes_it(image):
    padded = pad_image(image)
    assert padded.shape == (32, 48, 3)
    np.testing.assert_array_equal(padded[:21, :35], image)
    np.testing.assert_array_equal(padded[21:, :35], image[:9:-1])
    np.testing.assert_array_equal(padded[:21, 35:], image[:, :21:-1])
    # Narrower than what is added: it is mirrored again and again.
    assert pad_image(image[:, :1]).shape == (32, 16, 3)
    whole = image[:16, :16]
    np.testing.assert_array_equal(pad_image(whole), whole)


@pytest.mark.parametrize(
    ("mode", "white", "black"),
    [("L", 255, 0), ("1", 1, 0), ("RGB", (255, 255, 255), (0, 0, 0)), ("I;16", 65535, 0)],
)
def test_white_is_repainted_and_black_is_kept_in_every_mode(mode, white, black, tmp_path):
    picture = PIL.Image.new(mode, (4, 3), black)
    picture.putpixel((2, 1), white)
    picture.save(tmp_path / "mask.png")
    mask = read_mask(tmp_path / "mask.png", size=(3, 4))
    expected = np.zeros((3, 4), np.float32)
    expected[1, 2] = 1
    np.testing.assert_array_equal(mask, expected)


def test_gray_and_transparent_masks_are_read_as_documented(tmp_path):
    PIL.Image.new("L", (2, 2), 51).save(tmp_path / "gray.png")
    np.testing.assert_allclose(read_mask(tmp_path / "gray.png"), 0.2, atol=1e-6)
    PIL.Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / "hole.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "hole.png"), 1)


def test_a_mask_of_another_size_is_refused_with_both_sizes(tmp_path):
    PIL.Image.new("L", (4, 3)).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match=r"image's size, 5x3 pixels, and .*mask.png has 4x3"):
        read_mask(tmp_path / "mask.png", size=(3, 5))


def test_a_cell_is_kept_only_if_its_pixels_and_the_margin_are():
    mask = np.zeros((32, 48), np.float32)
    mask[16, 24] = 0.5
    without = np.zeros((4, 6), np.float32)
    without[2, 3] = 0.5
    np.testing.assert_array_equal(cell_mask(mask, margin=0), without)
    # The pixel is the first of its cell, so that 1 pixel around it reaches the cells before.
    near = without.copy()
    near[1:3, 2:4] = 0.5
    np.testing.assert_array_equal(cell_mask(mask, margin=1), near)
    wide = without.copy()
    wide[1:4, 2:5] = 0.5
    np.testing.assert_array_equal(cell_mask(mask, margin=8), wide)
    with pytest.raises(ValueError, match="multiples of 16 pixels and a margin"):
        cell_mask(mask[:20])


def test_masks_are_packed_as_latents_are():
    cells = np.arange(24, dtype=np.float32).reshape(4, 6) / 24
    latent = np.random.default_rng(1).normal(size=(16, 4, 6)).astype(np.float32)
    np.testing.assert_array_equal(
        mask_tokens(cells) * pack_latents(latent), pack_latents(cells * latent)
    )


def test_only_pixels_with_mask_0_are_pasted(image):
    mask = np.zeros((21, 35), np.float32)
    mask[:, 20:] = 0.01
    drawn = jnp.full((2, *image.shape), 0.25)
    pasted = np.asarray(paste_kept(drawn, image, mask))
    np.testing.assert_array_equal(pasted[:, :, :20], np.stack([image[:, :20]] * 2))
    np.testing.assert_array_equal(pasted[:, :, 20:], 0.25)


def test_a_larger_canvas_holds_the_image_and_a_mask_of_what_is_new(image):
    canvas, mask = extend_canvas(image, Margins(left=3, top=40, bottom=1))
    assert canvas.shape == (62, 38, 3)
    np.testing.assert_array_equal(canvas[40:61, 3:], image)
    assert mask.sum() == 62 * 38 - 21 * 35
    assert not mask[40:61, 3:].any()
    with pytest.raises(ValueError, match="at least one of them above 0, got left=0"):
        Margins()


@pytest.mark.parametrize("degradation", [Blurred(1.5), Shrunk(4), Hidden(np.eye(24, 20))])
def test_degradations_have_exact_adjoints_and_ignore_the_padding(degradation):
    """<A x, y> = <x, A^T y>; pixels beyond the picture are measured by nothing."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(3, 32, 32)).astype(np.float32)
    operator = degradation.operator(24, 20)
    measured = operator(jnp.asarray(x))
    y = rng.normal(size=measured.shape).astype(np.float32)
    back = adjoint(operator, jnp.asarray(x))(jnp.asarray(y))
    # Float32 sums of some thousand products.
    np.testing.assert_allclose(jnp.vdot(measured, y), jnp.vdot(x, back), rtol=1e-4, atol=1e-3)
    assert not back[:, 24:].any()
    assert not back[:, :, 20:].any()


def test_degradations_do_to_a_picture_what_they_say(image):
    channels_first = jnp.asarray(np.moveaxis(image, -1, 0))
    flat = jnp.full((3, 21, 35), 0.3)
    # Weights of a blur add up to 1, also at mirrored edges.
    np.testing.assert_allclose(Blurred(2.0).operator(21, 35)(flat), 0.3, rtol=1e-5)
    blurred = np.asarray(Blurred(0.7).operator(21, 35)(channels_first))
    distances = np.arange(-3, 4)
    weights = np.exp(-np.square(distances / 0.7) / 2)
    weights /= weights.sum()
    window = np.asarray(channels_first)[:, 7:14, 17:24]
    np.testing.assert_allclose(
        blurred[:, 10, 20], np.einsum("cyx,y,x->c", window, weights, weights), rtol=1e-4, atol=1e-6
    )
    small = Shrunk(7).operator(21, 35)(channels_first)
    np.testing.assert_allclose(small[:, 1, 2], image[7:14, 14:21].mean((0, 1)), rtol=1e-4)
    assert Shrunk(7).restored_size(3, 5) == (21, 35)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Blurred(0.0), "above 0, and at most 64, got 0"),
        (lambda: Shrunk(0), "from 1 to 64, got 0"),
        (lambda: Blurred(5.0).check(jnp.zeros((14, 40, 3))), "reaches 15 pixels far"),
        (lambda: Hidden(np.zeros((3, 4))).check(jnp.zeros((4, 3, 3))), "each of the 3x4 pixels"),
        (lambda: Hidden(np.full((4, 3), 2.0)).check(jnp.zeros((4, 3, 3))), r"in \[0, 1\]"),
    ],
)
def test_impossible_degradations_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()
