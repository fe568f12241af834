"""Loops over the blocks of a network, stacked or unrolled.

A loop over stacked blocks is one `jax.lax.scan`, in one of two forms: a plain one, and one that
fetches the next block's weights ahead. Unrolled blocks are a Python loop.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from fluxjax.kernels.chips import default_device
from fluxjax.nets.stack import Unrolled, block_at, depth_of, split_arrays
from fluxjax.nets.weight import Weight
from fluxjax.numeric import from_bits, index_axis, to_bits
from fluxjax.shapes import Array, Int

Carry = TypeVar("Carry")
Block = TypeVar("Block")
Result = TypeVar("Result")
Inputs = tuple[PyTree, ...]
"""Pytrees of arrays with one row for each block."""
Index = int | Int[Array, ""]
Step = Callable[..., tuple[Carry, PyTree]]
"""(block, carry, *row) -> (carry, result), where `row` is the block's row of each of the inputs."""


def scan_blocks(
    blocks: Block,
    carry: Carry,
    call: Callable[..., Carry],
    *,
    inputs: Inputs = (),
    start: int = 0,
    stop: int | None = None,
    remat: bool = False,
) -> Carry:
    """Return `carry` after call(block, carry, *row) for every block in turn.

    Stacked blocks are traced once, in a `jax.lax.scan`; unrolled ones are traced one by one.

    **Arguments:** `blocks`: stacked or unrolled. `carry`: a pytree, of which blocks keep the shapes
    and dtypes. `inputs`: pytrees of arrays with one row for each block, of which `call` gets the
    block's. `start`, `stop`: the blocks from number `start` on are run, up to the one before
    number `stop`, or to the last one; if some are not run, the gradient of each block is summed
    over the whole stack. `remat`: keep only the input of each block for a gradient, and run the
    block again.
    **Source:** `remat`: Chen et al. 2016.
    """

    def step(*arguments: PyTree) -> tuple[Carry, None]:
        return call(*arguments), None

    return _scan(blocks, carry, step, inputs, slice(start, stop), remat)[0]


def scan_blocks_with_results(
    blocks: Block,
    carry: Carry,
    call: Callable[..., tuple[Carry, Result]],
    *,
    inputs: Inputs = (),
    remat: bool = False,
) -> tuple[Carry, Result]:
    """Return what `scan_blocks` returns, and a result of each block, stacked along a leading axis.

    **Arguments:** `call`: (block, carry, *row) -> (carry, result). The others as for `scan_blocks`.
    """
    return _scan(blocks, carry, call, inputs, slice(None), remat)


def map_blocks(
    blocks: Block,
    call: Callable[[Block], Result],
    *,
    remat: bool = False,
) -> Result:
    """Return call(block) of every block, stacked along a leading axis.

    **Arguments:** `blocks`, `remat`: as for `scan_blocks`.
    """

    def step(block: Block, _: None) -> tuple[None, Result]:
        return None, call(block)

    return _scan(blocks, None, step, (), slice(None), remat)[1]


def read_block(blocks: Block, number: int) -> Block:
    """Return one block, read from its stack in the same way as in the loops over blocks.

    Use it for a block that runs outside of the loop, such as the last block of an encoder when only
    one token's state is needed.

    **Arguments:** `blocks`: stacked or unrolled. `number`: of the block.
    **Returns:** the block. Weights that are in another memory are still there, and are fetched when
    they are multiplied.
    """
    if isinstance(blocks, Unrolled):
        return blocks.blocks[number]
    arrays, static = split_arrays(blocks)
    return _block_in_place(arrays, static, jnp.asarray(number), block_at(arrays, number))


def _scan(
    blocks: PyTree,
    carry: Carry,
    call: Step,
    inputs: Inputs,
    part: slice,
    remat: bool,
) -> tuple[Carry, PyTree]:
    """Run the blocks whose numbers are in `part`.

    **Returns:** the last carry, and the results of these blocks, stacked.
    """
    numbers = range(depth_of(blocks))[part]
    if isinstance(blocks, Unrolled):
        return _run_unrolled(blocks, carry, call, inputs, numbers, remat)
    # With remat nothing is prefetched: every fetched block would be kept for the gradient.
    if not remat and _has_remote_weights(blocks):
        return _scan_prefetching(blocks, carry, call, inputs, numbers)
    return _scan_stacked(blocks, carry, call, inputs, numbers, remat)


