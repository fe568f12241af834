"""Options that name what images are conditioned on beside a prompt, and the commands of models
that are conditioned on a picture."""

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from channels import with_appended
from layouts import random_network
from small import draw
from test_jobs import write_lines

import fluxjax
from fluxjax.cli import conditions
from fluxjax.generate import canny_edges, resize_image, save, save_models, write_png
from fluxjax.lora import init_lora, write_lora
from fluxjax.nets import ControlNet, ControlNetConfig

PROMPT = "a red star on white"
STEP = ["--steps", "1", "--dtype", "float32"]
SMALL = [*STEP, "--height", "32", "--width", "48"]


@pytest.fixture(scope="module")
def canny(tiny, tmp_path_factory):
    """A folder with a model that takes a control image."""
    folder = tmp_path_factory.mktemp("models") / "canny"
    save_models(tiny._replace(flux=with_appended(tiny.flux, 64)), folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tiny, canny):
    """A file with an adapter that makes a model of the tiny one which takes an image and a mask."""
    lora = init_lora(tiny.flux, 4, "img_in", extra_features=320, key=jax.random.key(0))
    leaves, structure = jax.tree.flatten(lora)
    ups = [leaf if jnp.any(leaf) else 0.05 * draw(*leaf.shape) for leaf in leaves]
    write_lora(canny.parent / "fill.safetensors", jax.tree.unflatten(structure, ups))
    return canny.parent / "fill.safetensors"


@pytest.fixture(scope="module")
def edges(canny):
    """A control image of another size than the images that are drawn."""
    values = np.random.default_rng(0).uniform(-1, 1, (40, 60, 3)).astype(np.float32)
    write_png(values, canny.parent / "edges.png")
    return canny.parent / "edges.png"


@pytest.fixture
def controls(monkeypatch):
    """The control images that are encoded, in a list."""
    seen = []
    encode = conditions.control_condition

    def record(vae, image, **options):
        seen.append(np.asarray(image))
        return encode(vae, image, **options)

    monkeypatch.setattr(conditions, "control_condition", record)
    return seen


def text_of(path):
    with PIL.Image.open(path) as file:
        return file.text


def test_a_control_image_serves_a_prompt_all_lines_of_a_file_and_a_mesh(
    run, tmp_path, canny, edges, controls
):
    model = ["--model", canny, "--control", edges]
    assert run("generate", PROMPT, *model, *SMALL, "--seed", 3).code == 0
    lines = write_lines(tmp_path, {"prompt": PROMPT, "seed": 3}, {"prompt": "a ring", "seed": 4})
    assert run("generate", "--prompts", lines, *model, *SMALL).code == 0
    mesh = ["--mesh", "data=8", "--images", 8]
    assert run("generate", PROMPT, *model, *SMALL, *mesh, "--seed", 3).code == 0
    assert len(controls) == 3  # once for all images of a size
    expected = resize_image(jnp.asarray(fluxjax.read_image(edges)), 32, 48)
    for control in controls:
        np.testing.assert_array_equal(control, expected)
    images = [fluxjax.read_image(tmp_path / name) for name in ("flux_0.png", "0.png", "flux_1.png")]
    # A level of 255 apart at most, where rounding falls the other way.
    np.testing.assert_allclose(images[1], images[0], atol=1.01 / 127.5)
    np.testing.assert_allclose(images[2], images[0], atol=1.01 / 127.5)
    for name in ("flux_0.png", "1.png"):
        assert text_of(tmp_path / name)["control"].startswith("edges.png, sha256 ")
    # Another control image of the same name makes the images stale.
    write_png(np.zeros((40, 60, 3), np.float32), tmp_path / "edges.png")
    other = ["--model", canny, "--control", tmp_path / "edges.png"]
    finished = run("generate", "--prompts", lines, *other, *SMALL)
    assert finished.code == 2
    assert "its image exists with control 'edges.png" in finished.errors[-1]


