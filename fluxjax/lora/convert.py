"""Adapters merged into weights while `convert_weights` converts them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fluxjax.checkpoint.detect import open_source
from fluxjax.checkpoint.folders import TRANSFORMER_FOLDER
from fluxjax.checkpoint.kinds import KINDS
from fluxjax.checkpoint.locate import find_source
from fluxjax.checkpoint.weights import Weights
from fluxjax.lora.adapter import Lora
from fluxjax.lora.changes import changes_of
from fluxjax.lora.merge import MergedWeights, notes_of
from fluxjax.lora.networks import TRANSFORMER
from fluxjax.lora.scales import Scale, Scales, check_scales


@dataclass(frozen=True, eq=False)
class AdapterMerge:
    """A `WeightsTransform` that merges adapters as the weights are read, with one scale each."""

    loras: tuple[Lora, ...]
    scales: tuple[Scale, ...]

    @property
    def networks(self) -> frozenset[str]:
        """The names of the networks that the adapters change."""
        names: set[str] = set()
        for lora in self.loras:
            names.update(lora.changes)
        return frozenset(names)

    def __call__(self, network: str, weights: Weights) -> Weights:
        loras, scales = [], []
        # An adapter may be for other networks too, whose changes do not concern this one.
        for lora, scale in zip(self.loras, self.scales, strict=True):
            if network in lora.changes:
                loras.append(lora)
                scales.append(scale)
        return MergedWeights(weights, changes_of(weights.network, loras, scales))

    def metadata(self, network: str) -> Mapping[str, int]:
        """Return the number of adapters that change a network, for the file's metadata."""
        count = 0
        for lora in self.loras:
            if network in lora.changes:
                count += 1
        return {"adapters": count}


def merge_while_converting(loras: Sequence[Lora], scales: Scales | None = None) -> AdapterMerge:
    """Return a transform for `convert_weights` that merges adapters into the weights it converts.

    Each weight is merged as it is read, as by `merge`, so that no network has to fit in memory:

        convert_weights("dev", "styled", transform=merge_while_converting([lora], [0.8]))

    **Arguments:** `loras`: adapters from `read_lora`. `scales`: one per adapter, 1 by default.
    **Returns:** the value for `convert_weights(transform)`.
    **Raises:** `ValueError` for another number of scales, or one that is not finite in float32.
    Adapters that do not fit a network are reported by `convert_weights`, as a `WeightsError`.
    """
    checked = check_scales("merge_while_converting", len(loras), scales)
    return AdapterMerge(tuple(loras), tuple(checked))


def adapter_notes(source: str | Path, loras: Sequence[Lora]) -> list[str]:
    """Return one line for each part of adapters that has no effect on a checkpoint's transformer.

    Only the headers of the files are read.

    **Arguments:** `source`: as for `convert_weights`. `loras`: adapters from `read_lora`.
    """
    found = open_source(find_source(source, [TRANSFORMER_FOLDER])).networks
    notes: list[str] = []
    for name in found:
        if KINDS[name].role != TRANSFORMER:
            continue
        network = found[name].plan().network
        for lora in loras:
            if TRANSFORMER in lora.changes:
                notes += notes_of(network, lora)
    return notes
