"""Adapters to files: converted between formats, and extracted from the difference of two checkpoints."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from fluxjax.arguments import convert_arguments
from fluxjax.checkpoint import names as tables
from fluxjax.checkpoint.dialect import Dialect
from fluxjax.checkpoint.dtypes import check_written_dtype
from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.fused import fused_rows
from fluxjax.checkpoint.safetensors_writer import OutputTensor, write_safetensors
from fluxjax.checkpoint.weights import InMemoryWeights, Weights, cast, parameters_of
from fluxjax.lora.attach import factors_of
from fluxjax.lora.merge import check_plain, kind_of, rows_of
from fluxjax.lora.read import Change, Lora
from fluxjax.lora.terms import FullTerm, LowRankTerm
from fluxjax.nets.flux_config import FluxConfig

_KOHYA = {
    "flux": ("lora_unet_", tables.FLUX_BFL),
    "clip": ("lora_te1_", tables.CLIP_TRANSFORMERS),
    "t5": ("lora_te3_", tables.T5_TRANSFORMERS),
}
_PEFT = {
    "flux": ("transformer.", tables.FLUX_DIFFUSERS),
    "clip": ("text_encoder.", tables.CLIP_TRANSFORMERS),
    "t5": ("text_encoder_2.", tables.T5_TRANSFORMERS),
}
FORMATS = ("peft", "kohya")
TABLES = ("tokens.weight", "positions.weight", "position_bias.weight")
"""Matrices that are looked up rather than multiplied."""


@convert_arguments
def write_lora(
    path: str | Path,
    lora: Lora,
    *,
    to: str = "peft",
    dtype: DTypeLike = jnp.float32,
    overwrite: bool = False,
) -> None:
    """Write an adapter as diffusers and PEFT name it ("peft", q, k, v apart) or as kohya's scripts do ("kohya", fused).

    Every difference stays what it is: a fused weight's factors are cut into its parts' rows, or parts are put together as a
    block-diagonal product, and alpha / rank goes into the up matrix. Kohya's names also hold whole differences, `.diff` of
    weights and norms and `.diff_b` of biases. `dtype`: of the factors; below float32 they are rounded. `overwrite`: whether
    the file takes the place of an existing one, whole.
    **Raises:** `WeightsError` for an adapter that the format can't hold, with the first weight that it can't, or that changes
    nothing, or holds numbers that are not finite or that the dtype can't hold; `ValueError` for another dtype;
    `FileExistsError` if there is something at `path`.
    """
    check_format(lora, to)
    target = check_written_dtype("write_lora", dtype)
    tensors: dict[str, np.ndarray] = {}
    for network, changes in lora.changes.items():
        prefix, dialect = (_PEFT if to == "peft" else _KOHYA)[network]
        width = _width(changes)
        # The MLP of every FLUX transformer is four times as wide.
        parts = fused_rows(width, 4 * width) if network == "flux" else {}
        for name, found in changes.items():
            if any(isinstance(change.term, FullTerm) for change in found):
                tensors |= _whole(name, found, prefix, dialect, parts)
                continue
            for module, up, down in _modules(name, found, dialect, parts):
                if to == "peft":
                    tensors |= {
                        f"{prefix}{module}.lora_A.weight": down,
                        f"{prefix}{module}.lora_B.weight": up,
                    }
                else:
                    stem = prefix + module.replace(".", "_")
                    tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
                    tensors[f"{stem}.alpha"] = np.asarray(len(down), np.float32)
    if not tensors:
        raise WeightsError(
            "This adapter changes nothing, its ups are zeros, so it is not written. Train it first."
        )
    damaged = next(
        (name for name, tensor in tensors.items() if not np.isfinite(tensor).all()), None
    )
    if damaged is not None:
        raise WeightsError(
            f"{damaged} holds NaN or infinity, so the adapter is not written. Its training diverged."
        )
    stored = {name: _stored(name, tensor, target) for name, tensor in tensors.items()}
    write_safetensors(
        Path(path),
        {
            name: OutputTensor.from_array(np.ascontiguousarray(tensor))
            for name, tensor in stored.items()
        },
        overwrite=overwrite,
    )


def _stored(name: str, tensor: np.ndarray, dtype: np.dtype | None) -> np.ndarray:
    """Return a tensor in the dtype of the factors; alphas stay float32."""
    return (
        tensor
        if dtype is None or name.endswith(".alpha")
        else cast(np.asarray(tensor), dtype, name)
    )


def check_format(lora: Lora, to: str) -> None:
    """**Raises:** `WeightsError` for an adapter that a format can't hold, `ValueError` for a format that there is not."""
    if to not in FORMATS:
        raise ValueError(
            f"There is no adapter format {to!r} to write. Choose one of {', '.join(FORMATS)}."
        )
    for changes in lora.changes.values():
        for name, found in changes.items():
            for change in found:
                if not isinstance(change.term, LowRankTerm | FullTerm):
                    raise WeightsError(
                        f"What the adapter does to {name} ({type(change.term).__name__}) is not of low rank, so it can't be "
                        "written."
                    )
                _check_peft(name, whole=isinstance(change.term, FullTerm), to=to)


