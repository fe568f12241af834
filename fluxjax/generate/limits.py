"""The least memory that drawing needs, beside what the machine has; what can't fit is refused."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fluxjax.checkpoint.detect import open_source
from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.family import family_of_source
from fluxjax.checkpoint.kinds import CONTROLNET, KINDS, Kind
from fluxjax.checkpoint.locate import find_part
from fluxjax.devices.vae_memory import VAE_MEMORY
from fluxjax.generate.stage_memory import AddedTokens, Configs, Demand, least_bytes
from fluxjax.nets.chroma_config import ChromaConfig
from fluxjax.nets.controlnet_config import ControlNetConfig
from fluxjax.nets.flux_config import FluxConfig
from fluxjax.nets.t5 import T5Config
from fluxjax.nets.vae import VaeConfig
from fluxjax.zoo import ZOO, Family, family_of, named_model


def read_configs(source: str | Path, files: Mapping[str, str | Path] | None = None) -> Configs:
    """Return the configs of a model on this machine, or FLUX.1's for one on the hub.

    Nothing is downloaded.

    **Arguments:** `files`: that replace its networks, as of `LoadOptions`.
    **Raises:** as `load_flux` for a local source.
    """
    local = {name: file for name, file in (files or {}).items() if Path(file).exists()}
    transformer = known_flux_config(local.get("flux", source)) or FluxConfig()
    configs: dict[str, Any] = {"t5": T5Config(), "vae": VaeConfig()}
    if _is_local(source):
        # All of them, so that an error names one that is missing.
        for name in family_of_source(source).networks:
            if name not in local:
                configs[name] = _read_config(source, KINDS[name])
    for name in local.keys() - {"flux"}:
        configs[name] = _read_config(local[name], KINDS[name])
    return Configs(configs["t5"], transformer, configs["vae"])


def check_files(files: Mapping[str, str | Path], family: Family) -> None:
    """Check that files which replace networks of a model hold them, as far as they are here.

    **Arguments:** `files`: as of `LoadOptions`.
    **Raises:** `WeightsError` for a file of another network; `FileNotFoundError` for one that is
    not there; `ValueError` for a network that the model does not have.
    """
    for option, file in files.items():
        name = family.transformer if option == "flux" else option
        if name not in family.networks:
            raise ValueError(f"--{option} {file}: the model has no such network. Leave it out.")
        kind = KINDS[name]
        if Path(file).exists():
            with naming_option(option):
                open_source(find_part(file, kind.folder)).network(kind)
        elif Path(file).suffix in (".safetensors", ".gguf", ".sft"):
            raise FileNotFoundError(f"--{option} {file}: there is no such file.")


@contextmanager
def naming_option(option: str) -> Iterator[None]:
    """Begin the errors of a file with the option that names it."""
    try:
        yield
    except WeightsError as error:
        raise WeightsError(f"--{option}: {error}") from None


def known_flux_config(source: str | Path) -> FluxConfig | ChromaConfig | None:
    """Return the config of a model's transformer, as far as it is known without a download.

    **Returns:** None for a hub id that is not a named model's.
    **Raises:** as `load_flux` for a local source.
    """
    if _is_local(source):
        return _read_config(source, KINDS[family_of_source(source).transformer])
    model = named_model(str(source))
    if model is None:
        return None
    base = KINDS[family_of(str(source)).transformer].config()
    if not isinstance(base, FluxConfig):
        return base
    return replace(
        base,
        in_channels=base.in_channels + model.appended_features,
        double_depth=model.double_blocks or base.double_depth,
        guidance_embed=model.defaults.guidance is not None,
    )


def controlnet_config(source: str | Path) -> ControlNetConfig:
    """Return the config of a ControlNet, or the largest published one's for one on the hub."""
    if not Path(source).exists():
        return ControlNetConfig.union()
    return _read_config(source, CONTROLNET)


def _is_local(source: str | Path) -> bool:
    model = ZOO.get(str(source))
    return Path(source).exists() if model is None else model.repository is None


