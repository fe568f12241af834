"""Jobs of several processes, and which options of `fluxjax generate` go together."""

import argparse
import os
from typing import Any

import jax

from fluxjax.cli.console import interruptible

_EXCLUSIVE = (
    (
        "stream_blocks",
        "mesh",
        "--stream-blocks passes the weights through one device. "
        "Leave out --mesh, which splits them.",
    ),
    (
        "stream_blocks",
        "quantize",
        "--stream-blocks passes the weights as they are. Leave out --quantize.",
    ),
    (
        "stream_blocks",
        "unroll",
        "--stream-blocks fetches one block per iteration of a loop, which --unroll removes. "
        "Leave out --unroll.",
    ),
)


def check_together(options: argparse.Namespace) -> None:
    """Check which options go together, before anything asks for devices.

    **Raises:** `ValueError` for two that exclude each other, or one that would do nothing.
    """
    for one, other, message in _EXCLUSIVE:
        if getattr(options, one) and getattr(options, other):
            raise ValueError(message)
    if options.preview_every is not None and options.preview is None:
        raise ValueError("--preview-every does nothing without --preview. Give a file.")
    _check_start_options(options)
    if options.prompts is None:
        _check_prompt_options(options)
    else:
        _check_file_options(options)


def _check_prompt_options(options: argparse.Namespace) -> None:
    if options.offload_encoders:
        raise ValueError(
            "--offload-encoders does nothing for one prompt: once it is encoded they are freed. "
            "Leave it out."
        )
    if options.overwrite and options.output is None:
        raise ValueError(
            "--overwrite does nothing without --prompts or --output: images get new numbers. "
            "Leave it out."
        )
    if options.distributed and options.mesh is None:
        raise ValueError(
            "--distributed shares the lines of --prompts among processes, or a prompt's --mesh. "
            "Give one of them."
        )


def _check_start_options(options: argparse.Namespace) -> None:
    """Check the options of images that are drawn again."""
    has_image = options.init_image is not None
    values = {
        "--mask": options.mask is not None,
        "--strength": options.strength is not None and options.prompts is None,
        "--start-time": options.start_time is not None and options.prompts is None,
        "--repeats": options.repeats != 1 and options.prompts is None,
    }
    useless = [name for name, is_given in values.items() if is_given]
    if useless and not has_image:
        raise ValueError(
            f"{', '.join(useless)} does nothing without --init-image. Give the image to start from."
        )
    if options.repeats != 1 and options.mask is None and options.prompts is None:
        raise ValueError(
            "--repeats does nothing without --mask: it fits what is repainted to what is kept. "
            "Leave it out."
        )
    sizes = (options.height, options.width, options.aspect)
    if has_image and any(size is not None for size in sizes):
        raise ValueError(
            "--height, --width and --aspect do nothing with --init-image: images have its size. "
            "Leave them out, or resize the file."
        )


def _check_file_options(options: argparse.Namespace) -> None:
    """**Raises:** `ValueError` for options that the lines of a file replace."""
    values = {
        "--init-image": options.init_image is not None,
        "--from": options.source_image is not None,
        "--prompt-2": options.prompt_2 is not None,
        "--seed": options.seed is not None,
        "--seeds": options.seeds is not None,
        "--first-image": options.first_image != 0,
        "--images": options.images != 1,
        "--keep-encoders": options.keep_encoders,
    }
    useless = [name for name, is_given in values.items() if is_given]
    if useless:
        raise ValueError(
            f"{', '.join(useless)} does nothing with --prompts: the lines say it, and encoders "
            "stay. Leave it out."
        )


def join_job() -> None:
    """Join the job's other processes.

    **Raises:** `ValueError` for a job that is not described, or not by whole numbers.
    """
    where: dict[str, Any] = {}
    for name in ("num_processes", "process_id"):
        value = os.environ.get(f"JAX_{name.upper()}")
        if value is None:
            continue
        if not value.isdecimal():
            raise ValueError(
                f"--distributed needs a whole number as JAX_{name.upper()}, got {value!r}. "
                "Set it to one."
            )
        where[name] = int(value)
    # JAX's service would take SIGTERM for itself, so that the command would run on.
    jax.config.update("jax_enable_preemption_service", False)
    # A process that is killed ends the others within half a minute; one that is done waits.
    interruptible(
        jax.distributed.initialize,
        **where,
        heartbeat_timeout_seconds=30,
        shutdown_timeout_seconds=24 * 3600,
    )
