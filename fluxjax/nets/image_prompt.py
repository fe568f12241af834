"""Keys and values of image prompts, to which the blocks of a FLUX transformer attend as well."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.kernels.attention import attention
from fluxjax.nets.flux_config import BlockConfig
from fluxjax.nets.heads import Projection, normalized_queries
from fluxjax.nets.layers import join_heads
from fluxjax.numeric import wide_dtype
from fluxjax.shapes import Array, Float

TokenColumns = Float[Array, "tokens columns"]
"""Features of all heads on this device, for each token."""


class KeyValue(NamedTuple):
    """Keys and values of an image prompt, in one block or stacked for all."""

    k: Float[Array, "*depth prompt_tokens heads head_dim"]
    v: Float[Array, "*depth prompt_tokens heads head_dim"]


class ImagePrompt(eqx.Module):
    """What an IP-Adapter makes of an image: keys and values for each block of a transformer.

    The queries are those of the block's own attention, normalized and not rotated. In double blocks
    those of the image's tokens attend to the prompt, in single blocks those of all tokens.

    `double`, `single`: of the double and of the single blocks, stacked; `single` is None for an
    adapter of double blocks only. `scales`: factors of what the attention gives, one for each of
    these blocks. `token_weights`: further factors, one for each image token; None is 1 for all.
    `joins_attention`: whether the result is added to the attention's output, before its projection
    (InstantX); otherwise it is added to the image's tokens after the block (XLabs). `head_axis`:
    the axis of a mesh over which the heads are split, inside of a `jax.shard_map`.
    """

    double: KeyValue
    single: KeyValue | None
    scales: Float[Array, "... blocks"]
    token_weights: Float[Array, "... img_tokens"] | None = None
    joins_attention: bool = eqx.field(static=True, default=False)
    head_axis: str | None = eqx.field(static=True, default=None)

    @property
    def double_depth(self) -> int:
        """The number of double blocks."""
        return self.double.k.shape[-4]

    def in_double(self) -> "BlockPrompt":
        """Return the prompt in all double blocks, for a loop over them."""
        scales = self.scales[: self.double_depth]
        return self._in_blocks(self.double, scales, self.token_weights)

    def in_single(self, txt_tokens: int) -> "tuple[BlockPrompt, ...]":
        """Return the prompt in all single blocks, in which the text's tokens come first.

        **Returns:** nothing for an adapter of double blocks only.
        """
        if self.single is None:
            return ()
        weights = self.token_weights
        if weights is not None:
            weights = jnp.pad(weights, (txt_tokens, 0), constant_values=1)
        scales = self.scales[self.double_depth :]
        return (self._in_blocks(self.single, scales, weights),)

    def _in_blocks(
        self,
        blocks: KeyValue,
        scales: Float[Array, " depth"],
        weights: Float[Array, " tokens"] | None,
    ) -> "BlockPrompt":
        """Return the prompt for some blocks. **Arguments:** `blocks`: keys and values, stacked."""
        if weights is not None:
            weights = jnp.broadcast_to(weights, (len(scales), *weights.shape))
        return BlockPrompt(blocks, scales, weights, self.joins_attention, self.head_axis)


class BlockPrompt(eqx.Module):
    """An image prompt in one block, or stacked for a loop over blocks.

    `block`: its keys and values. `scale`: of the block. The others as in `ImagePrompt`.
    """

    block: KeyValue
    scale: Float[Array, "*depth"]
    token_weights: Float[Array, "*depth tokens"] | None
    joins_attention: bool = eqx.field(static=True)
    head_axis: str | None = eqx.field(static=True)

    def __call__(self, projection: Projection, width: int) -> TokenColumns:
        """Return what is added for the tokens of a projection.

        **Arguments:** `projection`: of the tokens that attend. `width`: columns of each of q, k and
        v of the projection.
        """
        q = normalized_queries(projection, width)
        k, v = (self._own_heads(x).astype(q.dtype) for x in self.block)
        mixed = join_heads(attention(q, k, v))
        if self.head_axis is not None and not self.joins_attention:
            # The tokens' features are of all heads; the attention's are of this device's.
            mixed = jax.lax.all_gather(mixed, self.head_axis, axis=1, tiled=True)
        factor = self.scale.astype(wide_dtype(mixed.dtype))
        if self.token_weights is not None:
            factor = factor * self.token_weights.astype(factor.dtype)[:, None]
        return (mixed.astype(factor.dtype) * factor).astype(mixed.dtype)

    def _own_heads(
        self, x: Float[Array, "prompt_tokens heads head_dim"]
    ) -> Float[Array, "prompt_tokens device_heads head_dim"]:
        """Return the heads that this device has of the transformer."""
        if self.head_axis is None:
            return x
        heads = x.shape[1] // jax.lax.axis_size(self.head_axis)
        first = jax.lax.axis_index(self.head_axis) * heads
        return jax.lax.dynamic_slice_in_dim(x, first, heads, axis=1)


def add_to_attention(
    attended: TokenColumns,
    projection: Projection,
    width: int,
    prompts: Sequence[BlockPrompt],
) -> TokenColumns:
    """Return the attention's output with that of prompts which join it.

    **Arguments:** `projection`, `width`: as for a call of `BlockPrompt`, of the same tokens.
    """
    for prompt in prompts:
        if prompt.joins_attention:
            attended = attended + prompt(projection, width)
    return attended


def add_after_block(
    img: Float[Array, "img_tokens width"],
    projection: Projection,
    width: int,
    prompts: Sequence[BlockPrompt],
) -> Float[Array, "img_tokens width"]:
    """Return the image's tokens after a block with what prompts add that do not join its attention.

    **Arguments:** `projection`, `width`: as for a call of `BlockPrompt`, of the image's tokens.
    """
    for prompt in prompts:
        if not prompt.joins_attention:
            img = img + prompt(projection, width)
    return img


def check_image_prompts(config: BlockConfig, prompts: Sequence[ImagePrompt]) -> None:
    """**Raises:** `ValueError` for prompts of another transformer's blocks or heads."""
    heads = (config.heads, config.head_dim)
    for prompt in prompts:
        expected = {"double": (config.double_depth, prompt.double)}
        if prompt.single is not None:
            expected["single"] = (config.single_depth, prompt.single)
        for kind, (depth, found) in expected.items():
            blocks, _, *sizes = found.k.shape
            if (blocks, *sizes) != (depth, *heads):
                raise ValueError(
                    f"`Flux(image_prompts)` got keys of {blocks} {kind} blocks with "
                    f"{sizes[0]} heads of {sizes[1]}, and it has {depth} with {heads[0]} of "
                    f"{heads[1]}. Use an IP-Adapter for this transformer."
                )


def for_image_tokens(prompt: ImagePrompt, img_tokens: int, others: int) -> ImagePrompt:
    """Return a prompt that does nothing for further tokens which follow the image's own.

    **Arguments:** `img_tokens`: of the image. `others`: of references. None of them: the prompt
    stays as it is.
    """
    if others == 0:
        return prompt
    weights = prompt.token_weights
    if weights is None:
        weights = jnp.ones(img_tokens)
    return replace(prompt, token_weights=jnp.pad(weights, (0, others)))
