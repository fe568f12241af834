"""Adapters that read more features of each image token than their base: its input is widened."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar, cast

import equinox as eqx

from fluxjax.checkpoint.errors import WeightsError
from fluxjax.lora.adapter import Lora
from fluxjax.lora.changes import INPUT_WEIGHT, WeightChanges, input_problems
from fluxjax.nets.flux import Flux
from fluxjax.nets.flux_config import FluxConfig
from fluxjax.nets.widen import widen_input

Network = TypeVar("Network", bound=eqx.Module)


def widen_for_changes(model: Network, changes: WeightChanges) -> Network:
    """Return a network with zeros for the input features that an adapter adds.

    Adapters of FLUX.1 Fill, Canny and Depth add those of a condition. Other networks are returned
    as they are.

    **Arguments:**

    - `model`: a network, or the shapes of one while tracing.
    - `changes`: that fit the network, from `changes_of`.
    """
    if not isinstance(model, Flux) or INPUT_WEIGHT not in changes:
        return model
    columns = max(change.term.columns or 0 for change, _ in changes[INPUT_WEIGHT])
    wide = widen_input(model, max(0, columns - model.config.in_channels))
    return cast(Network, wide)


def adapted_config(config: FluxConfig, loras: Sequence[Lora]) -> FluxConfig:
    """Return the config of a transformer that adapters are merged into or attached to.

    **Arguments:**

    - `config`: of the transformer without them.
    - `loras`: the adapters.

    **Raises:** `WeightsError` for an adapter that can't widen it.
    """
    columns = []
    for lora in loras:
        for change in lora.changes.get("flux", {}).get(INPUT_WEIGHT, ()):
            columns.append(change.term.columns or config.in_channels)
    problems = input_problems(config, columns)
    if problems:
        raise WeightsError(
            f"The adapter does not fit this Flux: {'; '.join(problems)}. "
            "Pass the model it was made for."
        )
    return replace(config, in_channels=max([config.in_channels, *columns]))
