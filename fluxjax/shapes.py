"""The array types that public functions share, and the checker of the package's annotations."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Scalar, ScalarLike, UInt8, UInt32

if TYPE_CHECKING:
    from beartype import BeartypeConf

Checked = TypeVar("Checked", bound=Callable[..., Any])
"""A function or a class whose annotations are checked."""


@functools.cache
def beartype_conf() -> "BeartypeConf":
    """Return the settings of all checks: an int fits where a float is annotated (PEP 484)."""
    # beartype takes a tenth of a second to import, and `import fluxjax` needs no check.
    from beartype import BeartypeConf

    return BeartypeConf(is_pep484_tower=True)


def checked(target: Checked) -> Checked:
    """Decorate a function or class so that every call checks its annotations.

    It is the type checker for jaxtyping's import hook:
    `install_import_hook("fluxjax", "fluxjax.shapes.checked")`.
    """
    from beartype import beartype

    return beartype(conf=beartype_conf())(target)


Image = Float[Array, "height width 3"]
"""An image, channels last, in [-1, 1]; sizes in pixels."""

Latent = Float[Array, "latent_channels rows columns"]
"""A latent of the VAE, scaled and shifted to about unit variance; one cell is 8x8 pixels."""

Packed = Float[Array, "img_tokens channels"]
"""A latent as tokens: each holds 2x2 cells, so it covers 16x16 pixels."""

Ids = Float[Array, "tokens axes"]
"""A token's position on each RoPE axis: (sequence, row, column) in FLUX."""

Times = Float[Array, " nodes"]
"""Sampling times: strictly falling, usually from 1 (noise) to 0 (image)."""

Tokens = Int[Array, " tokens"]
"""Token ids of one prompt."""

PerImage = ScalarLike | Float[Array, " images"]
"""One number for all images of a batch, or one per image."""

__all__ = [
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
    "UInt8",
    "UInt32",
    "beartype_conf",
    "checked",
]
