import math
import re
from pathlib import Path

import jax.numpy as jnp
import pytest

from fluxjax import read_image
from fluxjax.flow import sample, uniform_times

README = Path(__file__).parent.parent / "README.md"
PROGRAMS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize(
    ("program", "image"), list(zip(PROGRAMS[:2], ["heart.png", "star.png"], strict=True))
)
def test_the_readmes_programs_draw_their_images(program, image, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    assert read_image(image).shape == (128, 128, 3)


def test_the_weights_pages_programs_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for program in re.findall(
        r"```python\n(.*?)```", (README.parent / "docs" / "weights.md").read_text(), re.DOTALL
    ):
        exec(program, names)
    for written in ("tiny-own/flux.safetensors", "flux.safetensors", "my-model/fluxjax.json"):
        assert (tmp_path / written).is_file()


def test_the_sampling_pages_own_integrator_has_its_order():
    program = re.findall(
        r"```python\n(.*?)```", (README.parent / "docs" / "sampling.md").read_text(), re.DOTALL
    )[0]
    assert program.count("\n") < 20
    names: dict = {}
    exec(program, names)
    # dx/dt = -x over [1, 0] multiplies by e.
    ends = [
        float(sample(lambda x, t: -x, jnp.ones(()), uniform_times(n), step=names["Ralston"]()).x)
        for n in (8, 16)
    ]
    first, second = (abs(end - math.e) for end in ends)
    assert math.log2(first / second) == pytest.approx(2, abs=0.25)
