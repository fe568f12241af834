"""What the kernels of flash_gpu are written against, whichever compiler they are for.

A program owns a block of one side: queries in the forward kernel and in that of q's gradient, keys
in that of k's and v's gradients. The arrays of its own block are called *resident*; those of the
other side are *streamed*, block after block.

Arrays are matrices, [tokens, heads, head_dim], or rows, [heads, tokens], with one number for each
token of a head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from fluxjax.kernels.block_sizes import Block, round_up
from fluxjax.kernels.pallas_types import Index, Ref, Step
from fluxjax.shapes import Array, Float, Int

Tensor = Float[Array, "..."]
"""A matrix or a row, as this file defines them."""

KeyLength = Int[Array, "1"]
"""How many keys are attended to."""

Tile = Ref | Array
"""A block of an array, for one head: a reference to it (Mosaic), or what was loaded (Triton)."""

Carry = TypeVar("Carry")

Interpret = Any
"""Whether to interpret a kernel: False or None, True for Triton, or JAX's parameters for Mosaic."""

Launcher = Callable[..., tuple[Array, ...]]
"""Runs a kernel: (`GpuKernelSpec`, `KernelCall`, `KeyLength` or None) -> its results."""


@dataclass(frozen=True, kw_only=True)
class GpuKernelSpec:
    """What is static in one call of flash_gpu.

    **Arguments:**

    - `scale`: factor of the logits, times log2(e), since exponentials are to base 2.
    - `keys`: number of keys without padding.
    - `forward`, `dq`, `dkv`: (queries, keys) of each kernel's block.
    - `launch`: runs a kernel: `launch_mosaic` or `launch_triton`.
    - `interpret`: as of `flash_attention_gpu`.
    """

    scale: float
    keys: int
    forward: Block
    dq: Block
    dkv: Block
    launch: Launcher
    interpret: Interpret

    def resident_and_streamed(self, kernel: str) -> Block:
        """Return the tokens of a program's own block, and those of a streamed block."""
        if kernel == "dkv":
            queries, keys = self.dkv
            return keys, queries
        return getattr(self, kernel)

    def steps(self, kernel: str, streamed_tokens: int, key_end: Index, first_token: Index) -> Index:
        """Return how many blocks are streamed to a program.

        **Arguments:** `streamed_tokens`: of the streamed side. `key_end`: index of the first key
        that is padding. `first_token`: that the program's own block begins with.
        """
        size = self.resident_and_streamed(kernel)[1]
        # Without a key length the count is known in Python.
        if isinstance(key_end, int):
            return pl.cdiv(streamed_tokens if kernel == "dkv" else key_end, size)
        if kernel == "dkv":
            # Keys that are padding have no gradient, so that they need no queries.
            has_keys = first_token < key_end
            return jnp.where(has_keys, jnp.int32(pl.cdiv(streamed_tokens, size)), jnp.int32(0))
        return lax.div(key_end + (size - 1), jnp.int32(size))


@runtime_checkable
class TileStream(Protocol):
    """The streamed blocks of a group of arrays."""

    def wait(self, step: Step) -> Sequence[Tile]:
        """Return the group's tiles of a step, once they have arrived."""

    def free(self, step: Step) -> None:
        """Allow the memory of a step's tiles to be overwritten."""


