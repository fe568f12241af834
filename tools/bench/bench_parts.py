"""What several benches use: random weights, sampling as one program, timing, a simulated device."""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fluxjax import Flux, FluxConfig
from fluxjax.generate import Recipe, TextStates, denoise, prompt_batch
from fluxjax.generate.cache import AttentionChoice

VARIANTS = {"dev": (FluxConfig.dev(), 512, 28), "schnell": (FluxConfig.schnell(), 256, 4)}
"""The official models: the transformer's configuration, T5's tokens, Euler steps."""
DEVICE_MODULES = (
    "kernels.attention",
    "kernels.xla_attention",
    "nets.activations",
    "nets.weight",
    "nets.quantized",
    "nets.scan",
    "nets.heads",
    "nets.conv",
)
"""The modules that choose an implementation by the default device."""


def random_flux(config: FluxConfig) -> Flux:
    """Return a transformer of random bfloat16 weights, on the device.

    They are drawn leaf by leaf, so that no float32 copy of the whole network ever exists.
    """
    abstract = eqx.filter_eval_shape(Flux, config, key=jax.random.key(0))
    leaves, structure = jax.tree.flatten(abstract)
    draw = jax.jit(
        lambda key, shape: 0.02 * jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1
    )
    keys = jax.random.split(jax.random.key(0), len(leaves))
    drawn = [draw(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


def sample_latents(
    flux: Flux,
    states: TextStates,
    noise: jax.Array,
    times: jax.Array,
    guidance: jax.Array | None,
    *,
    attention: AttentionChoice = None,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Sample the latents of encoded prompts with Euler's method; compiled, it is one program.

    **Arguments:** `noise`: [images, 16, rows, columns]. `guidance`: the distilled scale, for a
    network that takes one. `attention`, `mesh`: as for `denoise`.
    """
    batch = prompt_batch(states, None, noise=noise, keys=None, distilled=guidance)
    return denoise(flux, batch, Recipe(times, attention=attention), mesh=mesh)


def diffusers_vae() -> Any:
    """Return diffusers' VAE with the sizes of FLUX.1's and random weights."""
    import diffusers

    return diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def seconds_of(call: Callable[[], Any]) -> float:
    """Return how many seconds a call takes; it must wait for its own result."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def error_line(error: BaseException) -> str:
    """Return an error as one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def seconds_in_turns(
    calls: Mapping[int, Callable[[], Any]], repeats: int, is_over: Callable[[], bool]
) -> tuple[dict[int, list[float]], dict[int, str]]:
    """Time calls in turns, so that other load affects all of them; each is timed once at least.

    **Arguments:** `calls`: by number. `is_over`: whether to begin no further turn.
    **Returns:** the seconds of each call, and the errors of those that failed, which are not called
    again and have no seconds.
    """
    spent: dict[int, list[float]] = {number: [] for number in calls}
    errors: dict[int, str] = {}
    for turn in range(repeats):
        if turn and is_over():
            break
        for number in list(spent):
            try:
                spent[number].append(seconds_of(calls[number]))
            except Exception as error:
                del spent[number]
                errors[number] = error_line(error)
    return spent, errors


def gpu_bytes() -> float:
    """Return the memory of the first NVIDIA GPU; 0 where there is none."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return float(printed.split("\n")[0]) * 2**20
    except (OSError, ValueError, subprocess.CalledProcessError):
        return 0.0


def summarize_times(spent: list[float]) -> dict[str, float]:
    """Return the median of several timings, their range relative to it, and their number."""
    median = statistics.median(spent)
    return {
        "seconds": median,
        "spread": round((max(spent) - min(spent)) / median, 3),
        "turns": len(spent),
    }


@contextmanager
def pretended(device: Any, modules: Sequence[str] = DEVICE_MODULES) -> Iterator[None]:
    """Trace as if `device` were the default device, in these modules of fluxjax.

    They read its `platform` and what tells its kind, so any object with these attributes will do.
    """
    with ExitStack() as stack:
        for name in modules:
            # By name, because the package exports a function `attention` as well.
            module = sys.modules[f"fluxjax.{name}"]
            stack.enter_context(mock.patch.object(module, "default_device", return_value=device))
        yield
