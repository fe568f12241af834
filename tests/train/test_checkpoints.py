"""A training that was stopped goes on as if it had not been; what can't be continued is refused."""

import errno
from dataclasses import replace

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from meshes import mesh_of
from test_mesh_step import relative
from training import ListedBatches, batch_of, random_flux

from fluxjax.train.checkpoints import Checkpoints, Retention
from fluxjax.train.config import MethodSettings, TrainConfig
from fluxjax.train.loop import TrainHooks, run_steps
from fluxjax.train.optimizers import OptimizerSettings
from fluxjax.train.setup import identity_of, set_up_training
from fluxjax.zoo import Defaults

CONFIG = TrainConfig(
    model="random",
    steps=5,
    ema=0.5,
    seed=4,
    train=MethodSettings(method="layers", targets=(r"double\.1\.img\..*", "img_in")),
    optimizer=OptimizerSettings(learning_rate=1e-2, schedule="cosine", warm_up=2),
)
STEPS = CONFIG.steps


class StopBefore(TrainHooks):
    """Ends the loop when so many steps are done."""

    def __init__(self, steps):
        self.left = steps

    def stops(self):
        self.left -= 1
        return self.left < 0


@pytest.fixture(scope="module")
def setups():
    """The same training on one device, and on a mesh."""
    with jax.numpy_dtype_promotion("standard"):
        meshes = {"one device": mesh_of(), "mesh": mesh_of(fsdp=2, data=2)}
        return {
            name: set_up_training(CONFIG, random_flux(), mesh, Defaults())
            for name, mesh in meshes.items()
        }


def batches():
    return ListedBatches([batch_of(2, seed=number) for number in range(3)])


def train(setup, state, stream, steps=STEPS, hooks=None):
    with jax.numpy_dtype_promotion("standard"):
        hooks = TrainHooks() if hooks is None else hooks
        return run_steps(setup, state, stream, steps=steps, hooks=hooks)


@pytest.fixture(scope="module")
def whole(setups):
    """The state after all steps without an interruption."""
    return train(setups["one device"], setups["one device"].first_state(), batches())


@pytest.fixture
def half(setups, tmp_path):
    """Checkpoints of a training that was stopped after a number of steps of its own."""
    setup, stream = setups["one device"], batches()
    checkpoints = Checkpoints(tmp_path / "kept", identity_of(CONFIG, setup))
    done = int(np.random.default_rng().integers(1, STEPS))
    state = train(setup, setup.first_state(), stream, hooks=StopBefore(done))
    checkpoints.save(state, stream.state())
    # The state may be donated at once: the checkpoint is a copy.
    train(setup, state, stream, hooks=StopBefore(1))
    checkpoints.wait()
    assert checkpoints.latest() == done
    return checkpoints


@pytest.mark.parametrize("name", ["one device", "mesh"])
def test_a_stopped_training_goes_on_as_if_it_had_not_been(setups, whole, half, name):
    setup, stream = setups[name], batches()
    state, place = half.restore(setup.state_shapes())
    stream.restore(place)
    state = train(setup, state, stream)
    if name == "one device":
        for found, expected in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
            np.testing.assert_array_equal(found, expected)
    else:
        assert relative(state, whole) <= 1e-5


def test_a_checkpoint_of_another_training_is_refused_with_both_named(setups, half):
    setup = setups["one device"]
    other = replace(CONFIG, model="dev", seed=5)
    elsewhere = Checkpoints(half.folder, identity_of(other, setup))
    with pytest.raises(ValueError, match=r"model 'random', not 'dev'; seed 4, not 5\. Use the"):
        elsewhere.restore(setup.state_shapes())


def test_a_folder_without_checkpoints_says_so(setups, tmp_path):
    checkpoints = Checkpoints(tmp_path / "none", {})
    assert checkpoints.latest() is None
    with pytest.raises(FileNotFoundError, match="There is no checkpoint"):
        checkpoints.restore(setups["one device"].state_shapes())


def test_the_last_ones_and_those_at_multiples_stay(setups, tmp_path):
    setup = setups["one device"]
    state = setup.first_state()
    checkpoints = Checkpoints(tmp_path / "kept", {}, kept=Retention(last=1, every=4))
    for step in range(1, 7):
        numbered = replace_step(state, step)
        checkpoints.save(numbered, {})
        checkpoints.wait()
    assert sorted(int(path.name) for path in (tmp_path / "kept").iterdir()) == [4, 6]


def replace_step(state, step):
    return jax.tree.unflatten(
        jax.tree.structure(state), [*jax.tree.leaves(state)[:-1], jax.numpy.int32(step)]
    )


def test_on_a_full_disk_the_previous_checkpoint_is_whole(setups, half, monkeypatch):
    def fail(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    setup = setups["one device"]
    before = half.latest()
    with monkeypatch.context() as patched:
        patched.setattr(ocp.StandardCheckpointHandler, "async_save", fail)
        with pytest.raises(OSError, match=r"not enough disk space for a checkpoint in .* whole"):
            half.save(replace_step(setup.first_state(), 99), {})
    again = Checkpoints(half.folder, identity_of(CONFIG, setup))
    assert again.latest() == before
    assert int(again.restore(setup.state_shapes()).state.step) == before
