"""How a model is meant to be sampled, as its folder says: `fluxjax.json`, diffusers' scheduler."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fluxjax.checkpoint.detect import open_source
from fluxjax.checkpoint.kinds import FLUX
from fluxjax.checkpoint.locate import find, locate
from fluxjax.checkpoint.safetensors import WeightsError
from fluxjax.checkpoint.settings import Field, check_settings, describe, read_json, read_settings
from fluxjax.checkpoint.write import write_json
from fluxjax.zoo import ZOO, Defaults

DEFAULTS_FILE = "fluxjax.json"
_SHIFT = Field(kind="number", least=-50, most=50)  # the logarithm of a factor of the times
DEFAULTS_FIELDS: Mapping[str, Field] = {
    "steps": Field(kind="integer", least=1, most=100_000),
    "guidance": Field(kind="number", least=0, most=1000, optional=True),
    "height": Field(kind="integer", least=16, most=65_536, multiple=16),
    "width": Field(kind="integer", least=16, most=65_536, multiple=16),
    "max_length": Field(kind="integer", least=1, most=65_536),
    "shift": Field(kind="boolean"),
    "base_shift": _SHIFT,
    "max_shift": _SHIFT,
}
"""What `fluxjax.json` may hold: fields of `Defaults`, each of which may be left out."""
_SCHEDULER_FIELDS: Mapping[str, Field] = {
    "use_dynamic_shifting": Field(kind="boolean", optional=True),
    "shift": Field(kind="number", least=1e-6, most=1e6, optional=True),
    "base_shift": replace(_SHIFT, optional=True),
    "max_shift": replace(_SHIFT, optional=True),
}


# Settings of diffusers' scheduler that change the times, with the value under which they are FLUX.1's.
_ONLY = {
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "num_train_timesteps": 1000,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "invert_sigmas": False,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
}


def load_defaults(source: str | Path) -> Defaults:
    """Return how a model is meant to be sampled: a zoo entry's defaults, or those in the folder's `fluxjax.json`, or dev's or
    schnell's, as its transformer takes guidance or not, with the shift that its scheduler's config says, if it has one.

    **Raises:** `WeightsError` for a scheduler with a static shift, or a file with a value that it can't have;
    `FileNotFoundError` for no such source.
    """
    named = {name: entry.defaults for name, entry in ZOO.items()}
    named |= {
        entry.repository: entry.defaults for entry in ZOO.values() if entry.repository is not None
    }
    if str(source) in named:
        return named[str(source)]
    own = Path(source) / DEFAULTS_FILE
    if own.is_file():
        return Defaults(**read_settings(own, DEFAULTS_FIELDS, closed=True))
    folder = find(source, ["scheduler"])
    flux = open_source(locate(source, FLUX.folder)).network(FLUX).config
    base = named["dev" if flux.guidance_embed else "schnell"]
    described = folder / "scheduler" / "scheduler_config.json"
    return _scheduled(base, described) if described.is_file() else base


def _scheduled(base: Defaults, path: Path) -> Defaults:
    """Return defaults with the shift that a scheduler's config says; diffusers takes null there as no value."""
    settings = read_json(path)
    checked = check_settings(str(path), settings, _SCHEDULER_FIELDS)
    other = [
        name for name, value in _ONLY.items() if settings.get(name, value) not in (value, None)
    ]
    if other:
        raise WeightsError(
            f"{path}: fluxjax follows {other[0]!r} only where it is {describe(_ONLY[other[0]])}, got "
            f"{describe(settings[other[0]])}. Set it so, and pass times of your own to the sampler."
        )
    scheduler = {name: value for name, value in checked.items() if value is not None}
    dynamic, static = scheduler.pop("use_dynamic_shifting", False), scheduler.pop("shift", 1.0)
    if not dynamic and static != 1:
        raise WeightsError(
            f"{path} has a static shift of {static}. Sample it with times of flow_times(steps, mu=log({static}))."
        )
    return replace(base, shift=dynamic, **scheduler)


def write_pipeline(folder: Path, defaults: Defaults) -> None:
    """Write what a diffusers folder says of the whole: its index, its scheduler, and fluxjax's defaults."""
    for name, content in _pipeline(defaults).items():
        write_json(folder / name, content)


def _pipeline(defaults: Defaults) -> dict[str, Any]:
    return {
        "scheduler/scheduler_config.json": _scheduler(defaults),
        "model_index.json": _MODEL_INDEX,
        DEFAULTS_FILE: asdict(defaults),
    }


_MODEL_INDEX = {
    "_class_name": "FluxPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def _scheduler(defaults: Defaults) -> dict[str, Any]:
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "base_image_seq_len": 256,
        "base_shift": defaults.base_shift,
        "max_image_seq_len": 4096,
        "max_shift": defaults.max_shift,
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "use_dynamic_shifting": defaults.shift,
    }
