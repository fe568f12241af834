"""The command `fluxjax generate`: images of a prompt, or of each line of a file of prompts."""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from tqdm import tqdm

from fluxjax.cli.compilation_cache import use_cache
from fluxjax.cli.condition_source import ConditionOfSize, ConditionParts
from fluxjax.cli.conditions import load_conditions
from fluxjax.cli.console import complain, raise_problems
from fluxjax.cli.device import name_device
from fluxjax.cli.image_paths import image_paths, line_paths
from fluxjax.cli.jobs import check_together, join_job
from fluxjax.cli.memory import with_choice, with_found_plan, with_plan
from fluxjax.cli.places import BatchSize, PlannedImage
from fluxjax.cli.preview_file import watch_previews
from fluxjax.cli.progress import Clock
from fluxjax.cli.prompts import Line, difference, read_prompts, share
from fluxjax.cli.replay import check_recorded, image_command, replayed, with_command
from fluxjax.cli.request import Request, check_request_memory, read_request
from fluxjax.cli.starts import StartFacts, StartImage, describe_start, read_start, start_facts
from fluxjax.devices.offload import fetch, free, offload, residency
from fluxjax.devices.vae_memory import limit_vae_memory
from fluxjax.generate.autoencode import encode
from fluxjax.generate.draw import (
    DenoisedBatch,
    ImageBatch,
    Recipe,
    decode_batch,
    denoise_batch,
)
from fluxjax.generate.image import read_metadata, write_numbered, write_png
from fluxjax.generate.image_to_image import Start, begin_from_images
from fluxjax.generate.latents import keys_of_steps, noise_batch, seed_key, step_keys
from fluxjax.generate.limits import check_devices
from fluxjax.generate.load import load_network, load_tokenizers
from fluxjax.generate.prompted import batches, distilled_guidance, prompt_batch
from fluxjax.generate.text import TextStates, encode_text, prompt_ids
from fluxjax.generate.tokens import Tokenizers, token_counts
from fluxjax.nets.clip import Clip
from fluxjax.nets.t5 import T5
from fluxjax.nets.transformer import AbstractTransformer
from fluxjax.nets.vae import Vae
from fluxjax.shapes import Array, Bool, Float


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
        _draw_file(request, request.prompts)
    else:
        _draw_prompts(request)


class _Encoders(NamedTuple):
    """What prompts are encoded with."""

    tokenizers: Tokenizers
    clip: Clip | None
    t5: T5


class _Networks(NamedTuple):
    """What a batch is drawn with. `guidance`: the distilled scale, for a network that takes one.
    `conditions`: make what images of a size are conditioned on beside their prompts."""

    flux: AbstractTransformer
    vae: Vae
    guidance: Float[Array, ""] | None
    conditions: tuple[ConditionOfSize, ...]

    def at_guidance(self, request: Request) -> "_Networks":
        """Return the networks with a request's distilled scale. **Raises:** as
        `distilled_guidance`."""
        scale = distilled_guidance(self.flux, request.defaults, request.distilled)
        return self._replace(guidance=scale)

    @property
    def guidance_text(self) -> str:
        return "none" if self.guidance is None else f"{float(self.guidance):g}"


class _Prompts(NamedTuple):
    """A batch of encoded prompts, and of what is guided away from, if anything is."""

    positive: TextStates
    negative: TextStates | None

    @staticmethod
    def joined(parts: Sequence["_Prompts"]) -> "_Prompts":
        """Return the prompts of several batches as one."""
        if len(parts) == 1:
            return parts[0]
        return jax.tree.map(lambda *rows: jnp.concatenate(rows), *parts)

    def rows(self, numbers: Sequence[int]) -> "_Prompts":
        negative = None if self.negative is None else self.negative.rows(numbers)
        return _Prompts(self.positive.rows(numbers), negative)


class _Images(NamedTuple):
    """Drawn images on this host. `lost`: for each, the first stage after which it is not finite.
    `reused`: the number of evaluations of the network that a step cache skipped."""

    images: list[np.ndarray]
    lost: list[str | None]
    reused: int


class _Latents(NamedTuple):
    """A denoised batch. `finite_prompts`: which of its prompts are. `starts`: what each image was
    drawn from, or None."""

    denoised: DenoisedBatch
    finite_prompts: np.ndarray
    starts: Sequence[StartImage | None]


