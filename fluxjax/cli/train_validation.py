"""The data and the validations of `fluxjax train`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import jax
import numpy as np

from fluxjax.cli.console import interruptible
from fluxjax.devices.shard import shard
from fluxjax.generate.image import write_png
from fluxjax.train.batch import AbstractBatches, TrainBatch
from fluxjax.train.config import TrainConfig
from fluxjax.train.data import open_batches
from fluxjax.train.data_settings import DataSettings, data_settings
from fluxjax.train.encoders import Encoders, encode_captions, load_encoders
from fluxjax.train.loop import stored_weights
from fluxjax.train.ordered import ProcessShare
from fluxjax.train.setup import TrainingSetup
from fluxjax.train.step import TrainState
from fluxjax.train.validate import Prompts, Validator, draw_validation_images
from fluxjax.train.watch import Watch

_VALIDATION_KEY = 2**31 - 1
"""Folded into the training's key for the noise of validations, which no step has."""
Validation = Callable[[int, TrainState], None]
"""Called with the number of a step and its state."""


@contextmanager
def opened_batches(
    config: TrainConfig, data: DataSettings, encoders: Encoders | None
) -> Iterator[AbstractBatches]:
    """Open the data of the training or of its validation, and close them after the block.

    **Arguments:** `data`: the settings. `encoders`: None for data that are encoded.
    """
    share = ProcessShare(jax.process_index(), jax.process_count())
    batches = interruptible(
        open_batches, data, batch_size=config.batch, encoders=encoders, share=share
    )
    try:
        yield batches
    finally:
        batches.close()


def make_validation(
    config: TrainConfig,
    setup: TrainingSetup,
    batches: AbstractBatches,
    encoders: Encoders | None,
    watch: Watch,
) -> Validation:
    """Return what validates the weights of a state, and logs what it finds.

    Its batches and prompts are read and encoded here, once.

    **Arguments:** `batches`: of the training, for the states of the empty caption. `encoders`: for
    prompts, and for data that are not encoded. `watch`: gets the losses and the images.
    """
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
    with opened_batches(config, data, encoders) as batches:
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
    """Return the images of the prompts, as the trained model draws them.

    **Arguments:** `weights`: from `stored_weights`.
    """
    mesh = setup.mesh if setup.mesh.size > 1 else None
    tensor = setup.mesh.shape["tensor"]
    network = jax.jit(setup.step.part.join, static_argnums=2)(weights, setup.frozen, tensor)
    vae = encoders.vae if mesh is None else shard(encoders.vae, mesh)
    images = draw_validation_images(network, vae, prompts, setup.defaults, mesh=mesh)
    return np.asarray(images, np.float32)
