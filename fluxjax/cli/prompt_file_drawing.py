"""`fluxjax generate --prompts`: an image of each line of a file that has none yet."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import jax

from fluxjax.cli.console import raise_problems
from fluxjax.cli.image_groups import ImageGroup, clock_of_groups, print_report
from fluxjax.cli.image_paths import line_paths
from fluxjax.cli.image_stages import DrawnImages, ImageStages, not_finite_problem
from fluxjax.cli.loaded_networks import (
    LoadedNetworks,
    load_drawing_networks,
    load_text_encoders,
    show_residency,
)
from fluxjax.cli.memory import with_choice, with_found_plan, with_plan
from fluxjax.cli.places import BatchSize, PlannedImage
from fluxjax.cli.preview_file import watch_previews
from fluxjax.cli.progress import Clock
from fluxjax.cli.prompts import Line, difference, read_prompts, share
from fluxjax.cli.replay import with_command
from fluxjax.cli.request import Request, check_request_memory
from fluxjax.cli.starts import StartFacts, read_start, start_facts
from fluxjax.cli.text_stages import TextStages
from fluxjax.generate.image import read_metadata, write_png


class FileWork(NamedTuple):
    """What a process has to do for a file of prompts.

    - `lines`: the lines whose images it draws.
    - `requests`: for their sizes and steps, by the line's id. `paths`: of their images.
    - `facts`: for lines that start from an image, what was read of that image, by the line's id.
    - `replaced`: the ids of lines whose existing images are overwritten.
    - `present`: the number of images that exist already and are kept.
    - `problems`: error messages of the lines that can't be drawn.
    """

    lines: list[Line]
    requests: dict[str, Request]
    paths: dict[str, Path]
    facts: dict[str, StartFacts]
    replaced: set[str]
    present: int
    problems: list[str]


class _Written(NamedTuple):
    """What has become of a file's images.

    `images`: how many were written. `reused`: the evaluations that a step cache skipped.
    `problems`: error messages of the lines without an image.
    """

    images: int
    reused: int
    problems: list[str]

    def plus(self, other: "_Written") -> "_Written":
        return _Written(
            images=self.images + other.images,
            reused=self.reused + other.reused,
            problems=self.problems + other.problems,
        )


_NOTHING_WRITTEN = _Written(images=0, reused=0, problems=[])


def draw_prompt_file(request: Request, path: Path) -> None:
    """Draw this process's share of a file's lines that have no image yet.

    An image depends on its line, on --batch, and on the number of lines like it; it is written
    whole or not at all.

    **Raises:** `ValueError` for lines that could not be drawn, after all others are.
    """
    lines, problems = read_prompts(path, guided=request.is_guided)
    paths, repeated = line_paths(request, lines)
    lines = [line for line in lines if line.id in paths]
    mine = share(lines, jax.process_index(), jax.process_count())
    work = sort_lines(request, mine, paths)
    problems += repeated + work.problems
    written = _NOTHING_WRITTEN
    if work.lines:
        alike = Counter(_kind(request.of_line(line)) for line in lines)
        groups = group_lines(request, work, alike)
        request, groups = _planned(request, groups)
        with clock_of_groups(request, groups, silent=request.quiet) as clock:
            written = _draw_groups(request, clock, groups, work)
        problems += written.problems
        if not request.quiet:
            print_report(clock, request, written.reused, groups)
    if not request.quiet:
        place = request.folder if request.output is None else request.output.text
        print(
            f"{written.images} images written to {place}, {work.present} were there, "
            f"{len(lines)} lines in all"
        )
    raise_problems(path, problems)


def sort_lines(request: Request, lines: Sequence[Line], paths: Mapping[str, Path]) -> FileWork:
    """Sort lines by whether their images are there, and are theirs.

    **Arguments:** `paths`: of the lines' images, by the line's id.
    """
    work = FileWork(
        lines=[],
        requests={},
        paths=dict(paths),
        facts={},
        replaced=set(),
        present=0,
        problems=[],
    )
    present = 0
    for line in lines:
        path = paths[line.id]
        try:
            own = request.of_line(line)
            facts = start_facts(line, own.start, own.timer)
            sized = own if facts is None else own.at_size(*facts.padded)
            check_request_memory(sized)
        except (ValueError, OSError) as error:
            work.problems.append(f"line {line.number}: {error}")
            continue
        work.requests[line.id] = sized
        if facts is not None:
            work.facts[line.id] = facts
        if not path.exists() and not path.is_symlink():
            work.lines.append(line)
            continue
        reason = _difference_of_present(sized, line, facts, path)
        if reason is None:
            present += 1
        elif request.overwrite:
            work.lines.append(line)
            work.replaced.add(line.id)
        else:
            work.problems.append(
                f"line {line.number}: {reason}; remove {path.name} or pass --overwrite"
            )
    return work._replace(present=present)


def _difference_of_present(
    request: Request, line: Line, facts: StartFacts | None, path: Path
) -> str | None:
    """Return how an image that is there differs from the one of its line; None if it does not."""
    found = read_metadata(path)
    changes = {} if facts is None else facts.description
    expected = request.metadata(line, request.expected_guidance(found), changes)
    return difference(found, with_found_plan(expected, found))


def _kind(request: Request) -> tuple:
    """Return what lines share that are drawn together: size, number of steps, guidance."""
    return request.height, request.width, request.steps, request.distilled


def group_lines(request: Request, work: FileWork, alike: Mapping[tuple, int]) -> list[ImageGroup]:
    """Return the lines' numbers in batches of what is alike and begins at one time. Those of one
    size follow one another.

    A batch has as many rows whichever lines have their images already: the last one of a kind
    repeats its last line.

    **Arguments:** `alike`: how many lines of the file there are of each kind: height, width, steps
    and guidance.
    """
    numbers_by_kind: dict[tuple, list[int]] = {}
    for number, line in enumerate(work.lines):
        kind = _kind(work.requests[line.id])
        facts = work.facts.get(line.id)
        if facts is not None:
            kind += (facts.repaint.strength, facts.repaint.rule, facts.has_mask)
        numbers_by_kind.setdefault(kind, []).append(number)
    groups = []
    for numbers in numbers_by_kind.values():
        line = work.lines[numbers[0]]
        own, facts = work.requests[line.id], work.facts.get(line.id)
        size = max(1, min(request.batch, alike[_kind(request.of_line(line))]))
        for start in range(0, len(numbers), size):
            repeated = [numbers[-1]] * size
            chosen = (numbers[start:] + repeated)[:size]
            groups.append(ImageGroup(chosen, own, facts))
    # All of one size use the same compiled programs, also where they have other steps.
    return sorted(groups, key=lambda group: (group.request.height, group.request.width))


def _planned(request: Request, groups: Sequence[ImageGroup]) -> tuple[Request, list[ImageGroup]]:
    """Return a request and its batches with the plan for the largest images of a file."""
    largest = max(groups, key=lambda group: group.request.height * group.request.width)
    choice = with_plan(largest.request).choice
    if choice is None:
        return request, list(groups)
    own = [group._replace(request=with_choice(group.request, choice)) for group in groups]
    return with_choice(request, choice), own


def _draw_groups(
    request: Request, clock: Clock, groups: Sequence[ImageGroup], work: FileWork
) -> _Written:
    """Load all networks, then draw and write group after group."""
    texts = TextStages(clock, request)
    images = ImageStages(clock, request)
    encoders = load_text_encoders(request, clock)
    networks = load_drawing_networks(request, clock, texts.encode_conditions(encoders))
    texts.print_cut(encoders.tokenizers, work.lines)
    show_residency(request, encoders, networks)
    written = _NOTHING_WRITTEN
    for group in groups:
        lines = [work.lines[number] for number in group.numbers]
        try:
            own = networks.at_guidance(group.request)
        except ValueError as error:
            problems = [f"line {line.number}: {error}" for line in dict.fromkeys(lines)]
            written = written.plus(_Written(0, 0, problems))
            continue
        watch_previews(group.request, clock, networks.vae)
        prompts = texts.encode(encoders, lines)
        # Each with the noise of its own seed.
        seeds = [(line.seed, 0) for line in lines]
        starts = [read_start(line) for line in lines]
        denoised = images.denoise(own, prompts, group, seeds, starts)
        drawn = images.decode(own.vae, denoised)
        written = written.plus(_write_lines(group, own, lines, drawn, work))
    return written


def _write_lines(
    group: ImageGroup,
    networks: LoadedNetworks,
    lines: Sequence[Line],
    drawn: DrawnImages,
    work: FileWork,
) -> _Written:
    """Write the images of a batch of lines."""
    count, problems = 0, []
    size = BatchSize(len(lines), together=True)
    # The last batch repeats its last line.
    for line, image, lost in zip(dict.fromkeys(lines), drawn.images, drawn.lost, strict=False):
        if lost is not None:
            problems.append(f"line {line.number}: its image {not_finite_problem(lost)}")
            continue
        with suppress(FileExistsError):  # another process has drawn it since
            own = group._replace(facts=work.facts.get(line.id))
            planned = PlannedImage(0, line.seed, 0)
            metadata = own.metadata(line, networks)
            metadata = with_command(metadata, own.command(line, planned, networks), size)
            path = work.paths[line.id]
            write_png(image, path, metadata, overwrite=line.id in work.replaced)
            count += 1
            if group.request.quiet:
                print(path)
    return _Written(count, drawn.reused, problems)
