"""Integrators that keep a part of an image while the velocity repaints the rest."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.arguments import convert_arguments
from fluxjax.flow.checks import check_broadcasts, check_same_shape, checked_fraction
from fluxjax.flow.step import EvaluationTimes, OptionalKey, Step, StepAround, StepState, X
from fluxjax.flow.strength import noisy_image
from fluxjax.flow.velocity import Velocity, scan_evaluations
from fluxjax.shapes import Array, Float, Int, Scalar


def _check_mask(call: str, mask: Array, meaning: str) -> None:
    # A traced mask is not checked, since that would need a call to the host at each step.
    if not isinstance(mask, jax.core.Tracer):
        checked_fraction(call, "mask", mask, meaning)


class _Round(NamedTuple):
    """A result of going from t to u.

    `x`: there. `state`: that of the inner step.
    """

    x: X
    state: StepState


@convert_arguments
class Inpaint(StepAround):
    """A step that keeps a part of an image: after each step, this part is the image with noise.

    Blended latent diffusion, and the inpainting of diffusers (with one fixed `noise`). With
    `repeats`, RePaint. With a mask of times, Differential Diffusion: where the mask is between 0
    and 1, the image is kept down to that time, and repainted from there.

    What is repainted fits what is kept the better, the more often it is repeated; without repeats
    it is further from the model's own distribution, also with many steps. It costs
    `repeats * jump` of the inner steps, and no gradient.

    **Arguments:**

    - `step`: the inner integrator. For `repeats` above 1, one that draws noise, as `DDIM(1.0)`.
    - `image`: the known image, as a latent in the shape of x.
    - `mask`: 1 where it is repainted, 0 where it is kept, in between the time in [0, 1] from which
      on it is repainted; see `start_time`, which makes such a map of strengths. Its shape
      broadcasts to that of x. Other masks and images of the same shapes need no new compilation.
    - `noise`: the one that all steps add to the kept part. None draws it anew at each step.
    - `repeats`: how often each step is taken, with noise added back in between.
    - `jump`: into how many equal steps each step is split, all of which are repeated together.

    **Raises:** `ValueError` for a mask outside [0, 1], less than 1 repeat or jump, no key where
    noise is drawn, and, when a step is taken, for arrays that do not fit x.
    **Source:** Avrahami et al. 2022, algorithm 1; Lugmayr et al. 2022, algorithm 1; Levin & Fried
    2023, algorithm 1.
    """

    step: Step
    image: Float[Array, "*shape"]
    mask: Float[Array, "*mask_shape"]
    noise: Float[Array, "*shape"] | None = None
    repeats: int = eqx.field(static=True, default=1)
    jump: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        _check_mask("Inpaint", self.mask, "1 is repainted, 0 is kept.")
        if min(self.repeats, self.jump) < 1:
            raise ValueError(
                "`Inpaint(repeats, jump)` needs at least 1 for both, got "
                f"{self.repeats} and {self.jump}. 1 takes each step once."
            )

    @property
    def evaluations(self) -> int:  # type: ignore[override]
        return self.step.evaluations * self.repeats * self.jump

    def evaluation_times(self, t: Scalar, u: Scalar) -> EvaluationTimes | None:
        """Return the times of the inner steps, of which there are `jump`; repeats add none."""
        nodes = self._nodes(t, u)
        by_stage = jax.vmap(self.step.evaluation_times)(nodes[:-1], nodes[1:])
        if by_stage is None:
            return None
        return tuple(jnp.concatenate(by_stage))

    def __call__(
        self,
        velocity: Velocity,
        x: X,
        t: Scalar,
        u: Scalar,
        state: StepState,
        *,
        key: OptionalKey,
    ) -> tuple[X, StepState, None]:
        check_same_shape("Inpaint", x, image=self.image, noise=self.noise)
        check_broadcasts("Inpaint", x, mask=self.mask)
        if key is None and (self.noise is None or self.repeats > 1):
            raise ValueError(
                "Inpaint draws noise, for the kept part or to repeat a step. "
                "Pass key=jax.random.key(…) to `sample`."
            )

        def again(before: _Round, item: tuple[OptionalKey, Scalar]) -> _Round:
            down_key, number = item
            start = before.x
            if self.repeats > 1 and down_key is not None:
                up_key, down_key = jax.random.split(down_key)
                # The first round starts at t itself.
                start = jnp.where(number == 0, start, _add_back(start, u, t, up_key))
            # Each starts with the state at t: what a round left behind belongs to u.
            return self._down(velocity, _Round(start, state), t, u, down_key)

        rounds = _split(key, self.repeats), jnp.arange(self.repeats)
        after = scan_evaluations(velocity, again, _Round(x, state), rounds)
        return after.x, after.state, None

    def _nodes(self, t: Scalar, u: Scalar) -> Float[Array, " nodes"]:
        """Return the times of the steps that one interval is divided into, from t to u."""
        shares = jnp.arange(self.jump + 1, dtype=t.dtype) / self.jump
        # Written so that both ends are exact.
        return (1 - shares) * t + shares * u

    def _down(
        self,
        velocity: Velocity,
        before: _Round,
        t: Scalar,
        u: Scalar,
        key: OptionalKey,
    ) -> _Round:
        """Go from t to u once, in `jump` steps."""
        image = self.image.astype(before.x.dtype)
        mask = self.mask.astype(u.dtype)

        def step(before: _Round, item: tuple[Scalar, Scalar, OptionalKey]) -> _Round:
            start, end, one_key = item
            noise_key, step_key = None, None
            if one_key is not None:
                noise_key, step_key = jax.random.split(one_key)
            repainted, state, _ = self.step(
                velocity,
                before.x,
                start,
                end,
                before.state,
                key=step_key,
            )
            kept = noisy_image(image, self._noise(image, noise_key), end)
            return _Round(jnp.where(end >= mask, kept, repainted), state)

        nodes = self._nodes(t, u)
        items = nodes[:-1], nodes[1:], _split(key, self.jump)
        return scan_evaluations(velocity, step, before, items)

    def _noise(self, image: X, key: OptionalKey) -> X:
        """Return the noise of the kept part, like `image`. With a fixed one, no key is needed."""
        if self.noise is None and key is not None:
            return jax.random.normal(key, image.shape, image.dtype)
        return jnp.asarray(self.noise, image.dtype)


def _split(key: OptionalKey, count: int) -> Array | None:
    """Return keys for the iterations of a loop; None for a run without noise."""
    if key is None:
        return None
    return jax.random.split(key, count)


def _add_back(x: X, u: Scalar, t: Scalar, key: Array) -> X:
    """Return x, which is at u, at a time t with more noise.

    The forward process scales its image to 1 - t, and fills up the noise to the variance t^2.
    """
    # Times fall strictly, so that u < 1.
    scale = (1 - t) / (1 - u)
    # Positive but for rounding, and its root must not be NaN.
    variance = jnp.square(t) - jnp.square(scale * u)
    deviation = jnp.sqrt(jnp.maximum(variance, 0))
    noise = jax.random.normal(key, x.shape, x.dtype)
    return (scale * x + deviation * noise).astype(x.dtype)


class _Place(NamedTuple):
    """The state of `KeepHistory`.

    `state`: that of the inner step. `number`: how many steps were taken, which is where the
    history is read.
    """

    state: StepState
    number: Int[Array, ""]


@convert_arguments
class KeepHistory(StepAround):
    """A step that keeps a part of a run: after each step, this part is what it was in another run.

    DiffEdit: invert the image to a time t, then sample from there toward the new prompt, and keep
    outside of the mask what the inversion went through:

    ```python
    up = sample(source, image, times[::-1], step=FireFlow(), history=True)
    step = KeepHistory(Euler(), up.history[::-1], edit_mask(source, target, image, key=key))
    edited = sample(target, up.x, times, step=step).x      # times from t to 0
    ```

    **Arguments:**

    - `step`: the inner integrator.
    - `history`: the other run at all nodes, [nodes, ...], in the order in which this step goes.
    - `mask`: 1 where the step's own result is used, 0 where the history is kept, in between a mean
      of both with this weight. Its shape broadcasts to that of x.

    **Raises:** `ValueError` for a mask outside [0, 1], and, when a step is taken, for arrays that
    do not fit x. At run time, an error for more steps than the history has.
    **Source:** Couairon et al. 2022, section 3.2.
    """

    step: Step
    history: Float[Array, "nodes *shape"]
    mask: Float[Array, "*mask_shape"]

    def __check_init__(self):
        _check_mask("KeepHistory", self.mask, "0 keeps the history.")

    def init(self, x: X) -> _Place:
        return _Place(self.step.init(x), jnp.int32(0))

    def start(self, velocity: Velocity, x: X, t: Scalar) -> _Place:
        return _Place(self.step.start(velocity, x, t), jnp.int32(0))

    def evaluation_times(self, t: Scalar, u: Scalar) -> EvaluationTimes | None:
        return self.step.evaluation_times(t, u)

    def __call__(
        self,
        velocity: Velocity,
        x: X,
        t: Scalar,
        u: Scalar,
        state: _Place,
        *,
        key: OptionalKey,
    ) -> tuple[X, _Place, None]:
        check_same_shape("KeepHistory", x, history=self.history[0])
        check_broadcasts("KeepHistory", x, mask=self.mask)
        own, inner, _ = self.step(velocity, x, t, u, state.state, key=key)
        number = eqx.error_if(
            state.number + 1,
            state.number + 1 >= len(self.history),
            "`KeepHistory(history)` has fewer nodes than this run. Pass that of the same times.",
        )
        mask = self.mask.astype(x.dtype)
        kept = self.history.astype(x.dtype)[number]
        # Written so that both ends are exact.
        mixed = jnp.where(mask == 1, own, kept + mask * (own - kept))
        return mixed, _Place(inner, number), None
