"""Which networks a set of files holds, from the keys, shapes and metadata in their headers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, cast

from fluxjax.checkpoint import names as tables, own_configs
from fluxjax.checkpoint.combine import combine_packed
from fluxjax.checkpoint.config_fields import JsonObject
from fluxjax.checkpoint.dialect import Dialect
from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.fused import FusedRows, fused_parts
from fluxjax.checkpoint.kinds import (
    CHROMA_TRANSFORMER,
    CLIP,
    CLIP_VISION,
    CONTROLNET,
    KINDS,
    OWN_METADATA,
    SIGLIP,
    T5_XXL,
    AnyKind,
    Kind,
    Network,
    dialect_for,
)
from fluxjax.checkpoint.match import Problems, complete_plan, match_tensors
from fluxjax.checkpoint.own_configs import Config
from fluxjax.checkpoint.plan import Plan
from fluxjax.checkpoint.shape_configs import Shapes
from fluxjax.checkpoint.tensors import MOST_TENSORS, StoredTensor, Tensor, TensorFile
from fluxjax.checkpoint.unknown import is_inpainting_control, is_radiance
from fluxjax.checkpoint.weights import abstract
from fluxjax.nets.stack import block_name, is_stacked
from fluxjax.printable import printable, printable_path, quote_name

# Files of several networks hold these beside them, unused.
_IGNORED = {
    "text_encoders.clip_l.logit_scale",
    "text_encoders.t5xxl.logit_scale",
    "text_encoders.clip_l.text_projection.weight",
}
_DECODED_METHODS = ("bitsandbytes", "bfl")
# A ControlNet and Chroma have keys of the transformer, and some of their own.
_LIKE_FLUX: tuple[AnyKind, ...] = (CONTROLNET, CHROMA_TRANSFORMER)
# A file of the whole SigLIP or CLIP holds a text encoder named as CLIP's too.
_FIRST: tuple[AnyKind, ...] = (*_LIKE_FLUX, SIGLIP, CLIP_VISION)
_SEARCHED: tuple[AnyKind, ...] = (*_FIRST, *(kind for kind in KINDS.values() if kind not in _FIRST))
"""The kinds in the order in which they are looked for."""


@dataclass(frozen=True)
class FoundNetwork(Generic[Config]):
    """One network's weights in files.

    `tensors`: by their keys in the dialect. `own_config`: its config in fluxjax's metadata, as
    JSON; None for a file that fluxjax did not write. `settings`: its config.json, if there is one.
    """

    kind: Kind[Config]
    dialect: Dialect
    tensors: Mapping[str, Tensor]
    own_config: object
    settings: JsonObject | None
    files: tuple[Path, ...]

    @cached_property
    def config(self) -> Config:
        """Its config: from config.json, else from fluxjax's metadata, else from the shapes.

        **Raises:** `WeightsError` that says which of these does not make one.
        """
        file = printable_path(self.files[0])
        try:
            if self.settings is not None:
                origin = f"The config.json beside {file}"
                return self.kind.from_json(self.settings)
            if self.own_config is not None:
                origin = f"fluxjax's metadata in {file}"
                return own_configs.from_dict(self.kind.config, self.own_config)
            origin = f"The shapes in {file}"
            return self.kind.from_shapes(self._shapes())
        except ValueError as error:
            raise WeightsError(f"{origin} makes no {self.kind.title}: {error}") from error

    def _shapes(self) -> Shapes:
        """Return the tensors' shapes by the parameters' names in fluxjax."""
        shapes = {}
        for key, tensor in self.tensors.items():
            found = self.dialect.find(key)
            if found is not None:
                shapes[found[0]] = tensor.shape
        return shapes

    def check(self, config: Config | None = None) -> tuple[Plan, Problems]:
        """Return which tensors fill each parameter, and all that does not fit.

        **Arguments:** `config`: of the network; None for the one that the files tell.
        **Raises:** `WeightsError` if the files tell no config.
        """
        return match_tensors(*self._matched(config))

    def plan(self, config: Config | None = None) -> Plan:
        """Return which tensors fill each parameter; `config` as for `check`.

        **Raises:** `WeightsError` that lists all that does not fit.
        """
        return complete_plan(*self._matched(config))

    def _matched(
        self, config: Config | None
    ) -> tuple[Network, Mapping[str, Tensor], Dialect, FusedRows]:
        """Return what `match_tensors` takes."""
        if config is None:
            config = self.config
        network = cast(Network, abstract(self.kind.network, config))
        return network, self.tensors, dialect_for(self.dialect, config), fused_parts(config)


AnyFoundNetwork = FoundNetwork[Any]
"""The weights of any of the networks."""


def identify_networks(
    files: Sequence[TensorFile], settings: JsonObject | None = None
) -> tuple[list[AnyFoundNetwork], list[str]]:
    """Return the networks in files that belong together, and the keys of tensors that are of none.

    **Arguments:** `files`: the headers. `settings`: the config.json beside them.
    **Raises:** `WeightsError` for a tensor that two files hold, damaged metadata, or weights that
    are quantized in a way that can't be decoded.
    """
    tensors = _all_tensors(files)
    paths = tuple(file.path for file in files)
    metadata = _own_metadata(files)
    # The own layout's names are those of the leaves, which need no searching.
    if metadata is not None and metadata.get("layout") == tables.OWN.name:
        return [_own_network(metadata, tensors, paths)], []
    _check_quantization(settings, paths)
    # Before keys are compared: scales beside a weight would be unknown tensors.
    tensors = combine_packed(tensors, files)
    if is_inpainting_control(tensors) or is_radiance(tensors):
        return [], sorted(tensors)
    own: JsonObject = {} if metadata is None else metadata["parts"]
    networks: list[AnyFoundNetwork] = []
    # A complete network has its dialect's marker. One without it is found by the names of its other
    # tensors, so that what is missing can be listed; only then, since encoders share some names.
    for find in (_find_by_marker, _find_by_other_keys):
        for kind in _SEARCHED:
            found = find(kind, tensors)
            if found is None or any(kind is network.kind for network in networks):
                continue
            prefix, dialect = found
            of_kind, tensors = _split(kind, prefix, tensors)
            if kind is T5_XXL:
                _rename_embedding(of_kind)
            own_config = own.get(kind.name)
            networks.append(FoundNetwork(kind, dialect, of_kind, own_config, settings, paths))
    return networks, sorted(tensors.keys() - _IGNORED)


def _all_tensors(files: Sequence[TensorFile]) -> dict[str, Tensor]:
    """Return the tensors of all files. **Raises:** `WeightsError` if two files hold the same."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        repeated = sorted(tensors.keys() & file.tensors.keys())
        if repeated:
            other = printable_path(tensors[repeated[0]].file)
            raise WeightsError(
                f"{printable_path(file.path)} holds {quote_name(repeated[0])}, which {other} "
                "holds too. Remove one of the files."
            )
        tensors |= file.tensors
    return tensors


