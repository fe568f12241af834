"""Configs of ControlNets: diffusers' config.json, and the shapes of a file's tensors."""

from collections.abc import Mapping
from typing import Any

from fluxjax.checkpoint.config_fields import FLUX_FIELDS, SIZE, JsonObject, nullable, read_fields
from fluxjax.checkpoint.configs import transformer_from_json, transformer_to_json
from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.settings import Field
from fluxjax.checkpoint.shape_configs import Shapes, shape_of, transformer_from_shapes
from fluxjax.nets.controlnet_config import HINT_PATCH, ControlNetConfig

_FIELDS: Mapping[str, Field] = {
    **FLUX_FIELDS,
    "num_mode": nullable(SIZE),
    "conditioning_embedding_channels": nullable(SIZE),
}


def controlnet_from_json(config: JsonObject) -> ControlNetConfig:
    """Return the config of diffusers' `FluxControlNetModel`.

    **Raises:** `WeightsError` for a field that is missing or has a value that it can't have.
    """
    values = read_fields(config, _FIELDS)
    sizes: dict[str, Any] = transformer_from_json(values)
    hint_channels = values.get("conditioning_embedding_channels")
    if hint_channels not in (None, sizes["in_channels"] // HINT_PATCH**2):
        raise WeightsError(
            f"conditioning_embedding_channels is {hint_channels}, and a ControlNet of "
            f"{sizes['in_channels']} in_channels packs {sizes['in_channels'] // HINT_PATCH**2}. "
            "Pass the ControlNet's own config.json."
        )
    return ControlNetConfig(
        **sizes, modes=values.get("num_mode"), hint_image=hint_channels is not None
    )


def controlnet_to_json(config: ControlNetConfig) -> JsonObject:
    """Return a ControlNet's config as diffusers' `FluxControlNetModel` has it.

    **Raises:** `WeightsError` for a network that this class can't be.
    """
    channels = config.in_channels // HINT_PATCH**2
    return {
        "_class_name": "FluxControlNetModel",
        **transformer_to_json(config),
        "conditioning_embedding_channels": channels if config.hint_image else None,
        "num_mode": config.modes,
        "patch_size": HINT_PATCH if config.hint_image else 1,
    }


def controlnet_from_shapes(shapes: Shapes) -> ControlNetConfig:
    """Return the config of a ControlNet.

    **Raises:** `WeightsError` for other heads than FLUX.1's, or a tensor that is missing.
    """
    modes = None
    if "mode_in.weight" in shapes:
        modes = shape_of(shapes, "mode_in.weight")[0]
    return ControlNetConfig(
        **transformer_from_shapes(shapes),
        modes=modes,
        hint_image="hint.convs.0.weight" in shapes,
    )


def controlnet_variant(config: ControlNetConfig) -> str:
    """Return which of the published ControlNets has a config's sizes."""
    published = {
        "Union, Union-Pro": ControlNetConfig.union(),
        "Union-Pro 2.0": ControlNetConfig.union_pro_2(),
        "XLabs": ControlNetConfig.xlabs(),
    }
    for name, sizes in published.items():
        if config == sizes:
            return name
    return f"{config.double_depth} double and {config.single_depth} single blocks"
