"""Training a velocity field: losses, times of training, and optimizer steps."""

from fluxjax.train.fit_condition import FittedCondition, fit_condition, interpolate_conditions
from fluxjax.train.loss import drop_captions, flow_matching_loss, guided_target, logit_normal_times
from fluxjax.train.step import TrainState, average, make_step

__all__ = [
    "FittedCondition",
    "TrainState",
    "average",
    "drop_captions",
    "fit_condition",
    "flow_matching_loss",
    "guided_target",
    "interpolate_conditions",
    "logit_normal_times",
    "make_step",
]