class _Group(NamedTuple):
    """Images that are drawn together.

    `numbers`: of the images of all prompts, or of the lines of a file. `request`: for their size.
    `facts`: of one of the images that are drawn again, or None; all begin at the same time.
    """

    numbers: list[int]
    request: Request
    facts: StartFacts | None

    @property
    def start(self) -> Start:
        """Where sampling starts."""
        times = self.request.recipe.times
        return Start(times, 0) if self.facts is None else self.facts.repaint.start_of(times)


def _draw_prompts(request: Request) -> None:
    """Encode all prompts, free the text encoders, then draw the images batch by batch."""
    is_writer = jax.process_index() == 0
    facts, start = start_facts(request.lines[0], request.start, request.timer), None
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
    with _clock(request, groups, silent=not is_writer or request.quiet) as clock:
        stages = _Stages(clock, request)
        encoders = stages.load_encoders()
        stages.note_cut_prompts(encoders.tokenizers, request.lines if is_writer else [])
        prompts = _encode_prompts(stages, encoders)
        stages.show_memory(encoders, None)
        texts = stages.encode_conditions(encoders, is_writer)
        kept = encoders if request.keep_encoders else None
        del encoders
        networks = stages.load_networks(texts)
        stages.show_memory(kept, networks)
        watch_previews(request, clock, networks.vae)
        drawn = _draw_groups(stages, networks, prompts, groups, start)
        for group, images in zip(groups, drawn, strict=True):
            reused += images.reused
            written += _write_prompt_images(networks, group, images, paths)
    if is_writer:
        if not request.quiet:
            _print_report(clock, request, reused, groups)
        print("\n".join(str(path) for path in written))


def _group_images(request: Request, facts: StartFacts | None) -> list[_Group]:
    """Return the batches of the images of all prompts."""
    if request.drawn_in is not None:
        # One image, in each row of a batch of the size that it was drawn in.
        return [_Group([0] * request.drawn_in.rows, request, facts)]
    numbers = batches(len(request.draws), request.batch)
    return [_Group(one, request, facts) for one in numbers]


def _encode_prompts(stages: "_Stages", encoders: _Encoders) -> _Prompts:
    """Encode the prompts one by one; the last bits of a row may depend on those beside it."""
    request = stages.request
    if request.drawn_in is not None and request.drawn_in.together:
        return stages.encode(encoders, request.lines * request.drawn_in.rows)
    return _Prompts.joined([stages.encode(encoders, [line]) for line in request.lines])


def _prompt_rows(request: Request, numbers: Sequence[int]) -> list[int]:
    """Return the encoded prompt of each image of a batch."""
    if request.drawn_in is not None and request.drawn_in.together:
        return list(range(len(numbers)))
    draws = request.draws
    return [draws[number].line for number in numbers]


def _draw_groups(
    stages: "_Stages",
    networks: _Networks,
    prompts: _Prompts,
    groups: Sequence[_Group],
    start: StartImage | None,
) -> Iterator[_Images]:
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


