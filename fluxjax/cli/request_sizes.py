"""The numbers of a request from the options: sizes, steps, batch, seeds and sampling times."""

import argparse
from collections.abc import Callable
from typing import NamedTuple

from fluxjax.cli.request import or_default
from fluxjax.generate.latents import aspect_size, check_size
from fluxjax.generate.limits import check_finite_times
from fluxjax.generate.samplers import timer
from fluxjax.generate.times_file import TIMES_SUFFIX, read_times
from fluxjax.printable import printable
from fluxjax.shapes import Times
from fluxjax.zoo import Defaults


class RequestSizes(NamedTuple):
    """The numbers of what is drawn, with the model's defaults filled in; as in `Request`.

    `times`: of the file that the timer names, if it names one.
    """

    height: int
    width: int
    times: Times | None
    steps: int
    max_length: int
    batch: int


def sizes_of_options(options: argparse.Namespace, defaults: Defaults) -> RequestSizes:
    """Return the numbers of what is drawn.

    **Arguments:** `defaults`: of the model, for what no option says.
    **Raises:** `ValueError` for a size that is none of an image, or options that exclude each
    other.
    """
    height, width = _size(options, defaults)
    check_size("--height and --width", height, width)
    if options.prompts is not None:
        batch = or_default(options.batch, 1)
    elif options.drawn_in is not None:
        batch = options.drawn_in.rows
    else:
        # Never more rows than images: what is drawn beyond them would be thrown away.
        count = options.images * len(seeds_of_options(options)) * len(texts_of_options(options))
        batch = min(or_default(options.batch, count), count)
    times = _times_of_file(options)
    return RequestSizes(
        height=height,
        width=width,
        times=times,
        steps=or_default(options.steps, defaults.steps) if times is None else len(times) - 1,
        max_length=or_default(options.max_sequence_length, defaults.max_length),
        batch=batch,
    )


def _size(options: argparse.Namespace, defaults: Defaults) -> tuple[int, int]:
    """Return the height and width that are drawn, in pixels."""
    if options.aspect is not None:
        if options.height is not None or options.width is not None:
            raise ValueError(
                "--aspect chooses the height and the width. Leave out --height and --width, or it."
            )
        return aspect_size(options.aspect, defaults.height * defaults.width)
    height = or_default(options.height, defaults.height)
    return height, or_default(options.width, defaults.width)


def seeds_of_options(options: argparse.Namespace) -> tuple[int, ...]:
    """Return the seeds of one prompt: those of --seeds, or the one of --seed."""
    if options.seeds is not None:
        return tuple(options.seeds)
    return (or_default(options.seed, 0),)


def _times_of_file(options: argparse.Namespace) -> Times | None:
    """Return the times of the file that the timer names, if it names one."""
    if not options.timer.endswith(TIMES_SUFFIX):
        return None
    times = read_times(options.timer)
    steps = len(times) - 1
    if options.steps not in (None, steps):
        raise ValueError(
            f"--timer {printable(options.timer)} has {steps} steps, and --steps is "
            f"{options.steps}. Leave out --steps, or plan other times."
        )
    if options.shift is not None:
        raise ValueError("--shift does nothing with a file of times. Leave it out.")
    return times


def timers_of_options(
    options: argparse.Namespace, sizes: RequestSizes, defaults: Defaults
) -> Callable[[int], Callable[[int, int], Times]]:
    """Return the function that gives, for a number of steps, the timer of heights and widths.

    **Arguments:** `sizes`: with the times of a file, if the timer names one: it is then for the
    number of steps of that file, and raises `ValueError` for another.
    """

    def timer_of(steps: int) -> Callable[[int, int], Times]:
        if sizes.times is not None and steps != sizes.steps:
            raise ValueError(
                f"its {steps} steps are not those of the file of times, {sizes.steps}; leave them "
                "out"
            )

        def times(height: int, width: int) -> Times:
            if sizes.times is not None:
                return sizes.times
            nodes = timer(options.timer, steps, defaults, height, width, shift=options.shift)
            check_finite_times(nodes)
            return nodes

        return times

    return timer_of


def texts_of_options(options: argparse.Namespace) -> list[str]:
    """Return the prompts of the command line."""
    return options.texts or [options.prompt]
