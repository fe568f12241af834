"""Options of what images are conditioned on beside a prompt."""

from collections.abc import Mapping

from fluxjax.cli.choices import REDUX_RULES
from fluxjax.cli.options import OptionGroup, file_path, finite_number, image_prompt

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
    _add_image_prompt_options(group)


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
