"""The programs and commands that the README and the documentation show."""

import math
import re
from pathlib import Path

import jax.numpy as jnp
import pytest

from fluxjax import read_image
from fluxjax.cli.main import build_parser
from fluxjax.flow import sample, uniform_times

README = Path(__file__).parent.parent / "README.md"
DOCS = README.parent / "docs"


def programs_of(page):
    """Return the Python programs of a page."""
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize(
    ("program", "image"),
    list(zip(programs_of(README)[:2], ["heart.png", "star.png"], strict=True)),
)
def test_the_readmes_programs_draw_their_images(program, image, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    assert read_image(image).shape == (128, 128, 3)


def test_the_weights_pages_programs_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for program in programs_of(DOCS / "weights.md"):
        exec(program, names)
    for written in ("tiny-own/flux.safetensors", "flux.safetensors", "my-model/fluxjax.json"):
        assert (tmp_path / written).is_file()


def test_the_sampling_pages_own_integrator_has_its_order():
    program = programs_of(DOCS / "sampling.md")[0]
    assert program.count("\n") < 20
    names: dict = {}
    exec(program, names)
    # dx/dt = -x over [1, 0] multiplies by e.
    errors = []
    for steps in (8, 16):
        end = sample(lambda x, t: -x, jnp.ones(()), uniform_times(steps), step=names["Ralston"]()).x
        errors.append(abs(float(end) - math.e))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.25)


def test_the_readme_lists_every_option_of_generate():
    text = README.read_text()
    section = text[text.index("## Options of `fluxjax generate`") :]
    listed = re.findall(r"--[a-z0-9-]+", section[: section.index(";")])
    options = vars(build_parser().parse_args(["generate", "a star"]))
    names = {f"--{name.replace('_', '-')}" for name in options.keys() - {"prompt", "function"}}
    assert sorted(listed) == sorted(names)
