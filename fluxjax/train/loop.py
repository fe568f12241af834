"""The loop of a training: steps one after another, and what is done between them."""

from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from fluxjax.shapes import Array
from fluxjax.train.batch import AbstractBatches
from fluxjax.train.config import TrainConfig
from fluxjax.train.cost import StepCost, TokenCounts, forward_flop, step_cost, training_flop
from fluxjax.train.mesh_step import StepMetrics, TrainStep
from fluxjax.train.parts import TrainedLayers
from fluxjax.train.place import StepRows, batch_shapes, place_batch
from fluxjax.train.setup import TrainingSetup
from fluxjax.train.step import TrainState
from fluxjax.train.watch import StepReport


class TrainHooks:
    """What the loop calls between steps. Subclasses replace what they need."""

    def after_step(self, state: TrainState, report: StepReport) -> None:
        """Called after each step was dispatched; its numbers may still be computed."""

    def stops(self) -> bool:
        """Return whether to end before the next step."""
        return False


def run_steps(
    setup: TrainingSetup,
    state: TrainState,
    batches: AbstractBatches,
    *,
    steps: int,
    hooks: TrainHooks,
) -> TrainState:
    """Return the state after `steps` steps in all, or earlier if the hooks stop.

    The state that is passed is donated: use the one that is returned.

    **Arguments:** `state`: from `TrainingSetup.first_state`, or restored. `batches`: at the place
    behind the state's last step.
    """
    empty = batches.empty_text()
    accumulate = setup.step.settings.accumulate
    for number in range(int(state.step) + 1, steps + 1):
        if hooks.stops():
            break
        batch = next(batches)
        rows, shared = place_batch(batch, empty, setup.mesh, accumulate=accumulate)
        state, metrics = jit_step(setup.step, state, setup.frozen, rows, shared, setup.key)
        images = int(np.sum(np.asarray(batch.weight) > 0)) * jax.process_count()
        flop = images * example_flop(setup, rows)
        hooks.after_step(state, StepReport(number, metrics, images, flop))
    return state


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def jit_step(
    step: TrainStep, state: TrainState, frozen: PyTree, *inputs: PyTree
) -> tuple[TrainState, StepMetrics]:
    """Take a step; it is compiled for each shape of a batch, and reuses the state's memory.

    **Arguments:** `inputs`: rows, what they share, and the key, as for `TrainStep`.
    """
    return step(state, frozen, *inputs)


class LoweredStep(NamedTuple):
    """A step that is not compiled yet. `flop`: its operations by formula, over all devices."""

    lowered: jax.stages.Lowered
    flop: float


def lower_step(setup: TrainingSetup, config: TrainConfig) -> LoweredStep:
    """Lower a step for shapes alone.

    Images have `data.size`, or the model's own size.

    **Arguments:** `setup`: from `training_shapes`.
    """
    defaults, mesh = setup.defaults, setup.mesh
    side = config.data.size
    size = (defaults.height, defaults.width) if side is None else (side, side)
    multiple = config.accumulate * mesh.shape["data"] * mesh.shape["fsdp"]
    rows, shared = batch_shapes(
        setup.network,
        size,
        config.data.max_length or defaults.max_length,
        mesh,
        rows=-(-config.batch // multiple) * multiple,
        features=_appended_features(setup, config),
        reference=config.data.condition == "reference",
    )
    inputs = (setup.state_shapes(), setup.frozen, rows, shared, setup.key)
    return LoweredStep(
        jit_step.lower(setup.step, *inputs), config.batch * example_flop(setup, rows)
    )


def compile_step(setup: TrainingSetup, config: TrainConfig) -> StepCost:
    """Compile a step for shapes alone, and return its cost. Arguments as for `lower_step`."""
    lowered, flop = lower_step(setup, config)
    return step_cost(lowered.compile(), flop, setup.mesh.devices.flat[0])


def _appended_features(setup: TrainingSetup, config: TrainConfig) -> int:
    """Return how many features each token has beside those of the latent."""
    sizes = setup.network.config
    added = config.train.extra_features if config.train.is_adapter else 0
    return sizes.in_channels - sizes.out_channels + added


def example_flop(setup: TrainingSetup, rows: StepRows) -> float:
    """Return the operations of the loss of an example of a batch, and of its gradient."""
    img, txt = rows.latents.shape[1], rows.text.txt.shape[1]
    if rows.reference_tokens is not None:
        img += rows.reference_tokens.shape[1]
    is_full = isinstance(setup.step.part, TrainedLayers)
    trained = setup.weights if is_full else {}
    tokens = TokenCounts(img, txt)
    flop = training_flop(setup.network, tokens, trained)
    if setup.step.loss.is_distillation:
        # The teacher and the student are evaluated for what the student is compared with.
        flop += 2 * forward_flop(setup.network, tokens)
    return flop


def weights_to_write(state: TrainState) -> dict[str, Array]:
    """Return the weights that a training results in: their average, if there is one."""
    return state.model if state.ema is None else state.ema


def stored_weights(setup: TrainingSetup, state: TrainState) -> dict[str, Array]:
    """Return `weights_to_write` in the dtypes that are trained, as they will be used."""
    stored = {}
    for name, leaf in weights_to_write(state).items():
        stored[name] = leaf.astype(setup.weights[name].dtype)
    return stored


def agree_to_stop(wants: bool) -> bool:
    """Return whether any process wants to stop; all processes call it at the same step."""
    if jax.process_count() == 1:
        return wants
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.asarray(wants))))
