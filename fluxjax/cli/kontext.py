"""`fluxjax edit` by FLUX.1 Kontext: an instruction says what becomes of the picture."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp

from fluxjax.checkpoint.defaults import load_defaults
from fluxjax.checkpoint.members import member_of_source
from fluxjax.cli.console import interruptible
from fluxjax.cli.picture import PictureJob, prompt_of, read_picture, request_of_size, size_of
from fluxjax.cli.request import Request
from fluxjax.cli.starts import describe_file
from fluxjax.generate.draw_settings import DrawSettings
from fluxjax.generate.image import read_image
from fluxjax.generate.kontext import ReferenceImage, References, kontext_image
from fluxjax.generate.latents import check_size, image_tokens
from fluxjax.generate.load_models import Models
from fluxjax.shapes import Array

METHOD = "kontext"
"""Its name on the command line, beside those of `EDIT_METHODS`."""
_OPTIONS = ("reference", "placement", "keep_size", "height", "width")
_OTHER_OPTIONS = (
    "source_prompt",
    "method_strength",
    "source_guidance",
    "averages",
    "noise_rate",
    "image_rate",
    "image_share",
    "mask_time",
    "ratio",
)


def edit_method_name(options: argparse.Namespace) -> str:
    """Return the name of the method, by default "kontext" for a Kontext model, else "flowedit".

    **Raises:** `ValueError` for an option that the method does not have.
    """
    name = options.method
    if name is None:
        name = METHOD if member_of_source(options.model) == METHOD else "flowedit"
    for option in _OTHER_OPTIONS if name == METHOD else _OPTIONS:
        if getattr(options, option) not in (None, False, []):
            shown = option.removeprefix("method_").replace("_", "-")
            raise ValueError(f"--{shown} does nothing with --method {name}. Leave it out.")
    return name


def kontext_job(options: argparse.Namespace) -> tuple[Request, PictureJob]:
    """Return how a picture is edited by FLUX.1 Kontext."""
    images = [read_picture(options)]
    prompt = prompt_of(options)
    for path in options.reference:
        images.append(jnp.asarray(interruptible(read_image, path)))
    placement = options.placement or "offset"
    references = References(placement=placement, preferred=False if options.keep_size else None)
    defaults = interruptible(load_defaults, options.model)
    resized = [size_of(references.resize(image, defaults)) for image in images]
    height, width = resized[0]
    height = height if options.height is None else options.height
    width = width if options.width is None else options.width
    check_size("--height and --width", height, width)
    about = {
        "init_image": describe_file(options.picture),
        "method": METHOD,
    }
    if options.reference:
        about["references"] = "; ".join(describe_file(path) for path in options.reference)
    if options.placement is not None:
        about["placement"] = placement
    if options.keep_size:
        about["reference_size"] = "kept"
    tokens = sum(image_tokens(*size) for size in resized)
    request = request_of_size(options, (height, width), takes="reference", reference_tokens=tokens)
    size = (height, width)
    job = PictureJob(
        stem="edit",
        draw=partial(_draw, images=images, prompt=prompt, size=size, references=references),
        size=size,
        about=about,
        steps=request.steps,
        evaluations=request.recipe.step.evaluations,
    )
    return request, job


def _draw(
    models: Models,
    *,
    images: Sequence[ReferenceImage],
    prompt: str,
    size: tuple[int, int],
    settings: DrawSettings,
    **options: Any,
) -> Array:
    """Draw at a size beside pictures that the model looks at.

    **Arguments:** `size`: height and width. `options`: as for `kontext_image`.
    """
    settings = replace(settings, height=size[0], width=size[1])
    return kontext_image(models, images, prompt, settings=settings, **options)
