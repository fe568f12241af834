"""Hostile command lines, prompt files and image files, random with a fixed seed.

Each gives a right result, or one line that says what is wrong.
"""

import functools
import io
import json
import random
import time
from contextlib import suppress

import numpy as np
import PIL.Image
import pytest

from fluxjax import read_image
from fluxjax.cli import compare as compare_command, generate as draw, main as cli
from fluxjax.cli.prompts import Line, read_prompts
from fluxjax.cli.text_stages import cut_notes
from fluxjax.generate.tokens import token_counts

NUMBERS = [
    "",
    " ",
    "9" * 5000,
    *"0 1 -1 2 3 1.5 nan inf -inf 1e39 -1e39 1e-400 1e999 2147483648 4294967296".split(),
]
NUMBERS += (
    "9223372036854775807 9223372036854775808 1600000000 1_000 0x10 １２ +5 16 17 -0 1e3".split()
)
TEXTS = [
    "a star",
    "",
    "\0",
    "\ud800",
    "a\x1b[2K\nb",
    "[" * 20000,
    "é⭐\u202e",
    "x" * 100_000,
    "-",
    "--",
    "%s%n{}",
]
PATHS = [
    "missing",
    ".",
    "/proc/self/mem",
    "/dev/null",
    "a\0b",
    "x" * 300,
    "\udcff",
    "..",
    "",
    "hub:a/b",
    "tiny:none",
    "tiny:",
]
SIZES = [
    "data=1,data=1",
    "data=-1,fsdp=-1",
    "rows=2",
    "data=",
    "=",
    "data=0",
    "512,512,512",
    "512,",
    "trillium",
    "12,0",
    "5XB",
]
# Options of commands.
GENERATE = """
--prompt-2 --steps --guidance --negative-prompt --cfg --rule --nag --cache --attention
--flash-block-sizes --timer --shift --integrator --eta --height --width --images --seed
--max-sequence-length --dtype --batch --lora --mesh --prompts --model --quantize
""".split()
COMPARE = """
--integrators --timers --steps --reference-steps --guidance --height --width --seed --dtype
""".split()
CONVERT = """
--to --dtype --only --shard-size
""".split()
# Values that some options accept.
KNOWN = """
euler ddim apg first_block:0.1 teacache:inf karras float16 xla_chunked int8 tiny:kraft:nan
tiny:kraft:1e39 flux
""".split()


def command(rng):
    """Return a random command line of hostile values."""
    values = [*NUMBERS, *NUMBERS, *TEXTS, *PATHS, *SIZES, *KNOWN]
    name = rng.choice(["generate"] * 5 + ["compare", "compare", "convert", "inspect", "lora"])
    options = {"generate": GENERATE, "compare": COMPARE, "convert": CONVERT}.get(name, ["--to"])
    first = {"convert": [rng.choice(PATHS), rng.choice(PATHS)], "inspect": [rng.choice(PATHS)]}
    first |= {"lora": [rng.choice(["inspect", "convert", "merge", "none"]), rng.choice(PATHS)]}
    arguments = first.get(name, [rng.choice(TEXTS)] if rng.random() < 0.3 else ["a star"])
    chosen = rng.sample(options, rng.randint(1, min(3, len(options))))
    for option in chosen:
        arguments = [*arguments, option, rng.choice(values)]
    return [name, *arguments]


