"""Attention by regions: which tokens see each other is a few bits for each token."""

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.arguments import convert_arguments
from fluxjax.kernels.attention import Attention, as_attention, choose_implementation
from fluxjax.kernels.block_sizes import resolve_block_sizes
from fluxjax.kernels.cudnn_attention import cudnn_labelled_attention
from fluxjax.kernels.xla_attention import LogitOptions, chunked_attention, xla_attention
from fluxjax.numeric import wide_dtype
from fluxjax.shapes import Array, Float, Int, ScalarLike

Heads = Float[Array, "tokens heads head_dim"]


@convert_arguments
def labelled_attention(
    q: Heads,
    k: Heads,
    v: Heads,
    labels: Int[Array, " tokens"],
    implementation: str | Attention | None = None,
) -> Heads:
    """Compute attention in which a token attends to those whose label shares a bit with its own.

    In plain JAX the mask is computed from the labels for each chunk of queries, and never stored.
    cuDNN takes a bias: tokens x tokens numbers, one for all heads (42 MB for 4608 tokens in
    bfloat16). The kernels flash_tpu and flash_gpu take no mask; where one of them is named, or is
    the default, this takes what `select_attention` returns for a bias: cudnn on NVIDIA GPUs in half
    precision, else xla or xla_chunked.

    **Arguments:** `labels`: up to 31 bits, not 0. `implementation`: as of `fluxjax.attention`.
    **Returns:** the mixed values, in the dtype of `q`.
    **Raises:** `ValueError` for an implementation that is unknown or does not support these.
    """
    configured = as_attention(implementation)
    name = configured.implementation
    if name in ("flash_tpu", "flash_gpu"):
        name = None
    chosen = choose_implementation(q, k, True, False, name)
    options = LogitOptions(q.shape[-1] ** -0.5, labels=labels)
    if chosen == "cudnn":
        return cudnn_labelled_attention(q, k, v, labels, options.scale)
    if chosen == "xla":
        return xla_attention(q, k, v, None, options)
    chunk = None
    if configured.block_sizes is not None and name is not None:
        chunk = resolve_block_sizes(configured.block_sizes).q
    return chunked_attention(q, k, v, None, options, chunk)


class RegionalAttention(eqx.Module):
    """Attention in which the parts of an image follow prompts of their own.

    The text tokens are those of the base prompt, followed by those of the regions. The base prompt
    attends with the whole image by itself. Beside that, the regions' texts and the image attend to
    each other where their labels share a bit. The image's values are those of both, mixed. All
    arrays are arguments of compiled programs: other regions of as many tokens compile nothing.

    It costs one attention by `labelled_attention` beside that of the base prompt, and the regions'
    tokens in all other layers. Where `base_ratio` is 1 the first is not computed.

    **Arguments:**

    - `txt_labels`, `img_labels`: of the regions' text tokens and of the image's tokens, a bit for
      each region that a token belongs to; not 0.
    - `base_ratio`: the share of the base prompt in the image's values, 0 to 1.
    - `implementation`: of `fluxjax.attention`.
    - `image_axes`: names of the `jax.vmap` or mesh axes of a batch whose images decide together
      whether regions are computed. Without them a batched `base_ratio` computes them always.

    **Raises:** `ValueError`, when called, for other numbers of tokens.
    **Source:** Chen et al. 2024 (2411.02395), as in InstantX's code.
    """

    txt_labels: Int[Array, " region_tokens"]
    img_labels: Int[Array, " img_tokens"]
    base_ratio: ScalarLike = 0.3
    implementation: str | Attention | None = eqx.field(static=True, default=None)
    image_axes: tuple[str, ...] = eqx.field(static=True, default=())

    def __call__(self, q: Heads, k: Heads, v: Heads, txt_tokens: int) -> Heads:
        """Return the mixed values of the base prompt, of the regions' texts and of the image.

        **Arguments:** `txt_tokens`: of all prompts together.
        """
        own, image = len(self.txt_labels), len(self.img_labels)
        base = txt_tokens - own
        if base < 0 or len(q) != txt_tokens + image:
            raise ValueError(
                f"`RegionalAttention` has labels of {own} text tokens and {image} image tokens, "
                f"got {txt_tokens} and {len(q) - txt_tokens}. Make the labels for these tokens."
            )

        def without_regions(x: Array) -> Array:
            return jnp.concatenate([x[:base], x[txt_tokens:]])

        attend = as_attention(self.implementation)
        of_base = attend(without_regions(q), without_regions(k), without_regions(v))
        base_text, base_image = of_base[:base], of_base[base:]

        def with_regions() -> tuple[Array, Array]:
            labels = jnp.concatenate([self.txt_labels, self.img_labels])
            mixed = labelled_attention(q[base:], k[base:], v[base:], labels, self.implementation)
            return mixed[:own], self._mix(base_image, mixed[own:])

        def base_only() -> tuple[Array, Array]:
            return jnp.zeros_like(q[base:txt_tokens]), base_image

        texts, mixed = jax.lax.cond(self._has_regions(), with_regions, base_only)
        return jnp.concatenate([base_text, texts, mixed])

    def _has_regions(self) -> Array:
        is_on = jnp.asarray(self.base_ratio) < 1
        if self.image_axes:
            is_on = jax.lax.pmax(is_on.astype(jnp.int32), self.image_axes) > 0
        return is_on

    def _mix(self, base: Heads, regional: Heads) -> Heads:
        """Return a share of what the whole prompt gives, and the rest of what regions give."""
        wide = wide_dtype(base.dtype)
        ratio = jnp.asarray(self.base_ratio, wide)
        mixed = ratio * base.astype(wide) + (1 - ratio) * regional.astype(wide)
        return mixed.astype(base.dtype)
