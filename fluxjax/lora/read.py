"""Adapter files of every format: each key is identified by its module and role, and used.

Reading takes four steps: keys that can't have an effect are set aside (`unsupported.py`); each
other key is split into a module's name and a role (`key_roles.py`); the name is looked up in the
key tables of all formats (`names.py`); and the tensors of each module become a term
(`term_builders.py`).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.safetensors import read_header
from fluxjax.checkpoint.tensors import TensorFile
from fluxjax.lora.adapter import Change, Lora
from fluxjax.lora.key_roles import MODEL_ROLES, is_adapter_key, modules_and_roles
from fluxjax.lora.module_tensors import Module
from fluxjax.lora.names import find_place
from fluxjax.lora.peft_settings import WEIGHTS_FILE, AllPeftSettings, read_peft_settings
from fluxjax.lora.term_builders import module_terms
from fluxjax.lora.unsupported import describe_unknown_keys, split_ignored_keys
from fluxjax.printable import printable

_FILES_IN_FOLDER = (WEIGHTS_FILE, "pytorch_lora_weights.safetensors")
"""Names that PEFT and diffusers give to an adapter's file in a folder."""
_MOST_LISTED_KEYS = 20
_MOST_LISTED_FILES = 10


@overload
def read_lora(path: str | Path, *, strict: Literal[True] = True) -> Lora: ...


@overload
def read_lora(path: str | Path, *, strict: Literal[False]) -> tuple[Lora, list[str]]: ...


def read_lora(path: str | Path, *, strict: bool = True) -> Lora | tuple[Lora, list[str]]:
    """Read an adapter of any known format, for the transformer, CLIP and T5.

    Known formats are kohya, OneTrainer, diffusers/PEFT, ComfyUI, fal, BFL Control and XLabs;
    LyCORIS's LoKr, LoHa, GLoRA, OFT and BOFT; PEFT's LoKr, LoHa, OFT and BOFT; and DoRA on any of
    them. The factors keep the dtype of the file.

    **Arguments:**

    - `path`: a safetensors file; or a folder that PEFT (`adapter_model.safetensors` with
      `adapter_config.json`) or diffusers (`pytorch_lora_weights.safetensors`) saved.
    - `strict`: whether a key that is not used is an error.

    **Returns:** the adapter. Without `strict`, also the keys that are not used; a module of which
    one key can't be used is then left out as a whole.

    **Raises:** `WeightsError` for keys that match nothing, with a hint at what they look like; for
    a file that adapts nothing of FLUX.1; for tensors that do not belong together or are not
    finite; for a module that is given twice; and for settings that are damaged.
    """
    path = _adapter_file(Path(path))
    file = read_header(path)
    contents = _sort_keys(file)
    if not contents.modules:
        hint = describe_unknown_keys(contents.unused or list(file.tensors))
        raise WeightsError(f"{path} adapts nothing of FLUX.1: {hint}")
    if contents.unused and strict:
        count = len(contents.unused)
        listed = list_keys(contents.unused)
        hint = describe_unknown_keys(contents.unused)
        raise WeightsError(
            f"{path} holds {count} keys that fluxjax has no place for: {listed}. {hint} "
            "Pass strict=False to leave them out."
        )
    lora = _build(file, contents)
    if strict:
        return lora
    return lora, contents.unused


def list_keys(keys: list[str]) -> str:
    """Return the first of these keys, printable, and how many more there are.

    **Arguments:**

    - `keys`: of a file; control characters in them are escaped.
    """
    listed = ", ".join(printable(key) for key in keys[:_MOST_LISTED_KEYS])
    if len(keys) > _MOST_LISTED_KEYS:
        listed += f" … and {len(keys) - _MOST_LISTED_KEYS} more"
    return listed


def _adapter_file(path: Path) -> Path:
    """Return the adapter's file in a folder: the one that PEFT or diffusers names, or the only one.

    A path that is not a folder is returned as it is.

    **Raises:** `WeightsError` for a folder without an adapter, or with several.
    """
    if not path.is_dir():
        return path
    files = [path / name for name in _FILES_IN_FOLDER if (path / name).is_file()]
    if not files:
        # Other programs choose other names, which is unambiguous if there is one file.
        files = sorted(file for file in path.glob("*.safetensors") if file.is_file())
    if len(files) == 1:
        return files[0]
    listed = "none"
    if files:
        names = [file.name for file in files[:_MOST_LISTED_FILES]]
        listed = f"several: {', '.join(names)}"
    raise WeightsError(
        f"`read_lora(path)` needs one adapter in the folder {path}, and found {listed}. "
        "Pass the .safetensors file."
    )


@dataclass(frozen=True)
class _FileContents:
    """The keys of an adapter file, sorted.

    - `modules`: by name.
    - `unused`: keys that have no place in FLUX, in the order of the file.
    - `notes`: about keys that have no effect on FLUX.
    """

    modules: Mapping[str, Module]
    unused: list[str]
    notes: tuple[str, ...]


