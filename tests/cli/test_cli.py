import csv
import os
import re
import subprocess
import sys

import jax
import numpy as np
import PIL.Image
import pytest

import fluxjax
from fluxjax.cli.main import main as cli
from fluxjax.generate.compare import compare

PROMPT = "a large red star above a small blue ring on a beige background"


def run(*arguments, tmp_path):
    """Run the command as a user does, in a folder of its own."""
    program = [sys.executable, "-c", "from fluxjax.cli.main import main; main()"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    return subprocess.run(
        [*program, *map(str, arguments)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_generate_writes_numbered_images_with_metadata_and_prints_the_times(tmp_path):
    command = (
        "generate",
        PROMPT,
        "--steps",
        2,
        "--images",
        3,
        "--batch",
        2,
        "--seed",
        7,
        "--width",
        96,
        "--height",
        64,
    )
    first = run(*command, tmp_path=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "6/6 evaluations" not in first.stderr  # two batches of two steps
    assert "4/4 evaluations" in first.stderr
    for word in ("load", "compile", "encode", "denoise", "decode", "s per step"):
        assert word in first.stdout
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        "flux_0.png",
        "flux_1.png",
        "flux_2.png",
    ]
    with PIL.Image.open(tmp_path / "flux_2.png") as file:
        assert file.size == (96, 64)
        assert file.text == {
            "prompt": PROMPT,
            "seed": "7",
            "image": "2",
            "steps": "2",
            "guidance": "3.5",
            "integrator": "euler",
            "timer": "model",
            "size": "96x64",
            "model": "tiny",
            "version": f"fluxjax {fluxjax.__version__}",
        }
    before = (tmp_path / "flux_0.png").read_bytes()
    assert run(*command, tmp_path=tmp_path).returncode == 0
    assert (tmp_path / "flux_0.png").read_bytes() == before
    assert (tmp_path / "flux_5.png").read_bytes() == (tmp_path / "flux_2.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--height", "100"], "multiples of 16 pixels, got 100x128"),
        (["--model", "nothing"], "Pass a known model"),
        (["--steps", "0"], "--steps: needs a whole number from 1 to 10000, got '0'"),
        (["--images", "0"], "--images: needs a whole number from 1 to 1000000"),
        (["--batch", "0"], "--batch: needs a whole number from 1"),
        (["--max-sequence-length", "0"], "needs a whole number from 1 to 65536"),
        (["--output-dir", "/proc/nothing"], "can't be made"),
        (["--negative-prompt", "a ring"], "does nothing at --cfg 1"),
        (
            ["--eta", "0.5"],
            "euler takes no eta. Leave it out, or choose one of ddim, sde, dpmpp_2m_sde",
        ),
        (["--integrator", "ddim", "--eta", "2"], "--eta: needs a number from 0 to 1, got '2'"),
        (["--shift", "2"], "The timer model takes no shift"),
        (["--rule", "apg"], "--rule does nothing at --cfg 1"),
        (["--cache", "half"], "'half' is no cache. Write a threshold"),
        (["--stream-blocks", "--quantize", "fp8"], "Leave out --quantize"),
        (["--stream-blocks", "--unroll"], "Leave out --unroll"),
        (
            ["--flash-block-sizes", "256"],
            "is for flash_tpu, flash_gpu and xla_chunked, got implementation=None",
        ),
        (
            ["--steps", "1", "--attention", "flash_tpu"],
            "needs a TPU, and bfloat16 or float32, got cpu",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["generate", PROMPT, "--compilation-cache", str(tmp_path / "cache"), *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    last = error.split("\r")[-1].strip().splitlines()[-1]
    assert last.startswith("fluxjax: ")
    assert said in last
    assert "Traceback" not in error
    assert not list(tmp_path.glob("*.png"))


def test_encoders_kept_or_freed_give_the_same_image(tmp_path):
    images = []
    chunked = ["--attention", "xla_chunked", "--flash-block-sizes", "trillium"]  # cut to the tokens
    for flags in (
        [],
        ["--keep-encoders", "--unroll", *chunked],
        ["--prompt-2", ""],
        ["--quantize", "int8"],
    ):
        out = run(
            "generate",
            PROMPT,
            "--steps",
            1,
            "--prompt-2",
            "a ring",
            "--dtype",
            "float32",
            *flags,
            tmp_path=tmp_path,
        )
        assert out.returncode == 0, out.stderr
    for path in sorted(tmp_path.glob("*.png")):
        with PIL.Image.open(path) as file:
            images.append(file.tobytes())
            assert file.text["prompt_2"] == ("" if len(images) == 3 else "a ring")
            assert file.text.get("quantize") == ("int8" if len(images) == 4 else None)
    pixels = [np.frombuffer(image, np.uint8).astype(int) for image in images]
    assert abs(pixels[0] - pixels[1]).max() <= 1
    assert abs(pixels[0] - pixels[2]).max() > 10
    # Of 255 levels; one step takes the velocity's error of 1 to 2 % whole.
    assert 0 < abs(pixels[0] - pixels[3]).mean() < 0.02 * 255


def test_another_sampler_is_used_and_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = ["generate", PROMPT, "--steps", "2", "--compilation-cache", str(tmp_path / "cache")]
    sampler = ["--integrator", "ddim", "--eta", "0.5", "--timer", "flux_static", "--shift", "2"]
    guided = ["--cfg", "2", "--negative-prompt", "a blue ring"]
    led = [
        "--nag",
        "3",
        "--cache",
        "teacache:9",
        "--negative-prompt",
        "a blue ring",
        "--cfg",
        "1.5",
        "--rule",
        "zero_star",
    ]
    for extra in (
        [],
        sampler,
        [*sampler, *guided],
        ["--integrator", "heun", "--timer", "karras"],
        led,
    ):
        cli.main([*base, *extra])
    assert "4/4 evaluations" in capsys.readouterr().err  # Heun's
    images = [fluxjax.read_image(tmp_path / f"flux_{i}.png") for i in range(5)]
    assert all(abs(a - b).max() > 0.05 for i, a in enumerate(images) for b in images[:i])
    with PIL.Image.open(tmp_path / "flux_2.png") as file:
        told = {
            "integrator": "ddim, eta 0.5",
            "timer": "flux_static, shift 2",
            "cfg": "2",
            "negative_prompt": "a blue ring",
        }
        assert told.items() <= file.text.items()
    with PIL.Image.open(tmp_path / "flux_4.png") as file:
        told = {
            "nag": "3",
            "cache": "teacache:9",
            "cfg": "1.5",
            "rule": "zero_star",
            "negative_prompt": "a blue ring",
        }
        assert told.items() <= file.text.items()


def test_compare_writes_a_grid_and_a_table(tmp_path, capsys):
    options = [
        "--integrators",
        "euler,heun",
        "--timers",
        "uniform,karras",
        "--steps",
        "2,6",
        "--reference-steps",
        "24",
    ]
    fixed = [
        "--height",
        "32",
        "--width",
        "48",
        "--output-dir",
        str(tmp_path),
        "--compilation-cache",
        str(tmp_path / "cache"),
    ]
    cli.main(["compare", "a red star", *options, *fixed])
    rows = list(csv.DictReader((tmp_path / "compare_0.csv").read_text().splitlines()))
    assert [
        (row["timer"], row["integrator"], row["steps"], row["evaluations"]) for row in rows[:4]
    ] == [
        ("uniform", "euler", "2", "2"),
        ("uniform", "euler", "6", "6"),
        ("uniform", "heun", "2", "4"),
        ("uniform", "heun", "6", "12"),
    ]
    assert len(rows) == 8
    distances = {
        (row["timer"], row["integrator"], row["steps"]): float(row["distance"]) for row in rows
    }
    assert distances["uniform", "heun", "6"] < distances["uniform", "heun", "2"]
    with PIL.Image.open(tmp_path / "compare_0.png") as file:
        # An image of 48x32 six times as large and its part, twice; four rows and the reference's.
        assert file.size == (2 * (2 * 288 + 12) + 6, 5 * (6 * 32 + 26 + 6) + 6)
    with pytest.raises(SystemExit):
        cli.main(["compare", "a red star", "--integrators", "euler,eller", *fixed])
    assert "there is no 'eller'" in capsys.readouterr().err


def test_a_comparison_with_the_reference_itself_has_no_distance(tiny):
    options = {"integrators": ["heun"], "timers": ["model"], "steps": [3], "reference_steps": 3}
    (run,), images = compare(
        tiny, "a red star", **options, key=jax.random.key(0), height=32, width=32
    )
    assert (run.distance, run.evaluations) == (0, 6)
    np.testing.assert_array_equal(images[0], images[1])


def test_a_mesh_draws_the_same_images(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = [
        "generate",
        PROMPT,
        "--steps",
        "2",
        "--images",
        "4",
        "--compilation-cache",
        str(tmp_path / "cache"),
    ]
    for extra in (
        [],
        ["--mesh", "fsdp=2,tensor=-1,data=2"],
        ["--lora", "tiny:kraft"],
        ["--lora", "tiny:kraft", "--mesh", "data=4,tensor=2"],
    ):
        cli.main([*base, *extra])
        # Of eight devices one reports.
        assert max(map(int, re.findall(r"(\d+)/2 evaluations", capsys.readouterr().err))) == 2
    images = [fluxjax.read_image(tmp_path / f"flux_{i}.png") for i in range(16)]
    for one, many in ((0, 4), (8, 12)):
        for number in range(4):
            # A level of 255 where a value is on the edge between two.
            assert abs(images[one + number] - images[many + number]).max() < 0.01
    assert abs(images[0] - images[8]).max() > 0.05


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fsdp", "needs axes and their sizes, as data=2,fsdp=4"),
        ("rows=2", "there is no axis 'rows'"),
        ("data=3", "does not use 8 devices"),
    ],
)
def test_a_wrong_mesh_is_told(text, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["generate", PROMPT, "--mesh", text])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
