"""A plan of weights in files that adds adapters to each weight as it is read."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fluxjax.checkpoint.plan import Index, Plan, Shape
from fluxjax.checkpoint.weights import parameter_names
from fluxjax.lora.adapter import Lora
from fluxjax.lora.changes import changes_of
from fluxjax.lora.merge import MergedWeights
from fluxjax.lora.scales import Scales, check_scales
from fluxjax.nets.stack import is_stacked


@dataclass(frozen=True)
class MergedPlan(Plan):
    """A plan whose leaves have adapters added, one block of a weight at a time.

    Whatever loads leaf by leaf, or rounds block by block, then never holds the whole network
    without adapters, nor with them.

    `merged`: the weights with their adapters.
    """

    merged: MergedWeights

    def leaf(self, name: str, shape: Shape, dtype: np.dtype, index: Index) -> np.ndarray:
        """Return a region of a leaf, as of `Plan`, with adapters added in float32 and cast once."""
        names = parameter_names(name, shape)
        stacked = is_stacked(name)
        if stacked:
            names = names[index[0]]
        if not any(parameter in self.merged.changes for parameter in names):
            return super().leaf(name, shape, dtype, index)
        inner = index[1:] if stacked else index
        blocks = []
        for parameter in names:
            whole = self.merged.read(parameter, slice(None), dtype)
            blocks.append(whole[tuple(inner)])
        return np.stack(blocks) if stacked else blocks[0]


def merged_plan(plan: Plan, loras: Sequence[Lora], scales: Scales) -> MergedPlan:
    """Return a plan with adapters; what `merge` would give of the loaded network, bit by bit.

    **Arguments:** `scales`: one for each adapter, as of `merge`.
    **Raises:** `WeightsError` and `ValueError` as `merge`; for weights that overflow when they are
    read.
    """
    checked = check_scales("merge", len(loras), scales)
    merged = MergedWeights(plan, changes_of(plan.network, loras, checked))
    return MergedPlan(merged.network, plan.sources, plan.parameters, merged)
