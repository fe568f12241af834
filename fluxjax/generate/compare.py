"""Samplers side by side: the same noise and prompt through each, beside a fine reference."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from fluxjax.flow.step import Step
from fluxjax.generate.draw import draw_batch
from fluxjax.generate.draw_hooks import DrawHooks
from fluxjax.generate.image_batch import ImageBatch, Recipe
from fluxjax.generate.latents import noise_batch, step_keys
from fluxjax.generate.load import activation_dtype
from fluxjax.generate.load_models import Models
from fluxjax.generate.prompt_batch import as_arrays, distilled_guidance, guidance_of, prompt_batch
from fluxjax.generate.samplers import WITH_ETA, WITH_SHIFT, integrator, timer
from fluxjax.generate.text import encode_text, prompt_ids
from fluxjax.generate.velocity import Guidance
from fluxjax.shapes import Array, PRNGKeyArray, Times

Result = TypeVar("Result")
REFERENCE = ("heun", "model")
"""The integrator and the timer of the reference."""


@dataclass(frozen=True)
class Run:
    """A sampler's run.

    `seconds`: of the integration, with its program compiled before. `distance`: of its latent from
    the reference's, relative to the reference's norm. `psnr`: of its image against the reference's,
    in dB.
    """

    timer: str
    integrator: str
    steps: int
    evaluations: int
    seconds: float
    distance: float
    psnr: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Which samplers are compared: every timer with every integrator and number of steps.

    `reference_steps`: of Heun's method at the model's own times. `guidance`: distilled scale.
    `cfg`: scale of classifier-free guidance away from `negative_prompt`. `eta`: of the integrators
    that take one. `shift`: of the timer flux_static. `height`, `width`: in pixels. `dtype`: of the
    activations. None takes the model's default.

    **Raises:** `ValueError` for an eta or a shift that no sampler takes, or a negative prompt
    without guidance.
    """

    integrators: Sequence[str]
    timers: Sequence[str]
    steps: Sequence[int]
    reference_steps: int = 200
    guidance: float | None = None
    cfg: float | None = None
    negative_prompt: str = ""
    eta: float | None = None
    shift: float | None = None
    height: int | None = None
    width: int | None = None
    dtype: DTypeLike | None = None

    def __post_init__(self):
        if self.eta is not None and not set(self.integrators) & set(WITH_ETA):
            raise ValueError(
                f"eta does nothing here: it is taken by {', '.join(WITH_ETA)}. Leave it out, or "
                "compare one of them."
            )
        if self.shift is not None and WITH_SHIFT not in self.timers:
            raise ValueError(
                f"shift does nothing here: it is taken by the timer {WITH_SHIFT}. Leave it out, or "
                "compare that."
            )
        if self.negative_prompt and self.cfg == 1:
            raise ValueError(
                "A negative prompt does nothing at cfg 1. Give a scale, as 3, or leave it out."
            )

    def step(self, name: str) -> Step:
        """Return an integrator, with the eta if it takes one."""
        return integrator(name, eta=self.eta if name in WITH_ETA else None)


def compare(
    models: Models,
    prompt: str,
    comparison: Comparison,
    *,
    key: PRNGKeyArray,
    report: Callable[[Run], None] | None = None,
) -> tuple[list[Run], list[np.ndarray]]:
    """Draw one image of the prompt with each sampler, from the same noise.

    A stochastic integrator draws another image, however many its steps are, so its distance is not
    an error.

    **Arguments:** `report`: called with each run when it is done.
    **Returns:** the runs; the reference's image, then theirs, in [-1, 1].
    **Raises:** `ValueError` for names that are not in `fluxjax.generate.samplers`, no steps, a size
    that is not a multiple of 16, or an image that is not finite.
    """
    bench = _Bench.of(models, prompt, comparison, key)
    samplers = _samplers(comparison, bench)
    truth = bench.draw(_reference_sampler(comparison, bench))
    runs, images = [], [truth.image]
    for sampler in samplers:
        drawn = bench.draw(sampler)
        images.append(drawn.image)
        difference = jnp.linalg.norm(drawn.latent - truth.latent)
        run = Run(
            timer=sampler.timer,
            integrator=sampler.integrator,
            steps=sampler.steps,
            evaluations=sampler.step.evaluations * sampler.steps,
            seconds=drawn.seconds,
            distance=float(difference / jnp.linalg.norm(truth.latent)),
            psnr=_psnr(drawn.image, truth.image),
        )
        runs.append(run)
        if report is not None:
            report(run)
    _check_finite(runs, images)
    return runs, images


class _Sampler(NamedTuple):
    """A sampler by the names of its parts, and the times and the integrator that it draws with."""

    timer: str
    integrator: str
    steps: int
    times: Times
    step: Step


def _samplers(comparison: Comparison, bench: "_Bench") -> list[_Sampler]:
    """Return the samplers that are compared, all of which are made before anything is drawn."""
    samplers = []
    for name, kind, steps in product(comparison.timers, comparison.integrators, comparison.steps):
        shift = comparison.shift if name == WITH_SHIFT else None
        times = bench.times(name, steps, shift)
        samplers.append(_Sampler(name, kind, steps, times, comparison.step(kind)))
    return samplers


