"""Networks and whole models from a name, a folder, a file or a hub id."""

import html
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, Sharding
from jax.typing import DTypeLike

from fluxjax.arguments import convert_arguments
from fluxjax.checkpoint.defaults import load_defaults
from fluxjax.checkpoint.detect import open_source
from fluxjax.checkpoint.dtypes import check_dtype
from fluxjax.checkpoint.family import family_of_source, hub_folder
from fluxjax.checkpoint.kinds import (
    CHROMA_TRANSFORMER,
    CLIP,
    CONTROLNET,
    FLUX,
    KINDS,
    T5_XXL,
    VAE,
    Kind,
)
from fluxjax.checkpoint.load import load, load_quantized
from fluxjax.checkpoint.locate import find_part, find_source
from fluxjax.checkpoint.plan import Plan
from fluxjax.devices.offload import offload
from fluxjax.devices.shard import shard
from fluxjax.devices.specs import shardings
from fluxjax.devices.stream import load_streamed, stream_blocks
from fluxjax.generate.tokens import Tokenizers
from fluxjax.lora.adapter import Lora
from fluxjax.lora.attach import attach
from fluxjax.lora.merge import merge, notes_of
from fluxjax.lora.merged_plan import merged_plan
from fluxjax.lora.networks import is_plain
from fluxjax.nets.chroma import Chroma
from fluxjax.nets.chroma_config import ChromaConfig
from fluxjax.nets.clip import Clip, ClipConfig
from fluxjax.nets.controlnet import ControlNet
from fluxjax.nets.controlnet_config import ControlNetConfig
from fluxjax.nets.flux import Flux
from fluxjax.nets.flux_config import FluxConfig
from fluxjax.nets.packed import decode_weights
from fluxjax.nets.rounding import quantize
from fluxjax.nets.stack import unroll
from fluxjax.nets.summary import network_size
from fluxjax.nets.t5 import T5, T5Config
from fluxjax.nets.transformer import AbstractTransformer
from fluxjax.nets.vae import Vae, VaeConfig
from fluxjax.zoo import Defaults, Family

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


