"""Attention that guides: away from a negative prompt, or without the image's self-attention."""

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.arguments import convert_arguments
from fluxjax.kernels.attention import Attention, as_attention
from fluxjax.numeric import check_finite, wide_dtype
from fluxjax.shapes import Array, Float, Int, ScalarLike

Heads = Float[Array, "tokens heads head_dim"]


@convert_arguments
def isolated_attention(
    q: Heads,
    k: Heads,
    v: Heads,
    txt_tokens: int,
    txt_length: Int[Array, ""] | None = None,
) -> Heads:
    """Compute joint attention in which each image token attends only to the text and to itself.

    The image's own attention map is thus the identity, as perturbed-attention guidance has it.

    **Arguments:** `q`, `k`, `v`: `txt_tokens` tokens of text, then those of the image.
    `txt_length`: how many of the text's are attended to; None for all of them.
    **Returns:** the mixed values; those of the text are of plain attention.
    **Source:** Ahn et al. 2024, PAG, with the text in the same attention, as diffusers does it for
    Stable Diffusion 3.
    """
    text, image = slice(None, txt_tokens), slice(txt_tokens, None)
    scale = q.shape[-1] ** -0.5
    wide = wide_dtype(q.dtype)

    # The token itself is one more column beside the text's, so that no image x image map is made.
    to_itself = jnp.einsum("qhd,qhd->hq", q[image], k[image], preferred_element_type=wide)
    own_column = to_itself[..., None]
    to_text = jnp.einsum("qhd,khd->hqk", q[image], k[text], preferred_element_type=wide)
    if txt_length is not None:
        to_text = jnp.where(jnp.arange(txt_tokens) < txt_length, to_text, -jnp.inf)
    logits = scale * jnp.concatenate([to_text, own_column], axis=-1)
    weights = jax.nn.softmax(logits)

    from_text = jnp.einsum("hqk,khd->qhd", weights[..., :-1], v[text].astype(wide))
    own_weight = weights[..., -1].T[..., None]
    mixed = from_text + own_weight * v[image].astype(wide)
    mixed_text = Attention()(q[text], k, v, txt_tokens, txt_length)
    return jnp.concatenate([mixed_text, mixed.astype(q.dtype)])


class Nag(eqx.Module):
    """Normalized attention guidance: guides every attention away from a negative prompt.

    The text tokens are those of the negative prompt followed by as many of the positive prompt.
    Each prompt attends with the image by itself, and the image's values are extrapolated from the
    negative result through the positive one. That takes one pass of the network a step, so it
    also guides models without classifier-free guidance, such as schnell.

    **Arguments:**

    - `scale`: strength of the extrapolation; 1 is none.
    - `tau`: upper bound of the guided value's norm, relative to the norm of the positive value.
    - `alpha`: share of the guided value in the result, 0 to 1.
    - `implementation`: of `fluxjax.attention`.
    - `head_axes`: axes of a mesh over which the heads are split, inside of a `jax.shard_map`.

    **Raises:** `ValueError` for numbers that are not finite, and, when called, for an odd number
    of text tokens.
    **Source:** Chen et al. 2025 (2505.21179), with its L1 norm.
    """

    scale: ScalarLike = 4.0
    tau: ScalarLike = 2.5
    alpha: ScalarLike = 0.25
    implementation: str | Attention | None = eqx.field(static=True, default=None)
    head_axes: tuple[str, ...] = eqx.field(static=True, default=())

    def __check_init__(self):
        check_finite("Nag", scale=self.scale, tau=self.tau, alpha=self.alpha)

    def __call__(
        self,
        q: Heads,
        k: Heads,
        v: Heads,
        txt_tokens: int,
        txt_length: Int[Array, " prompts"] | None = None,
    ) -> Heads:
        """Return the mixed values of both prompts, and the guided ones of the image.

        **Arguments:** `txt_tokens`: of both prompts together. `txt_length`: how many tokens of the
        negative and of the positive prompt are attended to; None for all of them.
        """
        half = txt_tokens // 2
        if 2 * half != txt_tokens:
            raise ValueError(
                "`Nag` needs as many tokens of the negative prompt as of the positive one, got "
                f"{txt_tokens} in all. Pad the shorter prompt."
            )
        attend = as_attention(self.implementation)
        lengths = (None, None) if txt_length is None else (txt_length[0], txt_length[1])

        def attend_with_image(text: slice, length: Int[Array, ""] | None) -> tuple[Array, Array]:
            """Return the mixed values of one prompt and of the image."""
            joint = []
            for x in (q, k, v):
                joint.append(jnp.concatenate([x[text], x[txt_tokens:]]))
            queries, keys, values = joint
            mixed = attend(queries, keys, values, half, length)
            return mixed[:half], mixed[half:]

        negative_text, negative = attend_with_image(slice(half), lengths[0])
        positive_text, positive = attend_with_image(slice(half, txt_tokens), lengths[1])
        guided = self.combine(positive, negative)
        return jnp.concatenate([negative_text, positive_text, guided])

    def combine(self, positive: Heads, negative: Heads) -> Heads:
        """Return the image's guided values.

        **Arguments:** `positive`, `negative`: the image's values by each prompt.
        **Returns:** values in the dtype of `positive`. Their norms are over all heads of a token.
        """
        dtype, wide = positive.dtype, wide_dtype(positive.dtype)
        positive = positive.astype(wide)
        negative = negative.astype(wide)
        scale = jnp.asarray(self.scale, wide)
        tau = jnp.asarray(self.tau, wide)
        alpha = jnp.asarray(self.alpha, wide)
        guided = positive + (scale - 1) * (positive - negative)
        guided_norm = _l1_norm(guided)
        positive_norm = _l1_norm(positive)
        if self.head_axes:
            # Each device has the sums over its own heads.
            norms = [guided_norm, positive_norm]
            guided_norm, positive_norm = jax.lax.psum(norms, self.head_axes)

        bound = tau * positive_norm
        exceeds = guided_norm > bound
        # A norm of 0 never exceeds its bound: 1 only avoids dividing by 0 where that is discarded.
        shrink = bound / jnp.where(guided_norm > 0, guided_norm, 1)
        guided = guided * jnp.where(exceeds, shrink, 1)
        blended = positive + alpha * (guided - positive)
        return blended.astype(dtype)


def _l1_norm(x: Heads) -> Float[Array, "tokens 1 1"]:
    """Return the L1 norm of each token, over its heads and their features."""
    return jnp.sum(jnp.abs(x), (-2, -1), keepdims=True)
