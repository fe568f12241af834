"""Commands in this process: what they write, what they print, and their mistakes."""

import csv
import re

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

import fluxjax
from fluxjax.generate.compare import Comparison, Run, compare
from fluxjax.generate.comparison_files import comparison_csv
from fluxjax.generate.comparison_grid import comparison_grid

PROMPT = "a large red star above a small blue ring on a beige background"
SMALL = ["--steps", "2", "--height", "32", "--width", "32"]


def read_text(path):
    """Return the metadata of a PNG."""
    with PIL.Image.open(path) as file:
        return file.text


def test_generate_writes_numbered_images_with_metadata_and_prints_the_times(run, tmp_path):
    size = ["--width", "48", "--height", "32"]
    command = ["generate", PROMPT, "--steps", "2", "--images", "3", "--batch", "2", "--seed", "7"]
    first = run(*command, *size)
    assert first.code == 0
    assert "6/6 evaluations" not in first.progress  # two batches of two steps
    assert "4/4 evaluations" in first.progress
    for word in ("load", "compile", "encode", "denoise", "decode", "s per step"):
        assert word in first.output
    names = ["flux_0.png", "flux_1.png", "flux_2.png"]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == names
    assert read_text(tmp_path / "flux_2.png") == {
        "prompt": PROMPT,
        "seed": "7",
        "image": "2",
        "steps": "2",
        "guidance": "3.5",
        "integrator": "euler",
        "timer": "model",
        "size": "48x32",
        "model": "tiny",
        "version": f"fluxjax {fluxjax.__version__}",
        "command": f"fluxjax generate '{PROMPT}' --model tiny --seed 7 --first-image 2 --steps 2 "
        "--guidance 3.5 --height 32 --width 48",
        "batch": "2 images",
    }
    with PIL.Image.open(tmp_path / "flux_2.png") as file:
        assert file.size == (48, 32)
    before = (tmp_path / "flux_0.png").read_bytes()
    assert run(*command, *size).code == 0
    assert (tmp_path / "flux_0.png").read_bytes() == before
    assert (tmp_path / "flux_5.png").read_bytes() == (tmp_path / "flux_2.png").read_bytes()


def test_each_image_of_several_seeds_can_be_drawn_alone(run, tmp_path):
    command = ["generate", PROMPT, *SMALL, "--batch", "1", "--quiet"]
    several = run(*command, "--seeds", "3,4", "--images", "2")
    assert (several.code, several.progress) == (0, "")
    assert several.output.split() == [f"flux_{number}.png" for number in range(4)]
    alone = run(*command, "--seed", "4", "--first-image", "1")
    assert alone.output == "flux_4.png\n"
    written = [(tmp_path / f"flux_{number}.png").read_bytes() for number in range(5)]
    assert written[4] == written[3]
    assert len(set(written)) == 4
    about = read_text(tmp_path / "flux_2.png")
    assert (about["seed"], about["image"]) == ("4", "0")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--aspect", "2:1", "--height", "32"], "Leave out --height and --width"),
        (["--churn", "0.5"], "churn is above 0 and at most 0.4142, got 0.5"),
        (["--integrator", "sde", "--churn", "0.1"], "sde draws noise itself"),
        (["--height", "100"], "multiples of 16 pixels, got 100x128"),
        (["--model", "nothing"], "Pass a known model"),
        (["--output-dir", "/proc/nothing"], "can't be made"),
        (["--negative-prompt", "a ring"], "does nothing at --cfg 1"),
        (
            ["--eta", "0.5"],
            "euler takes no eta. Leave it out, or choose one of ddim, sde, dpmpp_2m_sde",
        ),
        (["--shift", "2"], "The timer model takes no shift"),
        (["--rule", "apg"], "--rule does nothing at --cfg 1"),
        (["--cache", "half"], "'half' is not a step cache. Write a threshold"),
        (["--stream-blocks", "--quantize", "fp8"], "Leave out --quantize"),
        (["--stream-blocks", "--unroll"], "Leave out --unroll"),
        (
            ["--flash-block-sizes", "256"],
            "is for flash_tpu, flash_gpu and xla_chunked, got implementation=None",
        ),
        ([*SMALL, "--attention", "flash_tpu"], "needs a TPU, and bfloat16 or float32, got cpu"),
        (["--mesh", "data=3"], "does not use 8 devices"),
    ],
)
def test_options_that_cannot_be_used_are_one_line_and_exit_code_2(arguments, reason, run, tmp_path):
    finished = run("generate", PROMPT, *arguments)
    assert finished.code == 2
    assert len(finished.errors) == 1
    assert reason in finished.errors[0]
    assert "Traceback" not in finished.progress
    assert not list(tmp_path.glob("*.png"))


