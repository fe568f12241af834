"""The page of `fluxjax ui`: what it draws from its fields."""

import sys

import numpy as np
import pytest

from fluxjax import read_image
from fluxjax.cli import ui
from fluxjax.cli.page_drawing import Fields, Studio, check_filled, picture_and_mask
from fluxjax.generate.image import read_metadata

FIELDS = Fields("tiny", "a red star", "", "", "euler", "model", 3, 3.5, 1.0, 48, 32, 5, 2)


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    return Studio(tmp_path_factory.mktemp("drawn"), None)


def test_the_page_draws_and_writes_what_its_fields_say(studio, run):
    drawn = list(studio.draw(FIELDS))
    *earlier, last = drawn
    assert earlier[0].status == "loading"
    assert [path.name for path in last.paths] == ["flux_0.png", "flux_1.png"]
    about = read_metadata(last.paths[1])
    assert (about["prompt"], about["seed"], about["image"]) == ("a red star", "5", "1")
    # The same images as those of the command line.
    size = ["--steps", "3", "--width", "48", "--height", "32", "--images", "2", "--seed", "5"]
    assert run("generate", "a red star", *size).code == 0
    for number, shown in enumerate(last.pictures):
        expected = np.round((read_image(f"flux_{number}.png") + 1) * 127.5)
        np.testing.assert_array_equal(shown, expected)


def test_a_masked_picture_is_drawn_again_where_it_is_painted(studio):
    picture = np.zeros((30, 44, 3), np.float32)
    mask = np.zeros((30, 44), np.float32)
    mask[:, 30:] = 1
    fields = FIELDS._replace(images=1, picture=picture, mask=mask, strength=1.0)
    *_, last = studio.draw(fields)
    (image,) = last.pictures
    assert image.shape == (30, 44, 3)
    np.testing.assert_allclose(image[:, :30], 127.5, atol=0.5)
    assert np.abs(image[:, 30:] - 127.5).max() > 5
    assert read_metadata(last.paths[0])["init_image"] == "from the page, masked"


def test_a_drawing_can_be_stopped(studio):
    drawing = studio.draw(FIELDS._replace(steps=400))
    next(drawing)  # loading
    next(drawing)  # its thread has started
    studio.stop()
    *_, last = drawing
    assert (last.status, last.paths) == ("stopped", [])
    assert not studio.lock.locked()


def test_mistakes_are_raised_and_leave_the_page_usable(studio):
    for change, reason in (
        ({"adapters": "nothing.safetensors"}, "nothing.safetensors"),
        ({"width": 40}, "multiples of 16"),
        ({"model": "dve"}, "Did you mean 'dev'"),
    ):
        with pytest.raises((ValueError, OSError), match=reason):
            list(studio.draw(FIELDS._replace(**change)))
        assert not studio.lock.locked()


def test_the_editor_gives_a_picture_and_a_mask():
    assert picture_and_mask(None) == (None, None)
    assert picture_and_mask({"background": np.zeros((2, 3, 4), np.uint8)}) == (None, None)
    background = np.full((2, 3, 4), 255, np.uint8)
    background[0, 0] = (255, 0, 0, 0)  # transparent: white
    background[0, 1] = (255, 0, 0, 255)
    layer = np.zeros((2, 3, 4), np.uint8)
    picture, mask = picture_and_mask({"background": background, "layers": [layer]})
    assert mask is None
    np.testing.assert_array_equal(picture[0, :2], [[1, 1, 1], [1, -1, -1]])
    layer[1, 2, 3] = 9
    _, mask = picture_and_mask({"background": background, "layers": [layer]})
    np.testing.assert_array_equal(mask, [[0, 0, 0], [0, 0, 1]])
    nothing = np.zeros((2, 3, 4), np.uint8)
    with pytest.raises(ValueError, match="has no picture below it"):
        picture_and_mask({"background": nothing, "layers": [layer]})


def test_fields_without_a_number_are_named():
    check_filled(FIELDS)
    with pytest.raises(ValueError, match="No number is given for steps, seed"):
        check_filled(FIELDS._replace(steps=None, seed=None))


def test_numbers_of_steps_that_cannot_be_read_are_said():
    assert ui._read_steps("2,8") == [2, 8]
    for text in ("", "2,x", "2,2", "0"):
        with pytest.raises(ValueError, match="Steps: "):
            ui._read_steps(text)


def test_a_missing_gradio_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match=r"pip install 'fluxjax\[ui\]'"):
        ui.import_gradio()


def test_the_page_can_be_built(studio, tiny):
    pytest.importorskip("gradio")
    page = ui._Page(studio, studio.folder, "tiny", tiny.defaults).build()
    labels = [block.label for block in page.blocks.values() if getattr(block, "label", None)]
    for label in ("Prompt", "Model", "Integrator", "Seed", "Gallery"):
        assert label in labels
