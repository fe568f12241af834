"""Prompts to the hidden states that the transformer is conditioned on."""

from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from fluxjax.devices.run import on_mesh
from fluxjax.generate.tokens import Tokenizers, tokenize
from fluxjax.nets.clip import Clip
from fluxjax.nets.t5 import T5
from fluxjax.shapes import Array, Float, Int


class PromptIds(NamedTuple):
    """The token ids of a batch of prompts, for CLIP and for T5."""

    clip: Int[Array, "prompts clip_tokens"]
    t5: Int[Array, "prompts txt_tokens"]


class TextStates(NamedTuple):
    """A batch of encoded prompts: T5's hidden states and CLIP's pooled states."""

    txt: Float[Array, "prompts txt_tokens context"]
    vec: Float[Array, "prompts pooled"]

    def rows(self, numbers: Sequence[int]) -> "TextStates":
        """Return the prompts of these numbers."""
        if list(numbers) == list(range(len(self.txt))):
            return self
        return _take_rows(self, np.asarray(numbers))


@jax.jit
def _take_rows(states: TextStates, numbers: Int[Array, " rows"]) -> TextStates:
    return TextStates(states.txt[numbers], states.vec[numbers])


def prompt_ids(
    tokenizers: Tokenizers,
    prompts: Sequence[str],
    prompts_2: Sequence[str] | None = None,
    *,
    max_length: int,
) -> PromptIds:
    """Tokenize a batch of prompts.

    **Arguments:** `prompts_2`: texts that T5 reads in place of `prompts`, one for each of them.
    `max_length`: T5 tokens for each prompt.
    **Raises:** `ValueError` if there are not as many of both.
    """
    t5_prompts: Sequence[str | None] = [None] * len(prompts) if prompts_2 is None else prompts_2
    if len(t5_prompts) != len(prompts):
        raise ValueError(
            f"`prompt_ids` got {len(prompts)} prompts and {len(t5_prompts)} second prompts. "
            "Pass one second prompt for each prompt."
        )
    clip_rows, t5_rows = [], []
    for prompt, prompt_2 in zip(prompts, t5_prompts, strict=True):
        ids = tokenize(tokenizers, prompt, prompt_2, max_length=max_length)
        clip_rows.append(ids.clip)
        t5_rows.append(ids.t5)
    return PromptIds(*jax.device_put((np.stack(clip_rows), np.stack(t5_rows))))


@eqx.filter_jit
def encode_text(
    clip: Clip, t5: T5, ids: PromptIds, *, dtype: DTypeLike, mesh: Mesh | None = None
) -> TextStates:
    """Encode a batch of prompts.

    **Arguments:** `ids`: from `prompt_ids`. `dtype`: of the activations. `mesh`: of devices; the
    encoders are then from `shard`.
    **Returns:** T5's hidden states [prompts, txt_tokens, context], CLIP's pooled [prompts, pooled].
    """

    def encode_rows(networks: tuple[Clip, T5], ids: PromptIds, shared: None) -> TextStates:
        clip, t5 = networks
        vec = jax.vmap(lambda row: clip(row, dtype=dtype))(ids.clip)
        txt = jax.vmap(lambda row: t5(row, dtype=dtype))(ids.t5)
        return TextStates(txt, vec)

    if mesh is None:
        return encode_rows((clip, t5), ids, None)
    # A prompt is encoded once, so that devices which get only padding rows lose little.
    return on_mesh(encode_rows, mesh, (clip, t5), ids, fill=True)
