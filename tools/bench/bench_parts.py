"""What the measurements share: a transformer of random weights, a call's time, the median of several, and a device that is
not there."""

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax import Flux, FluxConfig


def random_flux(config: FluxConfig) -> Flux:
    """Draw bfloat16 weights on the device, leaf by leaf, so that no float32 copy of the model ever exists."""
    abstract = eqx.filter_eval_shape(Flux, config, key=jax.random.key(0))
    leaves, structure = jax.tree.flatten(abstract)
    draw = jax.jit(
        lambda key, shape: 0.02 * jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1
    )
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return jax.tree.unflatten(
        structure, [draw(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    )


def diffusers_vae() -> Any:
    """Return diffusers' VAE of FLUX's numbers, of random weights."""
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
    """Return how long a call takes, which has to wait for its result."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def told(spent: list[float]) -> dict[str, float]:
    """Return the median of several calls, their spread as a share of it, and how many they are."""
    median = statistics.median(spent)
    return {
        "seconds": median,
        "spread": round((max(spent) - min(spent)) / median, 3),
        "turns": len(spent),
    }


@contextmanager
def pretended(
    device: Any, modules: Sequence[str] = ("kernels.attention", "nets.weight", "nets.scan", "nets.heads")
) -> Iterator[None]:
    """Trace for another device than this machine's, of which `platform` and what tells its kind are asked by these modules."""
    with ExitStack() as stack:
        for name in modules:
            # By name, since the package has a function `attention` too.
            stack.enter_context(
                mock.patch.object(
                    sys.modules[f"fluxjax.{name}"], "default_device", return_value=device
                )
            )
        yield
