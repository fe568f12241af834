import re
from pathlib import Path

import pytest

from fluxjax import read_image

README = Path(__file__).parent.parent / "README.md"
PROGRAMS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize(("program", "image"), list(zip(PROGRAMS[:2], ["heart.png", "star.png"], strict=True)))
def test_the_readmes_programs_draw_their_images(program, image, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    assert read_image(image).shape == (128, 128, 3)


def test_the_weights_pages_program_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (program,) = re.findall(r"```python\n(.*?)```", (README.parent / "docs" / "weights.md").read_text(), re.DOTALL)
    exec(program, {})
    assert (tmp_path / "tiny-own" / "flux.safetensors").is_file()
