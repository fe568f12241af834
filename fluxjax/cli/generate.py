"""The command `fluxjax generate`: images of a prompt, or of each line of a file of prompts."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from tqdm import tqdm

from fluxjax.cli.compilation_cache import use_cache
from fluxjax.cli.console import complain
from fluxjax.cli.jobs import check_together, join_job
from fluxjax.cli.progress import Clock
from fluxjax.cli.prompts import Line, difference, read_prompts, share
from fluxjax.cli.request import Request, read_request
from fluxjax.devices.offload import fetch, offload, residency
from fluxjax.generate.draw import draw_batch
from fluxjax.generate.image import read_metadata, write_numbered, write_png
from fluxjax.generate.latents import noise_batch, seed_key, step_keys
from fluxjax.generate.limits import check_devices
from fluxjax.generate.load import load_network, load_tokenizers
from fluxjax.generate.prompted import batches, distilled_guidance, prompt_batch
from fluxjax.generate.text import TextStates, encode_text, prompt_ids
from fluxjax.generate.tokens import Tokenizers, token_counts
from fluxjax.nets.clip import Clip
from fluxjax.nets.flux import Flux
from fluxjax.nets.t5 import T5
from fluxjax.nets.vae import Vae
from fluxjax.shapes import Array, Bool, Float
from fluxjax.zoo import family_of


def generate(options: argparse.Namespace) -> None:
    """Draw the images of a prompt, or those that a file of prompts lacks."""
    check_together(options)
    if options.distributed:
        join_job()
    check_devices()
    use_cache(options.compilation_cache)
    request = read_request(options)
    if request.line is not None:
        _draw_prompt(request, request.line)
    elif request.prompts is not None:
        _draw_file(request, request.prompts)


class _Encoders(NamedTuple):
    """What prompts are encoded with."""

    tokenizers: Tokenizers
    clip: Clip
    t5: T5


class _Networks(NamedTuple):
    """What a batch is drawn with. `guidance`: the distilled scale, for a network that takes one."""

    flux: Flux
    vae: Vae
    guidance: Float[Array, ""] | None

    @property
    def guidance_text(self) -> str:
        return "none" if self.guidance is None else f"{float(self.guidance):g}"


class _Prompts(NamedTuple):
    """A batch of encoded prompts, and of what is guided away from, if anything is."""

    positive: TextStates
    negative: TextStates | None

    def rows(self, numbers: Sequence[int]) -> "_Prompts":
        negative = None if self.negative is None else self.negative.rows(numbers)
        return _Prompts(self.positive.rows(numbers), negative)


class _Images(NamedTuple):
    """Drawn images on this host. `lost`: for each, the first stage after which it is not finite.
    `reused`: how many evaluations a step cache skipped."""

    images: np.ndarray
    lost: list[str | None]
    reused: int


def _draw_prompt(request: Request, line: Line) -> None:
    """Draw the images of one prompt: encode it, free the encoders, draw, a batch at a time."""
    is_writer = jax.process_index() == 0
    groups = batches(request.images, request.batch)
    written: list[Path] = []
    reused = 0
    with _clock(request, len(groups), silent=not is_writer) as clock:
        stages = _Stages(clock, request)
        encoders = stages.load_encoders()
        stages.note_cut_prompts(encoders.tokenizers, [line] if is_writer else [])
        prompts = stages.encode(encoders, [line])
        stages.show_memory(encoders, None)
        kept = encoders if request.keep_encoders else None
        del encoders
        networks = stages.load_networks()
        stages.show_memory(kept, networks)
        key = seed_key(line.seed)
        for group in groups:
            noise = noise_batch(
                key,
                group,
                request.height,
                request.width,
                channels=networks.vae.config.latent_channels,
            )
            keys = step_keys(key, group, request.recipe.step)
            drawn = stages.draw(networks, prompts.rows([0] * len(group)), noise, keys)
            reused += drawn.reused
            # The last group repeats its last number.
            for number, image, lost in zip(
                dict.fromkeys(group), drawn.images, drawn.lost, strict=False
            ):
                if lost is not None:
                    raise ValueError(f"Image {number} {_not_finite(lost)}")
                metadata = request.metadata(line, networks.guidance_text)
                metadata["image"] = str(number)
                if is_writer:
                    written.append(write_numbered(image, request.folder, metadata))
    if is_writer:
        print(_report(clock, request, reused, len(groups)))
        print("\n".join(str(path) for path in written))


class _Work(NamedTuple):
    """What a process has to do for a file of prompts.

    `lines`: to draw. `replaced`: the ids of those whose images are there and are replaced.
    `present`: how many images are there already. `problems`: why some lines are not drawn.
    """

    lines: list[Line]
    replaced: set[str]
    present: int
    problems: list[str]


def _draw_file(request: Request, path: Path) -> None:
    """Draw this process's share of a file's lines that have no image yet.

    An image depends on its line and on the batch size; it is written whole or not at all.
    """
    lines, problems = read_prompts(path, guided=request.is_guided)
    mine = share(lines, jax.process_index(), jax.process_count())
    work = _sort_lines(request, mine)
    problems += work.problems
    written = 0
    if work.lines:
        groups = batches(len(work.lines), min(request.batch, max(len(lines), 1)))
        reused = 0
        with _clock(request, len(groups)) as clock:
            stages = _Stages(clock, request)
            encoders, networks = stages.load_encoders(), stages.load_networks()
            stages.note_cut_prompts(encoders.tokenizers, work.lines)
            stages.show_memory(encoders, networks)
            for group in groups:
                chosen = [work.lines[number] for number in group]
                drawn = _draw_lines(stages, encoders, networks, chosen)
                reused += drawn.reused
                count, more = _write_lines(request, networks, chosen, drawn, work.replaced)
                written += count
                problems += more
        print(_report(clock, request, reused, len(groups)))
    print(
        f"{written} images written to {request.folder}, {work.present} were there, "
        f"{len(lines)} lines in all"
    )
    _raise_problems(path, problems)


def _sort_lines(request: Request, lines: Sequence[Line]) -> _Work:
    """Sort lines by whether their images are there, and are theirs."""
    work = _Work([], set(), 0, [])
    present = 0
    for line in lines:
        path = line.image(request.folder)
        if not path.exists() and not path.is_symlink():
            work.lines.append(line)
            continue
        found = read_metadata(path)
        expected = request.metadata(line, request.expected_guidance(found))
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


def _draw_lines(
    stages: "_Stages", encoders: _Encoders, networks: _Networks, lines: Sequence[Line]
) -> _Images:
    """Draw a batch of lines, each with the noise of its own seed."""
    request, channels = stages.request, networks.vae.config.latent_channels
    noise, keys = [], []
    for line in lines:
        key = seed_key(line.seed)
        noise.append(noise_batch(key, [0], request.height, request.width, channels=channels))
        line_keys = step_keys(key, [0], request.recipe.step)
        if line_keys is not None:
            keys.append(line_keys)
    prompts = stages.encode(encoders, lines)
    step_key_batch = jnp.concatenate(keys) if keys else None
    return stages.draw(networks, prompts, jnp.concatenate(noise), step_key_batch)


def _write_lines(
    request: Request,
    networks: _Networks,
    lines: Sequence[Line],
    drawn: _Images,
    replaced: set[str],
) -> tuple[int, list[str]]:
    """Write a batch of lines; return how many were written, and what is wrong with the others."""
    written, problems = 0, []
    # The last batch repeats its last line.
    for line, image, lost in zip(dict.fromkeys(lines), drawn.images, drawn.lost, strict=False):
        if lost is not None:
            problems.append(f"line {line.number}: its image {_not_finite(lost)}")
            continue
        with suppress(FileExistsError):  # another process has drawn it since
            metadata = request.metadata(line, networks.guidance_text)
            write_png(image, line.image(request.folder), metadata, overwrite=line.id in replaced)
            written += 1
    return written, problems


def _raise_problems(path: Path, problems: Sequence[str]) -> None:
    """Print what is wrong with each line. **Raises:** `ValueError` with the last of them."""
    for problem in problems[:-1]:
        complain(f"{path}: {problem}")
    if problems:
        raise ValueError(f"{path}: {problems[-1]}")


def _not_finite(stage: str) -> str:
    return (
        f"is not finite after {stage}, and is not written. If it is float16 that overflows, leave "
        "out --dtype; else look at the weights and adapters."
    )


def _clock(request: Request, groups: int, *, silent: bool = False) -> Clock:
    return Clock(request.steps * groups, request.recipe.step.evaluations, silent=silent)


def _report(clock: Clock, request: Request, reused: int, groups: int) -> str:
    """Return what was spent on each stage, and how many evaluations a step cache skipped."""
    report = clock.report()
    if request.recipe.guidance.cache is None:
        return report
    sides = 2 if request.guides_by_scale else 1
    evaluations = request.steps * request.recipe.step.evaluations * groups * sides
    return f"{report}, cache: {reused} of {evaluations} evaluations skipped"


class _Stages(NamedTuple):
    """The stages of drawing, each timed by the clock."""

    clock: Clock
    request: Request

    def load_encoders(self) -> _Encoders:
        """Load the tokenizers and text encoders, into host memory if they are to stay there."""
        model = self.request.model
        tokenizers = self.clock.load("tokenizers", lambda: load_tokenizers(model))
        networks = []
        for name in family_of(model).text_encoders:
            network = self._load(name)
            networks.append(offload(network) if self.request.offload_encoders else network)
        return _Encoders(tokenizers, *networks)

    def load_networks(self) -> _Networks:
        """Load the transformer and the VAE."""
        flux = self._load("flux")
        scale = distilled_guidance(flux, self.request.defaults, self.request.distilled)
        return _Networks(flux, self._load("vae"), scale)

    def _load(self, name: str) -> Any:
        request = self.request
        return self.clock.load(
            name, lambda: load_network(name, request.model, request.load, note=complain)
        )

    def show_memory(self, encoders: _Encoders | None, networks: _Networks | None) -> None:
        """Print where the weights lie, if it was asked for."""
        if not self.request.show_memory:
            return
        networks_by_name = {
            "clip": None if encoders is None else encoders.clip,
            "t5": None if encoders is None else encoders.t5,
            "flux": None if networks is None else networks.flux,
            "vae": None if networks is None else networks.vae,
        }
        tqdm.write(residency(networks_by_name) + "\n")

    def note_cut_prompts(self, tokenizers: Tokenizers, lines: Sequence[Line]) -> None:
        """Print which prompts are longer than the encoders read."""
        for line in lines:
            prefix = f"line {line.number}: " if line.number else ""
            for note in cut_notes(tokenizers, line, self.request.max_length):
                tqdm.write(f"fluxjax: {prefix}{note}", file=sys.stderr)

    def encode(self, encoders: _Encoders, lines: Sequence[Line]) -> _Prompts:
        """Encode prompts, and what they are guided away from, if anything."""
        request = self.request
        clip, t5 = fetch(encoders.clip), fetch(encoders.t5)

        def encode(prompts: list[str], t5_prompts: list[str]) -> TextStates:
            ids = prompt_ids(
                encoders.tokenizers, prompts, t5_prompts, max_length=request.max_length
            )
            return self.clock.run(
                "encode", encode_text, clip, t5, ids, dtype=request.dtype, mesh=request.load.mesh
            )

        prompts = [line.prompt for line in lines]
        t5_prompts = []
        for line in lines:
            t5_prompts.append(line.prompt if line.prompt_2 is None else line.prompt_2)
        positive = encode(prompts, t5_prompts)
        if not request.is_guided:
            return _Prompts(positive, None)
        negatives = [request.negative_of(line) for line in lines]
        return _Prompts(positive, encode(negatives, negatives))

    def draw(
        self, networks: _Networks, prompts: _Prompts, noise: Array, keys: Array | None
    ) -> _Images:
        """Denoise and decode a batch."""
        request = self.request
        batch = prompt_batch(
            prompts.positive,
            prompts.negative,
            noise=noise,
            keys=keys,
            distilled=networks.guidance,
        )
        drawn = draw_batch(
            networks.flux,
            networks.vae,
            batch,
            request.recipe,
            dtype=request.dtype,
            mesh=request.load.mesh,
            hooks=self.clock,
        )
        images = _on_host(drawn.images)
        finite = {
            "the text encoders": _on_host(finite_rows(prompts)),
            "denoising": _on_host(finite_rows(drawn.latents)),
            "decoding": np.isfinite(images).reshape(len(images), -1).all(1),
        }
        finite_steps = _on_host(drawn.finite_steps)
        lost = []
        for row in range(len(images)):
            stage = next((name for name, rows in finite.items() if not rows[row]), None)
            if stage == "denoising":
                stage = f"denoising (step {finite_steps[row] + 1} of {request.steps})"
            lost.append(stage)
        return _Images(images, lost, int(_on_host(drawn.reused)))


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
