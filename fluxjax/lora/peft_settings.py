"""PEFT's settings of an adapter: alphas, ranks and options, each value checked once.

PEFT does not write alphas as tensors. They are in `adapter_config.json` beside the weights, or,
where diffusers saved the adapter, in the metadata of the weights' file. Without any settings the
factor of a module is 1.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.tensors import TensorFile
from fluxjax.lora.peft_patterns import Patterns
from fluxjax.printable import printable

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

Json = str | int | float | bool | None | list | dict
"""A value of a JSON file, not checked yet."""
Table = Mapping[str, Json]
"""PEFT's settings of one network by name, not checked yet."""

_METADATA = "lora_adapter_metadata"
_METHODS = ("LORA", "LOKR", "LOHA", "OFT", "BOFT")
# These initializations change the base weights too, so the file alone does not hold the result.
_CHANGED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")
_MOST_BYTES = 10_000_000
_RESAVE = "Save the adapter again."


@dataclass(frozen=True)
class PeftSettings:
    """PEFT's settings of one network, with PEFT's own defaults.

    - `method`: "LORA", "LOKR", "LOHA", "OFT" or "BOFT".
    - `alpha`, `rank`: of modules that no pattern matches.
    - `alphas`, `ranks`: exceptions by module name.
    - `root`: rsLoRA, which divides alpha by the square root of the rank.
    - `dora`: whether every low-rank module has DoRA magnitudes.
    - `neumann`, `terms`: whether OFT's Cayley transform is a Neumann series, and of how many terms.
    - `constrained`, `epsilon`: whether OFT is constrained, and the radius.
    - `shared`: whether an OFT module has one block that is repeated.

    **Source:** peft's `LoraConfig`, `LoKrConfig`, `LoHaConfig`, `OFTConfig`.
    """

    method: str = "LORA"
    alpha: float = 8.0
    rank: int = 8
    alphas: Patterns = field(default_factory=lambda: Patterns({}))
    ranks: Patterns = field(default_factory=lambda: Patterns({}))
    root: bool = False
    dora: bool = False
    neumann: bool = True
    terms: int = 5
    constrained: bool = False
    epsilon: float = 6e-5
    shared: bool = False

    def factor(self, module: str, rank: int) -> float:
        """Return alpha / rank of a module, or alpha / sqrt(rank) for rsLoRA.

        **Arguments:**

        - `module`: its name inside the network.
        - `rank`: as the factors' shapes show it; those of a LoKr do not, so it is ignored there.
        """
        alpha = self.alphas.find(module, self.alpha)
        if self.method == "LOKR":
            rank = int(self.ranks.find(module, self.rank))
        if self.root:
            return alpha / math.sqrt(rank)
        return alpha / rank


class AllPeftSettings:
    """PEFT's settings of all networks of a file.

    diffusers puts the name of a component ("transformer.") before each name; PEFT does not.

    **Arguments:**

    - `where`: where the table comes from, for the error messages.
    - `table`: all settings of the file, not checked yet.

    **Raises:** `WeightsError` for settings that are damaged or not supported.
    """

    def __init__(self, where: str, table: Table):
        tables: dict[str, dict[str, Json]] = {}
        for key, value in table.items():
            # The component is empty for PEFT's own names.
            component, _, name = key.rpartition(".")
            of_component = tables.setdefault(component, {})
            of_component[name] = value
        self.by_component: dict[str, PeftSettings] = {}
        for component, settings in tables.items():
            self.by_component[component] = _settings(where, settings)

    def of(self, module: str) -> PeftSettings | None:
        """Return the settings of the network that a module belongs to; None if there are none."""
        component = module.partition(".")[0]
        return self.by_component.get(component, self.by_component.get(""))


def read_peft_settings(file: TensorFile) -> AllPeftSettings:
    """Return PEFT's settings from a file's metadata, or from `adapter_config.json` beside it.

    **Returns:** settings without any network for a file of another program.

    **Raises:** `WeightsError` for settings that are damaged, and for PEFT methods that fluxjax
    does not read.
    """
    if _METADATA in file.metadata:
        where = f"{file.path}: its {_METADATA}"
        return AllPeftSettings(where, _parse_table(where, file.metadata[_METADATA]))
    config = file.path.with_name(CONFIG_FILE)
    # Beside a file of another name, the settings may belong to another adapter.
    if file.path.name == WEIGHTS_FILE and config.is_file():
        return AllPeftSettings(str(config), _parse_table(str(config), _read_bytes(config)))
    return AllPeftSettings(str(file.path), {})


def _read_bytes(path: Path) -> bytes:
    """Return the contents of a file. **Raises:** `WeightsError` for one that is far too large."""
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise WeightsError(
            f"{path} has {size} bytes, more than the settings of an adapter take. {_RESAVE}"
        )
    return path.read_bytes()


