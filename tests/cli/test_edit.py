"""Commands that draw from a picture: what they write, what they print, and their mistakes."""

import json

import numpy as np
import PIL.Image
import pytest

from fluxjax import DrawSettings, generate, load_models, read_image
from fluxjax.cli import edit, restore
from fluxjax.cli.main import build_parser

SIZE = (25, 30)
STEPS = ["--steps", "2"]
STAR, RING = "a red star", "a blue ring"


def pixels(path):
    with PIL.Image.open(path) as file:
        return np.asarray(file.convert("RGB"))


def text_of(path):
    with PIL.Image.open(path) as file:
        return file.text


@pytest.fixture
def picture(tmp_path):
    """A smooth picture in the folder of the test, whose sides are no multiples of 16."""
    y, x = np.meshgrid(*map(np.arange, SIZE), indexing="ij")
    waves = np.stack([np.sin(y / 9), np.cos(x / 7), 0.3 * np.sin((x + y) / 8)], -1)
    PIL.Image.fromarray(np.uint8(waves * 127 + 128)).save(tmp_path / "in.png")
    return tmp_path / "in.png"


@pytest.fixture
def mask(tmp_path):
    """A mask beside it, white on the right."""
    levels = np.zeros(SIZE, np.uint8)
    levels[:, 16:] = 255
    PIL.Image.fromarray(levels).save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


def test_strength_1_is_what_generate_draws_and_0_is_the_image(run, tmp_path, picture):
    size = ["--height", "32", "--width", "32"]
    assert run("generate", RING, *STEPS, *size, "--seed", "5").code == 0
    common = ["generate", RING, *STEPS, "--seed", "5", "--init-image", picture]
    finished = run(*common, "--strength", "1")
    assert "strength 1 starts at t = 1.000 and takes 2 of 2 steps" in finished.output
    plain, again = pixels(tmp_path / "flux_0.png"), pixels(tmp_path / "flux_1.png")
    np.testing.assert_array_equal(again, plain[:25, :30])
    finished = run(*common, "--strength", "0")
    assert "strength 0 starts at t = 0.000 and takes 0 of 2 steps" in finished.output
    kept = read_image(tmp_path / "flux_2.png")
    drawn = read_image(tmp_path / "flux_1.png")
    # What is left is the VAE's error on a picture unlike those that it was trained on.
    original = read_image(picture)
    assert np.abs(kept - original).mean() < np.abs(drawn - original).mean() / 2


def test_kept_pixels_are_the_files_own_and_the_metadata_say_all(run, tmp_path, picture, mask):
    command = ["generate", RING, *STEPS, "--init-image", picture, "--mask", mask]
    assert run(*command, "--strength", "0.5").code == 0
    assert run(*command, "--start-time", "0.9").code == 0
    for name in ("flux_0.png", "flux_1.png"):
        np.testing.assert_array_equal(pixels(tmp_path / name)[:, :16], pixels(picture)[:, :16])
    found = text_of(tmp_path / "flux_0.png")
    assert found["strength"] == "0.5"
    assert found["size"] == "30x25"
    assert found["start"].endswith(", 1 steps")
    for name in ("init_image", "mask"):
        file = {"init_image": "in.png", "mask": "mask.png"}[name]
        assert found[name].startswith(f"{file}, sha256 ")
    assert text_of(tmp_path / "flux_1.png")["start"] == "t 0.9000, 2 steps"


