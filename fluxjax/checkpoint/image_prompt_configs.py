"""Configs of the networks that read image prompts: in `config.json`, and read off shapes."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from math import isqrt

from fluxjax.checkpoint.config_fields import (
    DEPTH,
    EPS,
    FLAG,
    SIZE,
    TEXT,
    JsonObject,
    needed,
    nullable,
    read_fields,
)
from fluxjax.checkpoint.configs import activation_from_json, activation_to_json
from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.folders import IMAGE_ENCODER_FOLDER
from fluxjax.checkpoint.settings import Field
from fluxjax.checkpoint.shape_configs import Shapes, count_indices, shape_of
from fluxjax.nets.clip_vision import ClipVisionConfig
from fluxjax.nets.ip_adapter import IpAdapterConfig
from fluxjax.nets.redux import ReduxConfig
from fluxjax.nets.siglip import SiglipConfig

# A fact of diffusers' class `ReduxImageEncoder`, which its config.json does not hold.
_REDUX_RATIO = 3

_VISION_FIELDS: Mapping[str, Field] = {
    "image_size": needed(SIZE),
    "patch_size": needed(SIZE),
    "hidden_size": needed(SIZE),
    "num_attention_heads": needed(SIZE),
    "num_hidden_layers": needed(DEPTH),
    "intermediate_size": needed(SIZE),
    "projection_dim": SIZE,
    "hidden_act": TEXT,
    "layer_norm_eps": EPS,
}
_IP_ADAPTER_FIELDS: Mapping[str, Field] = {
    "features": SIZE,
    "hidden": nullable(SIZE),
    "tokens": SIZE,
    "context": SIZE,
    "width": SIZE,
    "head_dim": SIZE,
    "double_depth": DEPTH,
    "single_depth": DEPTH,
    "joins_attention": FLAG,
}
_REDUX_FIELDS: Mapping[str, Field] = {"redux_dim": SIZE, "txt_in_features": SIZE}


def siglip_from_json(config: JsonObject) -> SiglipConfig:
    """Return the config of transformers' `SiglipVisionModel`, or of that inside a `SiglipModel`.

    **Raises:** `WeightsError` for an activation that fluxjax does not have.
    """
    values = read_fields(config.get("vision_config", config), _VISION_FIELDS)
    activation = values.get("hidden_act", "gelu_pytorch_tanh")
    return SiglipConfig(
        image_size=values["image_size"],
        patch=values["patch_size"],
        width=values["hidden_size"],
        heads=values["num_attention_heads"],
        depth=values["num_hidden_layers"],
        mlp_width=values["intermediate_size"],
        activation=activation_from_json("SigLIP", activation, IMAGE_ENCODER_FOLDER),
        eps=values.get("layer_norm_eps", 1e-6),
    )


def siglip_to_json(config: SiglipConfig) -> JsonObject:
    """Return a SigLIP's config as transformers' `SiglipVisionModel` has it."""
    return {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        **_vision_to_json(config),
    }


def clip_vision_from_json(config: JsonObject) -> ClipVisionConfig:
    """Return the config of transformers' `CLIPVisionModelWithProjection`, or of a `CLIPModel`'s.

    **Raises:** `WeightsError` for an activation that fluxjax does not have.
    """
    values = read_fields(config.get("vision_config", config), _VISION_FIELDS)
    activation = values.get("hidden_act", "quick_gelu")
    return ClipVisionConfig(
        image_size=values["image_size"],
        patch=values["patch_size"],
        width=values["hidden_size"],
        heads=values["num_attention_heads"],
        depth=values["num_hidden_layers"],
        mlp_width=values["intermediate_size"],
        embedding=values.get("projection_dim", 512),
        activation=activation_from_json("CLIP", activation, IMAGE_ENCODER_FOLDER),
        eps=values.get("layer_norm_eps", 1e-5),
    )


def clip_vision_to_json(config: ClipVisionConfig) -> JsonObject:
    """Return a CLIP's config as transformers' `CLIPVisionModelWithProjection` has it."""
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "projection_dim": config.embedding,
        **_vision_to_json(config),
    }


def _vision_to_json(config: SiglipConfig | ClipVisionConfig) -> JsonObject:
    return {
        "hidden_act": activation_to_json(config.activation),
        "hidden_size": config.width,
        "image_size": config.image_size,
        "intermediate_size": config.mlp_width,
        "layer_norm_eps": config.eps,
        "num_attention_heads": config.heads,
        "num_channels": 3,
        "num_hidden_layers": config.depth,
        "patch_size": config.patch,
    }


def redux_from_json(config: JsonObject) -> ReduxConfig:
    """Return the config of diffusers' `ReduxImageEncoder`."""
    values = read_fields(config, _REDUX_FIELDS)
    context = values.get("txt_in_features", 4096)
    return ReduxConfig(
        features=values.get("redux_dim", 1152),
        hidden=_REDUX_RATIO * context,
        context=context,
    )