def _build(file: TensorFile, contents: _FileContents) -> Lora:
    """Read the tensors of all modules and return the adapter that they make.

    **Raises:** `WeightsError` for tensors that do not belong together or are not finite.
    """
    changes: dict[str, dict[str, tuple[Change, ...]]] = {}
    for module in contents.modules.values():
        place = module.place
        by_weight = changes.setdefault(place.network, {})
        for weight, term in module_terms(file, module):
            change = Change(term, place.part, place.swap)
            by_weight[weight] = (*by_weight.get(weight, ()), change)
    # A file may mix formats, as with kohya's names of CLIP beside ComfyUI's of the transformer.
    formats = {module.place.format for module in contents.modules.values()}
    return Lora(changes, "+".join(sorted(formats)), contents.notes)


def _sort_keys(file: TensorFile) -> _FileContents:
    """Sort the keys of a file by module.

    **Raises:** `WeightsError` for a tensor or a weight that is given twice.
    """
    keys, notes = split_ignored_keys(file.tensors)
    finder = _ModuleFinder(keys, read_peft_settings(file))
    modules: dict[str, Module] = {}
    unused = []
    for key in keys:
        found = finder.find(key, modules)
        if found is None:
            unused.append(key)
            continue
        module, role = found
        if role in module.keys:
            first, second = printable(module.keys[role]), printable(key)
            raise WeightsError(
                f"{file.path} gives one tensor twice: {first} and {second}. Remove one of them."
            )
        module.keys[role] = key
    _check_overlaps(file, modules)
    unused_set = {*unused, *_remove_incomplete(modules, unused)}
    return _FileContents(modules, [key for key in file.tensors if key in unused_set], notes)


class _ModuleFinder:
    """Finds the module and the role of each key of a file.

    A name like "img_attn.norm.query_norm.scale" may be an adapter's or a model's. It is an
    adapter's if the file has other keys that only an adapter has.

    **Arguments:**

    - `keys`: all keys of the file that may have an effect.
    - `settings`: PEFT's settings of the file.
    """

    def __init__(self, keys: Iterable[str], settings: AllPeftSettings):
        self.settings = settings
        self.is_adapter = any(is_adapter_key(key) for key in keys)

    def find(self, key: str, modules: dict[str, Module]) -> tuple[Module, str] | None:
        """Return the module that a key belongs to, and its role there.

        **Arguments:**

        - `key`: of the file.
        - `modules`: those found so far by name, to which a new module is added.

        **Returns:** None for an unknown key.
        """
        # The longest known ending counts, if what is before it is the name of a module.
        for name, role in modules_and_roles(key):
            module = modules.get(name)
            if module is None:
                module = self._new_module(name)
            if module is not None and self._is_valid(role, module):
                modules[name] = module
                return module, role
        return None

    def _new_module(self, name: str) -> Module | None:
        """Return a module without keys; None for a name of no known format."""
        place = find_place(name)
        if place is None:
            return None
        return Module(name, place, {}, self.settings.of(name))

    def _is_valid(self, role: str, module: Module) -> bool:
        """Return whether a module can have this role in this file."""
        if role not in MODEL_ROLES:
            return True
        # Whole weights are read for norms (BFL's Control) and where PEFT saved whole modules.
        return self.is_adapter and (module.place.is_norm or module.settings is not None)


def _remove_incomplete(modules: dict[str, Module], unused: Iterable[str]) -> list[str]:
    """Remove the modules that an unused key belongs to, because the rest would mean another change.

    **Arguments:**

    - `modules`: by name, from which they are removed.
    - `unused`: the keys.

    **Returns:** the keys of the removed modules.
    """
    removed: list[str] = []
    for key in unused:
        # The unused key may be any tensor of a module, so each beginning of it is tried.
        for name in _dotted_prefixes(key):
            module = modules.pop(name, None)
            if module is not None:
                removed += module.keys.values()
    return removed


def _dotted_prefixes(key: str) -> Iterator[str]:
    """Yield "a" and "a.b" for "a.b.c"."""
    pieces = key.split(".")
    for count in range(1, len(pieces)):
        yield ".".join(pieces[:count])


def _check_overlaps(file: TensorFile, modules: Mapping[str, Module]) -> None:
    """**Raises:** `WeightsError` if two modules, named in two ways, change the same weight."""
    by_weight: dict[tuple[str, str], list[Module]] = {}
    for module in modules.values():
        place = module.place
        others = by_weight.setdefault((place.network, place.weight), [])
        for other in others:
            if place.overlaps(other.place):
                first, second = _first_key(other), _first_key(module)
                raise WeightsError(
                    f"{file.path} changes {place.weight} twice, under two names: {first} and "
                    f"{second}. Keep one format's keys."
                )
        others.append(module)


def _first_key(module: Module) -> str:
    """Return a key of a module, printable, for the error messages."""
    return printable(next(iter(module.keys.values())))
