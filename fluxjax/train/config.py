"""The configuration of a training: what `fluxjax train` reads from a TOML file."""

import difflib
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from fluxjax.nets.rounding import check_quantization
from fluxjax.printable import printable
from fluxjax.train.data_settings import DataSettings, data_settings
from fluxjax.train.mesh_step import StepSettings
from fluxjax.train.objective import LossSettings
from fluxjax.train.optimizers import OptimizerSettings

METHODS = ("full", "layers", "lora", "lokr", "dora")
"""What can be trained of a transformer."""


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """What is trained: the table `train`.

    - `method`: one of `METHODS`.
    - `targets`: regular expressions for names of layers, as for `init_lora` and
      `divide_layers`; none: the blocks' for an adapter.
    - `rank`, `alpha`: of an adapter.
    - `divisor`: of a LoKr, as for `init_lokr`.
    - `extra_features`: that each image token gets, 64 for a control image, 320 for an image and
      its mask, of a model that does not read them yet.
    - `start`: an adapter to go on with.
    - `weights_dtype`: of the trained weights.
    - `quantize`: a format of `fluxjax.quantize` for the frozen blocks beside an adapter, as
      "int8" or "nf4"; None to keep them.

    **Raises:** `ValueError` for another method, and for what it does not take.
    """

    method: str = "lora"
    targets: tuple[str, ...] = ()
    rank: int = 16
    alpha: float | None = None
    divisor: int = 8
    extra_features: int = 0
    start: str | None = None
    weights_dtype: str = "float32"
    quantize: str | None = None

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(
                f"train.method is one of {', '.join(METHODS)}, got {self.method!r}. Choose one."
            )
        if self.weights_dtype not in ("float32", "bfloat16"):
            raise ValueError(
                f"train.weights_dtype is float32 or bfloat16, got {self.weights_dtype!r}. "
                "Choose one."
            )
        if self.method == "layers" and not self.targets:
            raise ValueError(
                "train.method = 'layers' needs train.targets. Write those of some layers, as "
                "['double\\\\..*'], or choose 'full'."
            )
        if self.method == "full" and self.targets:
            raise ValueError(
                "train.method = 'full' trains all, and takes no targets. Choose 'layers'."
            )
        for name in ("start", "quantize"):
            if getattr(self, name) is not None and not self.is_adapter:
                raise ValueError(
                    f"train.{name} is for adapters, and train.method is {self.method!r}. Leave it "
                    "out, or choose an adapter as the method."
                )

        if self.quantize is not None:
            check_quantization(self.quantize)
            if self.method == "dora":
                raise ValueError(
                    "train.method = 'dora' trains the norms of rows, which train.quantize rounds. "
                    "Choose 'lora', or leave train.quantize out."
                )

    @property
    def is_adapter(self) -> bool:
        """Whether an adapter is trained, beside a network that stays as it is."""
        return self.method in ("lora", "lokr", "dora")


