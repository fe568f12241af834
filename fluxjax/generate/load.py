"""Networks and whole models from a name, a folder, a file or a hub id."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from fluxjax.arguments import convert_arguments
from fluxjax.checkpoint.defaults import load_defaults
from fluxjax.checkpoint.detect import open_source
from fluxjax.checkpoint.dtypes import check_dtype
from fluxjax.checkpoint.kinds import CLIP, FLUX, T5_XXL, VAE, Kind
from fluxjax.checkpoint.load import load, load_quantized
from fluxjax.checkpoint.locate import find, locate
from fluxjax.devices.offload import offload
from fluxjax.devices.shard import shard
from fluxjax.devices.specs import shardings
from fluxjax.devices.stream import load_streamed
from fluxjax.generate.tokens import Tokenizers
from fluxjax.nets.clip import Clip, ClipConfig
from fluxjax.nets.flux import Flux, FluxConfig
from fluxjax.nets.t5 import T5, T5Config
from fluxjax.nets.vae import Vae, VaeConfig
from fluxjax.zoo import Defaults

Network = TypeVar("Network", bound=eqx.Module)


def load_flux(
    source: str | Path,
    *,
    config: FluxConfig | None = None,
    dtype: DTypeLike | None = None,
    sharding: Any = None,
    stream: bool = False,
    quantize: str | None = None,
) -> Flux:
    """Load the transformer.

    **Arguments:** `source`: a zoo name ("tiny", "dev", …), a file or a folder of any layout (the documentation's page on
    weights lists them), or a hub id. `config`: in place of what the source says, for a file that does not tell. `dtype`: of
    the weights, a float of 8 to 64 bits; None keeps the file's, and decodes quantized weights to bfloat16. `sharding`: a
    `jax.sharding.Sharding` for every leaf, a pytree of them, or a function that makes one of the network of shapes; a process
    reads its devices' slices alone. `stream`: leave the blocks' matrices in the files, from which each is read whenever it is
    used, the next one ahead: for a machine whose memory does not hold them. `quantize`: "int8" or "fp8": round the blocks'
    matrices as they are read, as `fluxjax.quantize` does.
    **Raises:** `WeightsError` for weights that can't be read or do not fit, `FileNotFoundError` for no such source,
    `ValueError` for a dtype that weights are not loaded as, or more than one of `sharding`, `stream` and `quantize`.
    """
    return _load(FLUX, source, config, dtype, sharding, stream, quantize)


def load_clip(
    source: str | Path,
    *,
    config: ClipConfig | None = None,
    dtype: DTypeLike | None = None,
    sharding: Any = None,
) -> Clip:
    """Load CLIP's text encoder. Arguments and errors as for `load_flux`."""
    return _load(CLIP, source, config, dtype, sharding)


def load_t5(
    source: str | Path,
    *,
    config: T5Config | None = None,
    dtype: DTypeLike | None = None,
    sharding: Any = None,
    stream: bool = False,
    quantize: str | None = None,
) -> T5:
    """Load T5's encoder. Arguments and errors as for `load_flux`."""
    return _load(T5_XXL, source, config, dtype, sharding, stream, quantize)


def load_vae(
    source: str | Path,
    *,
    config: VaeConfig | None = None,
    dtype: DTypeLike | None = None,
    sharding: Any = None,
) -> Vae:
    """Load the VAE. Arguments and errors as for `load_flux`."""
    return _load(VAE, source, config, dtype, sharding)


def _load(
    kind: Kind,
    source: str | Path,
    config: Any,
    dtype: DTypeLike | None,
    sharding: Any,
    stream: bool = False,
    quantize: str | None = None,
) -> Any:
    dtype = check_dtype(f"load_{kind.name}", dtype)
    if (sharding is not None) + stream + (quantize is not None) > 1:
        raise ValueError(
            "What is streamed or quantized is read by one device. Pass one of sharding=, stream= and quantize=."
        )
    plan = open_source(locate(source, kind.folder)).network(kind).plan(config)
    if quantize is not None:
        return load_quantized(plan, quantize, dtype=dtype)
    return (
        load_streamed(plan, dtype=dtype) if stream else load(plan, dtype=dtype, sharding=sharding)
    )


def load_tokenizers(source: str | Path) -> Tokenizers:
    """Read both tokenizers, from `tokenizer` and `tokenizer_2` of a model's folder, a zoo name, or a hub id.

    **Raises:** `FileNotFoundError` for a source without them, as files of weights are; `ValueError` for damaged ones.
    """
    folder = find(source, ["tokenizer", "tokenizer_2"])
    if not (folder / "tokenizer").is_dir():
        raise FileNotFoundError(
            f"{source} comes without tokenizers. Pass a folder that holds it beside `tokenizer` and `tokenizer_2`, which are "
            "the same for all of FLUX.1."
        )
    return Tokenizers.read(folder / "tokenizer", folder / "tokenizer_2")


class Models(NamedTuple):
    """All that text to image needs, with the defaults it was made for, and the mesh that the networks lie on, if any."""

    tokenizers: Tokenizers
    clip: Clip
    t5: T5
    flux: Flux
    vae: Vae
    defaults: Defaults
    mesh: Mesh | None = None


@convert_arguments
def load_models(
    source: str | Path,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    offload_encoders: bool = False,
) -> Models:
    """Load every part of a model, from a zoo name, a diffusers folder or a hub id.

    **Arguments:** `dtype`: of the weights; None keeps the files'. `mesh`: of devices, from `make_mesh`, each of which is given
    its part of the networks; then `text_to_image` runs on it. `offload_encoders`: keep the text encoders in host memory, from
    which they are fetched while they are used.
    **Raises:** as `fluxjax.zoo.load_flux`; `ValueError` for a mesh that does not divide heads and hidden features.
    """

    def load(loader: Callable[..., Network]) -> Network:
        if mesh is None:
            return loader(source, dtype=dtype)
        return shard(
            loader(source, dtype=dtype, sharding=lambda network: shardings(network, mesh)), mesh
        )

    def encoder(loader: Callable[..., Network]) -> Network:
        return offload(load(loader)) if offload_encoders else load(loader)

    networks = encoder(load_clip), encoder(load_t5), load(load_flux), load(load_vae)
    return Models(load_tokenizers(source), *networks, load_defaults(source), mesh)


def activation_dtype() -> DTypeLike:
    """Return the default dtype of activations: bfloat16 on accelerators, float32 on CPU."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
