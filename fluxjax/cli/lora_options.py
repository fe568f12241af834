"""The options of `fluxjax lora inspect`, `merge`, `convert` and `extract`."""

import argparse

from fluxjax.cli.choices import LORA_FORMATS
from fluxjax.cli.compound_options import adapter
from fluxjax.cli.options import file_path, lora_rank
from fluxjax.cli.shared_options import ADAPTER_HELP, SOURCE_HELP, add_json, add_layout


def add_lora_inspect_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fluxjax lora inspect` to its parser."""
    parser.add_argument("adapter", type=adapter, metavar="FILE", help=ADAPTER_HELP)
    add_json(parser)


def add_lora_merge_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fluxjax lora merge` to its parser."""
    # The function of `fluxjax convert` runs, which also has these options.
    parser.set_defaults(only=None, shard_size=None)
    parser.add_argument("source", metavar="BASE", help=SOURCE_HELP)
    parser.add_argument(
        "lora",
        nargs="+",
        type=adapter,
        metavar="ADAPTER",
        help="FILE[:SCALE] or hub:OWNER/REPO/FILE[:SCALE]",
    )
    _add_output_file(parser, "a new folder, or a new .safetensors file")
    add_layout(parser)


def add_lora_convert_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fluxjax lora convert` to its parser."""
    parser.add_argument("adapter", type=adapter, metavar="FILE", help=ADAPTER_HELP)
    parser.add_argument("destination", type=file_path, help="a new .safetensors file")
    _add_format(parser, "peft", "format of the output: %(choices)s")


def add_lora_extract_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fluxjax lora extract` to its parser."""
    parser.add_argument("base", metavar="BASE", help=SOURCE_HELP)
    parser.add_argument("tuned", metavar="TUNED", help="the same model after fine-tuning")
    _add_output_file(parser, "a new .safetensors file")
    parser.add_argument(
        "--rank",
        type=lora_rank,
        required=True,
        help="rank of the two factors that approximate the change of each weight",
    )
    # Adapters for the VAE exist in no format.
    parser.add_argument(
        "--only",
        choices=("flux", "t5", "clip"),
        default="flux",
        help="the network (default: %(default)s)",
    )
    _add_format(
        parser,
        "kohya",
        "format of the output: %(choices)s; peft cannot hold changes of biases and norms",
    )


def _add_output_file(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "-o",
        "--output",
        dest="destination",
        type=file_path,
        required=True,
        metavar="PATH",
        help=what,
    )


def _add_format(parser: argparse.ArgumentParser, default: str, text: str) -> None:
    parser.add_argument(
        "--to",
        choices=LORA_FORMATS,
        default=default,
        metavar="FORMAT",
        help=f"{text} (default: %(default)s)",
    )
