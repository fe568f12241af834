"""The entry point of the command line: its commands, their parser, and the call of the chosen one.

The options are parsed before JAX or a network is imported, so that help and mistakes are shown at
once. Each command therefore has two files: its options, which are light, and its function, which is
imported when the command runs.
"""

import argparse
import gc
import pkgutil
from collections.abc import Callable, Sequence
from typing import NamedTuple

from fluxjax.cli.compare_options import add_compare_options
from fluxjax.cli.completion_options import add_completion_options
from fluxjax.cli.console import interruptible, run_command
from fluxjax.cli.edit_options import (
    add_edit_options,
    add_fill_options,
    add_outpaint_options,
    add_restore_options,
)
from fluxjax.cli.encode_options import add_encode_options
from fluxjax.cli.generate_options import add_generate_options, add_plan_options
from fluxjax.cli.lora_options import (
    add_lora_convert_options,
    add_lora_extract_options,
    add_lora_inspect_options,
    add_lora_merge_options,
)
from fluxjax.cli.option_parser import Parser
from fluxjax.cli.train_options import add_train_options
from fluxjax.cli.ui_options import add_ui_options
from fluxjax.cli.weights_options import (
    add_convert_options,
    add_download_options,
    add_inspect_options,
    add_models_options,
)
from fluxjax.cli.xla_options import read_weights_in_place
from fluxjax.version import __version__


class Command(NamedTuple):
    """A command.

    `name`: the word that chooses it. `summary`: its line in the list of commands. `description`:
    what its own help begins with. `add_options`: adds its options to a parser. `function`: what it
    runs with the parsed options, as "package.module:function".
    """

    name: str
    summary: str
    description: str
    add_options: Callable[[argparse.ArgumentParser], None]
    function: str


