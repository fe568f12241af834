"""Configs from a checkpoint's `config.json`, from fluxjax's own metadata, or from a file's shapes; and back."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from typing import Any, TypeVar

from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.settings import Field, check_settings
from fluxjax.nets.clip import ClipConfig
from fluxjax.nets.flux import FluxConfig
from fluxjax.nets.t5 import T5Config
from fluxjax.nets.vae import VaeConfig
from fluxjax.printable import quote_name

Config = TypeVar("Config")
Shapes = Mapping[str, tuple[int, ...]]
"""Shapes as a file has them, by our names; a fused weight's is that of one of its parts."""

# Ten to a thousand times what any of FLUX.1's networks has: what is beyond is a damaged file, and may take all the memory.
_SIZE = Field(kind="integer", least=1, most=1_000_000)
_DEPTH = Field(kind="integer", least=0, most=1000)
_VOCABULARY = Field(kind="integer", least=1, most=10_000_000)
_LEVELS = Field(kind="integers", least=1, most=100_000)
_RESNETS = Field(kind="integer", least=0, most=100)
_NUMBER = Field(kind="number", least=-1e6, most=1e6)
_EPS = Field(kind="number", least=0, most=1)
_FLAG = Field(kind="boolean")
_MOST_LEVELS = 16


def _needed(field: Field) -> Field:
    return replace(field, required=True)


def _optional(field: Field) -> Field:
    return replace(field, optional=True)


_FLUX_FIELDS = {
    "num_attention_heads": _needed(Field(kind="integer", least=1, most=1000)),
    "attention_head_dim": _needed(Field(kind="integer", least=1, most=10_000)),
    "in_channels": _needed(_SIZE),
    "out_channels": _optional(_SIZE),
    "num_layers": _needed(_DEPTH),
    "num_single_layers": _needed(_DEPTH),
    "joint_attention_dim": _needed(_SIZE),
    "pooled_projection_dim": _needed(_SIZE),
    "axes_dims_rope": _LEVELS,
    "guidance_embeds": _FLAG,
}
_VAE_FIELDS = {
    "use_quant_conv": _FLAG,
    "use_post_quant_conv": _FLAG,
    "block_out_channels": _needed(_LEVELS),
    "layers_per_block": _needed(_RESNETS),
    "norm_num_groups": _needed(_SIZE),
    "latent_channels": _needed(_SIZE),
    "scaling_factor": _needed(_NUMBER),
    "shift_factor": _optional(_NUMBER),
}
_CLIP_FIELDS = {
    "vocab_size": _needed(_VOCABULARY),
    "max_position_embeddings": _SIZE,
    "hidden_size": _needed(_SIZE),
    "num_attention_heads": _needed(_SIZE),
    "num_hidden_layers": _needed(_DEPTH),
    "intermediate_size": _needed(_SIZE),
    "eos_token_id": Field(kind="integer", least=0, most=10_000_000, optional=True),
    "hidden_act": Field(kind="text"),
    "layer_norm_eps": _EPS,
}
_T5_FIELDS = {
    "feed_forward_proj": Field(kind="text"),
    "vocab_size": _needed(_VOCABULARY),
    "d_model": _needed(_SIZE),
    "num_heads": _needed(_SIZE),
    "d_kv": _needed(_SIZE),
    "num_layers": _needed(_DEPTH),
    "d_ff": _needed(_SIZE),
    "relative_attention_num_buckets": _SIZE,
    "relative_attention_max_distance": _SIZE,
    "layer_norm_epsilon": _EPS,
}


def _read(config: Any, known: Mapping[str, Field]) -> dict[str, Any]:
    """Return the fields of a config.json, checked; lists of levels have a bounded length."""
    read = check_settings("its settings", config, known)
    for name, value in read.items():
        if isinstance(value, tuple) and not 1 <= len(value) <= _MOST_LEVELS:
            raise WeightsError(
                f"its settings: {name!r} should have 1 to {_MOST_LEVELS} entries, got {len(value)}."
            )
    return read


def flux_from_json(config: Mapping[str, Any]) -> FluxConfig:
    """Read diffusers' `FluxTransformer2DModel` config."""
    config = _read(config, _FLUX_FIELDS)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return FluxConfig(
        in_channels=config["in_channels"],
        out_channels=config.get("out_channels") or config["in_channels"],
        width=width,
        heads=config["num_attention_heads"],
        double_depth=config["num_layers"],
        single_depth=config["num_single_layers"],
        mlp_width=4 * width,
        context=config["joint_attention_dim"],
        pooled=config["pooled_projection_dim"],
        rope_axes=tuple(config.get("axes_dims_rope", (16, 56, 56))),
        guidance_embed=config.get("guidance_embeds", False),
    )