def _parse_table(where: str, text: str | bytes) -> Table:
    """Return the JSON object of a text. **Raises:** `WeightsError` for any other text."""
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{where} is not JSON. {_RESAVE}") from error
    if not isinstance(table, dict):
        raise WeightsError(f"{where} is not a table of settings. {_RESAVE}")
    return table


def _settings(where: str, table: Table) -> PeftSettings:
    """Return the checked settings of one network.

    **Arguments:**

    - `where`: where the table comes from, for the error messages.
    - `table`: the settings without the component's name.
    """
    try:
        return _check_table(table)
    except WeightsError as error:
        # The cause stays that of the first error; this one only adds the place.
        raise WeightsError(f"{where}: {error}") from error.__cause__


def _check_table(table: Table) -> PeftSettings:
    """Return the settings that a table of PEFT gives.

    **Raises:** `WeightsError` for a method that is not read, or a value of the wrong kind.
    """
    method = table.get("peft_type") or "LORA"
    if not isinstance(method, str) or method not in _METHODS:
        raise WeightsError(
            f"fluxjax does not read PEFT's {_printed(method)} adapters. "
            f"It reads {', '.join(_METHODS)}."
        )
    _check_base_unchanged(table)
    alpha_key = "alpha" if method in ("LOKR", "LOHA") else "lora_alpha"
    default = PeftSettings()
    return PeftSettings(
        method=method,
        alpha=_number(table, alpha_key, default.alpha),
        rank=_count(table, "r", default.rank),
        alphas=_patterns(table, "alpha_pattern"),
        ranks=_patterns(table, "rank_pattern"),
        root=_flag(table, "use_rslora", default.root),
        dora=_flag(table, "use_dora", default.dora),
        neumann=_flag(table, "use_cayley_neumann", default.neumann),
        terms=_count(table, "num_cayley_neumann_terms", default.terms),
        constrained=_flag(table, "coft", default.constrained),
        epsilon=_number(table, "eps", default.epsilon),
        shared=_flag(table, "block_share", default.shared),
    )


def _check_base_unchanged(table: Table) -> None:
    """**Raises:** `WeightsError` for adapters whose base is not the unchanged model."""
    initialization = table.get("init_lora_weights")
    if isinstance(initialization, str) and initialization.lower().startswith(_CHANGED_BASES):
        raise WeightsError(
            f"it was initialized by {_printed(initialization)}, which changes the base weights "
            "too. Save it with PEFT's path_initial_model_for_weight_conversion."
        )
    if _flag(table, "use_qalora", False):
        raise WeightsError("fluxjax does not read QALoRA adapters. Merge it with PEFT.")


def _type_error(key: str, expected: str, value: Json) -> WeightsError:
    """Return the error for a setting of another type or range.

    **Arguments:**

    - `key`: the name of the setting.
    - `expected`: what its value has to be.
    - `value`: what the file has.
    """
    return WeightsError(f"{key} has to be {expected}, not {_printed(value)}. {_RESAVE}")


def _printed(value: Json) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return printable(text, 60)


def _is_number(value: Json) -> bool:
    """Return whether a value is a number that float32 can represent."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    # A comparison works for integers of any length; a cast to float would overflow.
    return -3e38 < value < 3e38


def _number(
    table: Table,
    key: str,
    default: float,
) -> float:
    """Return a setting that is a finite number; null is the default."""
    value = table.get(key)
    if value is None:
        return default
    if not isinstance(value, int | float) or not _is_number(value):
        raise _type_error(key, "a finite number", value)
    return float(value)


def _count(
    table: Table,
    key: str,
    default: int,
) -> int:
    """Return a setting that is a whole number of 0 or more; null is the default."""
    value = table.get(key)
    if value is None:
        return default
    # 0 is valid: an OFT adapter that is described by its block size has rank 0. A bool is not.
    if type(value) is not int or not 0 <= value < 2**31:
        raise _type_error(key, "a count", value)
    return value


def _flag(
    table: Table,
    key: str,
    default: bool,
) -> bool:
    """Return a setting that is true or false; null is the default."""
    value = table.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise _type_error(key, "true or false", value)
    return value


def _patterns(table: Table, key: str) -> Patterns:
    """Return a setting that is a table of numbers by pattern; null is an empty one."""
    values = table.get(key)
    if values is None:
        return Patterns({})
    if not isinstance(values, dict) or not all(_is_number(value) for value in values.values()):
        raise _type_error(key, "a table of finite numbers", values)
    if key == "rank_pattern" and not all(_is_rank(value) for value in values.values()):
        raise _type_error(key, "a table of ranks of at least 1", values)
    numbers = {name: float(value) for name, value in values.items()}
    return Patterns(numbers)


def _is_rank(value: Json) -> bool:
    return type(value) is int and value > 0
