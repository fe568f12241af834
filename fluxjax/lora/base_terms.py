"""Terms that depend on the weight that they change: DoRA, rotations, and GLoRA."""

from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp

from fluxjax.lora.terms import Matrix, Term, as_float32
from fluxjax.shapes import Array, Float, Int


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
        magnitude = as_float32(self.magnitude)
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
        return jnp.where(squared > 0, as_float32(self.magnitude) / norm, 0), up, down

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
            scale = as_float32(self.scale)
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
            blocks = jnp.broadcast_to(as_float32(blocks), (len(groups), *blocks.shape[1:]))
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
        up = as_float32(self.up)
        down = as_float32(self.down)
        left = as_float32(self.left)
        right = as_float32(self.right)
        factor = as_float32(self.factor)
        return factor * (up @ down + base @ left @ right)

    @property
    def rows(self) -> int:
        return len(self.up)

    @property
    def columns(self) -> int:
        return self.down.shape[1]
