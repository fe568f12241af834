"""The commands `fluxjax edit`, `outpaint` and `restore`: images drawn from a picture."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.cli.compilation_cache import use_cache
from fluxjax.cli.console import complain, interruptible
from fluxjax.cli.options import OperatorText
from fluxjax.cli.progress import Clock
from fluxjax.cli.request import Request, read_request
from fluxjax.cli.starts import describe_file, describe_start
from fluxjax.devices.offload import offload
from fluxjax.generate.canvas import Margins
from fluxjax.generate.degradations import Blurred, Degradation, Hidden, Shrunk
from fluxjax.generate.edit_image import edit_image
from fluxjax.generate.edit_methods import EDIT_METHODS, EditMethod
from fluxjax.generate.image import read_image, write_numbered
from fluxjax.generate.image_to_image import Repaint, outpaint
from fluxjax.generate.latents import seed_key
from fluxjax.generate.limits import check_devices
from fluxjax.generate.load import Models, load_network, load_tokenizers
from fluxjax.generate.masks import padded_size, read_mask
from fluxjax.generate.prompted import DrawSettings, batches, distilled_guidance
from fluxjax.generate.restore_image import (
    WITH_OWN_STEP,
    Restoration,
    restoration_times,
    restore_image,
)
from fluxjax.shapes import Array, Image
from fluxjax.zoo import family_of

_METHOD_NUMBERS = (
    "source_guidance",
    "averages",
    "noise_rate",
    "image_rate",
    "image_share",
    "mask_time",
    "ratio",
)
"""Options of `fluxjax edit` that only some methods have, as fields of their records."""


def run_edit(options: argparse.Namespace) -> None:
    """Edit an image by prompts, and write the results."""
    check_devices()
    image = jnp.asarray(interruptible(read_image, options.picture))
    method = _edit_method(options)
    if options.images > 1 and not method.draws:
        raise ValueError(
            f"--images does nothing with --method {method.name}, which draws no noise: all would "
            "be the same. Leave it out."
        )
    request = _request(options, _size_of(image))
    about = {"init_image": describe_file(options.picture), "method": method.name}
    for name, value in vars(method).items():
        about[name] = value if isinstance(value, str) else f"{value:.4g}"
    if not method.any_step:
        about["integrator"] = method.name
    start = method.start_of(request.recipe.times)
    about["start"] = f"t {start.time:.4f}, {start.steps} steps"
    job = _Job(
        "edit",
        partial(edit_image, image=image, prompt=options.prompt, method=method),
        _size_of(image),
        about,
        steps=start.steps * method.phases,
        evaluations=method.evaluations,
        guidance=method.target_guidance,
        note=describe_start(Repaint(strength=method.strength), start),
    )
    _run(request, job)


def run_outpaint(options: argparse.Namespace) -> None:
    """Draw what lies around an image, and write the results."""
    check_devices()
    image = jnp.asarray(interruptible(read_image, options.picture))
    sides = {name: getattr(options, name) for name in ("left", "right", "top", "bottom")}
    if max(sides.values()) == 0:
        raise ValueError(
            "`fluxjax outpaint` needs to know where the image grows. Give one of --left, --right, "
            "--top and --bottom, as --left 256."
        )
    margins = Margins(**sides)
    height = image.shape[0] + margins.top + margins.bottom
    width = image.shape[1] + margins.left + margins.right
    request = _request(options, (height, width))
    about = {"init_image": describe_file(options.picture)}
    about["margins"] = ", ".join(f"{name} {count}" for name, count in sides.items() if count)
    draw = partial(outpaint, image=image, prompt=options.prompt, margins=margins)
    evaluations = request.recipe.step.evaluations
    _run(request, _Job("outpaint", draw, (height, width), about, request.steps, evaluations))


def run_restore(options: argparse.Namespace) -> None:
    """Restore a picture from what is left of it, and write the results."""
    check_devices()
    image = jnp.asarray(interruptible(read_image, options.picture))
    degradation = _degradation(options.operator, image)
    restoration = Restoration(
        degradation=degradation,
        noise=options.noise,
        method=options.method,
        iterations=options.iterations,
        size=options.size,
    )
    degradation.check(image)
    size = degradation.restored_size(*_size_of(image))
    own_times = options.timer is None
    options.timer = options.timer or "model"
    request = _request(options, size)
    about = {"init_image": describe_file(options.picture), "operator": _described(options.operator)}
    about |= {"noise": f"{options.noise:g}", "method": options.method}
    about["iterations"] = str(options.iterations)
    if options.method in WITH_OWN_STEP:
        about["integrator"] = options.method
    if options.size is not None:
        about["step_size"] = f"{options.size:g}"
    if own_times:
        times = restoration_times(options.method, request.recipe.times)
        if times is not request.recipe.times:
            request = replace(request, recipe=replace(request.recipe, times=times))
            about["timer"] = "restoration"
    draw = partial(restore_image, image=image, prompt=options.prompt, restoration=restoration)
    _run(request, _Job("restore", draw, size, about, request.steps, 1))


def _edit_method(options: argparse.Namespace) -> EditMethod:
    """Return the method with its numbers.

    **Raises:** `ValueError` for a number that it does not have, or a source prompt that is missing.
    """
    kind = EDIT_METHODS[options.method]
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    given = {"source_prompt": options.source_prompt, "strength": options.method_strength}
    for name in _METHOD_NUMBERS:
        given[name] = getattr(options, name)
    numbers = {name: value for name, value in given.items() if value is not None}
    for name in numbers:
        if name not in known:
            raise ValueError(
                f"--{name.replace('_', '-')} does nothing with --method {options.method}. "
                "Leave it out."
            )
    source = known.get("source_prompt")
    needs_source = source is not None and source.default is MISSING
    if needs_source and "source_prompt" not in numbers:
        raise ValueError(
            f"--method {options.method} compares two prompts. Describe the image as it is with "
            "--source-prompt, or choose --method sdedit."
        )
    return kind(**numbers)


def _degradation(operator: OperatorText, image: Image) -> Degradation:
    if operator.kind == "blur":
        return Blurred(float(operator.value))
    if operator.kind == "downsample":
        return Shrunk(int(operator.value))
    return Hidden(jnp.asarray(read_mask(operator.value, size=_size_of(image))))


def _described(operator: OperatorText) -> str:
    if operator.kind == "mask":
        return f"mask: {describe_file(Path(operator.value))}"
    return f"{operator.kind}: {operator.value}"


def _request(options: argparse.Namespace, size: tuple[int, int]) -> Request:
    """Return the options as values, for images of a size in pixels."""
    use_cache(options.compilation_cache)
    options.height, options.width = padded_size(*size)
    return read_request(options)


class _Job(NamedTuple):
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


def _run(request: Request, job: _Job) -> None:
    """Load the models, draw, write the images, and print the times and the paths."""
    line = request.line
    assert line is not None
    groups = batches(request.images, request.batch)
    with Clock(job.steps * len(groups), job.evaluations) as clock:
        models = _load(request, clock)
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


def _guidance_text(request: Request, job: _Job, models: Models) -> str:
    """Return the distilled scale of the prompt, "none" for a network that takes none."""
    scale = request.distilled
    if scale is None and models.flux.config.guidance_embed:
        scale = job.guidance
    distilled = distilled_guidance(models.flux, request.defaults, scale)
    return "none" if distilled is None else f"{float(distilled):g}"


def _size_of(image: Image) -> tuple[int, int]:
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
    family = family_of(request.model)
    tokenizers = clock.load("tokenizers", lambda: load_tokenizers(request.model))
    networks = {}
    for name in family.networks:

        def load(name: str = name):
            network = load_network(name, request.model, request.load, note=complain)
            return offload(network) if offloads and name in family.text_encoders else network

        networks[name] = clock.load(name, load)
    return Models(tokenizers, **networks, defaults=request.defaults, mesh=request.load.mesh)
