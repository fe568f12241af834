"""Configs in `config.json`: those of diffusers and transformers, read and written."""

from typing import Any

from fluxjax.checkpoint.config_fields import (
    CHROMA_FIELDS,
    CLIP_FIELDS,
    FLUX_FIELDS,
    T5_FIELDS,
    VAE_FIELDS,
    JsonObject,
    read_fields,
)
from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.folders import CLIP_FOLDER
from fluxjax.nets.chroma_config import ChromaConfig
from fluxjax.nets.clip import ClipConfig
from fluxjax.nets.flux_config import BlockConfig, FluxConfig, TransformerConfig
from fluxjax.nets.t5 import T5Config
from fluxjax.nets.vae import VaeConfig
from fluxjax.printable import quote_name

# Facts of diffusers' class `FluxTransformer2DModel`, which its config.json does not hold.
_FLUX_MLP_RATIO = 4
_FLUX_ROPE_THETA = 10_000
_FLUX_TIME_WIDTH = 256


def flux_from_json(config: JsonObject) -> FluxConfig:
    """Return the config of diffusers' `FluxTransformer2DModel`.

    **Raises:** `WeightsError` for a field that is missing or has a value that it can't have.
    """
    values = read_fields(config, FLUX_FIELDS)
    return FluxConfig(
        **transformer_from_json(values),
        # null stands for as many as come in.
        out_channels=values.get("out_channels") or values["in_channels"],
    )


def chroma_from_json(config: JsonObject) -> ChromaConfig:
    """Return the config of diffusers' `ChromaTransformer2DModel`.

    **Raises:** `WeightsError` for a field that is missing or has a value that it can't have.
    """
    values = read_fields(config, CHROMA_FIELDS)
    published = ChromaConfig.hd()
    return ChromaConfig(
        **_blocks_from_json(values),
        out_channels=values.get("out_channels") or values["in_channels"],
        approximator_features=values.get(
            "approximator_num_channels", published.approximator_features
        ),
        approximator_width=values.get("approximator_hidden_dim", published.approximator_width),
        approximator_depth=values.get("approximator_layers", published.approximator_depth),
    )


def _blocks_from_json(values: JsonObject) -> dict[str, Any]:
    """Return the fields of a `BlockConfig`."""
    width = values["num_attention_heads"] * values["attention_head_dim"]
    return {
        "in_channels": values["in_channels"],
        "width": width,
        "heads": values["num_attention_heads"],
        "double_depth": values["num_layers"],
        "single_depth": values["num_single_layers"],
        "mlp_width": _FLUX_MLP_RATIO * width,
        "context": values["joint_attention_dim"],
        "rope_axes": tuple(values.get("axes_dims_rope", (16, 56, 56))),
    }


def transformer_from_json(values: JsonObject) -> dict[str, Any]:
    """Return the fields of a `TransformerConfig`.

    **Arguments:** `values`: the fields of a config.json that are in `FLUX_FIELDS`, checked.
    """
    return {
        **_blocks_from_json(values),
        "pooled": values["pooled_projection_dim"],
        "guidance_embed": values.get("guidance_embeds", False),
    }


def flux_to_json(config: FluxConfig) -> JsonObject:
    """Return a transformer's config as diffusers' `FluxTransformer2DModel` has it.

    **Raises:** `WeightsError` for a network that this class can't be.
    """
    same_channels = config.out_channels == config.in_channels
    return {
        "_class_name": "FluxTransformer2DModel",
        **transformer_to_json(config),
        "out_channels": None if same_channels else config.out_channels,
        "patch_size": 1,
    }


def chroma_to_json(config: ChromaConfig) -> JsonObject:
    """Return Chroma's config as diffusers' `ChromaTransformer2DModel` has it.

    **Raises:** `WeightsError` for a network that this class can't be.
    """
    same_channels = config.out_channels == config.in_channels
    return {
        "_class_name": "ChromaTransformer2DModel",
        **_blocks_to_json(config),
        "approximator_hidden_dim": config.approximator_width,
        "approximator_layers": config.approximator_depth,
        "approximator_num_channels": config.approximator_features,
        "out_channels": None if same_channels else config.out_channels,
        "patch_size": 1,
    }


def transformer_to_json(config: TransformerConfig) -> JsonObject:
    """Return the fields that diffusers' FLUX and its ControlNet have in common.

    **Raises:** `WeightsError` for a network that these classes can't be.
    """
    if config.time_width != _FLUX_TIME_WIDTH:
        raise WeightsError(
            f"diffusers' FLUX always has time_width = {_FLUX_TIME_WIDTH}; this one has "
            f"{config.time_width}. Write another layout."
        )
    return {
        **_blocks_to_json(config),
        "guidance_embeds": config.guidance_embed,
        "pooled_projection_dim": config.pooled,
    }


