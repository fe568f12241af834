"""Samplers side by side: the same noise and prompt through each, beside a reference of many steps."""

import csv
import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from jax.typing import DTypeLike
from PIL import ImageDraw, ImageFont

from fluxjax.checkpoint.atomic import new_file
from fluxjax.flow.step import Step
from fluxjax.generate.autoencode import decode
from fluxjax.generate.draw import denoise, guidance_scale, noise_batch, step_keys
from fluxjax.generate.image import next_number, to_bytes, write_png
from fluxjax.generate.load import Models, activation_dtype
from fluxjax.generate.samplers import integrator, timer
from fluxjax.generate.text import encode_text, prompt_ids
from fluxjax.shapes import Array, Image, PRNGKeyArray, Times

REFERENCE = ("heun", "model")


@dataclass(frozen=True)
class Run:
    """A sampler's run. `seconds`: of the network's steps, compiled before. `distance`: of its latent from the reference's,
    relative to its norm. `psnr`: of its image to the reference's, in dB."""

    timer: str
    integrator: str
    steps: int
    evaluations: int
    seconds: float
    distance: float
    psnr: float


def compare(
    models: Models,
    prompt: str,
    *,
    integrators: Sequence[str],
    timers: Sequence[str],
    steps: Sequence[int],
    key: PRNGKeyArray,
    reference_steps: int = 200,
    guidance: float | None = None,
    height: int | None = None,
    width: int | None = None,
    dtype: DTypeLike | None = None,
    report: Callable[[Run], None] | None = None,
) -> tuple[list[Run], list[np.ndarray]]:
    """Draw one image of the prompt with each timer, integrator and number of steps, from the same noise.

    The reference takes `reference_steps` of Heun's at the model's own times. What a stochastic integrator draws is another
    image, however many its steps are, so its distance is no error.
    **Returns:** the runs, and their images after the reference's, in [-1, 1].
    **Raises:** `ValueError` for names that are not in `fluxjax.generate.samplers`, no steps, a size that is not a multiple of 16, or
    an image that is not finite.
    """
    defaults = models.defaults
    height = defaults.height if height is None else height
    width = defaults.width if width is None else width
    dtype = activation_dtype() if dtype is None else dtype
    plans = [
        (name, kind, count, timer(name, count, defaults, height, width), integrator(kind))
        for name, kind, count in product(timers, integrators, steps)
    ]
    ids = prompt_ids(models.tokenizers, [prompt], max_length=defaults.max_length)
    text = encode_text(models.clip, models.t5, ids, dtype=dtype)
    scale = guidance_scale(models.flux, defaults, guidance)
    noise = noise_batch(key, [0], height, width, channels=models.vae.config.latent_channels)

    def draw(times: Times, step: Step) -> tuple[Array, float]:
        arguments = (models.flux, text, noise, times, scale)
        options = {"step": step, "keys": step_keys(key, [0], step)}
        compiled = denoise.lower(*arguments, **options).compile()  # type: ignore[attr-defined]
        jax.block_until_ready(compiled(*arguments, **options))
        start = time.perf_counter()
        latent = jax.block_until_ready(compiled(*arguments, **options))
        return latent, time.perf_counter() - start

    kind, name = REFERENCE
    truth, _ = draw(timer(name, reference_steps, defaults, height, width), integrator(kind))
    runs, images = [], [np.asarray(decode(models.vae, truth, dtype=dtype)[0])]
    for name, kind, count, times, step in plans:
        latent, seconds = draw(times, step)
        images.append(np.asarray(decode(models.vae, latent, dtype=dtype)[0]))
        distance = float(jnp.linalg.norm(latent - truth) / jnp.linalg.norm(truth))
        error = float(np.mean(np.square((images[-1] - images[0]) / 2)))
        psnr = float("inf") if error == 0 else -10 * float(np.log10(error))
        runs.append(Run(name, kind, count, step.evaluations * count, seconds, distance, psnr))
        if report is not None:
            report(runs[-1])
    _check_finite(runs, images)
    return runs, images


def _check_finite(runs: Sequence[Run], images: Sequence[np.ndarray]) -> None:
    """**Raises:** `ValueError` that names the runs whose images are not finite."""
    names = [
        "the reference",
        *(f"{run.timer}, {run.integrator}, {run.steps} steps" for run in runs),
    ]
    lost = [name for name, image in zip(names, images, strict=True) if not np.isfinite(image).all()]
    if lost:
        raise ValueError(
            f"`compare` has NaN or infinity in the image of {lost[0]} ({len(lost)} of {len(names)}). Pass dtype=float32, or "
            "leave that sampler out."
        )