def test_encoders_kept_or_freed_give_the_same_image(run, tmp_path):
    fixed = ["--steps", "1", *SMALL[2:], "--dtype", "float32", "--prompt-2", "a ring"]
    # The preset's blocks have more tokens than the image, and are made smaller.
    chunked = ["--attention", "xla_chunked", "--flash-block-sizes", "trillium"]
    for flags in (
        [],
        ["--keep-encoders", "--unroll", *chunked],
        ["--prompt-2", ""],
        ["--quantize", "int8"],
    ):
        assert run("generate", PROMPT, *fixed, *flags).code == 0
    pixels = []
    for number, path in enumerate(sorted(tmp_path.glob("*.png"))):
        with PIL.Image.open(path) as file:
            pixels.append(np.asarray(file, int))
            assert file.text["prompt_2"] == ("" if number == 2 else "a ring")
            assert file.text.get("quantize") == ("int8" if number == 3 else None)
    assert abs(pixels[0] - pixels[1]).max() <= 1
    assert abs(pixels[0] - pixels[2]).max() > 10
    # Of 255 levels. A single step adds the velocity's whole error, of 1 to 2 %, to the image.
    assert 0 < abs(pixels[0] - pixels[3]).mean() < 0.02 * 255


def test_another_sampler_is_used_and_recorded(run, tmp_path):
    sampler = ["--integrator", "ddim", "--eta", "0.5", "--timer", "flux_static", "--shift", "2"]
    guided = ["--cfg", "2", "--negative-prompt", "a blue ring"]
    attention_guided = [
        *("--nag", "3", "--cache", "teacache:9", "--negative-prompt", "a blue ring"),
        *("--cfg", "1.5", "--rule", "zero_star"),
    ]
    second_order = ["--integrator", "heun", "--timer", "karras"]
    for extra in ([*sampler, *guided], attention_guided, second_order):
        finished = run("generate", PROMPT, *SMALL, *extra)
    assert "4/4 evaluations" in finished.progress  # Heun's method evaluates twice per step
    images = [fluxjax.read_image(tmp_path / f"flux_{i}.png") for i in range(3)]
    assert abs(images[0] - images[1]).max() > 0.05
    assert abs(images[0] - images[2]).max() > 0.05
    assert abs(images[1] - images[2]).max() > 0.05
    expected = {
        "integrator": "ddim, eta 0.5",
        "timer": "flux_static, shift 2",
        "cfg": "2",
        "negative_prompt": "a blue ring",
    }
    assert expected.items() <= read_text(tmp_path / "flux_0.png").items()
    expected = {
        "nag": "3",
        "cache": "teacache:9",
        "cfg": "1.5",
        "rule": "zero_star",
        "negative_prompt": "a blue ring",
    }
    assert expected.items() <= read_text(tmp_path / "flux_1.png").items()


def test_a_file_of_times_is_a_timer(run, tmp_path):
    """The model's own times in a file give the image of the model's timer."""
    times = fluxjax.generate.model_times(fluxjax.ZOO["tiny"].defaults, 2, 32, 32)
    fluxjax.generate.write_times(tmp_path / "two.json", times)
    size = ["--height", 32, "--width", 32]
    assert run("generate", PROMPT, *size, "--steps", 2).code == 0
    assert run("generate", PROMPT, *size, "--timer", "two.json").code == 0
    images = [fluxjax.read_image(tmp_path / f"flux_{i}.png") for i in range(2)]
    np.testing.assert_array_equal(*images)
    text = read_text(tmp_path / "flux_1.png")
    assert text["steps"] == "2"
    assert text["timer"].startswith("two.json, ")
    for extra, reason in (
        (["--timer", "two.json", "--steps", 3], "two.json has 2 steps, and --steps is 3"),
        (["--timer", "two.json", "--shift", 2], "--shift does nothing with a file of times"),
        (["--timer", "none.json"], "No such file"),
    ):
        refused = run("generate", PROMPT, *size, *extra)
        assert refused.code == 2
        assert reason in refused.errors[0]


