"""A new adapter, to be trained."""

import re
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.convert.load import slots_of
from fluxjax.lora.merge import kind_of
from fluxjax.lora.read import Change, Lora
from fluxjax.lora.terms import LowRank
from fluxjax.shapes import PRNGKeyArray

BLOCKS = (r"(double|single|blocks)\..*\.(qkv|out|up|down|gate|linear1|linear2|q|k|v)",)
"""The attention and the MLP of every block."""


def init_lora(
    model: eqx.Module, rank: int, targets: Sequence[str] = BLOCKS, *, alpha: float | None = None, key: PRNGKeyArray
) -> Lora:
    """Return an adapter that changes nothing yet: downs are drawn with standard deviation 1 / sqrt(columns), ups are zeros.

    **Arguments:** `model`: a `Flux`, `Clip` or `T5`, or its shapes. `rank`: at least 1. `targets`: regular expressions
    that the whole name of a weight has to match, as "double.0.img.qkv" (without ".weight"). `alpha`: the factor is
    alpha / rank; the rank by default.
    **Raises:** `ValueError` for a rank below 1, or a pattern that matches no matrix.
    **Source:** Hu et al. 2021, section 4.1.
    """
    if rank < 1:
        raise ValueError(f"`init_lora` needs a rank of at least 1, got {rank}.")
    matrices = {
        name.removesuffix(".weight"): slot.shape for name, slot in slots_of(model).items() if _is_matrix(name, slot.shape)
    }
    idle = [target for target in targets if not any(re.fullmatch(target, name) for name in matrices)]
    if idle or not targets:
        some = ", ".join(list(matrices)[:3])
        raise ValueError(
            f"`init_lora(targets)`: {idle or 'no patterns'} match no matrix of this network. Its names are as {some}."
        )
    chosen = {name: shape for name, shape in matrices.items() if any(re.fullmatch(target, name) for target in targets)}
    factor = jnp.float32((rank if alpha is None else alpha) / rank)
    changes: dict[str, tuple[Change, ...]] = {}
    for subkey, (name, (rows, columns)) in zip(jax.random.split(key, len(chosen)), chosen.items(), strict=True):
        down = jax.random.normal(subkey, (rank, columns)) / columns**0.5
        changes[f"{name}.weight"] = (Change(LowRank(jnp.zeros((rows, rank)), down, factor), None, False),)
    return Lora({kind_of(model): changes}, "new")


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and name not in ("tokens.weight", "positions.weight", "position_bias.weight")


def trainable(lora: Lora) -> Lora:
    """Return which leaves of an adapter are trained, as a tree of booleans: its factors, but not alpha / rank."""

    def is_trained(path, leaf) -> bool:
        return eqx.is_inexact_array(leaf) and getattr(path[-1], "name", "") != "factor"

    return jax.tree_util.tree_map_with_path(is_trained, lora)
