"""Images that `generate` draws: stale ones, ones that are not finite, files with wrong lines."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from fluxjax.cli import loaded_networks, prompt_file_drawing
from fluxjax.generate.comparison_files import write_comparison

FIXED = ["--steps", "1", "--height", "32", "--width", "32"]


def write_lines(tmp_path, *lines):
    path = tmp_path / "prompts.jsonl"
    encoded = []
    for line in lines:
        encoded.append(line if isinstance(line, bytes) else json.dumps(line).encode())
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(encoded))  # a byte-order mark first
    return path


def test_wrong_lines_and_changed_ones_are_reported_and_the_others_drawn(run, tmp_path):
    good = {"prompt": "a red star", "id": "s" * 251, "seed": 2**40}
    bad = [
        {"prompt": "\ud800"},
        b"[" * 200_000,
        b'{"prompt": "a", "seed": 1e999}',
        b"\xff",
        {"prompt": "a", "id": "s" * 252},
        b'{"prompt": "a", "prompt": "b"}',
    ]
    reasons = ["surrogate", "nested", "seed", "UTF-8", "252 characters", "twice"]
    path = write_lines(tmp_path, good, *bad)
    finished = run("generate", "--prompts", path, "--batch", "64", *FIXED)
    assert finished.code == 2
    assert "1 images written" in finished.output
    for line, reason in zip(finished.errors, reasons, strict=True):
        assert reason in line
    image = tmp_path / f"{'s' * 251}.png"
    before = image.read_bytes()
    path = write_lines(tmp_path, good)
    assert run("generate", "--prompts", path, *FIXED).code == 0  # its image exists
    path = write_lines(tmp_path, good | {"prompt": "a blue ring"})
    finished = run("generate", "--prompts", path, *FIXED)
    assert finished.code == 2
    (error,) = finished.errors
    assert "line 1: its image exists with prompt 'a red star' instead of 'a blue ring'" in error
    assert "0 images written" in finished.output
    assert image.read_bytes() == before
    finished = run("generate", "--prompts", path, *FIXED, "--overwrite")
    assert (finished.code, finished.errors) == (0, [])
    with PIL.Image.open(image) as file:
        assert file.text["prompt"] == "a blue ring"


def test_only_the_images_that_were_written_are_counted(run, tmp_path, monkeypatch):
    path = write_lines(tmp_path, {"prompt": "a"}, {"prompt": "b"})
    write = prompt_file_drawing.write_png

    def rival(image, path, *rest, **options):
        write(image, path, *rest, **options)  # another job was faster
        return write(image, path, *rest, **options)

    monkeypatch.setattr(prompt_file_drawing, "write_png", rival)
    assert "0 images written" in run("generate", "--prompts", path, *FIXED).output


@pytest.mark.parametrize(
    ("network", "stage"),
    [("t5", "the text encoders"), ("flux", "denoising (step 1 of 1)"), ("vae", "decoding")],
)
def test_what_is_not_finite_is_not_written(run, tmp_path, monkeypatch, network, stage):
    load = loaded_networks.load_network

    def load_nan(name, *arguments, **options):
        loaded = load(name, *arguments, **options)
        if name != network:
            return loaded
        return jax.tree.map(lambda x: x * jnp.asarray(jnp.nan, x.dtype), loaded)

    monkeypatch.setattr(loaded_networks, "load_network", load_nan)
    finished = run("generate", "a star", *FIXED)
    assert finished.code == 2
    (error,) = finished.errors
    assert error.startswith(f"fluxjax: Image 0 is not finite after {stage}, and is not written.")
    assert not list(tmp_path.iterdir())


def test_a_cache_says_how_many_evaluations_it_skipped(run):
    fixed = [*FIXED[2:], "--steps", "5"]
    finished = run("generate", "a star", *fixed, "--cache", "1e30")
    assert "cache: 4 of 5 evaluations skipped" in finished.output


def test_seeds_of_64_bits_draw_different_images(run, tmp_path):
    lines = [{"prompt": "a star", "seed": seed} for seed in (0, 2**32, 2**63 - 1)]
    path = write_lines(tmp_path, *lines)
    assert run("generate", "--prompts", path, *FIXED).code == 0
    assert run("generate", "a star", *FIXED, "--seed", 2**63 - 1, "--batch", 64).code == 0
    images = []
    for name in ("0.png", "1.png", "2.png", "flux_0.png"):
        with PIL.Image.open(tmp_path / name) as file:
            images.append(np.asarray(file, int))
    assert abs(images[0] - images[1]).max() > 10
    assert abs(images[0] - images[2]).max() > 10
    assert abs(images[1] - images[2]).max() > 10
    np.testing.assert_array_equal(images[2], images[3])


def test_a_table_without_a_picture_keeps_its_number(tmp_path):
    (tmp_path / "compare_0.csv").touch()
    found = write_comparison(tmp_path, np.zeros((2, 2, 3), np.float32), "a\n", {})
    assert [path.name for path in found] == ["compare_1.png", "compare_1.csv"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "compare_0.csv",
        "compare_1.csv",
        "compare_1.png",
    ]