def _scan_stacked(
    blocks: PyTree,
    carry: Carry,
    call: Step,
    inputs: Inputs,
    numbers: range,
    remat: bool,
) -> tuple[Carry, PyTree]:
    """`_scan` of stacked blocks whose weights are used where they are."""
    # Activations and sizes of layers are static: a scan takes arrays only, of all blocks.
    arrays, static = split_arrays(blocks)
    is_whole = len(numbers) == depth_of(blocks)

    def body(carry: Carry, scanned: PyTree) -> tuple[Carry, PyTree]:
        number, slices = scanned
        if not is_whole:
            # Scanning over a part of the stack would copy that part: read blocks in place instead.
            slices = block_at((arrays, *inputs), number)
        rows, *inputs_of_block = slices
        block = _block_in_place(arrays, static, number, rows)
        return call(block, carry, *inputs_of_block)

    # Inside a scan XLA can't merge the second run with the first, so the barriers against that,
    # which `prevent_cse` adds, would only cost.
    step = jax.checkpoint(body, prevent_cse=False) if remat else body
    scanned = (arrays, *inputs) if is_whole else None
    return jax.lax.scan(step, carry, (_as_array(numbers), scanned))


def _as_array(numbers: range) -> Int[Array, " blocks"]:
    """Return the numbers of blocks that follow one another, for a loop over them."""
    return jnp.arange(numbers.start, numbers.stop)


def _block_in_place(
    arrays: PyTree,
    static: PyTree,
    number: Int[Array, ""],
    rows: PyTree,
) -> PyTree:
    """Return the block of a stack with this number, whose arrays `_slice_in_place` slices.

    **Arguments:** `arrays`, `static`: the stack, as of `split_arrays`. `rows`: arrays[number].
    """
    return eqx.combine(jax.tree.map(partial(_slice_in_place, number), arrays, rows), static)


def _slice_in_place(
    number: Int[Array, ""],
    stacked: Array,
    row: Array,
) -> Array:
    """Return `row`, which is stacked[number], in the way that XLA reads with the least memory.

    XLA:CPU slices floats of 16 bits as float32, and casts the whole stack before the loop, which
    takes three times the memory. So they are sliced as integers. XLA would still convert the whole
    stack to integers before the loop; a barrier that the stack passes together with the loop's
    counter prevents it. Gradients go to `row`, by scan's own rule.
    """
    if stacked.dtype.itemsize != 2 or default_device().platform != "cpu" or len(stacked) == 0:
        return row
    # The gradient of a slice by number would be a whole stack for each block.
    stacked = jax.lax.stop_gradient(stacked)
    stacked, number = jax.lax.optimization_barrier((stacked, number))
    return _with_gradient_of(row, from_bits(index_axis(to_bits(stacked), number), stacked.dtype))


@jax.custom_jvp
def _with_gradient_of(row: Array, value: Array) -> Array:
    """Return `value`, differentiated as if it were `row`."""
    return value


@_with_gradient_of.defjvp
def _with_gradient_of_jvp(
    primals: tuple[Array, Array],
    tangents: tuple[Array, Array],
) -> tuple[Array, Array]:
    row_tangent, _ = tangents
    return _with_gradient_of(*primals), row_tangent


def _run_unrolled(
    blocks: Unrolled,
    carry: Carry,
    call: Step,
    inputs: Inputs,
    numbers: range,
    remat: bool,
) -> tuple[Carry, PyTree]:
    """`_scan` of unrolled blocks."""
    if remat:
        call = eqx.filter_checkpoint(call)
    results = []
    for number in numbers:
        row = block_at(inputs, number)
        carry, result = call(blocks.blocks[number], carry, *row)
        results.append(result)
    if not results:
        # `jnp.stack` has no shape for the results of no block.
        return carry, None
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)


def _scan_prefetching(
    blocks: PyTree,
    carry: Carry,
    call: Step,
    inputs: Inputs,
    numbers: range,
) -> tuple[Carry, PyTree]:
    """`_scan`, in which the next block's weights are fetched while a block runs."""
    depth = depth_of(blocks)

    def fetch_block(number: Index) -> tuple[PyTree, PyTree]:
        block = jax.tree.map(_fetched, block_at(blocks, number), is_leaf=_is_weight)
        return split_arrays(block)

    first, static = fetch_block(numbers.start)

    def body(
        state: tuple[Carry, PyTree],
        scanned: PyTree,
    ) -> tuple[tuple[Carry, PyTree], PyTree]:
        carry, arrays = state
        number, row = scanned
        # It does not depend on `call`, so that XLA can overlap the two. The last iteration fetches
        # a block for nothing: all iterations have one body.
        following, _ = fetch_block((number + 1) % depth)
        carry, result = call(eqx.combine(arrays, static), carry, *row)
        return (carry, following), result

    rows = jax.tree.map(lambda leaf: leaf[numbers.start : numbers.stop], inputs)
    (carry, _), results = jax.lax.scan(body, (carry, first), (_as_array(numbers), rows))
    return carry, results


def _is_weight(node: PyTree) -> bool:
    return isinstance(node, Weight)


def _fetched(node: PyTree) -> PyTree:
    return node.fetch() if isinstance(node, Weight) else node


def _has_remote_weights(blocks: PyTree) -> bool:
    nodes = jax.tree.leaves(blocks, is_leaf=_is_weight)
    return any(isinstance(node, Weight) and node.is_remote for node in nodes)
