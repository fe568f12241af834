"""The options of `fluxjax edit`, `fill`, `outpaint` and `restore`."""

import argparse
from collections.abc import Mapping

from fluxjax.cli.choices import EDIT_METHODS, PLACEMENTS, SOLVERS, TIMERS
from fluxjax.cli.compound_options import canvas_margins, picture_operator
from fluxjax.cli.condition_options import CONDITION_DEFAULTS
from fluxjax.cli.generate_options import add_model_options
from fluxjax.cli.option_parser import OptionGroup
from fluxjax.cli.options import (
    MAX_FLOAT32,
    MAX_IMAGES,
    MAX_MARGIN,
    MAX_STEPS,
    SIDES,
    LineField,
    NameOrFile,
    file_path,
    finite_number,
    image_count,
    pixel_count,
    positive_number,
    seed,
    step_count,
    token_count,
    unicode_text,
    whole_number,
)
from fluxjax.cli.shared_options import (
    add_compilation_cache,
    add_guidance,
    add_integrator,
    add_mesh,
    add_output_folder,
    add_quantize,
    add_quiet,
    add_rule,
    add_shift,
    add_vae_memory,
)

_DEFAULTS_OF_GENERATE = {
    "height": None,
    "width": None,
    "prompts": None,
    "prompt_2": None,
    "negative_prompt": None,
    "init_image": None,
    "mask": None,
    "strength": None,
    "start_time": None,
    "repeats": 1,
    "overwrite": False,
    "integrator": "euler",
    "eta": None,
    "churn": None,
    "aspect": None,
    "first_image": 0,
    "seeds": None,
    "nag": None,
    "cache": None,
    "attention": None,
    "flash_block_sizes": None,
    "unroll": False,
    "keep_encoders": False,
    "offload_encoders": False,
    "stream_blocks": False,
    "show_memory": False,
    "mesh": None,
    "distributed": False,
    "texts": [],
    "output": None,
    "drawn_in": None,
    "preview": None,
    "preview_every": None,
    "recorded": {},
    **CONDITION_DEFAULTS,
}
"""Options of `fluxjax generate` that these commands do not have: the same requests are made."""
_LINE_FIELDS = {
    "picture": LineField("picture", file_path, is_path=True),
    "prompt": LineField("prompt", unicode_text),
    "seed": LineField("seed", seed),
}
"""What lines of a file of pictures may say to all of these commands, beside their id."""


