"""What adapters change in one network, with their scales, checked against the network's shapes.

`merge` and `attach` both begin here. All checks need only shapes, so that an adapter that does
not fit is an error before any weight is read.
"""

from collections.abc import Iterator, Mapping, Sequence

import equinox as eqx

from fluxjax.checkpoint.chroma_names import EMBEDDERS
from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.fused import FusedRows, fused_parts
from fluxjax.checkpoint.kinds import KINDS
from fluxjax.checkpoint.weights import parameters_of
from fluxjax.lora.adapter import Change, Lora
from fluxjax.lora.networks import network_kind
from fluxjax.lora.scales import (
    CheckedNumber,
    CheckedScale,
    Scales,
    check_scales,
    has_name_prefix,
    is_known_zero,
    weight_scale,
)
from fluxjax.lora.terms import ReplacementTerm
from fluxjax.nets.chroma import Chroma
from fluxjax.nets.chroma_config import ChromaConfig
from fluxjax.nets.flux import Flux
from fluxjax.nets.flux_config import FluxConfig

INPUT_WEIGHT = "img_in.weight"
"""The weight whose input features a Control adapter may increase."""
ScaledChange = tuple[Change, CheckedNumber]
"""A change and its scale."""
WeightChanges = Mapping[str, Sequence[ScaledChange]]
"""The changes of a network by the name of the weight."""

_MOST_LISTED_PROBLEMS = 10


def effective_changes(model: eqx.Module, lora: Lora) -> dict[str, tuple[Change, ...]]:
    """Return an adapter's changes of a network, without those that have no effect on it.

    **Arguments:**

    - `model`: the network, or its shapes.
    - `lora`: the adapter.
    """
    changes = lora.changes.get(network_kind("merge", model), {})
    effective = {}
    for name, of_weight in changes.items():
        if not _is_without_effect(model, name):
            effective[name] = of_weight
    return effective


def _is_without_effect(model: eqx.Module, name: str) -> bool:
    """Return whether a weight is of a layer that this transformer lacks, and FLUX.1-dev has.

    It embeds the guidance, or modulates blocks that Chroma's approximator modulates.
    """
    if isinstance(model, Chroma):
        return name.startswith(EMBEDDERS) or ".modulation." in name
    if not isinstance(model, Flux) or model.config.guidance_embed:
        return False
    return name.startswith("guidance_in.")


def changes_of(
    model: eqx.Module,
    loras: Sequence[Lora],
    scales: Scales | None,
) -> WeightChanges:
    """Return what adapters change in a network.

    **Arguments:**

    - `model`: the network, or its shapes.
    - `loras`: the adapters; their changes of other networks are ignored.
    - `scales`: as for `merge`.

    **Returns:** the changes by the name of the weight, in the order of the adapters.

    **Raises:** `WeightsError` if an adapter does not fit the network, or two set one weight;
    `ValueError` for scales that are not finite, or that are for no weight.
    """
    kind = network_kind("merge", model)
    checked = check_scales("merge", len(loras), scales)
    found: dict[str, list[ScaledChange]] = {}
    for lora, scale in zip(loras, checked, strict=True):
        for name, changes in effective_changes(model, lora).items():
            of_weight = found.setdefault(name, [])
            of_weight += [(change, weight_scale(scale, name)) for change in changes]
    if loras and not found:
        _raise_nothing_changed(KINDS[kind].title, loras)
    _check_shapes(model, found)
    _check_replacements(model, loras, checked)
    _check_prefixes(model, checked)
    return found


def row_range(
    change: Change,
    shape: tuple[int, ...],
    parts: FusedRows,
) -> tuple[int, int]:
    """Return the first and the past-the-last row of a weight that a change covers.

    **Arguments:**

    - `shape`: of the weight.
    - `parts`: the rows of the parts of fused weights, from the network's config.
    """
    if change.part is None:
        return 0, shape[0]
    rows = parts[change.part]
    return rows.start, rows.stop


def _raise_nothing_changed(title: str, loras: Sequence[Lora]) -> None:
    """Say which networks the adapters are for.

    **Arguments:**

    - `title`: of the network that they do not change.
    """
    networks: set[str] = set()
    for lora in loras:
        networks.update(lora.changes)
    raise WeightsError(
        f"The adapters change nothing of a {title}; they are for: "
        f"{', '.join(sorted(networks)) or 'nothing'}. Pass a network that they are for."
    )


def _check_prefixes(model: eqx.Module, scales: Sequence[CheckedScale]) -> None:
    """**Raises:** `ValueError` for a scale by a prefix that no weight of the network has."""
    names = parameters_of(model).keys()
    prefixes: set[str] = set()
    for scale in scales:
        if isinstance(scale, Mapping):
            prefixes.update(scale)
    for prefix in sorted(prefixes):
        if not any(has_name_prefix(name, prefix) for name in names):
            raise ValueError(
                f"No weight of this {type(model).__name__} begins with {prefix!r}, for which a "
                "scale was passed. Choose a prefix such as 'double.3'."
            )


