"""The stages of `fluxjax generate` that encode texts: the prompts, and the texts of conditions."""

import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from tqdm import tqdm

from fluxjax.cli.loaded_networks import LoadedEncoders
from fluxjax.cli.progress import Clock
from fluxjax.cli.prompts import Line
from fluxjax.cli.request import Request
from fluxjax.generate.text import TextStates, encode_text, prompt_ids
from fluxjax.generate.tokens import Tokenizers, token_counts


class EncodedPrompts(NamedTuple):
    """A batch of encoded prompts, and of what is guided away from, if anything is."""

    positive: TextStates
    negative: TextStates | None

    @staticmethod
    def joined(parts: Sequence["EncodedPrompts"]) -> "EncodedPrompts":
        """Return the prompts of several batches as one."""
        if len(parts) == 1:
            return parts[0]
        return jax.tree.map(lambda *rows: jnp.concatenate(rows), *parts)

    def rows(self, numbers: Sequence[int]) -> "EncodedPrompts":
        """Return a batch of some of the prompts, in the order of their numbers."""
        negative = None if self.negative is None else self.negative.rows(numbers)
        return EncodedPrompts(self.positive.rows(numbers), negative)


class TextStages(NamedTuple):
    """Encodes texts as a request says; the clock times each stage."""

    clock: Clock
    request: Request

    def encode(self, encoders: LoadedEncoders, lines: Sequence[Line]) -> EncodedPrompts:
        """Encode prompts as a batch, and what they are guided away from, if anything."""
        encoders = encoders.on_device()
        prompts, t5_prompts = [], []
        for line in lines:
            prompts.append(line.prompt)
            t5_prompts.append(line.prompt if line.prompt_2 is None else line.prompt_2)
        positive = self._encode_texts(encoders, prompts, t5_prompts)
        if not self.request.is_guided:
            return EncodedPrompts(positive, None)
        negatives = [self.request.negative_of(line) for line in lines]
        return EncodedPrompts(positive, self._encode_texts(encoders, negatives, negatives))

    def encode_conditions(
        self, encoders: LoadedEncoders, is_writer: bool = True
    ) -> dict[str, TextStates]:
        """Encode the texts of what images are conditioned on.

        **Arguments:** `is_writer`: whether this process prints which of them are cut.
        **Returns:** a batch of one for each different text.
        """
        texts: dict[str, None] = {}
        for condition in self.request.conditions:
            texts |= dict.fromkeys(condition.texts)
        if not texts:
            return {}
        prompts = list(texts)
        if is_writer:
            lines = [Line(prompt, None, None, "", 0) for prompt in prompts]
            self.print_cut(encoders.tokenizers, lines)
        states = self._encode_texts(encoders.on_device(), prompts, prompts)
        return {prompt: states.rows([row]) for row, prompt in enumerate(prompts)}

    def _encode_texts(
        self, encoders: LoadedEncoders, prompts: list[str], t5_prompts: list[str]
    ) -> TextStates:
        """Encode texts by encoders on the device."""
        request = self.request
        ids = prompt_ids(
            encoders.tokenizers,
            prompts,
            t5_prompts,
            max_length=request.max_length,
            visible_padding=request.defaults.visible_padding,
        )
        return self.clock.run(
            "encode",
            encode_text,
            encoders.clip,
            encoders.t5,
            ids,
            dtype=request.dtype,
            mesh=request.load.mesh,
        )

    def print_cut(self, tokenizers: Tokenizers, lines: Sequence[Line]) -> None:
        """Print which prompts are longer than the encoders read."""
        for line in lines:
            prefix = f"line {line.number}: " if line.number else ""
            for note in cut_notes(tokenizers, line, self.request.max_length):
                tqdm.write(f"fluxjax: {prefix}{note}", file=sys.stderr)


def cut_notes(tokenizers: Tokenizers, line: Line, max_length: int) -> list[str]:
    """Return a note on each text of a line that is longer than CLIP or T5 reads.

    **Arguments:** `max_length`: the tokens that T5 reads.
    """
    notes = []
    for name, text in line.texts().items():
        clip, t5 = token_counts(tokenizers, text)
        # With a second prompt, CLIP reads only the first, and T5 only the second.
        clip_reads = name != "prompt_2"
        t5_reads = name != "prompt" or line.prompt_2 is None
        parts = []
        if clip_reads and clip > tokenizers.clip_length:
            parts.append(f"CLIP reads {tokenizers.clip_length} of {clip} tokens")
        if t5_reads and t5 > max_length:
            parts.append(f"T5 reads {max_length} of {t5}")
        if parts:
            notes.append(f"the {name} is cut: {', '.join(parts)}")
    return notes
