"""The command `fluxjax fill`: parts of a picture drawn by FLUX.1 Fill."""

import argparse
from functools import partial

import jax.numpy as jnp

from fluxjax.cli.console import interruptible
from fluxjax.cli.picture import PictureJob, request_of_size, run_job, size_of
from fluxjax.cli.starts import describe_file
from fluxjax.generate.canvas import Margins, extend_canvas
from fluxjax.generate.fill import Mask, fill_image
from fluxjax.generate.image import read_image
from fluxjax.generate.limits import check_devices
from fluxjax.generate.masks import read_mask
from fluxjax.shapes import Array, Float, Image
from fluxjax.zoo import APPENDED_FEATURES

Canvas = Float[Array, "new_height new_width 3"]
"""An image, larger than the picture where it is drawn around."""


def run_fill(options: argparse.Namespace) -> None:
    """Draw the masked part of a picture, or what lies around it, and write the results."""
    check_devices()
    picture = jnp.asarray(interruptible(read_image, options.picture))
    image, mask = _canvas(options, picture)
    about = {"init_image": describe_file(options.picture)}
    if options.outpaint is not None:
        about["margins"] = ", ".join(f"{side} {count}" for side, count in options.outpaint.items())
    else:
        about["mask"] = describe_file(options.mask)
        if options.binary_mask:
            about["mask"] += ", binary"
    request = request_of_size(options, size_of(image), features=APPENDED_FEATURES["fill"])
    draw = partial(fill_image, image=image, mask=mask, prompt=options.prompt)
    evaluations = request.recipe.step.evaluations
    run_job(request, PictureJob("fill", draw, size_of(image), about, request.steps, evaluations))


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
