"""Several processes draw together what one draws."""

import jax
import numpy as np
import pytest
from jobs import start_job

import fluxjax

PROMPT, HEIGHT, WIDTH = "a red star on white", 32, 48


@pytest.mark.parametrize(
    ("processes", "devices", "mesh", "images"),
    [(2, 2, "data=2,fsdp=2", 5), (4, 1, "tensor=2,context=2", 1)],
)
def test_on_a_mesh_of_all_their_devices(tmp_path, processes, devices, mesh, images):
    size = [
        "--height",
        HEIGHT,
        "--width",
        WIDTH,
        "--steps",
        1,
        "--images",
        images,
        "--lora",
        "tiny:kraft",
    ]
    options = [
        "--output-dir",
        tmp_path / "out",
        "--compilation-cache",
        tmp_path / "cache",
        "--mesh",
        mesh,
    ]
    job = start_job(["generate", PROMPT, *size, *options], processes, devices=devices)
    said = [process.communicate(timeout=300) for process in job]
    assert [process.returncode for process in job] == [0] * processes, said
    # The first writes, each image once.
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == [
        f"flux_{number}.png" for number in range(images)
    ]
    assert ["flux_0.png" in out for out, _ in said] == [True] + [False] * (processes - 1)
    models = fluxjax.load_models("tiny")
    models = models._replace(
        flux=fluxjax.merge(
            models.flux, [fluxjax.read_lora(fluxjax.checkpoint.shipped.shipped_lora("kraft"))]
        )
    )
    options = dict(key=jax.random.key(0), steps=1, height=HEIGHT, width=WIDTH, images=images)
    expected = fluxjax.text_to_image(models, PROMPT, **options)
    for number in range(images):
        # A level of 255 apart at most, where rounding falls the other way.
        np.testing.assert_allclose(
            fluxjax.read_image(tmp_path / "out" / f"flux_{number}.png"),
            expected[number],
            atol=1.01 / 127.5,
        )