COMMANDS = (
    Command(
        "generate",
        "draw images of a prompt",
        "Draw images of a prompt, or of each prompt in a file.",
        add_generate_options,
        "fluxjax.cli.generate:generate",
    ),
    Command(
        "plan",
        "say what `generate` would need in memory, and what fits",
        "Say what each stage of `fluxjax generate` needs in memory with the same options, and how "
        "it is drawn with where not all fits. Nothing is downloaded or drawn.",
        add_plan_options,
        "fluxjax.cli.plan:run_plan",
    ),
    Command(
        "edit",
        "change an image as prompts say",
        "Change an image to what a prompt says, and keep the rest of it.",
        add_edit_options,
        "fluxjax.cli.edit:run_edit",
    ),
    Command(
        "fill",
        "draw a part of an image by FLUX.1 Fill",
        "Draw the masked part of an image, or what lies around it, by FLUX.1 Fill: a network that "
        "reads the rest of the image.",
        add_fill_options,
        "fluxjax.cli.fill:run_fill",
    ),
    Command(
        "outpaint",
        "draw what lies around an image",
        "Draw what lies around an image, as a prompt of the whole new image says.",
        add_outpaint_options,
        "fluxjax.cli.edit:run_outpaint",
    ),
    Command(
        "restore",
        "restore a blurred, shrunk or partly hidden picture",
        "Draw what a picture may have been before it was blurred, shrunk or partly hidden.",
        add_restore_options,
        "fluxjax.cli.restore:run_restore",
    ),
    Command(
        "compare",
        "draw a prompt with several samplers",
        "Draw a prompt with several samplers from the same noise, and write a labelled grid of the "
        "images (PNG) and a table (CSV).",
        add_compare_options,
        "fluxjax.cli.compare:run_compare",
    ),
    Command(
        "encode",
        "encode images and captions for training",
        "Encode the images and captions of a training once, into a folder that training reads. A "
        "run that was interrupted is continued by the same command.",
        add_encode_options,
        "fluxjax.cli.encode:run_encode",
    ),
    Command(
        "convert",
        "write weights in another layout",
        "Write a checkpoint in another layout, tensor by tensor.",
        add_convert_options,
        "fluxjax.cli.weights:run_convert",
    ),
    Command(
        "inspect",
        "describe a file or folder of weights",
        "Describe what a file or folder contains; only its headers are read. The exit code is 1 if "
        "it does not load.",
        add_inspect_options,
        "fluxjax.cli.weights:run_inspect",
    ),
    Command(
        "ui",
        "open a local page that draws",
        "Serve a page on which images are drawn, edited and compared, on this machine only unless "
        "--host says otherwise. It needs the extra `ui`.",
        add_ui_options,
        "fluxjax.cli.ui:run_ui",
    ),
    Command(
        "models",
        "list the models that can be named",
        "List the models that can be named: parameters of the transformer, licence, what a model "
        "takes beside a prompt, how it is sampled by default, and where its files are.",
        add_models_options,
        "fluxjax.cli.models:run_models",
    ),
    Command(
        "completion",
        "print a script that completes commands in a shell",
        "Print a script by which a shell completes commands, options and their values. Write it to "
        "a file that the shell reads when it starts.",
        add_completion_options,
        "fluxjax.cli.completion:run_completion",
    ),
    Command(
        "download",
        "download a model",
        "Download the files of a model that fluxjax reads into the hub's cache, and print their "
        "folder.",
        add_download_options,
        "fluxjax.cli.weights:run_download",
    ),
    Command(
        "train",
        "train a model, some of its layers, or an adapter",
        "Train all of a model, some of its layers, or an adapter, as a configuration says. A "
        "training that was stopped goes on from its last checkpoint.",
        add_train_options,
        "fluxjax.cli.train:run_train",
    ),
)
LORA_ACTIONS = (
    Command(
        "inspect",
        "describe an adapter",
        "Describe what an adapter contains.",
        add_lora_inspect_options,
        "fluxjax.cli.lora:run_lora_inspect",
    ),
    Command(
        "merge",
        "merge adapters into a checkpoint",
        "Write a checkpoint with adapters merged into its weights, tensor by tensor.",
        add_lora_merge_options,
        "fluxjax.cli.weights:run_convert",
    ),
    Command(
        "convert",
        "write an adapter in another format",
        "Write an adapter in another format; the change that it makes to each weight stays the "
        "same.",
        add_lora_convert_options,
        "fluxjax.cli.lora:run_lora_convert",
    ),
    Command(
        "extract",
        "make an adapter from two checkpoints",
        "Write the adapter of a given rank that best approximates the difference between a "
        "fine-tuned checkpoint and its base.",
        add_lora_extract_options,
        "fluxjax.cli.lora:run_lora_extract",
    ),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    A mistake of the user is one line on standard error and exit code 2.

    **Arguments:** `arguments`: the words after `fluxjax`, by default those of the process. Without
    them a signal ends the process without its exit handlers.
    **Raises:** `SystemExit`, unless the command succeeds.
    """

    if arguments is None:
        # Tracing makes many small objects and hardly any cycles: a tenth of a short run was spent
        # looking for some.
        gc.set_threshold(100_000, 50, 100)

    def command() -> None:
        options = build_parser().parse_args(arguments)
        if arguments is None:
            read_weights_in_place()
        # The import takes seconds; in a worker thread, a signal ends it at once.
        function = interruptible(pkgutil.resolve_name, options.function)
        function(options)

    run_command(command, program=arguments is None)


def build_parser() -> Parser:
    """Return the parser of all commands; its result has the chosen command's `function`."""
    parser = Parser(prog="fluxjax", description="FLUX for JAX.")
    parser.set_defaults(root=parser)
    parser.add_argument("--version", action="version", version=f"fluxjax {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        _add_command(subparsers.add_parser, command)
    lora = subparsers.add_parser(
        "lora",
        help="inspect, merge, convert and extract adapters",
        description="Inspect, merge, convert and extract adapters.",
    )
    actions = lora.add_subparsers(required=True, metavar="ACTION")
    for action in LORA_ACTIONS:
        _add_command(actions.add_parser, action)
    return parser


def _add_command(add_parser: Callable[..., argparse.ArgumentParser], command: Command) -> None:
    parser = add_parser(command.name, help=command.summary, description=command.description)
    parser.set_defaults(function=command.function, parser=parser)
    command.add_options(parser)
