"""What the commands share that draw from a picture: `edit`, `outpaint`, `fill` and `restore`."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.cli.compilation_cache import use_cache
from fluxjax.cli.console import complain, interruptible, raise_problems
from fluxjax.cli.device import name_device
from fluxjax.cli.memory import with_plan
from fluxjax.cli.picture_lines import read_picture_lines
from fluxjax.cli.progress import Clock
from fluxjax.cli.prompts import difference
from fluxjax.cli.read_request import read_request
from fluxjax.cli.request import Request
from fluxjax.devices.vae_memory import limit_vae_memory
from fluxjax.generate.draw_settings import DrawSettings
from fluxjax.generate.image import read_image, read_metadata, write_numbered, write_png
from fluxjax.generate.latents import seed_key
from fluxjax.generate.limits import check_devices
from fluxjax.generate.load_models import Models, load_parts
from fluxjax.generate.masks import padded_size
from fluxjax.generate.prompt_batch import distilled_guidance
from fluxjax.generate.prompted import batches
from fluxjax.printable import printable
from fluxjax.shapes import Array, Image, Times


def request_of_size(
    options: argparse.Namespace,
    size: tuple[int, int],
    *,
    takes: str | None = None,
    reference_tokens: int = 0,
) -> Request:
    """Return the options as values, for images of a size in pixels.

    `takes`, `reference_tokens`: as for `read_request`.
    """
    use_cache(options.compilation_cache)
    options.height, options.width = padded_size(*size)
    request = read_request(options, takes=takes, reference_tokens=reference_tokens)
    _check_ends(options.timer, request.recipe.times)
    return request


def _check_ends(timer: str, times: Times) -> None:
    """**Raises:** `ValueError` for times that do not lead from noise to an image."""
    first, last = float(times[0]), float(times[-1])
    if (first, last) != (1, 0):
        raise ValueError(
            f"--timer {printable(timer)} goes from {first:g} to {last:g}, and pictures are drawn "
            "from 1, noise, to 0, the image. Plan or fit times between these."
        )


class PictureJob(NamedTuple):
    """What a command draws.

    `stem`: of the file names. `draw`: called with models and keywords, returns images. `size`: of
    the images, height and width. `about`: what their metadata say beside the request. `steps`: that
    a batch takes. `evaluations`: of the network, for each step. `guidance`: the distilled scale
    that the function takes by default; None for the model's. `note`: what is printed of it.
    """

    stem: str
    draw: Callable[..., Array]
    size: tuple[int, int]
    about: Mapping[str, str]
    steps: int
    evaluations: int
    guidance: float | None = None
    note: str | None = None


def described_sides(sides: Mapping[str, int]) -> str:
    """Return the sides on which an image grows, and by how many pixels, as metadata say it."""
    return ", ".join(f"{side} {count}" for side, count in sides.items() if count)


MakeJob = Callable[[argparse.Namespace], tuple[Request, PictureJob]]
"""Reads the picture of the options; returns the request, and what is drawn."""


def draw_pictures(options: argparse.Namespace, make_job: MakeJob) -> None:
    """Draw from the picture of a command line, or from each picture of a file.

    **Raises:** `ValueError` if neither or both are given, or for lines that could not be drawn.
    """
    check_devices()
    if options.pictures is None:
        if options.picture is None:
            raise ValueError("Give a picture, or a file of them by --pictures FILE.")
        _draw_one(*make_job(options))
        return
    if options.picture is not None or options.prompt is not None:
        raise ValueError(
            "With --pictures, the lines of the file name the pictures and their prompts. "
            "Leave out those of the command line."
        )
    if options.images > 1 or options.seed is not None:
        raise ValueError(
            "--images and --seed do nothing with --pictures: each line is one image, and may have "
            "a seed. Leave them out."
        )
    _draw_lines(options, make_job)


def _draw_one(request: Request, job: PictureJob) -> None:
    """Load the models, draw, write the images, and print the times and the paths."""
    request = with_plan(request, picture=True)
    groups = batches(request.images, request.batch)
    with Clock(job.steps * len(groups), job.evaluations, silent=request.quiet) as clock:
        models = _load(request, clock)
        images = _draw(request, job, models, clock)
    if job.note is not None and not request.quiet:
        print(job.note)
    if not request.quiet:
        print(clock.report())
    metadata = _metadata(request, job, _guidance_text(request, job, models))
    for number, image in enumerate(images):
        about = metadata | {"image": str(number)}
        print(write_numbered(image, request.folder, about, stem=job.stem))


def _draw_lines(options: argparse.Namespace, make_job: MakeJob) -> None:
    """Draw one image from the picture of each line that has none yet, with models loaded once."""
    lines, problems = read_picture_lines(options)
    models: Models | None = None
    written = present = 0
    for line in lines:
        try:
            request, job = make_job(line.options)
            path = request.folder / f"{line.id}.png"
            if path.exists() or path.is_symlink():
                _check_present(path, request, job)
                present += 1
                continue
            request = with_plan(request, picture=True)
            with Clock(job.steps, job.evaluations, silent=request.quiet) as clock:
                models = _load(request, clock) if models is None else models
                image = _draw(request, job, models, clock)[0]
            metadata = _metadata(request, job, _guidance_text(request, job, models))
            write_png(image, path, metadata | {"image": "0"})
        except (ValueError, OSError) as error:
            problems.append(f"line {line.number}: {error}")
            continue
        written += 1
        print(path)
    if not options.quiet:
        print(f"{written} images written, {present} were there, {len(lines)} lines in all")
    raise_problems(options.pictures, problems)


def _check_present(path: Path, request: Request, job: PictureJob) -> None:
    """**Raises:** `ValueError` if an existing image is not the one that a line would write."""
    found = read_metadata(path)
    guidance = request.expected_guidance(found)
    if request.distilled is None and job.guidance is not None and found.get("guidance") != "none":
        guidance = f"{job.guidance:g}"
    reason = difference(found, _metadata(request, job, guidance) | {"image": "0"})
    if reason is not None:
        raise ValueError(f"{reason}; remove {path.name}, or give the line another id")


def _draw(request: Request, job: PictureJob, models: Models, clock: Clock) -> np.ndarray:
    """Return the images of a job."""
    assert request.line is not None
    request.check_conditions(models.flux.config)
    if request.vae_memory is not None:
        models = models._replace(vae=limit_vae_memory(models.vae, request.vae_memory))
    images = job.draw(
        models,
        key=seed_key(request.line.seed),
        settings=_settings(request),
        guidance=request.recipe.guidance,
        hooks=clock,
    )
    return np.asarray(images)


def _metadata(request: Request, job: PictureJob, guidance: str) -> dict[str, str]:
    """Return what images say of how they were drawn. `guidance`: the distilled scale."""
    assert request.line is not None
    changes = {**job.about, "size": f"{job.size[1]}x{job.size[0]}"}
    return request.metadata(request.line, guidance, changes)


def _guidance_text(request: Request, job: PictureJob, models: Models) -> str:
    """Return the distilled scale of the prompt, "none" for a network that takes none."""
    scale = request.distilled
    if scale is None and models.flux.config.guidance_embed:
        scale = job.guidance
    distilled = distilled_guidance(models.flux, request.defaults, scale)
    return "none" if distilled is None else f"{float(distilled):g}"


def read_picture(options: argparse.Namespace) -> Image:
    """Return the picture of a command, in [-1, 1]."""
    return jnp.asarray(interruptible(read_image, options.picture))


def prompt_of(options: argparse.Namespace) -> str:
    """Return the prompt of a command. **Raises:** `ValueError` if there is none."""
    if options.prompt is None:
        raise ValueError("A prompt is missing. Give one after the picture, or in each line.")
    return options.prompt


def size_of(image: Image) -> tuple[int, int]:
    """Return the height and width of an image."""
    height, width, _ = image.shape
    return height, width


def _settings(request: Request) -> DrawSettings:
    return DrawSettings(
        images=request.images,
        times=request.recipe.times,
        step=request.recipe.step,
        distilled_guidance=request.distilled,
        max_length=request.max_length,
        batch=request.batch,
        dtype=request.dtype,
        attention=request.recipe.attention,
    )


def _load(request: Request, clock: Clock) -> Models:
    """Load every network.

    Text encoders stay in host memory except while prompts are encoded, unless the device is a CPU.
    """
    name_device(quiet=request.quiet)
    models = load_parts(
        request.model,
        request.load_of,
        offload_encoders=jax.default_backend() != "cpu",
        load=clock.load,
        note=complain,
    )
    return models._replace(defaults=request.defaults)
