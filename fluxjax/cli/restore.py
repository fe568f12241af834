"""The command `fluxjax restore`: pictures drawn from what is left of them."""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax.numpy as jnp

from fluxjax.cli.compound_options import OperatorText
from fluxjax.cli.picture import PictureJob, draw_pictures, read_picture, request_of_size, size_of
from fluxjax.cli.request import Request
from fluxjax.cli.starts import describe_file
from fluxjax.generate.degradations import Blurred, Degradation, Hidden, Shrunk
from fluxjax.generate.masks import read_mask
from fluxjax.generate.restore_image import (
    WITH_OWN_STEP,
    Restoration,
    restoration_times,
    restore_image,
)
from fluxjax.shapes import Image


def run_restore(options: argparse.Namespace) -> None:
    """Restore pictures from what is left of them, and write the results."""
    draw_pictures(options, _restore_job)


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
    image = read_picture(options)
    prompt = options.prompt or ""
    restoration = _restoration(options, image)
    restoration.degradation.check(image)
    size = restoration.degradation.restored_size(*size_of(image))
    has_own_times = options.timer is None
    # A copy: the next line of a file has times of its own again.
    options = argparse.Namespace(**{**vars(options), "timer": options.timer or "model"})
    options.prompt = prompt
    request = request_of_size(options, size)
    about = _about(options)
    if has_own_times:
        times = restoration_times(options.method, request.recipe.times)
        if times is not request.recipe.times:
            request = replace(request, recipe=replace(request.recipe, times=times))
            about["timer"] = "restoration"
    job = PictureJob(
        stem="restore",
        draw=partial(restore_image, image=image, prompt=prompt, restoration=restoration),
        size=size,
        about=about,
        steps=request.steps,
        evaluations=1,
    )
    return request, job


def _restoration(options: argparse.Namespace, image: Image) -> Restoration:
    """Return how a picture is restored, by the options."""
    return Restoration(
        degradation=_degradation(options.operator, image),
        noise=options.noise,
        method=options.method,
        iterations=options.iterations,
        size=options.size,
    )


def _about(options: argparse.Namespace) -> dict[str, str]:
    """Return what metadata say of the picture and of its restoration."""
    about = {
        "init_image": describe_file(options.picture),
        "operator": _described(options.operator),
        "noise": f"{options.noise:g}",
        "method": options.method,
        "iterations": str(options.iterations),
    }
    if options.method in WITH_OWN_STEP:
        about["integrator"] = options.method
    if options.size is not None:
        about["step_size"] = f"{options.size:g}"
    return about


def _degradation(operator: OperatorText, image: Image) -> Degradation:
    """Return what has happened to a picture, as the option says it."""
    if operator.kind == "blur":
        return Blurred(float(operator.value))
    if operator.kind == "downsample":
        return Shrunk(int(operator.value))
    return Hidden(jnp.asarray(read_mask(operator.value, size=size_of(image))))


def _described(operator: OperatorText) -> str:
    """Return what has happened to a picture, as metadata say it."""
    if operator.kind == "mask":
        return f"mask: {describe_file(Path(operator.value))}"
    return f"{operator.kind}: {operator.value}"
