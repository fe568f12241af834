"""Conversions write to names of their own: at once, over links, killed, interrupted and without hard links."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fluxjax import WeightsError, convert_weights, load_vae, read_lora, write_lora
from fluxjax.checkpoint.locate import shipped_lora, tiny_folder
from fluxjax.checkpoint.safetensors import OutputTensor, read_header, write
from fluxjax.cli.main import main as cli

# Runs one command after the other, each when its flag appears, so that several processes begin at once.
AT_ONCE = """
import json, os, sys, time, fluxjax.cli.main, fluxjax.weights
folder, *commands = sys.argv[1:]
for number, command in enumerate(commands):
    open(f"{folder}/ready-{number}-{os.getpid()}", "w").close()
    while not os.path.exists(f"{folder}/go-{number}"):
        time.sleep(0.001)
    try:
        fluxjax.cli.main.main(json.loads(command))
        print("code 0")
    except SystemExit as end:
        print("code", end.code)
"""


def run_at_once(folder, *processes):
    """Run processes of as many commands each; return what each wrote to its outputs."""
    folder.mkdir()
    calls = [
        [sys.executable, "-c", AT_ONCE, str(folder), *map(json.dumps, commands)]
        for commands in processes
    ]
    running = [
        subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for call in calls
    ]
    for number in range(len(processes[0])):
        while len(list(folder.glob(f"ready-{number}-*"))) < len(running):
            assert all(process.poll() is None for process in running)
            time.sleep(0.01)
        (folder / f"go-{number}").touch()
    return [process.communicate(timeout=120) for process in running]


def test_of_two_conversions_to_one_destination_the_first_wins_with_its_own_bytes(tmp_path):
    out = tmp_path / "out"
    kinds = [("float32", "own"), ("bfloat16", "diffusers")]
    outputs = run_at_once(
        tmp_path / "flags",
        *[
            [
                [
                    "convert",
                    "tiny",
                    str(out / "vae.safetensors"),
                    "--only",
                    "vae",
                    "--dtype",
                    dtype,
                ],
                ["convert", "tiny", str(out / "model"), "--to", layout],
            ]
            for dtype, layout in kinds
        ],
    )
    codes = [
        [int(line[5:]) for line in output.splitlines() if line.startswith("code ")]
        for output, _ in outputs
    ]
    assert [sorted(pair) for pair in zip(*codes, strict=True)] == [[0, 2], [0, 2]]
    assert sum(errors.count("There is something at") for _, errors in outputs) == 2
    assert sorted(os.listdir(out)) == ["model", "vae.safetensors"]
    dtype, layout = (kinds[[code[step] for code in codes].index(0)][step] for step in range(2))
    file = convert_weights("tiny", tmp_path / "alone.safetensors", only="vae", dtype=dtype)
    assert (out / "vae.safetensors").read_bytes() == file.read_bytes()
    alone = convert_weights("tiny", tmp_path / "alone", to=layout)
    assert contents(out / "model") == contents(alone)


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("kind", ["convert", "lora"])
def test_a_link_under_the_former_temporary_name_is_not_followed(tmp_path, kind):
    mine = tmp_path / "mine.txt"
    mine.write_text("precious")
    (tmp_path / ".o.safetensors.part").symlink_to(mine)
    target = str(tmp_path / "o.safetensors")
    source = (
        ["convert", "tiny", target, "--only", "vae"]
        if kind == "convert"
        else ["lora", "convert", "tiny:kraft", target]
    )
    cli.main(source)
    assert mine.read_text() == "precious"
    assert (tmp_path / ".o.safetensors.part").readlink() == mine
    assert not Path(target).is_symlink()
    assert read_header(Path(target)).tensors


def test_a_users_folder_under_the_former_temporary_name_stays(tmp_path):
    (tmp_path / ".model.part").mkdir()
    (tmp_path / ".model.part" / "mine.txt").write_text("precious")
    convert_weights("tiny", tmp_path / "model", only="vae")
    assert (tmp_path / ".model.part" / "mine.txt").read_text() == "precious"


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_appears_while_another_is_written_stays(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", _refuse_link)
    target = tmp_path / "vae.safetensors"
    with pytest.raises(FileExistsError, match="There is something at"):
        convert_weights("tiny", target, only="vae", progress=lambda *_: target.write_text("mine"))
    assert target.read_text() == "mine"
    assert os.listdir(tmp_path) == ["vae.safetensors"]


def _refuse_link(*arguments, **options):
    raise OSError(errno.EPERM, "no hard links here")


def test_a_file_system_without_hard_links_takes_conversions(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", _refuse_link)
    file = convert_weights("tiny", tmp_path / "vae.safetensors", only="vae")
    folder = convert_weights("tiny", tmp_path / "model", only="vae")
    assert file.read_bytes() == (folder / "vae.safetensors").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["model", "vae.safetensors"]


KILLED = """
import os, signal, sys, fluxjax
def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)
def convert_another(*_):
    fluxjax.convert_weights("tiny", sys.argv[1] + "/vae.safetensors", only=["vae"], progress=kill)
