"""Commands that really draw: files of prompts with bad lines, stale images, results that are not finite, signals."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from fluxjax.cli import generate as draw
from fluxjax.cli.console import Stopped, interruptible, stop_signals
from fluxjax.cli.main import main as cli

FIXED = ["--steps", "1", "--height", "32", "--width", "32"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a command that keeps its programs; return its exit code, and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(draw, "use_cache", lambda folder: None)

    def call(*arguments):
        code = 0
        try:
            cli.main(list(map(str, arguments)))
        except SystemExit as stopped:
            code = stopped.code
        printed = capsys.readouterr()
        return (
            code,
            printed.out,
            [line for line in printed.err.split("\n") if line.startswith("fluxjax: ")],
        )

    return call


def write_lines(tmp_path, *lines):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf"
        + b"\n".join(
            line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines
        )
    )
    return path


def test_bad_lines_are_told_and_the_others_drawn_and_what_has_changed_is_told_too(run, tmp_path):
    good = {"prompt": "a red star", "id": "s" * 251, "seed": 2**40}
    bad = [
        {"prompt": "\ud800"},
        b"[" * 200_000,
        b'{"prompt": "a", "seed": 1e999}',
        b"\xff",
        {"prompt": "a", "id": "s" * 252},
    ]
    path = write_lines(tmp_path, good, *bad, b'{"prompt": "a", "prompt": "b"}')
    code, out, said = run("generate", "--prompts", path, "--batch", "64", *FIXED)
    assert (code, len(said)) == (2, 6)
    assert "1 images written" in out
    for line, reason in zip(
        said, ["surrogate", "nested", "seed", "UTF-8", "252 characters", "twice"], strict=True
    ):
        assert reason in line
    image = tmp_path / f"{'s' * 251}.png"
    before = image.read_bytes()
    path = write_lines(tmp_path, good)
    assert run("generate", "--prompts", path, *FIXED)[0] == 0  # it is there
    path = write_lines(tmp_path, good | {"prompt": "a blue ring"})
    code, out, (said,) = run("generate", "--prompts", path, *FIXED)
    assert code == 2
    assert "line 1: its image is there with prompt 'a red star' in place of 'a blue ring'" in said
    assert "0 images written" in out
    assert image.read_bytes() == before
    code, out, said = run("generate", "--prompts", path, *FIXED, "--overwrite")
    assert (code, said) == (0, [])
    with PIL.Image.open(image) as file:
        assert file.text["prompt"] == "a blue ring"


def test_only_the_images_that_were_written_are_counted(run, tmp_path, monkeypatch):
    path = write_lines(tmp_path, {"prompt": "a"}, {"prompt": "b"})
    write = draw.write_png

    def rival(image, path, *rest, **options):
        write(image, path, *rest, **options)  # another job was faster
        return write(image, path, *rest, **options)

    monkeypatch.setattr(draw, "write_png", rival)
    assert "0 images written" in run("generate", "--prompts", path, *FIXED)[1]


@pytest.mark.parametrize(
    ("network", "stage"),
    [("t5", "the text encoders"), ("flux", "denoising (step 1 of 1)"), ("vae", "decoding")],
)
def test_what_is_not_finite_is_not_written(run, tmp_path, monkeypatch, network, stage):
    load = getattr(draw, f"load_{network}")

    def spoilt(*arguments, **options):
        return jax.tree.map(
            lambda x: x * jnp.asarray(jnp.nan, x.dtype), load(*arguments, **options)
        )

    spoilt.__name__ = f"load_{network}"
    monkeypatch.setattr(draw, f"load_{network}", spoilt)
    code, _, (said,) = run("generate", "a star", *FIXED)
    assert code == 2
    assert said.startswith(f"fluxjax: Image 0 is not finite after {stage}, and is not written.")
    assert not list(tmp_path.iterdir())


def test_a_cache_says_how_many_evaluations_it_skipped(run):
    fixed = [*FIXED[2:], "--steps", "5"]
    assert (
        "cache: 4 of 5 evaluations skipped"
        in run("generate", "a star", *fixed, "--cache", "1e30")[1]
    )


def test_seeds_of_64_bits_draw_images_of_their_own(run, tmp_path):
    for seed in (0, 2**32, 2**63 - 1):
        assert (
            run("generate", "a star", *FIXED, "--seed", seed, "--images", 1, "--batch", 64)[0] == 0
        )
    images = []
    for number in range(3):
        with PIL.Image.open(tmp_path / f"flux_{number}.png") as file:
            images.append(np.asarray(file, int))
    assert all(abs(a - b).max() > 10 for i, a in enumerate(images) for b in images[:i])


def test_an_orphan_table_is_passed_over(tmp_path):
    (tmp_path / "compare_0.csv").touch()
    found = cli.write_comparison(tmp_path, np.zeros((2, 2, 3), np.float32), "a\n", {})
    assert [path.name for path in found] == ["compare_1.png", "compare_1.csv"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "compare_0.csv",
        "compare_1.csv",
        "compare_1.png",
    ]


def command(*arguments):
    return [sys.executable, "-m", "fluxjax.cli.main", *arguments]


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_ends_denoising_at_once_in_one_line(tmp_path, name, code):
    size = ["--steps", "10000", "--height", "32", "--width", "32"]
    words = command(
        "generate", "a star", *size, "--compilation-cache", str(tmp_path.parent / "programs")
    )
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    said = b""
    while not re.search(rb"denoise .* [1-9][0-9]*/10000", said) and (
        read := process.stderr.read1(4096)
    ):
        said += read
    for _ in range(2):
        process.send_signal(getattr(signal, name))
    out, rest = process.communicate(timeout=10)
    assert process.returncode == code
    assert rest.decode().split("\r")[-1].splitlines()[-1] == f"fluxjax: stopped by {name}"
    assert b"Traceback" not in rest
    assert not out
    assert not list(tmp_path.iterdir())


def test_streams_that_are_closed_and_a_folder_that_is_gone(tmp_path):
    gone = tmp_path / "gone"
    shell = 'mkdir gone; cd gone; rmdir ../gone; "$@" 2>&-; echo $?; "$@" 2>&1'
    found = subprocess.run(
        ["sh", "-c", shell, "sh", *command("generate", "a")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (found.returncode, found.stderr) == (2, "")
    code, said = found.stdout.splitlines()
    assert code == "2"
    assert said.startswith("fluxjax: --output-dir . can't be made")
    assert not gone.exists()
    pipe = subprocess.Popen(
        command("inspect", "tiny"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    pipe.stdout.close()
    assert pipe.stderr.read() == ""
    assert pipe.wait() == 0
    broken = os.environ | {"JAX_PLATFORMS": "cuda"}
    found = subprocess.run(
        command("generate", "a"), cwd=tmp_path, env=broken, capture_output=True, text=True
    )
    assert found.returncode == 2
    assert found.stderr.startswith("fluxjax: JAX finds no device of JAX_PLATFORMS='cuda'")
    assert "()" not in found.stderr  # JAX's error has no text
    assert found.stderr.count("\n") == 1


def test_a_signal_whose_exception_is_swallowed_ends_the_next_wait():
    before = signal.getsignal(signal.SIGINT)
    with stop_signals():
        with suppress(Stopped):  # as Python does in finalizers
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # a second one disturbs nothing
        with pytest.raises(Stopped):
            interruptible(time.sleep, 5)
    assert signal.getsignal(signal.SIGINT) is before
    assert interruptible(lambda: 3) == 3


def test_a_command_line_in_utf8_is_read_as_such_where_the_locale_is_ascii():
    program = (
        "import sys; from fluxjax.cli.options import any_text; print(ascii(any_text(sys.argv[1])))"
    )
    plain = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    found = subprocess.run(
        [sys.executable, "-c", program, "café ⭐".encode()],
        env=plain,
        capture_output=True,
        text=True,
    )
    assert found.stdout.strip() == ascii("café ⭐"), found.stderr
    found = subprocess.run(
        [sys.executable, "-c", program, b"caf\xe9"], env=plain, capture_output=True, text=True
    )
    assert "is not valid UTF-8" in found.stderr