def _read_config(source: str | Path, kind: Kind) -> Any:
    return open_source(find_part(source, kind.folder)).network(kind).config


def default_vae_memory(demand: Demand, configs: Configs) -> float:
    """Return the bytes that the VAE may need beside its weights before it is run in strips.

    They are what denoising needs at least, so that decoding is not the peak of the run for long;
    or those with which 1024x1024 is decoded whole.
    """
    return max(least_bytes(demand, configs)["denoising"], VAE_MEMORY)


def check_memory(demand: Demand, configs: Configs, *, devices: int = 1) -> None:
    """Check that drawing can fit. `devices`: of a mesh, which share the work.

    **Raises:** `ValueError` if a stage needs more memory than a device has, with both.
    """
    device = jax.local_devices()[0]
    present = memory_bytes(device)
    if present is None:
        return
    shared = 1 if device.platform == "cpu" else devices  # those of one machine have one memory
    stage, most = max(least_bytes(demand, configs).items(), key=lambda item: item[1])
    if most // shared > present:
        raise ValueError(
            f"{demand.rows} images of {demand.height}x{demand.width} at once, with {demand.tokens} "
            f"tokens{_beside(demand.added)} and {demand.steps} steps, need at least "
            f"{gigabytes(most // shared)} for {stage}, and this device has {gigabytes(present)}. "
            "Lower --batch, --height and --width, --max-sequence-length, or --steps."
        )


def _beside(added: AddedTokens) -> str:
    """Return what there is beside the prompt's tokens, for a message."""
    parts = [f", {added.txt} more"] if added.txt else []
    if added.reference:
        parts.append(f", {added.reference} of references")
    if added.residuals:
        parts.append(f", {added.residuals} residuals of ControlNets")
    return "".join(parts)


def gigabytes(count: int) -> str:
    """Return a number of bytes for people."""
    return f"{count / 1e9:,.1f} GB"


def memory_bytes(device: jax.Device) -> int | None:
    """Return the memory of a device, which for a CPU is the machine's or the container's; None if
    that is not known.
    """
    if device.platform != "cpu":
        with suppress(Exception):  # not every backend tells
            return (device.memory_stats() or {}).get("bytes_limit")
        return None
    known = [_physical_bytes(), *map(_read_limit, _CONTAINER_LIMITS)]
    return min((count for count in known if count is not None), default=None)


_CONTAINER_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def available_host_bytes() -> int | None:
    """Return the bytes of the host's memory that are free for new arrays; None if not known."""
    limits = [_read_limit(path) for path in _CONTAINER_LIMITS]
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(1024 * int(line.split()[1]))
    return min((count for count in limits if count is not None), default=_physical_bytes())


def _physical_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _read_limit(path: Path) -> int | None:
    with suppress(OSError, ValueError):  # none, or "max"
        return int(path.read_text())
    return None


def check_devices() -> None:
    """**Raises:** `ValueError` if JAX finds no device of the kind that JAX_PLATFORMS names."""
    try:
        jax.local_devices()
    except (RuntimeError, AssertionError) as error:  # JAX raises either
        configured = jax.config.jax_platforms  # type: ignore[attr-defined]
        named = os.environ.get("JAX_PLATFORMS") or configured
        raise ValueError(
            f"JAX finds no device of JAX_PLATFORMS={named!r} ({str(error) or 'none starts'}). "
            "Unset it, or install JAX for "
            "that device."
        ) from error


def check_finite_times(times: Any) -> None:
    """**Raises:** `ValueError` for sampling times that are NaN: a shift by resolution overflows for
    huge images.
    """
    if not np.isfinite(np.asarray(times)).all():
        raise ValueError(
            "The sampling times overflow at this image size or shift. "
            "Choose a smaller one, or --timer uniform."
        )


def first_device() -> jax.Device:
    """Return the device of this process that plans and checks are for."""
    return jax.local_devices()[0]