def test_lines_of_a_file_have_images_of_their_own(run, tmp_path, picture, mask):
    lines = [
        {"prompt": RING, "id": "plain"},
        {"prompt": RING, "id": "again", "init_image": "in.png", "strength": 0.5},
        {"prompt": RING, "id": "part", "init_image": "in.png", "mask": "mask.png"},
        {"prompt": RING, "id": "lost", "init_image": "nothing.png"},
        {"prompt": RING, "id": "wrong", "strength": 0.5},
    ]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    size = ["--height", "32", "--width", "32", "--output-dir", tmp_path / "out"]
    command = ["generate", "--prompts", tmp_path / "lines.jsonl", *STEPS, *size]
    finished = run(*command)
    assert finished.code == 2
    assert any("line 4: " in error and "nothing.png" in error for error in finished.errors)
    assert any("line 5: its strength does nothing" in error for error in finished.errors)
    names = sorted(path.stem for path in (tmp_path / "out").glob("*.png"))
    assert names == ["again", "part", "plain"]
    part = pixels(tmp_path / "out" / "part.png")
    np.testing.assert_array_equal(part[:, :16], pixels(picture)[:, :16])
    assert text_of(tmp_path / "out" / "again.png")["strength"] == "0.5"
    # Nothing is drawn anew, unless the image that it was drawn from is another one.
    assert "0 images written" in run(*command).output
    PIL.Image.fromarray(255 - pixels(picture)).save(picture)
    finished = run(*command)
    assert any("line 2: its image exists with init_image" in error for error in finished.errors)


def test_outpaint_keeps_the_image_on_a_larger_canvas(run, tmp_path, picture):
    finished = run("outpaint", picture, RING, *STEPS, "--left", "2", "--bottom", "7")
    assert finished.code == 0
    assert finished.output.endswith("outpaint_0.png\n")
    np.testing.assert_array_equal(pixels(tmp_path / "outpaint_0.png")[:25, 2:], pixels(picture))
    assert text_of(tmp_path / "outpaint_0.png")["margins"] == "left 2, bottom 7"
    again = run("outpaint", picture, RING, *STEPS, "--left", "2", "--bottom", "7", "--quiet")
    assert (again.output, again.progress) == ("outpaint_1.png\n", "")


def test_edit_writes_each_image_with_the_numbers_of_its_method(run, tmp_path, picture):
    finished = run(
        *("edit", picture, RING, "--source-prompt", STAR, *STEPS),
        *("--images", "2", "--batch", "1", "--seed", "9"),
    )
    assert finished.code == 0
    assert "strength 0.857143 starts at t = 1.000 and takes 2 of 2 steps" in finished.output
    assert "8/8 evaluations" in finished.progress  # of two prompts, twice, for two images
    first, second = pixels(tmp_path / "edit_0.png"), pixels(tmp_path / "edit_1.png")
    assert first.shape == (*SIZE, 3)
    assert not np.array_equal(first, second)
    found = text_of(tmp_path / "edit_1.png")
    expected = {
        "prompt": RING,
        "source_prompt": STAR,
        "method": "flowedit",
        "source_guidance": "1.5",
        "guidance": "5.5",
        "integrator": "flowedit",
        "seed": "9",
        "image": "1",
    }
    assert expected.items() <= found.items()


def test_restore_keeps_what_is_known(run, tmp_path, picture, mask):
    command = ["restore", picture, STAR, "--operator", f"mask:{mask}", "--noise", "0", *STEPS]
    assert run(*command).code == 0
    found = pixels(tmp_path / "restore_0.png")
    np.testing.assert_array_equal(found[:, :16], pixels(picture)[:, :16])
    about = text_of(tmp_path / "restore_0.png")
    assert about["method"] == "decoupled"
    assert about["timer"] == "restoration"


@pytest.mark.parametrize(("method", "timer"), [("flowchef", "restoration"), ("ddnm", "model")])
def test_restore_draws_what_the_function_draws(run, tmp_path, picture, mask, method, timer):
    """In particular at the same times, which are not the model's own for every method."""
    command = ["restore", picture, STAR, "--operator", f"mask:{mask}", "--method", method, *STEPS]
    assert run(*command).code == 0
    assert text_of(tmp_path / "restore_0.png")["timer"] == timer
    hidden = generate.Hidden(generate.read_mask(mask))
    (expected,) = generate.restore_image(
        load_models("tiny"),
        read_image(picture),
        STAR,
        key=generate.seed_key(0),
        restoration=generate.Restoration(degradation=hidden, method=method),
        settings=DrawSettings(steps=2),
    )
    found = read_image(tmp_path / "restore_0.png")
    # A level of 255 apart at most, where rounding falls the other way.
    np.testing.assert_allclose(found, np.clip(expected, -1, 1), atol=1.01 / 127.5)


