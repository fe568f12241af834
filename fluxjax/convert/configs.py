"""Configs from a checkpoint's `config.json`, or from the shapes of a single file; and back."""

from collections.abc import Mapping
from typing import Any

from fluxjax.convert.files import Tensor, WeightsError
from fluxjax.nets.clip import ClipConfig
from fluxjax.nets.flux import FluxConfig
from fluxjax.nets.t5 import T5Config
from fluxjax.nets.vae import VaeConfig


def flux_from_json(config: Mapping[str, Any]) -> FluxConfig:
    """Read diffusers' `FluxTransformer2DModel` config."""
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
    if config.mlp_width != 4 * config.width or config.rope_theta != 10_000 or config.time_width != 256:
        raise WeightsError("diffusers' FLUX has mlp_width = 4 * width, rope_theta = 10000 and time_width = 256 alone.")
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


def flux_from_shapes(tensors: Mapping[str, Tensor]) -> FluxConfig:
    """Read the config off a BFL file's shapes. The split of a head over the RoPE axes is FLUX.1's, which leaves no trace in
    the weights: other heads than 128 features need a config.

    **Raises:** `WeightsError` for those.
    """
    try:
        width, in_channels = tensors["img_in.weight"].shape
        head_dim = tensors["double_blocks.0.img_attn.norm.query_norm.scale"].shape[0]
        config: dict[str, Any] = {
            "in_channels": in_channels,
            "out_channels": tensors["final_layer.linear.weight"].shape[0],
            "width": width,
            "heads": width // head_dim,
            "double_depth": _count(tensors, "double_blocks."),
            "single_depth": _count(tensors, "single_blocks."),
            "mlp_width": tensors["double_blocks.0.img_mlp.0.weight"].shape[0],
            "context": tensors["txt_in.weight"].shape[1],
            "pooled": tensors["vector_in.in_layer.weight"].shape[1],
            "time_width": tensors["time_in.in_layer.weight"].shape[1],
            "guidance_embed": "guidance_in.in_layer.weight" in tensors,
        }
    except (KeyError, IndexError) as error:
        raise WeightsError(f"This is not a whole FLUX transformer in BFL's names: {error} is missing.") from error
    if head_dim != sum(FluxConfig().rope_axes):
        raise WeightsError(
            f"Heads of {head_dim} features are not FLUX.1's, and a single file does not tell their RoPE axes. "
            "Pass config=FluxConfig(…)."
        )
    return FluxConfig(**config)


def vae_from_json(config: Mapping[str, Any]) -> VaeConfig:
    """Read diffusers' `AutoencoderKL` config. **Raises:** `WeightsError` for one with quant convolutions."""
    if config.get("use_quant_conv", True) or config.get("use_post_quant_conv", True):
        raise WeightsError("This VAE has quant convolutions, so it is not FLUX.1's. Pass FLUX.1's vae folder.")
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


def vae_from_shapes(tensors: Mapping[str, Tensor]) -> VaeConfig:
    """Read the config off a BFL file's shapes; groups, scale and shift are FLUX.1's."""
    levels = _count(tensors, "encoder.down.")
    return VaeConfig(
        channels=tuple(tensors[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)),
        resnets=_count(tensors, "encoder.down.0.block."),
        latent_channels=tensors["decoder.conv_in.weight"].shape[1],
    )


_CLIP_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


def clip_from_json(config: Mapping[str, Any]) -> ClipConfig:
    """Read transformers' `CLIPTextModel` config, where `eos_token_id` 2 is an old mistake that means the largest id."""
    eos = config.get("eos_token_id", 49407)
    activation = config.get("hidden_act", "quick_gelu")
    if activation not in _CLIP_ACTIVATIONS:
        raise WeightsError(f"CLIP's hidden_act {activation!r} is not one of {', '.join(_CLIP_ACTIVATIONS)}.")
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
    if config.get("feed_forward_proj", "relu") != "gated-gelu":
        raise WeightsError("This T5 is not of version 1.1 (feed_forward_proj is not gated-gelu). Pass FLUX.1's text_encoder_2.")
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


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """Return how many indices follow a prefix."""
    return len({key[len(prefix) :].split(".")[0] for key in tensors if key.startswith(prefix)})