def _blocks_to_json(config: BlockConfig) -> JsonObject:
    """Return the fields that are about FLUX's blocks and their tokens.

    **Raises:** `WeightsError` for blocks that diffusers' classes can't have.
    """
    expressible = (
        config.mlp_width == _FLUX_MLP_RATIO * config.width and config.rope_theta == _FLUX_ROPE_THETA
    )
    if not expressible:
        raise WeightsError(
            f"diffusers' FLUX always has mlp_width = {_FLUX_MLP_RATIO} * width and "
            f"rope_theta = {_FLUX_ROPE_THETA}; this one has width {config.width}, mlp_width "
            f"{config.mlp_width} and rope_theta {config.rope_theta}. Write another layout."
        )
    return {
        "attention_head_dim": config.head_dim,
        "axes_dims_rope": list(config.rope_axes),
        "in_channels": config.in_channels,
        "joint_attention_dim": config.context,
        "num_attention_heads": config.heads,
        "num_layers": config.double_depth,
        "num_single_layers": config.single_depth,
    }


def vae_from_json(config: JsonObject) -> VaeConfig:
    """Return the config of diffusers' `AutoencoderKL`.

    **Raises:** `WeightsError` for one with convolutions around the latent ("quant_conv"), which
    FLUX.1's VAE does not have.
    """
    values = read_fields(config, VAE_FIELDS)
    # diffusers takes both as true where the config does not have them.
    if values.get("use_quant_conv", True) or values.get("use_post_quant_conv", True):
        raise WeightsError(
            "This VAE has quant convolutions, so it is not FLUX.1's. Pass FLUX.1's vae folder."
        )
    return VaeConfig(
        channels=tuple(values["block_out_channels"]),
        resnets=values["layers_per_block"],
        groups=values["norm_num_groups"],
        latent_channels=values["latent_channels"],
        scale=values["scaling_factor"],
        shift=values.get("shift_factor") or 0.0,
    )


def vae_to_json(config: VaeConfig) -> JsonObject:
    """Return a VAE's config as diffusers' `AutoencoderKL` has it."""
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


_ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


def activation_from_json(title: str, activation: str, folder: str) -> str:
    """Return fluxjax's name of an activation of transformers' encoders.

    **Arguments:** `title`: of the encoder, and `folder`: of the one to pass, for the message.
    **Raises:** `WeightsError` for an activation that fluxjax does not have.
    """
    if activation not in _ACTIVATIONS:
        raise WeightsError(
            f"{title}'s hidden_act {quote_name(activation)} is not one of "
            f"{', '.join(_ACTIVATIONS)}. Pass FLUX.1's {folder}."
        )
    return _ACTIVATIONS[activation]


def activation_to_json(activation: str) -> str:
    """Return transformers' name of an activation."""
    return "gelu_pytorch_tanh" if activation == "gelu_tanh" else activation


def clip_from_json(config: JsonObject) -> ClipConfig:
    """Return the config of transformers' `CLIPTextModel`, or of the one inside a `CLIPModel`.

    **Raises:** `WeightsError` for an activation that fluxjax does not have.
    """
    # A `CLIPModel` has the vision encoder too, and the text encoder's config under this name.
    values = read_fields(config.get("text_config", config), CLIP_FIELDS)
    eos = values.get("eos_token_id", 49407)
    activation = values.get("hidden_act", "quick_gelu")
    return ClipConfig(
        vocabulary=values["vocab_size"],
        positions=values.get("max_position_embeddings", 77),
        width=values["hidden_size"],
        heads=values["num_attention_heads"],
        depth=values["num_hidden_layers"],
        mlp_width=values["intermediate_size"],
        # 2 is a mistake of old configs; the EOS is then the token of the largest id.
        eos_token=None if eos == 2 else eos,
        activation=activation_from_json("CLIP", activation, CLIP_FOLDER),
        eps=values.get("layer_norm_eps", 1e-5),
    )


def clip_to_json(config: ClipConfig) -> JsonObject:
    """Return a CLIP's config as transformers' `CLIPTextModel` has it."""
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "bos_token_id": config.vocabulary - 2,
        "eos_token_id": 2 if config.eos_token is None else config.eos_token,
        "pad_token_id": 1,
        "hidden_act": activation_to_json(config.activation),
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "layer_norm_eps": config.eps,
        "max_position_embeddings": config.positions,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.depth,
        "projection_dim": config.width,
        "vocab_size": config.vocabulary,
    }


def t5_from_json(config: JsonObject) -> T5Config:
    """Return the config of transformers' `T5EncoderModel`.

    **Raises:** `WeightsError` for another version of T5 than 1.1.
    """
    values = read_fields(config, T5_FIELDS)
    # transformers takes "relu", that of version 1.0, where the config does not have the field.
    if values.get("feed_forward_proj", "relu") != "gated-gelu":
        raise WeightsError(
            "This T5 is not of version 1.1 (feed_forward_proj is not gated-gelu). "
            "Pass FLUX.1's text_encoder_2."
        )
    return T5Config(
        vocabulary=values["vocab_size"],
        width=values["d_model"],
        heads=values["num_heads"],
        head_dim=values["d_kv"],
        depth=values["num_layers"],
        mlp_width=values["d_ff"],
        buckets=values.get("relative_attention_num_buckets", 32),
        max_distance=values.get("relative_attention_max_distance", 128),
        eps=values.get("layer_norm_epsilon", 1e-6),
    )


def t5_to_json(config: T5Config) -> JsonObject:
    """Return a T5's config as transformers' `T5EncoderModel` has it."""
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
