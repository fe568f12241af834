"""How a model is meant to be sampled: read from and written to the folder of a checkpoint.

fluxjax's own file is `fluxjax.json`; diffusers describes it in the config of the scheduler.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fluxjax.checkpoint.detect import open_source
from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.family import family_of_networks
from fluxjax.checkpoint.folders import (
    DEFAULTS_FILE,
    MODEL_INDEX_FILE,
    SCHEDULER_FILE,
    SCHEDULER_FOLDER,
    TRANSFORMER_FOLDER,
)
from fluxjax.checkpoint.json_file import read_json
from fluxjax.checkpoint.kinds import KINDS
from fluxjax.checkpoint.locate import find_part, find_source
from fluxjax.checkpoint.members import member_of_file
from fluxjax.checkpoint.settings import Field, check_settings, describe, read_settings_file
from fluxjax.checkpoint.write import write_json
from fluxjax.nets.chroma_config import ChromaConfig
from fluxjax.nets.flux_config import FluxConfig
from fluxjax.zoo import APPENDED_FEATURES, FAMILIES, ZOO, Defaults, Family

_SHIFT = Field(kind="number", least=-50, most=50)  # the logarithm of a factor of the times
DEFAULTS_FIELDS: Mapping[str, Field] = {
    "steps": Field(kind="integer", least=1, most=100_000),
    "guidance": Field(kind="number", least=0, most=1000, optional=True),
    "cfg": Field(kind="number", least=0, most=1000),
    "height": Field(kind="integer", least=16, most=65_536, multiple=16),
    "width": Field(kind="integer", least=16, most=65_536, multiple=16),
    "max_length": Field(kind="integer", least=1, most=65_536),
    "visible_padding": Field(kind="integer", least=0, most=65_536, optional=True),
    "shift": Field(kind="boolean"),
    "base_shift": _SHIFT,
    "max_shift": _SHIFT,
}
"""What `fluxjax.json` may hold: fields of `Defaults`, each of which may be missing."""
_SCHEDULER_FIELDS: Mapping[str, Field] = {
    "use_dynamic_shifting": Field(kind="boolean", optional=True),
    "shift": Field(kind="number", least=1e-6, most=1e6, optional=True),
    "base_shift": replace(_SHIFT, optional=True),
    "max_shift": replace(_SHIFT, optional=True),
}
# Settings of diffusers' scheduler that change the times too, each with FLUX.1's value: fluxjax
# supports no other.
_WRITTEN_CONSTANTS = {
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "num_train_timesteps": 1000,
}
_CONSTANTS: Mapping[str, Any] = {
    **_WRITTEN_CONSTANTS,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "invert_sigmas": False,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
}
_SCHEDULER_CLASS = "FlowMatchEulerDiscreteScheduler"
_CLASSES: Mapping[str, tuple[str, str]] = {
    "flux": ("diffusers", "FluxTransformer2DModel"),
    "chroma": ("diffusers", "ChromaTransformer2DModel"),
    "clip": ("transformers", "CLIPTextModel"),
    "t5": ("transformers", "T5EncoderModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}
"""The library and the class that an index names for a network."""
_TOKENIZER_CLASSES = {"clip": "CLIPTokenizer", "t5": "T5TokenizerFast"}


def load_defaults(source: str | Path) -> Defaults:
    """Return how a model is meant to be sampled.

    For a model of the zoo, these are its defaults there. For a folder, they are read from its
    `fluxjax.json`. Without that file, they are those of the model of the zoo that the transformer
    is, by its shapes and its name, with the time shift of the scheduler's config, if there is one.

    **Arguments:** `source`: a name of the zoo, a hub id, or a path.
    **Raises:** `WeightsError` for a scheduler that fluxjax has no times for, or a file with a value
    that is not allowed; `FileNotFoundError` if there is no such source.
    """
    known = _known_defaults()
    if str(source) in known:
        return known[str(source)]
    own = Path(source) / DEFAULTS_FILE
    if own.is_file():
        return Defaults(**read_settings_file(own, DEFAULTS_FIELDS, closed=True))
    folder = find_source(source, [SCHEDULER_FOLDER])
    found = open_source(find_part(source, TRANSFORMER_FOLDER))
    family = family_of_networks(found.networks)
    network = found.network(KINDS[family.transformer])
    base = known[_member(family, network.files[0], network.config)]
    scheduler = folder / SCHEDULER_FOLDER / SCHEDULER_FILE
    if scheduler.is_file():
        return _with_shift_of(base, scheduler)
    return base


def _member(family: Family, path: Path, config: FluxConfig | ChromaConfig) -> str:
    """Return the name of the model of the zoo whose defaults a transformer has."""
    if not isinstance(config, FluxConfig):
        return next(iter(family.models))
    member = member_of_file(path, config)
    if member is not None:
        return member
    if config.in_channels - config.out_channels == APPENDED_FEATURES["control"]:
        return "canny"  # or depth, whose guidance is lower
    return "dev" if config.guidance_embed else "schnell"


def _known_defaults() -> dict[str, Defaults]:
    """Return the defaults of the zoo's models, by their names and by their hub ids."""
    known = {name: entry.defaults for name, entry in ZOO.items()}
    for family in FAMILIES:
        known |= family.variants
    for entry in ZOO.values():
        if entry.repository is not None:
            known[entry.repository] = entry.defaults
    return known