def test_edges_are_found_in_the_image_at_its_drawn_size(run, tmp_path, canny, edges, controls):
    pytest.importorskip("cv2")
    command = ["generate", PROMPT, "--model", canny, "--control", edges, "--canny", *SMALL]
    assert run(*command).code == 0
    resized = resize_image(jnp.asarray(fluxjax.read_image(edges)), 32, 48)
    np.testing.assert_array_equal(controls[0], canny_edges(resized))
    assert text_of(tmp_path / "flux_0.png")["control"].endswith(", canny edges")


def test_an_image_that_is_stretched_is_noted(capsys):
    image = jnp.zeros((40, 60, 3))
    conditions.note_stretched("edges.png", image, 32, 48)
    assert capsys.readouterr().err == ""
    conditions.note_stretched("edges.png", image, 32, 32)
    assert "fluxjax: edges.png is 60x40 and stretched to 32x32" in capsys.readouterr().err


def test_fill_draws_the_masked_part_with_an_adapter(run, tmp_path, adapter, edges):
    # Drawn at the size of the other tests, whose programs are there.
    image = fluxjax.read_image(edges)[:30, :46]
    write_png(image, tmp_path / "photo.png")
    mask = np.full((30, 46, 3), -1, np.float32)
    mask[:, 30:] = 1
    write_png(mask, tmp_path / "mask.png")
    command = ["fill", tmp_path / "photo.png", PROMPT, "--lora", adapter, *STEP]
    finished = run(*command, "--mask", tmp_path / "mask.png", "--binary-mask")
    assert finished.code == 0
    drawn = fluxjax.read_image(tmp_path / "fill_0.png")
    np.testing.assert_array_equal(drawn[:, :30], image[:, :30])
    assert np.abs(drawn - image)[:, 30:].max() > 0.1
    about = text_of(tmp_path / "fill_0.png")
    assert about["mask"].startswith("mask.png, sha256 ")
    assert about["mask"].endswith(", binary")
    assert (about["size"], about["guidance"]) == ("46x30", "3.5")
    assert run(*command, "--outpaint", "left=1,top=2").code == 0
    drawn = fluxjax.read_image(tmp_path / "fill_1.png")
    np.testing.assert_array_equal(drawn[2:, 1:], image)
    assert text_of(tmp_path / "fill_1.png")["margins"] == "left 1, top 2"


def test_kontext_edits_by_an_instruction(run, tmp_path, edges):
    command = ["edit", edges, "make it blue", "--method", "kontext", "--keep-size", *STEP]
    sizes = ["--reference", edges, "--placement", "index", "--height", "32", "--width", "48"]
    assert run(*command, *sizes).code == 0
    about = text_of(tmp_path / "edit_0.png")
    assert (about["method"], about["placement"], about["size"]) == ("kontext", "index", "48x32")
    assert about["references"].startswith("edges.png, sha256 ")
    assert about["reference_size"] == "kept"


