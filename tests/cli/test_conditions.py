"""Options that name what images are conditioned on beside a prompt."""

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from channels import with_appended
from test_jobs import write_lines

import fluxjax
from fluxjax.generate import control_condition, resize_image, save_models, write_png
from fluxjax.generate.autoencode import encode
from fluxjax.generate.latents import pack_latents

PROMPT = "a red star on white"
SMALL = ["--steps", "1", "--height", "32", "--width", "48", "--dtype", "float32"]


@pytest.fixture(scope="module")
def canny(tiny, tmp_path_factory):
    """A folder with a model that takes a control image."""
    folder = tmp_path_factory.mktemp("models") / "canny"
    save_models(tiny._replace(flux=with_appended(tiny.flux, 64)), folder)
    return folder


@pytest.fixture(scope="module")
def edges(canny):
    """A control image of another size than the images that are drawn."""
    values = np.random.default_rng(0).uniform(-1, 1, (40, 60, 3)).astype(np.float32)
    write_png(values, canny.parent / "edges.png")
    return canny.parent / "edges.png"


@pytest.fixture(scope="module")
def expected(canny, edges):
    """Return what is drawn by the functions of the package."""
    models = fluxjax.load_models(canny)
    image = resize_image(fluxjax.read_image(edges), 32, 48)
    condition = control_condition(models.vae, image, dtype=jnp.float32)
    latent = encode(models.vae, image[None], dtype=jnp.float32)[0]
    np.testing.assert_array_equal(condition.features, pack_latents(latent))
    settings = fluxjax.DrawSettings(steps=1, height=32, width=48, conditions=(condition,))
    key = jax.random.key(3)
    return fluxjax.text_to_image(models, PROMPT, key=key, settings=settings)[0]


def test_a_control_image_serves_a_prompt_and_all_lines_of_a_file(
    run, tmp_path, canny, edges, expected
):
    model = ["--model", canny, "--control", edges]
    assert run("generate", PROMPT, *model, *SMALL, "--seed", 3).code == 0
    lines = write_lines(tmp_path, {"prompt": "a blue ring"}, {"prompt": PROMPT, "seed": 3})
    assert run("generate", "--prompts", lines, *model, *SMALL, "--batch", 2).code == 0
    # A level of 255 apart at most, where rounding falls the other way.
    for name in ("flux_0.png", "1.png"):
        found = fluxjax.read_image(tmp_path / name)
        np.testing.assert_allclose(found, expected, atol=1.01 / 127.5)
        with PIL.Image.open(tmp_path / name) as file:
            assert file.text["control"].startswith("edges.png, sha256 ")
    # Another control image of the same name makes the images stale.
    write_png(np.zeros((40, 60, 3), np.float32), tmp_path / "edges.png")
    other = ["--model", canny, "--control", tmp_path / "edges.png"]
    finished = run("generate", "--prompts", lines, *other, *SMALL)
    assert finished.code == 2
    assert "its image exists with control 'edges.png" in finished.errors[-1]


def test_a_mesh_draws_the_same_image(run, tmp_path, canny, edges, expected):
    model = ["--model", canny, "--control", edges]
    mesh = ["--mesh", "data=2,tensor=2,context=2", "--images", 2]
    assert run("generate", PROMPT, *model, *SMALL, *mesh, "--seed", 3).code == 0
    found = fluxjax.read_image(tmp_path / "flux_0.png")
    np.testing.assert_allclose(found, expected, atol=1.01 / 127.5)


def test_a_control_image_of_other_proportions_is_noted(run, tmp_path, canny, edges):
    sizes = ["--steps", "1", "--height", "32", "--width", "32", "--dtype", "float32"]
    finished = run("generate", PROMPT, "--model", canny, "--control", edges, *sizes)
    assert finished.code == 0
    assert "edges.png is 60x40 and stretched to 32x32" in finished.errors[0]


def test_what_a_model_does_not_take_or_lacks_is_one_line(run, tmp_path, canny, edges):
    cases = [
        (["--control", edges], "this model takes none"),
        (["--model", canny], "got none of the 64 features"),
        (["--model", canny, "--control", tmp_path / "none.png"], "No such file"),
        (["--model", "black-forest-labs/FLUX.1-Fill-dev", "--control", edges], "64 of the 320"),
        (["--model", "canny"], "draw with --control"),
    ]
    for arguments, reason in cases:
        finished = run("generate", PROMPT, *arguments, "--output-dir", tmp_path / "new")
        assert finished.code == 2
        (error,) = finished.errors
        assert reason in error
        assert not (tmp_path / "new").exists()