def _with_shift_of(base: Defaults, path: Path) -> Defaults:
    """Return defaults with the time shift of a scheduler's config."""
    settings = read_json(path)
    checked = check_settings(str(path), settings, _SCHEDULER_FIELDS)
    for name, value in _CONSTANTS.items():
        # For diffusers, null is the same as no value.
        if settings.get(name, value) not in (value, None):
            raise WeightsError(
                f"{path}: fluxjax supports {name!r} only as {describe(value)}, got "
                f"{describe(settings[name])}. Change it to that, and pass your own times to the "
                "sampler."
            )
    shifts = {name: value for name, value in checked.items() if value is not None}
    is_dynamic = shifts.pop("use_dynamic_shifting", False)
    static_shift = shifts.pop("shift", 1.0)
    if not is_dynamic and static_shift != 1:
        raise WeightsError(
            f"{path} has a static shift of {static_shift}. Sample the model with times of "
            f"flow_times(steps, mu=log({static_shift}))."
        )
    return replace(base, shift=is_dynamic, **shifts)


def write_pipeline(folder: Path, defaults: Defaults, family: Family) -> None:
    """Write the files of a diffusers folder that describe the whole model.

    These are its index, the scheduler's config, and fluxjax's defaults.
    """
    write_json(folder / SCHEDULER_FOLDER / SCHEDULER_FILE, _scheduler_config(defaults))
    write_json(folder / MODEL_INDEX_FILE, _model_index(family))
    write_json(folder / DEFAULTS_FILE, defaults_to_json(defaults))


def defaults_to_json(defaults: Defaults) -> dict[str, Any]:
    """Return the fields of defaults as `fluxjax.json` has them.

    Those that most models do not need are left out where they change nothing, so that versions of
    fluxjax read the file that do not know them.
    """
    plain = Defaults()
    values = asdict(defaults)
    for name in ("cfg", "visible_padding"):
        if values[name] == getattr(plain, name):
            del values[name]
    return values


def _model_index(family: Family) -> dict[str, Any]:
    """Return the index of a model's folder: the class that diffusers loads each part with."""
    index: dict[str, Any] = {
        "_class_name": family.pipeline,
        family.scheduler: ("diffusers", _SCHEDULER_CLASS),
    }
    for name, part in family.networks.items():
        index[part] = _CLASSES[name]
    for name, part in zip(family.text_encoders, family.tokenizers, strict=True):
        index[part] = ("transformers", _TOKENIZER_CLASSES[name])
    return index


def _scheduler_config(defaults: Defaults) -> dict[str, Any]:
    config = {
        "_class_name": _SCHEDULER_CLASS,
        "base_shift": defaults.base_shift,
        "max_shift": defaults.max_shift,
        "shift": 1.0,
        "use_dynamic_shifting": defaults.shift,
        **_WRITTEN_CONSTANTS,
    }
    return dict(sorted(config.items()))
