"""The options of `fluxjax convert`, `inspect` and `download`."""

import argparse

from fluxjax.cli.options import byte_count, file_path
from fluxjax.cli.shared_options import SOURCE_HELP, add_json, add_layout, add_network_filter
from fluxjax.zoo import ZOO


def add_convert_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fluxjax convert` to its parser."""
    # `fluxjax lora merge` runs the same function with adapters.
    parser.set_defaults(lora=[])
    parser.add_argument("source", help=SOURCE_HELP)
    parser.add_argument(
        "destination", type=file_path, help="a new folder, or a new .safetensors or .gguf file"
    )
    add_layout(parser)
    add_network_filter(parser)
    parser.add_argument(
        "--shard-size",
        type=byte_count,
        metavar="SIZE",
        help="largest size of a file, as 5GB (default: no limit)",
    )


def add_inspect_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fluxjax inspect` to its parser."""
    parser.add_argument(
        "source",
        help="a file or folder in any layout, or the name or hub id of a downloaded model",
    )
    add_json(parser)


def add_download_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fluxjax download` to its parser."""
    parser.add_argument("name", help=f"{', '.join(ZOO)}, or a hub id")
    add_network_filter(parser)


def add_models_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fluxjax models` to its parser."""
    parser.add_argument(
        "--json", action="store_true", help="print an object for each model, with all that is known"
    )
