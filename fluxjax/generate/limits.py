"""The least memory that drawing needs, beside what the machine has; what can't fit is refused."""

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike

from fluxjax.checkpoint.detect import open_source
from fluxjax.checkpoint.family import family_of_source
from fluxjax.checkpoint.kinds import KINDS, Kind
from fluxjax.checkpoint.locate import find_part
from fluxjax.devices.vae_memory import VAE_MEMORY
from fluxjax.generate.latents import image_tokens
from fluxjax.nets.chroma_config import ChromaConfig
from fluxjax.nets.flux_config import FluxConfig
from fluxjax.nets.t5 import T5Config
from fluxjax.nets.vae import VaeConfig
from fluxjax.zoo import ZOO, family_of, named_model


class Demand(NamedTuple):
    """What is drawn at once.

    `rows`: images in a forward pass. `height`, `width`: in pixels. `tokens`: of a prompt, for T5.
    `dtype`: of the activations.
    """

    rows: int
    height: int
    width: int
    steps: int
    tokens: int
    dtype: DTypeLike


class Configs(NamedTuple):
    """The configs of the networks that need the most memory."""

    t5: T5Config
    flux: FluxConfig | ChromaConfig
    vae: VaeConfig


def read_configs(source: str | Path) -> Configs:
    """Return the configs of a model on this machine, or FLUX.1's for one on the hub.

    Nothing is downloaded.

    **Raises:** as `load_flux` for a local source.
    """
    if not _is_local(source):
        return Configs(T5Config(), known_flux_config(source) or FluxConfig(), VaeConfig())
    family = family_of_source(source)
    # All of them, so that an error names one that is missing.
    configs = {name: _read_config(source, KINDS[name]) for name in family.networks}
    return Configs(configs["t5"], configs[family.transformer], configs["vae"])


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
        guidance_embed=model.defaults.guidance is not None,
    )


def _is_local(source: str | Path) -> bool:
    model = ZOO.get(str(source))
    return Path(source).exists() if model is None else model.repository is None


def _read_config(source: str | Path, kind: Kind) -> Any:
    return open_source(find_part(source, kind.folder)).network(kind).config


def needed_bytes(demand: Demand, configs: Configs) -> dict[str, int]:
    """Return the least bytes that each stage needs on one device, beside the weights.

    They are lower bounds: the arrays that must exist together, without what a compiler adds.

    - encoding: T5's position bias, [heads, tokens, tokens] in float32, and two hidden layers of its
      MLP.
    - denoising: each block's fused projection, [tokens, 3 width + MLP], and the modulations of all
      steps.
    - decoding: the attention's input, keys and values, at the latent's resolution; the images in
      float32. What is larger can be run in strips.
    """
    t5, flux, vae = configs
    size = np.dtype(demand.dtype).itemsize
    pixels = demand.height * demand.width
    tokens = demand.tokens + image_tokens(demand.height, demand.width)
    bias = 4 * t5.heads * demand.tokens**2
    modulations = demand.steps * flux.width * (12 * flux.double_depth + 3 * flux.single_depth + 2)
    return {
        "encoding": bias + 2 * size * demand.rows * demand.tokens * t5.mlp_width,
        "denoising": size
        * (demand.rows * tokens * (3 * flux.width + flux.mlp_width) + modulations),
        "decoding": 3 * size * pixels // vae.factor**2 * vae.channels[-1]
        + 4 * demand.rows * pixels * 3,
    }


def default_vae_memory(demand: Demand, configs: Configs) -> float:
    """Return the bytes that the VAE may need beside its weights before it is run in strips.

    They are what denoising needs at least, so that decoding is not the peak of the run for long;
    or those with which 1024x1024 is decoded whole.
    """
    return max(needed_bytes(demand, configs)["denoising"], VAE_MEMORY)


def check_memory(demand: Demand, configs: Configs, *, devices: int = 1) -> None:
    """Check that drawing can fit. `devices`: of a mesh, which share the work.

    **Raises:** `ValueError` if a stage needs more memory than a device has, with both.
    """
    device = jax.local_devices()[0]
    present = memory_bytes(device)
    if present is None:
        return
    shared = 1 if device.platform == "cpu" else devices  # those of one machine have one memory
    stage, most = max(needed_bytes(demand, configs).items(), key=lambda item: item[1])
    if most // shared > present:
        raise ValueError(
            f"{demand.rows} images of {demand.height}x{demand.width} at once, with {demand.tokens} "
            f"tokens and {demand.steps} steps, need at least {_gigabytes(most // shared)} for "
            f"{stage}, and this device has {_gigabytes(present)}. "
            "Lower --batch, --height and --width, --max-sequence-length, or --steps."
        )


def _gigabytes(count: int) -> str:
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
