"""Regional prompts on the command line, with the tiny model."""

import numpy as np
import PIL.Image
import pytest
from test_jobs import write_lines

from fluxjax.generate import read_image, write_png

PROMPT = "a red star on white"
SMALL = ["--steps", "1", "--dtype", "float32", "--height", "32", "--width", "48"]
REGIONS = ["--region", "0,0,0.5,1=a red star", "--region", "background=a blue ring"]


@pytest.fixture
def mask(tmp_path):
    values = np.full((4, 6, 3), -1, np.float32)
    values[:, 3:] = 1
    write_png(values, tmp_path / "mask.png")
    return tmp_path / "mask.png"


def text_of(path):
    with PIL.Image.open(path) as file:
        return file.text


def test_regions_serve_a_prompt_the_lines_of_a_file_and_a_mesh(run, tmp_path, mask):
    regions = [*REGIONS[:2], "--region", f"{mask.name}=a = b", "--region-until", "1"]
    assert run("generate", PROMPT, *SMALL, *regions, "--seed", "3").code == 0
    lines = write_lines(tmp_path, {"prompt": PROMPT, "seed": 3}, {"prompt": "a ring", "seed": 4})
    assert run("generate", "--prompts", lines, *SMALL, *regions).code == 0
    mesh = ["--mesh", "data=8", "--images", "8"]
    assert run("generate", PROMPT, *SMALL, *regions, *mesh, "--seed", "3").code == 0
    images = [read_image(tmp_path / name) for name in ("flux_0.png", "0.png", "flux_1.png")]
    # A level of 255 apart at most, where rounding falls the other way.
    np.testing.assert_allclose(images[1], images[0], atol=1.01 / 127.5)
    np.testing.assert_allclose(images[2], images[0], atol=1.01 / 127.5)
    about = text_of(tmp_path / "flux_0.png")
    box, masked = about["regions"].split("; ")
    assert box == "0,0,0.5,1=a red star"
    assert masked.startswith("mask.png, sha256 ")
    assert masked.endswith("=a = b")
    assert about["region_rule"] == "attention, base 0.3, until 1"


def test_prompts_of_regions_may_be_mixed(run, tmp_path):
    long = f"background=a {'blue ' * 40}ring"
    regions = [*REGIONS[:2], "--region", long, "--region-rule", "mix"]
    finished = run("generate", PROMPT, *SMALL, *regions)
    assert finished.code == 0
    assert "T5 reads 24 of" in finished.errors[0]
    assert text_of(tmp_path / "flux_0.png")["region_rule"] == "mix, base 0"


def test_options_that_do_not_go_together_are_one_line(run, tmp_path, mask):
    draw = ["generate", PROMPT, *SMALL]
    cases = [
        (["--region-base", "0.3"], "--region-base does nothing without --region"),
        ([*REGIONS, "--nag", "2"], "Use --cfg with it"),
        ([*REGIONS, "--region-rule", "mix", "--cache", "first:0.1"], "Leave --cache out"),
        ([*REGIONS, "--region-rule", "mix", "--region-until", "1"], "is for --region-rule"),
        ([*REGIONS, "--mesh", "context=8"], "Use context=1 with it"),
        ([*REGIONS, "--region-base", "2"], "a number from 0 to 1"),
        ([*REGIONS], "that is none of 1. Choose 1 or more"),
        ([*REGIONS, "--region", "background=x"], "one background at most, got 2"),
        (["--region", "0,0,1=x"], "the four edges of a box"),
        (["--region", "0,0,2,1=x"], "as shares of the image in [0, 1], got 0, 0, 2, 1"),
        (["--region", "0,0,0.1,0.1=x"], "Region 1 of 1 covers half of no token"),
        (["--region", "0,0,1,1="], "a box or a mask and its prompt"),
        (["--region", "none.png=x"], "No such file"),
    ]
    for arguments, reason in cases:
        finished = run(*draw, *arguments, "--output-dir", tmp_path / "new")
        assert finished.code == 2, arguments
        assert reason in finished.errors[-1]