@pytest.fixture
def stubbed(tmp_path, monkeypatch):
    """The folder to run in; what would draw images is replaced and draws none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("_draw_prompts", "draw_prompt_file"):
        monkeypatch.setattr(draw, name, lambda *_: None)

    def stop(*_, **__):
        raise SystemExit(0)

    monkeypatch.setattr(compare_command, "load_models", stop)
    # The parser is the same for all commands, and making it takes longer than reading them.
    monkeypatch.setattr(cli, "build_parser", functools.cache(cli.build_parser))
    monkeypatch.setattr(draw, "use_cache", lambda folder: None)
    monkeypatch.setattr(compare_command, "use_cache", lambda folder: None)
    return tmp_path


def run(arguments, capfd):
    """Return the exit code of a command, what it printed on standard error, and its seconds."""
    start = time.monotonic()
    try:
        cli.main(arguments)
        code = 0
    except SystemExit as stopped:
        code = stopped.code or 0
    return code, capfd.readouterr().err, time.monotonic() - start


def test_hostile_command_lines_are_refused_in_one_line_at_once(stubbed, capfd):
    rng, refused = random.Random(7), 0
    for _ in range(400):
        arguments = command(rng)
        code, message, seconds = run(arguments, capfd)
        shown = [word[:80] for word in arguments]
        assert code in (0, 2), (shown, code)
        assert seconds < 5, shown
        assert not list(stubbed.iterdir()), shown
        if code == 2:
            refused += 1
            assert message.startswith("fluxjax: "), shown
            assert message.endswith("\n"), shown
            assert message.count("\n") == 1, (shown, message)
            assert message[:-1].isprintable(), shown
    assert 200 < refused < 400


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "2147483648"], "a whole number from 1 to 10000, got '2147483648'"),
        (["--height", "1600000000"], "a whole number from 1 to 65536"),
        (
            ["--height", "65536", "--width", "65536", "--timer", "uniform"],
            "GB for decoding, and this device has",
        ),
        (["--images", "1000000000"], "a whole number from 1 to 1000000"),
        (["--images", "1000000"], "1000000 images of 128x128 at once"),
        (["--max-sequence-length", "10000000000"], "a whole number from 1 to 65536"),
        (["--max-sequence-length", "65536"], "GB for encoding"),
        (["--seed", "-1"], "a whole number from 0 to 9223372036854775807"),
        (["--seed", "9223372036854775808"], "a whole number from 0 to 9223372036854775807"),
        (["--guidance", "nan"], "a finite number, got 'nan'"),
        (["--cfg", "inf"], "a finite number, got 'inf'"),
        (["--nag", "1e39"], "a finite number, got '1e39'"),
        (["--timer", "flux_static", "--shift", "0"], "a finite number above 0"),
        (["--lora", "tiny:kraft:inf"], "a finite scale after the colon"),
        (["--cache", "inf"], "'inf' is not a step cache"),
        (["--mesh", "data=1,data=1"], "data is given twice"),
        (["--flash-block-sizes", "512,512,512"], "each from 1 to 65536"),
        (["--flash-block-sizes", "99999999999999999999"], "each from 1 to 65536"),
    ],
)
def test_an_impossible_value_is_refused_with_what_is_possible(
    stubbed, capfd, monkeypatch, arguments, message
):
    monkeypatch.setattr("fluxjax.generate.limits.memory_bytes", lambda device: 64 * 10**9)
    code, error, _ = run(["generate", "a star", *arguments], capfd)
    assert code == 2
    assert message in error


def mutated(rng, data):
    """Return bytes with some of them replaced, removed or inserted."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(4)
        if kind == 0 and at < len(data):
            data[at] = rng.randrange(256)
        elif kind == 1:
            del data[at : at + rng.randint(1, 30)]
        elif kind == 2:
            data[at:at] = rng.choice(
                [
                    b"\xff",
                    b"\0",
                    b"[" * 5000,
                    b'"',
                    b"\\ud800",
                    b"1e999",
                    b"NaN",
                    b"9" * 5000,
                    b"\n",
                ]
            )
        else:
            data = data[:at] or data
    return bytes(data)


def test_mutated_files_of_prompts_give_lines_that_can_be_drawn_or_a_reason(tmp_path):
    rng, path = random.Random(5), tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "a star ⭐", "id": "star", "seed": 5},
        {"prompt": "b", "prompt_2": "c"},
        {"prompt": "d", "seed": 2**63 - 1},
    ]
    whole = "\n".join(
        json.dumps(line, ensure_ascii=bool(i % 2)) for i, line in enumerate(lines)
    ).encode()
    wrong = 0
    for _ in range(300):
        path.write_bytes(mutated(rng, whole))
        found, problems = read_prompts(path)
        wrong += bool(problems)
        assert all("\n" not in problem and problem.startswith("line ") for problem in problems)
        for line in found:
            assert 0 <= line.seed < 2**63
            assert all(text.encode() is not None for text in line.texts().values())
            assert "/" not in line.id
    assert wrong > 100


def test_mutated_images_are_read_or_refused(tmp_path):
    rng, path = random.Random(3), tmp_path / "image"
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8))
    files = []
    for options in (
        {"format": "PNG"},
        {"format": "JPEG"},
        {"format": "JPEG", "exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"},
    ):
        stream = io.BytesIO()
        image.save(stream, **options)
        files.append(stream.getvalue())
    refused = 0
    for number in range(300):
        path.write_bytes(mutated(rng, files[number % 3]))
        start = time.monotonic()
        found = None
        with suppress(ValueError):
            found = read_image(path)
        assert time.monotonic() - start < 5
        if found is None:
            refused += 1
        else:
            assert found.ndim == 3
            assert found.shape[-1] == 3
            assert np.abs(found).max() <= 1
    assert 50 < refused < 290


def test_a_prompt_that_is_cut_is_reported(tiny):
    text = "a red star " * 60
    line = Line(text, prompt_2=None, negative_prompt=None, id="a", seed=0)
    (note,) = cut_notes(tiny.tokenizers, line, 24)
    clip, t5 = token_counts(tiny.tokenizers, text)
    assert note == f"the prompt is cut: CLIP reads 77 of {clip} tokens, T5 reads 24 of {t5}"
    assert clip == 3 * 60 + 2
