"""Optimizers and learning rates by name, for flat dictionaries of weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree
from optax.contrib import MuonDimensionNumbers, muon

OPTIMIZERS = ("adamw", "adafactor", "lion", "muon")
"""The optimizers by name."""
SCHEDULES = ("constant", "cosine", "linear")
"""How the learning rate changes after its warm-up."""


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """An optimizer and its learning rate: the table `optimizer` of a configuration.

    `name`: one of `OPTIMIZERS`. "adafactor" keeps rows and columns of second moments alone, in a
    thousandth of AdamW's memory; "lion" one moment; "muon" orthogonalizes the momentum of matrices,
    and is AdamW for all else. `learning_rate`: the highest. `schedule`: one of `SCHEDULES`;
    `last_share`: the share of the highest rate that "cosine" and "linear" fall to at the last step.
    `warm_up`: steps in which the rate rises from 0. `weight_decay`: of matrices; biases, norms and
    magnitudes have none. `betas`: decays of the moments. `epsilon`: as of AdamW. `clip`: the
    largest norm of the gradient; None for no limit. `moment_dtype`: of the first moment, "float32"
    or "bfloat16".

    **Raises:** `ValueError` for another name, or a number out of its range.
    """

    name: str = "adamw"
    learning_rate: float = 1e-4
    schedule: str = "constant"
    last_share: float = 0.0
    warm_up: int = 0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    clip: float | None = 1.0
    moment_dtype: str = "float32"

    def __post_init__(self):
        choices = {"name": OPTIMIZERS, "schedule": SCHEDULES, "moment_dtype": _MOMENT_DTYPES}
        for field, known in choices.items():
            if getattr(self, field) not in known:
                raise ValueError(
                    f"optimizer.{field} is one of {', '.join(known)}, got "
                    f"{getattr(self, field)!r}. Choose one."
                )
        for field in ("learning_rate", "clip"):
            value = getattr(self, field)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(
                    f"optimizer.{field} is a positive number, got {value}. Choose one above 0."
                )
        for field in ("warm_up", "weight_decay", "last_share"):
            if not getattr(self, field) >= 0:
                raise ValueError(
                    f"optimizer.{field} is at least 0, got {getattr(self, field)}. Choose more."
                )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas are in [0, 1), got {self.betas}. Choose others.")


_MOMENT_DTYPES = ("float32", "bfloat16")
_NOT_DECAYED = (".bias", ".scale", ".magnitude")
"""Endings of the names of weights that do not decay."""


def learning_rates(settings: OptimizerSettings, steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the number of the step.

    **Arguments:** `steps`: of the whole training, warm-up included.
    """
    highest = settings.learning_rate
    rest = max(steps - settings.warm_up, 1)
    if settings.schedule == "cosine":
        after = optax.cosine_decay_schedule(highest, rest, settings.last_share)
    elif settings.schedule == "linear":
        after = optax.linear_schedule(highest, highest * settings.last_share, rest)
    else:
        after = optax.constant_schedule(highest)
    if settings.warm_up == 0:
        return after
    # The first step is not at 0, which would be lost.
    rising = optax.linear_schedule(highest / settings.warm_up, highest, settings.warm_up - 1)
    if settings.warm_up == 1:
        rising = optax.constant_schedule(highest)
    return optax.join_schedules([rising, after], [settings.warm_up])


def make_optimizer(settings: OptimizerSettings, steps: int) -> optax.GradientTransformation:
    """Return the optimizer of a training, for a flat dictionary of weights by name.

    **Arguments:** `steps`: of the whole training, for its learning rates.
    **Source:** Loshchilov & Hutter 2017, AdamW; Shazeer & Stern 2018, Adafactor; Chen et al. 2023,
    Lion; Jordan et al. 2024, Muon.
    """
    optimizer = _MAKERS[settings.name](settings, learning_rates(settings, steps))
    if settings.clip is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(settings.clip), optimizer)


def is_decayed(weights: Mapping[str, PyTree]) -> dict[str, bool]:
    """Return which weights decay: matrices and factors of adapters."""
    return {name: not name.endswith(_NOT_DECAYED) for name in weights}


def _adamw(settings: OptimizerSettings, rate: optax.Schedule) -> optax.GradientTransformation:
    first, second = settings.betas
    return optax.adamw(
        rate,
        first,
        second,
        settings.epsilon,
        mu_dtype=jnp.dtype(settings.moment_dtype),
        weight_decay=settings.weight_decay,
        mask=is_decayed,
    )


def _adafactor(settings: OptimizerSettings, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.adafactor(
        rate,
        multiply_by_parameter_scale=False,
        # Adafactor's decay is not multiplied by the learning rate, as those of the others are.
        weight_decay_rate=lambda step: settings.weight_decay * rate(step),
        weight_decay_mask=is_decayed,
    )


def _lion(settings: OptimizerSettings, rate: optax.Schedule) -> optax.GradientTransformation:
    first, second = settings.betas
    return optax.lion(
        rate,
        first,
        second,
        mu_dtype=jnp.dtype(settings.moment_dtype),
        weight_decay=settings.weight_decay,
        mask=is_decayed,
    )


def _muon(settings: OptimizerSettings, rate: optax.Schedule) -> optax.GradientTransformation:
    first, second = settings.betas
    return muon(
        rate,
        beta=first,
        mu_dtype=jnp.dtype(settings.moment_dtype),
        weight_decay=settings.weight_decay,
        adam_b1=first,
        adam_b2=second,
        # Updates as large as AdamW's, so that learning rates mean the same.
        consistent_rms=0.2,
        muon_weight_dimension_numbers=_matrix_axes,
    )


def _matrix_axes(weights: Mapping[str, jax.Array]) -> dict[str, MuonDimensionNumbers | None]:
    """Return the axes of inputs and outputs of each matrix, also in a stack; None for others.

    Our matrices are [out, in], and those of stacked blocks [depth, out, in]: each block's matrix is
    orthogonalized by itself. A fused matrix is one matrix.
    """
    axes: dict[str, MuonDimensionNumbers | None] = {}
    for name, leaf in weights.items():
        # Muon's own state has other objects in the places of what is not a matrix.
        is_matrix = getattr(leaf, "ndim", 0) >= 2 and not name.endswith(_NOT_DECAYED)
        axes[name] = None
        if is_matrix:
            axes[name] = MuonDimensionNumbers(leaf.ndim - 1, leaf.ndim - 2)
    return axes


_MAKERS: Mapping[str, Callable[..., Any]] = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "lion": _lion,
    "muon": _muon,
}