def _reference_sampler(comparison: Comparison, bench: "_Bench") -> _Sampler:
    kind, name = REFERENCE
    steps = comparison.reference_steps
    return _Sampler(name, kind, steps, bench.times(name, steps), integrator(kind))


class _DrawnImage(NamedTuple):
    """A sampler's latent, its image in [-1, 1], and the seconds of its integration."""

    latent: Array
    image: np.ndarray
    seconds: float


class _Bench(NamedTuple):
    """What all samplers share: the networks, the conditioned noise, and the size of the image."""

    models: Models
    batch: ImageBatch
    guidance: Guidance
    key: PRNGKeyArray
    size: tuple[int, int]
    dtype: DTypeLike

    @classmethod
    def of(cls, models: Models, prompt: str, comparison: Comparison, key: PRNGKeyArray) -> "_Bench":
        """Encode the prompts, and draw the noise.

        **Raises:** `ValueError` for a negative prompt where the model is not guided.
        """
        defaults = models.defaults
        height = defaults.height if comparison.height is None else comparison.height
        width = defaults.width if comparison.width is None else comparison.width
        dtype = activation_dtype() if comparison.dtype is None else comparison.dtype
        ids = prompt_ids(
            models.tokenizers,
            [prompt, comparison.negative_prompt],
            max_length=defaults.max_length,
            visible_padding=defaults.visible_padding,
        )
        states = encode_text(models.clip, models.t5, ids, dtype=dtype)
        guidance = _guidance(models, comparison)
        channels = models.vae.config.latent_channels
        batch = prompt_batch(
            states.rows([0]),
            states.rows([1]) if guidance.scale != 1 else None,
            noise=noise_batch(key, [0], height, width, channels=channels),
            keys=None,
            distilled=distilled_guidance(models.flux, defaults, comparison.guidance),
        )
        return cls(
            models=models,
            batch=batch,
            guidance=as_arrays(guidance),
            key=key,
            size=(height, width),
            dtype=dtype,
        )

    def times(self, name: str, steps: int, shift: float | None = None) -> Times:
        """Return the times of a timer for the size of the image."""
        return timer(name, steps, self.models.defaults, *self.size, shift=shift)

    def draw(self, sampler: _Sampler) -> _DrawnImage:
        """Draw with a sampler, whose programs are compiled before they are timed."""
        keys = step_keys(self.key, [0], sampler.step)
        hooks = _TimingHooks()
        drawn = draw_batch(
            self.models.flux,
            self.models.vae,
            replace(self.batch, keys=keys),
            Recipe(sampler.times, sampler.step, self.guidance),
            dtype=self.dtype,
            hooks=hooks,
        )
        return _DrawnImage(drawn.latents, np.asarray(drawn.images[0]), hooks.seconds)


def _guidance(models: Models, comparison: Comparison) -> Guidance:
    """Return the guidance of all samplers: the comparison's, or the one that the model needs."""
    scale = comparison.cfg
    # Models that need true guidance are guided away from the empty prompt by default.
    guidance = guidance_of(models, None if scale is None else Guidance(scale=scale))
    if comparison.negative_prompt and guidance.scale == 1:
        raise ValueError(
            "`compare` got a negative prompt, which does nothing at this model's cfg of 1. "
            "Give a scale, as cfg=3."
        )
    return guidance


class _TimingHooks(DrawHooks):
    """Hooks that compile each stage before it is run, and add up the seconds of denoising."""

    def __init__(self):
        self.seconds = 0.0
        self.compiled: dict[Callable, Callable] = {}

    def run(self, stage: str, function: Callable[..., Result], *inputs, **options) -> Result:
        """Return function(*inputs, **options) of a jitted function. Arguments as of `DrawHooks`."""
        if function not in self.compiled:
            lowered = function.lower(*inputs, **options)  # type: ignore[attr-defined]
            self.compiled[function] = lowered.compile()
        program = self.compiled[function]
        start = time.perf_counter()
        result = jax.block_until_ready(program(*inputs, **options))
        if stage == "denoise":
            self.seconds += time.perf_counter() - start
        return result


def _psnr(image: np.ndarray, reference: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of an image in [-1, 1], in dB."""
    error = float(np.mean(np.square((image - reference) / 2)))
    if error == 0:
        return float("inf")
    return -10 * float(np.log10(error))


def _check_finite(runs: Sequence[Run], images: Sequence[np.ndarray]) -> None:
    """**Raises:** `ValueError` that names the runs whose images are not finite."""
    names = ["the reference"]
    names += [f"{run.timer}, {run.integrator}, {run.steps} steps" for run in runs]
    broken = []
    for name, image in zip(names, images, strict=True):
        if not np.isfinite(image).all():
            broken.append(name)
    if broken:
        raise ValueError(
            f"`compare` has NaN or infinity in the image of {broken[0]} ({len(broken)} of "
            f"{len(names)}). Pass dtype=float32, or leave that sampler out."
        )