@dataclass(frozen=True, kw_only=True)
class MeshSettings:
    """The mesh of devices: the table `mesh`. One size may be -1, for all remaining devices."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """When the state is written: the table `checkpoints`.

    - `folder`: None for that of the output with `-checkpoints` behind its name.
    - `every`: steps between two.
    - `keep`: how many of the last stay.
    - `keep_every`: those at multiples of so many steps stay too; None for none.
    """

    folder: str | None = None
    every: int = 500
    keep: int = 2
    keep_every: int | None = None

    def __post_init__(self):
        for name in ("every", "keep", "keep_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"checkpoints.{name} is at least 1, got {value}. Choose more.")


@dataclass(frozen=True, kw_only=True)
class ValidationSettings:
    """What is watched beside the loss: the table `validation`.

    - `every`: steps between two validations; None for none.
    - `batches`: of data that the loss is taken of.
    - `sources`: their places, as `data.sources`; none: the first batches of the training's
      data.
    - `times`: at which it is taken, with noise that stays the same.
    - `prompts`: of images that are drawn with seeds `seed`, `seed` + 1, …, in `steps` steps;
      None for the model's number.
    """

    every: int | None = None
    batches: int = 4
    sources: tuple[str, ...] = ()
    times: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8)
    prompts: tuple[str, ...] = ()
    seed: int = 0
    steps: int | None = None


@dataclass(frozen=True, kw_only=True)
class LogSettings:
    """What is logged: the table `log`.

    - `folder`: of `log.jsonl` and of the validation's images; None for that of the output with
      `-log` behind its name.
    - `every`: steps between two lines.
    - `tensorboard`: whether TensorBoard's files are written there too.
    """

    folder: str | None = None
    every: int = 10
    tensorboard: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All of a training.

    - `model`: a zoo name, a file, a folder or a hub id.
    - `output`: a new .safetensors file or folder.
    - `format`: "peft" or "kohya" for an adapter, "own", "diffusers", "bfl" or "comfy" for a
      network; None for "peft" and "diffusers".
    - `output_dtype`: of the written weights; None for that of the model's weights, or float32
      for an adapter.
    - `steps`: updates in all.
    - `batch`: examples of a step, over all devices.
    - `accumulate`: micro-batches that they are divided into.
    - `seed`: of the first weights, the times and the noise.
    - `dtype`: of the activations and of frozen weights; None for bfloat16 on accelerators and
      float32 on a CPU.
    - `remat`: recompute each block in the backward pass.
    - `attention`: an implementation of `fluxjax.attention`.
    - `ema`: decay of the average of the weights, which is written; 0 for none.
    - `stochastic_rounding`: as of `StepSettings`.
    """

    model: str = "tiny"
    output: str = "trained"
    format: str | None = None
    output_dtype: str | None = None
    steps: int = 1000
    batch: int = 4
    accumulate: int = 1
    seed: int = 0
    dtype: str | None = None
    remat: bool = False
    attention: str | None = None
    ema: float = 0.999
    stochastic_rounding: bool = False
    train: MethodSettings = field(default_factory=MethodSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    mesh: MeshSettings = field(default_factory=MeshSettings)
    checkpoints: CheckpointSettings = field(default_factory=CheckpointSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    log: LogSettings = field(default_factory=LogSettings)
    data: DataSettings = field(default_factory=DataSettings)

    def __post_init__(self):
        for name in ("steps", "batch", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, got {getattr(self, name)}. Choose more.")
        if self.batch % self.accumulate:
            raise ValueError(
                f"batch = {self.batch} is not a multiple of accumulate = {self.accumulate}. "
                "Choose one that is, so that micro-batches have one size."
            )
        if self.stochastic_rounding and self.train.weights_dtype != "bfloat16":
            raise ValueError(
                "stochastic_rounding is for trained weights in bfloat16. Set train.weights_dtype, "
                "or leave it out."
            )
        if self.loss.is_distillation and (not self.train.is_adapter or self.train.extra_features):
            raise ValueError(
                "loss.distill_steps trains an adapter that follows the network without it, and "
                "train.method is an adapter then, without train.extra_features. Choose 'lora'."
            )
        _ = self.step

    @property
    def step(self) -> StepSettings:
        """How a step is taken."""
        return StepSettings(
            accumulate=self.accumulate,
            ema_decay=self.ema or None,
            stochastic_rounding=self.stochastic_rounding,
        )

    def beside_output(self, ending: str) -> Path:
        """Return a folder beside the output, of its name with an ending."""
        path = Path(self.output)
        return path.with_name(f"{path.stem}-{ending}")

    @property
    def checkpoint_folder(self) -> Path:
        """Where checkpoints are written."""
        own = self.checkpoints.folder
        return self.beside_output("checkpoints") if own is None else Path(own)

    @property
    def log_folder(self) -> Path:
        """Where logs are written."""
        return self.beside_output("log") if self.log.folder is None else Path(self.log.folder)


def train_config(values: Mapping[str, Any], folder: Path = Path()) -> TrainConfig:
    """Return the configuration that a TOML file's values are.

    **Arguments:** `values`: names and values, as TOML has them. `folder`: where the paths of data
    begin.
    **Raises:** `ValueError` for an unknown name, with the nearest right one, for a value of another
    type, and for what does not go together.
    """
    values = dict(values)
    data = values.pop("data", {})
    if not isinstance(data, Mapping):
        raise ValueError("`data` of a configuration is a table. Write it as [data].")
    _check_names(data, _names(DataSettings), "data.")
    arguments = _arguments(TrainConfig, values, "")
    return TrainConfig(**arguments, data=data_settings(data, folder))


def with_overrides(values: Mapping[str, Any], overrides: Sequence[tuple[str, Any]]) -> dict:
    """Return a configuration's values with others in their place.

    **Arguments:** `overrides`: names with dots between tables, as `optimizer.learning_rate`, and
    their values.
    **Raises:** `ValueError` for a name below one that is no table.
    """
    result = _copied(values)
    for name, value in overrides:
        *tables, key = name.split(".")
        place = result
        for table in tables:
            place = place.setdefault(table, {})
            if not isinstance(place, dict):
                raise ValueError(f"{table} of {name} is no table. Name a key of a table.")
        place[key] = value
    return result


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of nested tables."""
    copies = {}
    for name, value in values.items():
        copies[name] = _copied(value) if isinstance(value, Mapping) else value
    return copies


def _names(kind: type) -> list[str]:
    return [one.name for one in fields(kind)]


def _check_names(values: Mapping[str, Any], known: Sequence[str], prefix: str) -> None:
    """**Raises:** `ValueError` for an unknown name, with the nearest known one."""
    for name in values:
        if name in known:
            continue
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        remedy = f"Did you mean {prefix}{near[0]}?" if near else f"Choose from {', '.join(known)}."
        shown = printable(f"{prefix}{name}")
        raise ValueError(f"There is no setting {shown} of a training. {remedy}")


def _arguments(kind: type, values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the arguments of a class of settings, of which tables are such classes too.

    **Arguments:** `kind`: the class, a dataclass. `values`: of its table in the file. `prefix`: the
    names of the tables around it, each with a dot, for the messages.
    **Raises:** `ValueError` for a name that the class does not have, or a value of another type.
    """
    _check_names(values, _names(kind), prefix)
    hints = get_type_hints(kind)
    arguments = {}
    for name, value in values.items():
        arguments[name] = _converted(hints[name], value, f"{prefix}{name}")
    return arguments


def _converted(hint: Any, value: Any, name: str) -> Any:
    """Return a value of TOML as what a setting takes.

    **Raises:** `ValueError` for one of another type.
    """
    if is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} is a table of a configuration. Write it as [{name}].")
        return hint(**_arguments(hint, value, f"{name}."))
    for kind in _members(hint):
        converted = _as_kind(kind, value)
        if converted is not None:
            return converted
    needed = " or ".join(_described(kind) for kind in _members(hint))
    raise ValueError(f"{name} needs {needed}, got {printable(repr(value))}. Change it.")


def _members(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union, without that of None, which TOML does not have.

    A setting that may be None is one that may be left out.
    """
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(kind for kind in get_args(hint) if kind is not type(None))
    return (hint,)


def _as_kind(kind: Any, value: Any) -> Any:
    """Return a value as one type; None if it is none of it.

    A whole number is a float as well, and a single value a list of one. Where a pair is needed, it
    stands for both: `loss.guidance = 3.5` is the range from 3.5 to 3.5.
    """
    if get_origin(kind) is tuple:
        item, *rest = get_args(kind)
        if isinstance(value, str | int | float):
            value = [value] * (1 if rest == [...] else 1 + len(rest))
        if not isinstance(value, list) or (rest != [...] and len(value) != 1 + len(rest)):
            return None
        items = [_as_kind(item, one) for one in value]
        return None if None in items else tuple(items)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    is_right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    return value if is_right else None


def _described(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return f"a list of {get_args(kind)[0].__name__}"
    return f"a {kind.__name__}"
