"""The options of `fluxjax encode`."""

import argparse
import re

from fluxjax.cli.choices import DATA_CONDITIONS, TEXT_DTYPES
from fluxjax.cli.option_parser import OptionGroup
from fluxjax.cli.options import (
    MAX_DEVICES,
    MAX_IMAGES,
    file_path,
    finite_number,
    image_count,
    pixel_count,
    seed,
    token_count,
    whole_number,
)
from fluxjax.cli.shared_options import add_compilation_cache, add_dtype
from fluxjax.zoo import ZOO


def add_encode_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fluxjax encode` to its parser."""
    parser.add_argument(
        "config",
        nargs="?",
        type=file_path,
        metavar="CONFIG.toml",
        help="configuration of a training, whose `model`, `dtype` and table `data` are read; "
        "options replace its values",
    )
    parser.add_argument(
        "--model",
        help=f"whose encoders are used: {', '.join(ZOO)}, a folder in the diffusers layout, or a "
        "hub id (default: tiny)",
    )
    add_dtype(parser)
    _add_data(parser.add_argument_group("data"))
    work = parser.add_argument_group("work")
    work.add_argument(
        "--batch",
        type=image_count,
        default=8,
        help="images and captions that are encoded at once (default: %(default)s)",
    )
    work.add_argument(
        "--shard-examples",
        type=image_count,
        default=128,
        metavar="COUNT",
        help="examples in a file (default: %(default)s)",
    )
    work.add_argument(
        "--part",
        type=part_of_work,
        default=(0, 1),
        metavar="I/N",
        help="encode part I of N, from 1/N to N/N: several processes share a folder "
        "(default: all of it)",
    )
    add_compilation_cache(work)


def _add_data(group: OptionGroup) -> None:
    add = group.add_argument
    add(
        "--sources",
        action="append",
        metavar="PATH",
        help="a folder, a .jsonl, .tar or .parquet file, or a pattern; repeat it for several",
    )
    add("--cache", type=file_path, metavar="DIR", help="folder for what is encoded")
    add("--size", type=pixel_count, metavar="PIXELS", help="about SIZE x SIZE pixels per image")
    add("--max-ratio", type=finite_number(1, 16), help="longer to shorter side (default: 2)")
    add("--size-step", type=pixel_count, metavar="PIXELS", help="of which sides are multiples")
    add(
        "--condition",
        choices=DATA_CONDITIONS,
        metavar="NAME",
        help="what examples are conditioned on beside their captions: %(choices)s",
    )
    for name, text in (
        ("masked-loss", "keep masks, which say where the loss counts"),
        ("flip", "encode each image mirrored as well"),
        ("sample-posterior", "keep the variance of latents, which training then draws"),
    ):
        add(f"--{name}", action="store_const", const=True, help=text)
    add("--max-length", type=token_count, metavar="TOKENS", help="T5 tokens of a caption")
    add("--text-dtype", choices=TEXT_DTYPES, metavar="DTYPE", help="of text states: %(choices)s")
    add(
        "--max-broken",
        type=whole_number(0, MAX_IMAGES),
        metavar="COUNT",
        help="examples that may be left out because they can't be read (default: 10)",
    )
    add("--threads", type=whole_number(1, 1024), help="that read images (default: at most 8)")
    add("--seed", type=seed, help="of random masks (default: 0)")


def part_of_work(text: str) -> tuple[int, int]:
    """Read a part of some work, I/N, counted from 1; return its index from 0, and N."""
    match = re.fullmatch(r"([0-9]{1,7})/([0-9]{1,7})", text)
    part, parts = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= part <= parts <= MAX_DEVICES:
        raise argparse.ArgumentTypeError(f"needs I/N, as 1/8 to 8/8, got {text[:20]!r}")
    return part - 1, parts
