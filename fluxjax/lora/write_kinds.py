"""The tensors of LoKr and DoRA in files, as `read_lora` and LyCORIS and PEFT read them."""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np

from fluxjax.checkpoint.dialect import Dialect
from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.fused import FusedRows
from fluxjax.lora.adapter import Change
from fluxjax.lora.base_terms import MagnitudeTerm
from fluxjax.lora.terms import KronTerm

Stem = Callable[[str], str]
"""The beginning of the keys of a module, from its name."""
Tensors = dict[str, np.ndarray]


def is_of_own_kind(change: Change) -> bool:
    """Return whether a change is written by this module: a LoKr, or a DoRA of rows."""
    term = change.term
    if isinstance(term, KronTerm):
        return True
    return isinstance(term, MagnitudeTerm) and term.by_row and term.inner.factors() is not None


def check_own_kind(name: str, change: Change, to: str) -> None:
    """Check that a format can hold a change that is of its own kind.

    **Raises:** `WeightsError` for a change of a part of a fused weight, and for a LoKr in PEFT's
    names, in which the parts of a fused weight are apart.
    """
    kind = "LoKr" if isinstance(change.term, KronTerm) else "DoRA"
    if change.part is not None or change.swap:
        raise WeightsError(
            f"What the adapter does to {name} is a {kind} of a part of a fused weight, which is "
            "not written. Merge it instead."
        )
    if kind == "LoKr" and to == "peft":
        raise WeightsError(
            f"What the adapter does to {name} is a LoKr, which PEFT's names can't hold for fused "
            "weights. Write kohya's names."
        )


def kron_tensors(term: KronTerm, module: str, stem: Stem) -> Tensors:
    """Return the tensors of a LoKr, by key."""
    prefix, tensors = stem(module), {}
    for side, name in ((term.left, "lokr_w1"), (term.right, "lokr_w2")):
        if len(side) == 1:
            tensors[f"{prefix}.{name}"] = np.asarray(side[0], np.float32)
        else:
            for factor, ending in zip(side, ("a", "b"), strict=True):
                tensors[f"{prefix}.{name}_{ending}"] = np.asarray(factor, np.float32)
    decomposed = [side for side in (term.left, term.right) if len(side) == 2]
    if decomposed:
        # Readers divide it by the rank of the last decomposed side.
        rank = len(decomposed[-1][1])
        tensors[f"{prefix}.alpha"] = np.asarray(rank * float(term.factor), np.float32)
    elif float(term.factor) != 1:
        tensors[f"{prefix}.lokr_w1"] = tensors[f"{prefix}.lokr_w1"] * float(term.factor)
    return tensors


def magnitude_tensors(
    name: str,
    term: MagnitudeTerm,
    dialect: Dialect,
    parts: FusedRows,
    stem: Stem,
    endings: Mapping[str, str],
) -> Tensors:
    """Return the tensors of a DoRA of rows, by key; rows of fused parts go to their own modules.

    **Arguments:** `endings`: of the keys, by "up", "down" and "magnitude".
    """
    factors = term.inner.factors()
    assert factors is not None  # `is_of_own_kind` has looked
    up, down = (np.asarray(factor, np.float32) for factor in factors)
    magnitude = np.asarray(jnp.asarray(term.magnitude), np.float32)
    tensors: Tensors = {}
    for key, row in dialect.keys(name):
        part = slice(0, len(up)) if row.part is None else parts[row.part]
        values = {"up": up[part], "down": down, "magnitude": magnitude[part]}
        if row.layout == "swap":
            for field in ("up", "magnitude"):
                values[field] = np.roll(values[field], len(values[field]) // 2, axis=0)
        if endings["magnitude"] == "dora_scale":
            values["magnitude"] = values["magnitude"][:, None]
        prefix = stem(key.removesuffix(".weight"))
        for field, value in values.items():
            tensors[f"{prefix}.{endings[field]}"] = value
        if endings["magnitude"] == "dora_scale":
            tensors[f"{prefix}.alpha"] = np.asarray(len(down), np.float32)
    return tensors
