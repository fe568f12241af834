"""The tables that lead from other programs to this one name what exists."""

import importlib
import inspect
import re
from pathlib import Path
from typing import NamedTuple

import pytest
from commands import OPTIONS

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "coming_from.md"
WITHOUT = ("nothing needed", "not here")
"""What the column says of a row that names nothing."""
NAME = re.compile(r"(?P<path>[a-z]\w*(?:\.\w+)+)(?:\((?P<arguments>[\w=, ]+)\))?")


class Row(NamedTuple):
    """A row of a table: what is there, what is here, and what differs."""

    there: str
    here: str
    differs: str


def rows() -> list[Row]:
    found = []
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[0] != "there" and not set(cells[0]) <= {"-"}:
            assert len(cells) == 3, line
            found.append(Row(*cells))
    return found


ROWS = rows()


def thing_of(path: str) -> object:
    """Return what a dotted name is of."""
    first, *parts = path.split(".")
    thing: object = importlib.import_module(first)
    for part in parts:
        # A folder exports functions by the names of their files: those come first.
        thing = getattr(thing, part)
    return thing


def check(code: str) -> None:
    """Fail for a piece of code that names nothing that there is."""
    name = NAME.fullmatch(code)
    if code.startswith("tools/"):
        assert (ROOT / code).is_file(), code
    elif name is not None:
        thing = thing_of(name["path"])
        for argument in re.findall(r"\w+", name["arguments"] or ""):
            assert argument in inspect.signature(thing).parameters, code
    elif "--" in code:
        words, _, flag = code.rpartition("--")
        assert f"--{flag}" in OPTIONS[words.strip() or "generate"], code
    else:
        assert code in OPTIONS, code


@pytest.mark.parametrize("here", sorted({row.here for row in ROWS}))
def test_what_a_row_leads_to_exists(here):
    codes = re.findall(r"`([^`]+)`", here)
    if here in WITHOUT:
        return
    assert codes
    assert re.sub(r"`[^`]+`(, )?", "", here) == ""
    for code in codes:
        check(code)


def test_a_wrong_name_is_found():
    for code in ("--stepz", "edit --instruction", "fluxjax.flow.Eulr", "fluxjax.Heun(tableau=)"):
        with pytest.raises((AssertionError, AttributeError, KeyError)):
            check(code)


def test_each_row_is_of_something_else():
    assert len(ROWS) > 150
    for row in ROWS:
        assert row.there
    names = [row.there for row in ROWS]
    # `prompt` is of MaxDiffusion and of diffusers.
    assert max(names.count(name) for name in names) <= 2


def test_what_the_last_column_names_of_this_package_exists():
    for row in ROWS:
        for code in re.findall(r"`([^`]+)`", row.differs):
            if code.startswith(("fluxjax.", "tools/")):
                check(code)


def test_the_settings_of_a_training_that_the_last_column_names_exist():
    training = (ROOT / "docs" / "training.md").read_text()
    tables = "train|optimizer|loss|data|mesh|checkpoints|validation|log"
    named = set()
    for row in ROWS:
        named |= set(re.findall(rf"`((?:{tables})\.\w+)`", row.differs))
    assert len(named) > 20
    assert named <= set(re.findall(r"^\| `([\w.]+)`", training, re.M))