def test_compare_writes_a_grid_and_a_table(run, tmp_path):
    samplers = ["--integrators", "euler,heun", "--timers", "uniform", "--steps", "2,6"]
    size = ["--reference-steps", "24", "--height", "32", "--width", "48"]
    finished = run("compare", "a red star", *samplers, *size)
    assert finished.code == 0
    text = (tmp_path / "compare_0.csv").read_text()
    assert finished.output == f"{text}compare_0.png\ncompare_0.csv\n"
    rows = list(csv.DictReader(text.splitlines()))
    names = ("timer", "integrator", "steps", "evaluations")
    assert [tuple(row[name] for name in names) for row in rows] == [
        ("uniform", "euler", "2", "2"),
        ("uniform", "euler", "6", "6"),
        ("uniform", "heun", "2", "4"),
        ("uniform", "heun", "6", "12"),
    ]
    heun_of_2, heun_of_6 = (float(row["distance"]) for row in rows[2:])
    assert heun_of_6 < heun_of_2
    with PIL.Image.open(tmp_path / "compare_0.png") as file:
        assert file.size == grid_size(rows=3, columns=2)  # the reference has a row too
        assert file.text == {"prompt": "a red star", "model": "tiny", "seed": "0"}


def grid_size(rows, columns):
    """Return the size of a grid of images of 48x32: six times as large, beside enlarged parts."""
    return columns * (2 * 288 + 12) + 6, rows * (6 * 32 + 26 + 6) + 6


def test_a_comparison_has_a_row_for_each_timer_and_integrator_and_a_column_for_each_count():
    rng = np.random.default_rng(0)
    runs = [
        Run(timer, integrator, steps, steps, 0.5, 0.25, 20.0)
        for timer in ("uniform", "karras")
        for integrator in ("euler", "heun")
        for steps in (2, 6)
    ]
    images = list(rng.uniform(-1, 1, (9, 32, 48, 3)).astype(np.float32))
    assert comparison_grid(runs, images).size == grid_size(rows=5, columns=2)
    lines = comparison_csv(runs).splitlines()
    assert lines[0] == "timer,integrator,steps,evaluations,seconds,distance,psnr"
    assert lines[1:6:4] == ["uniform,euler,2,2,0.5,0.25,20", "karras,euler,2,2,0.5,0.25,20"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"eta": 0.5}, "eta does nothing here"),
        ({"shift": 2.0}, "shift does nothing here"),
        ({"negative_prompt": "a ring", "cfg": 1.0}, "negative prompt does nothing at cfg 1"),
    ],
)
def test_what_no_compared_sampler_takes_is_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        Comparison(integrators=["euler"], timers=["model"], steps=[1], **options)


def test_a_comparison_is_guided_and_passes_eta_and_shift_to_those_that_take_them(tiny):
    def images(**options):
        comparison = Comparison(
            integrators=["euler", "ddim"],
            timers=["flux_static"],
            steps=[2],
            reference_steps=1,
            height=32,
            width=32,
            dtype=jnp.float32,
            **options,
        )
        return np.array(compare(tiny, "a red star", comparison, key=jax.random.key(0))[1])

    plain = images()
    changed = images(eta=1.0)
    np.testing.assert_array_equal(changed[1], plain[1])  # euler takes no eta
    assert np.abs(changed[2] - plain[2]).max() > 0.01
    assert np.abs(images(shift=1.0)[1] - plain[1]).max() > 0.01
    guided, away = images(cfg=3.0), images(cfg=3.0, negative_prompt="a red star")
    assert np.abs(guided - plain).max() > 0.01
    # Guided away from the prompt itself, nothing is left of the guidance.
    np.testing.assert_allclose(away, plain, atol=1e-3)


def test_a_comparison_with_the_reference_itself_has_no_distance(tiny):
    comparison = Comparison(
        integrators=["heun"], timers=["model"], steps=[3], reference_steps=3, height=32, width=32
    )
    (run,), images = compare(tiny, "a red star", comparison, key=jax.random.key(0))
    assert (run.distance, run.evaluations) == (0, 6)
    np.testing.assert_array_equal(images[0], images[1])


def test_a_mesh_draws_the_same_images(run, tmp_path):
    adapter = ["--lora", "tiny:kraft"]
    mesh = ["--mesh", "fsdp=2,tensor=-1,data=2", "--preview", "now.png", "--preview-every", "2"]
    for extra in (adapter, [*adapter, *mesh]):
        finished = run("generate", PROMPT, *SMALL, "--images", "4", *extra)
        counts = re.findall(r"(\d+)/2 evaluations", finished.progress)
        assert max(map(int, counts)) == 2
    images = [fluxjax.read_image(tmp_path / f"flux_{i}.png") for i in range(8)]
    for number in range(4):
        # One of 255 levels, where a value is between two of them.
        assert abs(images[number] - images[4 + number]).max() < 0.01
    # The last preview shows the images, side by side.
    preview = fluxjax.read_image(tmp_path / "now.png")
    height, width = images[4].shape[:2]
    assert preview.shape == (2 * height, 2 * width, 3)
    assert abs(preview[:height, :width] - images[4]).max() < 0.01
