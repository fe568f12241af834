"""Training a velocity field: losses, times of training, and optimizer steps."""

from fluxjax.train.batch import AbstractBatches, TrainBatch
from fluxjax.train.buckets import bucket_sizes
from fluxjax.train.cached_batches import CachedBatches
from fluxjax.train.data import open_batches
from fluxjax.train.data_settings import DataSettings
from fluxjax.train.encode_data import EncodeOptions, encode_examples
from fluxjax.train.encoders import Encoders, load_encoders
from fluxjax.train.fit_condition import FittedCondition, fit_condition, interpolate_conditions
from fluxjax.train.loss import drop_captions, flow_matching_loss, guided_target, logit_normal_times
from fluxjax.train.ordered import ProcessShare
from fluxjax.train.raw_batches import RawBatches
from fluxjax.train.step import TrainState, average, make_step

__all__ = [
    "AbstractBatches",
    "CachedBatches",
    "DataSettings",
    "EncodeOptions",
    "Encoders",
    "FittedCondition",
    "ProcessShare",
    "RawBatches",
    "TrainBatch",
    "TrainState",
    "average",
    "bucket_sizes",
    "drop_captions",
    "encode_examples",
    "fit_condition",
    "flow_matching_loss",
    "guided_target",
    "interpolate_conditions",
    "load_encoders",
    "logit_normal_times",
    "make_step",
    "open_batches",
]
