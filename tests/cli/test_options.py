"""The options of every command: how they are read, and that nothing heavy is imported for that."""

import argparse
import math
import os
import pkgutil
import subprocess
import sys

import numpy as np
import pytest

from fluxjax.cli import choices, compound_options, main, options
from fluxjax.generate.latents import SEEDS
from fluxjax.kernels.block_sizes import PRESETS, BlockSizes

LIGHT = """
import sys
from fluxjax.cli.main import main

for line in {lines!r}:
    try:
        main(line.split())
    except SystemExit as stopped:
        print("code", stopped.code)
print("modules", *sorted({{name.partition(".")[0] for name in sys.modules}}))
"""


def test_help_and_mistakes_are_shown_without_importing_jax():
    helped = ["--help", "--version", "lora --help"]
    wrong = [
        "",
        "draw",
        "generate",
        "generate star --steps 0",
        "generate star --seed -1",
        "generate star --dtype float64",
        "compare star --steps 8,8",
        "lora merge base",
        "convert tiny model --shard-size 5XB",
    ]
    found = subprocess.run(
        [sys.executable, "-c", LIGHT.format(lines=[*helped, *wrong])],
        capture_output=True,
        text=True,
    )
    lines = found.stdout.splitlines()
    codes = [line for line in lines if line.startswith("code")]
    assert codes == ["code 0"] * len(helped) + ["code 2"] * len(wrong), found.stderr
    assert found.stderr.count("fluxjax: ") == len(wrong)
    assert "Traceback" not in found.stderr
    modules = set(lines[-1].split())
    assert "fluxjax" in modules
    assert not modules & {"jax", "jaxlib", "equinox", "numpy", "beartype", "huggingface_hub"}


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "fluxjax", "--version"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout == f"fluxjax {main.__version__}\n"


