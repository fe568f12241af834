"""What an adapter adds to one weight: one class for each kind of factorization.

Every class computes a dense difference from its factors. Adapters differ in how many numbers
they store for it, and in whether the difference depends on the weight (`additive`). All of them
compute in float32, whatever dtype the factors are stored in.
"""

from abc import abstractmethod
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.shapes import Array, Float, Int

Base = Float[Array, "*shape"]
"""A weight before the change: a matrix [rows, columns], or a vector."""
Difference = Float[Array, "*changed"]
"""What is added to a weight, in float32."""
Matrix = Float[Array, "rows columns"]
"""A matrix that has the shape of the weight."""


class Term(eqx.Module):
    """A change of one weight [rows, columns], or of a vector [rows].

    - `additive`: whether the difference is the same for every base weight, so that subtracting it
      restores the base.
    """

    additive: ClassVar[bool] = True

    @abstractmethod
    def delta(self, base: Base) -> Difference:
        """Return the difference that is added to a weight at scale 1.

        **Arguments:**

        - `base`: the weight before the change, in float32. Additive terms ignore it.

        **Returns:** the difference, in float32.
        """

    def factors(self) -> tuple[Array, Array] | None:
        """Return the difference as a product of two factors.

        **Returns:** up [rows, rank] and down [rank, columns] in float32, whose product is the
        difference; None for a term that has no low-rank form.
        """
        return None

    @property
    @abstractmethod
    def rows(self) -> int | None:
        """The number of rows of the weights that it fits; None if it fits any number."""

    @property
    @abstractmethod
    def columns(self) -> int | None:
        """The number of columns of the weights that it fits; None if it fits any number."""

    def shape(self, base: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the difference for a base of this shape.

        The term fits the base if and only if the two shapes are equal.

        **Arguments:**

        - `base`: the shape of the weight, or of the part of it that is changed.
        """
        rows, columns = self.rows, self.columns
        changed = list(base)
        # Slices, because a vector has no second axis, and a term may have one.
        if rows is not None:
            changed[:1] = [rows]
        if columns is not None:
            changed[1:] = [columns]
        return tuple(changed)


class LowRankTerm(Term):
    """LoRA (LoCon for convolutions): factor * up @ down.

    - `up`: "lora_up" of kohya's scripts, "lora_B" of PEFT.
    - `down`: "lora_down" of kohya's scripts, "lora_A" of PEFT.
    - `factor`: alpha / rank, which is not trained.

    **Source:** Hu et al. 2021, LoRA, section 4.1.
    """

    up: Float[Array, "rows rank"]
    down: Float[Array, "rank columns"]
    factor: Float[Array, ""]

    def delta(self, base: Base) -> Matrix:
        """Return factor * (up @ down)."""
        factor = _float32(self.factor)
        up = _float32(self.up)
        down = _float32(self.down)
        return factor * (up @ down)

    @property
    def rows(self) -> int:
        return len(self.up)

    @property
    def columns(self) -> int:
        return self.down.shape[1]

    def factors(self) -> tuple[Array, Array]:
        scaled_up = _float32(self.factor) * _float32(self.up)
        return scaled_up, _float32(self.down)


class KronTerm(Term):
    """LoKr: factor * kron(left, right), where each side is one matrix or a product of two.

    The Kronecker product of an [a, b] and a [c, d] matrix is [a c, b d].

    - `left`: "lokr_w1", or "lokr_w1_a" and "lokr_w1_b".
    - `right`: "lokr_w2", or "lokr_w2_a" and "lokr_w2_b".
    - `factor`: alpha / rank, where a side is decomposed.

    **Source:** Yeh et al. 2023, LyCORIS, LoKr.
    """

    left: tuple[Float[Array, "_ _"], ...]
    right: tuple[Float[Array, "_ _"], ...]
    factor: Float[Array, ""]

    def delta(self, base: Base) -> Matrix:
        """Return factor times the Kronecker product of both sides."""
        left = _product(self.left)
        right = _product(self.right)
        factor = _float32(self.factor)
        return factor * jnp.kron(left, right)

    @property
    def rows(self) -> int:
        return len(self.left[0]) * len(self.right[0])

    @property
    def columns(self) -> int:
        return self.left[-1].shape[1] * self.right[-1].shape[1]

    def factors(self) -> tuple[Array, Array] | None:
        """As `Term.factors`; only a decomposed right side has a low-rank form.

        kron(A, B C) = kron(A, B) kron(I, C), and kron(A D, B C) = kron(A, B) kron(D, C).
        """
        if len(self.right) == 1:
            return None
        left, *rest = (_float32(part) for part in self.left)
        up, down = (_float32(part) for part in self.right)
        inner = rest[0] if rest else jnp.eye(left.shape[1], dtype=jnp.float32)
        scaled_up = _float32(self.factor) * jnp.kron(left, up)
        return scaled_up, jnp.kron(inner, down)


def _product(side: tuple[Array, ...]) -> Array:
    """Return one side of a Kronecker product, in float32.

    **Arguments:**

    - `side`: the matrix itself, or its two factors.
    """
    if len(side) == 1:
        return _float32(side[0])
    return _float32(side[0]) @ _float32(side[1])


class HadamardTerm(Term):
    """LoHa: factor * (up1 @ down1) * (up2 @ down2), an elementwise product of two products.

    - `up1`, `down1`: "hada_w1_a" and "hada_w1_b".
    - `up2`, `down2`: "hada_w2_a" and "hada_w2_b", which may have another rank.
    - `factor`: alpha / rank.

    **Source:** Hyeon-Woo et al. 2021, FedPara; LyCORIS calls it LoHa.
    """

    up1: Float[Array, "rows rank"]
    down1: Float[Array, "rank columns"]
    up2: Float[Array, "rows rank2"]
    down2: Float[Array, "rank2 columns"]
    factor: Float[Array, ""]

    def delta(self, base: Base) -> Matrix:
        """Return factor * (up1 @ down1) * (up2 @ down2), the second product by elements."""
        first = _float32(self.up1) @ _float32(self.down1)
        scaled = _float32(self.factor) * first
        second = _float32(self.up2) @ _float32(self.down2)
        return scaled * second

    @property
    def rows(self) -> int:
        return len(self.up1)

    @property
    def columns(self) -> int:
        return self.down1.shape[1]

    def factors(self) -> tuple[Array, Array]:
        """As `Term.factors`: an elementwise product of ranks r and s has rank r s.

        Its up holds every product of a column of up1 and one of up2, and its down every product
        of a row of down1 and one of down2.
        """
        up1 = _float32(self.up1)
        down1 = _float32(self.down1)
        up2 = _float32(self.up2)
        down2 = _float32(self.down2)
        # Rank r of the first and s of the second product are joined to one axis of r s.
        up = (up1[:, :, None] * up2[:, None]).reshape(len(up1), -1)
        scaled_up = _float32(self.factor) * up
        down = (down1[:, None] * down2[None]).reshape(-1, down1.shape[1])
        return scaled_up, down


class _WholeTensorTerm(Term):
    """A change that a file holds as one tensor of the weight's shape.

    - `value`: the tensor, in the dtype of the file.
    """

    value: Float[Array, "*shape"]

    @property
    def rows(self) -> int:
        return self.value.shape[0]

    @property
    def columns(self) -> int | None:
        if self.value.ndim < 2:
            return None
        return self.value.shape[1]

    def shape(self, base: tuple[int, ...]) -> tuple[int, ...]:
        # A vector has no columns, so the rule of the base class would keep those of a matrix.
        return self.value.shape


class FullTerm(_WholeTensorTerm):
    """Full diff: the difference of a weight, bias or norm scale, stored as it is."""

    def delta(self, base: Base) -> Difference:
        return _float32(self.value)


class ReplacementTerm(_WholeTensorTerm):
    """A value that replaces the base, at any scale other than 0 (`.set_weight`, BFL's Control)."""

    additive: ClassVar[bool] = False

    def delta(self, base: Base) -> Difference:
        """Return the difference of the value from the base."""
        # Merging sets the value itself; this is for readers that add.
        return _float32(self.value) - base


class MagnitudeTerm(Term):
    """DoRA: magnitude * (W + delta) / norm(W + delta) - W.

    - `inner`: the term that gives delta.
    - `magnitude`: the norms that the rows or columns get.
    - `by_row`: whether magnitudes and norms are those of the rows; otherwise of the columns.

    **Source:** Liu et al. 2024, DoRA, eq. 5.
    """

    inner: Term
    magnitude: Float[Array, " length"]
    by_row: bool = eqx.field(static=True)
    additive: ClassVar[bool] = False

    def delta(self, base: Matrix) -> Matrix:
        """Return the change to rows or columns that have the magnitudes as norms."""
        changed = base + self.inner.delta(base)
        axis = 1 if self.by_row else 0
        norm = jnp.linalg.norm(changed, axis=axis, keepdims=True)
        magnitude = _float32(self.magnitude)
        magnitude = magnitude[:, None] if self.by_row else magnitude[None]
        # A zero vector has no direction to stretch: it stays zero, where 0 / 0 would be NaN.
        ratio = jnp.where(norm > 0, magnitude / jnp.where(norm > 0, norm, 1), 0)
        return changed * ratio - base

    def scaled_factors(self, base: Matrix) -> tuple[Array, Array, Array] | None:
        """Return the difference as (ratio - 1) W + ratio up down, without the changed matrix.

        |w + u down|² = |w|² + 2 u (down w) + u (down downᵀ) u for a row w and its factor u.

        **Arguments:**

        - `base`: as for `delta`.

        **Returns:** ratio [rows], up and down; None for magnitudes of columns, or where the inner
        term has no low-rank form.
        """
        factors = self.inner.factors()
        if factors is None or not self.by_row:
            return None
        up, down = factors
        overlap = jnp.sum(up * (base @ down.T), axis=1)
        added = jnp.sum(up * (up @ (down @ down.T)), axis=1)
        squared = jnp.sum(jnp.square(base), axis=1) + 2 * overlap + added
        # A zero row has no direction to stretch, and the root no gradient there.
        norm = jnp.sqrt(jnp.where(squared > 0, squared, 1))
        return jnp.where(squared > 0, _float32(self.magnitude) / norm, 0), up, down

    @property
    def rows(self) -> int | None:
        return self.inner.rows

    @property
    def columns(self) -> int | None:
        return self.inner.columns

    def shape(self, base: tuple[int, ...]) -> tuple[int, ...]:
        return self.inner.shape(base)


class OrthogonalTerm(Term):
    """OFT and BOFT: R W (on the outputs) or W R (on the inputs), R orthogonal; then rows scaled.

    - `blocks`: for each stage the diagonal blocks of one factor of R, applied in order to the
      rows of W if `on_rows`, otherwise to the rows of W transposed.
    - `order`: for each stage the permutation of the rows under which its factor of R is
      block-diagonal; it is undone after the stage; None for no permutation.
    - `scale`: factors of the rows of the result; None for no scaling.
    - `on_rows`: whether R is on the outputs (LyCORIS, kohya) or on the inputs (PEFT).
    - `shared`: whether a stage has one block that is repeated along the diagonal.

    **Source:** Qiu et al. 2023, OFT; Liu et al. 2024, BOFT, section 4.
    """

    blocks: Float[Array, "stages number size size"]
    order: Int[Array, "stages length"] | None
    scale: Float[Array, " rows"] | None
    on_rows: bool = eqx.field(static=True)
    shared: bool = eqx.field(static=True, default=False)
    additive: ClassVar[bool] = False

    def delta(self, base: Matrix) -> Matrix:
        """Return the rotated base, its rows scaled if there is a scale, minus the base."""
        rotated = self._rotate_rows(base) if self.on_rows else self._rotate_rows(base.T).T
        if self.scale is not None:
            scale = _float32(self.scale)
            rotated = scale[:, None] * rotated
        return rotated - base

    def _rotate_rows(self, x: Array) -> Array:
        """Return R x, with one block-diagonal product for each stage.

        **Arguments:**

        - `x`: [length, others], in float32.
        """
        for stage, blocks in enumerate(self.blocks):
            if self.order is not None:
                x = x[self.order[stage]]
            groups = x.reshape(-1, blocks.shape[-1], x.shape[-1])
            # A shared block is repeated; otherwise there are as many blocks as groups.
            blocks = jnp.broadcast_to(_float32(blocks), (len(groups), *blocks.shape[1:]))
            groups = jnp.einsum("nij,njc->nic", blocks, groups)
            x = groups.reshape(-1, x.shape[-1])
            if self.order is not None:
                # The argsort of a permutation is its inverse.
                x = x[jnp.argsort(self.order[stage])]
        return x

    @property
    def rows(self) -> int | None:
        # A scale has one number for each row, whichever axis is rotated.
        if self.scale is not None:
            return self.scale.size
        return self._length if self.on_rows else None

    @property
    def columns(self) -> int | None:
        return None if self.on_rows else self._length

    @property
    def _length(self) -> int | None:
        """The length of the axis that is rotated; a shared block fits any multiple of its size."""
        if self.shared:
            return None
        return self.blocks.shape[1] * self.blocks.shape[2]

    def shape(self, base: tuple[int, ...]) -> tuple[int, ...]:
        size = self.blocks.shape[-1]
        axis = 0 if self.on_rows else 1
        if self.shared and len(base) == 2 and base[axis] % size:
            # The next multiple of the block's size differs from the base, so it counts as a misfit.
            changed = list(base)
            changed[axis] = -(-base[axis] // size) * size
            return tuple(changed)
        return super().shape(base)


class GeneralizedTerm(Term):
    """GLoRA: factor * (up @ down + W @ left @ right).

    - `up`, `down`: the factors of the part that does not depend on the weight W.
    - `left`, `right`: the factors of the part that W is multiplied by.
    - `factor`: alpha / rank.

    **Source:** Chavan et al. 2023, GLoRA, without its bias terms, which LyCORIS leaves out.
    """

    up: Float[Array, "rows rank"]
    down: Float[Array, "rank columns"]
    left: Float[Array, "columns rank"]
    right: Float[Array, "rank columns"]
    factor: Float[Array, ""]
    additive: ClassVar[bool] = False

    def delta(self, base: Matrix) -> Matrix:
        """Return factor * (up @ down + W @ left @ right)."""
        up = _float32(self.up)
        down = _float32(self.down)
        left = _float32(self.left)
        right = _float32(self.right)
        factor = _float32(self.factor)
        return factor * (up @ down + base @ left @ right)

    @property
    def rows(self) -> int:
        return len(self.up)

    @property
    def columns(self) -> int:
        return self.down.shape[1]


def _float32(x: jax.typing.ArrayLike) -> Array:
    return jnp.asarray(x).astype(jnp.float32)