def redux_to_json(config: ReduxConfig) -> JsonObject:
    """Return a Redux embedder's config as diffusers' `ReduxImageEncoder` has it.

    **Raises:** `WeightsError` for one that this class can't be.
    """
    if config.hidden != _REDUX_RATIO * config.context:
        raise WeightsError(
            f"diffusers' Redux always has hidden = {_REDUX_RATIO} * context; this one has hidden "
            f"{config.hidden} and context {config.context}. Write another layout."
        )
    return {
        "_class_name": "ReduxImageEncoder",
        "redux_dim": config.features,
        "txt_in_features": config.context,
    }


def siglip_from_shapes(shapes: Shapes) -> SiglipConfig:
    """Return the config of a SigLIP vision encoder; its heads and activation are so400m's.

    **Raises:** `WeightsError` for another width than so400m's, which does not tell the heads.
    """
    positions, width = shape_of(shapes, "positions.weight")
    official = SiglipConfig.so400m()
    if width != official.width:
        raise WeightsError(
            f"A SigLIP of width {width} is not so400m, and the file does not tell its heads. "
            "Pass config=SiglipConfig(…)."
        )
    image_size = isqrt(positions) * official.patch
    if positions == official.patches:
        # 27 patches of 14 pixels are 6 less than the image has.
        image_size = official.image_size
    return replace(
        official,
        image_size=image_size,
        depth=count_indices(shapes, "blocks."),
        mlp_width=shape_of(shapes, "blocks.0.up.weight")[0],
    )


def clip_vision_from_shapes(shapes: Shapes) -> ClipVisionConfig:
    """Return the config of a CLIP vision encoder; its heads and activation are those of ViT-L/14.

    **Raises:** `WeightsError` for another width, which does not tell the heads.
    """
    positions, width = shape_of(shapes, "positions.weight")
    large = ClipVisionConfig.large()
    if width != large.width:
        raise WeightsError(
            f"A CLIP of width {width} is not ViT-L, and the file does not tell its heads. "
            "Pass config=ClipVisionConfig(…)."
        )
    patch = shape_of(shapes, "patches.weight", axes=4)[-1]
    return replace(
        large,
        image_size=isqrt(max(positions - 1, 0)) * patch,
        patch=patch,
        depth=count_indices(shapes, "blocks."),
        mlp_width=shape_of(shapes, "blocks.0.up.weight")[0],
        embedding=shape_of(shapes, "project.weight")[0],
    )


def redux_from_shapes(shapes: Shapes) -> ReduxConfig:
    """Return the config of a Redux embedder."""
    hidden, features = shape_of(shapes, "up.weight")
    return ReduxConfig(features=features, hidden=hidden, context=shape_of(shapes, "down.weight")[0])


def ip_adapter_from_json(config: JsonObject) -> IpAdapterConfig:
    """Return the config of an IP-Adapter that fluxjax wrote; other programs write none."""
    values = read_fields(config, _IP_ADAPTER_FIELDS)
    return IpAdapterConfig(**values)


def ip_adapter_to_json(config: IpAdapterConfig) -> JsonObject:
    """Return an IP-Adapter's config with the names of its fields."""
    return asdict(config)


def ip_adapter_from_shapes(shapes: Shapes) -> IpAdapterConfig:
    """Return the config of XLabs' or InstantX's IP-Adapter; its heads are FLUX.1's.

    **Raises:** `WeightsError` for an adapter like InstantX's of another number of blocks, which
    does not tell how many of them are double blocks.
    """
    rows, features = shape_of(shapes, "project.weight")
    (context,) = shape_of(shapes, "norm.scale", axes=1)
    config = IpAdapterConfig(
        features=features,
        tokens=rows // max(context, 1),
        context=context,
        width=shape_of(shapes, "blocks.0.k.weight")[0],
        double_depth=count_indices(shapes, "blocks."),
    )
    if "up.weight" not in shapes:
        return config
    official = IpAdapterConfig.instantx()
    if config.double_depth != official.double_depth + official.single_depth:
        raise WeightsError(
            f"An IP-Adapter for {config.double_depth} blocks is not FLUX.1's, and the file does "
            "not tell how many of them are double blocks. Pass config=IpAdapterConfig(…)."
        )
    hidden, features = shape_of(shapes, "up.weight")
    return replace(
        config,
        features=features,
        hidden=hidden,
        double_depth=official.double_depth,
        single_depth=official.single_depth,
        joins_attention=True,
    )
