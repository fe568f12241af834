"""Image prompts on the command line: by Redux and by IP-Adapters, on files of random weights."""

import numpy as np
import PIL.Image
import pytest
from layouts import random_network

from fluxjax.cli import image_prompts
from fluxjax.generate import read_image, save, write_png
from fluxjax.nets import (
    ClipVision,
    ClipVisionConfig,
    IpAdapter,
    IpAdapterConfig,
    Redux,
    ReduxConfig,
    Siglip,
    SiglipConfig,
)

PROMPT = "a red star on white"
SMALL = ["--steps", "1", "--dtype", "float32", "--height", "32", "--width", "48"]


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory):
    """Files of networks that fit the tiny model, and two images, by name."""
    folder = tmp_path_factory.mktemp("image_prompts")
    config = tiny.flux.config
    sizes = dict(image_size=8, patch=4, width=8, heads=2, depth=1, mlp_width=6)
    adapter = IpAdapterConfig(
        features=5,
        tokens=3,
        context=7,
        width=config.width,
        head_dim=config.head_dim,
        double_depth=config.double_depth,
    )
    networks = {
        "siglip": (Siglip, SiglipConfig(**sizes)),
        "clip_vision": (ClipVision, ClipVisionConfig(**sizes, embedding=5)),
        "redux": (Redux, ReduxConfig(features=8, hidden=10, context=config.context)),
        "adapter": (IpAdapter, adapter),
    }
    paths = {}
    for name, (make, network_config) in networks.items():
        paths[name] = folder / f"{name}.safetensors"
        save(random_network(make, network_config, scale=1.0), paths[name])
    for number, name in enumerate(("one", "two")):
        values = np.random.default_rng(number).uniform(-1, 1, (20, 12, 3)).astype(np.float32)
        paths[name] = folder / f"{name}.png"
        write_png(values, paths[name])
    return paths


def text_of(path):
    with PIL.Image.open(path) as file:
        return file.text


def test_redux_draws_of_weighted_images_with_its_own_defaults(run, tmp_path, files, monkeypatch):
    drawn = []

    def record(tokens, **options):
        drawn.append((tokens.shape, options["weights"].tolist(), options["rule"]))
        return condition(tokens, **options)

    condition = image_prompts.redux_condition
    monkeypatch.setattr(image_prompts, "redux_condition", record)
    command = ["generate", PROMPT, "--redux", files["redux"], "--siglip", files["siglip"], *SMALL]
    images = ["--image-prompt", files["one"], "--image-prompt", f"{files['two']}=0.5"]
    assert run(*command, *images).code == 0
    assert run(*command, *images, "--redux-rule", "sum", "--guidance", "3").code == 0
    assert drawn == [((2, 4, 128), [1.0, 0.5], "append"), ((2, 4, 128), [1.0, 0.5], "sum")]
    about = text_of(tmp_path / "flux_0.png")
    assert (about["guidance"], about["steps"]) == ("2.5", "1")
    first, second = about["image_prompts"].split("; ")
    assert first.startswith("one.png, sha256 ")
    assert first.endswith(", weight 1")
    assert second.endswith(", weight 0.5")
    assert about["redux"].endswith(", append")
    assert about["siglip"].startswith("siglip.safetensors, sha256 ")
    assert text_of(tmp_path / "flux_1.png")["guidance"] == "3"
    one, two = (read_image(tmp_path / f"flux_{number}.png") for number in (0, 1))
    assert np.abs(one - two).max() > 0.01


def test_the_redux_that_ships_brings_its_adapter_and_another_one_does_not(run, tmp_path, files):
    image = ["--image-prompt", files["one"], *SMALL]
    assert run("generate", PROMPT, "--redux", "tiny", *image).code == 0
    other = ["--redux", files["redux"], "--siglip", files["siglip"]]
    assert run("generate", PROMPT, *other, *image).code == 0
    first, second = (text_of(tmp_path / f"flux_{number}.png") for number in (0, 1))
    assert first["lora"] == "redux:1"
    assert "lora" not in second


def test_an_ip_adapter_draws_of_images_with_a_negative_prompt(run, tmp_path, files):
    networks = ["--ip-adapter", files["adapter"], "--clip-vision", files["clip_vision"]]
    command = ["generate", PROMPT, *networks, "--image-prompt", f"{files['one']}=0.5", *SMALL]
    assert run(*command, "--cfg", "4").code == 0
    assert run(*command, "--cfg", "4", "--ip-scale", "0").code == 0
    assert run("generate", PROMPT, *SMALL, "--cfg", "4").code == 0
    about = text_of(tmp_path / "flux_0.png")
    assert about["ip_adapter"].endswith(", scale 1")
    assert about["clip_vision"].startswith("clip_vision.safetensors, sha256 ")
    assert about["guidance"] == "3.5"
    drawn, without, plain = (read_image(tmp_path / f"flux_{number}.png") for number in range(3))
    np.testing.assert_array_equal(without, plain)
    assert np.abs(drawn - plain).max() > 0.01


def test_options_that_do_not_go_together_are_one_line(run, tmp_path, files):
    draw, image = ["generate", PROMPT, *SMALL], ["--image-prompt", files["one"]]
    redux, adapter = ["--redux", files["redux"]], ["--ip-adapter", files["adapter"]]
    clip, siglip = ["--clip-vision", files["clip_vision"]], ["--siglip", files["siglip"]]
    cases = [
        (image, "--image-prompt needs --redux or --ip-adapter"),
        (redux, "--redux does nothing without --image-prompt"),
        ([*image, *redux, *adapter], "Give one of them"),
        (siglip, "--siglip does nothing without --redux or --ip-adapter"),
        ([*image, *redux, *clip], "--clip-vision does nothing without --ip-adapter"),
        ([*image, *adapter], "got 0 of them"),
        ([*image, *adapter, *clip, *siglip], "got 2 of them"),
        ([*image, *adapter, *clip, "--redux-rule", "sum"], "does nothing without --redux"),
        ([*redux, "--image-prompt", tmp_path / "none.png"], "No such file"),
        ([*redux, "--image-prompt", f"{files['one']}=nan"], "a finite weight"),
        ([*redux, "--image-prompt", "=2"], "an image, as FILE=WEIGHT"),
        ([*image, *redux], "holds no SigLIP vision encoder"),
        ([*image, *adapter, *siglip], "takes 5 features, got 8"),
    ]
    for arguments, reason in cases:
        finished = run(*draw, *arguments, "--output-dir", tmp_path / "new")
        assert finished.code == 2, arguments
        assert reason in finished.errors[-1]
