"""Encoded examples as one batch for training."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.generate.conditioning import ReferenceTokens
from fluxjax.generate.reference_ids import reference_ids
from fluxjax.generate.text import TextStates
from fluxjax.train.batch import TrainBatch
from fluxjax.train.buckets import Size
from fluxjax.train.data_settings import DataSettings
from fluxjax.train.encoders import ImageStates
from fluxjax.train.prepare import latent_noise


class BatchRows(NamedTuple):
    """Which examples the rows of a batch are.

    `numbers`: of the examples. `weight`: of their losses; 0 for rows that only fill the batch.
    `size`: of their images. `epoch`: in which they are used.
    """

    numbers: np.ndarray
    weight: np.ndarray
    size: Size
    epoch: int


def collate(
    images: ImageStates, text: TextStates, rows: BatchRows, settings: DataSettings
) -> TrainBatch:
    """Return a batch of encoded examples.

    Latents are drawn from their posteriors here, so that cached ones differ in each epoch too.
    """
    latents = images.latent
    if images.log_variance is not None:
        noise = []
        for number in rows.numbers:
            noise.append(latent_noise(settings, rows.epoch, int(number), latents.shape[1:]))
        latents = latents + np.exp(0.5 * images.log_variance) * np.stack(noise)
    concat = reference = None
    if settings.condition == "reference" and images.condition is not None:
        reference = ReferenceTokens(jnp.asarray(images.condition), reference_ids([rows.size]))
    elif images.condition is not None:
        concat = images.condition
        if images.hidden is not None:
            features = np.unpackbits(images.hidden, axis=-1).astype(concat.dtype)
            concat = np.concatenate([concat, features], axis=-1)
    counted = None if images.counted is None else jnp.asarray(images.counted)
    return TrainBatch(
        jnp.asarray(latents),
        jax.tree.map(jnp.asarray, text),
        jnp.asarray(rows.weight, jnp.float32),
        jnp.asarray(rows.numbers, jnp.int32),
        None if concat is None else jnp.asarray(concat),
        reference,
        counted,
        size=rows.size,
    )
