"""The named models, as data, and the loaders of their parts from a name, a folder, a file, or a hub id."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
from jax.typing import DTypeLike

from fluxjax.convert import configs, tables
from fluxjax.convert.files import Tensor, WeightsError, read_headers, weight_files, write
from fluxjax.convert.load import abstract, choose, export, load
from fluxjax.nets.clip import Clip, ClipConfig
from fluxjax.nets.flux import Flux, FluxConfig
from fluxjax.nets.t5 import T5, T5Config
from fluxjax.nets.vae import Vae, VaeConfig
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
    source: str | Path, *, config: FluxConfig | None = None, dtype: DTypeLike | None = None, sharding: Any = None
) -> Flux:
    """Load the transformer.

    **Arguments:** `source`: a zoo name ("tiny", "dev", …), a diffusers folder or its `transformer` folder, a file of BFL's or
    diffusers' names, or a hub id. `config`: in place of what the source says, for a file that does not tell. `dtype`: of
    the weights; None keeps the file's. `sharding`: a `jax.sharding.Sharding` for every leaf, or a pytree of them.
    **Raises:** `WeightsError` for weights that can't be read or do not fit, `FileNotFoundError` for no such source.
    """
    tensors, settings = _read(source, "transformer")
    dialect = choose(tensors, (tables.FLUX_BFL, tables.FLUX_DIFFUSERS), "FLUX transformer", source)
    if config is None and settings is not None:
        config = configs.flux_from_json(settings)
    if config is None and dialect is tables.FLUX_DIFFUSERS:
        raise WeightsError(f"{source} comes without a config.json. Pass its folder, or config=FluxConfig(…).")
    config = configs.flux_from_shapes(tensors) if config is None else config
    return load(abstract(Flux, config), tensors, dialect, parts=flux_parts(config), dtype=dtype, sharding=sharding)


def load_clip(
    source: str | Path, *, config: ClipConfig | None = None, dtype: DTypeLike | None = None, sharding: Any = None
) -> Clip:
    """Load CLIP's text encoder, from `text_encoder`; a single file without a config is taken for CLIP-L. Arguments and
    errors as for `load_flux`."""
    tensors, settings = _read(source, "text_encoder")
    dialect = choose(tensors, (tables.CLIP_TRANSFORMERS,), "CLIP text encoder", source)
    if config is None:
        config = ClipConfig.large() if settings is None else configs.clip_from_json(settings)
    return load(abstract(Clip, config), tensors, dialect, dtype=dtype, sharding=sharding)


def load_t5(source: str | Path, *, config: T5Config | None = None, dtype: DTypeLike | None = None, sharding: Any = None) -> T5:
    """Load T5's encoder, from `text_encoder_2`; a single file without a config is taken for T5-XXL. Arguments and errors as
    for `load_flux`."""
    tensors, settings = _read(source, "text_encoder_2")
    # Some files hold the embedding under its second name alone.
    if "shared.weight" not in tensors and "encoder.embed_tokens.weight" in tensors:
        tensors["shared.weight"] = tensors.pop("encoder.embed_tokens.weight")
    dialect = choose(tensors, (tables.T5_TRANSFORMERS,), "T5 encoder", source)
    if config is None:
        config = T5Config.xxl() if settings is None else configs.t5_from_json(settings)
    return load(abstract(T5, config), tensors, dialect, dtype=dtype, sharding=sharding)


def load_vae(
    source: str | Path, *, config: VaeConfig | None = None, dtype: DTypeLike | None = None, sharding: Any = None
) -> Vae:
    """Load the VAE, from `vae` or a file of BFL's names (`ae.safetensors`). Arguments and errors as for `load_flux`."""
    tensors, settings = _read(source, "vae")
    bfl = tables.vae_bfl(4 if config is None else len(config.channels))
    dialect = choose(tensors, (bfl, tables.VAE_DIFFUSERS), "VAE", source)
    if config is None and settings is not None:
        config = configs.vae_from_json(settings)
    if config is None and dialect is tables.VAE_DIFFUSERS:
        raise WeightsError(f"{source} comes without a config.json. Pass its folder, or config=VaeConfig(…).")
    config = configs.vae_from_shapes(tensors) if config is None else config
    if dialect is not tables.VAE_DIFFUSERS:
        dialect = tables.vae_bfl(len(config.channels))
    return load(abstract(Vae, config), tensors, dialect, dtype=dtype, sharding=sharding)


def load_tokenizers(source: str | Path) -> Tokenizers:
    """Read both tokenizers, from `tokenizer` and `tokenizer_2` of a diffusers folder, a zoo name, or a hub id."""
    return Tokenizers.read(_locate(source, "tokenizer"), _locate(source, "tokenizer_2"))


