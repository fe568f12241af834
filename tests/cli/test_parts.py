"""Files that replace networks of the model: --flux, --vae, --t5, --clip."""

import pytest

from fluxjax.checkpoint.shipped import tiny_folder
from fluxjax.cli.main import build_parser
from fluxjax.cli.read_request import request_of_options
from fluxjax.cli.replay import replayed
from fluxjax.cli.request import configs_of
from fluxjax.generate.limits import read_configs

FOLDERS = {"flux": "transformer", "vae": "vae", "t5": "text_encoder_2", "clip": "text_encoder"}


def file_of(name):
    return next((tiny_folder() / FOLDERS[name]).glob("*.safetensors"))


def request_of(*words, command="generate"):
    options = build_parser().parse_args([command, *map(str, words)])
    return request_of_options(replayed(options))


def test_networks_are_read_from_their_own_files():
    words = []
    for name, folder in FOLDERS.items():
        words += [f"--{name}", tiny_folder() / folder]
    request = request_of("a", "--model", "dev", *words)
    for name, folder in FOLDERS.items():
        assert request.load.source_of(name, "dev") == str(tiny_folder() / folder)
        assert request.description[name] == str(tiny_folder() / folder)
    assert configs_of(request) == read_configs("tiny")
    one = request_of("a", "--model", "dev", "--t5", tiny_folder() / FOLDERS["t5"])
    assert one.load.source_of("vae", "dev") == "dev"
    assert configs_of(one).t5 == read_configs("tiny").t5
    assert configs_of(one).flux == read_configs("dev").flux


@pytest.mark.parametrize("name", FOLDERS)
def test_a_file_of_another_network_is_refused(name):
    other = {"flux": "vae", "vae": "clip", "t5": "flux", "clip": "t5"}[name]
    with pytest.raises(ValueError, match=f"--{name}: .* holds no .*, but a "):
        request_of("a", f"--{name}", file_of(other))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--vae", "none.safetensors"], "--vae none.safetensors: there is no such file"),
        (["--model", "chroma", "--clip", "x"], "--clip x: the model has no such network"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(words, reason):
    with pytest.raises((ValueError, FileNotFoundError), match=reason):
        request_of("a", *words)
