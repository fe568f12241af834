"""The options of `fluxjax generate`."""

import argparse

from fluxjax.cli.choices import ATTENTIONS, TIMERS
from fluxjax.cli.compound_options import BlockSizesReader, adapter
from fluxjax.cli.condition_options import add_condition_options
from fluxjax.cli.option_parser import OptionGroup
from fluxjax.cli.options import (
    MAX_IMAGES,
    MAX_STEPS,
    MAX_TOKENS,
    PREVIEW_STEPS,
    NameOrFile,
    aspect,
    byte_count,
    file_path,
    finite_number,
    image_count,
    image_number,
    png_path,
    seed,
    seeds,
    step_count,
    token_count,
    unicode_text,
)
from fluxjax.cli.output_pattern import FIELDS, output_pattern
from fluxjax.cli.shared_options import (
    add_cfg,
    add_churn,
    add_compilation_cache,
    add_dtype,
    add_guidance,
    add_integrator,
    add_json,
    add_mesh,
    add_model,
    add_output_folder,
    add_parts,
    add_quantize,
    add_quiet,
    add_rule,
    add_shift,
    add_size,
    add_vae_memory,
)


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fluxjax plan`: those of `fluxjax generate`, and the memory."""
    parser.add_argument(
        "--memory",
        type=byte_count,
        metavar="SIZE",
        help="plan for an NVIDIA GPU with so much memory, as 12GB (default: for this machine)",
    )
    add_json(parser)
    add_generate_options(parser, needs_prompt=False)


def add_generate_options(parser: argparse.ArgumentParser, *, needs_prompt: bool = True) -> None:
    """Add the options of `fluxjax generate` to its parser.

    `needs_prompt`: whether a prompt, or a file of them, has to be given.
    """
    parser.set_defaults(find_problem=_prompt_problem if needs_prompt else _prompts_problem)
    _add_prompt_options(parser.add_argument_group("prompt"))
    _add_image_options(parser.add_argument_group("images"))
    _add_start_options(parser.add_argument_group("images drawn again"))
    add_condition_options(parser.add_argument_group("conditions beside the prompt"))
    add_model_options(parser.add_argument_group("model"))
    _add_sampling_options(parser.add_argument_group("sampling"))
    _add_guidance_options(parser.add_argument_group("guidance"))
    _add_speed_options(parser.add_argument_group("speed"))
    _add_memory_options(parser.add_argument_group("memory"))
    _add_device_options(parser.add_argument_group("devices"))


def _prompt_problem(options: argparse.Namespace) -> str | None:
    """Return what is wrong with the prompts that are given, if anything is."""
    if not options.texts and options.prompts is None and options.source_image is None:
        return "one of the arguments prompt --prompts --from is required"
    return _prompts_problem(options)


def _prompts_problem(options: argparse.Namespace) -> str | None:
    if options.texts and options.prompts is not None:
        return "argument --prompts: not allowed with argument prompt"
    if len(options.texts) > 1 and options.prompt_2 is not None:
        return "argument --prompt-2: not allowed with several prompts"
    return None


def _add_prompt_options(group: OptionGroup) -> None:
    group.add_argument(
        "texts",
        nargs="*",
        default=[],
        type=unicode_text,
        metavar="prompt",
        help="text that the image shows; several draw the images of each",
    )
    group.add_argument(
        "--prompts",
        type=file_path,
        metavar="FILE",
        help="draw an image for each line of a file instead: a JSON object with prompt and, "
        "optionally, prompt_2, negative_prompt, id, seed, height, width, steps, guidance, "
        "init_image, mask and strength",
    )
    group.add_argument(
        "--from",
        dest="source_image",
        type=file_path,
        metavar="IMAGE",
        help="draw an image of this command again as its metadata say; what else is given "
        "replaces what they say",
    )
    group.add_argument(
        "--prompt-2",
        type=unicode_text,
        metavar="TEXT",
        help="a different prompt for the T5 encoder; CLIP still reads the first one",
    )
    group.add_argument(
        "--negative-prompt",
        type=unicode_text,
        metavar="TEXT",
        help="text that the image is guided away from, with --cfg or --nag "
        "(default: the empty prompt)",
    )
    group.add_argument(
        "--max-sequence-length",
        type=token_count,
        metavar="TOKENS",
        help="length to which T5's tokens of a prompt are padded or cut, "
        f"up to {MAX_TOKENS} (default: the model's)",
    )


def _add_image_options(group: OptionGroup) -> None:
    add_size(group)
    _add_counts(group)
    _add_output_options(group)
    _add_preview_options(group)


def _add_counts(group: OptionGroup) -> None:
    group.add_argument(
        "--aspect",
        type=aspect,
        metavar="W:H",
        help="shape of the image, as 16:9, with about as many pixels as the model's size",
    )
    group.add_argument(
        "--images",
        type=image_count,
        default=1,
        metavar="COUNT",
        help=f"number of images of each seed, up to {MAX_IMAGES} (default: %(default)s)",
    )
    group.add_argument(
        "--first-image",
        type=image_number,
        default=0,
        metavar="NUMBER",
        help="number of the first image, from 0: with 2, --images 1 draws only the third of those "
        "that --images 3 would draw (default: %(default)s)",
    )
    chosen = group.add_mutually_exclusive_group()
    chosen.add_argument(
        "--seed",
        type=seed,
        help="seed of the noise, below 2^63 (default: 0; with --prompts, the number of the line)",
    )
    chosen.add_argument(
        "--seeds", type=seeds, metavar="SEEDS", help="several seeds, separated by commas"
    )


def _add_output_options(group: OptionGroup) -> None:
    folder = group.add_mutually_exclusive_group()
    add_output_folder(folder, "flux_N.png or, with --prompts, ID.png")
    folder.add_argument(
        "--output",
        type=output_pattern,
        metavar="PATTERN",
        help=f"paths of the images, with fields in braces: {', '.join(FIELDS)}; as "
        "out/{prompt}_{seed}.png",
    )
    add_quiet(group)
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="with --prompts, draw an image again if the existing one was made with another "
        "prompt, seed or option; with --output, replace files that exist",
    )


def _add_preview_options(group: OptionGroup) -> None:
    group.add_argument(
        "--preview",
        type=png_path,
        metavar="FILE",
        help="a PNG that shows what the images of a batch are becoming; it is replaced as they are "
        "drawn",
    )
    group.add_argument(
        "--preview-every",
        type=step_count,
        metavar="STEPS",
        help=f"steps between two previews (default: {PREVIEW_STEPS}; 1 shows every step)",
    )


def _add_start_options(group: OptionGroup) -> None:
    group.add_argument(
        "--init-image",
        type=file_path,
        metavar="FILE",
        help="draw this image again as the prompt says, at its own size; see --strength",
    )
    group.add_argument(
        "--mask",
        type=file_path,
        metavar="FILE",
        help="an image of the same size that says what is drawn again: white wholly, black not at "
        "all, gray by a share of the strength (default: all)",
    )
    strengths = group.add_mutually_exclusive_group()
    strengths.add_argument(
        "--strength",
        type=finite_number(0, 1),
        help="share of the steps that are taken from the image on: 0 keeps it, 1 replaces it "
        "(default: 0.6)",
    )
    strengths.add_argument(
        "--start-time",
        type=finite_number(0, 1),
        metavar="TIME",
        help="take all steps instead, from this time on: 0 is the image, 1 is noise",
    )
    group.add_argument(
        "--repeats",
        type=step_count,
        default=1,
        metavar="COUNT",
        help="with --mask, how often each step is taken (RePaint), for integrators that draw "
        "noise, as ancestral (default: %(default)s)",
    )


def add_model_options(group: OptionGroup) -> None:
    """Add the options of the model, its dtype and its adapters."""
    add_model(group)
    add_parts(group)
    add_dtype(group)
    group.add_argument(
        "--lora",
        action="append",
        type=adapter,
        default=[],
        metavar="ADAPTER",
        help="merge an adapter into the weights, or attach it to packed ones: "
        "[NAME=]FILE[:SCALE], where FILE may also be hub:OWNER/REPO/FILE or tiny:STYLE; repeat the "
        "option for several adapters",
    )


def _add_sampling_options(group: OptionGroup) -> None:
    group.add_argument(
        "--steps",
        type=step_count,
        help=f"number of integration steps, up to {MAX_STEPS} (default: the model's)",
    )
    add_integrator(group)
    add_churn(group)
    group.add_argument(
        "--timer",
        type=NameOrFile(TIMERS, ".json", "model"),
        default="model",
        metavar="NAME",
        help="spacing of the sampling times: %(type)s (default: %(default)s, the spacing that "
        "the model was made for), or a JSON file of times, which also sets their number",
    )
    add_shift(group)


def _add_guidance_options(group: OptionGroup) -> None:
    add_guidance(group)
    add_cfg(group)
    add_rule(group)
    group.add_argument(
        "--nag",
        type=finite_number(),
        metavar="SCALE",
        help="scale of normalized attention guidance, which guides every attention layer away "
        "from the negative prompt (default: none)",
    )


def _add_speed_options(group: OptionGroup) -> None:
    group.add_argument(
        "--cache",
        metavar="[KIND:]THRESHOLD",
        help="skip transformer blocks in steps that change less than a threshold: 0.1 "
        "(first_block), or teacache:0.4 (default: skip none)",
    )
    add_quantize(group)
    group.add_argument(
        "--attention",
        choices=ATTENTIONS,
        metavar="NAME",
        help="attention implementation: %(choices)s (default: chosen by device, dtype and "
        "number of tokens; see docs/performance.md)",
    )
    group.add_argument(
        "--flash-block-sizes",
        type=BlockSizesReader(),
        metavar="SIZES",
        help="tokens per block, for --attention flash_tpu, flash_gpu or xla_chunked: one number, "
        "QUERIES,KEYS, or a preset: %(type)s",
    )
    group.add_argument(
        "--unroll",
        action="store_true",
        help="compile every transformer block separately instead of as one loop: compilation "
        "takes longer, and GPUs move fewer bytes",
    )
    add_compilation_cache(group)


def _add_memory_options(group: OptionGroup) -> None:
    group.add_argument(
        "--batch",
        type=image_count,
        metavar="COUNT",
        help="images per forward pass (default: all; with --prompts, 1)",
    )
    encoders = group.add_mutually_exclusive_group()
    encoders.add_argument(
        "--keep-encoders",
        action="store_true",
        help="keep the text encoders in memory after the prompt is encoded",
    )
    encoders.add_argument(
        "--offload-encoders",
        action="store_true",
        help="with --prompts, keep the text encoders in host memory, and copy them to the device "
        "for each batch",
    )
    group.add_argument(
        "--stream-blocks",
        action="store_true",
        help="keep the weights of the transformer and T5 in host memory (on CPU: in their files), "
        "and copy them to the device block by block",
    )
    add_vae_memory(group)
    group.add_argument(
        "--show-memory",
        action="store_true",
        help="print which weights are in which memory once they are loaded",
    )


def _add_device_options(group: OptionGroup) -> None:
    add_mesh(group)
    group.add_argument(
        "--distributed",
        action="store_true",
        help="join the other processes of the job, which share the lines of --prompts, or draw "
        "together on a --mesh of all their devices",
    )
