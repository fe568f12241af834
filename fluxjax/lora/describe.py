"""A description of an adapter file for people, and for programs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fluxjax.lora.adapter import Change
from fluxjax.lora.base_terms import MagnitudeTerm
from fluxjax.lora.read import list_keys, read_lora
from fluxjax.lora.terms import LowRankTerm


@dataclass(frozen=True)
class ChangedNetwork:
    """What an adapter changes of a network.

    `weights`: how many. `blocks`: for each field of the network, how many of its blocks; None for
    a field that is no stack. `terms`: the kinds of changes. `ranks`: of those of low rank, and
    `factors`: their alpha / rank, each number once.
    """

    weights: int
    blocks: Mapping[str, int | None]
    terms: Sequence[str]
    ranks: Sequence[int]
    factors: Sequence[float]


@dataclass(frozen=True)
class LoraSummary:
    """What an adapter file holds; `str` of it is for people.

    `networks`: by their names. `unknown_keys`: without a place in any network. `notes`: on what has
    no effect.
    """

    name: str
    format: str
    networks: Mapping[str, ChangedNetwork]
    unknown_keys: Sequence[str]
    notes: Sequence[str]

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.format}"]
        for name, network in self.networks.items():
            lines += _describe_network(name, network)
        if self.unknown_keys:
            count, keys = len(self.unknown_keys), list_keys(list(self.unknown_keys))
            lines.append(f"  {count} keys without a place: {keys}")
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)


def describe_lora(path: str | Path) -> LoraSummary:
    """Return what an adapter file holds: `str` of it is a few lines of text.

    These are its format, networks, blocks, kinds of terms, ranks, factors (alpha / rank), unknown
    keys, and what has no effect.

    **Arguments:**

    - `path`: as for `read_lora`.

    **Raises:** as `read_lora`, except for unknown keys.
    """
    lora, unused = read_lora(path, strict=False)
    networks = {name: _summarize(changes) for name, changes in lora.changes.items()}
    return LoraSummary(Path(path).name, lora.format, networks, tuple(unused), tuple(lora.notes))


def _summarize(changes: Mapping[str, tuple[Change, ...]]) -> ChangedNetwork:
    """Return what an adapter changes: the kinds of its terms, their ranks and their factors."""
    kinds: set[str] = set()
    ranks: set[int] = set()
    factors: set[float] = set()
    for of_weight in changes.values():
        for change in of_weight:
            kinds.add(type(change.term).__name__)
            # DoRA's magnitudes belong to a term, which is mostly of low rank.
            term = change.term
            inner = term.inner if isinstance(term, MagnitudeTerm) else term
            if isinstance(inner, LowRankTerm):
                ranks.add(len(inner.down))
                # Rounded, because float32's 0.1 would be printed as 0.10000000149.
                factors.add(round(float(inner.factor), 6))
    return ChangedNetwork(
        len(changes), _blocks(changes), sorted(kinds), sorted(ranks), sorted(factors)
    )


def _blocks(names: Iterable[str]) -> dict[str, int | None]:
    """Return the fields of the network that weights belong to, with the number of their blocks.

    **Arguments:**

    - `names`: of the weights, as in "double.0.img.qkv.weight".
    """
    blocks: dict[str, set[str]] = {}
    for name in names:
        field, second, *_ = name.split(".")
        numbers = blocks.setdefault(field, set())
        # A number means that the field is a stack of blocks.
        if second.isdigit():
            numbers.add(second)
    return {field: len(numbers) or None for field, numbers in sorted(blocks.items())}


def _describe_network(name: str, network: ChangedNetwork) -> list[str]:
    """Return one line about what is changed, and one about ranks if there are any."""
    described = []
    for field, count in network.blocks.items():
        described.append(field if count is None else f"{field} ({count} blocks)")
    blocks, terms = ", ".join(described), ", ".join(network.terms)
    lines = [f"  {name}: {network.weights} weights in {blocks}; {terms}"]
    if network.ranks:
        ranks, factors = _describe_range(network.ranks), _describe_range(network.factors)
        lines.append(f"    rank {ranks}, alpha / rank {factors}")
    return lines


def _describe_range(values: Sequence[float]) -> str:
    """Return the smallest and the largest number, or the only one."""
    low, high = min(values), max(values)
    if low == high:
        return f"{low:g}"
    return f"{low:g} to {high:g}"
