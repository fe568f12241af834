"""Adapters written to files, in the names of PEFT or of kohya's scripts.

The key tables of checkpoints, read backwards, give the modules of each weight: kohya's names are
BFL's, where q, k and v are one matrix, and PEFT's are those of diffusers, where they are three.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from fluxjax.arguments import convert_arguments
from fluxjax.checkpoint import names as tables
from fluxjax.checkpoint.chroma_names import TRANSFORMER_BFL, TRANSFORMER_DIFFUSERS
from fluxjax.checkpoint.dialect import Dialect
from fluxjax.checkpoint.dtypes import check_written_dtype
from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.fused import FusedRows
from fluxjax.checkpoint.safetensors_writer import OutputTensor, write_safetensors
from fluxjax.checkpoint.weights import cast
from fluxjax.lora.adapter import Change, Lora
from fluxjax.lora.base_terms import MagnitudeTerm
from fluxjax.lora.changes import row_range
from fluxjax.lora.factors import combined_factors
from fluxjax.lora.flux_widths import adapter_parts
from fluxjax.lora.networks import LOOKUP_TABLES
from fluxjax.lora.terms import FullTerm, KronTerm, LowRankTerm
from fluxjax.lora.write_kinds import (
    check_own_kind,
    is_of_own_kind,
    kron_tensors,
    magnitude_tensors,
)
from fluxjax.nets.flux_config import FluxConfig

FORMATS = ("peft", "kohya")
"""The formats that adapters are written in."""

_KOHYA = {
    "flux": ("lora_unet_", TRANSFORMER_BFL),
    "clip": ("lora_te1_", tables.CLIP_TRANSFORMERS),
    "t5": ("lora_te3_", tables.T5_TRANSFORMERS),
}
_PEFT = {
    "flux": ("transformer.", TRANSFORMER_DIFFUSERS),
    "clip": ("text_encoder.", tables.CLIP_TRANSFORMERS),
    "t5": ("text_encoder_2.", tables.T5_TRANSFORMERS),
}

_DORA_ENDINGS = {
    "kohya": {"up": "lora_up.weight", "down": "lora_down.weight", "magnitude": "dora_scale"},
    "peft": {
        "up": "lora_B.weight",
        "down": "lora_A.weight",
        "magnitude": "lora_magnitude_vector",
    },
}


@convert_arguments
def write_lora(
    path: str | Path,
    lora: Lora,
    *,
    to: str = "peft",
    dtype: DTypeLike = jnp.float32,
    config: FluxConfig | None = None,
    overwrite: bool = False,
) -> None:
    """Write an adapter to a safetensors file.

    Every difference stays what it is: the factors of a fused weight are cut into the rows of its
    parts, or those of the parts are put together as a block-diagonal product. Alpha / rank is
    multiplied into the up matrix.

    For example, to convert a file to kohya's names:

        write_lora("kohya.safetensors", read_lora("style.safetensors"), to="kohya")

    **Arguments:**

    - `path`: of the file, which ends in .safetensors.
    - `lora`: from `read_lora`, `init_lora` or `extract_lora`.
    - `to`: "peft" for the names of diffusers and PEFT (q, k and v apart), or "kohya" for those of
      kohya's scripts (fused), which also hold whole differences, `.diff` of weights and norms and
      `.diff_b` of biases, and LoKr.
    - `dtype`: of the factors; below float32 they are rounded.
    - `config`: of the transformer that the adapter is for. It is needed only for a transformer
      whose MLP is not 4 x width, and there only if the adapter changes no MLP.
    - `overwrite`: whether an existing file is replaced, as a whole.

    **Raises:** `WeightsError` for an adapter that the format can't hold, with the first weight
    that it can't; for one that changes nothing; and for numbers that are not finite or that the
    dtype can't represent. `ValueError` for another format or dtype. `FileExistsError` if there is
    something at `path`.
    """
    check_format(lora, to)
    target = check_written_dtype("write_lora", dtype)
    tensors: dict[str, np.ndarray] = {}
    for network, changes in lora.changes.items():
        # Only the transformer has fused weights.
        parts = adapter_parts(changes, config) if network == "flux" else {}
        prefix, dialect = (_PEFT if to == "peft" else _KOHYA)[network]
        names = _Names(to, prefix, dialect)
        for name, of_weight in changes.items():
            weight = _WrittenWeight(name, of_weight, parts)
            tensors |= _weight_tensors(weight, names)
    if not tensors:
        raise WeightsError(
            "This adapter changes nothing, because its up matrices are zeros, so it is not "
            "written. Train it first."
        )
    for key, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise WeightsError(
                f"{key} holds NaN or infinity, so the adapter is not written. "
                "Its training diverged: train it again with a lower learning rate."
            )
    # Cast after all checks, so that an error leaves nothing behind.
    outputs = {}
    for key, tensor in tensors.items():
        stored = _cast_factor(key, tensor, target)
        outputs[key] = OutputTensor.from_array(np.ascontiguousarray(stored))
    write_safetensors(Path(path), outputs, overwrite=overwrite)


def check_format(lora: Lora, to: str) -> None:
    """Check that a format can hold an adapter, before anything is computed.

    **Arguments:**

    - `lora`: the adapter.
    - `to`: the format, one of `FORMATS`.

    **Raises:** `WeightsError` if it can't; `ValueError` for an unknown format.
    """
    if to not in FORMATS:
        raise ValueError(
            f"There is no adapter format {to!r} to write. Choose one of {', '.join(FORMATS)}."
        )
    for changes in lora.changes.values():
        for name, of_weight in changes.items():
            for change in of_weight:
                if is_of_own_kind(change) and len(of_weight) == 1:
                    check_own_kind(name, change, to)
                    continue
                _check_low_rank(name, change)
                check_peft_holds(name, is_whole=isinstance(change.term, FullTerm), to=to)


def _check_low_rank(name: str, change: Change) -> None:
    """**Raises:** `WeightsError` for a change that is neither of low rank nor a full difference."""
    if not isinstance(change.term, LowRankTerm | FullTerm):
        raise WeightsError(
            f"What the adapter does to {name} ({type(change.term).__name__}) is not of low rank, "
            "a LoKr or a DoRA of rows, so it can't be written. Merge it instead."
        )


def check_peft_holds(
    name: str,
    *,
    is_whole: bool,
    to: str,
) -> None:
    """Check that PEFT's names have a place for a change, if these are the ones to be written.

    **Arguments:**

    - `name`: of the weight.
    - `is_whole`: whether the change is a full difference.
    - `to`: the format to be written; anything but "peft" passes.

    **Raises:** `WeightsError` if they have none.
    """
    if to != "peft":
        return
    if is_whole:
        reason = "is a difference of a whole tensor, which is not of low rank"
    elif name in LOOKUP_TABLES:
        reason = "is of a lookup table"
    else:
        return
    raise WeightsError(
        f"What the adapter does to {name} {reason}: PEFT's names have no place for it. "
        "Write kohya's names."
    )


@dataclass(frozen=True)
class _Names:
    """How a format names the modules of one network.

    - `format`: one of `FORMATS`.
    - `prefix`: what all names begin with.
    - `dialect`: the key table of the names after it.
    """

    format: str
    prefix: str
    dialect: Dialect

    def stem(self, module: str) -> str:
        """Return the beginning of the keys of a module."""
        if self.format == "kohya":
            module = module.replace(".", "_")
        return self.prefix + module


@dataclass(frozen=True)
class _WrittenWeight:
    """A weight with its changes.

    - `name`: our name of it.
    - `changes`: all of low rank, or at least one a full difference.
    - `parts`: the rows of the parts of fused weights.
    """

    name: str
    changes: Sequence[Change]
    parts: FusedRows

    @property
    def rows(self) -> int:
        """The rows of the weight, of which its changes may cover a part only."""
        for change in self.changes:
            if change.part is None:
                return change.term.shape((0,))[0]
        last_part = "mlp" if ".linear1." in self.name else "v"
        return self.parts[last_part].stop


def _weight_tensors(weight: _WrittenWeight, names: _Names) -> dict[str, np.ndarray]:
    """Return the tensors of a file that hold the changes of a weight, by key.

    **Arguments:**

    - `weight`: with its changes.
    - `names`: of the format to be written.
    """
    if any(isinstance(change.term, FullTerm) for change in weight.changes):
        return _full_difference(weight, names)
    if is_of_own_kind(weight.changes[0]):
        return _of_own_kind(weight, names)
    tensors = {}
    for module, up, down in _module_factors(weight, names.dialect):
        stem = names.stem(module)
        if names.format == "peft":
            tensors[f"{stem}.lora_A.weight"] = down
            tensors[f"{stem}.lora_B.weight"] = up
        else:
            tensors[f"{stem}.lora_down.weight"] = down
            tensors[f"{stem}.lora_up.weight"] = up
            # An alpha of the rank, so that the factor is 1 for every reader.
            tensors[f"{stem}.alpha"] = np.asarray(len(down), np.float32)
    return tensors


def _of_own_kind(weight: _WrittenWeight, names: _Names) -> dict[str, np.ndarray]:
    """Return the tensors of a LoKr or a DoRA, by key."""
    term = weight.changes[0].term
    if isinstance(term, KronTerm):
        # One module: PEFT's names, in which a weight may have several, are refused.
        (key, _), *_ = names.dialect.keys(weight.name)
        return kron_tensors(term, key.removesuffix(".weight"), names.stem)
    assert isinstance(term, MagnitudeTerm)
    endings = _DORA_ENDINGS[names.format]
    return magnitude_tensors(weight.name, term, names.dialect, weight.parts, names.stem, endings)


def _full_difference(weight: _WrittenWeight, names: _Names) -> dict[str, np.ndarray]:
    """Return the sum of a weight's changes as one full difference, under kohya's name."""
    rows = weight.rows
    total: np.ndarray | None = None
    for change in weight.changes:
        start, stop = row_range(change, (rows,), weight.parts)
        # The base does not matter: full and low-rank differences are the same for every base.
        delta = np.asarray(change.term.delta(jnp.zeros(())), np.float32)
        if change.swap:
            delta = np.roll(delta, len(delta) // 2, axis=0)
        if total is None:
            total = np.zeros((rows, *delta.shape[1:]), np.float32)
        total[start:stop] += delta
    assert total is not None  # a weight that is listed has changes
    (key, _), *_ = names.dialect.keys(weight.name)
    module, _, tensor = key.rpartition(".")
    ending = "diff_b" if tensor == "bias" else "diff"
    return {f"{names.stem(module)}.{ending}": total}


def _module_factors(
    weight: _WrittenWeight, dialect: Dialect
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield the modules that hold the changes of a weight, each with its up and its down.

    **Arguments:**

    - `weight`: all of whose changes are of low rank.
    - `dialect`: the key table, read backwards.
    """
    rows = weight.rows
    columns = max(change.term.columns or 0 for change in weight.changes)
    unscaled = [(change, 1.0) for change in weight.changes]
    shape = (rows, columns)
    factors = combined_factors(weight.name, unscaled, shape, weight.parts, xp=np)
    down, up = (np.asarray(factor) for factor in factors)
    for key, row in dialect.keys(weight.name):
        part = slice(0, rows) if row.part is None else weight.parts[row.part]
        part_up = up[part]
        if row.layout == "swap":
            part_up = np.roll(part_up, len(part_up) // 2, axis=0)
        # Columns of zeros are of changes of other parts.
        used = np.any(part_up != 0, axis=0)
        if used.any():
            yield key.removesuffix(".weight"), part_up[:, used], down[used]


def _cast_factor(
    key: str,
    tensor: np.ndarray,
    dtype: np.dtype | None,
) -> np.ndarray:
    """Return a tensor in the dtype of the factors; alphas stay float32.

    **Arguments:**

    - `key`: of the tensor.
    - `dtype`: None for the one that it has.
    """
    if dtype is None or key.endswith(".alpha"):
        return tensor
    return cast(np.asarray(tensor), dtype, key)
