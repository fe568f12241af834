"""Text that comes from files, made safe to print: control characters and line breaks are escaped.

The names of tensors, the metadata and even the paths of a download are chosen by whoever made the
file. Escape sequences or line breaks in them could fake what fluxjax prints about the file.
"""

from pathlib import Path

_LONGEST_PATH = 1000
_LONGEST_NAME = 200


def printable(text: str, max_length: int = 200) -> str:
    """Return text in which characters that do not print are escaped, as in "\\x1b".

    **Arguments:** `max_length`: longer text is cut to this many characters, the last of them an
    ellipsis.
    """
    escaped = ""
    for character in text[: max_length + 1]:
        escaped += character if character.isprintable() else repr(character)[1:-1]
    if len(escaped) <= max_length:
        return escaped
    return escaped[: max_length - 1] + "…"


def printable_path(path: Path) -> str:
    """Return a path for an error message."""
    return printable(str(path), _LONGEST_PATH)


def quote_name(name: str) -> str:
    """Return the name of a tensor in quotes for an error message, cut if it is long."""
    if len(name) > _LONGEST_NAME:
        name = name[: _LONGEST_NAME - 1] + "…"
    return repr(name)
