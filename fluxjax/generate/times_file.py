"""Sampling times in a small JSON file: {"times": [1.0, ..., 0.0], "about": {...}}."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fluxjax.arguments import convert_arguments
from fluxjax.checkpoint.atomic import new_file
from fluxjax.flow.times import custom_times
from fluxjax.printable import printable
from fluxjax.shapes import Times

TIMES_SUFFIX = ".json"
"""What names of files of times end in."""
_MOST_BYTES = 16_000_000


@convert_arguments
def write_times(
    path: str | Path,
    times: Times,
    about: Mapping[str, str] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write times to a JSON file, which `read_times` and `fluxjax generate --timer` read.

    **Arguments:** `times`: as for `custom_times`. `about`: what else the file should say, such as
    the model, the integrator and the image size that the times were learned for.
    **Raises:** `ValueError` as `custom_times`. `FileExistsError` unless `overwrite`.
    """
    # float32 has at most nine significant digits; JSON's shortest form of the float64 has more.
    nodes = [float(f"{node:.9g}") for node in np.asarray(custom_times(times))]
    text = json.dumps({"times": nodes, "about": dict(about or {})}, indent=1)
    with new_file(Path(path), overwrite=overwrite) as file:
        file.write(text.encode() + b"\n")


@convert_arguments
def read_times(path: str | Path) -> Times:
    """Read the times of a JSON file that `write_times` wrote.

    **Returns:** [steps + 1], float32, falling.
    **Raises:** `ValueError` for another file, or times that do not fall within [0, 1].
    `FileNotFoundError` if there is none.
    """
    with Path(path).open("rb") as file:
        content = file.read(_MOST_BYTES)
    try:
        nodes = [float(node) for node in json.loads(content)["times"]]
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{printable(str(path))} holds no sampling times. It has to be a JSON object with "
            '"times", a list of numbers that fall from 1 to 0; `write_times` writes one.'
        ) from error
    try:
        return custom_times(nodes)
    except ValueError as error:
        raise ValueError(f"{printable(str(path))}: {error}") from error