fluxjax.convert_weights("tiny", sys.argv[1] + "/model", only=["vae"], progress=convert_another)
"""


def test_what_a_killed_conversion_left_is_removed_by_the_next(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)])
    assert done.returncode == -signal.SIGKILL
    assert [name.split(".")[1] for name in sorted(os.listdir(tmp_path))] == [
        "model",
        "vae",
    ]  # both hidden
    load_vae(convert_weights("tiny", tmp_path / "model", only="vae"))
    load_vae(convert_weights("tiny", tmp_path / "vae.safetensors", only="vae"))
    assert sorted(os.listdir(tmp_path)) == ["model", "vae.safetensors"]


def test_a_destination_may_lie_anywhere_but_needs_a_name(tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    cli.main(["convert", "tiny", "../name", "--only", "vae"])
    cli.main(["convert", "tiny", "../name.safetensors", "--only", "vae"])
    assert sorted(os.listdir(tmp_path)) == ["here", "name", "name.safetensors"]
    capsys.readouterr()
    for name, rule in {
        "": "needs a name",
        ".": "needs a name",
        "..": "needs a name",
        "/": "needs a name",
        ".safetensors": "needs a name",
        "a/.SafeTensors": "needs a name",
        "a.gguf": "End the name in .safetensors",
        "flux.sft": "End the name in .safetensors",
    }.items():
        with pytest.raises(SystemExit) as end:
            cli.main(["convert", "tiny", name, "--only", "vae"])
        error = capsys.readouterr().err
        assert end.value.code == 2
        assert rule in error
        assert error.count("\n") == 1
    assert os.listdir() == []


@pytest.mark.parametrize(
    "dtype", ["complex64", "no dtype", "int8", object, "float8_e4m3", "float8_e8m0fnu"]
)
def test_a_dtype_that_weights_are_not_written_in_is_refused(tmp_path, dtype):
    for only in ("vae", "t5"):
        with pytest.raises(
            ValueError,
            match=r"`convert_weights\(dtype\)` writes floats of 32 bits or fewer, got .*Pass float32",
        ):
            convert_weights("tiny", tmp_path / "out", only=only, dtype=dtype)
    assert os.listdir(tmp_path) == []


def test_damaged_defaults_are_found_before_anything_is_written(tmp_path):
    folder = convert_weights("tiny", tmp_path / "model", only="flux")
    (folder / "fluxjax.json").write_text('{"steps": null}')
    written = []
    with pytest.raises(WeightsError, match="'steps' should be an integer"):
        convert_weights(folder, tmp_path / "again", progress=lambda *count: written.append(count))
    assert written == []
    assert os.listdir(tmp_path) == ["model"]


def test_only_the_files_of_a_tokenizers_folder_are_copied(tmp_path):
    model = tmp_path / "model"
    convert_weights("tiny", model, only=["clip"])
    (model / "tokenizer" / "itself").symlink_to(model / "tokenizer")
    os.mkfifo(model / "tokenizer" / "pipe")
    again = convert_weights(model, tmp_path / "again")
    assert sorted(os.listdir(again / "tokenizer")) == sorted(
        os.listdir(tiny_folder() / "tokenizer")
    )


def test_an_adapter_is_written_over_another_only_when_that_is_allowed(tmp_path):
    lora, path = read_lora(shipped_lora("kraft")), tmp_path / "a.safetensors"
    write_lora(path, lora)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="There is something at"):
        write_lora(path, lora, to="kohya")
    assert path.read_bytes() == before
    write_lora(path, lora, to="kohya", overwrite=True)
    assert path.read_bytes() != before
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_write_that_fails_leaves_nothing(tmp_path):
    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a", {"x": OutputTensor.of(np.ones(3))}, report=stop)
    assert os.listdir(tmp_path) == []
