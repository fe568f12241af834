"""The command `fluxjax train`: a training from its configuration to its files."""

import argparse
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.cli.compilation_cache import use_cache
from fluxjax.cli.console import (
    PendingSignal,
    Stopped,
    complain,
    deferred_signals,
    interruptible,
)
from fluxjax.cli.jobs import join_job
from fluxjax.devices.shard import shard
from fluxjax.generate.image import write_png
from fluxjax.generate.limits import check_devices
from fluxjax.kernels.chips import peak_flops
from fluxjax.train.batch import AbstractBatches, TrainBatch
from fluxjax.train.checkpoints import Checkpoints, Retention
from fluxjax.train.config import TrainConfig, train_config, with_overrides
from fluxjax.train.config_file import read_config
from fluxjax.train.cost import shapes_of, step_cost
from fluxjax.train.data import open_batches
from fluxjax.train.data_settings import DataSettings, data_settings
from fluxjax.train.encoders import Encoders, encode_captions, load_encoders
from fluxjax.train.export import check_output, write_result
from fluxjax.train.loop import (
    TrainHooks,
    agree_to_stop,
    example_flop,
    jit_step,
    run_steps,
    stored_weights,
    weights_to_write,
)
from fluxjax.train.ordered import ProcessShare
from fluxjax.train.place import place_batch
from fluxjax.train.setup import TrainingSetup, identity_of, load_training, training_mesh
from fluxjax.train.step import TrainState
from fluxjax.train.validate import Prompts, Validator, draw_validation_images
from fluxjax.train.watch import StepReport, Watch

_VALIDATION_KEY = 2**31 - 1
"""Folded into the training's key for the noise of validations, which no step has."""


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
    if not dry_run:
        check_output(config)
    try:
        mesh = training_mesh(config)
        setup = interruptible(load_training, config, mesh)
        encoders = interruptible(_encoders, config)
        with _batches(config, config.data, encoders) as batches:
            if dry_run:
                interruptible(_print_cost, config, setup, batches)
                return
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
    """Return the encoders, if the data are not encoded yet or images are drawn."""
    if config.data.cache is not None and not config.validation.prompts:
        return None
    return load_encoders(config.model, dtype=config.dtype)


@contextmanager
def _batches(
    config: TrainConfig, data: DataSettings, encoders: Encoders | None
) -> Iterator[AbstractBatches]:
    share = ProcessShare(jax.process_index(), jax.process_count())
    batches = interruptible(
        open_batches, data, batch_size=config.batch, encoders=encoders, share=share
    )
    try:
        yield batches
    finally:
        batches.close()


def _print_cost(config: TrainConfig, setup: TrainingSetup, batches: AbstractBatches) -> None:
    """Print the cost of a step on the first batch. **Raises:** `ValueError` if it can't fit."""
    batch = next(batches)
    rows = place_batch(batch, batches.empty_text(), setup.mesh, accumulate=config.accumulate)
    inputs = shapes_of((setup.frozen, *rows, setup.key))
    compiled = jit_step.lower(setup.step, setup.state_shapes(), *inputs).compile()
    flop = config.batch * example_flop(setup, batch)
    cost = step_cost(compiled, flop, setup.mesh.devices.flat[0])
    print(cost.report())
    cost.check()


def _train(
    config: TrainConfig,
    setup: TrainingSetup,
    batches: AbstractBatches,
    encoders: Encoders | None,
    *,
    restart: bool,
) -> Path:
    """Return the path of what was trained. **Raises:** `Stopped` after a signal."""
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
    validation = interruptible(_validation, config, setup, batches, encoders, watch)
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


Validation = Callable[[int, TrainState], None]
"""Called with the number of a step and its state."""


def _validation(
    config: TrainConfig,
    setup: TrainingSetup,
    batches: AbstractBatches,
    encoders: Encoders | None,
    watch: Watch,
) -> Validation:
    """Return what validates the weights of a state."""
    step, settings = setup.step, config.validation
    if settings.every is None:
        return lambda number, state: None
    fixed = _fixed_batches(config, encoders)
    empty = batches.empty_text()
    validator = Validator(step.part, step.loss, step.evaluation, setup.mesh, settings.times)
    key = jax.random.fold_in(setup.key, _VALIDATION_KEY)
    prompts = None
    if settings.prompts and encoders is not None:
        prompts = _prompts(config, setup, encoders)

    def validate(number: int, state: TrainState) -> None:
        weights = stored_weights(setup, state)
        watch.record(number, dict(validator(weights, setup.frozen, fixed, empty, key)))
        if prompts is not None and encoders is not None:
            images = _draw(setup, weights, encoders, prompts)
            for index, image in enumerate(images[: len(settings.prompts)]):
                watch.image(number, f"image_{index}", image)
                if jax.process_index() == 0:
                    name = f"step_{number:06d}_{index}.png"
                    write_png(image, config.log_folder / name, overwrite=True)

    return validate


def _fixed_batches(config: TrainConfig, encoders: Encoders | None) -> list[TrainBatch]:
    """Return the batches of validations: of data of their own, or the training's first ones."""
    data = config.data
    if config.validation.sources:
        table: dict[str, Any] = {"sources": list(config.validation.sources), "size": data.size}
        data = data_settings({name: one for name, one in table.items() if one is not None})
        encoders = load_encoders(config.model, dtype=config.dtype) if encoders is None else encoders
    with _batches(config, data, encoders) as batches:
        return list(islice(batches, config.validation.batches))


def _prompts(config: TrainConfig, setup: TrainingSetup, encoders: Encoders) -> Prompts:
    """Return the encoded prompts of validations, repeated until no device is idle."""
    settings, defaults = config.validation, setup.defaults
    if setup.network.config.in_channels != setup.network.config.out_channels:
        raise ValueError(
            "validation.prompts are drawn of a text alone, and this model reads an image too. "
            "Leave them out."
        )
    parts = setup.mesh.shape["data"] * setup.mesh.shape["fsdp"]
    count = max(len(settings.prompts), parts)
    captions = [settings.prompts[number % len(settings.prompts)] for number in range(count)]
    negative = None
    if defaults.cfg != 1:
        negative = encode_captions(encoders, [""] * count, config.data)
    side = config.data.size
    size = (defaults.height, defaults.width) if side is None else (side, side)
    text = encode_captions(encoders, captions, config.data)
    return Prompts(text, negative, settings.seed, settings.steps, size)


def _draw(setup: TrainingSetup, weights: Any, encoders: Encoders, prompts: Prompts) -> np.ndarray:
    mesh = setup.mesh if setup.mesh.size > 1 else None
    tensor = setup.mesh.shape["tensor"]
    network = jax.jit(setup.step.part.join, static_argnums=2)(weights, setup.frozen, tensor)
    vae = encoders.vae if mesh is None else shard(encoders.vae, mesh)
    images = draw_validation_images(network, vae, prompts, setup.defaults, mesh=mesh)
    return np.asarray(images, jnp.float32)


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
        self.watch.step(report)
        number, config = report.number, self.config
        if number % config.checkpoints.every == 0:
            self.checkpoints.save(state, self.batches.state())
        every = config.validation.every
        if every is not None and number % every == 0:
            self.validation(number, state)

    def stops(self) -> bool:
        return agree_to_stop(self.pending.number is not None)
