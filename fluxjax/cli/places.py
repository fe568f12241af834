"""Which image of a run one is, and how large the batch was that it was drawn in."""

import re
from typing import NamedTuple


class PlannedImage(NamedTuple):
    """An image of the command line's prompts: the number of its prompt, its seed, its number among
    the images of that seed."""

    line: int
    seed: int
    number: int


class BatchSize(NamedTuple):
    """How many images were drawn together with one, itself included.

    On some devices the last bits of an image depend on this number, and not on its row.

    `rows`: of the batch. `together`: whether the prompts of the batch were encoded together, as
    those of a file are, and not one by one.
    """

    rows: int
    together: bool

    def describe(self) -> str:
        """Return the size as metadata have it."""
        return f"{self.rows} {'lines' if self.together else 'images'}"


def read_batch_size(text: str) -> BatchSize:
    """Return the size that metadata describe. **Raises:** `ValueError` for another text."""
    match = re.fullmatch(r"([1-9][0-9]{0,5}) (lines|images)", text)
    if match is None:
        raise ValueError(f"{text!r} is not the size of a batch, as '4 images'")
    return BatchSize(int(match[1]), match[2] == "lines")
