"""Samplers side by side: the same noise and prompt through each, beside a fine reference."""

import csv
import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from jax.typing import DTypeLike
from PIL import ImageDraw, ImageFont

from fluxjax.checkpoint.atomic import new_file
from fluxjax.flow.step import Step
from fluxjax.generate.draw import draw_batch
from fluxjax.generate.draw_hooks import DrawHooks
from fluxjax.generate.image import next_number, to_bytes, write_png
from fluxjax.generate.image_batch import ImageBatch, Recipe
from fluxjax.generate.latents import noise_batch, step_keys
from fluxjax.generate.load import Models, activation_dtype
from fluxjax.generate.prompted import as_arrays, distilled_guidance, guidance_of, prompt_batch
from fluxjax.generate.samplers import WITH_ETA, WITH_SHIFT, integrator, timer
from fluxjax.generate.text import encode_text, prompt_ids
from fluxjax.generate.velocity import Guidance
from fluxjax.shapes import Array, Image, PRNGKeyArray, Times

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
    samplers = []
    for name, kind, count in product(comparison.timers, comparison.integrators, comparison.steps):
        times = bench.times(name, count, comparison.shift if name == WITH_SHIFT else None)
        samplers.append((name, kind, count, times, comparison.step(kind)))
    kind, name = REFERENCE
    times = bench.times(name, comparison.reference_steps)
    truth, reference, _ = bench.draw(times, integrator(kind))
    runs, images = [], [reference]
    for name, kind, count, times, step in samplers:
        latent, image, seconds = bench.draw(times, step)
        images.append(image)
        distance = float(jnp.linalg.norm(latent - truth) / jnp.linalg.norm(truth))
        evaluations = step.evaluations * count
        psnr = _psnr(image, reference)
        runs.append(Run(name, kind, count, evaluations, seconds, distance, psnr))
        if report is not None:
            report(runs[-1])
    _check_finite(runs, images)
    return runs, images


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
        # Models that need true guidance are guided away from the empty prompt by default.
        scale = comparison.cfg
        guidance = guidance_of(models, None if scale is None else Guidance(scale=scale))
        if comparison.negative_prompt and guidance.scale == 1:
            raise ValueError(
                "`compare` got a negative prompt, which does nothing at this model's cfg of 1. "
                "Give a scale, as cfg=3."
            )
        negative = states.rows([1]) if guidance.scale != 1 else None
        channels = models.vae.config.latent_channels
        noise = noise_batch(key, [0], height, width, channels=channels)
        distilled = distilled_guidance(models.flux, defaults, comparison.guidance)
        batch = prompt_batch(
            states.rows([0]), negative, noise=noise, keys=None, distilled=distilled
        )
        return cls(models, batch, as_arrays(guidance), key, (height, width), dtype)

    def times(self, name: str, steps: int, shift: float | None = None) -> Times:
        return timer(name, steps, self.models.defaults, *self.size, shift=shift)

    def draw(self, times: Times, step: Step) -> tuple[Array, np.ndarray, float]:
        """Return a sampler's latent, its image, and the seconds of its integration."""
        keys = step_keys(self.key, [0], step)
        batch = replace(self.batch, keys=keys)
        hooks = _TimingHooks()
        drawn = draw_batch(
            self.models.flux,
            self.models.vae,
            batch,
            Recipe(times, step, self.guidance),
            dtype=self.dtype,
            hooks=hooks,
        )
        return drawn.latents, np.asarray(drawn.images[0]), hooks.seconds


class _TimingHooks(DrawHooks):
    """Hooks that compile each stage before it is run, and add up the seconds of denoising."""

    def __init__(self):
        self.seconds = 0.0
        self.compiled: dict[Callable, Callable] = {}

    def run(self, stage: str, function: Callable[..., Result], *inputs, **options) -> Result:
        if function not in self.compiled:
            lowered = function.lower(*inputs, **options)  # type: ignore[attr-defined]
            self.compiled[function] = lowered.compile()
        start = time.perf_counter()
        result = jax.block_until_ready(self.compiled[function](*inputs, **options))
        if stage == "denoise":
            self.seconds += time.perf_counter() - start
        return result


