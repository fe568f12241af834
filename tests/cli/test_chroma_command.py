"""`fluxjax generate` with a model of Chroma."""

import pytest
from chroma import chroma_models
from PIL import Image

from fluxjax.generate import save_models


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    return save_models(chroma_models(tiny), tmp_path_factory.mktemp("chroma") / "m", to="diffusers")


def texts(path):
    with Image.open(path) as image:
        return dict(image.text)


def test_it_is_guided_by_default_and_by_a_negative_prompt(run, folder):
    words = ("generate", "a red star", "--model", folder, "--output-dir", "out")
    done = run(*words)
    assert done.code == 0, done.errors
    about = texts(done.output.strip().splitlines()[-1])
    assert (about["cfg"], about["guidance"], about["negative_prompt"]) == ("4", "none", "")
    done = run(*words, "--cfg", "3", "--negative-prompt", "a blue ring", "--show-memory")
    assert done.code == 0, done.errors
    about = texts(done.output.strip().splitlines()[-1])
    assert (about["cfg"], about["negative_prompt"]) == ("3", "a blue ring")
    assert "chroma" in done.progress
    assert "clip" not in done.progress
    done = run(*words, "--guidance", "3")
    assert done.code == 2
    assert "no guidance embedder" in done.errors[0]
