"""The options of `fluxjax ui`."""

import argparse

from fluxjax.cli.options import whole_number
from fluxjax.cli.shared_options import (
    add_compilation_cache,
    add_dtype,
    add_model,
    add_output_folder,
)

DEFAULT_PORT = 7860


def add_ui_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fluxjax ui` to its parser."""
    add_model(parser)
    add_dtype(parser)
    add_output_folder(parser, "flux_N.png, which the page's gallery shows")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on; 0.0.0.0 lets other machines draw, without a password "
        "(default: %(default)s, only this machine)",
    )
    parser.add_argument(
        "--port",
        type=whole_number(0, 65535),
        default=DEFAULT_PORT,
        help="port to listen on; 0 takes a free one (default: %(default)s)",
    )
    add_compilation_cache(parser)
