"""Configs in fluxjax's own metadata: the fields of the config's class, as JSON."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import TypeVar

from fluxjax.checkpoint.config_fields import (
    DEPTH,
    EPS,
    FLAG,
    LEVELS,
    NUMBER,
    RESNETS,
    SIZE,
    TEXT,
    TOKEN,
    VOCABULARY,
    JsonObject,
    nullable,
    read_fields,
)
from fluxjax.checkpoint.settings import Field
from fluxjax.nets.chroma_config import ChromaConfig
from fluxjax.nets.clip import ClipConfig
from fluxjax.nets.clip_vision import ClipVisionConfig
from fluxjax.nets.controlnet_config import ControlNetConfig
from fluxjax.nets.flux_config import FluxConfig
from fluxjax.nets.ip_adapter import IpAdapterConfig
from fluxjax.nets.redux import ReduxConfig
from fluxjax.nets.siglip import SiglipConfig
from fluxjax.nets.t5 import T5Config
from fluxjax.nets.vae import VaeConfig

NetworkConfig = (
    FluxConfig
    | ChromaConfig
    | T5Config
    | ClipConfig
    | VaeConfig
    | ControlNetConfig
    | SiglipConfig
    | ClipVisionConfig
    | ReduxConfig
    | IpAdapterConfig
)
"""The config of one of the networks."""
Config = TypeVar("Config", bound=NetworkConfig)

_BY_NAME: Mapping[str, Field] = {
    "vocabulary": VOCABULARY,
    "depth": DEPTH,
    "double_depth": DEPTH,
    "single_depth": DEPTH,
    "approximator_depth": DEPTH,
    "resnets": RESNETS,
    "eps": EPS,
    "eos_token": TOKEN,
    "hidden": nullable(SIZE),
    "modes": nullable(SIZE),
}
_BY_TYPE: Mapping[object, Field] = {int: SIZE, float: NUMBER, bool: FLAG, str: TEXT}


def to_dict(config: NetworkConfig) -> JsonObject:
    """Return a config as JSON's types."""
    return asdict(config)


def from_dict(kind: type[Config], settings: object) -> Config:
    """Read a config back from JSON's types.

    **Raises:** `WeightsError` for what is not a config of this class.
    """
    known = {}
    for field in fields(kind):
        by_type = _BY_TYPE.get(field.type, LEVELS)
        known[field.name] = _BY_NAME.get(field.name, by_type)
    return kind(**read_fields(settings, known, place="its own config", closed=True))
