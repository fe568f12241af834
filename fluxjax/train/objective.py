"""The loss of one training example: its time, its noise, its condition, and how much it counts."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fluxjax.flow.times import resolution_mu, time_shift
from fluxjax.generate.conditioning import ReferenceTokens, Transformer
from fluxjax.generate.latents import image_ids
from fluxjax.generate.text import TextStates
from fluxjax.lora.attach import without_adapters
from fluxjax.shapes import Array, Float, Int, PRNGKeyArray, Scalar
from fluxjax.train.distill import consistency_loss, teacher_interval
from fluxjax.train.loss import flow_matching_loss, logit_normal_times, min_snr_weight
from fluxjax.zoo import Defaults

TIME_RULES = ("logit_normal", "uniform")
"""How the times of training are drawn."""
WEIGHT_RULES = ("none", "min_snr")
"""How much the error at a time counts."""


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """How the loss of an example is computed.

    - `times`: how its time is drawn, one of `TIME_RULES`; of a logit-normal distribution `mean`
      and `deviation` are those of the logit.
    - `shift`: the log-shift of the times; None for that of the image's number of tokens, from
      `base_shift` to `max_shift`, as in sampling.
    - `weighting`: one of `WEIGHT_RULES`; `gamma` as of `min_snr_weight`.
    - `caption_dropout`: the share of captions that are replaced by the empty one, in [0, 1].
    - `guidance`: the range of the distilled guidance scale, drawn uniformly for each example;
      both ends alike for one number, None for a network that takes none.
    - `distill_steps`: None for the flow-matching loss; a number for the distillation of the
      network into an adapter beside it that is sampled in so many steps, by
      `consistency_loss`.
    - `teacher_steps`: of the network without the adapter, in each of those.

    A network that is distilled for guidance, as dev, predicts at scale 1 what its data's
    distribution is, and at 3.5 what true guidance would make of it. Trained on data at scale 1, it
    keeps what guidance adds, and is sampled at its usual scale. Trained at 3.5, it learns to draw
    the data at that scale without guidance, and what was distilled is lost step by step.
    A teacher is followed at its usual scale.

    **Raises:** `ValueError` for another rule, or a number out of its range; for distillation unless
    its times are uniform, as those of sampling before the shift, and have one weight.
    """

    times: str = "logit_normal"
    mean: float = 0.0
    deviation: float = 1.0
    shift: float | None = None
    base_shift: float | None = None
    max_shift: float | None = None
    weighting: str = "none"
    gamma: float = 5.0
    caption_dropout: float = 0.1
    guidance: tuple[float, float] | None = None
    distill_steps: int | None = None
    teacher_steps: int = 8

    def __post_init__(self):
        for field, rules in (("times", TIME_RULES), ("weighting", WEIGHT_RULES)):
            if getattr(self, field) not in rules:
                raise ValueError(
                    f"`LossSettings({field})` is one of {', '.join(rules)}, got "
                    f"{getattr(self, field)!r}. Choose one."
                )
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(
                "`LossSettings(caption_dropout)` is a share in [0, 1], got "
                f"{self.caption_dropout}. Choose one, as 0.1."
            )
        for field in ("deviation", "gamma"):
            if not getattr(self, field) > 0:
                raise ValueError(
                    f"`LossSettings({field})` needs a positive number, got {getattr(self, field)}. "
                    "Choose one above 0."
                )
        if self.guidance is not None and self.guidance[0] > self.guidance[1]:
            raise ValueError(
                f"`LossSettings(guidance)` is a range from low to high, got {self.guidance}. "
                "Swap them."
            )
        for field in ("distill_steps", "teacher_steps"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(
                    f"`LossSettings({field})` is at least 1, got {value}. Choose more, as 4."
                )
        if self.is_distillation and (self.times, self.weighting) != ("uniform", "none"):
            raise ValueError(
                "`LossSettings(distill_steps)` needs times='uniform' and weighting='none', got "
                f"{self.times!r} and {self.weighting!r}. Set them."
            )

    @property
    def is_distillation(self) -> bool:
        """Whether a teacher is followed, not data."""
        return self.distill_steps is not None

    def for_model(self, defaults: Defaults, *, takes_guidance: bool) -> "LossSettings":
        """Return settings in which a model's own shifts and scale replace None.

        The scale is 1, or in distillation that at which the model is sampled.

        **Arguments:** `defaults`: of the model. `takes_guidance`: whether its network takes a
        distilled scale.
        **Raises:** `ValueError` for a scale that the network does not take.
        """
        if self.guidance is not None and not takes_guidance:
            raise ValueError(
                "`LossSettings(guidance)` is for networks that take a distilled scale, which this "
                "one does not. Leave it out."
            )
        changes: dict[str, object] = {}
        if takes_guidance and self.guidance is None:
            usual = defaults.guidance if self.is_distillation else None
            scale = 1.0 if usual is None else usual
            changes["guidance"] = (scale, scale)
        if not defaults.shift and self.shift is None and self.base_shift is None:
            changes["shift"] = 0.0
        for name in ("base_shift", "max_shift"):
            if getattr(self, name) is None:
                changes[name] = getattr(defaults, name)
        return replace(self, **changes)  # type: ignore[arg-type]

    def mu(self, tokens: int) -> float:
        """Return the log-shift of the times for an image of so many tokens."""
        if self.shift is not None:
            return self.shift
        shifts = {"base_shift": self.base_shift, "max_shift": self.max_shift}
        given = {name: value for name, value in shifts.items() if value is not None}
        return resolution_mu(tokens, **given)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How the transformer is evaluated for a gradient.

    - `dtype`: of the activations.
    - `remat`: keep only the input of each block and run it again.
    - `attention`: the name of an implementation of `fluxjax.attention`; None for the fastest.
    """

    dtype: DTypeLike
    remat: bool = False
    attention: str | None = None


