"""The sizes of a ControlNet."""

from dataclasses import dataclass

from fluxjax.nets.flux_config import TransformerConfig

HINT_PATCH = 2
"""Cells of the reduced image along a side of a token."""


@dataclass(frozen=True, kw_only=True)
class ControlNetConfig(TransformerConfig):
    """The sizes of a ControlNet for FLUX.1; the defaults are those of InstantX's Union.

    `modes`: how many kinds of condition it has an embedding for; None for a network without.
    `hint_image`: whether the condition is an image, which the network reduces itself and whose
    residuals are used in turn (XLabs), rather than a packed latent. The rest as in
    `TransformerConfig`.
    """

    double_depth: int = 5
    single_depth: int = 10
    modes: int | None = 10
    hint_image: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.double_depth < 1:
            raise ValueError(
                f"`ControlNetConfig(double_depth={self.double_depth})` needs at least one double "
                "block, after which residuals are taken. Choose 1 or more."
            )
        if self.hint_image and self.in_channels % HINT_PATCH**2:
            raise ValueError(
                f"`ControlNetConfig(hint_image=True)` packs {HINT_PATCH}x{HINT_PATCH} cells into a "
                f"token, so in_channels has to be a multiple of {HINT_PATCH**2}, got "
                f"{self.in_channels}. Choose one."
            )

    @classmethod
    def union(cls) -> "ControlNetConfig":
        """InstantX's Union and Shakker's Union-Pro: 5 double and 10 single blocks, ten modes."""
        return cls()

    @classmethod
    def union_pro_2(cls) -> "ControlNetConfig":
        """Shakker's Union-Pro 2.0: 6 double blocks, no modes."""
        return cls(double_depth=6, single_depth=0, modes=None)

    @classmethod
    def xlabs(cls) -> "ControlNetConfig":
        """XLabs' canny, depth and hed: 2 double blocks, and an image as condition."""
        return cls(double_depth=2, single_depth=0, modes=None, hint_image=True)