def _write_prompt_images(
    networks: _Networks, group: _Group, drawn: _Images, paths: Sequence[Path] | None
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
            raise ValueError(f"Image {image.number} {_not_finite(lost)}")
        if jax.process_index() > 0:
            continue
        line = request.lines[image.line]._replace(seed=image.seed)
        metadata = _metadata(networks, group, line) | {"image": str(image.number)}
        size = request.drawn_in or BatchSize(len(group.numbers), together=False)
        metadata = with_command(metadata, _command(networks, group, line, image), size)
        if paths is None:
            written.append(write_numbered(drawn.images[row], request.folder, metadata))
        else:
            overwrite = request.overwrite
            write_png(drawn.images[row], paths[number], metadata, overwrite=overwrite)
            written.append(paths[number])
    return written


def _metadata(networks: _Networks, group: _Group, line: Line) -> dict[str, str]:
    changes = {} if group.facts is None else group.facts.description
    return group.request.metadata(line, networks.guidance_text, changes)


def _command(networks: _Networks, group: _Group, line: Line, image: PlannedImage) -> str:
    scale = None if networks.guidance is None else float(networks.guidance)
    return image_command(group.request, line, image, scale, group.facts)


class _Work(NamedTuple):
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


def _draw_file(request: Request, path: Path) -> None:
    """Draw this process's share of a file's lines that have no image yet.

    An image depends on its line, on --batch, and on the number of lines like it; it is written
    whole or not at all.
    """
    lines, problems = read_prompts(path, guided=request.is_guided)
    paths, repeated = line_paths(request, lines)
    lines = [line for line in lines if line.id in paths]
    mine = share(lines, jax.process_index(), jax.process_count())
    work = _sort_lines(request, mine, paths)
    problems += repeated + work.problems
    written = 0
    if work.lines:
        alike = Counter(_kind(request.of_line(line)) for line in lines)
        groups = _group_lines(request, work, alike)
        request, groups = _planned(request, groups)
        reused = 0
        with _clock(request, groups, silent=request.quiet) as clock:
            stages = _Stages(clock, request)
            encoders = stages.load_encoders()
            networks = stages.load_networks(stages.encode_conditions(encoders))
            stages.note_cut_prompts(encoders.tokenizers, work.lines)
            stages.show_memory(encoders, networks)
            for group in groups:
                chosen = [work.lines[number] for number in group.numbers]
                try:
                    own = networks.at_guidance(group.request)
                except ValueError as error:
                    problems += [f"line {line.number}: {error}" for line in dict.fromkeys(chosen)]
                    continue
                watch_previews(group.request, clock, networks.vae)
                drawn = _draw_lines(stages, encoders, own, group, chosen)
                reused += drawn.reused
                count, more = _write_lines(group, own, chosen, drawn, work)
                written += count
                problems += more
        if not request.quiet:
            _print_report(clock, request, reused, groups)
    if not request.quiet:
        place = request.folder if request.output is None else request.output.text
        print(
            f"{written} images written to {place}, {work.present} were there, "
            f"{len(lines)} lines in all"
        )
    raise_problems(path, problems)


def _sort_lines(request: Request, lines: Sequence[Line], paths: Mapping[str, Path]) -> _Work:
    """Sort lines by whether their images are there, and are theirs."""
    work = _Work([], {}, {**paths}, {}, set(), 0, [])
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
        found = read_metadata(path)
        changes = {} if facts is None else facts.description
        expected = sized.metadata(line, sized.expected_guidance(found), changes)
        expected = with_found_plan(expected, found)
        reason = difference(found, expected)
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


def _kind(request: Request) -> tuple:
    """Return what lines share that are drawn together: size, number of steps, guidance."""
    return request.height, request.width, request.steps, request.distilled


def _group_lines(request: Request, work: _Work, alike: Mapping[tuple, int]) -> list[_Group]:
    """Return the lines' numbers in batches of what is alike and begins at one time. Those of one
    size follow one another.

    A batch has as many rows whichever lines have their images already: the last one of a kind
    repeats its last line.

    **Arguments:** `alike`: how many lines of the file there are of each kind.
    """
    numbers_by_kind: dict[tuple, list[int]] = {}
    for number, line in enumerate(work.lines):
        kind, facts = _kind(work.requests[line.id]), work.facts.get(line.id)
        if facts is not None:
            kind += (facts.repaint.strength, facts.repaint.rule, facts.has_mask)
        numbers_by_kind.setdefault(kind, []).append(number)
    groups = []
    for numbers in numbers_by_kind.values():
        line = work.lines[numbers[0]]
        size = max(1, min(request.batch, alike[_kind(request.of_line(line))]))
        for start in range(0, len(numbers), size):
            chosen = (numbers[start:] + [numbers[-1]] * size)[:size]
            groups.append(_Group(chosen, work.requests[line.id], work.facts.get(line.id)))
    # All of one size use the same compiled programs, also where they have other steps.
    return sorted(groups, key=lambda group: (group.request.height, group.request.width))


def _planned(request: Request, groups: Sequence[_Group]) -> tuple[Request, list[_Group]]:
    """Return a request and its batches with the plan for the largest images of a file."""
    largest = max(groups, key=lambda group: group.request.height * group.request.width)
    choice = with_plan(largest.request).choice
    if choice is None:
        return request, list(groups)
    own = [group._replace(request=with_choice(group.request, choice)) for group in groups]
    return with_choice(request, choice), own


def _draw_lines(
    stages: "_Stages",
    encoders: _Encoders,
    networks: _Networks,
    group: _Group,
    lines: Sequence[Line],
) -> _Images:
    """Draw a batch of lines, each with the noise of its own seed."""
    prompts = stages.encode(encoders, lines)
    seeds = [(line.seed, 0) for line in lines]
    starts = [read_start(line) for line in lines]
    denoised = stages.denoise(networks, prompts, group, seeds, starts)
    return stages.decode(networks.vae, denoised)


def _write_lines(
    group: _Group,
    networks: _Networks,
    lines: Sequence[Line],
    drawn: _Images,
    work: _Work,
) -> tuple[int, list[str]]:
    """Write a batch of lines; return how many were written, and what is wrong with the others."""
    written, problems = 0, []
    # The last batch repeats its last line.
    for line, image, lost in zip(dict.fromkeys(lines), drawn.images, drawn.lost, strict=False):
        if lost is not None:
            problems.append(f"line {line.number}: its image {_not_finite(lost)}")
            continue
        with suppress(FileExistsError):  # another process has drawn it since
            planned = PlannedImage(0, line.seed, 0)
            own = group._replace(facts=work.facts.get(line.id))
            size = BatchSize(len(lines), together=True)
            metadata = with_command(
                _metadata(networks, own, line), _command(networks, own, line, planned), size
            )
            path = work.paths[line.id]
            write_png(image, path, metadata, overwrite=line.id in work.replaced)
            written += 1
            if group.request.quiet:
                print(path)
    return written, problems


def _not_finite(stage: str) -> str:
    return (
        f"is not finite after {stage}, and is not written. If it is float16 that overflows, leave "
        "out --dtype; else look at the weights and adapters."
    )


def _clock(request: Request, groups: Sequence[_Group], *, silent: bool = False) -> Clock:
    steps = sum(group.start.steps for group in groups)
    return Clock(steps, request.recipe.step.evaluations * request.start.repeats, silent=silent)


def _print_report(clock: Clock, request: Request, reused: int, groups: Sequence[_Group]) -> None:
    """Print the time t that drawing started from (for images that are drawn again), the seconds of
    each stage, and the number of evaluations that a step cache skipped."""
    notes: dict[str, None] = {}
    for group in groups:
        if group.facts is not None:
            notes.setdefault(describe_start(group.facts.repaint, group.start))
    for note in notes:
        print(note)
    report = clock.report()
    if request.recipe.guidance.cache is not None:
        sides = 2 if request.guides_by_scale else 1
        evaluations = clock.steps * clock.evaluations * sides
        report += f", cache: {reused} of {evaluations} evaluations skipped"
    print(report)


class _Stages(NamedTuple):
    """The stages of drawing, each timed by the clock."""

    clock: Clock
    request: Request

    def load_encoders(self) -> _Encoders:
        """Load the tokenizers and text encoders, into host memory if they are to stay there."""
        model = self.request.model
        tokenizers = self.clock.load("tokenizers", lambda: load_tokenizers(model))
        networks: dict[str, Any] = {}
        for name in self.request.family.text_encoders:
            network = self._load(name)
            networks[name] = offload(network) if self.request.offload_encoders else network
        return _Encoders(tokenizers, networks.get("clip"), networks["t5"])

    def load_networks(self, texts: Mapping[str, TextStates]) -> _Networks:
        """Load the transformer, the VAE, and what images are conditioned on.

        **Arguments:** `texts`: from `encode_conditions`.
        """
        request = self.request
        flux = self._load(request.family.transformer)
        request.check_conditions(flux.config)
        scale = distilled_guidance(flux, request.defaults, request.distilled)
        vae = self._load("vae")
        if request.vae_memory is not None:
            vae = limit_vae_memory(vae, request.vae_memory)
        parts = ConditionParts(
            flux=flux,
            vae=vae,
            load=request.load_of(request.family.transformer),
            dtype=request.dtype,
            hooks=self.clock,
            time_load=self.clock.load,
            texts=texts,
        )
        return _Networks(flux, vae, scale, load_conditions(request.conditions, parts))

    def _load(self, name: str) -> Any:
        request = self.request
        return self.clock.load(
            name, lambda: load_network(name, request.model, request.load_of(name), note=complain)
        )

    def show_memory(self, encoders: _Encoders | None, networks: _Networks | None) -> None:
        """Print where the weights lie, if it was asked for."""
        if not self.request.show_memory:
            return
        networks_by_name = {
            "clip": None if encoders is None else encoders.clip,
            "t5": None if encoders is None else encoders.t5,
            self.request.family.transformer: None if networks is None else networks.flux,
            "vae": None if networks is None else networks.vae,
        }
        tqdm.write(residency(networks_by_name) + "\n")

    def note_cut_prompts(self, tokenizers: Tokenizers, lines: Sequence[Line]) -> None:
        """Print which prompts are longer than the encoders read."""
        for line in lines:
            prefix = f"line {line.number}: " if line.number else ""
            for note in cut_notes(tokenizers, line, self.request.max_length):
                tqdm.write(f"fluxjax: {prefix}{note}", file=sys.stderr)

    def encode_conditions(
        self, encoders: _Encoders, is_writer: bool = True
    ) -> dict[str, TextStates]:
        """Encode the texts of what images are conditioned on.

        **Arguments:** `is_writer`: whether this process prints which of them are cut.
        **Returns:** a batch of one for each different text.
        """
        texts: dict[str, None] = {}
        for condition in self.request.conditions:
            texts |= dict.fromkeys(condition.texts)
        if not texts:
            return {}
        prompts = list(texts)
        lines = [Line(prompt, None, None, "", 0) for prompt in prompts]
        self.note_cut_prompts(encoders.tokenizers, lines if is_writer else [])
        states = self._encode_texts(self._fetched(encoders), prompts, prompts)
        return {prompt: states.rows([row]) for row, prompt in enumerate(prompts)}

    def encode(self, encoders: _Encoders, lines: Sequence[Line]) -> _Prompts:
        """Encode prompts, and what they are guided away from, if anything."""
        request = self.request
        fetched = self._fetched(encoders)
        prompts = [line.prompt for line in lines]
        t5_prompts = []
        for line in lines:
            t5_prompts.append(line.prompt if line.prompt_2 is None else line.prompt_2)
        positive = self._encode_texts(fetched, prompts, t5_prompts)
        if not request.is_guided:
            return _Prompts(positive, None)
        negatives = [request.negative_of(line) for line in lines]
        return _Prompts(positive, self._encode_texts(fetched, negatives, negatives))

    def _fetched(self, encoders: _Encoders) -> _Encoders:
        clip = None if encoders.clip is None else fetch(encoders.clip)
        return encoders._replace(clip=clip, t5=fetch(encoders.t5))

    def _encode_texts(
        self, encoders: _Encoders, prompts: list[str], t5_prompts: list[str]
    ) -> TextStates:
        """Encode texts by encoders on the device."""
        request = self.request
        ids = prompt_ids(
            encoders.tokenizers,
            prompts,
            t5_prompts,
            max_length=request.max_length,
            visible_padding=request.defaults.visible_padding,
        )
        return self.clock.run(
            "encode",
            encode_text,
            encoders.clip,
            encoders.t5,
            ids,
            dtype=request.dtype,
            mesh=request.load.mesh,
        )

    def denoise(
        self,
        networks: _Networks,
        prompts: _Prompts,
        group: _Group,
        seeds: Sequence[tuple[int, int]],
        starts: Sequence[StartImage | None],
    ) -> _Latents:
        """Denoise a batch.

        **Arguments:** `seeds`: the seed and the number of each image. `starts`: the images that are
        drawn again, or None for each.
        """
        request = group.request
        batch = self._batch(networks, prompts, request, seeds)
        recipe = request.recipe
        if group.facts is not None:
            loaded = [start for start in starts if start is not None]
            batch, recipe = self._begin(networks, batch, group, seeds, loaded)
        denoised = denoise_batch(
            networks.flux,
            networks.vae,
            batch,
            recipe,
            dtype=request.dtype,
            mesh=request.load.mesh,
            hooks=self.clock,
        )
        return _Latents(denoised, _on_host(finite_rows(prompts)), starts)

    def decode(self, vae: Vae, latents: _Latents) -> _Images:
        """Decode a batch, and look which of its images are finite."""
        request, denoised = self.request, latents.denoised
        drawn = decode_batch(
            vae, denoised, dtype=request.dtype, mesh=request.load.mesh, hooks=self.clock
        )
        images = _on_host(drawn.images)
        finite = {
            "the text encoders": latents.finite_prompts,
            "denoising": _on_host(finite_rows(denoised.latents)),
            "decoding": np.isfinite(images).reshape(len(images), -1).all(1),
        }
        finite_steps = _on_host(denoised.finite_steps)
        lost = []
        for row in range(len(images)):
            stage = next((name for name, rows in finite.items() if not rows[row]), None)
            if stage == "denoising":
                stage = f"denoising (step {finite_steps[row] + 1} of {request.steps})"
            lost.append(stage)
        finished = []
        for image, start in zip(images, latents.starts, strict=False):
            finished.append(image if start is None else start.finish(image))
        return _Images(finished, lost, int(_on_host(denoised.reused)))

    def _batch(
        self,
        networks: _Networks,
        prompts: _Prompts,
        request: Request,
        seeds: Sequence[tuple[int, int]],
    ) -> ImageBatch:
        """Return the batch that begins with the noise of each image at t = 1."""
        channels = networks.vae.config.latent_channels
        noise, keys = [], []
        for seed, number in seeds:
            key = seed_key(seed)
            size = request.height, request.width
            noise.append(noise_batch(key, [number], *size, channels=channels))
            image_keys = step_keys(key, [number], request.recipe.step)
            if image_keys is not None:
                keys.append(image_keys)
        size, times = (request.height, request.width), request.recipe.times
        return prompt_batch(
            prompts.positive,
            prompts.negative,
            noise=jnp.concatenate(noise),
            keys=jnp.concatenate(keys) if keys else None,
            distilled=networks.guidance,
            conditions=[of_size(*size).for_times(times) for of_size in networks.conditions],
        )

    def _begin(
        self,
        networks: _Networks,
        batch: ImageBatch,
        group: _Group,
        seeds: Sequence[tuple[int, int]],
        starts: Sequence[StartImage],
    ) -> tuple[ImageBatch, Recipe]:
        """Return the batch that begins with images, and its recipe."""
        assert group.facts is not None
        images = jnp.stack([start.padded_image() for start in starts])
        latents = self.clock.run(
            "encode",
            encode,
            networks.vae,
            images,
            dtype=self.request.dtype,
            mesh=self.request.load.mesh,
        )
        cells = [mask for mask in (start.cells() for start in starts) if mask is not None]
        keys = [keys_of_steps(seed_key(seed), [number]) for seed, number in seeds]
        return begin_from_images(
            batch,
            group.request.recipe,
            latents,
            group.facts.repaint,
            cells=jnp.stack(cells) if cells else None,
            keys=jnp.concatenate(keys),
        )


def _on_host(x: Array) -> np.ndarray:
    """Return an array that may lie on the devices of several processes."""
    return np.asarray(x if x.is_fully_addressable else process_allgather(x, tiled=True))


@jax.jit
def finite_rows(tree: object) -> Bool[Array, " rows"]:
    """Return for each row of a pytree of arrays whether all its numbers are finite."""
    rows = [jnp.isfinite(leaf).reshape(len(leaf), -1).all(1) for leaf in jax.tree.leaves(tree)]
    return jnp.stack(rows).all(0)


def cut_notes(tokenizers: Tokenizers, line: Line, max_length: int) -> list[str]:
    """Return a note on each text of a line that is longer than CLIP or T5 reads."""
    notes = []
    for name, text in line.texts().items():
        clip, t5 = token_counts(tokenizers, text)
        # With a second prompt, CLIP reads only the first, and T5 only the second.
        clip_reads = name != "prompt_2"
        t5_reads = name != "prompt" or line.prompt_2 is None
        parts = []
        if clip_reads and clip > tokenizers.clip_length:
            parts.append(f"CLIP reads {tokenizers.clip_length} of {clip} tokens")
        if t5_reads and t5 > max_length:
            parts.append(f"T5 reads {max_length} of {t5}")
        if parts:
            notes.append(f"the {name} is cut: {', '.join(parts)}")
    return notes
