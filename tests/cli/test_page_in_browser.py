"""The page of `fluxjax ui` in a browser without a window: fields, files, a mask by the mouse."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from fluxjax import read_image
from fluxjax.generate.image import read_metadata, write_png

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'fluxjax[ui]'")
pytest.importorskip("playwright", reason="a browser is driven by playwright")

HEIGHT, WIDTH = 96, 128
SECONDS = 240
"""For everything that is compiled, on a machine that does other things too."""


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import Error, sync_playwright

    with sync_playwright() as playwright:
        try:
            chromium = playwright.chromium.launch(
                executable_path=os.environ.get("CHROMIUM") or shutil.which("chromium"),
                args=["--no-sandbox", "--disable-gpu"],
            )
        except Error as error:
            pytest.skip(f"Chromium does not start: {str(error).splitlines()[0]}")
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def page(browser, tmp_path_factory, programs):
    """The page, opened, with the folder that it writes to.

    It is served by a process of its own: functions that the tests' hook checks are no generators,
    by which gradio shows previews.
    """
    folder = tmp_path_factory.mktemp("drawn")
    command = [sys.executable, "-u", "-m", "fluxjax", "ui", "--port", "0"]
    command += ["--output-dir", str(folder), "--compilation-cache", str(programs)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            page = browser.new_page(viewport={"width": 1280, "height": 1000})
            page.set_default_timeout(SECONDS * 1000)
            page.goto(server.stdout.readline().split()[0])
            page.get_by_label("Prompt").first.wait_for()
            page.folder = folder
            yield page
            page.close()
        finally:
            server.terminate()


def draw(page, name, **values):
    """Fill in fields, draw, and return what is downloaded, in bytes of [0, 255]."""
    for label, value in values.items():
        page.get_by_label(label, exact=True).first.fill(str(value))
    page.get_by_role("button", name="Draw", exact=True).click()
    page.wait_for_function(
        "name => [...document.querySelectorAll('textarea, input')]"
        ".some(field => field.value === 'written: ' + name)",
        arg=name,
    )
    with page.expect_download() as download:
        page.locator(f"a[download='{name}']").first.click()
    path = page.folder / f"downloaded_{name}"
    download.value.save_as(path)
    assert path.read_bytes() == (page.folder / name).read_bytes()
    return to_bytes(path), read_metadata(path)


def to_bytes(path):
    return np.round((read_image(path) + 1) * 127.5)


def test_what_is_written_is_shown_and_downloaded(page):
    image, about = draw(
        page, "flux_0.png", Prompt="a red star", Steps=2, Width=WIDTH, Height=HEIGHT, Seed=3
    )
    assert image.shape == (HEIGHT, WIDTH, 3)
    assert (about["prompt"], about["steps"], about["seed"]) == ("a red star", "2", "3")
    page.locator("img[src*='flux_0.png']").first.wait_for()


def test_only_what_the_mouse_paints_is_drawn_again(page):
    generator = np.random.default_rng(0)
    picture = generator.integers(0, 256, (HEIGHT, WIDTH, 3))
    path = page.folder / "picture.png"
    write_png(picture.astype(np.float32) / 127.5 - 1, path, {})
    page.get_by_text("Draw a picture again").click()
    canvas = page.locator("canvas").first
    canvas.wait_for()
    page.set_input_files("input[type=file]", path)
    page.get_by_role("button", name="Brush", exact=True).wait_for()
    page.wait_for_timeout(2000)  # until the picture is laid out; nothing on the page says so
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 8, y, steps=4)
    page.mouse.up()
    page.wait_for_timeout(2000)  # until the paint is uploaded
    page.get_by_label("number input for Strength").fill("1")
    image, about = draw(page, "flux_1.png", Prompt="a blue circle")
    assert about["init_image"] == "from the page, masked"
    changed = (image != picture).any(-1)
    rows, columns = changed.any(1).nonzero()[0], changed.any(0).nonzero()[0]
    # The brush is round, at the middle, and not wider than half of the picture.
    assert changed[HEIGHT // 2, WIDTH // 2]
    assert HEIGHT / 8 <= rows[0] <= HEIGHT / 2 <= rows[-1] <= HEIGHT * 7 / 8
    assert WIDTH / 4 <= columns[0] <= WIDTH / 2 <= columns[-1] <= WIDTH * 3 / 4
    painted = changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert painted.mean() > 0.7


def test_a_missing_number_is_one_line_on_the_page(page):
    page.get_by_label("Steps", exact=True).first.fill("")
    page.get_by_role("button", name="Draw", exact=True).click()
    page.get_by_text("No number is given for steps. Fill it in.").wait_for()
    page.locator(".toast-close").first.click()


def test_the_gallery_says_how_an_image_was_drawn(page):
    page.get_by_role("tab", name="Gallery").click()
    page.locator("img[src*='flux_0.png']:visible").first.click()
    page.locator("text=a red star").filter(visible=True).first.wait_for()
