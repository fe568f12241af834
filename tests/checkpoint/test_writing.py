"""Writing is atomic: with concurrent and killed writers, over links, and without hard links."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fluxjax import WeightsError, convert_weights, load_vae, read_lora, write_lora
from fluxjax.checkpoint.safetensors import read_header
from fluxjax.checkpoint.safetensors_writer import OutputTensor, write_safetensors
from fluxjax.checkpoint.shipped import shipped_lora, tiny_folder
from fluxjax.cli import main as cli

# Runs a list of commands in each of several processes; all begin each command at the same time.
# They are forked, so that the package is imported once.
AT_ONCE = """
import json, multiprocessing, os, sys
import fluxjax.checkpoint.convert, fluxjax.cli.main

def run(number, commands):
    for name, descriptor in (("out", 1), ("err", 2)):
        file = os.open(f"{sys.argv[1]}/{name}-{number}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
    for command in commands:
        barrier.wait()
        try:
            fluxjax.cli.main.main(command)
            print("code 0")
        except SystemExit as end:
            print("code", end.code)

lists = json.loads(sys.argv[2])
fork = multiprocessing.get_context("fork")
barrier = fork.Barrier(len(lists))
processes = [fork.Process(target=run, args=item) for item in enumerate(lists)]
for process in processes:
    process.start()
for process in processes:
    process.join()
"""


def run_at_once(folder, *lists):
    """Run lists of commands in processes of their own; return the output and errors of each."""
    folder.mkdir()
    command = [sys.executable, "-c", AT_ONCE, str(folder), json.dumps(lists)]
    subprocess.run(command, check=True, timeout=120)
    outputs = []
    for number in range(len(lists)):
        output = (folder / f"out-{number}").read_text()
        outputs.append((output, (folder / f"err-{number}").read_text()))
    return outputs


def test_of_two_conversions_to_one_path_one_succeeds_with_its_own_bytes(tmp_path):
    out = tmp_path / "out"
    kinds = [("float32", "own"), ("bfloat16", "diffusers")]
    lists = []
    for dtype, layout in kinds:
        file = str(out / "vae.safetensors")
        lists.append(
            [
                ["convert", "tiny", file, "--only", "vae", "--dtype", dtype],
                ["convert", "tiny", str(out / "model"), "--only", "clip", "--to", layout],
            ]
        )
    outputs = run_at_once(tmp_path / "outputs", *lists)
    codes = []
    for output, _ in outputs:
        lines = [line for line in output.splitlines() if line.startswith("code ")]
        codes.append([int(line.removeprefix("code ")) for line in lines])
    # One process succeeded at each step, maybe not the same one.
    assert [sorted(pair) for pair in zip(*codes, strict=True)] == [[0, 2], [0, 2]], outputs
    assert sum(errors.count("already exists") for _, errors in outputs) == 2
    assert sorted(os.listdir(out)) == ["model", "vae.safetensors"]
    winners = [[code[step] for code in codes].index(0) for step in range(2)]
    dtype, layout = kinds[winners[0]][0], kinds[winners[1]][1]
    file = convert_weights("tiny", tmp_path / "alone.safetensors", only="vae", dtype=dtype)
    assert (out / "vae.safetensors").read_bytes() == file.read_bytes()
    alone = convert_weights("tiny", tmp_path / "alone", only="clip", to=layout)
    assert contents(out / "model") == contents(alone)


def contents(folder):
    """Return the content of each file below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("kind", ["convert", "lora"])
def test_a_link_under_an_old_temporary_name_is_not_followed(tmp_path, kind):
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


def test_a_folder_under_an_old_temporary_name_stays(tmp_path):
    (tmp_path / ".model.part").mkdir()
    (tmp_path / ".model.part" / "mine.txt").write_text("precious")
    convert_weights("tiny", tmp_path / "model", only="vae")
    assert (tmp_path / ".model.part" / "mine.txt").read_text() == "precious"


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_is_created_during_a_conversion_stays(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", _refuse_link)
    target = tmp_path / "vae.safetensors"
    with pytest.raises(FileExistsError, match="already exists"):
        convert_weights("tiny", target, only="vae", progress=lambda *_: target.write_text("mine"))
    assert target.read_text() == "mine"
    assert os.listdir(tmp_path) == ["vae.safetensors"]


def _refuse_link(*arguments, **options):
    raise OSError(errno.EPERM, "no hard links here")


def test_conversions_need_no_hard_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", _refuse_link)
    file = convert_weights("tiny", tmp_path / "vae.safetensors", only="vae")
    folder = convert_weights("tiny", tmp_path / "model", only="vae")
    assert file.read_bytes() == (folder / "vae.safetensors").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["model", "vae.safetensors"]


KILLED = """
import os, signal, sys
from fluxjax.checkpoint.convert import convert_weights
def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)
def convert_another(*_):
    convert_weights("tiny", sys.argv[1] + "/vae.safetensors", only=["vae"], progress=kill)
convert_weights("tiny", sys.argv[1] + "/model", only=["vae"], progress=convert_another)
"""


def test_the_next_conversion_removes_what_a_killed_one_left(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)])
    assert done.returncode == -signal.SIGKILL
    left = sorted(os.listdir(tmp_path))
    assert [name.split(".")[:2] for name in left] == [["", "model"], ["", "vae"]]
    load_vae(convert_weights("tiny", tmp_path / "model", only="vae"))
    load_vae(convert_weights("tiny", tmp_path / "vae.safetensors", only="vae"))
    assert sorted(os.listdir(tmp_path)) == ["model", "vae.safetensors"]


def test_a_destination_may_be_anywhere_but_needs_a_name(tmp_path, monkeypatch, capfd):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    cli.main(["convert", "tiny", "../name", "--only", "vae"])
    cli.main(["convert", "tiny", "../name.safetensors", "--only", "vae"])
    assert sorted(os.listdir(tmp_path)) == ["here", "name", "name.safetensors"]
    capfd.readouterr()
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
        error = capfd.readouterr().err
        assert end.value.code == 2
        assert rule in error
        assert error.count("\n") == 1
    assert os.listdir() == []


@pytest.mark.parametrize(
    "dtype", ["complex64", "no dtype", "int8", object, "float8_e4m3", "float8_e8m0fnu"]
)
def test_a_dtype_that_weights_are_not_written_in_is_refused(tmp_path, dtype):
    rule = r"`convert_weights\(dtype\)` writes floats of 32 bits or fewer, got .*Pass float32"
    for only in ("vae", "t5"):
        with pytest.raises(ValueError, match=rule):
            convert_weights("tiny", tmp_path / "out", only=only, dtype=dtype)
    assert os.listdir(tmp_path) == []


def test_damaged_defaults_are_an_error_before_anything_is_written(tmp_path):
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
    with pytest.raises(FileExistsError, match="already exists"):
        write_lora(path, lora, to="kohya")
    assert path.read_bytes() == before
    write_lora(path, lora, to="kohya", overwrite=True)
    assert path.read_bytes() != before
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_write_that_fails_leaves_nothing(tmp_path):
    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_safetensors(tmp_path / "a", {"x": OutputTensor.from_array(np.ones(3))}, report=stop)
    assert os.listdir(tmp_path) == []
