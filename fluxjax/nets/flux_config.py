"""The sizes of FLUX transformers, and of the networks that are made of their blocks."""

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """The sizes of FLUX's blocks and of the tokens that they take; the defaults are FLUX.1-dev's.

    `in_channels`: features of an image token. `width`: features of a token in the blocks. `heads`:
    of the attention. `double_depth`, `single_depth`: numbers of blocks. `mlp_width`: hidden
    features of the MLPs. `context`: features of a text token. `rope_axes`: for each id column, how
    many features of a head it rotates. `rope_theta`: base of RoPE's frequencies.
    """

    in_channels: int = 64
    width: int = 3072
    heads: int = 24
    double_depth: int = 19
    single_depth: int = 38
    mlp_width: int = 12288
    context: int = 4096
    rope_axes: tuple[int, ...] = (16, 56, 56)
    rope_theta: float = 10_000.0

    def __post_init__(self):
        odd = any(axis % 2 for axis in self.rope_axes)
        if odd or self.heads * sum(self.rope_axes) != self.width:
            raise ValueError(
                f"`{type(self).__name__}` needs even rope_axes whose sum times heads is width, got "
                f"rope_axes={self.rope_axes}, heads={self.heads}, width={self.width}."
            )

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return self.width // self.heads


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(BlockConfig):
    """The sizes of FLUX's blocks and of the embedders before them; the defaults are FLUX.1-dev's.

    `pooled`: features of the pooled text vector. `time_width`: features of the sinusoid of times.
    `guidance_embed`: whether the network takes a distilled guidance scale. The rest as in
    `BlockConfig`.
    """

    pooled: int = 768
    time_width: int = 256
    guidance_embed: bool = True


@dataclass(frozen=True, kw_only=True)
class FluxConfig(TransformerConfig):
    """The sizes of a FLUX transformer; the defaults are those of FLUX.1-dev.

    `out_channels`: features of an image token that are predicted. The rest as in
    `TransformerConfig`.
    """

    out_channels: int = 64

    @classmethod
    def dev(cls) -> "FluxConfig":
        """FLUX.1-dev: 11.9 B parameters, guidance-distilled."""
        return cls()

    @classmethod
    def schnell(cls) -> "FluxConfig":
        """FLUX.1-schnell: dev without the guidance embedder."""
        return replace(cls.dev(), guidance_embed=False)

    @classmethod
    def lite(cls) -> "FluxConfig":
        """FLUX.1-lite-8B: dev with 8 of its 19 double blocks, 8.2 B parameters."""
        return replace(cls.dev(), double_depth=8)


def fused_features(config: BlockConfig) -> Mapping[str, tuple[int, ...]]:
    """Return the sizes of the parts of the blocks' fused layers, by the layer's name.

    They are parts of the outputs of `qkv` and `linear1`, and of the inputs of `linear2`.
    """
    qkv = (config.width,) * 3
    return {
        "qkv": qkv,
        "linear1": (*qkv, config.mlp_width),
        "linear2": (config.width, config.mlp_width),
    }
