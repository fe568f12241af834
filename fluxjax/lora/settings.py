"""What PEFT writes about an adapter beside its tensors: alphas, ranks and options, each value checked once."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.tensors import TensorFile
from fluxjax.printable import printable

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_METADATA = "lora_adapter_metadata"
_METHODS = ("LORA", "LOKR", "LOHA", "OFT", "BOFT")
# These ways to begin training change the base weights too, so the file alone does not hold the result.
_CHANGED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")
_MOST_BYTES = 10_000_000
_MOST_EXPRESSIONS = 200
_MOST_STEPS, _NAME_LENGTH, _LONGEST = 50_000, 80, 300


@dataclass(frozen=True)
class Settings:
    """PEFT's settings of one network, with PEFT's own defaults. `alphas`, `ranks`: by a module's name, or a pattern of it.

    **Source:** peft's `LoraConfig`, `LoKrConfig`, `LoHaConfig`, `OFTConfig`.
    """

    method: str = "LORA"
    alpha: float = 8.0
    rank: int = 8
    alphas: "Patterns" = field(default_factory=lambda: Patterns({}))
    ranks: "Patterns" = field(default_factory=lambda: Patterns({}))
    root: bool = False
    dora: bool = False
    neumann: bool = True
    terms: int = 5
    constrained: bool = False
    epsilon: float = 6e-5
    shared: bool = False

    def factor(self, module: str, rank: int) -> float:
        """Return alpha / rank of a module, or alpha / sqrt(rank) for rsLoRA; a LoKr's rank is not in its shapes."""
        alpha = self.alphas.find(module, self.alpha)
        if self.method == "LOKR":
            rank = int(self.ranks.find(module, self.rank))
        return alpha / (math.sqrt(rank) if self.root else rank)


class Patterns:
    """Numbers by the end of a module's name, as PEFT matches them: `(.*\\.)?(pattern)` is the whole name, the first wins.

    Nearly all patterns are plain names, which are compared as such. Regular expressions are run only if all of them
    together take a bounded number of steps.

    **Raises:** `WeightsError` for expressions that may take long, or that are not valid.
    """

    def __init__(self, numbers: Mapping[str, float]):
        expressions = [text for text in numbers if not _is_plain(text)]
        if (
            len(expressions) > _MOST_EXPRESSIONS
            or sum(_steps(text) for text in expressions) > _MOST_STEPS
        ):
            some = printable(max(expressions[:_MOST_EXPRESSIONS], key=_steps), 60)
            raise WeightsError(
                f"the pattern {some!r} is a regular expression that may take too long. Write module names instead."
            )
        ordered = list(enumerate(numbers.items()))
        self.names = {text: (place, number) for place, (text, number) in ordered if _is_plain(text)}
        self.expressions = [
            (_compiled(text), (place, number))
            for place, (text, number) in ordered
            if not _is_plain(text)
        ]

    def find(self, module: str, default: float) -> float:
        starts = (0, *(dot.end() for dot in re.finditer(r"\.", module)))
        # The names are looked up and not compared one by one: a file may hold a hundred thousand.
        found = [self.names[module[i:]] for i in starts if module[i:] in self.names]
        # With a start, a caret still matches only at the beginning of the whole name.
        found += [
            value
            for pattern, value in self.expressions
            if any(pattern.match(module, i) for i in starts)
        ]
        return min(found)[1] if found else default


def _is_plain(pattern: str) -> bool:
    return re.fullmatch(r"[\w.-]*", pattern) is not None


def _steps(pattern: str) -> float:
    """Return a bound of the steps that matching a name takes: each repetition multiplies them by the name's length, each
    group by its alternatives; a repeated group, a look-around and a reference to a group are not bounded."""
    # Escaped signs and classes are single characters, whatever stands in them.
    bare = re.sub(r"\\[^1-9]|\[\^?\]?(?:\\.|[^\]\\])*\]", "x", pattern).replace("(?:", "(")
    if len(pattern) > _LONGEST or re.search(r"\)[*+?{]|\(\?|\\", bare):
        return math.inf
    groups, steps = [1], _NAME_LENGTH ** len(re.findall(r"[*+?{]", bare))
    for sign in bare:
        if sign == "(":
            groups.append(1)
        elif sign == "|":
            groups[-1] += 1
        elif sign == ")" and len(groups) > 1:
            steps *= groups.pop()
    return steps * math.prod(groups)


def _compiled(pattern: str) -> re.Pattern:
    try:
        return re.compile(f"(?:{pattern})\\Z")
    except (re.error, OverflowError, RecursionError) as error:
        raise WeightsError(
            f"the pattern {printable(pattern, 60)!r} is not a valid regular expression."
        ) from error


