"""What networks a file or a folder holds, told from the headers alone."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import equinox as eqx

from fluxjax.checkpoint import configs, names as tables
from fluxjax.checkpoint.combine import combine_packed
from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.gguf import read_gguf
from fluxjax.checkpoint.gguf_header import GGUF_MAGIC
from fluxjax.checkpoint.json_file import read_json
from fluxjax.checkpoint.kinds import KINDS, OWN_METADATA, T5_XXL, Kind
from fluxjax.checkpoint.names import Dialect
from fluxjax.checkpoint.plan import Parts, Plan, Problems, abstract, match, plan
from fluxjax.checkpoint.safetensors import read_header
from fluxjax.checkpoint.shards import read_index
from fluxjax.checkpoint.tensors import (
    MOST_TENSORS,
    StoredTensor,
    Tensor,
    TensorFile,
    check_regular_file,
)
from fluxjax.nets.flux import FluxConfig
from fluxjax.nets.stack import block_name, is_stacked
from fluxjax.nets.vae import VaeConfig
from fluxjax.printable import printable, printable_path, quote_name

# All-in-one files hold these beside the networks.
_UNNEEDED = {
    "text_encoders.clip_l.logit_scale",
    "text_encoders.t5xxl.logit_scale",
    "text_encoders.clip_l.text_projection.weight",
}
_ADAPTERS = (
    "lora_A",
    "lora_B",
    "lora_down",
    "lora_up",
    "lokr_w1",
    "lokr_w1_a",
    "hada_w1_a",
    "dora_scale",
    "lora_magnitude_vector",
    "oft_blocks",
    "oft_R",
    "boft_R",
    "set_weight",
)
_OTHERS = {
    "double_stream_modulation_img": "FLUX.2",
    "distilled_guidance_layer": "Chroma",
    "joint_blocks": "Stable Diffusion 3",
    "input_blocks": "Stable Diffusion 1, 2 or XL",
    "down_blocks.0.attentions": "Stable Diffusion's UNet",
    "controlnet_blocks": "a ControlNet",
    "controlnet_double_blocks": "a ControlNet",
    "vision_model": "a CLIP vision encoder",
}


@dataclass(frozen=True)
class FoundNetwork:
    """One network's weights on disk. `tensors`: by the dialect's names. `own`: its config as fluxjax wrote it in the
    metadata, if it did. `settings`: its config.json, if there is one."""

    kind: Kind
    dialect: Dialect
    tensors: Mapping[str, Tensor]
    own: Any
    settings: Mapping[str, Any] | None
    files: tuple[Path, ...]

    @cached_property
    def config(self) -> Any:
        """Its config: config.json, else fluxjax's own metadata, else the shapes tell. **Raises:** `WeightsError`."""
        file = printable_path(self.files[0])
        try:
            if self.settings is not None:
                return self.kind.from_json(self.settings)
            return (
                self.kind.from_shapes(self._shapes)
                if self.own is None
                else configs.from_dict(self.kind.config, self.own)
            )
        except ValueError as error:
            whose = "The shapes in" if self.own is None else "fluxjax's metadata in"
            where = f"{whose} {file}" if self.settings is None else f"The config.json beside {file}"
            raise WeightsError(f"{where} makes no {self.kind.title}: {error}") from error

    @property
    def _shapes(self) -> configs.Shapes:
        found = [(self.dialect.find(key), tensor.shape) for key, tensor in self.tensors.items()]
        return {match[0]: shape for match, shape in found if match is not None}

    def check(self, config: Any = None) -> tuple[Plan, Problems]:
        """Return where each tensor goes, and what does not fit. **Raises:** `WeightsError` if its config is not known."""
        return match(*self._arguments(config))

    def plan(self, config: Any = None) -> Plan:
        """Return where each tensor goes. **Raises:** `WeightsError` that lists all that does not fit."""
        return plan(*self._arguments(config))

    def _arguments(self, config: Any) -> tuple[eqx.Module, Mapping[str, Tensor], Dialect, Parts]:
        config = self.config if config is None else config
        network = abstract(self.kind.network, config)
        return network, self.tensors, dialect_for(self.dialect, config), fused_parts(config)


