"""The command `fluxjax fill`: parts of a picture drawn by FLUX.1 Fill."""

import argparse
from functools import partial

import jax.numpy as jnp

from fluxjax.cli.console import interruptible
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
from fluxjax.cli.starts import describe_file
from fluxjax.generate.canvas import Margins, extend_canvas
from fluxjax.generate.fill import Mask, fill_image
from fluxjax.generate.masks import read_mask
from fluxjax.shapes import Array, Float, Image

Canvas = Float[Array, "new_height new_width 3"]
"""An image, larger than the picture where it is drawn around."""


def run_fill(options: argparse.Namespace) -> None:
    """Draw the masked part of pictures, or what lies around them, and write the results."""
    draw_pictures(options, _fill_job)


def _fill_job(options: argparse.Namespace) -> tuple[Request, PictureJob]:
    """Read the picture of `fluxjax fill`; return the request, and what is drawn.

    **Raises:** `ValueError` if nothing says what is drawn.
    """
    picture = read_picture(options)
    prompt = prompt_of(options)
    if options.mask is None and options.outpaint is None:
        raise ValueError(
            "`fluxjax fill` needs to know what is drawn. Give --mask FILE, or --outpaint SIDES."
        )
    image, mask = _canvas(options, picture)
    about = {"init_image": describe_file(options.picture)}
    if options.outpaint is not None:
        about["margins"] = described_sides(options.outpaint)
    else:
        about["mask"] = describe_file(options.mask)
        if options.binary_mask:
            about["mask"] += ", binary"
    request = request_of_size(options, size_of(image), takes="fill")
    job = PictureJob(
        stem="fill",
        draw=partial(fill_image, image=image, mask=mask, prompt=prompt),
        size=size_of(image),
        about=about,
        steps=request.steps,
        evaluations=request.recipe.step.evaluations,
    )
    return request, job


def _canvas(options: argparse.Namespace, picture: Image) -> tuple[Canvas, Mask]:
    """Return what is drawn on, and the mask of what is drawn."""
    if options.outpaint is not None:
        if options.binary_mask:
            raise ValueError("--binary-mask does nothing with --outpaint. Leave it out.")
        return extend_canvas(picture, Margins(**options.outpaint))
    mask = jnp.asarray(interruptible(read_mask, options.mask, size=size_of(picture)))
    if options.binary_mask:
        mask = jnp.where(mask >= 0.5, jnp.float32(1), jnp.float32(0))
    return picture, mask
