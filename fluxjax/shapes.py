"""The array shapes that the public functions share, each with its meaning, and the checker of all annotations."""

from beartype import BeartypeConf, beartype
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Scalar, ScalarLike

CHECKS = BeartypeConf(is_pep484_tower=True)
"""Beartype takes an int where a float is annotated, as type checkers do."""
checked = beartype(conf=CHECKS)
"""The type checker of every call in the package."""

Image = Float[Array, "height width 3"]
"""An image, channels last, in [-1, 1]; sizes in pixels."""

Latent = Float[Array, "latent_channels rows columns"]
"""The VAE's latent, scaled and shifted to unit variance; rows and columns are cells of 8x8 pixels."""

Packed = Float[Array, "img_tokens channels"]
"""A latent as tokens: each folds 2x2 cells, so it covers 16x16 pixels."""

Ids = Float[Array, "tokens axes"]
"""A token's position on each RoPE axis: (sequence, row, column) in FLUX."""

Times = Float[Array, " nodes"]
"""Sampling times: strictly falling from 1 (noise) to 0 (image)."""

Tokens = Int[Array, " tokens"]
"""Token ids of one prompt."""

PerImage = ScalarLike | Float[Array, " images"]
"""One number for all images of a batch, or one for each."""

__all__ = [
    "CHECKS",
    "Array",
    "Bool",
    "Float",
    "Ids",
    "Image",
    "Int",
    "Latent",
    "PRNGKeyArray",
    "Packed",
    "PerImage",
    "Scalar",
    "ScalarLike",
    "Times",
    "Tokens",
    "checked",
]
