"""Prompts of an image's parts as fields of a conditioning: attended to by regions, or mixed."""

import equinox as eqx
import jax.numpy as jnp

from fluxjax.kernels.attention import Attention
from fluxjax.kernels.regional_attention import RegionalAttention
from fluxjax.shapes import Array, Float, Int, Scalar, ScalarLike

_TOLERANCE = 1e-6
"""How far a time may be from a node and still be taken for it."""
_ALL_BITS = -1


class RegionLabels(eqx.Module):
    """Which tokens belong to which regions, and when they count.

    `txt_labels`, `img_labels`: bits, as `RegionalAttention` takes them. `base_ratio`: the share of
    the base prompt. `low`: regions count at times above it; at others only the base prompt does.
    """

    txt_labels: Int[Array, "... region_tokens"]
    img_labels: Int[Array, "... img_tokens"]
    base_ratio: ScalarLike
    low: ScalarLike

    def attention(
        self,
        t: Scalar,
        choice: str | Attention | None,
        image_axes: tuple[str, ...] = (),
    ) -> RegionalAttention:
        """Return the attention at time t.

        **Arguments:** `choice`: an implementation, by name or as an `Attention`.
        `image_axes`: as for `RegionalAttention`.
        """
        is_on = t > jnp.asarray(self.low) + _TOLERANCE
        ratio = jnp.where(is_on, jnp.asarray(self.base_ratio, jnp.float32), 1)
        return RegionalAttention(self.txt_labels, self.img_labels, ratio, choice, image_axes)

    def with_references(self, tokens: int) -> "RegionLabels":
        """Return the labels with those of further image tokens, which belong to all regions."""
        labels = jnp.pad(self.img_labels, (0, tokens), constant_values=_ALL_BITS)
        return RegionLabels(self.txt_labels, labels, self.base_ratio, self.low)


class RegionPrompts(eqx.Module):
    """Prompts that parts of an image attend to, beside the prompt of the conditioning.

    `region_txt`: the hidden states of all of them, one after the other. `labels`: of these tokens
    and of the image's.
    """

    region_txt: Float[Array, "... region_tokens context"]
    labels: RegionLabels


class MixedPrompts(eqx.Module):
    """Prompts whose velocities are mixed with that of the conditioning's own prompt.

    `texts`, `pooled`: the states of each. `weights`: of the conditioning's own prompt, then of each
    of these, at each feature of each image token, as `fluxjax.flow.Mixed` takes them.
    """

    texts: Float[Array, "... regions txt_tokens context"]
    pooled: Float[Array, "... regions pooled"]
    weights: Float[Array, "... prompts img_tokens features"]