@pytest.mark.parametrize(
    ("run_command", "words"),
    [
        (edit.run_edit, ["edit", "in.png", RING, "--method", "sdedit"]),
        (restore.run_restore, ["restore", "in.png", "--operator", "blur:1"]),
    ],
    ids=["edit", "restore"],
)
def test_a_file_of_times_is_a_timer_and_sets_the_steps(
    tmp_path, monkeypatch, picture, run_command, words
):
    monkeypatch.chdir(tmp_path)
    jobs = []
    for command in (edit, restore):
        monkeypatch.setattr(
            command, "draw_pictures", lambda options, make: jobs.append(make(options))
        )
    generate.write_times("own.json", [1.0, 0.75, 0.5, 0.125, 0.0])
    run_command(build_parser().parse_args([*words, "--timer", "own.json"]))
    request, job = jobs[0]
    assert request.steps == 4
    np.testing.assert_array_equal(request.recipe.times, [1.0, 0.75, 0.5, 0.125, 0.0])
    # By default sdedit takes three quarters of the steps.
    assert job.steps == (3 if words[0] == "edit" else 4)
    assert request.metadata(request.line, "none", {})["timer"].startswith("own.json, sha256 ")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["generate", RING, "--strength", "0.5"], "--strength does nothing without --init-image"),
        (["generate", RING, "--mask", "mask.png"], "--mask does nothing without --init-image"),
        (["generate", RING, "--init-image", "in.png", "--strength", "1.5"], "from 0 to 1, got"),
        (["generate", RING, "--init-image", "in.png", "--strength", "nan"], "from 0 to 1, got"),
        (["generate", RING, "--init-image", "in.png", "--height", "32"], "images have its size"),
        (["generate", RING, "--init-image", "in.png", "--repeats", "2"], "without --mask"),
        (["generate", RING, "--init-image", "none.png"], "none.png"),
        (["generate", RING, "--init-image", "text.txt"], "can't read text.txt"),
        (["generate", RING, "--init-image", "."], "is not one. Pass an image file"),
        (
            ["generate", RING, "--init-image", "in.png", "--mask", "other.png"],
            "30x25 pixels, and other.png has 4x3",
        ),
        (["generate", "--prompts", "x.jsonl", "--init-image", "in.png"], "--init-image does"),
        (["outpaint", "in.png", RING], "where the image grows"),
        (["outpaint", "in.png", RING, "--left", "-1"], "from 0 to"),
        (["edit", "in.png", RING], "compares two prompts"),
        (["edit", "in.png", RING, "--method", "magic"], "invalid choice: 'magic'"),
        (["edit", "in.png", RING, "--method", "sdedit", "--ratio", "2"], "--ratio does nothing"),
        (["edit", "in.png", RING, "--source-prompt", STAR, "--strength", "2"], "from 0 to 1"),
        (
            [
                "edit",
                "in.png",
                RING,
                "--source-prompt",
                STAR,
                "--method",
                "fireflow",
                "--images",
                "2",
            ],
            "which draws no noise",
        ),
        (["edit", "none.png", RING, "--method", "sdedit"], "none.png"),
        (["restore", "in.png", "--operator", "blur"], "blur:PIXELS, downsample:FACTOR"),
        (["restore", "in.png", "--operator", "blur:40"], "reaches 120 pixels far"),
        (["restore", "in.png", "--operator", "mask:other.png"], "other.png has 4x3"),
        (["restore", "in.png", "--operator", "blur:1", "--noise", "-1"], "from 0 on"),
        (["restore", "in.png", "--operator", "blur:1", "--method", "magic"], "invalid choice"),
        (
            ["restore", "in.png", "--operator", "blur:1", "--timer", "magic"],
            "or give a file *.json",
        ),
        (["restore", "in.png", "--operator", "blur:1", "--timer", "none.json"], "none.json"),
        (
            ["restore", "in.png", "--operator", "blur:1", "--timer", "times.json", "--steps", "9"],
            "times.json has 2 steps, and --steps is 9. Leave out --steps",
        ),
        (
            ["edit", "in.png", RING, "--method", "sdedit", "--timer", "times.json"],
            "times.json goes from 1 to 0.25, and pictures are drawn from 1, noise, to 0",
        ),
        (
            ["restore", "in.png", "--operator", "blur:1", "--noise", "0", "--method", "tmpd"],
            "above 0, got 0",
        ),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(run, tmp_path, picture, mask, words, reason):
    PIL.Image.new("L", (4, 3)).save(tmp_path / "other.png")
    (tmp_path / "text.txt").write_text("no image")
    generate.write_times(tmp_path / "times.json", [1.0, 0.5, 0.25])
    before = sorted(tmp_path.iterdir())
    finished = run(*words)
    assert finished.code == 2
    assert len(finished.errors) == 1
    assert reason in finished.errors[0]
    assert "Traceback" not in finished.progress
    assert sorted(tmp_path.iterdir()) == before