def flux_to_json(config: FluxConfig) -> dict[str, Any]:
    """Write diffusers' `FluxTransformer2DModel` config. **Raises:** `WeightsError` for what it can't express."""
    if (
        config.mlp_width != 4 * config.width
        or config.rope_theta != 10_000
        or config.time_width != 256
    ):
        raise WeightsError(
            "diffusers' FLUX has mlp_width = 4 * width, rope_theta = 10000 and time_width = 256 alone."
        )
    return {
        "_class_name": "FluxTransformer2DModel",
        "attention_head_dim": config.head_dim,
        "axes_dims_rope": list(config.rope_axes),
        "guidance_embeds": config.guidance_embed,
        "in_channels": config.in_channels,
        "joint_attention_dim": config.context,
        "num_attention_heads": config.heads,
        "num_layers": config.double_depth,
        "num_single_layers": config.single_depth,
        "out_channels": None if config.out_channels == config.in_channels else config.out_channels,
        "patch_size": 1,
        "pooled_projection_dim": config.pooled,
    }


def flux_from_shapes(shapes: Shapes) -> FluxConfig:
    """Read the config off the shapes in the file, by our names. The split of a head over the RoPE axes is FLUX.1's, which
    leaves no trace in the weights: other heads than 128 features need a config.

    **Raises:** `WeightsError` for those.
    """
    width, in_channels = _shape(shapes, "img_in.weight")
    (head_dim,) = _shape(shapes, "double.0.img.query_norm.scale", axes=1)
    if head_dim != sum(FluxConfig().rope_axes):
        raise WeightsError(
            f"Heads of {head_dim} features are not FLUX.1's, and the file does not tell their RoPE axes. "
            "Pass config=FluxConfig(…)."
        )
    return FluxConfig(
        in_channels=in_channels,
        out_channels=_shape(shapes, "final.linear.weight")[0],
        width=width,
        heads=width // head_dim,
        double_depth=_count(shapes, "double."),
        single_depth=_count(shapes, "single."),
        mlp_width=_shape(shapes, "double.0.img.mlp.up.weight")[0],
        context=_shape(shapes, "txt_in.weight")[1],
        pooled=_shape(shapes, "vector_in.up.weight")[1],
        time_width=_shape(shapes, "time_in.up.weight")[1],
        guidance_embed="guidance_in.up.weight" in shapes,
    )


def vae_from_json(config: Mapping[str, Any]) -> VaeConfig:
    """Read diffusers' `AutoencoderKL` config. **Raises:** `WeightsError` for one with quant convolutions."""
    config = _read(config, _VAE_FIELDS)
    if config.get("use_quant_conv", True) or config.get("use_post_quant_conv", True):
        raise WeightsError(
            "This VAE has quant convolutions, so it is not FLUX.1's. Pass FLUX.1's vae folder."
        )
    return VaeConfig(
        channels=tuple(config["block_out_channels"]),
        resnets=config["layers_per_block"],
        groups=config["norm_num_groups"],
        latent_channels=config["latent_channels"],
        scale=config["scaling_factor"],
        shift=config.get("shift_factor") or 0.0,
    )


def vae_to_json(config: VaeConfig) -> dict[str, Any]:
    """Write diffusers' `AutoencoderKL` config."""
    levels = len(config.channels)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(config.channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": 3,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.resnets,
        "mid_block_add_attention": True,
        "norm_num_groups": config.groups,
        "out_channels": 3,
        "scaling_factor": config.scale,
        "shift_factor": config.shift,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }


def vae_from_shapes(shapes: Shapes) -> VaeConfig:
    """Read the config off the shapes in the file, by our names; groups, scale and shift are FLUX.1's.

    **Raises:** `WeightsError` if its channels are not FLUX.1's, as those are not either then.
    """
    levels = _count(shapes, "encoder.down.")
    channels = tuple(
        _shape(shapes, f"encoder.down.{i}.resnets.0.conv1.weight", axes=4)[0] for i in range(levels)
    )
    if channels != VaeConfig().channels:
        raise WeightsError(
            f"A VAE of {channels} channels is not FLUX.1's, and the file does not tell its groups, scale and shift. "
            "Pass config=VaeConfig(…)."
        )
    return VaeConfig(
        channels=channels,
        resnets=_count(shapes, "encoder.down.0.resnets."),
        latent_channels=_shape(shapes, "decoder.conv_in.weight", axes=4)[1],
    )


_CLIP_ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


def clip_from_json(config: Mapping[str, Any]) -> ClipConfig:
    """Read transformers' `CLIPTextModel` config, or that inside of a `CLIPModel`'s; `eos_token_id` 2 is an old mistake that
    means the largest id."""
    config = _read(config.get("text_config", config), _CLIP_FIELDS)
    eos = config.get("eos_token_id", 49407)
    activation = config.get("hidden_act", "quick_gelu")
    if activation not in _CLIP_ACTIVATIONS:
        raise WeightsError(
            f"CLIP's hidden_act {quote_name(activation)} is not one of {', '.join(_CLIP_ACTIVATIONS)}."
        )
    return ClipConfig(
        vocabulary=config["vocab_size"],
        positions=config.get("max_position_embeddings", 77),
        width=config["hidden_size"],
        heads=config["num_attention_heads"],
        depth=config["num_hidden_layers"],
        mlp_width=config["intermediate_size"],
        eos_token=None if eos == 2 else eos,
        activation=_CLIP_ACTIVATIONS[activation],
        eps=config.get("layer_norm_eps", 1e-5),
    )


