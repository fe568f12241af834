"""A training that is killed again and again ends with the weights of one that was left alone.

`tests/train/test_checkpoints.py` has another mesh in one process.
"""

import multiprocessing
import shutil
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jobs import start_job
from meshes import relative
from photos import write_photos
from safetensors.numpy import load_file

from fluxjax.cli.main import main

STEPS, KEPT, KILLS = 10, 4, 10
CONFIG = f"""
model = "tiny"
output_dtype = "float32"
steps = {STEPS}
batch = 2
ema = 0.5

[train]
method = "layers"
targets = ['single\\.[03]\\.linear2', 'final\\.linear']

[optimizer]
learning_rate = 1e-3

[checkpoints]
every = 1
keep_every = {KEPT}

[log]
every = 1

[mesh]
data = 1

[data]
sources = "photos"
cache = "encoded"
size = 32
"""


def run(arguments: list[str]) -> None:
    """Run the command line in a process that was forked before JAX was used."""
    jax.config.update("jax_disable_most_optimizations", True)
    main(arguments)


class Trainings:
    """Trainings of one configuration, each in processes of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        # The processes are forked from one that has imported everything, which takes seconds.
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["fluxjax.cli.train", "fluxjax.nets", "optax"])

    def arguments(self, name: str, *settings: str) -> list[str]:
        path, cache = self.folder / f"{name}.safetensors", self.folder / "compiled"
        arguments = ["train", str(self.folder / "all.toml"), "--output", str(path)]
        for setting in settings:
            arguments += ["--set", setting]
        return [*arguments, "--compilation-cache", str(cache)]

    def start(self, arguments: list[str]):
        process = self.context.Process(target=run, args=(arguments,), daemon=True)
        process.start()
        return process

    def finish(self, arguments: list[str]) -> None:
        process = self.start(arguments)
        process.join(timeout=300)
        assert process.exitcode == 0

    def weights(self, name: str) -> dict[str, np.ndarray]:
        return load_file(self.folder / f"{name}.safetensors")

    def steps_done(self, name: str) -> int:
        """Return the last step whose checkpoint is begun or complete."""
        folder = self.folder / f"{name}-checkpoints"
        names = [path.name.partition(".")[0] for path in folder.glob("[0-9]*")]
        return max(map(int, names), default=0)

    def copy_checkpoint(self, name: str, other: str) -> None:
        """Let another training go on from the checkpoint that is kept."""
        place = f"{other}-checkpoints/{KEPT}"
        shutil.copytree(self.folder / f"{name}-checkpoints" / str(KEPT), self.folder / place)


@pytest.fixture(scope="module")
def trainings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    write_photos(folder / "photos", count=5, side=32)
    (folder / "all.toml").write_text(CONFIG)
    trainings = Trainings(folder)
    trainings.finish(["encode", str(folder / "all.toml"), "--batch", "5"])
    return trainings


@pytest.fixture(scope="module")
def whole(trainings):
    """The weights without an interruption."""
    trainings.finish(trainings.arguments("whole"))
    return trainings.weights("whole")


def test_killed_at_ten_moments_it_ends_with_the_same_weights(trainings, whole):
    rng = np.random.default_rng(3)
    for moment in np.sort(rng.integers(0, STEPS - 2, KILLS)):
        process = trainings.start(trainings.arguments("killed"))
        # Anywhere from the first import on, while a checkpoint is written or a step is taken.
        while trainings.steps_done("killed") < moment and process.is_alive():
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        assert process.is_alive()
        process.kill()
        process.join()
    assert not (trainings.folder / "killed.safetensors").exists()
    trainings.finish(trainings.arguments("killed"))
    weights = trainings.weights("killed")
    for name, expected in whole.items():
        np.testing.assert_array_equal(weights[name], expected, err_msg=name)


def test_it_goes_on_in_two_processes(trainings, whole):
    trainings.copy_checkpoint("whole", "shared")
    arguments = trainings.arguments("shared", "mesh.data=2")
    job = start_job(arguments, 2, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    outputs = [process.communicate(timeout=300) for process in job]
    assert [process.returncode for process in job] == [0, 0], outputs
    for name, found in trainings.weights("shared").items():
        assert relative(found, whole[name]) <= 1e-5, name