def dialect_for(dialect: Dialect, config: Any) -> Dialect:
    """Return a dialect for a network of this config: BFL number a VAE's levels from the other end."""
    return (
        tables.vae_bfl(len(config.channels))
        if dialect.name == "bfl" and isinstance(config, VaeConfig)
        else dialect
    )


def fused_parts(config: Any) -> Parts:
    """Return the rows that q, k, v and the MLP take in the transformer's fused weights; other networks have none."""
    return fused_rows(config.width, config.mlp_width) if isinstance(config, FluxConfig) else {}


def fused_rows(width: int, mlp_width: int) -> Parts:
    """Return the rows of the parts of a transformer's fused weights."""
    rows = {name: slice(i * width, (i + 1) * width) for i, name in enumerate("qkv")}
    return rows | {"qkv": slice(0, 3 * width), "mlp": slice(3 * width, 3 * width + mlp_width)}


@dataclass(frozen=True)
class Source:
    """What a file or folder holds. `strangers`: files that hold no network of FLUX, and why. `left`: tensors beside the
    networks' that belong to none."""

    path: Path
    parts: Mapping[str, FoundNetwork]
    strangers: Mapping[Path, str]
    left: Sequence[str] = ()

    def part(self, kind: Kind) -> FoundNetwork:
        """Return the weights of one network. **Raises:** `WeightsError` if it holds none."""
        if kind.name in self.parts:
            return self.parts[kind.name]
        if self.strangers and not self.parts:
            raise WeightsError(next(iter(self.strangers.values())))
        held = ", ".join(f"a {part.kind.title}" for part in self.parts.values()) or "no weights"
        raise WeightsError(
            f"{printable_path(self.path)} holds no {kind.title}, but {held}. Pass the {kind.title}'s own file or folder."
        )


def read_file(path: Path) -> TensorFile:
    """Return what a safetensors or GGUF file holds. **Raises:** `WeightsError` for any other, or a damaged one."""
    check_regular_file(path)
    with open(path, "rb") as file:
        magic = file.read(4)
    return read_gguf(path) if magic == GGUF_MAGIC else read_header(path)


def open_source(path: Path) -> Source:
    """Find the networks in a file or a folder of any known layout; weights are not read.

    In a folder, first the parts' own folders (`transformer`, …), then the files in it, shards by their index.
    **Raises:** `WeightsError` for a damaged file, or two of one network; `FileNotFoundError` for no such path.
    """
    if path.is_file():
        if path.name.endswith(".index.json"):
            return _collect(path, [(read_index(path), None)])
        return _collect(path, [([path], None)])
    if not path.is_dir():
        if path.exists():
            check_regular_file(path)
        raise FileNotFoundError(
            f"There is no {path}. Pass a .safetensors or .gguf file, or a model's folder."
        )
    folders = [path / kind.folder for kind in KINDS.values() if (path / kind.folder).is_dir()]
    source = _collect(path, [group for folder in folders for group in _groups(folder)])
    missing = [kind for kind in KINDS if kind not in source.parts]
    if not missing:
        return source
    beside = _collect(path, _groups(path))
    return Source(
        path,
        {**beside.parts, **source.parts},
        {**source.strangers, **beside.strangers},
        [*source.left, *beside.left],
    )


Group = tuple[Sequence[Path], Mapping[str, Any] | None]
"""Files that belong together, and the config.json beside them."""


