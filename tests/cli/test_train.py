"""`fluxjax train`: from images to files, in few steps, and ended by a signal."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from photos import write_photos

import fluxjax
from fluxjax.cli.main import main

CONFIG = """
model = "tiny"
output = "{output}"
steps = 2
batch = 2
ema = 0.5
{more}
[train]
method = "{method}"
rank = 2
targets = ['single\\.\\d\\.linear2']

[checkpoints]
every = 1

[log]
every = 1

[mesh]
data = 1

[data]
sources = "photos"
size = 32
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    write_photos(folder / "photos", count=3, side=40)
    return folder


@pytest.fixture(autouse=True)
def standard_promotion():
    """Users, and optax, leave JAX's promotion of dtypes as it is, also in the worker's thread."""
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    yield
    jax.config.update("jax_numpy_dtype_promotion", "strict")


def write(folder, name, output, method="lora", more=""):
    path = folder / name
    path.write_text(CONFIG.format(output=folder / output, method=method, more=more))
    return str(path)


def test_a_folder_of_images_becomes_an_adapter(folder, capsys):
    config = write(folder, "a.toml", "style.safetensors")
    with jax.numpy_dtype_promotion("standard"):
        main(["train", config, "--dry-run"])
        assert "TFLOP for each step" in capsys.readouterr().out
        main(["train", config])
    assert len(fluxjax.read_lora(folder / "style.safetensors").changes["flux"]) == 4
    lines = [json.loads(line) for line in (folder / "style-log" / "log.jsonl").open()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(np.isfinite(line["loss"]) for line in lines)
    with pytest.raises(SystemExit):  # the output exists
        main(["train", config])


def test_layers_become_a_whole_model(folder):
    config = write(folder, "b.toml", "tuned", method="layers")
    with jax.numpy_dtype_promotion("standard"):
        main(["train", config, "--set", "optimizer.name=lion", "--set", "data.max_length=9"])
    tuned, base = fluxjax.load_models(folder / "tuned"), fluxjax.load_models("tiny")
    assert tuned.defaults.max_length == 9
    assert not np.array_equal(
        tuned.flux.single.linear2.weight.value, base.flux.single.linear2.weight.value
    )
    np.testing.assert_array_equal(
        tuned.flux.double.img.qkv.weight.value, base.flux.double.img.qkv.weight.value
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "stesp=3"], "Did you mean steps?"),
        (["--set", "train.targets=['nothing']"], "match no"),
        (["--set", "no value"], "needs a name and a value"),
        (["--model", "no-such-model"], "no-such-model"),
    ],
)
def test_a_mistake_is_one_line(folder, capsys, options, message):
    config = write(folder, "c.toml", "other.safetensors")
    with pytest.raises(SystemExit) as error:
        main(["train", config, *options])
    assert error.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]


def test_a_signal_writes_a_checkpoint_and_the_same_command_goes_on(folder):
    config = write(folder, "d.toml", "stopped.safetensors")
    command = [sys.executable, "-m", "fluxjax", "train", config, "--set", "steps=100000"]
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    log = folder / "stopped-log" / "log.jsonl"
    end = time.monotonic() + 300
    while not log.exists() and time.monotonic() < end:
        time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "stopped by SIGTERM" in errors
    done = max(int(path.name) for path in (folder / "stopped-checkpoints").iterdir())
    with jax.numpy_dtype_promotion("standard"):
        main(["train", config, "--set", f"steps={done + 1}"])
    assert (folder / "stopped.safetensors").is_file()
