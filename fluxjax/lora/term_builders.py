"""The terms that the tensors of a module mean: one builder for each kind of factorization.

A builder reads the tensors that it needs by their roles, checks that their shapes fit together,
and returns the term in the conventions of `Term`. The table of builders at the end says by
which roles each kind is recognized. Several tensors may remain for one module: magnitudes make a
DoRA of the term, and biases are changes of their own.
"""

import math
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np

from fluxjax.checkpoint.tensors import TensorFile
from fluxjax.lora.base_terms import GeneralizedTerm, MagnitudeTerm, OrthogonalTerm
from fluxjax.lora.module_tensors import Module, ModuleTensors
from fluxjax.lora.rotations import butterfly_order, cayley, peft_butterfly_order, peft_cayley
from fluxjax.lora.terms import FullTerm, HadamardTerm, KronTerm, LowRankTerm, ReplacementTerm, Term
from fluxjax.printable import printable
from fluxjax.shapes import Array

Builder = Callable[[ModuleTensors], Term]
"""Reads the tensors of a module that it needs, and returns the term that they mean."""

_BIAS_TERMS: Mapping[str, type[FullTerm] | type[ReplacementTerm]] = {
    "bias": FullTerm,
    "up_bias": FullTerm,
    "plain_bias": ReplacementTerm,
}
"""How a bias is changed, by the role of its tensor."""


def module_terms(file: TensorFile, module: Module) -> list[tuple[str, Term]]:
    """Return what the tensors of a module change.

    **Arguments:**

    - `file`: the adapter file.
    - `module`: the keys of the module.

    **Returns:** our names of its weight and its bias, each with a term; one of them may be
    missing.
    **Raises:** `WeightsError` for tensors that do not belong together, or whose numbers are not
    finite.
    """
    tensors = ModuleTensors(file, module)
    place = module.place
    found: list[tuple[str, Term]] = []
    build = _find_builder(tensors)
    if build is not None:
        if place.is_norm and build not in (_full, _replacement):
            raise tensors.error(
                f"{tensors.unused_keys()} can't change {place.weight}, which is a norm's vector"
            )
        term = _with_magnitude(tensors, build(tensors))
        found.append((place.weight, term))
    for role, bias_term in _BIAS_TERMS.items():
        if role in tensors:
            name = tensors.bias_name(role)
            found.append((name, bias_term(tensors.bias(role))))
    if tensors.keys or not found:
        unused = tensors.unused_keys() or "alpha"
        raise tensors.error(
            f"{unused} of {tensors.name} belongs to no other tensor. The module is incomplete"
        )
    return found


def _find_builder(tensors: ModuleTensors) -> Builder | None:
    """Return the builder that one of the module's roles belongs to.

    One role is enough, so that a module with a missing tensor is an error that names the tensor.

    **Returns:** None for a module that has only biases.
    """
    for roles, build in _BUILDERS.items():
        if any(role in tensors for role in roles):
            return build
    return None


def _low_rank(tensors: ModuleTensors) -> Term:
    """Build a LoRA, or a LoCon of a 1x1 convolution, whose core is called "mid"."""
    up = tensors.matrix("up")
    down = tensors.matrix("down")
    # Taken before the core is multiplied in: alpha is divided by the rank of the file's down.
    rank = len(down)
    if "mid" in tensors:
        # Multiplied into one factor, the core of a Tucker form leaves an ordinary pair.
        mid = tensors.matrix("mid")
        fits = mid.shape == (up.shape[1], rank)
        tensors.check_shapes(fits, up=up, mid=mid, down=down)
        down = mid.astype(np.float32) @ down.astype(np.float32)
    tensors.check_shapes(up.shape[1] == len(down), up=up, down=down)
    term = LowRankTerm(
        up=jnp.asarray(up),
        down=jnp.asarray(down),
        factor=jnp.float32(tensors.factor(rank)),
    )
    if "reshape" in tensors:
        _check_reshape(tensors, term)
    return term


def _check_reshape(tensors: ModuleTensors, term: LowRankTerm) -> None:
    """**Raises:** `WeightsError` if the file's shape of the widened weight is not the factors'."""
    shape = tensors.integers("reshape")
    if shape != (term.rows, term.columns):
        raise tensors.error(
            f"{tensors.name} is reshaped to {list(shape)}, "
            f"but changes [{term.rows}, {term.columns}]"
        )