def _groups(folder: Path) -> list[Group]:
    """Return the weight files of a folder: those of each index together, the rest one by one."""
    settings = _settings(folder / "config.json")
    indices = sorted(folder.glob("*.safetensors.index.json"))
    sharded = [read_index(index) for index in indices]
    taken = {file for files in sharded for file in files}
    alone = sorted(
        file for pattern in ("*.safetensors", "*.gguf", "*.sft") for file in folder.glob(pattern)
    )
    groups = [*sharded, *([file] for file in alone if file not in taken)]
    if settings is not None and len(groups) > 1:
        found = printable(", ".join(group[0].name for group in groups))
        raise WeightsError(
            f"{printable_path(folder)} should hold one network, or its shards and their index; it holds {found}. Remove one."
        )
    if not groups and (
        pickles := [*folder.glob("*.bin"), *folder.glob("*.ckpt"), *folder.glob("*.pt")]
    ):
        read_header(pickles[0])  # says that it is a pickle
    return [(group, settings) for group in groups]


def _settings(path: Path) -> Mapping[str, Any] | None:
    if not path.exists():
        return None
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise WeightsError(f"{printable_path(path)} is not a config. Download it anew.")
    return settings


def _collect(path: Path, groups: Sequence[Group]) -> Source:
    parts: dict[str, FoundNetwork] = {}
    strangers: dict[Path, str] = {}
    left: list[str] = []
    for paths, settings in groups:
        files = [read_file(file) for file in paths]
        found, rest = identify(files, settings)
        for part in found:
            other = parts.setdefault(part.kind.name, part)
            if other is not part:
                names = " and ".join(printable(one.files[0].name) for one in (other, part))
                raise WeightsError(
                    f"{printable_path(path)} holds two {part.kind.title}s, in {names}. Pass one of the files."
                )
        if found:
            left += rest
        else:
            strangers[paths[0]] = what_else(paths[0], files)
    return Source(path, parts, strangers, left)


def identify(
    files: Sequence[TensorFile], settings: Mapping[str, Any] | None = None
) -> tuple[list[FoundNetwork], list[str]]:
    """Return the networks in files that belong together, and the tensors that are of none.

    **Raises:** `WeightsError` for a tensor that comes twice.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        twice = sorted(tensors.keys() & file.tensors.keys())
        if twice:
            other = printable_path(tensors[twice[0]].file)
            raise WeightsError(
                f"{printable_path(file.path)} holds {quote_name(twice[0])}, which {other} holds too. Remove one of the files."
            )
        tensors |= file.tensors
    own, paths = _own_metadata(files), tuple(file.path for file in files)
    if own is not None and own.get("layout") == tables.OWN.name:
        if len(own["parts"]) != 1:
            raise WeightsError(f"{printable_path(paths[0])}: fluxjax's metadata names {len(own['parts'])} networks, and the own layout "
                               "has one in a file. Convert the file anew.")  # fmt: skip
        ((name, config),) = own["parts"].items()
        return [FoundNetwork(KINDS[name], tables.OWN, _unstacked(tensors), config, None, paths)], []
    _check_method(settings, paths)
    tensors = combine_packed(tensors, files)
    described = {} if own is None else own["parts"]
    parts = []
    for kind in KINDS.values():
        found = _find(kind, tensors)
        if found is None:
            continue
        prefix, dialect = found
        mine = {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
        parts.append(
            FoundNetwork(
                kind, dialect, _one_embedding(kind, mine), described.get(kind.name), settings, paths
            )
        )
    return parts, sorted(tensors.keys() - _UNNEEDED)


def _check_method(settings: Mapping[str, Any] | None, paths: Sequence[Path]) -> None:
    """**Raises:** `WeightsError` if a config.json says that the weights are stored in a way that can't be decoded."""
    described = (settings or {}).get("quantization_config")
    method = described.get("quant_method") if isinstance(described, dict) else None
    if method is not None and method not in ("bitsandbytes", "bfl"):
        raise WeightsError(
            f"{printable_path(paths[0])} is quantized by {printable(str(method), 40)} (its config.json), which fluxjax can't decode. "
            "Use the model's bfloat16, bitsandbytes or GGUF weights."
        )