def _own_metadata(files: Sequence[TensorFile]) -> JsonObject | None:
    """Return what fluxjax wrote in the metadata of the first file that has it, else None."""
    texts = []
    for file in files:
        if OWN_METADATA in file.metadata:
            texts.append(file.metadata[OWN_METADATA])
    if not texts:
        return None
    try:
        # All shards of a network have the same metadata.
        metadata = json.loads(texts[0])
    except (ValueError, RecursionError):
        metadata = None
    parts = metadata.get("parts") if isinstance(metadata, dict) else None
    if not isinstance(parts, dict) or not parts or not parts.keys() <= KINDS.keys():
        raise WeightsError(
            f"{printable_path(files[0].path)}: fluxjax's metadata is damaged. "
            "Download or convert the file again."
        )
    return metadata


def _own_network(
    metadata: JsonObject, tensors: Mapping[str, Tensor], paths: tuple[Path, ...]
) -> AnyFoundNetwork:
    """Return the network in files of fluxjax's own layout."""
    parts = metadata["parts"]
    if len(parts) != 1:
        raise WeightsError(
            f"{printable_path(paths[0])}: fluxjax's metadata names {len(parts)} networks, and the "
            "own layout has one in a file. Convert the file again."
        )
    ((name, config),) = parts.items()
    return FoundNetwork(KINDS[name], tables.OWN, _unstack(tensors), config, None, paths)


