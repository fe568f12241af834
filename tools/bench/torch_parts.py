"""What the benches beside torch on a GPU use: diffusers' transformer, its fastest attention."""

from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from bench_parts import error_line, seconds_of

from fluxjax import FluxConfig


def torch_device() -> str:
    """Return the device of torch."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def finish() -> None:
    """Wait until the GPU has finished torch's work."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def library_versions(*names: str) -> dict[str, str]:
    """Return the versions of packages, "none" for one that is not installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def diffusers_flux(config: FluxConfig) -> Any:
    """Return diffusers' transformer of random bfloat16 weights, on torch's device."""
    import diffusers
    import torch

    torch.set_default_dtype(torch.bfloat16)  # so that there is never a float32 copy
    try:
        with torch.device(torch_device()):
            made = diffusers.FluxTransformer2DModel(
                num_layers=config.double_depth,
                num_single_layers=config.single_depth,
                guidance_embeds=config.guidance_embed,
            )
    finally:
        torch.set_default_dtype(torch.float32)
    return made.to(torch.bfloat16)


def set_fastest_attention(network: Any, backends: Sequence[str], call: Callable[[], object]) -> str:
    """Let diffusers' transformer use its fastest attention that works here; return its name.

    **Arguments:** `backends`: the names to try; on a CPU, only the first. `call`: runs the network
    and waits for it.
    **Raises:** `RuntimeError` if none works.
    """
    seconds = {}
    for backend in backends if torch_device() == "cuda" else backends[:1]:
        try:
            network.set_attention_backend(backend)
            call()
            seconds[backend] = min(seconds_of(call) for _ in range(2))
        except Exception as error:
            print(f"diffusers' attention {backend}: {error_line(error)}", flush=True)
    if not seconds:
        raise RuntimeError("no attention implementation of diffusers works here")
    best = min(seconds, key=seconds.__getitem__)
    network.set_attention_backend(best)
    return best
