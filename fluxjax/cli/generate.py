"""The command `fluxjax generate`: images of a prompt, or of each line of a file of prompts."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from fluxjax.cli.compilation_cache import use_cache
from fluxjax.cli.device import name_device
from fluxjax.cli.image_groups import ImageGroup, clock_of_groups, print_report
from fluxjax.cli.image_paths import image_paths
from fluxjax.cli.image_stages import DrawnImages, ImageStages, not_finite_problem
from fluxjax.cli.jobs import check_together, join_job
from fluxjax.cli.loaded_networks import (
    LoadedEncoders,
    LoadedNetworks,
    load_drawing_networks,
    load_text_encoders,
    show_residency,
)
from fluxjax.cli.memory import with_plan
from fluxjax.cli.places import BatchSize
from fluxjax.cli.preview_file import watch_previews
from fluxjax.cli.prompt_file_drawing import draw_prompt_file
from fluxjax.cli.read_request import read_request
from fluxjax.cli.replay import check_recorded, replayed, with_command
from fluxjax.cli.request import Request, check_request_memory
from fluxjax.cli.starts import StartFacts, StartImage, read_start, start_facts
from fluxjax.cli.text_stages import EncodedPrompts, TextStages
from fluxjax.devices.offload import free
from fluxjax.generate.image import write_numbered, write_png
from fluxjax.generate.limits import check_devices
from fluxjax.generate.prompted import batches
from fluxjax.generate.text import TextStates


def generate(options: argparse.Namespace) -> None:
    """Draw the images of a prompt, or those that a file of prompts lacks."""
    options = replayed(options)
    check_together(options)
    if options.distributed:
        join_job()
    check_devices()
    use_cache(options.compilation_cache)
    request = read_request(options)
    # Once nothing is wrong with the options: a mistake of theirs is one line.
    name_device(quiet=options.quiet)
    if request.prompts is not None:
        draw_prompt_file(request, request.prompts)
    else:
        _draw_prompts(request)


def _draw_prompts(request: Request) -> None:
    """Draw the images of all prompts of the command line, and write them."""
    is_writer = jax.process_index() == 0
    start = None
    facts = start_facts(request.lines[0], request.start, request.timer)
    if facts is not None:
        start = read_start(request.lines[0])  # all prompts have the same
        request = request.at_size(*facts.padded)
        check_request_memory(request)
    request = with_plan(request)
    check_recorded(request, facts)
    paths = image_paths(request)
    groups = _group_images(request, facts)
    written: list[Path] = []
    reused = 0
    with clock_of_groups(request, groups, silent=not is_writer or request.quiet) as clock:
        encoders = load_text_encoders(request, clock)
        stages = TextStages(clock, request)
        prompts, texts = _encode_texts(stages, encoders, is_writer=is_writer)
        kept = encoders if request.keep_encoders else None
        del encoders  # freed before the other networks are loaded
        networks = load_drawing_networks(request, clock, texts)
        show_residency(request, kept, networks)
        watch_previews(request, clock, networks.vae)
        drawn = _draw_groups(ImageStages(clock, request), networks, prompts, groups, start)
        for group, images in zip(groups, drawn, strict=True):
            reused += images.reused
            written += _write_images(networks, group, images, paths)
    if is_writer:
        if not request.quiet:
            print_report(clock, request, reused, groups)
        print("\n".join(str(path) for path in written))


def _group_images(request: Request, facts: StartFacts | None) -> list[ImageGroup]:
    """Return the batches of the images of all prompts."""
    if request.drawn_in is not None:
        # One image, in each row of a batch of the size that it was drawn in.
        return [ImageGroup([0] * request.drawn_in.rows, request, facts)]
    numbers = batches(len(request.draws), request.batch)
    return [ImageGroup(one, request, facts) for one in numbers]


def _encode_texts(
    stages: TextStages, encoders: LoadedEncoders, *, is_writer: bool
) -> tuple[EncodedPrompts, dict[str, TextStates]]:
    """Encode all prompts, and the texts of conditions.

    **Arguments:** `is_writer`: whether this process prints which of them are cut.
    """
    if is_writer:
        stages.print_cut(encoders.tokenizers, stages.request.lines)
    prompts = _encode_prompts(stages, encoders)
    show_residency(stages.request, encoders, None)
    return prompts, stages.encode_conditions(encoders, is_writer)


def _encode_prompts(stages: TextStages, encoders: LoadedEncoders) -> EncodedPrompts:
    """Encode the prompts one by one; the last bits of a row may depend on those beside it."""
    request = stages.request
    if request.drawn_in is not None and request.drawn_in.together:
        return stages.encode(encoders, request.lines * request.drawn_in.rows)
    return EncodedPrompts.joined([stages.encode(encoders, [line]) for line in request.lines])


def _prompt_rows(request: Request, numbers: Sequence[int]) -> list[int]:
    """Return the encoded prompt of each image of a batch."""
    if request.drawn_in is not None and request.drawn_in.together:
        return list(range(len(numbers)))
    draws = request.draws
    return [draws[number].line for number in numbers]


def _draw_groups(
    stages: ImageStages,
    networks: LoadedNetworks,
    prompts: EncodedPrompts,
    groups: Sequence[ImageGroup],
    start: StartImage | None,
) -> Iterator[DrawnImages]:
    """Draw the images of all prompts, batch by batch.

    Where the plan says so, or nothing follows, the transformer is freed before they are decoded;
    all batches are denoised before.

    **Arguments:** `start`: what the images start from.
    """
    request = stages.request
    draws = request.draws
    frees = len(groups) == 1 or (request.choice is not None and request.choice.frees)
    denoised = []
    for group in groups:
        rows = prompts.rows(_prompt_rows(request, group.numbers))
        seeds = [draws[number][1:] for number in group.numbers]
        denoised.append(stages.denoise(networks, rows, group, seeds, [start] * len(seeds)))
        if not frees:
            yield stages.decode(networks.vae, denoised.pop())
    if frees:
        free(networks.flux)
        for one in denoised:
            yield stages.decode(networks.vae, one)


def _write_images(
    networks: LoadedNetworks, group: ImageGroup, drawn: DrawnImages, paths: Sequence[Path] | None
) -> list[Path]:
    """Write the different images of a batch; return their paths.

    **Arguments:** `paths`: of all images; None for numbered files.
    **Raises:** `ValueError` for one that is not finite.
    """
    request, written = group.request, []
    for row, number in enumerate(dict.fromkeys(group.numbers)):  # a repeated one is at the end
        image = request.draws[number]
        lost = drawn.lost[row]
        if lost is not None:
            raise ValueError(f"Image {image.number} {not_finite_problem(lost)}")
        if jax.process_index() > 0:
            continue
        line = request.lines[image.line]._replace(seed=image.seed)
        metadata = group.metadata(line, networks) | {"image": str(image.number)}
        size = request.drawn_in or BatchSize(len(group.numbers), together=False)
        metadata = with_command(metadata, group.command(line, image, networks), size)
        if paths is None:
            written.append(write_numbered(drawn.images[row], request.folder, metadata))
        else:
            overwrite = request.overwrite
            write_png(drawn.images[row], paths[number], metadata, overwrite=overwrite)
            written.append(paths[number])
    return written
