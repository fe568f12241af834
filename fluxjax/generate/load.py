"""Networks and tokenizers from a name, a folder, a file or a hub id."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from jax.typing import DTypeLike

from fluxjax.checkpoint.detect import open_source
from fluxjax.checkpoint.dtypes import check_dtype
from fluxjax.checkpoint.family import family_of_source, hub_folder
from fluxjax.checkpoint.kinds import CHROMA_TRANSFORMER, CLIP, CONTROLNET, FLUX, T5_XXL, VAE, Kind
from fluxjax.checkpoint.load import load, load_quantized
from fluxjax.checkpoint.locate import find_part, find_source
from fluxjax.checkpoint.plan import Plan
from fluxjax.devices.stream import load_streamed
from fluxjax.generate.tokens import Tokenizers
from fluxjax.nets.chroma import Chroma
from fluxjax.nets.chroma_config import ChromaConfig
from fluxjax.nets.clip import Clip, ClipConfig
from fluxjax.nets.controlnet import ControlNet
from fluxjax.nets.controlnet_config import ControlNetConfig
from fluxjax.nets.flux import Flux
from fluxjax.nets.flux_config import FluxConfig
from fluxjax.nets.t5 import T5, T5Config
from fluxjax.nets.vae import Vae, VaeConfig

Network = TypeVar("Network", bound=eqx.Module)
ShardingChoice = Sharding | eqx.Module | Callable[[eqx.Module], eqx.Module] | None
"""A sharding for every leaf, a pytree of shardings, or a function that makes one of the network."""


def load_flux(
    source: str | Path,
    *,
    config: FluxConfig | None = None,
    dtype: DTypeLike | None = None,
    sharding: ShardingChoice = None,
    stream: bool = False,
    quantize: str | None = None,
) -> Flux:
    """Load the transformer.

    **Arguments:** `source`: a zoo name ("tiny", "dev", …), a file or a folder of any layout (the
    documentation's page on weights lists them), or a hub id. `config`: replaces what the source
    says, for a file that does not say it. `dtype`: of the weights, a float of 8 to 64 bits; None
    keeps the file's, in which the blocks' matrices of GGUF and NF4 files stay packed, and decodes
    other quantized weights to bfloat16. `sharding`: a
    `jax.sharding.Sharding` for every leaf, a pytree of them, or a function that makes one from the
    network of shapes; each process then reads only the slices of its devices. `stream`: leave the
    matrices of the blocks in the files and read each whenever it is used, the next one ahead: for a
    machine whose memory does not hold them. `quantize`: "int8", "fp8", "int8-128", "int4" or "nf4":
    round the matrices of the blocks as they are read, as `fluxjax.quantize` does.
    **Raises:** `WeightsError` for weights that can't be read or do not fit, `FileNotFoundError` for
    no such source, `ValueError` for a dtype that weights are not loaded as, or for more than one of
    `sharding`, `stream` and `quantize`.
    """
    return load_kind(FLUX, source, config, dtype, Storage(sharding, stream, quantize))


def load_chroma(
    source: str | Path,
    *,
    config: ChromaConfig | None = None,
    dtype: DTypeLike | None = None,
    sharding: ShardingChoice = None,
    stream: bool = False,
    quantize: str | None = None,
) -> Chroma:
    """Load the transformer of Chroma. Arguments and errors as for `load_flux`."""
    storage = Storage(sharding, stream, quantize)
    return load_kind(CHROMA_TRANSFORMER, source, config, dtype, storage)


def load_clip(
    source: str | Path,
    *,
    config: ClipConfig | None = None,
    dtype: DTypeLike | None = None,
    sharding: ShardingChoice = None,
) -> Clip:
    """Load CLIP's text encoder. Arguments and errors as for `load_flux`."""
    return load_kind(CLIP, source, config, dtype, Storage(sharding))


def load_t5(
    source: str | Path,
    *,
    config: T5Config | None = None,
    dtype: DTypeLike | None = None,
    sharding: ShardingChoice = None,
    stream: bool = False,
    quantize: str | None = None,
) -> T5:
    """Load T5's encoder. Arguments and errors as for `load_flux`."""
    return load_kind(T5_XXL, source, config, dtype, Storage(sharding, stream, quantize))


def load_vae(
    source: str | Path,
    *,
    config: VaeConfig | None = None,
    dtype: DTypeLike | None = None,
    sharding: ShardingChoice = None,
) -> Vae:
    """Load the VAE. Arguments and errors as for `load_flux`."""
    return load_kind(VAE, source, config, dtype, Storage(sharding))


def load_controlnet(
    source: str | Path,
    *,
    config: ControlNetConfig | None = None,
    dtype: DTypeLike | None = None,
    sharding: ShardingChoice = None,
    stream: bool = False,
    quantize: str | None = None,
) -> ControlNet:
    """Load a ControlNet: InstantX's or Shakker's, or one of XLabs in its own layout or diffusers'.

    **Arguments:** `source`: a file, a folder, or a hub id, as
    "Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro-2.0". The others as for `load_flux`.
    **Raises:** as `load_flux`; `WeightsError` for a ControlNet for inpainting.
    """
    return load_kind(CONTROLNET, source, config, dtype, Storage(sharding, stream, quantize))


class Storage(NamedTuple):
    """Where and how the weights are kept; at most one of the three. As for `load_flux`."""

    sharding: ShardingChoice = None
    stream: bool = False
    quantize: str | None = None


def load_kind(
    kind: Kind, source: str | Path, config: Any, dtype: DTypeLike | None, storage: Storage
) -> Any:
    """Load a network of any kind. Arguments and errors as for `load_flux`."""
    dtype = check_dtype(f"load_{kind.name}", dtype)
    sharding, stream, eight_bits = storage
    if (sharding is not None) + stream + (eight_bits is not None) > 1:
        raise ValueError(
            "Streamed and quantized weights are read by one device. "
            "Pass one of sharding=, stream= and quantize=."
        )
    plan = plan_of_source(kind, source, config)
    if eight_bits is not None:
        return load_quantized(plan, eight_bits, dtype=dtype)
    if stream:
        return load_streamed(plan, dtype=dtype)
    return load(plan, dtype=dtype, sharding=sharding)


def plan_of_source(kind: Kind, source: str | Path, config: Any = None) -> Plan:
    """Return which tensors of a source's files fill a network, downloaded if need be.

    **Raises:** as `load_flux`.
    """
    return open_source(find_part(source, hub_folder(source, kind))).network(kind).plan(config)


def load_tokenizers(source: str | Path) -> Tokenizers:
    """Read the tokenizers, from `tokenizer` and, of FLUX.1, `tokenizer_2` of a model's folder.

    **Arguments:** `source`: a folder, a zoo name, or a hub id.
    **Raises:** `FileNotFoundError` for a source without them, as files of weights are; `ValueError`
    for damaged ones.
    """
    family = family_of_source(source)
    root = find_source(source, list(family.tokenizers))
    if not (root / family.tokenizers[0]).is_dir():
        names = " and ".join(f"`{folder}`" for folder in family.tokenizers)
        raise FileNotFoundError(
            f"{source} comes without tokenizers. Pass a folder that holds it beside {names}, which "
            f"are the same for all of {family.name}."
        )
    folders = dict(zip(family.text_encoders, family.tokenizers, strict=True))
    clip = root / folders["clip"] if "clip" in folders else None
    return Tokenizers.read(clip, root / folders["t5"])


def activation_dtype() -> DTypeLike:
    """Return the default dtype of activations: bfloat16 on accelerators, float32 on CPU."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