class Models(NamedTuple):
    """All that text to image needs.

    `clip`: None for models that read prompts by T5 alone. `flux`: the transformer, also of another
    family. `defaults`: how the model is meant to be sampled. `mesh`: the devices that the networks
    lie on, if they are sharded.
    """

    tokenizers: Tokenizers
    clip: Clip | None
    t5: T5
    flux: AbstractTransformer
    vae: Vae
    defaults: Defaults
    mesh: Mesh | None = None

    def __repr__(self) -> str:
        lines = [f"Models({self.defaults}, mesh={self.mesh})"]
        for name in ("flux", "clip", "t5", "vae"):
            network = getattr(self, name)
            if network is not None:
                lines.append(f"{name}: {network!r}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Return a table of the networks, for notebooks."""
        rows = [
            "<tr><th></th><th>network</th><th>parameters</th><th>memory</th><th>dtypes</th></tr>"
        ]
        for name in ("flux", "clip", "t5", "vae"):
            network = getattr(self, name)
            if network is not None:
                parameters, memory, dtypes = network_size(network)
                cells = (name, type(network).__name__, f"{parameters:,}", memory, dtypes)
                rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
        text = html.escape(f"{self.defaults}, mesh={self.mesh}")
        return f"<table>{''.join(rows)}</table><p>{text}</p>"

    @property
    def networks(self) -> tuple[eqx.Module, ...]:
        """The networks that there are, the transformer first."""
        found = (self.flux, self.t5, self.clip, self.vae)
        return tuple(network for network in found if network is not None)


def assemble_models(
    tokenizers: Tokenizers,
    networks: Mapping[str, Any],
    *,
    family: Family,
    defaults: Defaults,
    mesh: Mesh | None,
) -> Models:
    """Return models of loaded networks.

    **Arguments:** `networks`: by the names that the family has for them.
    """
    return Models(
        tokenizers,
        networks.get("clip"),
        networks["t5"],
        networks[family.transformer],
        networks["vae"],
        defaults,
        mesh,
    )


@convert_arguments
def load_models(
    source: str | Path,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    offload_encoders: bool = False,
    quantize: str | None = None,
    stream: bool = False,
    files: Mapping[str, str | Path] | None = None,
) -> Models:
    """Load every part of a model, from a zoo name, a diffusers folder or a hub id.

    **Arguments:** `dtype`: of the weights; None keeps the files'. `mesh`: of devices, from
    `make_mesh`, each of which gets its part of the networks; `text_to_image` then runs on it.
    `offload_encoders`: keep the text encoders in host memory, from which they are fetched while
    they are used. `quantize`: round the blocks' matrices of the transformer and T5, as
    `load_flux`. `stream`: keep these blocks in host memory (on a CPU: in their files) and fetch one
    at a time. `files`: that replace networks, by "flux", "vae", "t5" and "clip".
    **Raises:** as `load_flux`; `ValueError` for a mesh that does not divide heads and hidden
    features, for `stream` with `quantize` or `mesh`, and for a file of a network that there is not.
    """
    if stream and (quantize is not None or mesh is not None):
        raise ValueError(
            "`load_models(stream=True)` passes the weights as they are through one device. Leave "
            "out quantize= and mesh=."
        )
    known = {"flux", *family_of_source(source).networks}
    unknown = sorted(set(files or {}) - known)
    if unknown:
        raise ValueError(
            f"`load_models(files)` replaces {', '.join(sorted(known))} of this model, got "
            f"{unknown[0]!r}. Name one of these."
        )
    options = LoadOptions(
        dtype=dtype, mesh=mesh, quantize=quantize, stream=stream, files=dict(files or {})
    )
    return load_parts(source, lambda name: options, offload_encoders=offload_encoders)


def load_parts(
    source: str | Path,
    options_of: "Callable[[str], LoadOptions]",
    *,
    offload_encoders: bool,
    load: Callable[[str, Callable[[], Any]], Any] = lambda name, function: function(),
    note: Callable[[str], None] = lambda text: None,
) -> Models:
    """Load every part of a model.

    **Arguments:** `options_of`: the name of a network -> how it is loaded, all on the same mesh.
    `load`: (name of a part, function) -> function(), which loads it. `note`: as for `load_network`.
    """
    family = family_of_source(source)
    tokenizers = load("tokenizers", lambda: load_tokenizers(source))
    networks = {}
    for name in family.networks:

        def load_one(name: str = name) -> eqx.Module:
            network = load_network(name, source, options_of(name), note=note)
            return (
                offload(network) if offload_encoders and name in family.text_encoders else network
            )

        networks[name] = load(name, load_one)
    mesh = options_of(family.transformer).mesh
    return assemble_models(
        tokenizers, networks, family=family, defaults=load_defaults(source), mesh=mesh
    )


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How networks are loaded for drawing.

    `dtype`: of the weights; None keeps the files'. `files`: files or folders whose networks replace
    the model's, by "flux" (its transformer, of any family), "vae", "t5" and "clip". `mesh`: of
    devices that share the networks. `adapters`: with their scales, merged into the networks that
    they change, or attached to those whose matrices are packed in their files. `quantize`,
    `stream`, `unroll`: for the blocks of the transformer, of T5 and of ControlNets: round their
    matrices as `fluxjax.quantize` does; keep them in host memory (on a CPU: in their files) and
    fetch one block at a time, with adapters attached rather than merged; compile each block by
    itself.
    """

    dtype: DTypeLike | None = None
    files: Mapping[str, str | Path] = field(default_factory=dict)
    mesh: Mesh | None = None
    adapters: tuple[tuple[Lora, float], ...] = ()
    quantize: str | None = None
    stream: bool = False
    unroll: bool = False

    def source_of(self, name: str, model: str | Path) -> str | Path:
        """Return where a network is loaded from: its own file, or the model."""
        return self.files.get("flux" if name in _TRANSFORMERS else name, model)

    def adapters_of(self, name: str) -> tuple[tuple[Lora, float], ...]:
        """Return the adapters that change a network."""
        role = KINDS[name].role
        return tuple((lora, scale) for lora, scale in self.adapters if role in lora.changes)


_LOADERS: Mapping[str, Callable[..., Any]] = {
    "flux": load_flux,
    "chroma": load_chroma,
    "clip": load_clip,
    "t5": load_t5,
    "vae": load_vae,
    "controlnet": load_controlnet,
}
_TRANSFORMERS = ("flux", "chroma")
_WITH_LARGE_BLOCKS = ("flux", "chroma", "t5", "controlnet")
"""The networks whose blocks are worth rounding, streaming and unrolling."""


def load_network(
    name: str,
    source: str | Path,
    options: LoadOptions,
    *,
    note: Callable[[str], None] = lambda text: None,
) -> Any:
    """Load one network for drawing.

    **Arguments:** `name`: "flux", "chroma", "clip", "t5", "vae" or "controlnet". `note`: called
    with a line for each part of an adapter that has no effect.
    """
    source = options.source_of(name, source)
    load_one = partial(_LOADERS[name], source, dtype=options.dtype)
    has_blocks = name in _WITH_LARGE_BLOCKS
    if has_blocks and options.stream:
        return _load_with_streamed_blocks(name, load_one, options, note)
    adapters = options.adapters_of(name)
    rounded = options.quantize if has_blocks else None
    mesh = options.mesh
    if rounded is not None and mesh is None:
        # Block by block, so that it is never whole in memory.
        network = _load_rounded(name, source, options, note)
    else:
        if mesh is not None:
            load_one = partial(load_one, sharding=lambda network: shardings(network, mesh))
        network = load_one()
        if rounded is not None:
            network = decode_weights(network, donate=True)
        if adapters:
            network = _with_adapters(network, adapters, note)
        if rounded is not None:
            network = quantize(network, rounded, donate=True)
    if has_blocks and options.unroll:
        network = unroll(network, donate=True)
    return network if mesh is None else shard(network, mesh)


def _with_adapters(
    network: Any, adapters: tuple[tuple[Lora, float], ...], note: Callable[[str], None]
) -> Any:
    """Return a network with adapters merged; attached, if its matrices stay packed."""
    _note_adapters(network, adapters, note)
    loras, scales = zip(*adapters, strict=True)
    if is_plain(network):
        return merge(network, loras, scales, donate=True)
    return attach(network, loras, scales)


def _load_rounded(
    name: str, source: str | Path, options: LoadOptions, note: Callable[[str], None]
) -> Any:
    """Load a network whose blocks' matrices are rounded as they are read, adapters added before."""
    assert options.quantize is not None
    plan = plan_of_source(KINDS[name], source)
    adapters = options.adapters_of(name)
    if adapters:
        _note_adapters(plan.network, adapters, note)
        loras, scales = zip(*adapters, strict=True)
        plan = merged_plan(plan, loras, scales)
    return load_quantized(plan, options.quantize, dtype=options.dtype)


def _load_with_streamed_blocks(
    name: str, load_one: Callable[..., Any], options: LoadOptions, note: Callable[[str], None]
) -> Any:
    """Load a network whose blocks stay in host memory, or in their files where that is the device's
    own memory."""
    if jax.default_backend() == "cpu":
        network = load_one(stream=True)
    else:
        device = jax.local_devices()[0]
        host = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
        network = stream_blocks(load_one(sharding=host))
    adapters = options.adapters_of(name)
    if not adapters:
        return network
    _note_adapters(network, adapters, note)
    loras, scales = zip(*adapters, strict=True)
    return attach(network, loras, scales)


def _note_adapters(
    network: eqx.Module, adapters: tuple[tuple[Lora, float], ...], note: Callable[[str], None]
) -> None:
    """Call `note` with what is worth knowing of each adapter on a network."""
    for lora, _ in adapters:
        for text in notes_of(network, lora):
            note(f"an adapter ({lora.format}): {text}")


def activation_dtype() -> DTypeLike:
    """Return the default dtype of activations: bfloat16 on accelerators, float32 on CPU."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