def test_what_a_model_does_not_take_or_lacks_is_one_line(run, tmp_path, canny, adapter, edges):
    draw, fill = ["generate", PROMPT], ["fill", edges, PROMPT, "--outpaint", "left=8"]
    kontext = ["edit", edges, PROMPT, "--method", "kontext"]
    cases = [
        ([*draw, "--model", "dev", "--control", edges], "this model takes none"),
        ([*draw, "--model", canny], "got none of the 64 features"),
        ([*draw, "--lora", adapter], "got none of the 320 features"),
        ([*draw, "--lora", adapter, "--control", edges], "got 64 of the 320 features"),
        (
            [*draw, "--model", canny, "--lora", adapter, "--control", edges],
            "an adapter of 384 can't widen",
        ),
        ([*draw, "--model", canny, "--control", tmp_path / "none.png"], "No such file"),
        ([*draw, "--model", "black-forest-labs/FLUX.1-Fill-dev", "--control", edges], "the 320"),
        ([*draw, "--model", "canny"], "draw with --control"),
        ([*draw, "--model", canny, "--canny"], "--canny does nothing without --control"),
        ([*draw, "--model", canny, "--control", edges, "--height", "20"], "multiples of 16"),
        ([*fill, "--model", "dev"], "this model takes none"),
        ([*fill, "--model", canny], "got 320 of the 64 features"),
        ([*fill, "--binary-mask"], "--binary-mask does nothing with --outpaint"),
        ([*fill[:-1], "left=8,left=9"], "as left=64,top=128"),
        ([*fill[:-1], "middle=8"], "as left=64,top=128"),
        ([*kontext, "--source-prompt", "a"], "--source-prompt does nothing with --method kontext"),
        ([*kontext, "--strength", "0.5"], "--strength does nothing with --method kontext"),
        (["edit", edges, PROMPT, "--model", "kontext", "--ratio", "2"], "with --method kontext"),
        (["edit", edges, PROMPT, "--keep-size"], "--keep-size does nothing with --method flowedit"),
        ([*kontext, "--width", "40"], "multiples of 16"),
        ([*kontext, "--lora", adapter], "got none of the 320 features"),
    ]
    for arguments, reason in cases:
        finished = run(*arguments, "--output-dir", tmp_path / "new")
        assert finished.code == 2, arguments
        (error,) = finished.errors
        assert reason in error
        assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def controlnets(tiny, canny):
    """Folders of two ControlNets for the tiny model: with modes, and one that takes an image."""
    sizes = {**vars(tiny.flux.config), "double_depth": 1, "single_depth": 0}
    del sizes["out_channels"]
    configs = {
        "union": ControlNetConfig(**sizes, modes=7),
        "xlabs": ControlNetConfig(**sizes, modes=None, hint_image=True),
    }
    for name, config in configs.items():
        save(random_network(ControlNet, config, scale=0.2), canny.parent / name)
    return [canny.parent / name for name in configs]


def test_controlnets_change_the_image_in_their_share_of_the_steps(
    run, tmp_path, controlnets, edges
):
    union, xlabs = ["--controlnet", controlnets[0]], ["--controlnet", controlnets[1]]
    image = ["--controlnet-image", edges]
    both = [*union, *image, *xlabs, *image]
    modes = ["--controlnet-mode", "depth"]
    base = ["generate", PROMPT, *SMALL, "--steps", "2", "--seed", "3"]
    commands = [
        [*base, *union, *image, *modes, "--controlnet-end", "0.4"],  # less than one step
        [*base, *union, *image, *modes, "--controlnet-scale", "0.6"],
        base,
    ]
    for command in commands:
        assert run(*command).code == 0
    off, on, plain = (fluxjax.read_image(tmp_path / f"flux_{number}.png") for number in range(3))
    np.testing.assert_array_equal(off, plain)
    assert np.abs(on - plain).max() > 0.1
    about = text_of(tmp_path / "flux_1.png")["controlnet"]
    assert about.endswith("scale 0.6, mode depth")
    assert "union, edges.png, sha256 " in about
    assert text_of(tmp_path / "flux_0.png")["controlnet"].endswith("from 0 to 0.4 of the steps")
    cases = [
        ([*union], "one --controlnet-image for each, got 1 and 0"),
        (["--controlnet-scale", "1"], "got 1 for 0"),
        ([*both, *(["--controlnet-scale", "1"] * 3)], "got 3 for 2"),
        ([*union, *image, "--controlnet-start", "0.5", "--controlnet-end", "0.1"], "got 0.5 and"),
        ([*union, *image], "has modes 0 to 6"),
        ([*union, *image, *modes, "--mesh", "context=8"], "Use context=1 with it"),
    ]
    for arguments, reason in cases:
        finished = run(*base, *arguments, "--output-dir", tmp_path / "new")
        assert finished.code == 2, arguments
        assert reason in finished.errors[-1]