def add_edit_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fluxjax edit` to its parser."""
    # `strength` is an option here, but one of the method and not of the request.
    parser.set_defaults(**_DEFAULTS_OF_GENERATE)
    fields = {
        "source_prompt": LineField("source_prompt", unicode_text),
        "strength": LineField("method_strength", finite_number(0, 1)),
    }
    _add_picture(parser, "the image that is edited", "describes the image as it is to be", fields)
    _add_method_options(parser.add_argument_group("method"))
    _add_kontext_options(parser.add_argument_group("method kontext"))
    _add_common_options(parser, "edit")


def _add_method_options(group: OptionGroup) -> None:
    group.add_argument(
        "--method",
        choices=EDIT_METHODS,
        metavar="NAME",
        help="%(choices)s (default: kontext for FLUX.1 Kontext, else flowedit)",
    )
    group.add_argument(
        "--source-prompt",
        type=unicode_text,
        metavar="TEXT",
        help="describes the image as it is; sdedit takes none, and for rf-inversion it may be left "
        "out",
    )
    group.add_argument(
        "--strength",
        dest="method_strength",
        type=finite_number(0, 1),
        help="share of the steps that are taken, and through which it is inverted: 0 keeps the "
        "image (default: flowedit 0.857, sdedit and diffedit 0.75, the others 1)",
    )
    group.add_argument(
        "--source-guidance",
        type=finite_number(),
        metavar="SCALE",
        help="distilled guidance of the source prompt (default: flowedit 1.5, others 1)",
    )
    _add_method_numbers(group)


def _add_method_numbers(group: OptionGroup) -> None:
    group.add_argument(
        "--averages",
        type=whole_number(1, MAX_STEPS),
        metavar="COUNT",
        help="draws of noise, in each step of flowedit (default: 1), for the mask of diffedit "
        "(default: 10)",
    )
    numbers = {
        "--noise-rate": "how strongly the inversion of rf-inversion leads to noise (default: 0.5)",
        "--image-rate": "how strongly its way back leads to the image (default: 0.9)",
        "--image-share": "in which share of the steps back (default: 0.25)",
        "--mask-time": "the time at which diffedit compares both prompts (default: 0.5)",
    }
    for name, text in numbers.items():
        group.add_argument(name, type=finite_number(0, 1), metavar="NUMBER", help=text)
    group.add_argument(
        "--ratio",
        type=positive_number,
        metavar="NUMBER",
        help="how far above its mean the prompts' difference is where diffedit draws; larger ones "
        "give smaller masks (default: 1.5)",
    )


def _add_kontext_options(group: OptionGroup) -> None:
    group.add_argument(
        "--reference",
        action="append",
        type=file_path,
        default=[],
        metavar="FILE",
        help="another image that the instruction speaks of; repeat the option for several",
    )
    group.add_argument(
        "--placement",
        choices=PLACEMENTS,
        metavar="NAME",
        help="how the positions of several references differ: %(choices)s (default: offset, one "
        "plane)",
    )
    group.add_argument(
        "--keep-size",
        action="store_true",
        help="keep the sizes of the images, rounded to multiples of 16 pixels (default: resize "
        "each to a size that Kontext was made for, of about 1024x1024 pixels and nearest "
        "proportions, unless the model is meant for much smaller ones)",
    )
    for name in ("height", "width"):
        group.add_argument(
            f"--{name}",
            type=pixel_count,
            metavar="PIXELS",
            help=f"{name} of what is drawn, a multiple of 16 (default: that of the resized image)",
        )


def add_fill_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fluxjax fill` to its parser."""
    parser.set_defaults(**_DEFAULTS_OF_GENERATE)
    fields = {"mask": LineField("mask", file_path, is_path=True)}
    _add_picture(parser, "the image of which a part is drawn", "describes the whole image", fields)
    group = parser.add_argument_group("mask")
    where = group.add_mutually_exclusive_group()
    where.add_argument(
        "--mask",
        type=file_path,
        metavar="FILE",
        help="an image of the same size: white is drawn, black is kept",
    )
    where.add_argument(
        "--outpaint",
        type=canvas_margins,
        metavar="SIDES",
        help="draw around the image instead: pixels by side, as left=64,right=64",
    )
    group.add_argument(
        "--binary-mask",
        action="store_true",
        help="round gray to black or white (default: pass it on to the network)",
    )
    add_integrator(parser.add_argument_group("integrator"))
    _add_common_options(parser, "fill")


def add_outpaint_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fluxjax outpaint` to its parser."""
    parser.set_defaults(**_DEFAULTS_OF_GENERATE)
    fields = {side: LineField(side, whole_number(0, MAX_MARGIN)) for side in SIDES}
    _add_picture(parser, "the image around which is drawn", "describes the whole new image", fields)
    sides = parser.add_argument_group("canvas")
    for side in SIDES:
        sides.add_argument(
            f"--{side}",
            type=whole_number(0, MAX_MARGIN),
            default=0,
            metavar="PIXELS",
            help=f"pixels that are added at the {side} (default: none)",
        )
    add_integrator(parser.add_argument_group("integrator"))
    _add_common_options(parser, "outpaint")