def load_defaults(source: str | Path) -> Defaults:
    """Return how a model is meant to be sampled: a zoo entry's defaults, or those in the folder's `fluxjax.json`, or dev's or
    schnell's, as its transformer takes guidance or not, with the shift that its scheduler's config says.

    **Raises:** `WeightsError` for a scheduler with a static shift, `FileNotFoundError` for no such source.
    """
    named = {name: entry.defaults for name, entry in ZOO.items()}
    named |= {entry.repository: entry.defaults for entry in ZOO.values() if entry.repository is not None}
    if str(source) in named:
        return named[str(source)]
    own = Path(source) / DEFAULTS_FILE
    if own.is_file():
        return Defaults(**json.loads(own.read_text()))
    flux = json.loads((_locate(source, "transformer") / "config.json").read_text())
    scheduler = json.loads((_locate(source, "scheduler") / "scheduler_config.json").read_text())
    dynamic, static = scheduler.get("use_dynamic_shifting", False), scheduler.get("shift", 1.0)
    if not dynamic and static != 1:
        raise WeightsError(
            f"{source} has a static shift of {static}. Sample it with times of flow_times(steps, mu=log({static}))."
        )
    base = named["dev" if flux.get("guidance_embeds", False) else "schnell"]
    shifts = {name: scheduler.get(name, getattr(base, name)) for name in ("base_shift", "max_shift")}
    return replace(base, shift=dynamic, **shifts)


def save_folder(folder: Path, *, flux: Flux, clip: Clip, t5: T5, vae: Vae, defaults: Defaults) -> None:
    """Write the networks as a diffusers folder, each in its leaves' dtype; the tokenizers are copied by the caller.

    **Raises:** `WeightsError` for a config that diffusers can't express.
    """
    parts: list[tuple[str, Any, tables.Dialect, dict[str, Any], str]] = [
        ("transformer", flux, tables.FLUX_DIFFUSERS, configs.flux_to_json(flux.config), "diffusion_pytorch_model"),
        ("text_encoder", clip, tables.CLIP_TRANSFORMERS, configs.clip_to_json(clip.config), "model"),
        ("text_encoder_2", t5, tables.T5_TRANSFORMERS, configs.t5_to_json(t5.config), "model"),
        ("vae", vae, tables.VAE_DIFFUSERS, configs.vae_to_json(vae.config), "diffusion_pytorch_model"),
    ]
    for name, network, dialect, settings, stem in parts:
        rows = flux_parts(network.config) if isinstance(network, Flux) else None
        write(folder / name / f"{stem}.safetensors", dict(export(network, dialect, parts=rows)))
        _write_json(folder / name / "config.json", settings)
    _write_json(folder / "scheduler" / "scheduler_config.json", _scheduler(defaults))
    _write_json(folder / "model_index.json", _MODEL_INDEX)
    _write_json(folder / DEFAULTS_FILE, asdict(defaults))


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


def flux_parts(config: FluxConfig) -> dict[str, slice]:
    """Return the rows that q, k, v and the MLP take in the fused weights."""
    width = config.width
    rows = {name: slice(i * width, (i + 1) * width) for i, name in enumerate("qkv")}
    return rows | {"mlp": slice(3 * width, 3 * width + config.mlp_width)}


def _read(source: str | Path, part: str) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Return a part's tensors, and its config if there is one."""
    path = _locate(source, part)
    if path.is_file():
        return read_headers([path]), None
    config = path / "config.json"
    return read_headers(weight_files(path)), json.loads(config.read_text()) if config.is_file() else None


def _locate(source: str | Path, part: str) -> Path:
    """Return the folder of one part, or the file that the source is."""
    entry = ZOO.get(str(source))
    path = tiny_folder() if entry is not None and entry.repository is None else Path(source)
    if entry is not None and entry.repository is not None:
        return _download(entry.repository, part)
    if path.is_file():
        return path
    if (path / part).is_dir():
        return path / part
    if path.is_dir() and not (path / "model_index.json").is_file():
        return path  # the part's own folder
    if not path.exists() and _is_repository(str(source)):
        return _download(str(source), part)
    known = ", ".join(ZOO)
    raise FileNotFoundError(
        f"No {part} at {str(source)!r}. Pass a known model ({known}), a diffusers folder, a .safetensors file, or a hub id."
    )


def _is_repository(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith((".", "/", "~"))


def _download(repository: str, part: str) -> Path:
    """Return a part's folder in the hub's cache, downloaded if it is not there."""
    import huggingface_hub  # takes as long to import as the rest of fluxjax
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = [f"{part}/*.safetensors", f"{part}/*.json", f"{part}/*.txt", f"{part}/*.model"]
    try:
        root = huggingface_hub.snapshot_download(repository, allow_patterns=patterns)
    except GatedRepoError as error:
        raise WeightsError(
            f"{repository} is gated: accept its licence on its hub page, then log in with `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(f"The hub has no model {repository!r}, or it needs `hf auth login`.") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ConnectionError(f"{repository} is not in the cache and can't be downloaded: {error}") from error
    folder = Path(root) / part
    if not folder.is_dir():
        raise FileNotFoundError(f"{repository} holds no {part} folder. Pass a repository in the diffusers layout.")
    return folder


def tiny_folder() -> Path:
    """Return where the model that ships with the package lies: inside it, or beside it in a checkout."""
    inside = Path(__file__).parent / "weights" / "tiny"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "weights" / "tiny"


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
