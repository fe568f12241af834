"""The networks of image prompts, from a folder, a file or a hub id."""

from pathlib import Path

from jax.typing import DTypeLike

from fluxjax.checkpoint.kinds import CLIP_VISION, IP_ADAPTER, REDUX, SIGLIP
from fluxjax.generate.load import ShardingChoice, Storage, load_kind
from fluxjax.nets.clip_vision import ClipVision, ClipVisionConfig
from fluxjax.nets.ip_adapter import IpAdapter, IpAdapterConfig
from fluxjax.nets.redux import Redux, ReduxConfig
from fluxjax.nets.siglip import Siglip, SiglipConfig


def load_siglip(
    source: str | Path,
    *,
    config: SiglipConfig | None = None,
    dtype: DTypeLike | None = None,
    sharding: ShardingChoice = None,
) -> Siglip:
    """Load SigLIP's vision encoder, as from the folder `image_encoder` of FLUX.1 Redux.

    Arguments and errors as for `load_flux`.
    """
    return load_kind(SIGLIP, source, config, dtype, Storage(sharding))


def load_clip_vision(
    source: str | Path,
    *,
    config: ClipVisionConfig | None = None,
    dtype: DTypeLike | None = None,
    sharding: ShardingChoice = None,
) -> ClipVision:
    """Load CLIP's vision encoder, from a file of its own or of the whole CLIP.

    Arguments and errors as for `load_flux`.
    """
    return load_kind(CLIP_VISION, source, config, dtype, Storage(sharding))


def load_redux(
    source: str | Path,
    *,
    config: ReduxConfig | None = None,
    dtype: DTypeLike | None = None,
    sharding: ShardingChoice = None,
) -> Redux:
    """Load the embedder of FLUX.1 Redux. Arguments and errors as for `load_flux`."""
    return load_kind(REDUX, source, config, dtype, Storage(sharding))


def load_ip_adapter(
    source: str | Path,
    *,
    config: IpAdapterConfig | None = None,
    dtype: DTypeLike | None = None,
    sharding: ShardingChoice = None,
) -> IpAdapter:
    """Load an IP-Adapter of XLabs, or one of InstantX that was converted to safetensors.

    InstantX's own file is a pickle, which is not read; the error says how to convert it. Arguments
    and errors as for `load_flux`.
    """
    return load_kind(IP_ADAPTER, source, config, dtype, Storage(sharding))