def _check_peft(name: str, *, whole: bool, to: str) -> None:
    """**Raises:** `WeightsError` for a change that PEFT's names can't hold."""
    if to == "peft" and (whole or name in TABLES):
        what = (
            "is a difference of a whole tensor, which is not of low rank"
            if whole
            else "is of a table"
        )
        raise WeightsError(
            f"What the adapter does to {name} {what}: PEFT's names have no place for it. Write kohya's names."
        )


def _whole(
    name: str, changes: Sequence[Change], prefix: str, dialect: Dialect, parts: Mapping[str, slice]
) -> dict[str, np.ndarray]:
    """Return the sum of a weight's changes as one difference, with kohya's name."""
    rows = _fused_rows(name, changes, parts)
    total: Any = 0.0
    for change in changes:
        start, stop = rows_of(change, (rows,), parts)
        delta = np.asarray(change.term.delta(jnp.zeros(())), np.float32)  # the same for every base
        delta = np.roll(delta, len(delta) // 2, axis=0) if change.swap else delta
        total = total + np.pad(delta, ((start, rows - stop), *((0, 0),) * (delta.ndim - 1)))
    (key, _), *_ = dialect.keys(name)
    module, _, last = key.rpartition(".")
    return {f"{prefix}{module.replace('.', '_')}.{'diff_b' if last == 'bias' else 'diff'}": total}


def _modules(
    name: str, changes: Sequence[Change], dialect: Dialect, parts: Mapping[str, slice]
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Return the modules that a weight's change is written to, each with its up and down."""
    rows = _fused_rows(name, changes, parts)
    columns = max(change.term.columns or 0 for change in changes)
    down, up = (
        np.asarray(x)
        for x in factors_of(name, [(change, 1.0) for change in changes], (rows, columns), parts)
    )
    written = []
    for key, row in dialect.keys(name):
        place = slice(0, rows) if row.part is None else parts[row.part]
        mine = up[place]
        mine = np.roll(mine, len(mine) // 2, axis=0) if row.layout == "swap" else mine
        used = np.any(mine != 0, axis=0)
        if used.any():
            written.append((key.removesuffix(".weight"), mine[:, used], down[used]))
    return written


def _fused_rows(name: str, changes: Sequence[Change], parts: Mapping[str, slice]) -> int:
    """Return the rows of a weight, of which its changes may cover a part."""
    whole = [change for change in changes if change.part is None]
    if whole:
        return whole[0].term.shape((0,))[0]
    return parts["mlp"].stop if ".linear1." in name else parts["v"].stop


def _width(changes: Mapping[str, Sequence[Change]]) -> int:
    """Return the width of the transformer that an adapter was made for, as its blocks' factors tell."""
    for name, found in changes.items():
        if not name.startswith(("double", "single")):
            continue
        takes_width = name.endswith(
            ("qkv.weight", "linear1.weight", "mlp.up.weight", "modulation.weight")
        )
        for change in found:
            if isinstance(change.term, LowRankTerm):
                return change.term.down.shape[1] if takes_width else len(change.term.up)
            if isinstance(change.term, FullTerm) and takes_width:
                return change.term.value.shape[1]
    return FluxConfig().width  # no block is changed, so no fused weight is


@convert_arguments
def extract_lora(
    base: Weights | eqx.Module,
    tuned: Weights | eqx.Module,
    network: str,
    *,
    rank: int,
    to: str | None = None,
) -> Lora:
    """Return the adapter that distinguishes two networks: of matrices the nearest of a rank, in the Frobenius norm; of biases
    and norms the whole difference.

    At a rank that the differences have, base and adapter give the tuned network up to the rounding of float32.

    **Arguments:** `base`, `tuned`: of the same shapes: networks, or their weights in files. `network`: "flux", "clip" or
    "t5". `to`: the format in which it will be written: what this can't hold is an error before the work.
    **Raises:** `ValueError` for a rank below 1, or another network; `WeightsError` for networks of other shapes, of weights
    that are not plain or not finite, or that do not differ.
    **Source:** Eckart & Young 1936.
    """
    if rank < 1:
        raise ValueError(f"`extract_lora` needs a rank of at least 1, got {rank}.")
    base, tuned = _weights(base, network), _weights(tuned, network)
    slots, theirs = parameters_of(base.network), parameters_of(tuned.network)
    if {name: slot.shape for name, slot in slots.items()} != {
        name: slot.shape for name, slot in theirs.items()
    }:
        raise WeightsError(
            "The two checkpoints are networks of different shapes. Pass a fine-tuned model and its own base."
        )
    changes: dict[str, tuple[Change, ...]] = {}
    for name in sorted(
        slots, key=lambda name: len(slots[name].shape)
    ):  # vectors first, which take no time
        rows, exact = slice(0, slots[name].shape[0]), np.dtype(np.float32)
        difference = tuned.read(name, rows, exact) - base.read(name, rows, exact)
        if not np.isfinite(difference).all():
            raise WeightsError(
                f"{name} holds NaN or infinity in one of the checkpoints. Pass checkpoints that are not damaged."
            )
        if difference.any():
            whole = difference.ndim == 1
            if to is not None:
                _check_peft(name, whole=whole, to=to)
            term = FullTerm(jnp.asarray(difference)) if whole else _nearest(difference, rank)
            changes[name] = (Change(term, None, False),)
    if not changes:
        raise WeightsError(
            "The two checkpoints have the same weights: there is nothing to extract."
        )
    return Lora({network: {name: changes[name] for name in slots if name in changes}}, "extracted")


def _weights(model: Weights | eqx.Module, network: str) -> Weights:
    """Return a network's weights. **Raises:** `ValueError` if it is not the named one."""
    found = model if isinstance(model, Weights) else InMemoryWeights(model)
    kind = kind_of("extract_lora", found.network)
    if kind != network:
        raise ValueError(
            f"`extract_lora(network)` got {network!r}, but these are the weights of {kind!r}. Pass {kind!r}."
        )
    check_plain(found.network, "No adapter can be extracted from")
    return found


_OVERSAMPLED, _POWERS, _EXACT_SIDE = 16, 4, 1024


def _nearest(matrix: np.ndarray, rank: int) -> LowRankTerm:
    """Return the nearest matrix of a rank, halves of its singular values on each side.

    Large matrices are first projected on a random range, which power iterations sharpen.
    **Source:** Halko et al. 2011, algorithm 4.4.
    """
    basis: Any = None
    if min(matrix.shape) > max(_EXACT_SIDE, 2 * (rank + _OVERSAMPLED)):
        sample = (
            np.random.default_rng(0)
            .standard_normal((matrix.shape[1], rank + _OVERSAMPLED))
            .astype(np.float32)
        )
        basis = np.linalg.qr(matrix @ sample)[0]
        for _ in range(_POWERS):
            basis = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ basis)[0])[0]
    left, values, right = np.linalg.svd(
        matrix if basis is None else basis.T @ matrix, full_matrices=False
    )
    left = left if basis is None else basis @ left
    count = max(1, min(rank, int((values > 0).sum())))
    root = np.sqrt(values[:count])
    return LowRankTerm(
        jnp.asarray(left[:, :count] * root),
        jnp.asarray(root[:, None] * right[:count]),
        jnp.float32(1.0),
    )
