"""The named models, as data, and the loaders of their parts from a name, a folder, a file, or a hub id."""

import errno
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
from jax.typing import DTypeLike

from fluxjax.convert.files import WeightsError
from fluxjax.convert.layouts import write_json
from fluxjax.convert.load import check_dtype, load
from fluxjax.convert.source import CLIP, FLUX, T5_XXL, VAE, Kind, open_source
from fluxjax.hub import cached_file, cached_folder, check_whole, fetch_file, fetch_folder
from fluxjax.memory import load_streamed
from fluxjax.nets.clip import Clip, ClipConfig
from fluxjax.nets.flux import Flux, FluxConfig
from fluxjax.nets.t5 import T5, T5Config
from fluxjax.nets.vae import Vae, VaeConfig
from fluxjax.quantize import load_quantized
from fluxjax.settings import Field, check_settings, describe, read_json, read_settings
from fluxjax.tokens import Tokenizers

Network = TypeVar("Network", bound=eqx.Module)
DEFAULTS_FILE = "fluxjax.json"


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """How a model is meant to be sampled. `guidance`: None if it takes none. `height`, `width`: in pixels. `max_length`: T5
    tokens. `shift`: whether the times are shifted by resolution, from `base_shift` to `max_shift`."""

    steps: int = 28
    guidance: float | None = 3.5
    height: int = 1024
    width: int = 1024
    max_length: int = 512
    shift: bool = True
    base_shift: float = 0.5
    max_shift: float = 1.15


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


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A named model: its hub id, or None for the one that ships with the package."""

    repository: str | None
    defaults: Defaults


# Its latents are so redundant that the layout is decided at high noise, so it is shifted more than dev.
_TINY = Defaults(steps=20, height=128, width=128, max_length=24, base_shift=2.0, max_shift=2.65)

ZOO: Mapping[str, Entry] = {
    "tiny": Entry(repository=None, defaults=_TINY),
    "dev": Entry(repository="black-forest-labs/FLUX.1-dev", defaults=Defaults()),
    "schnell": Entry(
        repository="black-forest-labs/FLUX.1-schnell",
        defaults=Defaults(steps=4, guidance=None, max_length=256, shift=False),
    ),
    "krea": Entry(repository="black-forest-labs/FLUX.1-Krea-dev", defaults=Defaults(guidance=4.5)),
}


def load_flux(
    source: str | Path,
    *,
    config: FluxConfig | None = None,
    dtype: DTypeLike | None = None,
    sharding: Any = None,
    stream: bool = False,
    quantize: str | None = None,
) -> Flux:
    """Load the transformer.

    **Arguments:** `source`: a zoo name ("tiny", "dev", …), a file or a folder of any layout (the documentation's page on
    weights lists them), or a hub id. `config`: in place of what the source says, for a file that does not tell. `dtype`: of
    the weights, a float of 8 to 64 bits; None keeps the file's, and decodes quantized weights to bfloat16. `sharding`: a
    `jax.sharding.Sharding` for every leaf, a pytree of them, or a function that makes one of the network of shapes; a process
    reads its devices' slices alone. `stream`: leave the blocks' matrices in the files, from which each is read whenever it is
    used, the next one ahead: for a machine whose memory does not hold them. `quantize`: "int8" or "fp8": round the blocks'
    matrices as they are read, as `fluxjax.quantize` does.
    **Raises:** `WeightsError` for weights that can't be read or do not fit, `FileNotFoundError` for no such source,
    `ValueError` for a dtype that weights are not loaded as, or more than one of `sharding`, `stream` and `quantize`.
    """
    return _load(FLUX, source, config, dtype, sharding, stream, quantize)


def load_clip(
    source: str | Path, *, config: ClipConfig | None = None, dtype: DTypeLike | None = None, sharding: Any = None
) -> Clip:
    """Load CLIP's text encoder. Arguments and errors as for `load_flux`."""
    return _load(CLIP, source, config, dtype, sharding)


def load_t5(
    source: str | Path,
    *,
    config: T5Config | None = None,
    dtype: DTypeLike | None = None,
    sharding: Any = None,
    stream: bool = False,
    quantize: str | None = None,
) -> T5:
    """Load T5's encoder. Arguments and errors as for `load_flux`."""
    return _load(T5_XXL, source, config, dtype, sharding, stream, quantize)


def load_vae(
    source: str | Path, *, config: VaeConfig | None = None, dtype: DTypeLike | None = None, sharding: Any = None
) -> Vae:
    """Load the VAE. Arguments and errors as for `load_flux`."""
    return _load(VAE, source, config, dtype, sharding)


