"""The paths of the images of `fluxjax generate`, known before anything is drawn."""

from collections.abc import Sequence
from pathlib import Path

from fluxjax.cli.output import writable
from fluxjax.cli.output_pattern import OutputPattern, repeated_path
from fluxjax.cli.places import PlannedImage
from fluxjax.cli.prompts import Line
from fluxjax.cli.request import Request

_OPTION = "--output"


def image_paths(request: Request) -> list[Path] | None:
    """Return the path of each image of the command line's prompts by the pattern of --output, whose
    folders are made; None for numbered files.

    **Raises:** `ValueError` for two images of one path, or a folder that can't be written to;
    `FileExistsError` for a file that exists, unless it may be overwritten.
    """
    if request.output is None:
        return None
    paths = []
    for index, image in enumerate(request.draws):
        line = request.lines[image.line]._replace(id=str(index))
        paths.append(_path_of(request.output, request, line, image, index))
    repeated = repeated_path(paths)
    if repeated is not None:
        raise ValueError(
            f"{_OPTION} {request.output.text} names several images {repeated}. Add {{index}}, "
            "{seed}, {image} or {prompt}."
        )
    for path in paths:
        if path.exists() and not request.overwrite:
            raise FileExistsError(
                f"{_OPTION}: there is a file {path}. Remove it, choose another pattern, or give "
                "--overwrite."
            )
    for folder in {path.parent for path in paths}:
        writable(folder, _OPTION)
    return paths


def line_paths(request: Request, lines: Sequence[Line]) -> tuple[dict[str, Path], list[str]]:
    """Return the paths of the images of lines by their ids, and what is wrong with other lines:
    two of one path, or a size or steps that can't be drawn."""
    paths: dict[str, Path] = {}
    taken: dict[str, int] = {}
    problems = []
    for line in lines:
        try:
            own, image = request.of_line(line), PlannedImage(0, line.seed, 0)
        except ValueError as error:
            problems.append(f"line {line.number}: {error}")
            continue
        path = request.folder / f"{line.id}.png"
        if request.output is not None:
            path = _path_of(request.output, own, line, image, line.number - 1)
        # Some file systems do not distinguish capital letters.
        other = taken.setdefault(str(path).lower(), line.number)
        if other != line.number:
            problems.append(f"line {line.number}: its image {path} is also that of line {other}")
            continue
        paths[line.id] = path
    if request.output is not None:
        for folder in {path.parent for path in paths.values()}:
            writable(folder, _OPTION)
    return paths, problems


def _path_of(
    pattern: OutputPattern, request: Request, line: Line, image: PlannedImage, index: int
) -> Path:
    """Return the path that a pattern gives to an image. `index`: among all images."""
    return pattern.path(
        {
            "prompt": line.prompt,
            "seed": image.seed,
            "index": index,
            "image": image.number,
            "id": line.id,
            "model": request.model,
            "steps": request.steps,
            "width": request.width,
            "height": request.height,
        }
    )
