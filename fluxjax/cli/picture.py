"""What the commands share that draw from a picture: `edit`, `outpaint`, `fill` and `restore`."""

import argparse
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from fluxjax.cli.compilation_cache import use_cache
from fluxjax.cli.console import complain
from fluxjax.cli.progress import Clock
from fluxjax.cli.request import Request, read_request
from fluxjax.devices.offload import offload
from fluxjax.generate.image import write_numbered
from fluxjax.generate.latents import seed_key
from fluxjax.generate.load import Models, assemble_models, load_network, load_tokenizers
from fluxjax.generate.masks import padded_size
from fluxjax.generate.prompted import DrawSettings, batches, distilled_guidance
from fluxjax.shapes import Array, Image


def request_of_size(
    options: argparse.Namespace, size: tuple[int, int], *, features: int = 0
) -> Request:
    """Return the options as values, for images of a size in pixels.

    `features`: how many the command itself appends to each image token.
    """
    use_cache(options.compilation_cache)
    options.height, options.width = padded_size(*size)
    return read_request(options, features=features)


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


def run_job(request: Request, job: PictureJob) -> None:
    """Load the models, draw, write the images, and print the times and the paths."""
    line = request.line
    assert line is not None
    groups = batches(request.images, request.batch)
    with Clock(job.steps * len(groups), job.evaluations) as clock:
        models = _load(request, clock)
        request.check_conditions(models.flux.config)
        images = np.asarray(
            job.draw(
                models,
                key=seed_key(line.seed),
                settings=_settings(request),
                guidance=request.recipe.guidance,
                hooks=clock,
            )
        )
    guidance = _guidance_text(request, job, models)
    changes = {**job.about, "size": f"{job.size[1]}x{job.size[0]}"}
    if job.note is not None:
        print(job.note)
    print(clock.report())
    for number, image in enumerate(images):
        metadata = request.metadata(line, guidance, changes) | {"image": str(number)}
        print(write_numbered(image, request.folder, metadata, stem=job.stem))


def _guidance_text(request: Request, job: PictureJob, models: Models) -> str:
    """Return the distilled scale of the prompt, "none" for a network that takes none."""
    scale = request.distilled
    if scale is None and models.flux.config.guidance_embed:
        scale = job.guidance
    distilled = distilled_guidance(models.flux, request.defaults, scale)
    return "none" if distilled is None else f"{float(distilled):g}"


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
    offloads = jax.default_backend() != "cpu"
    family = request.family
    tokenizers = clock.load("tokenizers", lambda: load_tokenizers(request.model))
    networks = {}
    for name in family.networks:

        def load(name: str = name):
            network = load_network(name, request.model, request.load, note=complain)
            return offload(network) if offloads and name in family.text_encoders else network

        networks[name] = clock.load(name, load)
    return assemble_models(
        tokenizers,
        networks,
        family=family,
        defaults=request.defaults,
        mesh=request.load.mesh,
    )
