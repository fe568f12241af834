"""The tensors of one module of an adapter file, put together to the terms that they mean."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.tensors import TensorFile
from fluxjax.lora.names import Place
from fluxjax.lora.rotations import butterfly_order, cayley, peft_butterfly_order, peft_cayley
from fluxjax.lora.settings import Settings
from fluxjax.lora.terms import (
    FullTerm,
    GeneralizedTerm,
    HadamardTerm,
    KronTerm,
    LowRankTerm,
    MagnitudeTerm,
    OrthogonalTerm,
    ReplacementTerm,
    Term,
)
from fluxjax.printable import printable
from fluxjax.shapes import Array


@dataclass
class Module:
    """The keys of one module, by role. `settings`: what PEFT says of its network."""

    name: str
    place: Place
    keys: dict[str, str]
    settings: Settings | None


def terms_of(file: TensorFile, module: Module) -> list[tuple[str, Term]]:
    """Return what a module's tensors change: our names of its weight and its bias, each with a term.

    **Raises:** `WeightsError` for tensors that do not belong together, or whose numbers are not finite.
    """
    parts = _Parts(file, module)
    found: list[tuple[str, Term]] = []
    build = next(
        (build for marks, build in _BUILDERS.items() if any(mark in parts for mark in marks)), None
    )
    if build is not None:
        if module.place.is_norm and build not in (_full, _assigned):
            raise parts.error(
                f"{parts.left()} can't change {module.place.weight}, which is a norm's vector"
            )
        found.append((module.place.weight, _decomposed(parts, build(parts))))
    for role, whole in (("bias", FullTerm), ("up_bias", FullTerm), ("plain_bias", ReplacementTerm)):
        if role in parts:
            found.append((parts.bias_name(role), whole(parts.bias(role))))
    if parts.keys or not found:
        raise parts.error(
            f"{parts.left() or 'alpha'} of {printable(module.name)} has nothing to belong to. It is not whole"
        )
    return found


class _Parts:
    """Tensors of a module, each taken once; what is left over at the end belongs to nothing."""

    def __init__(self, file: TensorFile, module: Module):
        self.file, self.module, self.keys = file, module, dict(module.keys)
        self.alpha = self._one("alpha") if "alpha" in self.keys else None
        # A bias shares its factors' scale.
        self.up_rank = file.tensors[module.keys["up"]].shape[1:2] if "up" in module.keys else ()

    def __contains__(self, role: str) -> bool:
        return role in self.keys

    def error(self, text: str) -> WeightsError:
        return WeightsError(f"{self.file.path}: {text}.")

    def left(self) -> str:
        return ", ".join(printable(key) for key in self.keys.values())

    def take(self, role: str) -> np.ndarray:
        """Return a tensor's values, floats, finite, in its own dtype."""
        if role not in self.keys:
            raise self.error(
                f"{printable(self.module.name)} comes without its {role}, beside {', '.join(self.module.keys)}. It is not whole"
            )
        key = self.keys.pop(role)
        values = self.file.tensors[key].view()
        if not jnp.issubdtype(values.dtype, jnp.floating):
            raise self.error(
                f"{printable(key)} has dtype {values.dtype}, but adapters are of floating-point numbers"
            )
        if not values.size:
            raise self.error(f"{printable(key)} of shape {list(values.shape)} is empty (rank 0)")
        with np.errstate(
            over="ignore"
        ):  # a float64 beyond float32 becomes infinity, which is refused
            values = values.astype(np.float32) if values.dtype == np.float64 else values
        if not np.isfinite(values).all():
            raise self.error(
                f"{printable(key)} holds NaN or infinity. The adapter is damaged: get it anew"
            )
        return values

    def _one(self, role: str) -> float:
        key = self.keys.pop(role)
        value = np.asarray(self.file.tensors[key].view()).reshape(-1)
        if (
            value.size != 1
            or value.dtype == np.bool_
            or not np.isfinite(value.astype(np.float32)).all()
        ):
            raise self.error(
                f"{printable(key)} has to be one finite number. The adapter is damaged: get it anew"
            )
        return float(value.astype(np.float32)[0])

    def matrix(self, role: str) -> np.ndarray:
        """Return a tensor as a matrix; one of a 1x1 convolution loses its last axes."""
        key, values = self.keys.get(role, ""), self.take(role)
        if values.ndim in (3, 4, 5) and set(values.shape[2:]) == {1}:
            values = values.reshape(values.shape[:2])
        if values.ndim != 2:
            raise self.error(
                f"{printable(key)} has shape {list(values.shape)}, but {role} has to be a matrix"
            )
        return values

    def array(self, role: str, axes: int) -> np.ndarray:
        key, values = self.keys.get(role, ""), self.take(role)
        if values.ndim != axes:
            raise self.error(
                f"{printable(key)} has shape {list(values.shape)}, but {role} has to have {axes} axes"
            )
        return values

    def vector(self, role: str) -> np.ndarray:
        key, values = self.keys.get(role, ""), self.take(role)
        if values.size != max(values.shape, default=1):
            raise self.error(
                f"{printable(key)} has shape {list(values.shape)}, but it has to be a vector"
            )
        return values.reshape(-1)

    def counts(self, role: str) -> tuple[int, ...]:
        """Return a short tensor of whole numbers."""
        tensor = self.file.tensors[self.keys.pop(role)]
        return (
            tuple(int(x) for x in tensor.view().reshape(-1))
            if tensor.size <= 4 and tensor.dtype.kind in "iu"
            else ()
        )

    def bias_name(self, role: str) -> str:
        if self.module.place.bias is None:
            raise self.error(
                f"{self.module.place.weight} has no bias for {printable(self.keys[role])} to change"
            )
        return self.module.place.bias

    def bias(self, role: str) -> Array:
        value = self.vector(role)
        if role == "up_bias" and self.up_rank:
            value = np.float32(self.factor(self.up_rank[0])) * value.astype(np.float32)
        return jnp.asarray(value)

    def factor(self, rank: int) -> float:
        """Return alpha / rank; without an alpha it is 1."""
        settings, alpha = self.module.settings, self.alpha
        if alpha is not None:
            factor = alpha / (math.sqrt(rank) if settings and settings.root else rank)
        else:
            factor = 1.0 if settings is None else settings.factor(self.module.place.inner, rank)
        if not abs(factor) < np.finfo(np.float32).max:
            raise self.error(
                f"alpha / rank of {printable(self.module.name)} is {factor}, beyond float32"
            )
        return factor

    def check(self, fits: bool, **shapes: np.ndarray) -> None:
        if not fits:
            listed = " and ".join(
                f"{name} of {list(value.shape)}" for name, value in shapes.items()
            )
            raise self.error(
                f"{printable(self.module.name)} has {listed}, which do not fit together"
            )


