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
    """The token ids of a batch of prompts, for CLIP and for T5.

    `clip`: None for models without it. `t5_length`: how many of each prompt's ids T5 attends to.
    `txt_length`: how many of the states of these the transformer attends to. None for all of them.
    """

    clip: Int[Array, "prompts clip_tokens"] | None
    t5: Int[Array, "prompts txt_tokens"]
    t5_length: Int[Array, " prompts"] | None = None
    txt_length: Int[Array, " prompts"] | None = None


class TextStates(NamedTuple):
    """A batch of encoded prompts: T5's hidden states and CLIP's pooled states.

    `vec`: None for models without CLIP. `txt_length`: as of `PromptIds`.
    """

    txt: Float[Array, "prompts txt_tokens context"]
    vec: Float[Array, "prompts pooled"] | None
    txt_length: Int[Array, " prompts"] | None = None

    def rows(self, numbers: Sequence[int]) -> "TextStates":
        """Return the prompts of these numbers."""
        if list(numbers) == list(range(len(self.txt))):
            return self
        return _take_rows(self, np.asarray(numbers))


@jax.jit
def _take_rows(states: TextStates, numbers: Int[Array, " rows"]) -> TextStates:
    return jax.tree.map(lambda rows: rows[numbers], states)


def prompt_ids(
    tokenizers: Tokenizers,
    prompts: Sequence[str],
    prompts_2: Sequence[str] | None = None,
    *,
    max_length: int,
    visible_padding: int | None = None,
) -> PromptIds:
    """Tokenize a batch of prompts.

    **Arguments:** `prompts_2`: texts that T5 reads in place of `prompts`, one for each of them.
    `max_length`: T5 tokens for each prompt. `visible_padding`: as of the model's `Defaults`.
    **Raises:** `ValueError` if there are not as many of both.
    """
    t5_prompts: Sequence[str | None] = [None] * len(prompts) if prompts_2 is None else prompts_2
    if len(t5_prompts) != len(prompts):
        raise ValueError(
            f"`prompt_ids` got {len(prompts)} prompts and {len(t5_prompts)} second prompts. "
            "Pass one second prompt for each prompt."
        )
    rows = []
    for prompt, prompt_2 in zip(prompts, t5_prompts, strict=True):
        rows.append(tokenize(tokenizers, prompt, prompt_2, max_length=max_length))
    clip_rows = [row.clip for row in rows if row.clip is not None]
    clip = np.stack(clip_rows) if clip_rows else None
    lengths = visible = None
    if visible_padding is not None:
        lengths = np.array([row.t5_length for row in rows], np.int32)
        visible = np.minimum(lengths + visible_padding, max_length).astype(np.int32)
    t5 = np.stack([row.t5 for row in rows])
    return PromptIds(*jax.device_put((clip, t5, lengths, visible)))


@eqx.filter_jit
def encode_text(
    clip: Clip | None, t5: T5, ids: PromptIds, *, dtype: DTypeLike, mesh: Mesh | None = None
) -> TextStates:
    """Encode a batch of prompts.

    **Arguments:** `clip`: None for models without it. `ids`: from `prompt_ids`. `dtype`: of the
    activations. `mesh`: of devices; the encoders are then from `shard`.
    **Returns:** T5's hidden states [prompts, txt_tokens, context], CLIP's pooled [prompts, pooled].
    """

    def encode_rows(networks: tuple[Clip | None, T5], ids: PromptIds, shared: None) -> TextStates:
        clip, t5 = networks
        vec = None
        if clip is not None:
            vec = jax.vmap(lambda row: clip(row, dtype=dtype))(ids.clip)

        def encode_one(ids: PromptIds) -> Float[Array, "txt_tokens context"]:
            return t5(ids.t5, length=ids.t5_length, dtype=dtype)

        return TextStates(jax.vmap(encode_one)(ids), vec, ids.txt_length)

    if mesh is None:
        return encode_rows((clip, t5), ids, None)
    # A prompt is encoded once, so that devices which get only padding rows lose little.
    return on_mesh(encode_rows, mesh, (clip, t5), ids, fill=True)