class TrainExample(eqx.Module):
    """One row of a `TrainBatch`, and what all rows share.

    - `place`: the row's number in the batch of a whole step, of which its random numbers
      depend.
    - `reference_ids`: positions of the reference's tokens.
    - `empty`: the states of the empty caption. The rest as of `TrainBatch`.
    """

    latents: Float[Array, "tokens channels"]
    text: TextStates
    place: Int[Array, ""]
    empty: TextStates
    concat: Float[Array, "tokens features"] | None = None
    reference: ReferenceTokens | None = None
    mask: Float[Array, " tokens"] | None = None
    size: tuple[int, int] = eqx.field(static=True, kw_only=True)


class Draws(NamedTuple):
    """What is random in the loss of an example.

    - `t`: its time.
    - `noise`: in the shape of its latents.
    - `guidance`: the distilled scale, or None.
    - `dropped`: whether its caption is replaced.
    """

    t: Scalar
    noise: Float[Array, "tokens channels"]
    guidance: Scalar | None
    dropped: Array


def draw(example: TrainExample, settings: LossSettings, key: PRNGKeyArray) -> Draws:
    """Draw the time, the noise, the guidance scale, and whether the caption is dropped.

    **Arguments:** `key`: of the step; the example's place is folded into it, so that the draws
    depend neither on the mesh nor on how a step is divided into micro-batches.
    """
    keys = jax.random.split(jax.random.fold_in(key, example.place), 4)
    mu = settings.mu(len(example.latents))
    if settings.times == "uniform":
        t = time_shift(jax.random.uniform(keys[0]), mu)
    else:
        rule = {"mean": settings.mean, "deviation": settings.deviation}
        t = logit_normal_times(keys[0], 1, mu=mu, **rule)[0]
    noise = jax.random.normal(keys[1], example.latents.shape)
    guidance = None
    if settings.guidance is not None:
        low, high = settings.guidance
        guidance = jax.random.uniform(keys[2], minval=low, maxval=high)
    dropped = jax.random.bernoulli(keys[3], settings.caption_dropout)
    return Draws(t, noise, guidance, dropped)


def example_loss(
    flux: Transformer,
    example: TrainExample,
    draws: Draws,
    settings: LossSettings,
    evaluation: Evaluation,
) -> Scalar:
    """Return the loss of an example at drawn values.

    In distillation the time is rounded to the nearest one of the teacher's.

    **Arguments:** `flux`: the transformer, also of split tokens; in distillation with the adapter
    that is trained attached.
    **Returns:** a scalar in float32; 0 where the mask leaves out all tokens.
    """

    def choose(caption: Array, empty: Array) -> Array:
        return jnp.where(draws.dropped, empty, caption)

    text = jax.tree.map(choose, example.text, example.empty)

    def velocity(x: Array, t: Scalar) -> Array:
        return velocity_of(flux, x, t, example, text, draws.guidance, evaluation)

    if settings.distill_steps is not None:
        teacher = without_adapters(flux)

        def by_teacher(x: Array, t: Scalar) -> Array:
            return velocity_of(teacher, x, t, example, text, draws.guidance, evaluation)

        steps, mu = settings.distill_steps, settings.mu(len(example.latents))
        interval = teacher_interval(
            draws.t, steps=steps, teacher_steps=settings.teacher_steps, mu=mu
        )
        x = (1 - interval.start) * example.latents + interval.start * draws.noise
        return consistency_loss(velocity, by_teacher, x, interval, example.mask)
    loss = flow_matching_loss(velocity, example.latents, draws.t, draws.noise, example.mask)
    if settings.weighting == "min_snr":
        return min_snr_weight(draws.t, settings.gamma) * loss
    return loss


def velocity_of(
    flux: Transformer,
    x: Float[Array, "tokens channels"],
    t: Scalar,
    example: TrainExample,
    text: TextStates,
    guidance: Scalar | None,
    evaluation: Evaluation,
) -> Float[Array, "tokens channels"]:
    """Return the velocity of an example's noisy tokens, conditioned as its kind of model is.

    **Arguments:** `text`: of the example, one row. `guidance`: the distilled scale, or None.
    """
    ids, tokens = image_ids(*example.size), x
    if example.concat is not None:
        tokens = jnp.concatenate([tokens, example.concat.astype(x.dtype)], axis=-1)
    if example.reference is not None:
        ids = jnp.concatenate([ids, example.reference.ids])
        tokens = jnp.concatenate([tokens, example.reference.tokens.astype(x.dtype)])
    remat = evaluation.remat
    # Of the same transformer, whose kind of state it is.
    prepared: Any = flux.prepare(
        t[None],
        txt=text.txt,
        vec=text.vec,
        img_ids=ids,
        guidance=guidance,
        dtype=evaluation.dtype,
        remat=remat,
    )
    prepared = flux.with_txt_length(prepared, text.txt_length)
    attention = evaluation.attention
    velocity = flux.velocity(tokens, t, prepared, attention=attention, remat=remat)
    return velocity[: len(x)]
