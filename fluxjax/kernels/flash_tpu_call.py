"""How the kernels of flash_tpu are launched: grids, blocks in VMEM and scratch memory.

Matrices are [tokens, heads * head_dim] here: a head is a column of 128 lanes, so that a block of
one head is cut out of them and nothing is transposed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fluxjax.kernels.block_sizes import Block, ceil_div
from fluxjax.kernels.chips import TPU_CHIPS
from fluxjax.kernels.flash_tpu_blocks import LANES, flash_vmem_bytes
from fluxjax.kernels.flash_tpu_kernels import (
    KernelBody,
    TokenEnds,
    TpuKernelSpec,
    dkv_kernel,
    dq_kernel,
    forward_kernel,
)
from fluxjax.kernels.pallas_types import Index, Ref
from fluxjax.shapes import Array, Float, Int

Matrix = Float[Array, "_ width"]
"""Queries, keys, values or their gradients: [tokens, heads * head_dim]."""

Row = Float[Array, "heads 1 queries"]
"""A number for each query."""

KeyLength = Int[Array, "1 1"]
"""How many keys are attended to, in scalar memory."""

Side = Literal["queries", "keys", "row"]
"""What the blocks of an array follow: queries or keys of a matrix, or the queries of a row."""


class _Operand(NamedTuple):
    """An array with what its blocks follow."""

    array: Array
    side: Side


class _Result(NamedTuple):
    """The shape of a result with what its blocks follow."""

    shape: jax.ShapeDtypeStruct
    side: Side


def _like(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


@dataclass(frozen=True, kw_only=True)
class _Launch:
    """One kernel with its arrays.

    **Arguments:**

    - `name`: "forward", "dq" or "dkv".
    - `operands`, `results`: the first operand is q and the second k.
    - `scratch`: shapes of float32 scratch memory.
    - `matmuls`: of a block of logits' size, for the cost estimate.
    - `keys_first`: whether the grid goes over (heads, keys, queries) rather than (heads, queries,
      keys); the last of these is the one that is summed over.
    """

    name: str
    body: KernelBody
    operands: list[_Operand]
    results: list[_Result]
    scratch: list[tuple[int, int]]
    matmuls: int
    keys_first: bool = False


def run_forward(
    spec: TpuKernelSpec,
    q: Matrix,
    k: Matrix,
    v: Matrix,
    length: KeyLength | None,
    *,
    with_log_sum: bool,
) -> tuple[Array, ...]:
    """Run the forward kernel.

    **Arguments:** `length`: keys from this index on are padding; None for no padding.
    `with_log_sum`: whether to return the row that the gradients need.
    **Returns:** the mixed values and, `with_log_sum`, log2 of the sum of 2^logit of each query.
    """
    results = [_Result(_like(q), "queries")]
    if with_log_sum:
        heads = q.shape[1] // spec.head_dim
        row = jax.ShapeDtypeStruct((heads, 1, len(q)), jnp.float32)
        results.append(_Result(row, "row"))
    size, _ = spec.forward
    launch = _Launch(
        name="forward",
        body=forward_kernel,
        operands=[
            _Operand(q, "queries"),
            _Operand(k, "keys"),
            _Operand(v, "keys"),
        ],
        results=results,
        scratch=[(size, LANES), (size, LANES), (size, spec.head_dim)],
        matmuls=2,
    )
    return _run(spec, launch, length)


@dataclass(frozen=True, kw_only=True)
class BackwardInputs:
    """What both backward kernels read.

    `grad`: gradient of the mixed values. `log_sum`: as of `run_forward`. `delta`: sum of the mixed
    values times their gradient.
    """

    q: Matrix
    k: Matrix
    v: Matrix
    grad: Matrix
    log_sum: Row
    delta: Row

    def operands(self) -> list[_Operand]:
        """Return them in the order in which the kernels take them."""
        return [
            _Operand(self.q, "queries"),
            _Operand(self.k, "keys"),
            _Operand(self.v, "keys"),
            _Operand(self.grad, "queries"),
            _Operand(self.log_sum, "row"),
            _Operand(self.delta, "row"),
        ]


def run_dq(spec: TpuKernelSpec, inputs: BackwardInputs, length: KeyLength | None) -> Matrix:
    """Run the kernel for the gradient of q.

    **Arguments:** `length`: as of `run_forward`.
    **Returns:** the gradient, in the dtype of `q`.
    """
    size, _ = spec.dq
    launch = _Launch(
        name="dq",
        body=dq_kernel,
        operands=inputs.operands(),
        results=[_Result(_like(inputs.q), "queries")],
        scratch=[(size, LANES), (size, LANES), (size, spec.head_dim)],
        matmuls=3,
    )
    (dq,) = _run(spec, launch, length)
    return dq


def run_dkv(
    spec: TpuKernelSpec,
    inputs: BackwardInputs,
    length: KeyLength | None,
) -> tuple[Matrix, Matrix]:
    """Run the kernel for the gradients of k and v.

    **Arguments:** `length`: as of `run_forward`.
    **Returns:** both gradients, in the dtypes of `k` and `v`.
    """
    _, size = spec.dkv
    launch = _Launch(
        name="dkv",
        body=dkv_kernel,
        operands=inputs.operands(),
        results=[_Result(_like(inputs.k), "keys"), _Result(_like(inputs.v), "keys")],
        scratch=[(size, spec.head_dim), (size, spec.head_dim)],
        matmuls=4,
        keys_first=True,
    )
    dk, dv = _run(spec, launch, length)
    return dk, dv


def _run(spec: TpuKernelSpec, launch: _Launch, length: KeyLength | None) -> tuple[Array, ...]:
    """Run one kernel. It is written for one example: vmap adds a parallel axis to the grid."""
    block: Block = getattr(spec, launch.name)
    q, k = launch.operands[0].array, launch.operands[1].array
    arrays = []
    in_specs = []
    if length is not None:
        # In scalar memory, since it decides which blocks are computed.
        arrays.append(length)
        in_specs.append(pl.BlockSpec(memory_space=pltpu.SMEM))
    for operand in launch.operands:
        arrays.append(operand.array)
        in_specs.append(_block_spec(operand.side, block, spec.head_dim, launch.keys_first))
    out_specs = []
    for result in launch.results:
        out_specs.append(_block_spec(result.side, block, spec.head_dim, launch.keys_first))

    heads = q.shape[1] // spec.head_dim
    query_blocks = ceil_div(len(q), block[0])
    key_blocks = ceil_div(len(k), block[1])
    if launch.keys_first:
        grid = (heads, key_blocks, query_blocks)
    else:
        grid = (heads, query_blocks, key_blocks)
    # A quarter more than computed, for what the compiler may take besides.
    vmem = flash_vmem_bytes(launch.name, block, spec.head_dim, q.dtype)
    vmem_limit = min(TPU_CHIPS[spec.chip].vmem_bytes, vmem * 5 // 4)
    call = pl.pallas_call(
        _with_ends(spec, launch, block, has_length=length is not None),
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=[result.shape for result in launch.results],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in launch.scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=vmem_limit,
        ),
        cost_estimate=_cost(spec, launch),
        interpret=spec.interpret,
        name=f"flash_{launch.name}",
    )
    return tuple(call(*arrays))


def _block_spec(side: Side, block: Block, head_dim: int, keys_first: bool) -> pl.BlockSpec:
    """Return which block of an array each program of the grid gets.

    **Arguments:** `side`: what the array's blocks follow. `block`: (queries, keys). `keys_first`:
    as of `_Launch`.
    """

    def index_map(head: Index, *block_index: Index) -> tuple[Index, ...]:
        if keys_first:
            key_block, query_block = block_index
        else:
            query_block, key_block = block_index
        if side == "row":
            return head, 0, query_block
        if side == "queries":
            return query_block, head
        return key_block, head

    queries, keys = block
    # Heads are columns of a matrix, so that a block's second axis is one head.
    if side == "row":
        return pl.BlockSpec((None, 1, queries), index_map)
    if side == "queries":
        return pl.BlockSpec((queries, head_dim), index_map)
    return pl.BlockSpec((keys, head_dim), index_map)


def _with_ends(
    spec: TpuKernelSpec,
    launch: _Launch,
    block: Block,
    *,
    has_length: bool,
) -> Callable[..., None]:
    """Return the kernel as a function of its references alone, that of the key length first."""
    queries, keys = len(launch.operands[0].array), len(launch.operands[1].array)
    # Where the tokens fill all blocks there is nothing to mask.
    query_end = queries if queries % block[0] else None
    key_end = keys if keys % block[1] else None

    def body(*refs: Ref) -> None:
        if has_length:
            length_ref, *others = refs
            launch.body(spec, TokenEnds(query_end, length_ref[0, 0]), others)
        else:
            launch.body(spec, TokenEnds(query_end, key_end), refs)

    return body


def _cost(spec: TpuKernelSpec, launch: _Launch) -> pl.CostEstimate:
    """Return the work of a kernel, which XLA schedules by."""
    q, k = launch.operands[0].array, launch.operands[1].array
    heads = q.shape[1] // spec.head_dim
    logits = heads * len(q) * len(k)
    bytes_accessed = 0
    for operand in launch.operands:
        bytes_accessed += operand.array.nbytes
    for result in launch.results:
        bytes_accessed += math.prod(result.shape.shape) * result.shape.dtype.itemsize
    return pl.CostEstimate(
        flops=2 * launch.matmuls * logits * spec.head_dim,
        transcendentals=logits,
        bytes_accessed=bytes_accessed,
    )
