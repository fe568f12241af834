"""A description of an adapter file for people."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from fluxjax.lora.adapter import Change
from fluxjax.lora.read import list_keys, read_lora
from fluxjax.lora.terms import LowRankTerm, MagnitudeTerm, Term


def describe_lora(path: str | Path) -> str:
    """Return what an adapter file holds, in a few lines of text.

    These are its format, networks, blocks, kinds of terms, ranks, factors (alpha / rank), unknown
    keys, and what has no effect.

    **Arguments:**

    - `path`: as for `read_lora`.

    **Raises:** as `read_lora`, except for unknown keys.
    """
    lora, unused = read_lora(path, strict=False)
    lines = [f"{Path(path).name}: {lora.format}"]
    for network, changes in lora.changes.items():
        lines += _describe_network(network, changes)
    if unused:
        lines.append(f"  {len(unused)} keys without a place: {list_keys(unused)}")
    lines += [f"  {note}" for note in lora.notes]
    return "\n".join(lines)


def _describe_network(network: str, changes: Mapping[str, tuple[Change, ...]]) -> list[str]:
    """Return one line about what is changed, and one about ranks if there are any."""
    terms: list[Term] = []
    kinds: set[str] = set()
    for of_weight in changes.values():
        for change in of_weight:
            terms.append(change.term)
            kinds.add(type(change.term).__name__)
    blocks = _describe_blocks(changes)
    lines = [f"  {network}: {len(changes)} weights in {blocks}; {', '.join(sorted(kinds))}"]
    ranks: set[float] = set()
    factors: set[float] = set()
    for term in terms:
        # DoRA's magnitudes belong to a term, which is mostly of low rank.
        inner = term.inner if isinstance(term, MagnitudeTerm) else term
        if isinstance(inner, LowRankTerm):
            ranks.add(len(inner.down))
            # Rounded, because float32's 0.1 would be printed as 0.10000000149.
            factors.add(round(float(inner.factor), 6))
    if ranks:
        lines.append(f"    rank {_describe_range(ranks)}, alpha / rank {_describe_range(factors)}")
    return lines


def _describe_blocks(names: Iterable[str]) -> str:
    """Return the fields of the network that weights belong to, with the number of their blocks.

    **Arguments:**

    - `names`: of the weights, as in "double.0.img.qkv.weight".

    **Returns:** for example "double (19 blocks), img_in".
    """
    blocks: dict[str, set[str]] = {}
    for name in names:
        field, second, *_ = name.split(".")
        numbers = blocks.setdefault(field, set())
        # A number means that the field is a stack of blocks.
        if second.isdigit():
            numbers.add(second)
    described = []
    for field, numbers in sorted(blocks.items()):
        if numbers:
            described.append(f"{field} ({len(numbers)} blocks)")
        else:
            described.append(field)
    return ", ".join(described)


def _describe_range(values: set[float]) -> str:
    """Return the smallest and the largest number, or the only one."""
    low, high = min(values), max(values)
    if low == high:
        return f"{low:g}"
    return f"{low:g} to {high:g}"