def _low_rank(parts: _Parts) -> Term:
    up, down = parts.matrix("up"), parts.matrix("down")
    # Multiplied before the factors, the kernel of a 1x1 convolution leaves a pair as any other.
    rank = len(down)
    if "mid" in parts:
        mid = parts.matrix("mid")
        parts.check(mid.shape == (up.shape[1], rank), up=up, mid=mid, down=down)
        down = mid.astype(np.float32) @ down.astype(np.float32)
    parts.check(up.shape[1] == len(down), up=up, down=down)
    term = LowRankTerm(jnp.asarray(up), jnp.asarray(down), jnp.float32(parts.factor(rank)))
    if "reshape" in parts:
        wanted = parts.counts("reshape")
        if wanted != (term.rows, term.columns):
            name = printable(parts.module.name)
            raise parts.error(
                f"{name} is reshaped to {list(wanted)}, but changes [{term.rows}, {term.columns}]"
            )
    return term


def _tucker(parts: _Parts, core: str, left: str, right: str) -> tuple[np.ndarray, np.ndarray]:
    """Return two factors of a matrix. With the core of a 1x1 convolution, the left one is stored transposed."""
    first, second = parts.matrix(left), parts.matrix(right)
    if core not in parts:
        parts.check(first.shape[1] == len(second), **{left: first, right: second})
        return first, second
    middle = parts.matrix(core)
    parts.check(
        middle.shape == (len(first), len(second)), **{left: first, core: middle, right: second}
    )
    return first.astype(np.float32).T @ middle.astype(np.float32), second


