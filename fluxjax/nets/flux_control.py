"""What ControlNets add to the image's tokens after the blocks of a FLUX transformer."""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from fluxjax.nets.flux_blocks import ImageAndText, TokenStates
from fluxjax.shapes import Array, Float, Int

RunBlock = Callable[..., PyTree]
"""(block, tokens, modulation, image_prompts, *flag) -> tokens, as `block_runner` makes it."""
Stack = Float[Array, "residuals img_tokens width"]
"""Residuals of one kind of blocks."""
Numbers = tuple[Int[Array, " depth"], ...]
"""For each stack, the number of the residual that each block of the transformer gets."""


class ControlResiduals(eqx.Module):
    """What one ControlNet adds to the image's tokens: one residual for each block of its own.

    A ControlNet has fewer blocks than the transformer, of which several share a residual: they are
    read by number inside the loop over blocks, so there is no copy for each block.

    `double`, `single`: added after double and after single blocks, to the image's own tokens; those
    of a reference get nothing. `repeated`: whether block i of the transformer gets residual i
    modulo their number (XLabs); otherwise each residual is for a run of consecutive blocks.
    """

    double: Float[Array, "double_residuals img_tokens width"]
    single: Float[Array, "single_residuals img_tokens width"]
    repeated: bool = eqx.field(static=True)

    def __mul__(self, scale: Float[Array, ""]) -> "ControlResiduals":
        """Return all residuals times a number, in their dtype."""
        double = self.double * scale.astype(self.double.dtype)
        return ControlResiduals(double, self.single * scale.astype(double.dtype), self.repeated)


def residual_numbers(residuals: int, depth: int, *, repeated: bool) -> np.ndarray:
    """Return which residual each block of a transformer gets.

    Where the residuals do not divide the blocks, each is for ceil(depth / residuals) of them, and
    the last ones may be for none: of 6 residuals for 19 blocks the sixth is unused.

    **Arguments:** `residuals`: their number, at least 1. `depth`: the number of blocks. `repeated`:
    as for `ControlResiduals`.
    **Returns:** numbers from 0, one for each block.
    """
    blocks = np.arange(depth, dtype=np.int32)
    if repeated:
        return blocks % np.int32(residuals)
    return blocks // np.int32(max(-(-depth // residuals), 1))


def add_after_double(
    run: RunBlock, control: Sequence[ControlResiduals], depth: int
) -> tuple[RunBlock, Numbers]:
    """Return a function that runs a double block and then adds the residuals of ControlNets.

    **Arguments:** `run`: runs a block. `depth`: the number of the transformer's double blocks.
    **Returns:** the function, and its last argument's rows for a loop over all blocks.
    """
    stacks, numbers = _stacks(control, "double", depth)

    def add(tokens: ImageAndText, rows: Sequence[Int[Array, ""]]) -> ImageAndText:
        img, txt = tokens
        for stack, row in zip(stacks, rows, strict=True):
            img = _add(img, stack[row], 0)
        return img, txt

    return _then(run, add), numbers


def add_after_single(
    run: RunBlock, control: Sequence[ControlResiduals], depth: int, txt_tokens: int
) -> tuple[RunBlock, Numbers]:
    """Return what `add_after_double` does, for single blocks.

    **Arguments:** `txt_tokens`: how many tokens come before the image's.
    """
    stacks, numbers = _stacks(control, "single", depth)

    def add(tokens: TokenStates, rows: Sequence[Int[Array, ""]]) -> TokenStates:
        for stack, row in zip(stacks, rows, strict=True):
            tokens = _add(tokens, stack[row], txt_tokens)
        return tokens

    return _then(run, add), numbers


def add_after_first(img: TokenStates, control: Sequence[ControlResiduals]) -> TokenStates:
    """Return the image's tokens after the first double block, with its residuals added."""
    for residuals in control:
        if len(residuals.double):
            img = _add(img, residuals.double[0], 0)
    return img


def check_residuals(img: TokenStates, control: Sequence[ControlResiduals]) -> None:
    """Check that residuals fit the image's tokens; there may be further tokens, of a reference.

    **Raises:** `ValueError` for another width, or more tokens.
    """
    for residuals in control:
        tokens, width = residuals.double.shape[1:]
        if width != img.shape[-1] or tokens > len(img):
            raise ValueError(
                f"`Flux(control)` got residuals for {tokens} tokens of width {width}, and its "
                f"image has {len(img)} tokens of width {img.shape[-1]}. Use a ControlNet of this "
                "transformer's width, and the image's own size."
            )


def _stacks(
    control: Sequence[ControlResiduals], kind: str, depth: int
) -> tuple[list[Stack], Numbers]:
    """Return the stacks of one kind of blocks that are not empty, and their blocks' numbers."""
    stacks, numbers = [], []
    for residuals in control:
        stack = getattr(residuals, kind)
        if len(stack):
            stacks.append(stack)
            rows = residual_numbers(len(stack), depth, repeated=residuals.repeated)
            numbers.append(jnp.asarray(rows))
    return stacks, tuple(numbers)


def _then(run: RunBlock, add: Callable[..., PyTree]) -> RunBlock:
    """Return a function that runs a block and then adds; its last argument is the rows."""

    def run_and_add(block: PyTree, tokens: PyTree, modulation: PyTree, *rest: PyTree) -> PyTree:
        *flag, rows = rest
        return add(run(block, tokens, modulation, *flag), rows)

    return run_and_add


def _add(tokens: TokenStates, residual: Array, before: int) -> TokenStates:
    """Return tokens with a residual added to those that follow the first `before`."""
    # Padding is fused into the addition; an update of a part of the tokens would be a scatter.
    after = len(tokens) - before - len(residual)
    return tokens + jnp.pad(residual.astype(tokens.dtype), ((before, after), (0, 0)))
