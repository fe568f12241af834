"""The options of `fluxjax compare`."""

import argparse

from fluxjax.cli.choices import INTEGRATORS, TIMERS
from fluxjax.cli.options import NameList, seed, step_count, step_counts, unicode_text
from fluxjax.cli.shared_options import (
    add_cfg,
    add_compilation_cache,
    add_dtype,
    add_eta,
    add_guidance,
    add_model,
    add_output_folder,
    add_shift,
    add_size,
)


def add_compare_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fluxjax compare` to its parser."""
    parser.add_argument("prompt", type=unicode_text, help="text that the image shows")
    add_model(parser)
    _add_samplers(parser)
    add_guidance(parser)
    add_cfg(parser)
    parser.add_argument(
        "--negative-prompt",
        type=unicode_text,
        default="",
        metavar="TEXT",
        help="text that the images are guided away from, with --cfg (default: the empty prompt)",
    )
    add_size(parser)
    parser.add_argument(
        "--seed",
        type=seed,
        default=0,
        help="seed of the noise, below 2^63 (default: %(default)s)",
    )
    add_dtype(parser)
    add_output_folder(parser, "compare_N.png and compare_N.csv")
    add_compilation_cache(parser)


def _add_samplers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--integrators",
        type=NameList(INTEGRATORS),
        default=["euler", "heun", "dpmpp_2m"],
        metavar="NAMES",
        help="separated by commas: %(type)s (default: euler,heun,dpmpp_2m)",
    )
    parser.add_argument(
        "--timers",
        type=NameList(TIMERS),
        default=["model"],
        metavar="NAMES",
        help="separated by commas: %(type)s (default: model)",
    )
    parser.add_argument(
        "--steps",
        type=step_counts,
        default=[8, 20],
        metavar="COUNTS",
        help="numbers of steps, separated by commas (default: 8,20)",
    )
    parser.add_argument(
        "--reference-steps",
        type=step_count,
        default=200,
        metavar="COUNT",
        help="steps of the reference, which is drawn by heun at the model's times "
        "(default: %(default)s)",
    )
    add_eta(parser)
    add_shift(parser)