def _kron(parts: _Parts) -> Term:
    rank = None
    sides: list[tuple[np.ndarray, ...]] = []
    for side in ("lokr_w1", "lokr_w2"):
        if side in parts:
            sides.append((parts.matrix(side),))
        else:
            sides.append(_tucker(parts, side.replace("w", "t"), f"{side}_a", f"{side}_b"))
            rank = len(sides[-1][1])
    of_peft = parts.module.settings is not None and parts.module.settings.method == "LOKR"
    # LyCORIS scales only what is decomposed; PEFT scales every LoKr.
    factor = 1.0 if rank is None and not of_peft else parts.factor(rank or 1)
    left, right = (tuple(jnp.asarray(x) for x in side) for side in sides)
    return KronTerm(left, right, jnp.float32(factor))


def _hadamard(parts: _Parts) -> Term:
    up1, down1 = _tucker(parts, "hada_t1", "hada_w1_a", "hada_w1_b")
    up2, down2 = _tucker(parts, "hada_t2", "hada_w2_a", "hada_w2_b")
    parts.check(
        len(up1) == len(up2) and down1.shape[1] == down2.shape[1],
        w1_a=up1,
        w1_b=down1,
        w2_a=up2,
        w2_b=down2,
    )
    factor = jnp.float32(parts.factor(len(down1)))
    return HadamardTerm(
        jnp.asarray(up1), jnp.asarray(down1), jnp.asarray(up2), jnp.asarray(down2), factor
    )


def _generalized(parts: _Parts) -> Term:
    first, second, up, down = (parts.matrix(role) for role in ("a1", "a2", "b1", "b2"))
    if not _chains(first, second, up, down):
        # The first GLoRA of LyCORIS had the factors of both products the other way round.
        first, second, up, down = second, first, down, up
    parts.check(_chains(first, second, up, down), a1=first, a2=second, b1=up, b2=down)
    factor = jnp.float32(parts.factor(len(second)))
    return GeneralizedTerm(
        jnp.asarray(up), jnp.asarray(down), jnp.asarray(first), jnp.asarray(second), factor
    )


def _chains(left: np.ndarray, right: np.ndarray, up: np.ndarray, down: np.ndarray) -> bool:
    """Whether up @ down and W @ left @ right are products that can be added."""
    ranks = {left.shape[1], right.shape[0], up.shape[1], down.shape[0]}
    return len(ranks) == 1 and left.shape[0] == right.shape[1] == down.shape[1]


def _oft(parts: _Parts) -> Term:
    """LyCORIS's and kohya's OFT and BOFT: blocks on the outputs; alpha times the outputs bounds the blocks' norm."""
    axes = 3 if len(parts.file.tensors[parts.keys["oft_blocks"]].shape) == 3 else 4
    blocks = parts.array("oft_blocks", axes)
    parts.check(blocks.shape[-1] == blocks.shape[-2], oft_blocks=blocks)
    length = blocks.shape[-3] * blocks.shape[-1]
    rotated = cayley(blocks, (parts.alpha or 0.0) * length)
    scale = jnp.asarray(parts.vector("rescale")) if "rescale" in parts else None
    if axes == 3:  # OFT multiplies by the transposed blocks
        return OrthogonalTerm(jnp.asarray(rotated.swapaxes(1, 2)[None]), None, scale, on_rows=True)
    order = butterfly_order(len(blocks), blocks.shape[1], blocks.shape[-1])
    parts.check(order is not None, oft_blocks=blocks)
    return OrthogonalTerm(jnp.asarray(rotated), jnp.asarray(order), scale, on_rows=True)