def test_each_line_of_a_file_of_pictures_is_drawn_once(run, tmp_path, picture, mask):
    lines = [
        {"picture": "in.png", "prompt": RING, "source_prompt": STAR, "id": "ring"},
        {"picture": "in.png", "prompt": RING, "source_prompt": STAR, "strength": 0.5, "seed": 7},
        {"picture": "none.png", "prompt": RING, "source_prompt": STAR},
        {"picture": "in.png", "prompt": RING, "size": 3},
        {"picture": "in.png", "prompt": RING, "source_prompt": STAR, "strength": 2},
    ]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = ["edit", "--pictures", "lines.jsonl", *STEPS]
    finished = run(*command)
    assert finished.code == 2
    for message in (
        "2 images written, 0 were there, 3 lines in all",
        "line 3: ",
        "line 4: it has an unknown field 'size'; there are id, picture, prompt, seed, ",
        "line 5: its strength is not valid: ",
    ):
        assert message in finished.output + finished.progress
    alone = ["edit", "in.png", RING, "--source-prompt", STAR, "--strength", "0.5", "--seed", "7"]
    assert run(*alone, *STEPS).code == 0
    np.testing.assert_array_equal(pixels(tmp_path / "1.png"), pixels(tmp_path / "edit_0.png"))
    assert text_of(tmp_path / "1.png") == text_of(tmp_path / "edit_0.png")
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines[:2])))
    finished = run(*command)
    assert finished.code == 0
    assert "0 images written, 2 were there" in finished.output
    assert run(*command, "--quiet").output == ""
    finished = run("edit", "--pictures", "lines.jsonl", "--steps", "1")
    assert finished.code == 2
    assert "line 1: its image exists with " in finished.progress
    assert "steps '2' instead of '1'; remove ring.png, or give the line another id" in (
        finished.progress
    )


def test_masks_in_a_file_of_pictures_lie_beside_it(run, tmp_path, picture, mask):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in (picture, mask):
        path.rename(folder / path.name)
    line = {"picture": "in.png", "operator": "mask:mask.png"}
    (folder / "lines.jsonl").write_text(json.dumps(line))
    assert run("restore", "--pictures", "pictures/lines.jsonl", "--noise", "0", *STEPS).code == 0
    kept = pixels(folder / "in.png")[:, :16]
    np.testing.assert_array_equal(pixels(tmp_path / "0.png")[:, :16], kept)