@dataclass(frozen=True, kw_only=True)
class KernelContext:
    """What one program computes with: its data, and the operations of its compiler.

    **Arguments:**

    - `resident`: tiles of its own block.
    - `streams`: one for each group of streamed arrays.
    - `first_token`: index of the token that its own block begins with.
    - `key_end`: index of the first key that is padding.
    - `steps`: how many blocks are streamed.

    Vectors are "along axis 0" of a matrix if they have a value for each of its rows, and along
    axis 1 if they have one for each of its columns.
    """

    spec: GpuKernelSpec
    resident: Sequence[Tile]
    streams: Sequence[TileStream]
    first_token: Index
    key_end: Index
    steps: Index

    def zeros(self, *shape: int) -> Array:
        """Return a float32 matrix of zeros, or a vector along axis 0."""
        return jnp.zeros(shape, jnp.float32)

    def load_vector(self, tile: Tile, axis: int) -> Array:
        """Return a vector along an axis."""
        return tile[...]

    def iota(self, shape: tuple[int, ...], axis: int) -> Array:
        """Return each element's index along an axis."""
        return lax.broadcasted_iota(jnp.int32, shape, axis)

    def matmul_transposed(
        self,
        a: Tile,
        b: Tile,
        *,
        overlap: Callable[[], object] | None = None,
    ) -> Array:
        """Return a b^T in float32, and call `overlap` while the tensor cores compute it."""
        if overlap is not None:
            overlap()
        return jnp.dot(a[...], b[...].T, preferred_element_type=jnp.float32)

    def add_matmul(self, total: Array, a: Array, b: Tile) -> Array:
        """Return total + a b, with `a` rounded to the dtype of `b`."""
        return total + jnp.dot(a.astype(b.dtype), b[...], preferred_element_type=jnp.float32)

    def ping_pong(self, *values: Array) -> tuple[Array, ...]:
        """Let the other warpgroup use the tensor cores, after `values` are computed.

        This one continues when the other one calls it too. Returns the values.
        """
        return values

    def start_ping_pong(self) -> None:
        """Delay the second warpgroup by half a step."""

    def end_ping_pong(self) -> None:
        """Wait for the second warpgroup."""

    def loop_over_keys(
        self,
        size: int,
        body: Callable[[bool, Step, Carry], Carry],
        carry: Carry,
    ) -> Carry:
        """Call (masked, step, carry) -> carry for each block of `size` keys.

        `masked` is whether padding begins inside of the block.
        """
        full = partial(body, False)
        partly_padded = partial(body, True)
        # Two loops, so that only the second one, of one step at most, computes a mask.
        if isinstance(self.key_end, int):
            full_steps = self.key_end // size
            carry = lax.fori_loop(0, full_steps, full, carry)
            if full_steps == self.steps:
                return carry
            return lax.fori_loop(full_steps, self.steps, partly_padded, carry)
        end = lax.div(self.key_end, jnp.int32(size))
        carry = lax.fori_loop(0, end, full, carry)
        return lax.fori_loop(end, self.steps, partly_padded, carry)


@dataclass(frozen=True, kw_only=True)
class KernelCall:
    """One kernel with its arrays.

    **Arguments:**

    - `name`: "forward", "dq" or "dkv".
    - `compute`: what a program computes: the tiles of its results.
    - `resident`: arrays of a program's own side.
    - `streamed`: arrays of the other side, in groups whose blocks arrive together.
    - `results`: shapes of the results, or arrays of these shapes.
    """

    name: str
    compute: Callable[[KernelContext], tuple[Array, ...]]
    resident: list[Tensor]
    streamed: list[list[Tensor]]
    results: Sequence[Tensor | jax.ShapeDtypeStruct]


def token_axis(x: Tensor | jax.ShapeDtypeStruct) -> int:
    """Return the axis of tokens: the first of a matrix, and the second of a row."""
    return 0 if x.ndim == 3 else 1


def with_tokens(x: Tensor | jax.ShapeDtypeStruct, tokens: int) -> jax.ShapeDtypeStruct:
    """Return the shape of a matrix or of a row with another number of tokens."""
    shape = list(x.shape)
    shape[token_axis(x)] = tokens
    return jax.ShapeDtypeStruct(tuple(shape), x.dtype)


def pad_tokens(x: Tensor, multiple: int) -> Tensor:
    """Pad the tokens of a matrix or of a row with zeros, to a multiple."""
    axis = token_axis(x)
    missing = round_up(x.shape[axis], multiple) - x.shape[axis]
    if not missing:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing)
    return jnp.pad(x, widths)


def first_tokens(x: Tensor, tokens: int) -> Tensor:
    """Return the first tokens of a matrix or of a row."""
    return x[:tokens] if token_axis(x) == 0 else x[:, :tokens]
