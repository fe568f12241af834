"""The options of `fluxjax completion`."""

import argparse

SHELLS = ("bash", "zsh", "fish")


def add_completion_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fluxjax completion` to its parser."""
    parser.add_argument("shell", choices=SHELLS, help="the shell: %(choices)s")
