"""The layers that several networks share: linear, embedding, norms, modulation and positions."""

import math
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike

from fluxjax.nets.weight import Dense, FindMaxima, Weight
from fluxjax.numeric import wide_dtype
from fluxjax.shapes import Array, Float, Ids, Int, PRNGKeyArray

Features = Float[Array, "*batch features"]
"""Features along the last axis; each layer treats the other axes as a batch."""
Outputs = Float[Array, "*batch out"]
"""What a layer makes of `Features`, with another number of them."""
HeadFeatures = Float[Array, "tokens heads head_dim"]
Vector = Float[Array, " features"]
"""One number for each feature, the same for the whole batch."""


class Linear(eqx.Module):
    """x W^T + b over the last axis, in the dtype of x.

    `weight`: the matrix, [out, features], in any storage. `bias`: None for a layer without one.
    """

    weight: Weight
    bias: Float[Array, " out"] | None

    def __init__(
        self,
        features: int,
        out: int,
        *,
        bias: bool = True,
        scale: float = 1.0,
        key: PRNGKeyArray,
    ):
        """Draw the weight with standard deviation scale / sqrt(features); the bias is zeros."""
        deviation = scale / math.sqrt(features)
        self.weight = Dense(jax.random.normal(key, (out, features)) * deviation)
        self.bias = jnp.zeros(out) if bias else None

    def __call__(self, x: Features, maxima: FindMaxima | None = None) -> Outputs:
        """Return x W^T + b. `maxima`: as for `Weight.matmul`."""
        y = self.weight.matmul(x, maxima)
        if self.bias is not None:
            # Added before the rounding to x.dtype: the product may be wider.
            y = y + self.bias.astype(y.dtype)
        return y.astype(x.dtype)


def check_ids(
    call: str,
    ids: Array,
    vocabulary: int,
) -> None:
    """Check token ids; of traced ones, only that there are some.

    **Arguments:** `call`: the name of the network that got them, for the message. `vocabulary`:
    the number of ids that it knows.
    **Raises:** `ValueError` for no ids, or an id outside of the vocabulary.
    """
    if len(ids) == 0:
        raise ValueError(f"`{call}(ids)` needs at least one token. Make the ids with `tokenize`.")
    if isinstance(ids, jax.core.Tracer):
        # Their values are not known yet; `Embedding` gives NaN for those outside.
        return
    values = np.asarray(ids)
    outside = values[(values < 0) | (values >= vocabulary)]
    if outside.size:
        raise ValueError(
            f"`{call}(ids)` takes ids of its vocabulary, 0 to {vocabulary - 1}, got {outside[0]}. "
            "Make them with the model's own tokenizers."
        )


class Embedding(eqx.Module):
    """A table of vectors, looked up by id; an id outside of the table gives NaN."""

    weight: Float[Array, "entries width"]

    def __init__(
        self,
        entries: int,
        width: int,
        *,
        key: PRNGKeyArray,
    ):
        """Draw the table from a standard normal distribution."""
        self.weight = jax.random.normal(key, (entries, width))

    def __call__(
        self,
        ids: Int[Array, "*ids"],
        dtype: DTypeLike | None = None,
    ) -> Float[Array, "*ids width"]:
        """Return the vectors of ids.

        **Arguments:** `dtype`: of the result, by default that of the table.
        """
        # `jnp.take` counts negative ids from the end: move them past it, where it gives NaN.
        ids = jnp.where(ids < 0, len(self.weight), ids)
        vectors = jnp.take(self.weight, ids, axis=0, mode="fill")
        return vectors.astype(self.weight.dtype if dtype is None else dtype)


class RmsNorm(eqx.Module):
    """x / rms(x) * scale over the last axis, computed in float32 at least.

    `eps`: added to the mean square.
    **Source:** Zhang & Sennrich 2019, eq. 4.
    """

    scale: Vector
    eps: float = eqx.field(static=True)

    def __init__(self, features: int, *, eps: float = 1e-6):
        """Start with a scale of ones."""
        self.scale = jnp.ones(features)
        self.eps = eps

    def __call__(
        self,
        x: Features,
        dtype: DTypeLike | None = None,
    ) -> Features:
        """Normalize.

        **Arguments:** `dtype`: of the result, by default that of `x`. T5 has a residual stream that
        is wider than its activations.
        """
        wide = x.astype(wide_dtype(x.dtype))
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        y = wide * jax.lax.rsqrt(mean_square + self.eps) * self.scale.astype(wide.dtype)
        return y.astype(x.dtype if dtype is None else dtype)


class LayerNorm(eqx.Module):
    """Standardize the last axis, then scale and shift it, computed in float32 at least.

    `eps`: added to the variance.
    **Source:** Ba et al. 2016, eq. 4.
    """

    scale: Vector
    bias: Vector
    eps: float = eqx.field(static=True)

    def __init__(self, features: int, *, eps: float):
        """Start with a scale of ones and a bias of zeros."""
        self.scale = jnp.ones(features)
        self.bias = jnp.zeros(features)
        self.eps = eps

    def __call__(self, x: Features) -> Features:
        y = standardize(x, self.eps)
        y = y * self.scale.astype(y.dtype) + self.bias.astype(y.dtype)
        return y.astype(x.dtype)