def _load(
    kind: Kind,
    source: str | Path,
    config: Any,
    dtype: DTypeLike | None,
    sharding: Any,
    stream: bool = False,
    quantize: str | None = None,
) -> Any:
    dtype = check_dtype(f"load_{kind.name}", dtype)
    if (sharding is not None) + stream + (quantize is not None) > 1:
        raise ValueError("What is streamed or quantized is read by one device. Pass one of sharding=, stream= and quantize=.")
    plan = open_source(locate(source, kind.folder)).part(kind).plan(config)
    if quantize is not None:
        return load_quantized(plan, quantize, dtype=dtype)
    return load_streamed(plan, dtype=dtype) if stream else load(plan, dtype=dtype, sharding=sharding)


def load_tokenizers(source: str | Path) -> Tokenizers:
    """Read both tokenizers, from `tokenizer` and `tokenizer_2` of a model's folder, a zoo name, or a hub id.

    **Raises:** `FileNotFoundError` for a source without them, as files of weights are; `ValueError` for damaged ones.
    """
    folder = find(source, ["tokenizer", "tokenizer_2"])
    if not (folder / "tokenizer").is_dir():
        raise FileNotFoundError(
            f"{source} comes without tokenizers. Pass a folder that holds it beside `tokenizer` and `tokenizer_2`, which are "
            "the same for all of FLUX.1."
        )
    return Tokenizers.read(folder / "tokenizer", folder / "tokenizer_2")


def load_defaults(source: str | Path) -> Defaults:
    """Return how a model is meant to be sampled: a zoo entry's defaults, or those in the folder's `fluxjax.json`, or dev's or
    schnell's, as its transformer takes guidance or not, with the shift that its scheduler's config says, if it has one.

    **Raises:** `WeightsError` for a scheduler with a static shift, or a file with a value that it can't have;
    `FileNotFoundError` for no such source.
    """
    named = {name: entry.defaults for name, entry in ZOO.items()}
    named |= {entry.repository: entry.defaults for entry in ZOO.values() if entry.repository is not None}
    if str(source) in named:
        return named[str(source)]
    own = Path(source) / DEFAULTS_FILE
    if own.is_file():
        return Defaults(**read_settings(own, DEFAULTS_FIELDS, closed=True))
    folder = find(source, ["scheduler"])
    flux = open_source(locate(source, FLUX.folder)).part(FLUX).config
    base = named["dev" if flux.guidance_embed else "schnell"]
    described = folder / "scheduler" / "scheduler_config.json"
    return _scheduled(base, described) if described.is_file() else base


def _scheduled(base: Defaults, path: Path) -> Defaults:
    """Return defaults with the shift that a scheduler's config says; diffusers takes null there as no value."""
    settings = read_json(path)
    checked = check_settings(str(path), settings, _SCHEDULER_FIELDS)
    other = [name for name, value in _ONLY.items() if settings.get(name, value) not in (value, None)]
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


def locate(source: str | Path, part: str) -> Path:
    """Return where one part of a model lies: its own folder or file, or those of the whole; downloaded if need be.

    **Raises:** `FileNotFoundError` for no such source, and what `download` raises.
    """
    path = find(source, [part])
    return path / part if (path / part).is_dir() else path


def find(source: str | Path, parts: Iterable[str], *, cached: bool = False) -> Path:
    """Return the folder or file that a source is: a path, or a name whose parts are downloaded, or with `cached` only looked
    for in the hub's cache. Errors as for `locate`."""
    entry, path = ZOO.get(str(source)), Path(source)
    if entry is not None and entry.repository is None:
        return tiny_folder()
    if entry is None and path.exists():
        return path
    if entry is not None or _is_repository(str(source)):
        return download(str(source), parts, cached=cached, verify=False)
    raise FileNotFoundError(
        f"There is no {str(source)!r}. Pass a known model ({', '.join(ZOO)}), a model's folder, a .safetensors or .gguf file, "
        "or a hub id."
    )


