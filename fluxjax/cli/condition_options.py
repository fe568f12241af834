"""Options of what images are conditioned on beside a prompt."""

from collections.abc import Mapping

from fluxjax.cli.choices import CONTROL_MODES, REDUX_RULES, REGION_RULES
from fluxjax.cli.compound_options import image_prompt, region
from fluxjax.cli.option_parser import OptionGroup
from fluxjax.cli.options import file_path, finite_number, unicode_text

CONDITION_DEFAULTS: Mapping[str, object] = {
    "control": None,
    "canny": False,
    "image_prompt": [],
    "redux": None,
    "redux_rule": None,
    "siglip": None,
    "ip_adapter": None,
    "clip_vision": None,
    "ip_scale": None,
    "controlnet": [],
    "controlnet_image": [],
    "controlnet_scale": [],
    "controlnet_mode": [],
    "controlnet_start": [],
    "controlnet_end": [],
    "controlnet_negative": "shared",
    "region": [],
    "region_rule": None,
    "region_base": None,
    "region_until": None,
}
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
    _add_controlnet_options(group)
    _add_image_prompt_options(group)
    _add_region_options(group)


def _add_image_prompt_options(group: OptionGroup) -> None:
    group.add_argument(
        "--image-prompt",
        action="append",
        default=[],
        type=image_prompt,
        metavar="FILE[=WEIGHT]",
        help="an image that says what is drawn, beside the prompt, read by --redux or --ip-adapter "
        "and multiplied by the weight (default: 1); repeat the option for several",
    )
    group.add_argument(
        "--redux",
        metavar="SOURCE",
        help="FLUX.1 Redux, which appends the tokens of the image prompts to the prompt: a file, a "
        "folder or a hub id; the defaults are then 50 steps and a guidance of 2.5",
    )
    group.add_argument(
        "--redux-rule",
        choices=REDUX_RULES,
        metavar="RULE",
        help="how --redux combines several images: %(choices)s (default: append)",
    )
    group.add_argument(
        "--siglip",
        metavar="SOURCE",
        help="the image encoder of --redux (default: that beside it) and of InstantX's IP-Adapter",
    )
    group.add_argument(
        "--ip-adapter",
        metavar="SOURCE",
        help="an IP-Adapter, which lets the blocks attend to each image prompt: a .safetensors "
        "file, a folder or a hub id",
    )
    group.add_argument(
        "--clip-vision",
        metavar="SOURCE",
        help="the image encoder of XLabs' IP-Adapters: CLIP ViT-L/14, also the whole CLIP",
    )
    group.add_argument(
        "--ip-scale",
        type=finite_number(),
        metavar="SCALE",
        help="how strongly --ip-adapter counts (default: 1)",
    )


def _add_region_options(group: OptionGroup) -> None:
    group.add_argument(
        "--region",
        action="append",
        type=region,
        default=[],
        metavar="PLACE=PROMPT",
        help="a part of the images with a prompt of its own: a box of left, top, right and bottom "
        "edge as shares of the image, as 0,0,0.5,1=PROMPT; a mask, as FILE=PROMPT (white is the "
        "region); or background=PROMPT for the rest; repeat the option for several",
    )
    group.add_argument(
        "--region-rule",
        choices=REGION_RULES,
        metavar="RULE",
        help="how regions follow their prompts: %(choices)s; by the attention to their prompts, or "
        "by mixing one evaluation of the transformer for each (default: attention)",
    )
    group.add_argument(
        "--region-base",
        type=finite_number(0, 1),
        metavar="SHARE",
        help="the share of the whole prompt within regions (default: 0.3 for attention, 0 for mix)",
    )
    group.add_argument(
        "--region-until",
        type=finite_number(0, 1),
        metavar="SHARE",
        help="for attention, the share of the steps in which regions count (default: 0.4)",
    )


def _add_controlnet_options(group: OptionGroup) -> None:
    """Add the options of ControlNets. Each may be repeated, for several of them."""
    group.add_argument(
        "--controlnet",
        action="append",
        type=unicode_text,
        default=[],
        metavar="SOURCE",
        help="a ControlNet of InstantX, Shakker or XLabs: a file, a folder or a hub id; repeat it "
        "and the options below for several, whose effects add up",
    )
    group.add_argument(
        "--controlnet-image",
        action="append",
        type=file_path,
        default=[],
        metavar="FILE",
        help="what the ControlNet follows, such as edges, depth or a pose; it is resized to the "
        "size of the images",
    )
    _add_controlnet_numbers(group)
    group.add_argument(
        "--controlnet-negative",
        choices=("shared", "own"),
        default="shared",
        help="with --cfg, whether the negative prompt gets what the ControlNets add for the prompt "
        "(as diffusers) or its own (as XLabs; default: %(default)s)",
    )


def _add_controlnet_numbers(group: OptionGroup) -> None:
    """Add the options that are given once for all ControlNets, or once for each."""
    group.add_argument(
        "--controlnet-scale",
        action="append",
        type=finite_number(),
        default=[],
        metavar="SCALE",
        help="how strongly; 0.3 to 0.9 are usual (default: 0.7)",
    )
    group.add_argument(
        "--controlnet-mode",
        action="append",
        choices=CONTROL_MODES,
        default=[],
        metavar="MODE",
        help="what the image shows, for a Union: %(choices)s",
    )
    for name, moment, default in (("start", "from", 0), ("end", "until", 1)):
        group.add_argument(
            f"--controlnet-{name}",
            action="append",
            type=finite_number(0, 1),
            default=[],
            metavar="SHARE",
            help=f"use it {moment} this share of the steps (default: {default})",
        )