def _peft_oft(parts: _Parts) -> Term:
    settings, key = parts.module.settings, parts.keys["oft_R"]
    if settings is None or settings.method != "OFT":
        raise parts.error(
            f"{printable(key)} is of PEFT's OFT, whose options are in adapter_config.json. Pass PEFT's folder, with both files"
        )
    vectors = parts.array("oft_R", 2)
    size = (1 + math.isqrt(1 + 8 * vectors.shape[1])) // 2
    parts.check(size * (size - 1) // 2 == vectors.shape[1], oft_R=vectors)
    if settings.shared:
        parts.check(len(vectors) == 1, oft_R=vectors)
    blocks = jnp.asarray(peft_cayley(vectors, size, settings)[None])
    return OrthogonalTerm(blocks, None, None, on_rows=False, shared=settings.shared)


def _peft_boft(parts: _Parts) -> Term:
    blocks, scale = parts.array("boft_R", 4), parts.vector("boft_s")
    parts.check(blocks.shape[-1] == blocks.shape[-2], boft_R=blocks)
    order = peft_butterfly_order(len(blocks), blocks.shape[1], blocks.shape[-1])
    parts.check(order is not None, boft_R=blocks)
    # PEFT halves the skew part, and rotates the other way than LyCORIS.
    rotated = cayley(-0.5 * blocks.astype(np.float64), 0.0)
    return OrthogonalTerm(
        jnp.asarray(rotated), jnp.asarray(order), jnp.asarray(scale), on_rows=False
    )


def _full(parts: _Parts) -> Term:
    return FullTerm(_own_shape(parts, "full"))


def _assigned(parts: _Parts) -> Term:
    return ReplacementTerm(_own_shape(parts, "assigned" if "assigned" in parts else "plain"))


def _own_shape(parts: _Parts, role: str) -> Array:
    """Return a tensor of the shape of what it changes: a matrix, or a norm's vector."""
    return jnp.asarray(parts.vector(role) if parts.module.place.is_norm else parts.matrix(role))


def _decomposed(parts: _Parts, term: Term) -> Term:
    """Return a term with its DoRA magnitudes, if it has any."""
    settings = parts.module.settings
    role = next((role for role in ("magnitude", "row_magnitude") if role in parts), None)
    if role is None:
        if settings is not None and settings.dora and isinstance(term, LowRankTerm):
            raise parts.error(
                f"{printable(parts.module.name)} comes without its magnitudes, though use_dora is set"
            )
        return term
    key = parts.keys[role]
    if isinstance(term, ReplacementTerm):
        raise parts.error(f"{printable(key)} has nothing to scale: the weight is set beside it")
    values = parts.take(role)
    shape = values.shape[:2] if set(values.shape[2:]) <= {1} else values.shape
    by_row = _by_row(role, shape, term)
    wanted = term.rows if by_row else term.columns
    if values.size != max(values.shape, default=1) or values.size != wanted:
        what = "rows" if by_row else "columns"
        raise parts.error(
            f"{printable(key)} has shape {list(values.shape)}, which does not fit {wanted} {what}"
        )
    return MagnitudeTerm(term, jnp.asarray(values.reshape(-1)), by_row)


def _by_row(role: str, shape: tuple[int, ...], term: Term) -> bool:
    """Whether magnitudes are of the rows: [rows, 1] is, [1, columns] is not, on square weights too; a vector is if it fits."""
    if role == "row_magnitude":
        return True
    if len(shape) == 2 and shape[0] == 1:
        return term.rows == 1 and shape == (1, 1)
    return len(shape) == 2 or shape == (term.rows,) or shape != (term.columns,)


_BUILDERS: Mapping[tuple[str, ...], Callable[[_Parts], Term]] = {
    ("up", "down", "mid"): _low_rank,
    ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"): _kron,
    ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"): _hadamard,
    ("a1", "a2", "b1", "b2"): _generalized,
    ("oft_blocks",): _oft,
    ("oft_R",): _peft_oft,
    ("boft_R",): _peft_boft,
    ("full",): _full,
    ("assigned", "plain"): _assigned,
}