def _check_replacements(
    model: eqx.Module,
    loras: Sequence[Lora],
    scales: Sequence[CheckedScale],
) -> None:
    """**Raises:** `WeightsError` if two adapters of nonzero scale set the same rows of a weight."""
    slots = parameters_of(model)
    parts = fused_parts(model.config)  # type: ignore[attr-defined]
    # For each weight the number of the adapter, and the first and past-the-last row that it sets.
    rows_set: dict[str, list[tuple[int, int, int]]] = {}
    for number, (lora, scale) in enumerate(zip(loras, scales, strict=True)):
        for name, change in _replacements(model, lora, scale):
            start, stop = row_range(change, slots[name].shape, parts)
            others = rows_set.setdefault(name, [])
            for other, other_start, other_stop in others:
                overlap = other_start < stop and start < other_stop
                # One adapter may set the parts of a fused weight by several changes.
                if other != number and overlap:
                    raise WeightsError(
                        f"Adapters {other + 1} ({loras[other].format}) and {number + 1} "
                        f"({lora.format}) both set {name}, which can have one value only. "
                        "Leave one of them out, or give it the scale 0."
                    )
            others.append((number, start, stop))


def _replacements(
    model: eqx.Module,
    lora: Lora,
    scale: CheckedScale,
) -> Iterator[tuple[str, Change]]:
    """Yield the changes of an adapter that set a weight, with the weight's name.

    **Arguments:**

    - `scale`: of the adapter; where it is 0, the adapter sets nothing.
    """
    for name, changes in effective_changes(model, lora).items():
        # At scale 0 the weight keeps its own value.
        if is_known_zero(weight_scale(scale, name)):
            continue
        for change in changes:
            if isinstance(change.term, ReplacementTerm):
                yield name, change


def _check_shapes(model: eqx.Module, changes: WeightChanges) -> None:
    """**Raises:** `WeightsError` that lists all that does not fit the network."""
    problems: list[str] = []
    slots = parameters_of(model)
    parts = fused_parts(model.config)  # type: ignore[attr-defined]
    for name, of_weight in changes.items():
        if name not in slots:
            problems.append(f"{name} is not in it")
            continue
        shapes = []
        for change, _ in of_weight:
            start, stop = row_range(change, slots[name].shape, parts)
            base = (stop - start, *slots[name].shape[1:])
            shape = change.term.shape(base)
            shapes.append(shape)
            if not _fits(name, base, shape):
                problems.append(f"{name} is {list(base)}, the adapter's {list(shape)}")
        # The widths are compared only if everything has the right number of axes.
        if name == INPUT_WEIGHT and not problems:
            columns = [shape[1] for shape in shapes]
            problems += input_problems(model.config, columns)  # type: ignore[attr-defined]
    if not problems:
        return
    listed = "; ".join(problems[:_MOST_LISTED_PROBLEMS])
    if len(problems) > _MOST_LISTED_PROBLEMS:
        listed += f" … and {len(problems) - _MOST_LISTED_PROBLEMS} more"
    raise WeightsError(
        f"The adapter does not fit this {type(model).__name__}: {listed}. "
        "Pass the model it was made for."
    )


def _fits(
    name: str,
    base: tuple[int, ...],
    shape: tuple[int, ...],
) -> bool:
    """Return whether a difference of this shape fits a weight.

    **Arguments:**

    - `name`: of the weight.
    - `base`: the shape of the rows that are changed.
    - `shape`: of the difference.
    """
    if name == INPUT_WEIGHT:
        # Its columns have rules of their own, see `input_problems`.
        return len(shape) == 2 and shape[0] == base[0]
    return shape == base


def input_problems(config: FluxConfig | ChromaConfig, columns: Sequence[int]) -> list[str]:
    """Return what is wrong with the numbers of input features of adapters.

    The input is as wide as the prediction; in Fill and Control models the features of a condition
    follow. An adapter may have three widths: that of the model's input; that of the prediction,
    if it was made for the model without a condition; or, for a model of FLUX.1 without a condition,
    a larger multiple of the latter, with which it adds a condition.

    **Arguments:**

    - `config`: of the transformer.
    - `columns`: the input features of each change.

    **Returns:** one line for each problem.
    """
    inputs, image_features = config.in_channels, config.out_channels
    widest = max([inputs, *columns])
    problems = []
    for count in columns:
        if count not in (image_features, inputs, widest):
            problems.append(f"{INPUT_WEIGHT} has {inputs} input features, the adapter's {count}")
    has_condition = inputs != image_features
    can_widen = isinstance(config, FluxConfig) and not has_condition
    if widest > inputs and (not can_widen or widest % image_features):
        problems.append(
            f"{INPUT_WEIGHT} has {inputs} input features, which an adapter of {widest} can't widen"
        )
    return problems
