"""What an adapter adds to a weight: one class a kind of factorization, each a function of the base in float32."""

from abc import abstractmethod
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.shapes import Array, Float, Int


class Term(eqx.Module):
    """A change of a weight, [rows, columns], or of a vector.

    `additive`: whether the delta is the same for every base, so that subtracting it gives the base back.
    """

    additive: ClassVar[bool] = True

    @abstractmethod
    def delta(self, base: Float[Array, "*shape"]) -> Float[Array, "*changed"]:
        """Return what is added to the base at scale 1, in float32; the base is taken in float32 too."""

    def factors(self) -> tuple[Array, Array] | None:
        """Return the up and the down, in float32, whose product is the delta, or None for a change of no lower rank."""
        return None

    @property
    @abstractmethod
    def rows(self) -> int | None:
        """The rows of a weight that it fits, or None if it fits any number."""

    @property
    @abstractmethod
    def columns(self) -> int | None:
        """The columns of a weight that it fits, or None if it fits any number."""

    def shape(self, base: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of what is added to a base of this shape; it is another shape where the two don't fit."""
        rows, columns = self.rows, self.columns
        return (base[0] if rows is None else rows, *(base[1:] if columns is None else (columns,)))


class LowRankTerm(Term):
    """factor * up @ down. Source: Hu et al. 2021, LoRA, section 4.1; `factor` is alpha / rank."""

    up: Float[Array, "rows rank"]
    down: Float[Array, "rank columns"]
    factor: Float[Array, ""]

    def delta(self, base):
        return _float32(self.factor) * (_float32(self.up) @ _float32(self.down))

    @property
    def rows(self):
        return len(self.up)

    @property
    def columns(self):
        return self.down.shape[1]

    def factors(self):
        return _float32(self.factor) * _float32(self.up), _float32(self.down)


class KronTerm(Term):
    """factor * kron(left, right), each a matrix or a product of two. Source: Yeh et al. 2023, LyCORIS, LoKr."""

    left: tuple[Float[Array, "_ _"], ...]
    right: tuple[Float[Array, "_ _"], ...]
    factor: Float[Array, ""]

    def delta(self, base):
        left, right = (
            _float32(side[0]) if len(side) == 1 else _float32(side[0]) @ _float32(side[1])
            for side in (self.left, self.right)
        )
        return _float32(self.factor) * jnp.kron(left, right)

    @property
    def rows(self):
        return len(self.left[0]) * len(self.right[0])

    @property
    def columns(self):
        return self.left[-1].shape[1] * self.right[-1].shape[1]

    def factors(self):
        """kron(A, B C) is kron(A, B) kron(I, C), and kron(A D, B C) is kron(A, B) kron(D, C)."""
        if len(self.right) == 1:
            return None
        left, *rest = (_float32(part) for part in self.left)
        up, down = (_float32(part) for part in self.right)
        inner = rest[0] if rest else jnp.eye(left.shape[1], dtype=jnp.float32)
        return _float32(self.factor) * jnp.kron(left, up), jnp.kron(inner, down)


class HadamardTerm(Term):
    """factor * (up1 @ down1) * (up2 @ down2), elementwise. Source: Hyeon-Woo et al. 2021, FedPara; LyCORIS calls it LoHa."""

    up1: Float[Array, "rows rank"]
    down1: Float[Array, "rank columns"]
    up2: Float[Array, "rows rank2"]
    down2: Float[Array, "rank2 columns"]
    factor: Float[Array, ""]

    def delta(self, base):
        first = _float32(self.up1) @ _float32(self.down1)
        return _float32(self.factor) * first * (_float32(self.up2) @ _float32(self.down2))

    @property
    def rows(self):
        return len(self.up1)

    @property
    def columns(self):
        return self.down1.shape[1]

    def factors(self):
        """An elementwise product of ranks r and s has rank r s: products of the ups' columns, and of the downs' rows."""
        up1, down1, up2, down2 = (_float32(x) for x in (self.up1, self.down1, self.up2, self.down2))
        up = (up1[:, :, None] * up2[:, None]).reshape(len(up1), -1)
        return _float32(self.factor) * up, (down1[:, None] * down2[None]).reshape(
            -1, down1.shape[1]
        )


class _Whole(Term):
    """A change that a file holds as one tensor in the shape of the weight."""

    value: Float[Array, "*shape"]

    @property
    def rows(self):
        return self.value.shape[0]

    @property
    def columns(self):
        return self.value.shape[1] if self.value.ndim > 1 else None

    def shape(self, base):
        return self.value.shape


class FullTerm(_Whole):
    """A difference stored as itself."""

    def delta(self, base):
        return _float32(self.value)


class ReplacementTerm(_Whole):
    """A value that takes the base's place, at any scale other than 0."""

    additive: ClassVar[bool] = False

    def delta(self, base):
        return _float32(self.value) - base


class MagnitudeTerm(Term):
    """magnitude * (W + delta) / |W + delta| - W, with the norm of each row (`by_row`) or of each column.

    **Source:** Liu et al. 2024, DoRA, eq. 5.
    """

    inner: Term
    magnitude: Float[Array, " length"]
    by_row: bool = eqx.field(static=True)
    additive: ClassVar[bool] = False

    def delta(self, base):
        changed = base + self.inner.delta(base)
        norm = jnp.linalg.norm(changed, axis=1 if self.by_row else 0, keepdims=True)
        magnitude = _float32(self.magnitude)
        magnitude = magnitude[:, None] if self.by_row else magnitude[None]
        # A zero vector has no direction, so no magnitude can stretch it: it stays zero, where 0 / 0 would be NaN.
        ratio = jnp.where(norm > 0, magnitude / jnp.where(norm > 0, norm, 1), 0)
        return changed * ratio - base

    @property
    def rows(self):
        return self.inner.rows

    @property
    def columns(self):
        return self.inner.columns

    def shape(self, base):
        return self.inner.shape(base)


class OrthogonalTerm(Term):
    """A weight multiplied by orthogonal blocks: R W on its outputs, or W R on its inputs; then its rows scaled.

    **Arguments:** `blocks`: stages of block-diagonal matrices, applied in order to the rows of W (`on_rows`), or of W
    transposed. `order`: for each stage, the order that the rows are put in for it, and back after it. `scale`: factors of
    the rows. `shared`: whether the one block of a stage is repeated.
    **Source:** Qiu et al. 2023, OFT; Liu et al. 2024, BOFT, section 4.
    """

    blocks: Float[Array, "stages number size size"]
    order: Int[Array, "stages length"] | None
    scale: Float[Array, " rows"] | None
    on_rows: bool = eqx.field(static=True)
    shared: bool = eqx.field(static=True, default=False)
    additive: ClassVar[bool] = False

    def delta(self, base):
        rotated = self._rotated(base) if self.on_rows else self._rotated(base.T).T
        return (rotated if self.scale is None else _float32(self.scale)[:, None] * rotated) - base

    def _rotated(self, x: Float[Array, "length others"]) -> Float[Array, "length others"]:
        for stage, blocks in enumerate(self.blocks):
            x = x if self.order is None else x[self.order[stage]]
            apart = x.reshape(-1, blocks.shape[-1], x.shape[-1])
            x = jnp.einsum(
                "nij,njc->nic",
                jnp.broadcast_to(_float32(blocks), (len(apart), *blocks.shape[1:])),
                apart,
            )
            x = x.reshape(-1, x.shape[-1])
            x = x if self.order is None else x[jnp.argsort(self.order[stage])]
        return x

    @property
    def rows(self):
        if self.scale is not None:
            return self.scale.size
        return self._length if self.on_rows else None

    @property
    def columns(self):
        return None if self.on_rows else self._length

    @property
    def _length(self) -> int | None:
        return None if self.shared else self.blocks.shape[1] * self.blocks.shape[2]

    def shape(self, base):
        size, side = self.blocks.shape[-1], 0 if self.on_rows else 1
        if (
            self.shared and len(base) == 2 and base[side] % size
        ):  # the nearest multiple of the block, which does not fit
            return tuple(
                -(-length // size) * size if axis == side else length
                for axis, length in enumerate(base)
            )
        return super().shape(base)


class GeneralizedTerm(Term):
    """factor * (up @ down + W @ left @ right). Source: Chavan et al. 2023, GLoRA; LyCORIS leaves out its bias terms."""

    up: Float[Array, "rows rank"]
    down: Float[Array, "rank columns"]
    left: Float[Array, "columns rank"]
    right: Float[Array, "rank columns"]
    factor: Float[Array, ""]
    additive: ClassVar[bool] = False

    def delta(self, base):
        up, down, left, right = (_float32(x) for x in (self.up, self.down, self.left, self.right))
        return _float32(self.factor) * (up @ down + base @ left @ right)

    @property
    def rows(self):
        return len(self.up)

    @property
    def columns(self):
        return self.down.shape[1]


def _float32(x: jax.typing.ArrayLike) -> Array:
    return jnp.asarray(x).astype(jnp.float32)
