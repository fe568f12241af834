"""The attention that the blocks of a FLUX transformer call, and blocks that are degraded."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
from jaxtyping import PyTree

from fluxjax.kernels.attention import Attention, resolve_implementation
from fluxjax.nets.degraded import DegradedBlocks
from fluxjax.nets.flux_blocks import Attended, BlockAttention
from fluxjax.nets.flux_state import HiddenState, TxtLength
from fluxjax.nets.heads import (
    JointAttention,
    PreparedRotation,
    Projection,
    prepare_rotation,
    query_key_value,
)
from fluxjax.nets.image_prompt import BlockPrompt
from fluxjax.nets.layers import join_heads
from fluxjax.shapes import Array, Bool

AttentionChoice = str | Attention | JointAttention | None
"""The name of an implementation, an `Attention`, a custom function, or None for the default."""


def block_runner(
    hidden: HiddenState,
    attention: AttentionChoice,
    degraded: DegradedBlocks | None,
) -> Callable[..., PyTree]:
    """Return the function that a scan over blocks calls: of a block and its tokens to tokens.

    It is (block, tokens, modulation, image_prompts), or (block, tokens, modulation, image_prompts,
    flag) where blocks are degraded. It serves double and single blocks, whose tokens are a pair and
    one sequence.
    """
    normal_attention = block_attention(attention, hidden)
    degraded_attention: BlockAttention | None = None
    if degraded is not None and degraded.attention is not None:
        degraded_attention = block_attention(degraded.attention, hidden)

    def run(
        block: PyTree,
        tokens: PyTree,
        modulation: PyTree,
        prompts: tuple[BlockPrompt, ...] = (),
        *flag: Bool[Array, ""],
    ) -> PyTree:
        def run_normal() -> PyTree:
            return block(tokens, modulation, normal_attention, prompts)

        def run_degraded() -> PyTree:
            if degraded_attention is None:
                return tokens
            return block(tokens, modulation, degraded_attention, prompts)

        if not flag:
            return run_normal()

        # One program for all blocks of the scan: which are degraded is an array.
        return jax.lax.cond(flag[0], run_degraded, run_normal)

    return run


def block_attention(
    attention: AttentionChoice,
    hidden: HiddenState,
) -> BlockAttention:
    """Return the joint attention of these tokens: q and k normalized and rotated, heads joined."""
    rotation = prepare_rotation(hidden.rotation)
    text = _Text(len(hidden.txt), hidden.txt_length)
    if text.length is not None:
        _check_takes_length(attention)
    return partial(_attend, attention, rotation, text)


class _Text(NamedTuple):
    """The text's tokens, which come first: their number, and how many are attended to."""

    tokens: int
    length: TxtLength | None


def _check_takes_length(attention: AttentionChoice) -> None:
    """**Raises:** `ValueError` for a custom function that can't leave out padding of the text."""
    if not callable(attention):
        return
    try:
        inspect.signature(attention).bind(*["q", "k", "v", "txt_tokens", "txt_length"])
    except TypeError as error:
        raise ValueError(
            "This model's text has padding that is not attended to, and the custom attention takes "
            "no number of text tokens. Give it a fifth argument: (q, k, v, txt_tokens, txt_length)."
        ) from error


def _attend(
    attention: AttentionChoice,
    rotation: PreparedRotation,
    text: _Text,
    width: int,
    *projections: Projection,
) -> Attended:
    """Attend over the tokens of all projections; see `BlockAttention`."""
    tokens = sum(len(projection.projected) for projection in projections)
    head_dim = len(projections[0].query_norm.scale)
    dtype = projections[0].projected.dtype
    shape = jax.ShapeDtypeStruct((tokens, width // head_dim, head_dim), dtype)
    # The fused kernel for q, k and v runs where flash_tpu does. Where XLA partitions the program
    # among devices itself, neither can.
    fused = resolve_implementation(attention, shape, shape) == "flash_tpu"
    q, k, v = query_key_value(projections, rotation, width, fused=fused)
    run = attention if callable(attention) else Attention(attention)
    if text.length is None:
        return join_heads(run(q, k, v, text.tokens))
    return join_heads(run(q, k, v, text.tokens, text.length))
