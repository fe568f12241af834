"""Adapter files of every format: each key is identified by its module's name and its role, and every key is used."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, overload

import equinox as eqx

from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.safetensors import read_header
from fluxjax.checkpoint.tensors import TensorFile
from fluxjax.lora.build import Module, terms_of
from fluxjax.lora.names import find_place
from fluxjax.lora.roles import PLAIN, is_adapters, splits
from fluxjax.lora.settings import WEIGHTS, AllSettings, read_settings
from fluxjax.lora.strangers import looks_like, without_effect
from fluxjax.lora.terms import LowRankTerm, MagnitudeTerm, Term
from fluxjax.printable import printable

_IN_FOLDER = (WEIGHTS, "pytorch_lora_weights.safetensors")


class Change(eqx.Module):
    """A term and the place of it in a weight: the rows of a fused weight's part (`part`), whose halves are in the other order
    if `swap`."""

    term: Term
    part: str | None = eqx.field(static=True)
    swap: bool = eqx.field(static=True)


class Lora(eqx.Module):
    """An adapter. `changes`: by network ("flux", "clip", "t5"), then by the name of the weight or bias that they change.

    `format`: whose key names the file has. `notes`: one line for each thing in the file that has no effect on FLUX and was
    left out, to be shown to the user.
    """

    changes: dict[str, dict[str, tuple[Change, ...]]]
    format: str = eqx.field(static=True)
    notes: tuple[str, ...] = eqx.field(static=True, default=())


@overload
def read_lora(path: str | Path, *, strict: Literal[True] = True) -> Lora: ...


@overload
def read_lora(path: str | Path, *, strict: Literal[False]) -> tuple[Lora, list[str]]: ...


def read_lora(path: str | Path, *, strict: bool = True) -> Lora | tuple[Lora, list[str]]:
    """Read an adapter of any known format: kohya, OneTrainer, diffusers/PEFT, ComfyUI, fal, BFL Control, XLabs, LyCORIS's
    LoKr, LoHa, GLoRA, OFT and BOFT, PEFT's LoKr, LoHa, OFT and BOFT, DoRA on any of them; for the transformer, CLIP and T5.

    **Arguments:** `path`: a safetensors file, or a folder that PEFT (`adapter_model.safetensors` with
    `adapter_config.json`) or diffusers (`pytorch_lora_weights.safetensors`) saved. `strict`: whether a key that is not used
    is an error.
    **Returns:** the adapter; without `strict` also the keys that are not used. A module of which one key can't be used is
    left out whole.
    **Raises:** `WeightsError` for keys that match nothing, with what they look like, a file that adapts nothing of FLUX.1,
    tensors that do not belong together or are not finite, a module that is given twice, and settings that are damaged.
    """
    path = _file_of(Path(path))
    file = read_header(path)
    modules, unused, notes = _modules(file)
    if not modules:
        raise WeightsError(
            f"{path} adapts nothing of FLUX.1: {looks_like(unused or list(file.tensors))}"
        )
    if unused and strict:
        raise WeightsError(
            f"{path} holds {len(unused)} keys that fluxjax has no place for: {_some(unused)}. {looks_like(unused)} "
            "Pass strict=False to leave them out."
        )
    changes: dict[str, dict[str, list[Change]]] = {}
    for module in modules.values():
        mine = changes.setdefault(module.place.network, {})
        for weight, term in terms_of(file, module):
            mine.setdefault(weight, []).append(Change(term, module.place.part, module.place.swap))
    formats = sorted({module.place.format for module in modules.values()})
    whole = {
        network: {name: tuple(found) for name, found in mine.items()}
        for network, mine in changes.items()
    }
    lora = Lora(whole, "+".join(formats), notes)
    return lora if strict else (lora, unused)


def _file_of(path: Path) -> Path:
    """Return an adapter's file: a folder's, as PEFT and diffusers name it, or the only one there."""
    if not path.is_dir():
        return path
    known = [path / name for name in _IN_FOLDER if (path / name).is_file()]
    found = known or sorted(file for file in path.glob("*.safetensors") if file.is_file())
    if len(found) != 1:
        held = f"several: {', '.join(file.name for file in found[:10])}" if found else "none"
        raise WeightsError(
            f"`read_lora(path)` needs one adapter in the folder {path}, and found {held}. Pass the .safetensors file."
        )
    return found[0]


def _some(keys: list[str]) -> str:
    more = f" … and {len(keys) - 20} more" if len(keys) > 20 else ""
    return ", ".join(printable(key) for key in keys[:20]) + more


def describe_lora(path: str | Path) -> str:
    """Return what an adapter file holds: format, networks, blocks, ranks, factors (alpha / rank), keys without a place, and
    what has no effect.

    **Raises:** as `read_lora`, but for keys without a place.
    """
    lora, unused = read_lora(path, strict=False)
    lines = [f"{Path(path).name}: {lora.format}"]
    for network, changes in lora.changes.items():
        terms = [change.term for found in changes.values() for change in found]
        kinds = sorted({type(term).__name__ for term in terms})
        lines.append(
            f"  {network}: {len(changes)} weights in {_blocks(changes)}; {', '.join(kinds)}"
        )
        inner = [term.inner if isinstance(term, MagnitudeTerm) else term for term in terms]
        low = [term for term in inner if isinstance(term, LowRankTerm)]
        if low:
            ranks, factors = (
                {len(term.down) for term in low},
                {round(float(term.factor), 6) for term in low},
            )
            lines.append(f"    rank {_span(ranks)}, alpha / rank {_span(factors)}")
    if unused:
        lines.append(f"  {len(unused)} keys without a place: {_some(unused)}")
    return "\n".join([*lines, *(f"  {note}" for note in lora.notes)])


def _blocks(names: Iterable[str]) -> str:
    """Return the fields that weights belong to, with the number of their blocks where these are stacked."""
    blocks: dict[str, set[str]] = {}
    for name in names:
        first, second, *_ = name.split(".")
        blocks.setdefault(first, set()).update({second} if second.isdigit() else ())
    return ", ".join(
        f"{first} ({len(found)} blocks)" if found else first
        for first, found in sorted(blocks.items())
    )


def _span(values: set) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _modules(file: TensorFile) -> tuple[dict[str, Module], list[str], tuple[str, ...]]:
    """Sort the keys by module; those without a place are returned too, and notes about those without an effect."""
    settings = read_settings(file)
    keys, notes = without_effect(file.tensors)
    modules: dict[str, Module] = {}
    unused = []
    # Norms and biases named as a model's own belong to an adapter, unless the file is a model.
    adapter = any(is_adapters(key) for key in keys)
    for key in keys:
        found = _find(key, modules, settings, adapter)
        if found is None:
            unused.append(key)
            continue
        module, role = found
        if role in module.keys:
            twice = f"{printable(module.keys[role])} and {printable(key)}"
            raise WeightsError(f"{file.path} gives one tensor twice: {twice}. Remove one of them.")
        module.keys[role] = key
    _check_overlaps(file, modules)
    left = {*unused, *_left_out(modules, unused)}
    return modules, [key for key in file.tensors if key in left], notes


def _find(
    key: str, modules: dict[str, Module], settings: AllSettings, adapter: bool
) -> tuple[Module, str] | None:
    """Return the module that a key belongs to, a new one if need be, and its role there."""
    for name, role in splits(key):
        module = modules.get(name)
        place = find_place(name) if module is None else module.place
        if place is None:
            continue
        mine = settings.of(name)
        if role in PLAIN and not (adapter and (place.is_norm or mine is not None)):
            continue
        return modules.setdefault(name, Module(name, place, {}, mine)), role
    return None


def _left_out(modules: dict[str, Module], unused: Iterable[str]) -> list[str]:
    """Take away the modules that a key without a place belongs to, as the rest of one would mean something else."""
    keys: list[str] = []
    for key in unused:
        pieces = key.split(".")
        for count in range(1, len(pieces)):
            module = modules.pop(".".join(pieces[:count]), None)
            keys += module.keys.values() if module is not None else ()
    return keys


def _check_overlaps(file: TensorFile, modules: Mapping[str, Module]) -> None:
    """**Raises:** `WeightsError` if two modules, named in two ways, change the same weight."""
    before: dict[tuple[str, str], list[Module]] = {}
    for module in modules.values():
        others = before.setdefault((module.place.network, module.place.weight), [])
        for other in others:
            if module.place.overlaps(other.place):
                both = " and ".join(
                    printable(next(iter(one.keys.values()))) for one in (other, module)
                )
                raise WeightsError(
                    f"{file.path} changes {module.place.weight} twice, under two names: {both}. Keep one format's keys."
                )
        others.append(module)