@pytest.mark.parametrize("command", [*main.COMMANDS, *main.LORA_ACTIONS], ids=lambda c: c.name)
def test_every_command_has_its_function_and_its_help(command, capsys):
    assert callable(pkgutil.resolve_name(command.function))
    words = [command.name] if command in main.COMMANDS else ["lora", command.name]
    with pytest.raises(SystemExit) as stopped:
        main.main([*words, "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith(f"usage: fluxjax {' '.join(words)} ")
    assert "LazyChoices" not in text


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["generate"], choices.INTEGRATORS),
        (["generate"], choices.TIMERS),
        (["generate"], choices.RULES),
        (["generate"], choices.ATTENTIONS),
        (["generate"], choices.QUANTIZATIONS),
        (["generate"], choices.BLOCK_PRESETS),
        (["compare"], choices.INTEGRATORS),
        (["compare"], choices.TIMERS),
        (["convert"], choices.LAYOUTS),
        (["convert"], choices.NETWORKS),
        (["lora", "convert"], choices.LORA_FORMATS),
    ],
)
def test_help_lists_the_names_that_an_option_takes(words, names, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10000")  # argparse breaks lines at hyphens too
    with pytest.raises(SystemExit):
        main.main([*words, "--help"])
    assert ", ".join(names) in capsys.readouterr().out
    assert len(names) >= 2


def parse(*words):
    return main.build_parser().parse_args(list(words))


def test_options_are_read_as_values():
    read = parse(
        *("generate", "a star", "--steps", "3", "--rule", "apg", "--integrator", "heun"),
        *("--mesh", "data=2,fsdp=-1", "--flash-block-sizes", "256,128", "--eta", "0.5"),
        *("--lora", "tiny:kraft", "--lora", "mine=a:b.safetensors:0.5"),
    )
    assert (read.texts, read.steps, read.rule, read.integrator) == (["a star"], 3, "apg", "heun")
    assert read.mesh == {"data": 2, "fsdp": -1}
    assert read.flash_block_sizes == BlockSizes(q=256, kv=128)
    assert read.lora == [
        compound_options.Adapter("kraft", "tiny:kraft", 1.0),
        compound_options.Adapter("mine", "a:b.safetensors", 0.5),
    ]
    assert (read.images, read.seed, read.cfg, read.model) == (1, None, None, "tiny")
    read = parse("generate", "a star", "--aspect", "16:9", "--seeds", "3,4", "--first-image", "2")
    assert (read.aspect, read.seeds, read.first_image) == (16 / 9, [3, 4], 2)
    read = parse("compare", "a star", "--integrators", "heun,euler", "--steps", "4,2")
    assert (read.integrators, read.timers, read.steps) == (["heun", "euler"], ["model"], [4, 2])
    read = parse("lora", "merge", "dev", "hub:me/styles/a/b.safetensors:-2", "-o", "out")
    assert read.lora == [compound_options.Adapter("b", "hub:me/styles/a/b.safetensors", -2.0)]
    assert (read.only, read.shard_size) == (None, None)  # as run_convert needs them
    assert parse("convert", "tiny", "out", "--only", "t5", "--shard-size", "1.5 GB").lora == []


GENERATE = ["generate", "a star"]
COMPARE = ["compare", "a star"]
LORA = ["lora", "inspect"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([*GENERATE, "--steps", "0"], "--steps: needs a whole number from 1 to 10000, got '0'"),
        ([*GENERATE, "--images", "0"], "--images: needs a whole number from 1 to 1000000"),
        ([*GENERATE, "--batch", "0"], "--batch: needs a whole number from 1"),
        ([*GENERATE, "--seed", str(2**63)], "needs a whole number from 0 to 9223372036854775807"),
        ([*GENERATE, "--seed", "9" * 5000], "needs a whole number from 0"),
        ([*GENERATE, "--max-sequence-length", "0"], "needs a whole number from 1 to 65536"),
        ([*GENERATE, "--eta", "2"], "--eta: needs a number from 0 to 1, got '2'"),
        ([*GENERATE, "--cfg", "nan"], "--cfg: needs a finite number, got 'nan'"),
        ([*GENERATE, "--cfg", "1e39"], "--cfg: needs a finite number, got '1e39'"),
        ([*GENERATE, "--shift", "1e-39"], "--shift: needs a finite number above 0, got '1e-39'"),
        ([*GENERATE, "--output-dir", "a\0b"], "needs a path without NUL characters"),
        ([*GENERATE, "--rule", "sum"], "--rule: invalid choice: 'sum' (choose from"),
        ([*GENERATE, "--dtype", "half"], "--dtype: invalid choice: 'half' (choose from"),
        ([*GENERATE, "--flash-block-sizes", "1,2,3"], "or one of trillium, trillium-dev"),
        ([*GENERATE, "--mesh", "fsdp"], "needs axes and their sizes, as data=2,fsdp=4"),
        ([*GENERATE, "--mesh", "data=-1,fsdp=-1"], "one of which may be -1, got"),
        ([*GENERATE, "--mesh", "rows=2"], "there is no axis 'rows'; choose from data, fsdp"),
        ([*GENERATE, "--mesh", "data=2,data=4"], "data is given twice; leave one out"),
        ([*GENERATE, "--prompts", "lines.jsonl"], "not allowed with argument"),
        ([*GENERATE, "--aspect", "16x9"], "needs width:height, as 16:9, from 1:8 to 8:1"),
        ([*GENERATE, "--aspect", "9:1"], "needs width:height"),
        ([*GENERATE, "--aspect", "0:1"], "needs width:height"),
        ([*GENERATE, "--seeds", "1,1"], "1 is given twice; leave one out"),
        ([*GENERATE, "--seeds", "1", "--seed", "2"], "not allowed with argument"),
        (["generate"], "one of the arguments prompt --prompts --from is required"),
        ([*GENERATE, "a ring", "--prompt-2", "a"], "--prompt-2: not allowed with several prompts"),
        ([*GENERATE, "--output", "{seeds}.png"], "there is no field {seeds}; choose from prompt,"),
        ([*GENERATE, "--output", "{seed.real}.png"], "there is no field {seed.real}"),
        ([*GENERATE, "--output", "{}.png"], "there is no field {}"),
        ([*GENERATE, "--output", "{seed:q}.png"], "is not a pattern: Unknown format code 'q'"),
        ([*GENERATE, "--output", "{seed.png"], "is not a pattern: expected '}'"),
        ([*GENERATE, "--output", "{seed}.jpg"], "needs a name that ends in .png"),
        ([*GENERATE, "--output", "a.png", "--output-dir", "b"], "not allowed with argument"),
        ([*GENERATE, "--preview", "a.jpg"], "--preview: needs a name that ends in .png"),
        ([*COMPARE, "--integrators", "euler,eller"], "there is no 'eller'; choose from euler,"),
        ([*COMPARE, "--timers", "beta,beta"], "beta is given twice; leave one out"),
        ([*COMPARE, "--steps", "4,four"], "needs a whole number from 1 to 10000, got 'four'"),
        ([*LORA, "hub:me/styles"], "needs an adapter, as FILE:SCALE or hub:OWNER/REPO/FILE"),
        ([*LORA, "a.safetensors:inf"], "needs a finite scale after the colon"),
        (["convert", "tiny", "out", "--shard-size", "0"], "needs a size, as 5GB or 500MB, got '0'"),
        (["convert", "tiny", "out", "--only", "vit"], "invalid choice: 'vit' (choose from"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_2(words, reason, capsys):
    with pytest.raises(SystemExit) as stopped:
        main.main(words)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("fluxjax: argument ") or error.startswith("fluxjax: one of ")
    assert reason in error
    assert error.endswith("--help)\n")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        (["generat", "a"], "generate"),
        ([*GENERATE, "--integrator", "eulr"], "euler"),
        ([*GENERATE, "--stepz", "3"], "--steps"),
        ([*COMPARE, "--timers", "karas"], "karras"),
        ([*GENERATE, "--timer", "uniforn"], "uniform"),
    ],
)
def test_a_wrong_name_is_told_with_the_nearest_right_one(words, nearest, capsys):
    with pytest.raises(SystemExit):
        main.main(words)
    assert f"Did you mean '{nearest}'?" in capsys.readouterr().err


def test_block_sizes_may_be_one_number_or_a_preset():
    read = compound_options.BlockSizesReader()
    assert read("512") == BlockSizes(q=512)
    assert [read(name) for name in choices.BLOCK_PRESETS] == list(PRESETS.values())


def test_limits_that_are_known_before_anything_is_imported_are_those_of_their_owners():
    assert options.MAX_SEED == SEEDS - 1
    assert float(np.finfo(np.float32).max) == options.MAX_FLOAT32
    assert float(np.finfo(np.float32).tiny) == options.MIN_NORMAL_FLOAT32
    assert options.finite_number()(repr(options.MAX_FLOAT32)) == options.MAX_FLOAT32
    with pytest.raises(argparse.ArgumentTypeError):
        options.finite_number()(repr(math.nextafter(options.MAX_FLOAT32, math.inf)))
    assert set(choices.DTYPES) == {np.dtype(np.float32).name, "bfloat16", np.dtype(np.float16).name}


def test_a_command_line_in_utf8_is_read_as_such_where_the_locale_is_ascii():
    program = (
        "import sys; from fluxjax.cli.options import unicode_text as read; "
        "print(ascii(read(sys.argv[1])))"
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


@pytest.mark.parametrize(
    "words",
    [
        ("edit", "in.png", "a star", "--steps", "3"),
        ("edit", "in.png", "--steps", "3", "a star"),
        ("edit", "--steps", "3", "in.png", "a star"),
        ("restore", "--operator", "blur:2", "in.png", "--steps", "3", "a star"),
    ],
)
def test_the_prompt_may_follow_an_option(words):
    found = main.build_parser().parse_args(words)
    assert (str(found.picture), found.prompt, found.steps) == ("in.png", "a star", 3)


def test_several_prompts_may_stand_before_and_after_options():
    found = main.build_parser().parse_args(["generate", "a", "b", "--steps", "3", "c"])
    assert (found.texts, found.steps) == (["a", "b", "c"], 3)
    assert found.given == {"steps": ["--steps", "3"]}
    given = ["--cfg=-1", "--lora", "a:2", "--lora=b", "--unroll"]
    found = main.build_parser().parse_args(["generate", *given, "--", "-5 degrees"])
    assert found.texts == ["-5 degrees"]
    words = {"cfg": ["--cfg=-1"], "lora": ["--lora", "a:2", "--lora", "b"], "unroll": ["--unroll"]}
    assert found.given == words


def test_words_that_are_too_many_are_refused(capsys):
    with pytest.raises(SystemExit):
        main.build_parser().parse_args(["edit", "in.png", "--steps", "3", "a star", "a ring"])
    assert "unrecognized arguments: a ring" in capsys.readouterr().err