def _find(kind: Kind, tensors: Mapping[str, Tensor]) -> tuple[str, Dialect] | None:
    """Return the prefix and the dialect of a network, if it is there: whole ones by their mark, others by any name."""
    for prefix in kind.prefixes:
        for dialect in kind.dialects:
            if (
                prefix + dialect.mark in tensors
                or prefix + dialect.prefix + dialect.mark in tensors
            ):
                return prefix, dialect
    for prefix in kind.prefixes:
        names = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
        for dialect in kind.dialects:
            if _knows_most(dialect, names):
                return prefix, dialect
    return None


def _knows_most(dialect: Dialect, names: Sequence[str]) -> bool:
    """Return whether more than half of the names are a dialect's; the rest is not looked at once half of them are not."""
    unknown = (name for name in names if dialect.find(name) is None)
    most = (len(names) + 1) // 2
    return len(names) > 0 and len(list(islice(unknown, most))) < most


def _own_metadata(files: Sequence[TensorFile]) -> Mapping[str, Any] | None:
    text = next(
        (file.metadata[OWN_METADATA] for file in files if OWN_METADATA in file.metadata), None
    )
    if text is None:
        return None
    try:
        own = json.loads(text)
    except (ValueError, RecursionError):
        own = None
    parts = own.get("parts") if isinstance(own, dict) else None
    if not isinstance(parts, dict) or not parts or not parts.keys() <= KINDS.keys():
        raise WeightsError(
            f"{printable_path(files[0].path)}: fluxjax's metadata is damaged. Download or convert the file anew."
        )
    return own


def _unstacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the own layout with stacked ones taken apart, as the other layouts have them."""
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stacked = is_stacked(name) and len(tensor.shape) > 0 and tensor.size > 0
        if (
            stacked
            and isinstance(tensor, StoredTensor)
            and len(apart) + tensor.shape[0] <= MOST_TENSORS
        ):
            apart.update((block_name(name, i), block) for i, block in enumerate(tensor.split()))
        else:
            apart[name] = tensor
    return apart


def _one_embedding(kind: Kind, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Some T5 files hold the embedding under its second name alone."""
    second = "encoder.embed_tokens.weight"
    if kind is T5_XXL and second in tensors and "shared.weight" not in tensors:
        tensors["shared.weight"] = tensors.pop(second)
    return tensors


def what_else(path: Path, files: Sequence[TensorFile]) -> str:
    """Say what a file holds that is none of the networks."""
    where, names = printable_path(path), [name for file in files for name in file.tensors]
    pieces = {piece for name in names for piece in name.split(".")}
    if "wscales" in pieces:  # it holds low-rank parts too, so it is looked for first
        return f"{where} is a Nunchaku (SVDQuant) model, which fluxjax does not read. Pass the model that it was made from."
    if pieces & set(_ADAPTERS) or any(name.startswith("lora_") for name in names):
        return f"{where} is a LoRA, not a model. Pass the model that it adapts."
    for mark, model in _OTHERS.items():
        if any(mark in name for name in names):
            return f"{where} holds {model}, which is not FLUX.1. Pass a FLUX.1 checkpoint."
    some = printable(", ".join(names[:3])) or "no tensors at all"
    return f"{where} holds no network of FLUX: found {some}. Pass the network's own file or folder."


def variant(config: Any) -> str | None:
    """Return which of FLUX.1's transformers a config is: dev (Krea and Kontext are the same), schnell, Fill, Canny/Depth."""
    if not isinstance(config, FluxConfig):
        return None
    inputs = {64: "dev" if config.guidance_embed else "schnell", 384: "Fill", 128: "Canny/Depth"}
    name = inputs.get(config.in_channels, f"{config.in_channels} input features")
    known = replace(
        FluxConfig(), in_channels=config.in_channels, guidance_embed=config.guidance_embed
    )
    return name if config == known else f"{name}, of another size"
