"""The commands `fluxjax edit` and `outpaint`: images drawn from a picture."""

import argparse
from dataclasses import MISSING, fields
from functools import partial

from fluxjax.cli.kontext import METHOD as KONTEXT, edit_method_name, kontext_job
from fluxjax.cli.options import SIDES
from fluxjax.cli.picture import (
    PictureJob,
    described_sides,
    draw_pictures,
    prompt_of,
    read_picture,
    request_of_size,
    size_of,
)
from fluxjax.cli.request import Request
from fluxjax.cli.starts import describe_file, describe_start
from fluxjax.generate.canvas import Margins
from fluxjax.generate.edit_image import edit_image
from fluxjax.generate.edit_methods import EDIT_METHODS
from fluxjax.generate.edit_record import EditMethod
from fluxjax.generate.image_to_image import Repaint, outpaint

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


def _edit_job(options: argparse.Namespace) -> tuple[Request, PictureJob]:
    """Read the picture of `fluxjax edit`; return the request, and what is drawn.

    **Raises:** `ValueError` for options that the method has no use for.
    """
    image = read_picture(options)
    prompt = prompt_of(options)
    method = _edit_method(options)
    if options.images > 1 and not method.draws:
        raise ValueError(
            f"--images does nothing with --method {method.name}, which draws no noise: all would "
            "be the same. Leave it out."
        )
    request = request_of_size(options, size_of(image))
    about = {
        "init_image": describe_file(options.picture),
        "method": method.name,
    }
    for name, value in vars(method).items():
        about[name] = value if isinstance(value, str) else f"{value:.4g}"
    if not method.any_step:
        about["integrator"] = method.name
    start = method.start_of(request.recipe.times)
    about["start"] = f"t {start.time:.4f}, {start.steps} steps"
    job = PictureJob(
        stem="edit",
        draw=partial(edit_image, image=image, prompt=prompt, method=method),
        size=size_of(image),
        about=about,
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
    image = read_picture(options)
    prompt = prompt_of(options)
    sides = {name: getattr(options, name) for name in SIDES}
    if max(sides.values()) == 0:
        raise ValueError(
            "`fluxjax outpaint` needs to know where the image grows. Give one of --left, --right, "
            "--top and --bottom, as --left 256."
        )
    margins = Margins(**sides)
    height = image.shape[0] + margins.top + margins.bottom
    width = image.shape[1] + margins.left + margins.right
    request = request_of_size(options, (height, width))
    job = PictureJob(
        stem="outpaint",
        draw=partial(outpaint, image=image, prompt=prompt, margins=margins),
        size=(height, width),
        about={
            "init_image": describe_file(options.picture),
            "margins": described_sides(sides),
        },
        steps=request.steps,
        evaluations=request.recipe.step.evaluations,
    )
    return request, job


def _edit_method(options: argparse.Namespace) -> EditMethod:
    """Return the method with its numbers.

    **Raises:** `ValueError` for a number that it does not have, or a source prompt that is missing.
    """
    kind = EDIT_METHODS[options.method]
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    given = {
        "source_prompt": options.source_prompt,
        "strength": options.method_strength,
    }
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
