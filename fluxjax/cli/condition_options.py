"""Options of what images are conditioned on beside a prompt."""

from fluxjax.cli.options import OptionGroup, file_path

CONDITION_DEFAULTS = {"control": None, "canny": False}
"""The values of these options where they are not given: for commands that lack them."""


def add_condition_options(group: OptionGroup) -> None:
    """Add the options of `CONDITION_DEFAULTS`."""
    group.add_argument(
        "--control",
        type=file_path,
        metavar="FILE",
        help="edges or depth that the images follow, for FLUX.1 Canny or Depth (near is bright); "
        "it is resized to the size of the images, all of which it applies to",
    )
    group.add_argument(
        "--canny",
        action="store_true",
        help="with --control, draw along the edges of that image, which are detected (needs the "
        "extra canny)",
    )
