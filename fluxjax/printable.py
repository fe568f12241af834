"""Text that comes from files, made safe to print: control characters and line breaks are escaped.

The names of tensors, the metadata and even the paths of a download are chosen by whoever made the
file. Escape sequences or line breaks in them could fake what fluxjax prints about the file.
"""

from pathlib import Path

_LONGEST_PATH = 1000
_LONGEST_NAME = 200


def printable(text: str, most: int = 200) -> str:
    """Return text in which characters that do not print are escaped, as in "\\x1b".

    **Arguments:** `text`: any text. `most`: characters that are kept; a longer text is cut, and
    ends in an ellipsis.
    **Returns:** one line of printable characters.
    """
    escaped = ""
    for character in text[: most + 1]:
        if character.isprintable():
            escaped += character
        else:
            escaped += repr(character)[1:-1]
    if len(escaped) <= most:
        return escaped
    return escaped[: most - 1] + "…"


def printable_path(path: Path) -> str:
    """Return a path for an error message."""
    return printable(str(path), _LONGEST_PATH)


def quote_name(name: str) -> str:
    """Return the name of a tensor in quotes for an error message, cut if it is long."""
    if len(name) > _LONGEST_NAME:
        name = name[: _LONGEST_NAME - 1] + "…"
    return repr(name)
