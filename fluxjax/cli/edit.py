"""The commands `fluxjax edit`, `outpaint` and `restore`: images drawn from a picture."""

import argparse
from dataclasses import MISSING, fields, replace
from functools import partial
from pathlib import Path

import jax.numpy as jnp

from fluxjax.cli.compound_options import OperatorText
from fluxjax.cli.kontext import METHOD as KONTEXT, edit_method_name, kontext_job
from fluxjax.cli.picture import (
    PictureJob,
    draw_pictures,
    prompt_of,
    read_picture,
    request_of_size,
    size_of,
)
from fluxjax.cli.request import Request
from fluxjax.cli.starts import describe_file, describe_start
from fluxjax.generate.canvas import Margins
from fluxjax.generate.degradations import Blurred, Degradation, Hidden, Shrunk
from fluxjax.generate.edit_image import edit_image
from fluxjax.generate.edit_methods import EDIT_METHODS, EditMethod
from fluxjax.generate.image_to_image import Repaint, outpaint
from fluxjax.generate.masks import read_mask
from fluxjax.generate.restore_image import (
    WITH_OWN_STEP,
    Restoration,
    restoration_times,
    restore_image,
)
from fluxjax.shapes import Image

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
    """Edit images by prompts, and write the results."""
    options.method = edit_method_name(options)
    draw_pictures(options, kontext_job if options.method == KONTEXT else _edit_job)


def run_outpaint(options: argparse.Namespace) -> None:
    """Draw what lies around images, and write the results."""
    draw_pictures(options, _outpaint_job)


def run_restore(options: argparse.Namespace) -> None:
    """Restore pictures from what is left of them, and write the results."""
    draw_pictures(options, _restore_job)


def _edit_job(options: argparse.Namespace) -> tuple[Request, PictureJob]:
    """Read the picture of `fluxjax edit`; return the request, and what is drawn.

    **Raises:** `ValueError` for options that the method has no use for.
    """
    image, prompt = read_picture(options), prompt_of(options)
    method = _edit_method(options)
    if options.images > 1 and not method.draws:
        raise ValueError(
            f"--images does nothing with --method {method.name}, which draws no noise: all would "
            "be the same. Leave it out."
        )
    request = request_of_size(options, size_of(image))
    about = {"init_image": describe_file(options.picture), "method": method.name}
    for name, value in vars(method).items():
        about[name] = value if isinstance(value, str) else f"{value:.4g}"
    if not method.any_step:
        about["integrator"] = method.name
    start = method.start_of(request.recipe.times)
    about["start"] = f"t {start.time:.4f}, {start.steps} steps"
    job = PictureJob(
        "edit",
        partial(edit_image, image=image, prompt=prompt, method=method),
        size_of(image),
        about,
        steps=start.steps * method.phases,
        evaluations=method.evaluations,
        guidance=method.target_guidance,
        note=describe_start(Repaint(strength=method.strength), start),
    )
    return request, job


def _outpaint_job(options: argparse.Namespace) -> tuple[Request, PictureJob]:
    """Read the picture of `fluxjax outpaint`; return the request, and what is drawn.

    **Raises:** `ValueError` if the image grows on no side.
    """
    image, prompt = read_picture(options), prompt_of(options)
    sides = {name: getattr(options, name) for name in ("left", "right", "top", "bottom")}
    if max(sides.values()) == 0:
        raise ValueError(
            "`fluxjax outpaint` needs to know where the image grows. Give one of --left, --right, "
            "--top and --bottom, as --left 256."
        )
    margins = Margins(**sides)
    height = image.shape[0] + margins.top + margins.bottom
    width = image.shape[1] + margins.left + margins.right
    request = request_of_size(options, (height, width))
    about = {"init_image": describe_file(options.picture)}
    about["margins"] = ", ".join(f"{name} {count}" for name, count in sides.items() if count)
    draw = partial(outpaint, image=image, prompt=prompt, margins=margins)
    evaluations = request.recipe.step.evaluations
    size = (height, width)
    return request, PictureJob("outpaint", draw, size, about, request.steps, evaluations)


def _restore_job(options: argparse.Namespace) -> tuple[Request, PictureJob]:
    """Read the picture of `fluxjax restore`; return the request, and what is drawn.

    Without a timer of its own, some methods take times that are made for restoration.

    **Raises:** `ValueError` without an operator, or for a picture that this one can't be undone in.
    """
    if options.operator is None:
        raise ValueError(
            "`fluxjax restore` needs to know what has happened to the picture. Give --operator, as "
            "--operator blur:2."
        )
    image, prompt = read_picture(options), options.prompt or ""
    degradation = _degradation(options.operator, image)
    restoration = Restoration(
        degradation=degradation,
        noise=options.noise,
        method=options.method,
        iterations=options.iterations,
        size=options.size,
    )
    degradation.check(image)
    size = degradation.restored_size(*size_of(image))
    own_times = options.timer is None
    # A copy: the next line of a file has times of its own again.
    options = argparse.Namespace(**{**vars(options), "timer": options.timer or "model"})
    options.prompt = prompt
    request = request_of_size(options, size)
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
    draw = partial(restore_image, image=image, prompt=prompt, restoration=restoration)
    return request, PictureJob("restore", draw, size, about, request.steps, 1)


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
    """Return what has happened to a picture, as the option says it."""
    if operator.kind == "blur":
        return Blurred(float(operator.value))
    if operator.kind == "downsample":
        return Shrunk(int(operator.value))
    return Hidden(jnp.asarray(read_mask(operator.value, size=size_of(image))))


def _described(operator: OperatorText) -> str:
    if operator.kind == "mask":
        return f"mask: {describe_file(Path(operator.value))}"
    return f"{operator.kind}: {operator.value}"