def _tucker(
    tensors: ModuleTensors,
    core: str,
    left: str,
    right: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the two factors of a matrix, the core of a Tucker form multiplied into the left one.

    With a core, which is that of a 1x1 convolution, the left factor is stored transposed.

    **Arguments:**

    - `core`, `left`, `right`: the roles of the three tensors; the core may be missing.
    """
    first = tensors.matrix(left)
    second = tensors.matrix(right)
    if core not in tensors:
        fits = first.shape[1] == len(second)
        tensors.check_shapes(fits, **{left: first, right: second})
        return first, second
    middle = tensors.matrix(core)
    fits = middle.shape == (len(first), len(second))
    tensors.check_shapes(fits, **{left: first, core: middle, right: second})
    product = first.astype(np.float32).T @ middle.astype(np.float32)
    return product, second


def _kron(tensors: ModuleTensors) -> Term:
    """Build a LoKr, of which each side is one tensor ("lokr_w1") or two ("lokr_w1_a", "_b")."""
    rank = None
    sides: list[tuple[Array, ...]] = []
    for side in ("lokr_w1", "lokr_w2"):
        if side in tensors:
            factors: tuple[np.ndarray, ...] = (tensors.matrix(side),)
        else:
            core = side.replace("w", "t")
            factors = _tucker(tensors, core, f"{side}_a", f"{side}_b")
            rank = len(factors[1])
        sides.append(tuple(jnp.asarray(factor) for factor in factors))
    settings = tensors.module.settings
    is_peft = settings is not None and settings.method == "LOKR"
    # LyCORIS scales only what is decomposed; PEFT scales every LoKr.
    factor = 1.0 if rank is None and not is_peft else tensors.factor(rank or 1)
    return KronTerm(
        left=sides[0],
        right=sides[1],
        factor=jnp.float32(factor),
    )


def _hadamard(tensors: ModuleTensors) -> Term:
    """Build a LoHa."""
    up1, down1 = _tucker(tensors, "hada_t1", "hada_w1_a", "hada_w1_b")
    up2, down2 = _tucker(tensors, "hada_t2", "hada_w2_a", "hada_w2_b")
    fits = len(up1) == len(up2) and down1.shape[1] == down2.shape[1]
    tensors.check_shapes(fits, w1_a=up1, w1_b=down1, w2_a=up2, w2_b=down2)
    return HadamardTerm(
        up1=jnp.asarray(up1),
        down1=jnp.asarray(down1),
        up2=jnp.asarray(up2),
        down2=jnp.asarray(down2),
        factor=jnp.float32(tensors.factor(len(down1))),
    )


def _generalized(tensors: ModuleTensors) -> Term:
    """Build a GLoRA of LyCORIS."""
    first = tensors.matrix("a1")
    second = tensors.matrix("a2")
    up = tensors.matrix("b1")
    down = tensors.matrix("b2")
    if not _fit_glora(first, second, up, down):
        # The first GLoRA of LyCORIS stored the two factors of each product in the other order.
        first, second, up, down = second, first, down, up
    fits = _fit_glora(first, second, up, down)
    tensors.check_shapes(fits, a1=first, a2=second, b1=up, b2=down)
    return GeneralizedTerm(
        up=jnp.asarray(up),
        down=jnp.asarray(down),
        left=jnp.asarray(first),
        right=jnp.asarray(second),
        factor=jnp.float32(tensors.factor(len(second))),
    )


def _fit_glora(
    left: np.ndarray,
    right: np.ndarray,
    up: np.ndarray,
    down: np.ndarray,
) -> bool:
    """Return whether up @ down and W @ left @ right are products that can be added."""
    ranks = {left.shape[1], right.shape[0], up.shape[1], down.shape[0]}
    return len(ranks) == 1 and left.shape[0] == right.shape[1] == down.shape[1]


def _oft(tensors: ModuleTensors) -> Term:
    """Build LyCORIS's and kohya's OFT (three axes) or BOFT (four), which rotate the outputs."""
    stored = tensors.file.tensors[tensors.keys["oft_blocks"]]
    axes = 3 if len(stored.shape) == 3 else 4
    blocks = tensors.array("oft_blocks", axes)
    tensors.check_shapes(blocks.shape[-1] == blocks.shape[-2], oft_blocks=blocks)
    # Here alpha is not a scale: alpha times the number of outputs bounds the blocks' norm.
    length = blocks.shape[-3] * blocks.shape[-1]
    rotated = cayley(blocks, (tensors.alpha or 0.0) * length)
    scale = None
    if "rescale" in tensors:
        scale = jnp.asarray(tensors.vector("rescale"))
    if axes == 3:
        # LyCORIS's OFT multiplies by the transposed blocks.
        transposed = rotated.swapaxes(1, 2)
        return OrthogonalTerm(
            blocks=jnp.asarray(transposed[None]),
            order=None,
            scale=scale,
            on_rows=True,
        )
    order = butterfly_order(len(blocks), blocks.shape[1], blocks.shape[-1])
    tensors.check_shapes(order is not None, oft_blocks=blocks)
    return OrthogonalTerm(
        blocks=jnp.asarray(rotated),
        order=jnp.asarray(order),
        scale=scale,
        on_rows=True,
    )


def _peft_oft(tensors: ModuleTensors) -> Term:
    """Build PEFT's OFT, which rotates the inputs."""
    settings = tensors.module.settings
    key = tensors.keys["oft_R"]
    if settings is None or settings.method != "OFT":
        raise tensors.error(
            f"{printable(key)} is of PEFT's OFT, whose options are in adapter_config.json. "
            "Pass PEFT's folder, with both files"
        )
    vectors = tensors.array("oft_R", 2)
    # A row holds size (size - 1) / 2 numbers, of which this is the inverse.
    size = (1 + math.isqrt(1 + 8 * vectors.shape[1])) // 2
    tensors.check_shapes(size * (size - 1) // 2 == vectors.shape[1], oft_R=vectors)
    if settings.shared:
        tensors.check_shapes(len(vectors) == 1, oft_R=vectors)
    blocks = peft_cayley(vectors, size, settings)
    return OrthogonalTerm(
        blocks=jnp.asarray(blocks[None]),
        order=None,
        scale=None,
        on_rows=False,
        shared=settings.shared,
    )


def _peft_boft(tensors: ModuleTensors) -> Term:
    """Build PEFT's BOFT, which rotates the inputs and scales the outputs."""
    blocks = tensors.array("boft_R", 4)
    scale = tensors.vector("boft_s")
    tensors.check_shapes(blocks.shape[-1] == blocks.shape[-2], boft_R=blocks)
    order = peft_butterfly_order(len(blocks), blocks.shape[1], blocks.shape[-1])
    tensors.check_shapes(order is not None, boft_R=blocks)
    # PEFT halves the skew part, and rotates in the other direction than LyCORIS.
    rotated = cayley(-0.5 * blocks.astype(np.float64), 0.0)
    return OrthogonalTerm(
        blocks=jnp.asarray(rotated),
        order=jnp.asarray(order),
        scale=jnp.asarray(scale),
        on_rows=False,
    )


def _full(tensors: ModuleTensors) -> Term:
    """Build a full difference."""
    return FullTerm(_whole_tensor(tensors, "full"))


def _replacement(tensors: ModuleTensors) -> Term:
    """Build a value that is set, from ".set_weight" or from a key that is named as a model's."""
    role = "assigned" if "assigned" in tensors else "plain"
    return ReplacementTerm(_whole_tensor(tensors, role))


def _whole_tensor(tensors: ModuleTensors, role: str) -> Array:
    """Return a tensor of the shape of what it changes: a matrix, or a norm's vector.

    **Arguments:**

    - `role`: of the tensor.
    """
    if tensors.module.place.is_norm:
        return jnp.asarray(tensors.vector(role))
    return jnp.asarray(tensors.matrix(role))


def _with_magnitude(tensors: ModuleTensors, term: Term) -> Term:
    """Return a term with the DoRA magnitudes of its module, or the term itself without any.

    **Arguments:**

    - `tensors`: of which the magnitudes are read.
    - `term`: of the module's weight.
    """
    if "magnitude" in tensors:
        role = "magnitude"
    elif "row_magnitude" in tensors:
        role = "row_magnitude"
    else:
        _check_no_dora(tensors, term)
        return term
    key = tensors.keys[role]
    if isinstance(term, ReplacementTerm):
        raise tensors.error(
            f"{printable(key)} has no effect, because the file sets this weight as a whole"
        )
    values = tensors.take(role)
    shape = values.shape
    # Magnitudes of a convolution have one axis of length 1 for each axis of its kernel.
    if set(shape[2:]) <= {1}:
        shape = shape[:2]
    by_row = _is_by_row(role, shape, term)
    if by_row:
        axis, length = "rows", term.rows
    else:
        axis, length = "columns", term.columns
    is_vector = values.size == max(values.shape, default=1)
    if not is_vector or values.size != length:
        raise tensors.error(
            f"{printable(key)} has shape {list(values.shape)}, which does not fit {length} {axis}"
        )
    magnitude = jnp.asarray(values.reshape(-1))
    return MagnitudeTerm(term, magnitude, by_row)


def _check_no_dora(tensors: ModuleTensors, term: Term) -> None:
    """**Raises:** `WeightsError` if PEFT's settings say that the module has DoRA magnitudes."""
    settings = tensors.module.settings
    is_dora = settings is not None and settings.dora
    if is_dora and isinstance(term, LowRankTerm):
        raise tensors.error(f"{tensors.name} comes without its magnitudes, though use_dora is set")


def _is_by_row(
    role: str,
    shape: tuple[int, ...],
    term: Term,
) -> bool:
    """Return whether magnitudes of this shape are those of the rows.

    [rows, 1] is, [1, columns] is not, on square weights too. A vector is of the rows if it fits
    them.

    **Arguments:**

    - `role`: "row_magnitude" for PEFT's magnitudes, which are always of the rows.
    - `shape`: of the magnitudes, two axes at most.
    - `term`: whose rows and columns they may belong to.
    """
    if role == "row_magnitude":
        return True
    if len(shape) != 2:
        return shape == (term.rows,) or shape != (term.columns,)
    if shape[0] == 1:
        return term.rows == 1 and shape == (1, 1)
    return True


_BUILDERS: Mapping[tuple[str, ...], Builder] = {
    ("up", "down", "mid"): _low_rank,
    ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"): _kron,
    ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"): _hadamard,
    ("a1", "a2", "b1", "b2"): _generalized,
    ("oft_blocks",): _oft,
    ("oft_R",): _peft_oft,
    ("boft_R",): _peft_boft,
    ("full",): _full,
    ("assigned", "plain"): _replacement,
}
"""The builder of each kind of module, by the roles of which one is enough to know it."""
