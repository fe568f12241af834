"""A new adapter, to be trained.

`init_lora`, `init_lokr` and `init_dora` make it, and `trainable` says which of its leaves are
trained. The training loss applies it by `attach`, and `write_lora` writes the result.
"""

import re
from collections.abc import Callable, Mapping, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.arguments import convert_arguments
from fluxjax.checkpoint.weights import Parameter, parameters_of
from fluxjax.lora.adapter import Change, Lora
from fluxjax.lora.base_terms import MagnitudeTerm
from fluxjax.lora.networks import LOOKUP_TABLES, check_plain, dense_shapes, network_kind
from fluxjax.lora.terms import KronTerm, LowRankTerm, Term
from fluxjax.nets.flux import Flux
from fluxjax.nets.widen import widen_input
from fluxjax.shapes import Array, PRNGKeyArray

BLOCKS = (r"(double|single|blocks)\..*\.(qkv|out|up|down|gate|linear1|linear2|q|k|v)",)
"""The attention and the MLP of every block, as `targets` of `init_lora`."""

_LARGEST_FLOAT32 = float(jnp.finfo(jnp.float32).max)


@convert_arguments
def init_lora(
    model: eqx.Module,
    rank: int,
    targets: str | Sequence[str] = BLOCKS,
    *,
    alpha: float | None = None,
    extra_features: int = 0,
    key: PRNGKeyArray,
) -> Lora:
    """Return a LoRA that changes nothing yet.

    Its downs are drawn with standard deviation 1 / sqrt(columns); its ups are zeros.

    For example, for the attention of the double blocks:

        init_lora(flux, 16, [r"double\\..*\\.(qkv|out)"], key=jax.random.key(0))

    or for a transformer that also reads a control image, as FLUX.1 Canny and Depth do:

        init_lora(flux, 16, [*BLOCKS, "img_in"], extra_features=64, key=jax.random.key(0))

    **Arguments:**

    - `model`: a `Flux`, `Clip` or `T5`, of weights in any storage, or its shapes.
    - `rank`: at least 1, and at most that of the largest chosen matrix.
    - `targets`: regular expressions, or one of them. A weight is chosen if one matches its whole
      name without ".weight", as in "double.0.img.qkv".
    - `alpha`: the factor of the product is alpha / rank; the rank by default.
    - `extra_features`: of each image token, which the adapted transformer reads beside the base's:
      64 for a control image, 320 for an image and its mask. The down of "img_in", which has to be
      one of the targets, is then [rank, in_channels + extra_features]. `attach` and `merge` widen
      the base by zeros.
    - `key`: for the draws.

    **Raises:** `ValueError` for a rank below 1 or larger than every chosen matrix, an alpha that
    is not finite, a pattern that is not valid or matches no matrix, and extra features without
    "img_in" among the targets or of another network than a `Flux`.

    **Source:** Hu et al. 2021, section 4.1.
    """
    # Alpha is the rank by default, so the factor is 1.
    factor = _factor("init_lora", rank, alpha)

    def term(key: PRNGKeyArray, name: str, shape: tuple[int, ...]) -> Term:
        return _zero_product(key, rank, shape, factor)

    _check_rank("init_lora", rank)
    largest = max(min(shape) for shape in _chosen(model, targets, extra_features).values())
    if rank > largest:
        raise ValueError(
            f"`init_lora` needs a rank of at most {largest}, that of the largest chosen matrix, "
            f"got {rank}."
        )
    return _new_adapter(model, targets, term, extra_features=extra_features, key=key)


