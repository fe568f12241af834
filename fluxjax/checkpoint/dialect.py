"""Rows that pair the keys of a file with the parameters of a network, and tables of them."""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Layout = Literal["1x1", "swap", "own"]
"""How a file lays out a tensor where that differs from the usual.

"1x1" is a linear layer stored as a 1x1 convolution, "swap" has the two halves of its rows in the
other order, and "own" is laid out as in memory.
"""


@dataclass(frozen=True)
class Row:
    """One kind of tensor: a pattern of its key in a file, and of the parameter's name in fluxjax.

    In a pattern `{i}` and `{j}` stand for indices, `{p}` for weight or bias, and `{leaf}` for
    anything. The name of a stacked parameter carries the index of its block after the first field.

    `part`: which rows of a fused weight the tensor holds ("q", "k", "v", "mlp", or "qkv"); None
    for all of them. `layout`: how the tensor is laid out; None for as PyTorch does.
    """

    key: str
    name: str
    part: str | None = None
    layout: Layout | None = None

    @cached_property
    def key_pattern(self) -> re.Pattern[str]:
        """The regular expression of the key, with a group for each placeholder."""
        return _compile(self.key)

    @cached_property
    def name_pattern(self) -> re.Pattern[str]:
        """The regular expression of the name, with a group for each placeholder."""
        return _compile(self.name)


_PLACEHOLDERS = {"i": "[0-9]+", "j": "[0-9]+", "p": "weight|bias", "leaf": ".+"}


def _compile(text: str) -> re.Pattern[str]:
    """Return the regular expression of a pattern, with a group for each placeholder."""
    expression = re.escape(text)
    for name, choices in _PLACEHOLDERS.items():
        placeholder = re.escape(f"{{{name}}}")
        # Once only, since a group of one name can't come twice in an expression.
        expression = expression.replace(placeholder, f"(?P<{name}>{choices})", 1)
    return re.compile(expression + r"\Z")


def _without_indices(key: str) -> str:
    """Return a key with "#" in place of each index."""
    fields = key.split(".")
    for position, field in enumerate(fields):
        if field.isascii() and field.isdigit():  # other digits, as of Arabic, are no indices
            fields[position] = "#"
    return ".".join(fields)


@dataclass(frozen=True)
class Dialect:
    """How one project names the weights of a network: read forwards to load, backwards to export.

    `marker`: a key that tells this dialect from the network's others. `prefix`: what the keys may
    begin with, and do when they are written. `ignored`: keys that may be in a file and are not
    used; an entry that ends in a dot is the beginning of such keys.
    """

    name: str
    marker: str
    rows: tuple[Row, ...]
    prefix: str = ""
    ignored: tuple[str, ...] = ()

    def without_prefix(self, key: str) -> str:
        return key.removeprefix(self.prefix)

    def find(self, key: str) -> tuple[str, Row] | None:
        """Return the name of the parameter that a key belongs to, and the key's row."""
        stripped = self.without_prefix(key)
        rows = self._rows_by_form.get(_without_indices(stripped), self._general_rows)
        for row in rows:
            match = row.key_pattern.match(stripped)
            if match:
                return row.name.format(**match.groupdict()), row
        return None

    def ignores(self, key: str) -> bool:
        """Return whether a key may be in a file and is not used."""
        stripped = self.without_prefix(key)
        for entry in self.ignored:
            if stripped == entry or (entry.endswith(".") and stripped.startswith(entry)):
                return True
        return False

    def keys(self, name: str) -> list[tuple[str, Row]]:
        """Return the keys under which a parameter is written, in the order of its parts."""
        found = []
        for row in self.rows:
            match = row.name_pattern.match(name)
            if match:
                found.append((self.prefix + row.key.format(**match.groupdict()), row))
        return found

    @cached_property
    def _rows_by_form(self) -> dict[str, list[Row]]:
        """Rows by their key without indices, so that a key is compared with one or two of them."""
        table: dict[str, list[Row]] = {}
        for row in self.rows:
            kinds = ("weight", "bias") if "{p}" in row.key else ("",)
            # One form per kind of tensor; any index stands for all of them.
            for kind in kinds:
                form = _without_indices(row.key.format(i=0, j=0, p=kind, leaf=""))
                table.setdefault(form, []).append(row)
        return table

    @cached_property
    def _general_rows(self) -> list[Row]:
        """The rows that fit any key; their form is not that of the keys they match."""
        return [row for row in self.rows if "{leaf}" in row.key]
