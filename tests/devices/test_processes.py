"""Several processes draw together what one draws."""

import jax
import numpy as np
import pytest
from jobs import start_job

import fluxjax
from fluxjax.checkpoint.shipped import shipped_lora

PROMPT, HEIGHT, WIDTH, IMAGES = "a red star on white", 32, 48, 5


@pytest.fixture(scope="module")
def expected():
    models = fluxjax.load_models("tiny")
    flux = fluxjax.merge(models.flux, [fluxjax.read_lora(shipped_lora("kraft"))])
    settings = fluxjax.DrawSettings(steps=1, height=HEIGHT, width=WIDTH, images=IMAGES)
    models = models._replace(flux=flux)
    return fluxjax.text_to_image(models, PROMPT, key=jax.random.key(0), settings=settings)


@pytest.mark.parametrize(
    ("processes", "devices", "mesh", "images"),
    [(2, 2, "data=2,fsdp=2", IMAGES), (4, 1, "tensor=2,context=2", 1)],
)
def test_on_a_mesh_of_all_their_devices(
    tmp_path, monkeypatch, expected, processes, devices, mesh, images
):
    # They compile what runs for a moment: a third less so.
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    size = ["--height", HEIGHT, "--width", WIDTH, "--steps", 1, "--images", images]
    output = ["--output-dir", tmp_path / "out", "--compilation-cache", tmp_path / "cache"]
    preview = ["--preview", tmp_path / "now.png"]
    arguments = [*size, *output, *preview, "--lora", "tiny:kraft", "--mesh", mesh]
    job = start_job(["generate", PROMPT, *arguments], processes, devices=devices)
    outputs = [process.communicate(timeout=300) for process in job]
    assert [process.returncode for process in job] == [0] * processes, outputs
    # The first process writes, each image once.
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [f"flux_{number}.png" for number in range(images)]
    reports = ["flux_0.png" in stdout for stdout, _ in outputs]
    assert reports == [True] + [False] * (processes - 1)
    for number, name in enumerate(names):
        # A level of 255 apart at most, where rounding falls the other way.
        found = fluxjax.read_image(tmp_path / "out" / name)
        np.testing.assert_allclose(found, expected[number], atol=1.01 / 127.5)
    # After the only step the preview shows all images, in a grid.
    shown = fluxjax.read_image(tmp_path / "now.png")
    np.testing.assert_allclose(shown[:HEIGHT, :WIDTH], expected[0], atol=1.01 / 127.5)