def _is_repository(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith((".", "/", "~"))


WHOLE = ("transformer", "text_encoder", "text_encoder_2", "vae", "tokenizer", "tokenizer_2", "scheduler")
"""The folders of a diffusers checkpoint that fluxjax reads."""


def download(name: str, parts: Iterable[str] = WHOLE, *, cached: bool = False, verify: bool = True) -> Path:
    """Download the folders of a model that fluxjax reads into the hub's cache, those files that are not there or damaged.

    A connection that is cut is taken up again where it ended. A run that is stopped keeps the files that have come whole.

    **Arguments:** `name`: a zoo name or a hub id in the diffusers layout. `parts`: of its folders. `cached`: take
    what is in the cache, and ask nobody. `verify`: compare files that are in the cache with their checksums (dev's 34 GB take
    about a minute), and fetch those anew that differ.
    **Returns:** the folder that holds them.
    **Raises:** `WeightsError` for a gated repository, or answers that would place a file outside of the cache;
    `FileNotFoundError` for none of that name or layout, `ConnectionError` without a network; each says what to do.
    """
    entry = ZOO.get(name)
    if entry is not None and entry.repository is None:
        return tiny_folder()
    repository = name if entry is None else entry.repository
    if repository is None or not _is_repository(repository):
        raise FileNotFoundError(f"No model {name!r} to download. Pass one of {', '.join(ZOO)}, or a hub id (owner/name).")
    parts = list(parts)
    patterns = ["model_index.json"] + [
        f"{part}/{end}" for part in parts for end in ("*.safetensors", "*.json", "*.txt", "*.model")
    ]
    with _hub_errors(name, repository, cached):
        root, asked = _folder_of(repository, patterns, cached, verify)
    missing = [part for part in parts if not (root / part).is_dir()]
    if missing and asked:
        raise FileNotFoundError(f"{repository} holds no {missing[0]} folder. Pass a repository in the diffusers layout.")
    if missing and not cached:
        raise ConnectionError(
            f"{repository} is not whole in the cache: {missing[0]} is missing. Check the network, and try again."
        )
    return root


def _folder_of(repository: str, patterns: list[str], cached: bool, verify: bool) -> tuple[Path, bool]:
    """Return the folder of a repository in the cache, and whether the hub was asked for what is missing: if it can't be
    reached, what is there is taken."""
    if cached:
        return cached_folder(repository, patterns), False
    try:
        return fetch_folder(repository, patterns, verify=verify), True
    except WeightsError:
        raise
    except Exception as error:  # the network's errors are of several libraries
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's
        try:
            root = cached_folder(repository, patterns)
        except Exception:
            raise error from None
        if verify:
            check_whole(root, patterns)
        return root, False


def download_file(repository: str, file: str) -> Path:
    """Download one file of a repository into the hub's cache, unless it is there and whole. Errors as for `download`."""
    with _hub_errors(repository, repository, cached=False):
        try:
            return fetch_file(repository, file)
        except WeightsError:
            raise
        except Exception:  # the network's errors are of several libraries
            found = cached_file(repository, file)
            if found is None:
                raise
            check_whole(found.parent, [found.name])
            return found


@contextmanager
def _hub_errors(name: str, repository: str, cached: bool) -> Iterator[None]:
    """Turn the hub's errors into ones that say what to do."""
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    page = f"{ENDPOINT}/{repository}"
    try:
        yield
    except WeightsError:
        raise
    except GatedRepoError as error:
        raise WeightsError(f"{repository} is gated: accept its licence at {page}, then log in with `hf auth login`.") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(f"There is no model at {page}, or it is private and needs `hf auth login`.") from error
    except Exception as error:  # the network's errors are of several libraries
        if cached:
            raise FileNotFoundError(f"{repository} is not in the hub's cache. Run `fluxjax download {name}` first.") from error
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise FileNotFoundError(f"{page} does not hold that file: see its list of files.") from error
        raise _download_error(repository, page, error) from error


def _download_error(repository: str, page: str, error: Exception) -> Exception:
    """Say what to do about a download that failed."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return WeightsError(f"No room for {repository} in the hub's cache. Free some, or set HF_HOME to a larger disk.")
    causes: list[Any] = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    status = next((cause.response.status_code for cause in causes if getattr(cause, "response", None) is not None), None)
    if status in (401, 403):
        return WeightsError(f"{page} refuses this login ({status}). Log in with `hf auth login`, with access to {repository}.")
    return ConnectionError(
        f"{repository} is not whole in the cache and can't be downloaded: {error}. Check the network and run it again: files "
        "that have come whole are kept."
    )


def tiny_folder() -> Path:
    """Return where the model that ships with the package lies: inside it, or beside it in a checkout."""
    inside = Path(__file__).parent / "weights" / "tiny"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "weights" / "tiny"


def shipped_lora(name: str) -> Path:
    """Return an adapter that ships with the tiny model. **Raises:** `FileNotFoundError` for none of that name."""
    folder = tiny_folder() / "loras"
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in folder.glob("*.safetensors")))
        raise FileNotFoundError(f"No adapter {name!r} ships with the tiny model. There are: {known}.")
    return path
