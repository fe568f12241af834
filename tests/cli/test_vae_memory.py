"""Commands that draw from pictures run the VAE in strips where it may need little memory."""

import jax
import numpy as np
import PIL.Image
import pytest

from fluxjax.devices import vae_strips

SIDE = 32
COMMANDS = {
    "generate": ["generate", "a red star", "--init-image", "in.png", "--strength", "0.5"],
    "edit": ["edit", "in.png", "a red star", "--source-prompt", "a blue ring"],
    "outpaint": ["outpaint", "in.png", "a red star", "--right", "16"],
    "fill": ["fill", "in.png", "a red star", "--mask", "mask.png"],
    "restore": ["restore", "in.png", "a red star", "--operator", "mask:mask.png"],
}


@pytest.fixture
def pictures(tmp_path):
    """A smooth picture and a mask, white on the right."""
    y, x = np.meshgrid(*2 * [np.arange(SIDE)], indexing="ij")
    waves = np.stack([np.sin(y / 9), np.cos(x / 7), 0.3 * np.sin((x + y) / 8)], -1)
    PIL.Image.fromarray(np.uint8(waves * 127 + 128)).save(tmp_path / "in.png")
    levels = np.where(x >= 16, 255, 0)
    PIL.Image.fromarray(np.uint8(levels)).save(tmp_path / "mask.png")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_image_in_strips_is_that_of_the_whole(run, tmp_path, pictures, monkeypatch, name):
    segments = []
    run_segment = vae_strips.run_segment

    def watched(segment, *others):
        segments.append(segment)
        return run_segment(segment, *others)

    monkeypatch.setattr(vae_strips, "run_segment", watched)
    jax.clear_caches()  # what another command has traced would not be traced again
    images = []
    for memory in ([], ["--vae-memory", "1"]):
        folder = tmp_path / f"out{len(images)}"
        folder.mkdir()
        done = run(*COMMANDS[name], "--steps", "2", "--output-dir", folder, *memory)
        assert done.code == 0, done.output
        assert bool(segments) == bool(memory)
        (path,) = folder.glob("*.png")
        with PIL.Image.open(path) as file:
            images.append(np.asarray(file).astype(int))
    assert np.abs(images[0] - images[1]).max() <= 1