def clip_from_shapes(shapes: Shapes) -> ClipConfig:
    """Read the config off the shapes in the file, by our names; heads, activation and EOS are CLIP-L's.

    **Raises:** `WeightsError` for another width, which does not tell the heads.
    """
    vocabulary, width = _shape(shapes, "tokens.weight")
    large = ClipConfig.large()
    if width != large.width:
        raise WeightsError(
            f"A CLIP of width {width} is not CLIP-L, and the file does not tell its heads. Pass config=ClipConfig(…)."
        )
    return replace(
        large,
        vocabulary=vocabulary,
        positions=_shape(shapes, "positions.weight")[0],
        depth=_count(shapes, "blocks."),
        mlp_width=_shape(shapes, "blocks.0.up.weight")[0],
    )


def clip_to_json(config: ClipConfig) -> dict[str, Any]:
    """Write transformers' `CLIPTextModel` config."""
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "bos_token_id": config.vocabulary - 2,
        "eos_token_id": 2 if config.eos_token is None else config.eos_token,
        "pad_token_id": 1,
        "hidden_act": {"gelu_tanh": "gelu_pytorch_tanh"}.get(config.activation, config.activation),
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "layer_norm_eps": config.eps,
        "max_position_embeddings": config.positions,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.depth,
        "projection_dim": config.width,
        "vocab_size": config.vocabulary,
    }


def t5_from_json(config: Mapping[str, Any]) -> T5Config:
    """Read transformers' `T5EncoderModel` config. **Raises:** `WeightsError` unless it is of version 1.1."""
    config = _read(config, _T5_FIELDS)
    if config.get("feed_forward_proj", "relu") != "gated-gelu":
        raise WeightsError(
            "This T5 is not of version 1.1 (feed_forward_proj is not gated-gelu). Pass FLUX.1's text_encoder_2."
        )
    return T5Config(
        vocabulary=config["vocab_size"],
        width=config["d_model"],
        heads=config["num_heads"],
        head_dim=config["d_kv"],
        depth=config["num_layers"],
        mlp_width=config["d_ff"],
        buckets=config.get("relative_attention_num_buckets", 32),
        max_distance=config.get("relative_attention_max_distance", 128),
        eps=config.get("layer_norm_epsilon", 1e-6),
    )


def t5_from_shapes(shapes: Shapes) -> T5Config:
    """Read the config off the shapes in the file, by our names; the largest distance and eps are T5's own."""
    vocabulary, width = _shape(shapes, "tokens.weight")
    buckets, heads = _shape(shapes, "position_bias.weight")
    return T5Config(
        vocabulary=vocabulary,
        width=width,
        heads=heads,
        head_dim=_shape(shapes, "blocks.0.q.weight")[0] // max(heads, 1),
        depth=_count(shapes, "blocks."),
        mlp_width=_shape(shapes, "blocks.0.up.weight")[0],
        buckets=buckets,
    )


def t5_to_json(config: T5Config) -> dict[str, Any]:
    """Write transformers' `T5EncoderModel` config."""
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "d_ff": config.mlp_width,
        "d_kv": config.head_dim,
        "d_model": config.width,
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "layer_norm_epsilon": config.eps,
        "num_decoder_layers": config.depth,
        "num_heads": config.heads,
        "num_layers": config.depth,
        "pad_token_id": 0,
        "relative_attention_max_distance": config.max_distance,
        "relative_attention_num_buckets": config.buckets,
        "vocab_size": config.vocabulary,
    }


def to_dict(config: Any) -> dict[str, Any]:
    """Write one of our configs as JSON's types."""
    return asdict(config)


_OWN_FIELDS = {
    "vocabulary": _VOCABULARY,
    "depth": _DEPTH,
    "double_depth": _DEPTH,
    "single_depth": _DEPTH,
    "resnets": _RESNETS,
    "eps": _EPS,
    "eos_token": Field(kind="integer", least=0, most=10_000_000, optional=True),
}
_BY_TYPE = {int: _SIZE, float: _NUMBER, bool: _FLAG, str: Field(kind="text")}


def from_dict(kind: Callable[..., Config], settings: Any) -> Config:
    """Read one of our configs back. **Raises:** `WeightsError` for what is none."""
    known = {
        field.name: _OWN_FIELDS.get(field.name, _BY_TYPE.get(field.type, _LEVELS))
        for field in fields(kind)
    }  # type: ignore[arg-type]
    check_settings("its own config", settings, known, closed=True)
    return kind(**_read(settings, known))


def _shape(shapes: Shapes, name: str, axes: int = 2) -> tuple[int, ...]:
    if name not in shapes:
        raise WeightsError(
            f"The network is not whole: it lacks {name} (its name in fluxjax), so its size is not known."
        )
    if len(shapes[name]) != axes:
        raise WeightsError(
            f"{name} (its name in fluxjax) has shape {list(shapes[name])}, which has not {axes} axes."
        )
    return shapes[name]


def _count(shapes: Shapes, prefix: str) -> int:
    """Return how many indices follow a prefix."""
    return len({name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)})
