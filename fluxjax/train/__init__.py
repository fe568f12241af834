"""Training: data, losses, what is trained, steps on a mesh, and the loop over them.

`fluxjax.train.checkpoints` has the checkpoints, which need orbax, and is not imported here.
"""

from fluxjax.train.batch import AbstractBatches, TrainBatch
from fluxjax.train.buckets import bucket_sizes
from fluxjax.train.cached_batches import CachedBatches
from fluxjax.train.config import TrainConfig, train_config
from fluxjax.train.cost import StepCost, forward_flop, training_flop
from fluxjax.train.data import open_batches
from fluxjax.train.data_settings import DataSettings
from fluxjax.train.distill import TeacherInterval, consistency_loss, teacher_interval
from fluxjax.train.encode_data import EncodeOptions, encode_examples
from fluxjax.train.encoders import Encoders, load_encoders
from fluxjax.train.fit_condition import FittedCondition, fit_condition, interpolate_conditions
from fluxjax.train.loop import TrainHooks, compile_step, run_steps
from fluxjax.train.loss import (
    drop_captions,
    flow_matching_loss,
    guided_target,
    logit_normal_times,
    min_snr_weight,
)
from fluxjax.train.mesh_step import StepMetrics, StepSettings, TrainStep
from fluxjax.train.objective import Evaluation, LossSettings, example_loss
from fluxjax.train.optimizers import OptimizerSettings, learning_rates, make_optimizer
from fluxjax.train.ordered import ProcessShare
from fluxjax.train.parts import TrainedAdapter, TrainedLayers, divide_adapter, divide_layers
from fluxjax.train.place import create_state, place_batch
from fluxjax.train.raw_batches import RawBatches
from fluxjax.train.setup import TrainingSetup, load_training, set_up_training, training_shapes
from fluxjax.train.step import TrainState, average, make_step
from fluxjax.train.validate import Validator, draw_validation_images
from fluxjax.train.watch import Watch

__all__ = [
    "AbstractBatches",
    "CachedBatches",
    "DataSettings",
    "EncodeOptions",
    "Encoders",
    "Evaluation",
    "FittedCondition",
    "LossSettings",
    "OptimizerSettings",
    "ProcessShare",
    "RawBatches",
    "StepCost",
    "StepMetrics",
    "StepSettings",
    "TeacherInterval",
    "TrainBatch",
    "TrainConfig",
    "TrainHooks",
    "TrainState",
    "TrainStep",
    "TrainedAdapter",
    "TrainedLayers",
    "TrainingSetup",
    "Validator",
    "Watch",
    "average",
    "bucket_sizes",
    "compile_step",
    "consistency_loss",
    "create_state",
    "divide_adapter",
    "divide_layers",
    "draw_validation_images",
    "drop_captions",
    "encode_examples",
    "example_loss",
    "fit_condition",
    "flow_matching_loss",
    "forward_flop",
    "guided_target",
    "interpolate_conditions",
    "learning_rates",
    "load_encoders",
    "load_training",
    "logit_normal_times",
    "make_optimizer",
    "make_step",
    "min_snr_weight",
    "open_batches",
    "place_batch",
    "run_steps",
    "set_up_training",
    "teacher_interval",
    "train_config",
    "training_flop",
    "training_shapes",
]
