"""How the kernels of flash_tpu are launched: grids, blocks in VMEM and scratch memory.

Matrices are [tokens, heads * head_dim] here: a head is a column of 128 lanes, so that a block of
one head is cut out of them and nothing is transposed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

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


@dataclass(frozen=True, kw_only=True)
class _Launch:
    """One kernel with its arrays.

    **Arguments:**

    - `name`: "forward", "dq" or "dkv".
    - `operands`, `results`: arrays, or their shapes, each with what its blocks follow. The first
      operand is q and the second k.
    - `scratch`: shapes of float32 scratch memory.
    - `matmuls`: of a block of logits' size, for the cost estimate.
    - `keys_first`: whether the grid goes over (heads, keys, queries) rather than (heads, queries,
      keys); the last of these is the one that is summed over.
    """

    name: str
    body: KernelBody
    operands: list[tuple[Array, Side]]
    results: list[tuple[jax.ShapeDtypeStruct, Side]]
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
    """Return the mixed values and, `with_log_sum`, the row that the gradients need.

    That row is log2 of the sum of 2^logit of each query.
    """
    row = jax.ShapeDtypeStruct((q.shape[1] // spec.head_dim, 1, len(q)), jnp.float32)
    results: list[tuple[jax.ShapeDtypeStruct, Side]] = [
        (jax.ShapeDtypeStruct(q.shape, q.dtype), "queries")
    ]
    if with_log_sum:
        results.append((row, "row"))
    size = spec.forward[0]
    launch = _Launch(
        name="forward",
        body=forward_kernel,
        operands=[(q, "queries"), (k, "keys"), (v, "keys")],
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

    def operands(self) -> list[tuple[Array, Side]]:
        return [
            (self.q, "queries"),
            (self.k, "keys"),
            (self.v, "keys"),
            (self.grad, "queries"),
            (self.log_sum, "row"),
            (self.delta, "row"),
        ]


def run_dq(spec: TpuKernelSpec, inputs: BackwardInputs, length: KeyLength | None) -> Matrix:
    """Return the gradient of q."""
    size = spec.dq[0]
    launch = _Launch(
        name="dq",
        body=dq_kernel,
        operands=inputs.operands(),
        results=[(jax.ShapeDtypeStruct(inputs.q.shape, inputs.q.dtype), "queries")],
        scratch=[(size, LANES), (size, LANES), (size, spec.head_dim)],
        matmuls=3,
    )
    (dq,) = _run(spec, launch, length)
    return dq


def run_dkv(
    spec: TpuKernelSpec, inputs: BackwardInputs, length: KeyLength | None
) -> tuple[Matrix, Matrix]:
    """Return the gradients of k and v."""
    launch = _Launch(
        name="dkv",
        body=dkv_kernel,
        operands=inputs.operands(),
        results=[
            (jax.ShapeDtypeStruct(inputs.k.shape, inputs.k.dtype), "keys"),
            (jax.ShapeDtypeStruct(inputs.v.shape, inputs.v.dtype), "keys"),
        ],
        scratch=[(spec.dkv[1], spec.head_dim)] * 2,
        matmuls=4,
        keys_first=True,
    )
    dk, dv = _run(spec, launch, length)
    return dk, dv


def _run(spec: TpuKernelSpec, launch: _Launch, length: KeyLength | None) -> tuple[Array, ...]:
    """Run one kernel. It is written for one example: vmap adds a parallel axis to the grid."""
    block: Block = getattr(spec, launch.name)
    q, k = launch.operands[0][0], launch.operands[1][0]
    lengths = [] if length is None else [length]
    in_specs = [pl.BlockSpec(memory_space=pltpu.SMEM) for _ in lengths]
    for _, side in launch.operands:
        in_specs.append(_block_spec(side, block, spec.head_dim, launch.keys_first))
    out_specs = []
    for _, side in launch.results:
        out_specs.append(_block_spec(side, block, spec.head_dim, launch.keys_first))

    blocks = (ceil_div(len(q), block[0]), ceil_div(len(k), block[1]))
    if launch.keys_first:
        blocks = blocks[::-1]
    vmem = flash_vmem_bytes(launch.name, block, spec.head_dim, q.dtype)
    call = pl.pallas_call(
        _with_ends(spec, launch, block, has_length=length is not None),
        grid=(q.shape[1] // spec.head_dim, *blocks),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=[shape for shape, _ in launch.results],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in launch.scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=min(TPU_CHIPS[spec.chip].vmem_bytes, vmem * 5 // 4),
        ),
        cost_estimate=_cost(spec, launch),
        interpret=spec.interpret,
        name=f"flash_{launch.name}",
    )
    return tuple(call(*lengths, *(x for x, _ in launch.operands)))


def _block_spec(side: Side, block: Block, head_dim: int, keys_first: bool) -> pl.BlockSpec:
    """Return which block of an array each program of the grid gets."""

    def index_map(head: Index, *block_index: Index) -> tuple[Index, ...]:
        i, j = block_index[::-1] if keys_first else block_index
        if side == "row":
            return head, 0, i
        return i if side == "queries" else j, head

    if side == "row":
        return pl.BlockSpec((None, 1, block[0]), index_map)
    return pl.BlockSpec((block[0] if side == "queries" else block[1], head_dim), index_map)


def _with_ends(
    spec: TpuKernelSpec, launch: _Launch, block: Block, *, has_length: bool
) -> Callable[..., None]:
    """Return the kernel as a function of its references alone, that of the key length first."""
    queries, keys = len(launch.operands[0][0]), len(launch.operands[1][0])
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
    q, k = launch.operands[0][0], launch.operands[1][0]
    heads = q.shape[1] // spec.head_dim
    logits = heads * len(q) * len(k)
    bytes_accessed = 0
    for x, _ in (*launch.operands, *launch.results):
        bytes_accessed += math.prod(x.shape) * x.dtype.itemsize
    return pl.CostEstimate(
        flops=2 * launch.matmuls * logits * spec.head_dim,
        transcendentals=logits,
        bytes_accessed=bytes_accessed,
    )