@convert_arguments
def init_lokr(
    model: eqx.Module,
    rank: int,
    targets: str | Sequence[str] = BLOCKS,
    *,
    divisor: int = 8,
    alpha: float | None = None,
    extra_features: int = 0,
    key: PRNGKeyArray,
) -> Lora:
    """Return a LoKr that changes nothing yet: left ⊗ (up down), of a small left matrix.

    Its numbers are 1 / divisor² of the weight's for the left matrix and of rank `rank` for the
    right one: fewer than those of a LoRA of the same rank, for a change of up to `divisor` times
    its rank.

    **Arguments:** as for `init_lora`, and `divisor`: the rows and columns of the left matrix, as
    LyCORIS's factor; for each axis the largest divisor of its size that is not larger.
    **Raises:** `ValueError` as `init_lora`, for a divisor below 1, and for a rank that is not below
    the sizes of a right matrix, whose factors would hold more than the matrix itself.
    **Source:** Yeh et al. 2023, LyCORIS, LoKr.
    """
    _check_rank("init_lokr", rank)
    if divisor < 1:
        raise ValueError(f"`init_lokr` needs a divisor of at least 1, got {divisor}.")
    factor = _factor("init_lokr", rank, alpha)

    def term(key: PRNGKeyArray, name: str, shape: tuple[int, ...]) -> Term:
        rows, columns = (_largest_divisor(size, divisor) for size in shape)
        right = (shape[0] // rows, shape[1] // columns)
        if rank >= min(right):
            raise ValueError(
                f"`init_lokr(rank)` needs less than {min(right)} for {name}, whose right matrix is "
                f"{right[0]} x {right[1]}, got {rank}. Choose a smaller rank or divisor."
            )
        left_key, down_key = jax.random.split(key)
        left = jax.random.normal(left_key, (rows, columns)) / columns**0.5
        down = jax.random.normal(down_key, (rank, right[1])) / right[1] ** 0.5
        return KronTerm((left,), (jnp.zeros((right[0], rank)), down), factor)

    return _new_adapter(model, targets, term, extra_features=extra_features, key=key)


@convert_arguments
def init_dora(
    model: eqx.Module,
    rank: int,
    targets: str | Sequence[str] = BLOCKS,
    *,
    alpha: float | None = None,
    key: PRNGKeyArray,
) -> Lora:
    """Return a DoRA that changes nothing yet: the norm of each row is trained apart.

    **Arguments:** as for `init_lora`; the `model` holds plain arrays, whose rows' norms are the
    first magnitudes.
    **Raises:** `ValueError` as `init_lora`; `WeightsError` for weights in another storage.
    **Source:** Liu et al. 2024, DoRA, section 4.1.
    """
    _check_rank("init_dora", rank)
    check_plain(model, "`init_dora` takes the norms of rows, and has none of")
    factor = _factor("init_dora", rank, alpha)
    slots, leaves = parameters_of(model), jax.tree.leaves(model)

    def term(key: PRNGKeyArray, name: str, shape: tuple[int, ...]) -> Term:
        weight = _parameter(leaves, slots[f"{name}.weight"]).astype(jnp.float32)
        magnitude = jnp.linalg.norm(weight, axis=1)
        return MagnitudeTerm(_zero_product(key, rank, shape, factor), magnitude, True)

    return _new_adapter(model, targets, term, extra_features=0, key=key)


def _new_adapter(
    model: eqx.Module,
    targets: str | Sequence[str],
    make: Callable[[PRNGKeyArray, str, tuple[int, ...]], Term],
    *,
    extra_features: int,
    key: PRNGKeyArray,
) -> Lora:
    """Return an adapter of one term for each chosen matrix.

    **Arguments:** `make`: (key, name, shape) -> the term of a matrix.
    """
    network = network_kind("init_lora", model)
    chosen = _chosen(model, targets, extra_features)
    # One key for each matrix, so that no two downs are equal.
    subkeys = jax.random.split(key, len(chosen))
    changes: dict[str, tuple[Change, ...]] = {}
    for subkey, (name, shape) in zip(subkeys, chosen.items(), strict=True):
        changes[f"{name}.weight"] = (Change(make(subkey, name, shape), None, False),)
    return Lora({network: changes}, "new")


def _chosen(
    model: eqx.Module, targets: str | Sequence[str], extra_features: int
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the chosen matrices by name, those of a widened input if it is."""
    network_kind("init_lora", model)
    patterns = [targets] if isinstance(targets, str) else targets
    if extra_features:
        model = _widened_shapes(model, extra_features)
    chosen = _choose(_matrices(model), patterns)
    if extra_features and "img_in" not in chosen:
        raise ValueError(
            f"`init_lora(extra_features={extra_features})` needs img_in among the targets, which "
            f'reads them. Pass targets=[*BLOCKS, "img_in"].'
        )
    return chosen


def _check_rank(call: str, rank: int) -> None:
    """**Raises:** `ValueError` for a rank below 1."""
    if rank < 1:
        raise ValueError(f"`{call}` needs a rank of at least 1, got {rank}.")


def _factor(call: str, rank: int, alpha: float | None) -> Array:
    """Return alpha / rank. **Raises:** `ValueError` for an alpha that is not finite."""
    if alpha is not None and not abs(alpha) <= _LARGEST_FLOAT32:
        raise ValueError(
            f"`{call}(alpha)` needs a number that is finite in float32, got {alpha}. "
            "Pass the rank, or less."
        )
    return jnp.float32((rank if alpha is None else alpha) / max(rank, 1))


def _zero_product(
    key: PRNGKeyArray, rank: int, shape: tuple[int, ...], factor: Array
) -> LowRankTerm:
    """Return a product of random downs and ups of zeros."""
    rows, columns = shape
    down = jax.random.normal(key, (rank, columns)) / columns**0.5
    return LowRankTerm(jnp.zeros((rows, rank)), down, factor)


def _largest_divisor(size: int, most: int) -> int:
    """Return the largest divisor of a size that is at most `most`."""
    for divisor in range(min(size, most), 0, -1):
        if size % divisor == 0:
            return divisor
    return 1


def _parameter(leaves: Sequence[Array], slot: Parameter) -> Array:
    """Return a parameter: a leaf, or one block of it."""
    leaf = leaves[slot.leaf]
    return leaf if slot.block is None else leaf[slot.block]


def _widened_shapes(model: eqx.Module, features: int) -> Flux:
    """Return the shapes of a transformer whose input is widened.

    **Raises:** `ValueError` for another network, or a negative number.
    """
    if not isinstance(model, Flux):
        raise ValueError(
            f"`init_lora(extra_features)` widens the input of a Flux, got {type(model).__name__}. "
            "Leave it out."
        )
    return eqx.filter_eval_shape(widen_input, model, features)


def _matrices(model: eqx.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the matrices of a network, by name without ".weight"."""
    matrices: dict[str, tuple[int, ...]] = {}
    for name, slot in parameters_of(dense_shapes(model)).items():
        if len(slot.shape) == 2 and name not in LOOKUP_TABLES:
            matrices[name.removesuffix(".weight")] = slot.shape
    return matrices


def _choose(
    matrices: Mapping[str, tuple[int, ...]], targets: Sequence[str]
) -> dict[str, tuple[int, ...]]:
    """Return the matrices whose names match one of the patterns.

    **Arguments:**

    - `matrices`: shapes by name.
    - `targets`: regular expressions of whole names.

    **Raises:** `ValueError` for a pattern that matches none.
    """
    patterns = [_compile_target(target) for target in targets]
    unmatched = []
    for pattern in patterns:
        if not any(pattern.fullmatch(name) for name in matrices):
            unmatched.append(pattern.pattern)
    if unmatched or not targets:
        examples = ", ".join(list(matrices)[:3])
        raise ValueError(
            f"`init_lora(targets)`: {unmatched or 'no patterns'} match no matrix of this network. "
            f"Its names are as {examples}."
        )
    chosen = {}
    for name, shape in matrices.items():
        if any(pattern.fullmatch(name) for pattern in patterns):
            chosen[name] = shape
    return chosen


def _compile_target(target: str) -> re.Pattern:
    """**Raises:** `ValueError` for a pattern that is not a valid regular expression."""
    try:
        return re.compile(target)
    except re.error as error:
        raise ValueError(
            f"`init_lora(targets)`: {target!r} is not a valid regular expression: {error}. "
            "Escape the characters that are meant as they are."
        ) from error


def trainable(lora: Lora) -> Lora:
    """Return which leaves of an adapter are trained: its factors, but not alpha / rank.

    **Returns:** the same tree with a bool for each leaf, as optax and `eqx.partition` take it.
    """

    def is_trained(path: tuple[jax.tree_util.KeyEntry, ...], leaf: object) -> bool:
        # Weight decay would shrink alpha / rank, which is a constant of the method.
        return eqx.is_inexact_array(leaf) and getattr(path[-1], "name", "") != "factor"

    return jax.tree_util.tree_map_with_path(is_trained, lora)
