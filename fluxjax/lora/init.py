"""A new adapter, to be trained."""

import re
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.arguments import convert_arguments
from fluxjax.checkpoint.weights import parameters_of
from fluxjax.lora.merge import kind_of
from fluxjax.lora.read import Change, Lora
from fluxjax.lora.terms import LowRankTerm
from fluxjax.shapes import PRNGKeyArray

BLOCKS = (r"(double|single|blocks)\..*\.(qkv|out|up|down|gate|linear1|linear2|q|k|v)",)
"""The attention and the MLP of every block."""


@convert_arguments
def init_lora(
    model: eqx.Module,
    rank: int,
    targets: str | Sequence[str] = BLOCKS,
    *,
    alpha: float | None = None,
    key: PRNGKeyArray,
) -> Lora:
    """Return an adapter that changes nothing yet: downs are drawn with standard deviation 1 / sqrt(columns), ups are zeros.

    **Arguments:** `model`: a `Flux`, `Clip` or `T5`, or its shapes. `rank`: at least 1. `targets`: regular expressions
    that the whole name of a weight has to match, as "double.0.img.qkv" (without ".weight"), or one of them. `alpha`: the
    factor is alpha / rank; the rank by default.
    **Raises:** `ValueError` for a rank below 1 or larger than every chosen matrix, an alpha that is not finite, or a pattern
    that is not valid or matches no matrix.
    **Source:** Hu et al. 2021, section 4.1.
    """
    if rank < 1:
        raise ValueError(f"`init_lora` needs a rank of at least 1, got {rank}.")
    if alpha is not None and not abs(alpha) <= float(jnp.finfo(jnp.float32).max):
        raise ValueError(
            f"`init_lora(alpha)` needs a number that is finite in float32, got {alpha}. Pass the rank, or less."
        )
    kind, targets = kind_of("init_lora", model), [targets] if isinstance(targets, str) else targets
    matrices = {
        name.removesuffix(".weight"): slot.shape
        for name, slot in parameters_of(model).items()
        if _is_matrix(name, slot.shape)
    }
    patterns = [_compiled(target) for target in targets]
    idle = [pattern.pattern for pattern in patterns if not any(map(pattern.fullmatch, matrices))]
    if idle or not targets:
        some = ", ".join(list(matrices)[:3])
        raise ValueError(
            f"`init_lora(targets)`: {idle or 'no patterns'} match no matrix of this network. Its names are as {some}."
        )
    chosen = {
        name: shape
        for name, shape in matrices.items()
        if any(pattern.fullmatch(name) for pattern in patterns)
    }
    largest = max(min(shape) for shape in chosen.values())
    if rank > largest:
        raise ValueError(
            f"`init_lora` needs a rank of at most {largest}, that of the largest chosen matrix, got {rank}."
        )
    factor = jnp.float32((rank if alpha is None else alpha) / rank)
    changes: dict[str, tuple[Change, ...]] = {}
    for subkey, (name, (rows, columns)) in zip(
        jax.random.split(key, len(chosen)), chosen.items(), strict=True
    ):
        down = jax.random.normal(subkey, (rank, columns)) / columns**0.5
        changes[f"{name}.weight"] = (
            Change(LowRankTerm(jnp.zeros((rows, rank)), down, factor), None, False),
        )
    return Lora({kind: changes}, "new")


def _compiled(target: str) -> re.Pattern:
    try:
        return re.compile(target)
    except re.error as error:
        raise ValueError(
            f"`init_lora(targets)`: {target!r} is not a valid regular expression: {error}."
        ) from error


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and name not in (
        "tokens.weight",
        "positions.weight",
        "position_bias.weight",
    )


def trainable(lora: Lora) -> Lora:
    """Return which leaves of an adapter are trained, as a tree of booleans: its factors, but not alpha / rank."""

    def is_trained(path, leaf) -> bool:
        return eqx.is_inexact_array(leaf) and getattr(path[-1], "name", "") != "factor"

    return jax.tree_util.tree_map_with_path(is_trained, lora)
