"""A comparison of samplers as files: a table of the runs, and a picture."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np

from fluxjax.checkpoint.atomic import new_file
from fluxjax.generate.compare import Run
from fluxjax.generate.image import next_number, write_png
from fluxjax.shapes import Image


def write_comparison(
    folder: Path, picture: Image | np.ndarray, rows: str, metadata: Mapping[str, str]
) -> tuple[Path, Path]:
    """Write `compare_N.png` and `compare_N.csv`, with the number after the highest of either there.

    **Arguments:** `picture`: of the images, in [-1, 1]. `rows`: from `comparison_csv`. `metadata`:
    of the picture.
    **Returns:** their paths.
    """
    number = next_number(folder, "compare", (".png", ".csv"))
    while True:
        image = folder / f"compare_{number}.png"
        try:
            with new_file(image.with_suffix(".csv")) as file:
                file.write(rows.encode())
                write_png(picture, image, metadata)
        except FileExistsError:  # another process has written it since
            number += 1
        else:
            return image, image.with_suffix(".csv")


def comparison_csv(runs: Sequence[Run]) -> str:
    """Return the runs as CSV, with a header."""
    out = io.StringIO()
    names = [field.name for field in fields(Run)]
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    for run in runs:
        row = asdict(run)
        for name, value in row.items():
            if isinstance(value, float):
                row[name] = f"{value:.6g}"
        writer.writerow(row)
    return out.getvalue()
