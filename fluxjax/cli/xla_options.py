"""Options of XLA: of the process, set before JAX is used, and of a program.

What they are worth was measured: docs/performance.md. An option that the user has set in
`XLA_FLAGS` stays as it is.
"""

import importlib.util
import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_TRITON_GEMM = "xla_gpu_enable_triton_gemm"
_CPU_SCHEDULE = "xla_cpu_scheduler_type"
_UNKNOWN_FROM = {_TRITON_GEMM: (0, 12), _CPU_SCHEDULE: (0, 13)}
"""Of each option, the first jaxlib that may not have it any more: XLA stops at unknown options."""
_USERS_FLAGS = os.environ.get("XLA_FLAGS", "")
"""XLA's options as the user has set them: read before `read_weights_in_place` adds its own."""


def read_weights_in_place() -> None:
    """Let XLA leave products to cuBLAS, so that they read stacked weights where they lie.

    FLUX.1-dev in bfloat16 is then 7 % faster on an H100: see `fluxjax.nets.weight`. In fp8 it is as
    fast on an H200, and compiles in 10 s instead of 60. Programs with int8 weights are compiled
    otherwise: see `compiler_options`. Without JAX's CUDA plugin, or where the user has set the
    option, nothing changes.
    """
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    has_plugin = any(importlib.util.find_spec(name) is not None for name in plugins)
    if has_plugin and _is_free(_TRITON_GEMM):
        os.environ["XLA_FLAGS"] = f"{_USERS_FLAGS} --{_TRITON_GEMM}=false".strip()


def compiler_options(inputs: Any) -> dict[str, str | bool]:
    """Return options for a program with these inputs, beside those of the process.

    - On GPUs, with int8 weights: XLA may use Triton's products, although `read_weights_in_place`
      has left them to cuBLAS. A step of FLUX.1-dev takes 116 ms on an H200 with them, and 142
      without.
    - On CPUs: operations are ordered so that the least memory is used, and not so that the most of
      them can run at once. Decoding an image of 512x512 in bfloat16 takes 537 MB of temporary
      memory instead of 1200, three blocks of FLUX.1-dev 284 instead of 388. On two cores the
      networks take 0.89 to 1.03 of the time.

    **Arguments:** `inputs`: a pytree, such as a network and what it is applied to.
    """
    import jax  # not before `read_weights_in_place` is called

    if jax.default_backend() == "cpu" and _is_free(_CPU_SCHEDULE):
        return {_CPU_SCHEDULE: "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    is_left_to_cublas = _TRITON_GEMM in os.environ.get("XLA_FLAGS", "") and _is_free(_TRITON_GEMM)
    return {_TRITON_GEMM: True} if is_left_to_cublas and _has_int8_weights(inputs) else {}


def _is_free(option: str) -> bool:
    """Return whether this jaxlib is known to have an option that the user has not set."""
    try:
        major, minor = version("jaxlib").split(".")[:2]
    except PackageNotFoundError:
        return False
    return (int(major), int(minor)) < _UNKNOWN_FROM[option] and option not in _USERS_FLAGS


def _has_int8_weights(inputs: Any) -> bool:
    """Return whether a pytree has weights that are multiplied in int8."""
    import jax

    from fluxjax.nets.quantized import QuantizedWeight

    def is_weight(node: Any) -> bool:
        return isinstance(node, QuantizedWeight)

    leaves = jax.tree.leaves(inputs, is_leaf=is_weight)
    return any(is_weight(leaf) and leaf.value.dtype == "int8" for leaf in leaves)
