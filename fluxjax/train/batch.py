"""A batch of encoded training examples, and the streams that yield such batches."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import equinox as eqx

from fluxjax.generate.conditioning import ReferenceTokens
from fluxjax.generate.text import TextStates
from fluxjax.shapes import Array, Float, Int

StreamState = dict[str, Any]
"""A place in a stream of batches: numbers and texts, so that JSON can hold it."""


class TrainBatch(eqx.Module):
    """Encoded examples of one image size: a pytree, whose only static field is the size.

    In a run of several processes its rows are those of this process: an equal share of the global
    batch, in order of the processes.

    `latents`: packed, float32, scaled and shifted as the network takes them. `text`: hidden states
    of the captions; `txt_length` is None for families that read padding. `weight`: of each
    example's loss, at least 0; 0 marks a row that only fills the batch, which must not count.
    `numbers`: of the examples in the data, which the stream's `names` turns into names. `concat`:
    features that are appended to each token, as FLUX.1 Fill, Canny and Depth take them.
    `reference`: tokens of FLUX.1 Kontext's source images; `ids`, [reference_tokens, 3], are the
    same for all rows. `mask`: how much each token counts in the example's loss, in [0, 1]; None for
    all alike. `size`: height and width of the images in pixels.
    """

    latents: Float[Array, "batch tokens channels"]
    text: TextStates
    weight: Float[Array, " batch"]
    numbers: Int[Array, " batch"]
    concat: Float[Array, "batch tokens features"] | None = None
    reference: ReferenceTokens | None = None
    mask: Float[Array, "batch tokens"] | None = None
    size: tuple[int, int] = eqx.field(static=True, kw_only=True)


class AbstractBatches(ABC):
    """An endless stream of batches, epoch after epoch, that continues from a saved state.

    Within an epoch every example comes once, over all processes together; each batch has one image
    size, the same in all processes at the same step.
    """

    def __iter__(self) -> "AbstractBatches":
        return self

    @abstractmethod
    def __next__(self) -> TrainBatch:
        """Return the next batch."""

    @abstractmethod
    def state(self) -> StreamState:
        """Return the place behind the last batch that was returned, the same in all processes.

        It holds the epoch, how many of its examples all processes together have used, and what the
        order depends on. It does not depend on the number of processes.
        """

    @abstractmethod
    def restore(self, state: StreamState) -> None:
        """Continue behind the last batch before `state()` was called.

        **Raises:** `ValueError` for a state of other data, another seed or another global batch.
        """

    @abstractmethod
    def names(self, numbers: Sequence[int] | Array) -> list[str]:
        """Return the names of examples, for reports: `batch.numbers` of a batch."""

    @abstractmethod
    def empty_text(self) -> TextStates:
        """Return the states of the empty caption, with a batch axis of 1, for caption dropout."""

    @abstractmethod
    def broken(self) -> tuple[str, ...]:
        """Return what could not be read so far and was left out: a line for each example."""

    @abstractmethod
    def close(self) -> None:
        """Stop reading ahead."""
