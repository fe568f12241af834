"""The options of `fluxjax train`."""

import argparse

from fluxjax.cli.compound_options import setting
from fluxjax.cli.options import file_path, step_count
from fluxjax.cli.shared_options import add_compilation_cache


def add_train_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fluxjax train` to its parser."""
    add = parser.add_argument
    add("config", type=file_path, metavar="CONFIG.toml", help="the configuration of the training")
    add(
        "--set",
        type=setting,
        action="append",
        default=[],
        dest="settings",
        metavar="NAME=VALUE",
        help="a setting in place of the configuration's, as optimizer.learning_rate=1e-4; repeat "
        "it for several",
    )
    add("--model", help="in place of the configuration's: a zoo name, a folder or a hub id")
    add("--output", type=file_path, help="in place of the configuration's: a new file or folder")
    add("--steps", type=step_count, help="in place of the configuration's: updates in all")
    add(
        "--dry-run",
        action="store_true",
        help="compile a step, print the memory and the operations that it takes, and end; the exit "
        "code is 2 if it does not fit",
    )
    add("--restart", action="store_true", help="begin anew, although there are checkpoints")
    add(
        "--distributed",
        action="store_true",
        help="join the other processes of the job, each of which reads its part of the data",
    )
    add_compilation_cache(parser)
