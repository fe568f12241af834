"""Configs of networks whose file has no config: read off the shapes of its tensors."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fluxjax.checkpoint.errors import WeightsError
from fluxjax.nets.chroma_config import ChromaConfig
from fluxjax.nets.clip import ClipConfig
from fluxjax.nets.flux_config import BlockConfig, FluxConfig
from fluxjax.nets.t5 import T5Config
from fluxjax.nets.vae import VaeConfig

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of the tensors of a file, by the parameters' names in fluxjax.

Of a fused weight that the file holds in parts, it is the shape of one part.
"""


def flux_from_shapes(shapes: Shapes) -> FluxConfig:
    """Return the config of a transformer.

    How a head is split over the axes of RoPE leaves no trace in the weights, so only FLUX.1's
    heads of 128 features are read; for others a config has to be passed.

    **Raises:** `WeightsError` for other heads, or a tensor that is missing.
    """
    return FluxConfig(
        **transformer_from_shapes(shapes),
        out_channels=shape_of(shapes, "final.linear.weight")[0],
    )


def chroma_from_shapes(shapes: Shapes) -> ChromaConfig:
    """Return the config of Chroma.

    **Raises:** `WeightsError` for other heads than FLUX.1's, or a tensor that is missing.
    """
    hidden, features = shape_of(shapes, "approximator_in.weight")
    return ChromaConfig(
        **_blocks_from_shapes(shapes),
        out_channels=shape_of(shapes, "final.linear.weight")[0],
        approximator_features=features,
        approximator_width=hidden,
        approximator_depth=count_indices(shapes, "approximator."),
    )


def transformer_from_shapes(shapes: Shapes) -> dict[str, Any]:
    """Return the fields of a `TransformerConfig`.

    **Raises:** `WeightsError` for other heads than FLUX.1's, or a tensor that is missing.
    """
    return {
        **_blocks_from_shapes(shapes),
        "pooled": shape_of(shapes, "vector_in.up.weight")[1],
        "time_width": shape_of(shapes, "time_in.up.weight")[1],
        "guidance_embed": "guidance_in.up.weight" in shapes,
    }


def _blocks_from_shapes(shapes: Shapes) -> dict[str, Any]:
    """Return the fields of a `BlockConfig`."""
    width, in_channels = shape_of(shapes, "img_in.weight")
    (head_dim,) = shape_of(shapes, "double.0.img.query_norm.scale", axes=1)
    if head_dim != sum(BlockConfig().rope_axes):
        raise WeightsError(
            f"Heads of {head_dim} features are not FLUX.1's, and the file does not tell their RoPE "
            "axes. Pass config=FluxConfig(…), or the config of this network."
        )
    return {
        "in_channels": in_channels,
        "width": width,
        "heads": width // head_dim,
        # Indices are counted; if one is missing, the plan lists what it should hold.
        "double_depth": count_indices(shapes, "double."),
        "single_depth": count_indices(shapes, "single."),
        "mlp_width": shape_of(shapes, "double.0.img.mlp.up.weight")[0],
        "context": shape_of(shapes, "txt_in.weight")[1],
    }


def vae_from_shapes(shapes: Shapes) -> VaeConfig:
    """Return the config of a VAE; its groups, scale and shift are FLUX.1's.

    **Raises:** `WeightsError` for other channels than FLUX.1's, since the rest would differ too.
    """
    channels = []
    for level in range(count_indices(shapes, "encoder.down.")):
        name = f"encoder.down.{level}.resnets.0.conv1.weight"
        channels.append(shape_of(shapes, name, axes=4)[0])
    if tuple(channels) != VaeConfig().channels:
        raise WeightsError(
            f"A VAE of {tuple(channels)} channels is not FLUX.1's, and the file does not tell its "
            "groups, scale and shift. Pass config=VaeConfig(…)."
        )
    return VaeConfig(
        channels=tuple(channels),
        resnets=count_indices(shapes, "encoder.down.0.resnets."),
        latent_channels=shape_of(shapes, "decoder.conv_in.weight", axes=4)[1],
    )


def clip_from_shapes(shapes: Shapes) -> ClipConfig:
    """Return the config of a CLIP text encoder; its heads, activation and EOS are CLIP-L's.

    **Raises:** `WeightsError` for another width than CLIP-L's, which does not tell the heads.
    """
    vocabulary, width = shape_of(shapes, "tokens.weight")
    large = ClipConfig.large()
    if width != large.width:
        raise WeightsError(
            f"A CLIP of width {width} is not CLIP-L, and the file does not tell its heads. "
            "Pass config=ClipConfig(…)."
        )
    return replace(
        large,
        vocabulary=vocabulary,
        positions=shape_of(shapes, "positions.weight")[0],
        depth=count_indices(shapes, "blocks."),
        mlp_width=shape_of(shapes, "blocks.0.up.weight")[0],
    )


def t5_from_shapes(shapes: Shapes) -> T5Config:
    """Return the config of a T5 encoder; its largest distance and eps are those of T5 1.1."""
    vocabulary, width = shape_of(shapes, "tokens.weight")
    buckets, heads = shape_of(shapes, "position_bias.weight")
    return T5Config(
        vocabulary=vocabulary,
        width=width,
        heads=heads,
        # A damaged file can have no heads; the config's own checks refuse that.
        head_dim=shape_of(shapes, "blocks.0.q.weight")[0] // max(heads, 1),
        depth=count_indices(shapes, "blocks."),
        mlp_width=shape_of(shapes, "blocks.0.up.weight")[0],
        buckets=buckets,
    )


def shape_of(shapes: Shapes, name: str, axes: int = 2) -> tuple[int, ...]:
    """Return the shape of a parameter.

    **Raises:** `WeightsError` if it is missing, or has another number of axes.
    """
    if name not in shapes:
        raise WeightsError(
            f"The network is not whole: it lacks {name} (its name in fluxjax), so its size is not "
            "known."
        )
    if len(shapes[name]) != axes:
        raise WeightsError(
            f"{name} (its name in fluxjax) has shape {list(shapes[name])}, which has not {axes} "
            "axes."
        )
    return shapes[name]


def count_indices(shapes: Shapes, prefix: str) -> int:
    """Return how many different fields follow a prefix: the number of blocks or levels."""
    indices = set()
    for name in shapes:
        if name.startswith(prefix):
            indices.add(name[len(prefix) :].split(".")[0])
    return len(indices)