def _unstack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the own layout's tensors with one tensor per block, as the other layouts have them.

    A damaged header could ask for more blocks than there is memory for; those stay stacked, and
    are then reported as unexpected.
    """
    unstacked: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        # A tensor without values could have any number of blocks.
        has_blocks = is_stacked(name) and len(tensor.shape) > 0 and tensor.size > 0
        if (
            has_blocks
            and isinstance(tensor, StoredTensor)
            and len(unstacked) + tensor.shape[0] <= MOST_TENSORS
        ):
            for block, block_tensor in enumerate(tensor.split()):
                unstacked[block_name(name, block)] = block_tensor
        else:
            unstacked[name] = tensor
    return unstacked


def _check_quantization(settings: JsonObject | None, paths: Sequence[Path]) -> None:
    """**Raises:** `WeightsError` if config.json names a quantization that can't be decoded."""
    described = None
    if settings is not None:
        described = settings.get("quantization_config")
    if not isinstance(described, dict):
        return
    method = described.get("quant_method")
    if method is not None and method not in _DECODED_METHODS:
        raise WeightsError(
            f"{printable_path(paths[0])} is quantized by {printable(str(method), 40)} (its "
            "config.json), which fluxjax can't decode. Use the model's bfloat16, bitsandbytes or "
            "GGUF weights."
        )


def _find_by_marker(kind: AnyKind, tensors: Mapping[str, Tensor]) -> tuple[str, Dialect] | None:
    """Return the prefix and the dialect of a network whose dialect's marker is there, else None."""
    for prefix in kind.prefixes:
        for dialect in kind.dialects:
            marker = dialect.marker
            if prefix + marker in tensors or prefix + dialect.prefix + marker in tensors:
                return prefix, dialect
    return None


def _find_by_other_keys(kind: AnyKind, tensors: Mapping[str, Tensor]) -> tuple[str, Dialect] | None:
    """Return the prefix and the dialect of a network that most of the tensors are of, else None."""
    if kind in _LIKE_FLUX:
        # Most of their keys are those of the transformer too.
        return None
    for prefix in kind.prefixes:
        keys = [key.removeprefix(prefix) for key in tensors if key.startswith(prefix)]
        # The prefix "" is the last one, so that a file of several networks is not taken for one.
        for dialect in kind.dialects:
            if _has_most_of(dialect, keys):
                return prefix, dialect
    return None


def _has_most_of(dialect: Dialect, keys: Sequence[str]) -> bool:
    """Return whether more than half of the keys are of a dialect."""
    limit = (len(keys) + 1) // 2
    unknown = 0
    for key in keys:
        if dialect.find(key) is None:
            unknown += 1
            if unknown == limit:  # a damaged file can hold many keys, so the rest is not searched
                return False
    return len(keys) > 0


def _split(
    kind: AnyKind, prefix: str, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a network's tensors, whose keys begin with a prefix, without it, and the others."""
    # A file of the whole CLIP holds its text encoder beside the other one.
    is_part_of_clip = kind is CLIP_VISION and _find_by_marker(CLIP, tensors) is not None
    inside: dict[str, Tensor] = {}
    outside: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        is_inside = key.startswith(prefix)
        if is_part_of_clip:
            is_inside = is_inside and kind.dialects[0].find(key.removeprefix(prefix)) is not None
        if is_inside:
            inside[key.removeprefix(prefix)] = tensor
        else:
            outside[key] = tensor
    return inside, outside


def _rename_embedding(tensors: dict[str, Tensor]) -> None:
    """Give T5's embedding its usual key in files that hold it under the other one only."""
    other = "encoder.embed_tokens.weight"
    if other in tensors and "shared.weight" not in tensors:
        tensors["shared.weight"] = tensors.pop(other)
