"""An image drawn again as its metadata say: the command that is written there, and its reading."""

import argparse
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from fluxjax.cli.console import complain
from fluxjax.cli.option_parser import option_words
from fluxjax.cli.output import encodable
from fluxjax.cli.places import BatchSize, PlannedImage, read_batch_size
from fluxjax.cli.prompts import Line
from fluxjax.cli.request import Request
from fluxjax.cli.starts import StartFacts
from fluxjax.generate.image import read_metadata
from fluxjax.printable import printable
from fluxjax.version import __version__

OF_RUN = frozenset(
    "prompts source_image output_dir output quiet overwrite images seeds batch compilation_cache "
    "keep_encoders offload_encoders stream_blocks show_memory distributed preview "
    "preview_every".split()
)
"""Options of a run, which no command of an image has."""
OF_IMAGE = frozenset(
    "prompt_2 negative_prompt seed first_image model steps guidance cfg height width aspect "
    "init_image mask strength start_time repeats".split()
)
"""Options that a command gets from what an image was drawn with; all others, as they were given."""
_OF_MODEL = ("steps", "guidance", "cfg")
"""Options that a command always has and that fit one model."""
_REPLACED = {
    "seed": ("seeds",),
    "strength": ("start_time",),
    "start_time": ("strength",),
    "aspect": ("height", "width"),
    "init_image": ("height", "width"),
    "model": _OF_MODEL,
}
"""Options of a command that go as well where one is given anew."""
_ENTRIES = {"image_prompts": "image_prompt", "regions": "region", "controlnet": "controlnet_image"}
"""Entries of metadata, and the options that name their files, where the names differ."""
_HASH = ", sha256 "
_SHOWN = 60


def image_command(
    request: Request,
    line: Line,
    image: PlannedImage,
    guidance: float | None,
    facts: StartFacts | None,
) -> str:
    """Return the command that draws an image, for its metadata.

    **Arguments:** `request`: at the size of the image. `guidance`: its distilled scale. `facts`: of
    the image that it starts from, if there is one.
    """
    values: dict[str, object] = {"model": request.model, "prompt-2": line.prompt_2}
    has_negative = line.negative_prompt is not None or request.negative_prompt is not None
    if request.is_guided and has_negative:
        values["negative-prompt"] = request.negative_of(line)
    values |= {"seed": image.seed, "first-image": image.number or None, "steps": request.steps}
    values["guidance"] = guidance
    if request.guides_by_scale:
        values["cfg"] = np.asarray(request.recipe.guidance.scale).item()
    if facts is None:
        values |= {"height": request.height, "width": request.width}
    else:
        values |= _start_values(line, facts)
    words = []
    for name, value in values.items():
        if value is not None:
            # The shortest text of the same float32.
            text = str(np.float32(value)) if isinstance(value, float) else str(value)
            words += option_words(f"--{name}", [text])
    for name, given in request.given.items():
        if name not in OF_RUN | OF_IMAGE:
            words += given
    prompt = ["--", line.prompt] if line.prompt.startswith("-") else [line.prompt]
    words = [*words, *prompt] if len(prompt) == 2 else [*prompt, *words]
    return encodable(shlex.join(["fluxjax", "generate", *words]))


def _start_values(line: Line, facts: StartFacts) -> dict[str, object]:
    """Return the options of an image that is drawn again."""
    assert line.init_image is not None
    repaint = facts.repaint
    name = "start-time" if repaint.rule == "time" else "strength"
    values: dict[str, object] = {"init-image": line.folder / line.init_image}
    values[name] = float(repaint.strength)
    if line.mask is not None:
        values["mask"] = line.folder / line.mask
        values["repeats"] = repaint.repeats
    return values


