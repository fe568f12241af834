"""Options of XLA for NVIDIA GPUs, which have to be set before JAX is used."""

import importlib.util
import os
from importlib.metadata import PackageNotFoundError, version

_FLAG = "--xla_gpu_enable_triton_gemm=false"


def read_weights_in_place(quantize: str | None = None) -> None:
    """Let XLA leave products to cuBLAS, so that they read stacked weights where they lie.

    FLUX.1-dev in bfloat16 is then 7 % faster on an H100: see `fluxjax.nets.weight`. In fp8 it is as
    fast on an H200, and compiles in 10 s instead of 60. In int8 its steps are slower, 142 ms
    instead of 116, so that nothing is set for it. Without JAX's CUDA plugin, or where the user has
    set the option, nothing changes either.

    **Arguments:** `quantize`: the format that the user has chosen for the weights; None for none.
    """
    if quantize == "int8":
        return
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    has_plugin = any(importlib.util.find_spec(name) is not None for name in plugins)
    flags = os.environ.get("XLA_FLAGS", "")
    if has_plugin and _knows_flag() and "xla_gpu_enable_triton_gemm" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_FLAG}".strip()


def _knows_flag() -> bool:
    """Return whether this jaxlib is known to have the option: XLA exits at one that it has not."""
    try:
        major, minor = version("jaxlib").split(".")[:2]
    except PackageNotFoundError:
        return False
    return (int(major), int(minor)) < (0, 12)