def add_restore_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fluxjax restore` to its parser."""
    parser.set_defaults(**_DEFAULTS_OF_GENERATE)
    fields = {"operator": LineField("operator", picture_operator)}
    _add_picture(
        parser,
        "what is left of the picture",
        "describes the picture (default: the empty prompt)",
        fields,
    )
    _add_restoration_options(parser.add_argument_group("restoration"))
    _add_common_options(parser, "restore")
    add_mesh(parser.add_argument_group("devices"))
    # Decoupled needs other times than drawing.
    parser.set_defaults(timer=None)


def _add_restoration_options(group: OptionGroup) -> None:
    group.add_argument(
        "--operator",
        type=picture_operator,
        metavar="OPERATOR",
        help="what has happened to it: blur:PIXELS (the deviation of a Gaussian), "
        "downsample:FACTOR, or mask:FILE (black is known, anything else is hidden)",
    )
    group.add_argument(
        "--noise",
        type=finite_number(0, MAX_FLOAT32),
        default=0.02,
        metavar="DEVIATION",
        help="standard deviation of the noise, where black is -1 and white is 1; with a mask, in "
        "the latent (default: %(default)s)",
    )
    group.add_argument(
        "--method",
        choices=SOLVERS,
        default="decoupled",
        metavar="NAME",
        help="%(choices)s (default: %(default)s)",
    )
    group.add_argument(
        "--iterations",
        type=whole_number(1, MAX_STEPS),
        default=5,
        metavar="COUNT",
        help="conjugate gradients in each step (default: %(default)s)",
    )
    group.add_argument(
        "--size",
        type=finite_number(0, MAX_FLOAT32),
        metavar="NUMBER",
        help="of the gradient steps of flowdps and flowchef (default: 0.3)",
    )


def _add_picture(
    parser: argparse.ArgumentParser, picture: str, prompt: str, fields: Mapping[str, LineField]
) -> None:
    """Add the picture and its prompt, or a file of them.

    **Arguments:** `picture`, `prompt`: their help. `fields`: of the file's lines, beside those that
    all commands have.
    """
    parser.add_argument(
        "picture",
        nargs="?",
        type=file_path,
        metavar="FILE",
        help=f"{picture}, of any size: PNG, JPEG, WebP, TIFF, …",
    )
    parser.add_argument("prompt", nargs="?", type=unicode_text, help=prompt)
    known = {**_LINE_FIELDS, **fields}
    parser.add_argument(
        "--pictures",
        type=file_path,
        metavar="FILE",
        help="draw from each picture of a file instead. Its lines are JSON objects with "
        f"{', '.join(known)} and id, the name of the written image. Images that are there already "
        "are not drawn again",
    )
    parser.set_defaults(line_fields=known)


def _add_common_options(parser: argparse.ArgumentParser, stem: str) -> None:
    images = parser.add_argument_group("images")
    images.add_argument(
        "--images",
        type=image_count,
        default=1,
        metavar="COUNT",
        help=f"number of images, up to {MAX_IMAGES} (default: %(default)s)",
    )
    images.add_argument("--seed", type=seed, help="seed of the noise, below 2^63 (default: 0)")
    images.add_argument(
        "--batch", type=image_count, metavar="COUNT", help="images per forward pass (default: all)"
    )
    add_output_folder(images, f"{stem}_N.png")
    add_quiet(images)
    model = parser.add_argument_group("model")
    add_model_options(model)
    add_quantize(model)
    add_vae_memory(model)
    model.add_argument(
        "--max-sequence-length",
        type=token_count,
        metavar="TOKENS",
        help="length to which T5's tokens of a prompt are padded or cut (default: the model's)",
    )
    add_compilation_cache(model)
    _add_sampling_options(parser.add_argument_group("sampling"))


def _add_sampling_options(group: OptionGroup) -> None:
    group.add_argument(
        "--steps",
        type=step_count,
        help=f"number of steps, up to {MAX_STEPS} (default: the model's)",
    )
    group.add_argument(
        "--timer",
        type=NameOrFile(TIMERS, ".json", "model"),
        default="model",
        metavar="NAME",
        help="spacing of the sampling times: %(type)s (default: model; for restore, except by "
        "proximal, ddnm and flowdps, flux_static with --shift 0.333), or a JSON file of times from "
        "1 to 0, which also sets their number",
    )
    add_shift(group)
    add_guidance(group)
    group.add_argument(
        "--cfg",
        type=finite_number(),
        metavar="SCALE",
        help="classifier-free guidance scale, away from the empty prompt (default: the model's, "
        "mostly 1, none)",
    )
    add_rule(group)
