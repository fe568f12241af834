"""Text that comes from files, made safe to print."""


def printable(text: str, most: int = 200) -> str:
    """Return text in which control characters and others that don't print are escaped, as "\\x1b".

    A tensor's name or a file's metadata may contain escape sequences and line breaks, with which a
    file could fake what fluxjax prints about it.

    **Arguments:** `text`: any text. `most`: characters that are kept; a longer text is cut and
    ends in an ellipsis.
    **Returns:** one line of printable characters.
    """
    characters = []
    for character in text[: most + 1]:
        if character.isprintable():
            characters.append(character)
        else:
            characters.append(repr(character)[1:-1])
    shown = "".join(characters)
    if len(shown) <= most:
        return shown
    return shown[: most - 1] + "…"
