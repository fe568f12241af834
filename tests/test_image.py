import numpy as np
import PIL.Image
import pytest

from fluxjax import read_image, write_png
from fluxjax.image import write_numbered


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


def test_numbering_goes_on_after_the_highest(tmp_path):
    for name in ("flux_0.png", "flux_7.png", "flux_x.png", "other_9.png"):
        (tmp_path / name).touch()
    assert write_numbered(np.zeros((2, 2, 3), np.float32), tmp_path).name == "flux_8.png"
    assert write_numbered(np.zeros((2, 2, 3), np.float32), tmp_path).name == "flux_9.png"
