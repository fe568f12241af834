"""Attention that guides: the image's values led away from a second text's, or confined to themselves."""

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.arguments import convert_arguments
from fluxjax.kernels.attention import Attention, as_attention, attention
from fluxjax.numeric import check_finite, wide_dtype
from fluxjax.shapes import Array, Float, ScalarLike

Heads = Float[Array, "tokens heads head_dim"]


@convert_arguments
def isolated_attention(q: Heads, k: Heads, v: Heads, txt_tokens: int) -> Heads:
    """Joint attention in which an image token sees the text and, of the image, itself alone: the image's own attention map is
    the identity.

    **Arguments:** `q`, `k`, `v`: of `txt_tokens` of text, then of the image.
    **Source:** Ahn et al. 2024, PAG, with text in the same attention, as diffusers has it for Stable Diffusion 3.
    """
    text, image = slice(None, txt_tokens), slice(txt_tokens, None)
    scale = q.shape[-1] ** -0.5
    # A column for the token itself, so that no image x image map is made.
    wide = wide_dtype(q.dtype)
    own = jnp.einsum("qhd,qhd->hq", q[image], k[image], preferred_element_type=wide)[..., None]
    others = jnp.einsum("qhd,khd->hqk", q[image], k[text], preferred_element_type=wide)
    weights = jax.nn.softmax(scale * jnp.concatenate([others, own], axis=-1))
    mixed = jnp.einsum("hqk,khd->qhd", weights[..., :-1], v[text].astype(wide))
    mixed = mixed + weights[..., -1].T[..., None] * v[image].astype(wide)
    return jnp.concatenate([attention(q[text], k, v), mixed.astype(q.dtype)])


class Nag(eqx.Module):
    """Normalized attention guidance: in every attention, the image's values are guided away from those of the negative prompt.

    The text's tokens are those of the negative prompt and then, as many, of the positive one; each attends by itself.
    One pass of the network a step, so that it also guides models without classifier-free guidance, as schnell.

    `scale`: 1 is none. `tau`: how many times its norm the guided value may have. `alpha`: how much of it is taken.
    `implementation`: of `fluxjax.attention`. `over`: axes of a mesh that the heads are split over.
    **Raises:** `ValueError` for numbers that are not finite.
    **Source:** Chen et al. 2025 (2505.21179), with its L1 norm.
    """

    scale: ScalarLike = 4.0
    tau: ScalarLike = 2.5
    alpha: ScalarLike = 0.25
    implementation: str | Attention | None = eqx.field(static=True, default=None)
    over: tuple[str, ...] = eqx.field(static=True, default=())

    def __check_init__(self):
        check_finite("Nag", scale=self.scale, tau=self.tau, alpha=self.alpha)

    def __call__(self, q: Heads, k: Heads, v: Heads, txt_tokens: int) -> Heads:
        half = txt_tokens // 2
        if 2 * half != txt_tokens:
            raise ValueError(
                f"`Nag` needs as many tokens of the negative text as of the positive, got {txt_tokens} in all."
            )

        def mix(text: slice) -> tuple[Array, Array]:
            queries, keys, values = (jnp.concatenate([x[text], x[txt_tokens:]]) for x in (q, k, v))
            mixed = as_attention(self.implementation)(queries, keys, values)
            return mixed[:half], mixed[half:]

        away, negative = mix(slice(half))
        text, positive = mix(slice(half, txt_tokens))
        return jnp.concatenate([away, text, self.combine(positive, negative)])

    def combine(self, positive: Heads, negative: Heads) -> Heads:
        """Return the guided values; norms are over all heads of a token."""
        wide = wide_dtype(positive.dtype)
        near, far = positive.astype(wide), negative.astype(wide)
        scale, tau, alpha = (
            jnp.asarray(number, wide) for number in (self.scale, self.tau, self.alpha)
        )
        guided = near + (scale - 1) * (near - far)
        sizes = [jnp.sum(jnp.abs(x), (-2, -1), keepdims=True) for x in (guided, near)]
        size, plain = jax.lax.psum(sizes, self.over) if self.over else sizes
        bound = tau * plain
        guided = guided * jnp.where(size > bound, bound / jnp.where(size > 0, size, 1), 1)
        return (near + alpha * (guided - near)).astype(positive.dtype)