def read_settings(file: TensorFile) -> "AllSettings":
    """Return PEFT's settings from a file's metadata, or from `adapter_config.json` beside PEFT's `adapter_model.safetensors`.

    **Raises:** `WeightsError` for what is not PEFT's, or is of a method that fluxjax does not know.
    """
    beside = file.path.with_name(CONFIG)
    if _METADATA in file.metadata:
        where = f"{file.path}: its {_METADATA}"
        return AllSettings(where, _table(where, file.metadata[_METADATA]))
    if file.path.name == WEIGHTS and beside.is_file():
        return AllSettings(str(beside), _table(str(beside), _text(beside)))
    return AllSettings(str(file.path), {})


def _text(path: Path) -> bytes:
    if path.stat().st_size > _MOST_BYTES:
        raise WeightsError(
            f"{path} is larger than any settings of an adapter. Save the adapter anew."
        )
    return path.read_bytes()


def _table(where: str, text: str | bytes) -> Mapping[str, Any]:
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{where} is not JSON. Save the adapter anew.") from error
    if not isinstance(table, dict):
        raise WeightsError(f"{where} is not a table of settings. Save the adapter anew.")
    return table


class AllSettings:
    """The settings of all networks of a file: diffusers puts a component's name before each key, PEFT does not."""

    def __init__(self, where: str, table: Mapping[str, Any]):
        tables: dict[str, dict[str, Any]] = {}
        for key, value in table.items():
            component, dot, name = key.rpartition(".")
            tables.setdefault(component if dot else "", {})[name] = value
        self.by_component = {
            component: _settings(where, found) for component, found in tables.items()
        }

    def of(self, module: str) -> Settings | None:
        """Return the settings of a module's network, or None if nothing is known of it."""
        return self.by_component.get(module.partition(".")[0], self.by_component.get(""))


def _settings(where: str, table: Mapping[str, Any]) -> Settings:
    try:
        return _checked(table)
    except WeightsError as error:
        raise WeightsError(f"{where}: {error}") from error.__cause__


def _checked(table: Mapping[str, Any]) -> Settings:
    method = table.get("peft_type") or "LORA"
    if method not in _METHODS:
        raise WeightsError(
            f"fluxjax does not read PEFT's {_shown(method)} adapters. It reads {', '.join(_METHODS)}."
        )
    begun = table.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(_CHANGED_BASES):
        raise WeightsError(
            f"it was begun with {_shown(begun)}, which changes the base weights too. Save it with PEFT's "
            "path_initial_model_for_weight_conversion."
        )
    if _flag(table, "use_qalora", False):
        raise WeightsError("fluxjax does not read QALoRA adapters. Merge it with PEFT.")
    usual = Settings()
    return Settings(
        method=method,
        alpha=_number(table, "alpha" if method in ("LOKR", "LOHA") else "lora_alpha", usual.alpha),
        rank=_count(table, "r", usual.rank),
        alphas=_patterns(table, "alpha_pattern"),
        ranks=_patterns(table, "rank_pattern"),
        root=_flag(table, "use_rslora", usual.root),
        dora=_flag(table, "use_dora", usual.dora),
        neumann=_flag(table, "use_cayley_neumann", usual.neumann),
        terms=_count(table, "num_cayley_neumann_terms", usual.terms),
        constrained=_flag(table, "coft", usual.constrained),
        epsilon=_number(table, "eps", usual.epsilon),
        shared=_flag(table, "block_share", usual.shared),
    )


def _shown(value: Any) -> str:
    return printable(value if isinstance(value, str) else json.dumps(value), 60)


def _is_number(value: Any) -> bool:
    # A float's largest power of ten is 308, so the comparison takes integers of any length.
    return isinstance(value, int | float) and not isinstance(value, bool) and -3e38 < value < 3e38


def _number(table: Mapping[str, Any], key: str, default: float) -> float:
    value = table.get(key)
    if value is not None and not _is_number(value):
        raise WeightsError(
            f"{key} has to be a finite number, not {_shown(value)}. Save the adapter anew."
        )
    return default if value is None else float(value)


def _count(table: Mapping[str, Any], key: str, default: int) -> int:
    value = table.get(key)
    # An OFT adapter that is given by its block size has a rank of 0.
    if value is not None and not (type(value) is int and 0 <= value < 2**31):
        raise WeightsError(f"{key} has to be a count, not {_shown(value)}. Save the adapter anew.")
    return default if value is None else value


def _flag(table: Mapping[str, Any], key: str, default: bool) -> bool:
    value = table.get(key)
    if value is not None and not isinstance(value, bool):
        raise WeightsError(
            f"{key} has to be true or false, not {_shown(value)}. Save the adapter anew."
        )
    return default if value is None else value


def _patterns(table: Mapping[str, Any], key: str) -> Patterns:
    found = table.get(key)
    found = {} if found is None else found
    if not isinstance(found, dict) or not all(_is_number(value) for value in found.values()):
        raise WeightsError(
            f"{key} has to be a table of finite numbers, not {_shown(found)}. Save the adapter anew."
        )
    if key == "rank_pattern" and not all(
        type(value) is int and value > 0 for value in found.values()
    ):
        raise WeightsError(
            f"{key} has to be a table of ranks of at least 1, not {_shown(found)}. Save the adapter anew."
        )
    return Patterns({name: float(value) for name, value in found.items()})