def _psnr(image: np.ndarray, reference: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of an image in [-1, 1], in dB."""
    error = float(np.mean(np.square((image - reference) / 2)))
    return float("inf") if error == 0 else -10 * float(np.log10(error))


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


def write_comparison(
    folder: Path, picture: Image | np.ndarray, rows: str, metadata: Mapping[str, str]
) -> tuple[Path, Path]:
    """Write `compare_N.png` and `compare_N.csv`, with the number after the highest of either there.

    **Returns:** their paths.
    """
    number = next_number(folder, "compare", (".png", ".csv"))
    while True:
        image = folder / f"compare_{number}.png"
        try:
            with new_file(image.with_suffix(".csv")) as file:
                file.write(rows.encode())
                write_png(picture, image, metadata)
        except FileExistsError:  # another process has written it since
            number += 1
        else:
            return image, image.with_suffix(".csv")


def comparison_csv(runs: Sequence[Run]) -> str:
    """Return the runs as CSV, with a header."""
    out = io.StringIO()
    names = [field.name for field in fields(Run)]
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    for run in runs:
        row = asdict(run)
        for name, value in row.items():
            if isinstance(value, float):
                row[name] = f"{value:.6g}"
        writer.writerow(row)
    return out.getvalue()


_MARGIN = 6
"""Pixels between the images of a grid."""
_TEXT = 13
"""Pixels of a line of text."""
_CROP = 4
"""The enlarged part of an image has this fraction of its sides."""


def comparison_grid(
    runs: Sequence[Run], images: Sequence[np.ndarray], *, scale: int | None = None
) -> PIL.Image.Image:
    """Return the images as one labelled picture.

    There is a row for each timer and integrator and a column for each number of steps, with the
    reference above. Beside each image is the part that differs most from the reference over all
    runs, a quarter of each side, enlarged.

    **Arguments:** `scale`: pixels of the picture to one of an image; by default as many as make an
    image at least 256 wide.
    """
    height, width = images[0].shape[:2]
    if scale is None:
        scale = -(-256 // width)
    rows = list(dict.fromkeys((run.timer, run.integrator) for run in runs))
    columns = list(dict.fromkeys(run.steps for run in runs))
    cell_width = 2 * width * scale + 2 * _MARGIN
    cell_height = height * scale + 2 * _TEXT + _MARGIN
    size = (len(columns) * cell_width + _MARGIN, (len(rows) + 1) * cell_height + _MARGIN)
    picture = PIL.Image.new("RGB", size, "white")
    font = ImageFont.load_default(_TEXT - 2)
    corner = _most_different(images, height // _CROP, width // _CROP)

    def place(row: int, column: int, image: np.ndarray, label: str) -> None:
        x, y = _MARGIN + column * cell_width, _MARGIN + row * cell_height
        whole, part = _framed_and_part(image, corner, scale)
        picture.paste(whole, (x, y))
        picture.paste(part, (x + whole.width + _MARGIN, y))
        position = (x, y + whole.height)
        ImageDraw.Draw(picture).text(position, label, fill="black", font=font)

    place(0, 0, images[0], "reference")
    for run, image in zip(runs, images[1:], strict=True):
        label = (
            f"{run.timer}, {run.integrator}, {run.steps} steps\n"
            f"{run.evaluations} evaluations, distance {run.distance:.3g}"
        )
        row = 1 + rows.index((run.timer, run.integrator))
        place(row, columns.index(run.steps), image, label)
    return picture


def _framed_and_part(
    image: np.ndarray, corner: tuple[int, int], scale: int
) -> tuple[PIL.Image.Image, PIL.Image.Image]:
    """Return an image enlarged, with the part framed, and the part at the same size."""
    height, width = image.shape[:2]
    nearest = PIL.Image.Resampling.NEAREST
    whole = PIL.Image.fromarray(to_bytes(image)).resize((width * scale, height * scale), nearest)
    top, left = corner
    bottom, right = top + height // _CROP, left + width // _CROP
    box = (left * scale, top * scale, right * scale, bottom * scale)
    part = whole.crop(box).resize(whole.size, nearest)
    frame = (box[0], box[1], box[2] - 1, box[3] - 1)
    ImageDraw.Draw(whole).rectangle(frame, outline="red")
    return whole, part


def _most_different(images: Sequence[np.ndarray], height: int, width: int) -> tuple[int, int]:
    """Return the top left corner of the window in which images differ most from the first."""
    error = np.zeros(images[0].shape[:2], np.float64)
    for image in images[1:]:
        error += np.square(image - images[0]).sum(-1)
    # A window's sum is a difference of four sums from the top left corner of the image.
    sums = np.pad(error.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    windows = sums[height:, width:] - sums[:-height, width:]
    windows = windows - sums[height:, :-width] + sums[:-height, :-width]
    top, left = np.unravel_index(np.argmax(windows), windows.shape)
    return int(top), int(left)
