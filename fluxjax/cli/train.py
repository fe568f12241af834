"""The command `fluxjax train`: a training from its configuration to its files."""

import argparse
import shutil
from pathlib import Path

import jax

from fluxjax.checkpoint.defaults import load_defaults
from fluxjax.cli.compilation_cache import use_cache
from fluxjax.cli.console import (
    PendingSignal,
    Stopped,
    complain,
    deferred_signals,
    interruptible,
)
from fluxjax.cli.jobs import join_job
from fluxjax.cli.train_validation import Validation, make_validation, opened_batches
from fluxjax.generate.limits import check_devices
from fluxjax.kernels.chips import peak_flops
from fluxjax.train.batch import AbstractBatches
from fluxjax.train.checkpoints import Checkpoints, Retention
from fluxjax.train.config import TrainConfig, train_config, with_overrides
from fluxjax.train.config_file import read_config
from fluxjax.train.cost import StepCost
from fluxjax.train.encoders import Encoders, load_encoders
from fluxjax.train.export import check_output, write_result
from fluxjax.train.loop import (
    TrainHooks,
    agree_to_stop,
    compile_step,
    run_steps,
    weights_to_write,
)
from fluxjax.train.setup import (
    TrainingSetup,
    identity_of,
    known_shapes,
    load_training,
    training_mesh,
    training_shapes,
)
from fluxjax.train.step import TrainState
from fluxjax.train.watch import StepReport, Watch


def run_train(options: argparse.Namespace) -> None:
    """Train as the configuration and the options say."""
    if options.distributed:
        join_job()
    check_devices()
    use_cache(options.compilation_cache)
    run_training(read_training(options), dry_run=options.dry_run, restart=options.restart)


def run_training(config: TrainConfig, *, dry_run: bool = False, restart: bool = False) -> None:
    """Train as a configuration says, and print the path of the result.

    **Arguments:** `dry_run`: print what a step costs, and do nothing else. `restart`: begin anew,
    although there are checkpoints.
    **Raises:** `ValueError` and `OSError` for what can't be trained; `Stopped` after a signal.
    """
    if dry_run:
        cost = interruptible(_step_cost, config)
        print(cost.report())
        cost.check()
        return
    check_output(config)
    try:
        mesh = training_mesh(config)
        setup = interruptible(load_training, config, mesh)
        encoders = interruptible(_encoders, config)
        with opened_batches(config, config.data, encoders) as batches:
            path = _train(config, setup, batches, encoders, restart=restart)
    except (ImportError, FloatingPointError) as error:
        raise ValueError(str(error)) from None
    print(path)


def read_training(options: argparse.Namespace) -> TrainConfig:
    """Return the configuration, with what options set in its place."""
    values, folder = read_config(options.config), options.config.parent
    overrides = list(options.settings)
    for name in ("model", "output", "steps"):
        value = getattr(options, name)
        if value is not None:
            overrides.append((name, str(value) if isinstance(value, Path) else value))
    return train_config(with_overrides(values, overrides), folder)


def _encoders(config: TrainConfig) -> Encoders | None:
    """Return the encoders, if the data are not encoded yet or images are drawn.

    Encoded data need none, which leaves their memory, most of it T5's, to the training.
    """
    if config.data.cache is not None and not config.validation.prompts:
        return None
    return load_encoders(config.model, dtype=config.dtype)


def _step_cost(config: TrainConfig) -> StepCost:
    """Return the cost of a step; neither weights nor data are read."""
    shapes = known_shapes(config)
    mesh = training_mesh(config)
    return compile_step(training_shapes(config, shapes, mesh, load_defaults(config.model)), config)


def _train(
    config: TrainConfig,
    setup: TrainingSetup,
    batches: AbstractBatches,
    encoders: Encoders | None,
    *,
    restart: bool,
) -> Path:
    """Train, and write what results.

    **Arguments:** `batches`: of the training's data, at their beginning. `encoders`: for the images
    of validations. `restart`: remove the checkpoints first.
    **Returns:** the path of what was written.
    **Raises:** `Stopped` after a signal, once there is a checkpoint.
    """
    if restart and jax.process_index() == 0:
        shutil.rmtree(config.checkpoint_folder, ignore_errors=True)
    kept = Retention(last=config.checkpoints.keep, every=config.checkpoints.keep_every)
    checkpoints = Checkpoints(config.checkpoint_folder, identity_of(config, setup), kept=kept)
    state = interruptible(_first_state, setup, checkpoints, batches)
    for line in batches.broken():
        complain(f"left out: {line}")
    watch = Watch(
        config.log_folder,
        first=int(state.step),
        steps=config.steps,
        rates=config.optimizer,
        every=config.log.every,
        peak=_peak(setup),
        tensorboard=config.log.tensorboard,
        silent=jax.process_index() > 0,
    )
    validation = interruptible(make_validation, config, setup, batches, encoders, watch)
    with deferred_signals() as pending:
        hooks = _Hooks(config, batches, checkpoints, watch, validation, pending)
        try:
            state = run_steps(setup, state, batches, steps=config.steps, hooks=hooks)
        finally:
            watch.close()
        checkpoints.save(state, batches.state())
        checkpoints.close()
    if pending.number is not None and int(state.step) < config.steps:
        complain(f"wrote step {int(state.step)} to {config.checkpoint_folder}")
        raise Stopped(pending.number)
    return interruptible(write_result, config, setup, weights_to_write(state))


def _first_state(
    setup: TrainingSetup, checkpoints: Checkpoints, batches: AbstractBatches
) -> TrainState:
    """Return the state to go on from: of the last checkpoint, or of the beginning."""
    if checkpoints.latest() is None:
        return setup.first_state()
    state, place = checkpoints.restore(setup.state_shapes())
    batches.restore(place)
    complain(f"goes on from step {int(state.step)} in {checkpoints.folder}")
    return state


def _peak(setup: TrainingSetup) -> float | None:
    peak = peak_flops(setup.mesh.devices.flat[0])
    return None if peak is None else peak * setup.mesh.size


class _Hooks(TrainHooks):
    """What this command does between steps: show, write checkpoints, validate, stop."""

    def __init__(
        self,
        config: TrainConfig,
        batches: AbstractBatches,
        checkpoints: Checkpoints,
        watch: Watch,
        validation: Validation,
        pending: PendingSignal,
    ):
        self.config, self.batches, self.checkpoints = config, batches, checkpoints
        self.watch, self.validation, self.pending = watch, validation, pending

    def after_step(self, state: TrainState, report: StepReport) -> None:
        """Report a step; write a checkpoint and validate, each after so many steps."""
        self.watch.step(report)
        number, config = report.number, self.config
        if number % config.checkpoints.every == 0:
            # A loss that is not finite ends the training before its weights are written.
            self.watch.flush()
            self.checkpoints.save(state, self.batches.state())
        every = config.validation.every
        if every is not None and number % every == 0:
            self.validation(number, state)

    def stops(self) -> bool:
        return agree_to_stop(self.pending.number is not None)