def replayed(options: argparse.Namespace) -> argparse.Namespace:
    """Return options with those of the image that --from names in place of what is not given.

    They get `drawn_in`, the size of the image's batch, and `recorded`, metadata that the new image
    must share; None and nothing without --from.

    **Raises:** `ValueError` for an image without a command of `fluxjax generate`.
    """
    if options.source_image is None:
        return argparse.Namespace(**{**vars(options), "drawn_in": None, "recorded": {}})
    if options.prompts is not None:
        raise ValueError("--from draws the image of a file again. Leave out it or --prompts.")
    found = _read_record(options.source_image)
    recorded = _parse(options.parser, options.source_image, found["command"])
    dropped = _dropped(options)
    values = vars(recorded)
    for name in dropped:
        values[name] = options.parser.get_default(name)
    for name in {*options.given, *OF_RUN}:
        values[name] = getattr(options, name)
    kept = {name: words for name, words in recorded.given.items() if name not in dropped}
    changed = set(options.given) - OF_RUN
    if options.texts:
        values["texts"] = options.texts
        changed.add("prompt")
    several = changed or {"images", "seeds", "batch"} & set(options.given)
    size = found.get("batch")
    values |= {
        "given": {**kept, **options.given},
        "drawn_in": None if several or size is None else read_batch_size(size),
        "recorded": _entries_to_keep(found, changed),
    }
    return argparse.Namespace(**values)


def _read_record(path: Path) -> Mapping[str, str]:
    """Return the metadata of an image. **Raises:** `ValueError` for one that has no command."""
    if not path.is_file():
        raise FileNotFoundError(f"--from {path}: there is no such file.")
    found = read_metadata(path)
    version = found.get("version", "")
    if not version.startswith("fluxjax "):
        raise ValueError(
            f"--from {path}: it has no metadata of fluxjax. Give a PNG that `fluxjax generate` "
            "wrote, unchanged by other programs."
        )
    if "command" not in found:
        raise ValueError(
            f"--from {path}: its metadata are not those of `fluxjax generate` from version 0.2 on. "
            "Give an image of that command."
        )
    if version != f"fluxjax {__version__}":
        complain(f"{path} was drawn by {printable(version, _SHOWN)}: its bits may differ")
    return found


def _parse(parser: argparse.ArgumentParser, path: Path, command: str) -> argparse.Namespace:
    """Return the options of a command. **Raises:** `ValueError` for one that is not of an image."""
    try:
        words = shlex.split(command)
    except ValueError:
        words = []
    if words[:2] != ["fluxjax", "generate"]:
        raise ValueError(f"--from {path}: its command is not one of `fluxjax generate`.")
    recorded = parser.parse_args(words[2:])
    foreign = set(recorded.given) & OF_RUN
    if foreign or len(recorded.texts) != 1:
        # What a file of someone else says must not choose where files are written.
        raise ValueError(f"--from {path}: its command is not that of one image.")
    return recorded


def _dropped(options: argparse.Namespace) -> set[str]:
    """Return the options of the image's command that do not go with those that are given."""
    dropped: set[str] = set()
    for name in options.given:
        dropped.update(_REPLACED.get(name, ()))
    if "seeds" in options.given:
        dropped.add("seed")
    if "timer" in options.given:  # a file of times has its own number of steps
        dropped.add("steps")
    return dropped


def _entries_to_keep(found: Mapping[str, str], changed: Iterable[str]) -> dict[str, str]:
    """Return the metadata that the new image must share: all of them or, where options are changed,
    those of files that the other options name."""
    changed = set(changed)
    kept = {}
    for name, value in found.items():
        option = name.split()[0]
        is_file = _HASH in value and option not in changed
        if changed and (not is_file or _ENTRIES.get(option) in changed):
            continue
        if name not in ("version", "command", "batch", "image"):
            kept[name] = value
    return kept


def check_recorded(request: Request, facts: StartFacts | None) -> None:
    """Check that an image which is drawn again is what its metadata describe.

    **Raises:** `ValueError` if a file that they name has changed since.
    """
    if request.line is None or not request.recorded:
        return
    changes = {} if facts is None else facts.description
    guidance = request.expected_guidance(request.recorded)
    now = request.metadata(request.line, guidance, changes)
    for name, value in request.recorded.items():
        if now.get(name) != value:
            shown = printable(now.get(name, "none"), _SHOWN)
            raise ValueError(
                f"--from: its {name} was '{printable(value, _SHOWN)}' and is '{shown}' now. "
                "Restore it, or give the option anew."
            )


def with_command(metadata: Mapping[str, str], command: str, size: BatchSize) -> dict[str, str]:
    """Return metadata with the command that draws the image, and the size of its batch."""
    about = {**metadata, "command": command}
    if size.rows > 1:
        about["batch"] = size.describe()
    return about