def write_comparison(
    folder: Path, picture: Image | np.ndarray, rows: str, metadata: Mapping[str, str]
) -> tuple[Path, Path]:
    """Write `compare_N.png` and `compare_N.csv` with the number after the highest of either there; return their paths."""
    number = next_number(folder, "compare", (".png", ".csv"))
    while True:
        image = folder / f"compare_{number}.png"
        try:
            with new_file(image.with_suffix(".csv")) as file:
                file.write(rows.encode())
                write_png(picture, image, metadata)
        except FileExistsError:  # written by someone else since
            number += 1
        else:
            return image, image.with_suffix(".csv")


def table(runs: Sequence[Run]) -> str:
    """Return the runs as CSV, with a header."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [field.name for field in fields(Run)], lineterminator="\n")
    writer.writeheader()
    for run in runs:
        row = {
            name: f"{value:.6g}" if isinstance(value, float) else value
            for name, value in asdict(run).items()
        }
        writer.writerow(row)
    return out.getvalue()


_MARGIN, _TEXT, _CROP = 6, 13, 4


def grid(
    runs: Sequence[Run], images: Sequence[np.ndarray], *, scale: int | None = None
) -> PIL.Image.Image:
    """Return the images as one labelled picture: a row a timer and integrator, a column a number of steps, the reference above;
    beside each image the part of it that differs most from the reference over all runs, a quarter of the side, enlarged.

    `scale`: pixels of the picture to one of an image, by default as many as make an image at least 256 wide.
    """
    height, width = images[0].shape[:2]
    scale = -(-256 // width) if scale is None else scale
    rows = list(dict.fromkeys((run.timer, run.integrator) for run in runs))
    columns = list(dict.fromkeys(run.steps for run in runs))
    cell = (2 * width * scale + _MARGIN, height * scale + 2 * _TEXT)
    size = (
        len(columns) * (cell[0] + _MARGIN) + _MARGIN,
        (len(rows) + 1) * (cell[1] + _MARGIN) + _MARGIN,
    )
    picture = PIL.Image.new("RGB", size, "white")
    corner = _most_different(images, height // _CROP, width // _CROP)

    def place(row: int, column: int, image: np.ndarray, label: str) -> None:
        x, y = _MARGIN + column * (cell[0] + _MARGIN), _MARGIN + row * (cell[1] + _MARGIN)
        whole, part = _views(image, corner, scale)
        picture.paste(whole, (x, y))
        picture.paste(part, (x + whole.width + _MARGIN, y))
        ImageDraw.Draw(picture).text(
            (x, y + whole.height), label, fill="black", font=ImageFont.load_default(_TEXT - 2)
        )

    place(0, 0, images[0], "reference")
    for run, image in zip(runs, images[1:], strict=True):
        label = f"{run.timer}, {run.integrator}, {run.steps} steps\n{run.evaluations} evaluations, distance {run.distance:.3g}"
        place(1 + rows.index((run.timer, run.integrator)), columns.index(run.steps), image, label)
    return picture


def _views(
    image: np.ndarray, corner: tuple[int, int], scale: int
) -> tuple[PIL.Image.Image, PIL.Image.Image]:
    """Return an image enlarged, with the part framed, and the part at the same size."""
    height, width = image.shape[:2]
    whole = PIL.Image.fromarray(to_bytes(image)).resize(
        (width * scale, height * scale), PIL.Image.Resampling.NEAREST
    )
    top, left = corner
    box = (
        left * scale,
        top * scale,
        (left + width // _CROP) * scale - 1,
        (top + height // _CROP) * scale - 1,
    )
    part = whole.crop((*box[:2], box[2] + 1, box[3] + 1)).resize(
        whole.size, PIL.Image.Resampling.NEAREST
    )
    ImageDraw.Draw(whole).rectangle(box, outline="red")
    return whole, part


def _most_different(images: Sequence[np.ndarray], height: int, width: int) -> tuple[int, int]:
    """Return the top left corner of the window in which images differ most from the first."""
    error = sum(np.square(image - images[0]).sum(-1) for image in images[1:])
    sums = np.pad(np.asarray(error, np.float64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    windows = (
        sums[height:, width:]
        - sums[:-height, width:]
        - sums[height:, :-width]
        + sums[:-height, :-width]
    )
    top, left = np.unravel_index(np.argmax(windows), windows.shape)
    return int(top), int(left)
