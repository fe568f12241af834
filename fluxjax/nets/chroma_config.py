"""The sizes of Chroma."""

from dataclasses import dataclass

from fluxjax.nets.flux_config import BlockConfig

DOUBLE_VECTORS, SINGLE_VECTORS, FINAL_VECTORS = 12, 3, 2
"""Vectors that modulate a double block (six for each modality), a single block, the final layer."""


@dataclass(frozen=True, kw_only=True)
class ChromaConfig(BlockConfig):
    """The sizes of Chroma; the defaults are those of Chroma1-HD, 8.9 B parameters.

    `out_channels`: features of an image token that are predicted. `approximator_features`: inputs
    of the approximator, a multiple of 8: a quarter each for the time and for a guidance scale that
    is always 0, half for the number of the vector. `approximator_width`, `approximator_depth`: its
    hidden features and its layers. The rest as in `BlockConfig`.
    """

    out_channels: int = 64
    approximator_features: int = 64
    approximator_width: int = 5120
    approximator_depth: int = 5

    def __post_init__(self):
        super().__post_init__()
        if self.approximator_features % 8:
            raise ValueError(
                "`ChromaConfig(approximator_features)` needs a multiple of 8, whose quarters are "
                f"cosines and sines, got {self.approximator_features}."
            )

    @classmethod
    def hd(cls) -> "ChromaConfig":
        """Chroma1-HD, whose sizes all of Chroma's versions have."""
        return cls()

    @property
    def vectors(self) -> int:
        """How many vectors of the width modulate the network: 344 for Chroma1-HD."""
        blocks = SINGLE_VECTORS * self.single_depth + DOUBLE_VECTORS * self.double_depth
        return blocks + FINAL_VECTORS

    @property
    def guidance_embed(self) -> bool:
        """Whether the network takes a distilled guidance scale: it never does."""
        return False
