import os

import numpy as np
import PIL.Image
import pytest

from fluxjax import read_image, write_png
from fluxjax.generate.image import write_numbered


def test_a_png_comes_back_with_its_text(tmp_path):
    image = np.linspace(-1, 1, 4 * 5 * 3, dtype=np.float32).reshape(4, 5, 3)
    write_png(image, tmp_path / "x.png", {"prompt": "ein größerer Stern ★"})
    # Bytes are 2 / 255 apart.
    np.testing.assert_allclose(read_image(tmp_path / "x.png"), image, atol=1 / 255)
    with PIL.Image.open(tmp_path / "x.png") as file:
        assert file.text["prompt"] == "ein größerer Stern ★"


def test_values_outside_the_range_are_clipped(tmp_path):
    write_png(np.full((2, 2, 3), 7.0, np.float32), tmp_path / "x.png")
    assert (read_image(tmp_path / "x.png") == 1).all()


def test_a_file_is_never_overwritten_and_nothing_is_left_behind(tmp_path):
    (tmp_path / "x.png").write_text("mine")
    with pytest.raises(FileExistsError):
        write_png(np.zeros((2, 2, 3), np.float32), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("image", "name", "said"),
    [
        (np.zeros((2, 2, 3), np.float32), "x.jpg", "needs a name that ends in .png"),
        (np.zeros((1, 2, 2, 3), np.float32), "x.png", "Write the images of a batch one by one"),
        (np.zeros((3, 4, 4), np.float32), "x.png", "Move the channels last"),
        (np.zeros((4, 4, 3), np.uint8), "x.png", "needs floats in"),
        (np.full((4, 4, 3), np.nan, np.float32), "x.png", "needs finite numbers"),
        (np.full((4, 4, 3), np.inf, np.float32), "x.png", "needs finite numbers"),
    ],
)
def test_what_is_no_image_is_refused_and_nothing_is_written(image, name, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        write_png(image, tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "metadata", [{"a": 3}, {"a": "\ud800"}, {"": "a"}, {"k" * 80: "a"}, {"a\nb": "c"}]
)
def test_metadata_that_is_no_text_is_refused(metadata, tmp_path):
    with pytest.raises(ValueError, match="metadata"):
        write_png(np.zeros((2, 2, 3), np.float32), tmp_path / "x.png", metadata)


def test_a_file_is_overwritten_if_wanted_and_has_the_mode_of_the_umask(tmp_path):
    path = tmp_path / "x.png"
    path.write_text("old")
    before = os.umask(0o077)
    try:
        write_png(np.ones((2, 2, 3), np.float32), path, overwrite=True)
    finally:
        os.umask(before)
    assert (read_image(path) == 1).all()
    assert path.stat().st_mode & 0o777 == 0o600


def test_gray_of_16_bits_keeps_its_levels(tmp_path):
    levels = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    PIL.Image.fromarray(levels).save(tmp_path / "x.png")
    # Half a level of 65535.
    np.testing.assert_allclose(
        read_image(tmp_path / "x.png")[..., 1], levels / 32767.5 - 1, atol=1e-5
    )


def test_what_is_transparent_lies_over_white(tmp_path):
    PIL.Image.fromarray(
        np.array([[[255, 0, 0, 0], [255, 0, 0, 255], [0, 0, 0, 51]]], np.uint8)
    ).save(tmp_path / "x.png")
    # Transparent, opaque, and a fifth black.
    np.testing.assert_allclose(
        read_image(tmp_path / "x.png")[0], [[1, 1, 1], [1, -1, -1], [0.6, 0.6, 0.6]], atol=1e-6
    )


def test_the_orientation_of_a_camera_is_applied(tmp_path):
    image = PIL.Image.fromarray(
        np.repeat(np.array([[[255] * 3, [0] * 3]], np.uint8), 16, axis=0).repeat(16, axis=1)
    )
    exif = image.getexif()
    exif[0x0112] = 6  # a quarter turn clockwise is needed
    image.save(tmp_path / "x.png", exif=exif)
    found = read_image(tmp_path / "x.png")
    assert found.shape == (32, 16, 3)
    assert (found[:16] == 1).all()
    assert (found[16:] == -1).all()


def test_an_image_of_too_many_pixels_and_what_is_no_file_are_refused(tmp_path):
    PIL.Image.new("1", (12000, 12000)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="has 12000x12000"):
        read_image(tmp_path / "x.png")
    with pytest.raises(ValueError, match="needs a file"):
        read_image(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "none.png")


def test_numbering_goes_on_after_the_highest(tmp_path):
    for name in ("flux_0.png", "flux_7.png", "flux_x.png", "other_9.png"):
        (tmp_path / name).touch()
    assert write_numbered(np.zeros((2, 2, 3), np.float32), tmp_path).name == "flux_8.png"
    assert write_numbered(np.zeros((2, 2, 3), np.float32), tmp_path).name == "flux_9.png"
