"""Text that comes from files, shown to a person: what would move the cursor or begin a line is escaped."""


def printable(text: str, most: int = 200) -> str:
    """Return text in which control characters and other signs that do not print are escaped, as in "\\x1b".

    A tensor's name or a file's metadata may hold escape sequences and line breaks, with which a file could fake what
    fluxjax prints about it.

    **Arguments:** `most`: characters that are kept; a longer text is cut, and ends in an ellipsis.
    """
    shown = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text[: most + 1])
    return shown if len(shown) <= most else shown[: most - 1] + "…"