def standardize(x: Features, eps: float = 1e-6) -> Features:
    """Return x with mean 0 and variance 1 over the last axis: a LayerNorm without scale and bias.

    **Arguments:** `eps`: added to the variance.
    **Returns:** float32 at least.
    """
    wide = x.astype(wide_dtype(x.dtype))
    # Two passes: the mean of squares minus the square of the mean would cancel.
    centered = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
    return centered * jax.lax.rsqrt(variance + eps)


def modulate(
    x: Float[Array, "tokens features"],
    shift: Vector,
    scale: Vector,
) -> Array:
    """Return standardize(x) * (1 + scale) + shift in the dtype of x.

    **Arguments:** `shift`, `scale`: the same for all tokens.
    **Returns:** [tokens, features].
    **Source:** Peebles & Xie 2022, adaLN.
    """
    y = standardize(x)
    # 1 + scale: with a modulation of zeros it is the norm alone.
    y = y * (1 + scale.astype(y.dtype)) + shift.astype(y.dtype)
    return y.astype(x.dtype)


def sinusoid(
    t: Float[Array, "*batch"],
    width: int,
    *,
    base: float = 10_000.0,
) -> Float[Array, "*batch width"]:
    """Embed scalars as cosines, then sines, of geometric frequencies.

    **Arguments:** `t`: scalars; FLUX passes 1000 times its time. `width`: features; half of them
    are the number of frequencies. `base`: the ratio of the highest to the lowest, nearly.
    **Returns:** float32 at least.
    **Source:** Vaswani et al. 2017, section 3.5, with the cosines first, as in FLUX.
    """
    wide = t.astype(wide_dtype(t.dtype))
    half = width // 2
    frequencies = jnp.exp(-math.log(base) * jnp.arange(half, dtype=wide.dtype) / half)
    angles = wide[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def split_heads(x: Float[Array, "tokens columns"], head_dim: int) -> HeadFeatures:
    """Return the features of each head, which are adjacent columns of x."""
    return rearrange(x, "tokens (heads dim) -> tokens heads dim", dim=head_dim)


def join_heads(x: HeadFeatures) -> Float[Array, "tokens columns"]:
    """Return the features of all heads as columns, in the order of the heads."""
    return rearrange(x, "tokens heads dim -> tokens (heads dim)")


class Rotation(NamedTuple):
    """RoPE's rotation of each token: the cosine and sine of the angle of each feature pair."""

    cos: Float[Array, "tokens pairs"]
    sin: Float[Array, "tokens pairs"]


def rope(
    ids: Ids,
    axes: tuple[int, ...],
    theta: float,
) -> Rotation:
    """Return the rotation of tokens by their positions, in float32 at least.

    **Arguments:** `ids`: a position on each axis. `axes`: how many features of a head each axis
    rotates; `axes[i]` belongs to column i of `ids`. `theta`: the base of the frequencies.
    **Source:** Su et al. 2021, eq. 34, applied to each axis.
    """
    columns = ids.astype(wide_dtype(ids.dtype))
    frequencies = [theta ** (-jnp.arange(0, dim, 2, dtype=columns.dtype) / dim) for dim in axes]
    angles = []
    for axis, frequency in enumerate(frequencies):
        angles.append(columns[:, axis, None] * frequency)
    joined = jnp.concatenate(angles, axis=-1)
    return Rotation(jnp.cos(joined), jnp.sin(joined))


def rotate(
    x: HeadFeatures,
    rotation: Rotation,
) -> HeadFeatures:
    """Rotate each pair of adjacent features by its token's angle (RoPE).

    **Returns:** the dtype of `x`; computed in float32 at least.
    """
    wide = wide_dtype(x.dtype)
    # Adjacent pairs, as in BFL's code; many others pair the first half of a head with the second.
    even, odd = x[..., 0::2].astype(wide), x[..., 1::2].astype(wide)
    # All heads of a token are rotated by the same angles.
    cos, sin = rotation.cos[:, None].astype(wide), rotation.sin[:, None].astype(wide)
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)


def rotate_by_matrices(
    x: HeadFeatures,
    rotation: Rotation,
) -> HeadFeatures:
    """Rotate as `rotate` does, each pair times its token's matrix of 2x2.

    On GPUs XLA computes this in one kernel with the norm before it. It does not for `rotate`, which
    slices and stacks.
    """
    wide = wide_dtype(x.dtype)
    cos = rotation.cos[:, None, :, None, None].astype(wide)
    sin = rotation.sin[:, None, :, None, None].astype(wide)
    row, column = jnp.arange(2)[:, None], jnp.arange(2)
    matrices = jnp.where(row == column, cos, jnp.where(row < column, -sin, sin))
    pairs = rearrange(x.astype(wide), "tokens heads (pairs two) -> tokens heads pairs 1 two", two=2)
    return jnp.sum(pairs * matrices, axis=-1).reshape(x.shape).astype(x.dtype)
