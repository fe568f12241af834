"""Options of XLA for NVIDIA GPUs: of the process, set before JAX is used, and of a program."""

import importlib.util
import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_OPTION = "xla_gpu_enable_triton_gemm"
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
    if has_plugin and _knows_flag() and not _is_chosen_by_user():
        os.environ["XLA_FLAGS"] = f"{_USERS_FLAGS} --{_OPTION}=false".strip()


def compiler_options(inputs: Any) -> dict[str, str | bool]:
    """Return options for a program with these inputs, beside those of the process.

    With int8 weights XLA may use Triton's products, although `read_weights_in_place` has left them
    to cuBLAS: a step of FLUX.1-dev takes 116 ms on an H200 with them, and 142 without.

    **Arguments:** `inputs`: a pytree, such as a network and what it is applied to.
    """
    is_left_to_cublas = _OPTION in os.environ.get("XLA_FLAGS", "") and not _is_chosen_by_user()
    return {_OPTION: True} if is_left_to_cublas and _has_int8_weights(inputs) else {}


def _is_chosen_by_user() -> bool:
    return _OPTION in _USERS_FLAGS


def _has_int8_weights(inputs: Any) -> bool:
    """Return whether a pytree has weights that are multiplied in int8."""
    import jax  # not before `read_weights_in_place` is called

    from fluxjax.nets.quantized import QuantizedWeight

    def is_weight(node: Any) -> bool:
        return isinstance(node, QuantizedWeight)

    leaves = jax.tree.leaves(inputs, is_leaf=is_weight)
    return any(is_weight(leaf) and leaf.value.dtype == "int8" for leaf in leaves)


def _knows_flag() -> bool:
    """Return whether this jaxlib is known to have the option: XLA exits at one that it has not."""
    try:
        major, minor = version("jaxlib").split(".")[:2]
    except PackageNotFoundError:
        return False
    return (int(major), int(minor)) < (0, 12)
