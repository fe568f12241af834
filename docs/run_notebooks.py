"""Run the notebooks of this folder; with --write, keep what they printed and drew."""

import argparse
import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent


def run(path: Path, *, write: bool) -> None:
    """Run all cells of a notebook. **Raises:** `CellExecutionError` where a cell does."""
    notebook = nbformat.read(path, as_version=4)
    start = time.monotonic()
    NotebookClient(notebook, timeout=600, record_timing=False).execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("image/jpeg", None)  # the same picture as the PNG
    if write:
        nbformat.write(notebook, path)
    cells = sum(cell.cell_type == "code" for cell in notebook.cells)
    print(f"{path.name}: {cells} cells ran in {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "notebooks", nargs="*", type=Path, help="by default all in the folder of this script"
    )
    parser.add_argument("--write", action="store_true", help="write the outputs into the notebooks")
    options = parser.parse_args()
    paths = options.notebooks or sorted(FOLDER.glob("*.ipynb"))
    # Each notebook has a process of its own, whose programs are mostly compiled by one thread.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(partial(run, write=options.write), paths))


if __name__ == "__main__":
    main()
