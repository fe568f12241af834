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

from fluxjax.shapes import Array, Float

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
        factor = as_float32(self.factor)
        up = as_float32(self.up)
        down = as_float32(self.down)
        return factor * (up @ down)

    @property
    def rows(self) -> int:
        return len(self.up)

    @property
    def columns(self) -> int:
        return self.down.shape[1]

    def factors(self) -> tuple[Array, Array]:
        scaled_up = as_float32(self.factor) * as_float32(self.up)
        return scaled_up, as_float32(self.down)


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
        factor = as_float32(self.factor)
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
        left, *rest = (as_float32(part) for part in self.left)
        up, down = (as_float32(part) for part in self.right)
        inner = rest[0] if rest else jnp.eye(left.shape[1], dtype=jnp.float32)
        scaled_up = as_float32(self.factor) * jnp.kron(left, up)
        return scaled_up, jnp.kron(inner, down)


def _product(side: tuple[Array, ...]) -> Array:
    """Return one side of a Kronecker product, in float32.

    **Arguments:**

    - `side`: the matrix itself, or its two factors.
    """
    if len(side) == 1:
        return as_float32(side[0])
    return as_float32(side[0]) @ as_float32(side[1])


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
        first = as_float32(self.up1) @ as_float32(self.down1)
        scaled = as_float32(self.factor) * first
        second = as_float32(self.up2) @ as_float32(self.down2)
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
        up1 = as_float32(self.up1)
        down1 = as_float32(self.down1)
        up2 = as_float32(self.up2)
        down2 = as_float32(self.down2)
        # Rank r of the first and s of the second product are joined to one axis of r s.
        up = (up1[:, :, None] * up2[:, None]).reshape(len(up1), -1)
        scaled_up = as_float32(self.factor) * up
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
        return as_float32(self.value)


class ReplacementTerm(_WholeTensorTerm):
    """A value that replaces the base, at any scale other than 0 (`.set_weight`, BFL's Control)."""

    additive: ClassVar[bool] = False

    def delta(self, base: Base) -> Difference:
        """Return the difference of the value from the base."""
        # Merging sets the value itself; this is for readers that add.
        return as_float32(self.value) - base


def as_float32(x: jax.typing.ArrayLike) -> Array:
    """Return a number or an array in the dtype that all terms compute in."""
    return jnp.asarray(x).astype(jnp.float32)
