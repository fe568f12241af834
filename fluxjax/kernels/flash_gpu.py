"""Flash attention for NVIDIA's Hopper, in Mosaic GPU: of a program's three warpgroups, one fetches and two multiply.

Each of the two owns a block, and takes the other side's blocks as they come, by TMA, into a ring of buffers. In the forward
pass they take turns at the tensor cores: one's softmax is computed under the other's matmuls. The backward pass computes the
logits again, from the forward's log-sum-exp: once for q's gradient, once for those of k and v.
**Source:** Dao et al. 2022 (2205.14135), algorithms 1 and 4; Shah et al. 2024 (2407.08608), algorithm 2.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fluxjax.kernels.blocks import BlockSizes, round_up
from fluxjax.shapes import Array, Float, Int

SMEM = 227 * 2**10
"""Bytes of shared memory that a program has."""
_ROWS = 64  # that a warpgroup multiplies at once
_WORKERS = 2
_SLOTS = 2
_TOKENS = 8  # that TMA cuts a matrix by
_DTYPES = (jnp.bfloat16, jnp.float16)
_DEFAULT = BlockSizes(q=128, q_dkv=64)
_HEAD, _BLOCK, _WORKER = "flash_head", "flash_block", "flash_worker"
_PER_ROW, _PER_COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


@dataclass(frozen=True, kw_only=True)
class _Call:
    """What is static in a call: a `scale` to base 2; blocks of (queries, keys) a kernel; `keys`, beyond which is padding."""

    scale: float
    keys: int
    forward: tuple[int, int]
    dq: tuple[int, int]
    dkv: tuple[int, int]
    interpret: Any

    def sides(self, kernel: str) -> tuple[int, int]:
        """Return the tokens of a block that two workers share, and of one that is streamed."""
        return self.dkv[::-1] if kernel == "dkv" else getattr(self, kernel)


def flash(
    q: Float[Array, "queries heads head_dim"],
    k: Float[Array, "keys heads head_dim"],
    v: Float[Array, "keys heads head_dim"],
    *,
    scale: float,
    key_length: Int[Array, ""] | None = None,
    block_sizes: BlockSizes | None = None,
    interpret: Any = None,
) -> Float[Array, "queries heads head_dim"]:
    """Return softmax(scale * q k^T) v, of any number of tokens; a head_dim that is neither 64 nor 128 is padded to one.

    **Arguments:** `q`, `k`, `v`: bfloat16 or float16. `key_length`: keys that are seen. `block_sizes`: multiples of 64, and of
    128 where two warpgroups share a block: `q`, `q_dq`, `kv_dkv`. `interpret`: parameters of JAX's interpreter of such kernels,
    which runs them on any platform, slowly, and float32 too. What is read out of bounds must be zeros there, as it is of TMA.
    **Raises:** `ValueError` for another dtype, a head_dim above 128, blocks that are no such multiples, or too large ones.
    """
    if q.dtype not in _DTYPES and not interpret:
        raise ValueError(f"`flash_gpu` needs bfloat16 or float16, got {q.dtype}. Pass implementation=None.")
    (queries, _, dim), keys = q.shape, len(k)
    sizes = blocks(queries, keys, dim, block_sizes)
    if scale < 0:  # so that a row's largest logit is that of its largest product
        q, scale = -q, -scale
    # Exponentials are to base 2, so that the scale's multiplication is the only one.
    call = _Call(scale=scale * math.log2(math.e), keys=keys, **sizes, interpret=interpret)
    length = None if key_length is None else jnp.minimum(key_length.astype(jnp.int32), keys).reshape(1)
    return _flash(call, *(_pad(x) for x in (q, k, v)), length)[:queries, :, :dim]


def _pad(x: Array) -> Array:
    """Pad tokens to what TMA counts by, and head_dim to what it swizzles."""
    tokens, _, dim = x.shape
    missing = round_up(tokens, _TOKENS) - tokens, round_up(dim, _ROWS) - dim
    return jnp.pad(x, ((0, missing[0]), (0, 0), (0, missing[1]))) if any(missing) else x


def blocks(queries: int, keys: int, head_dim: int, block_sizes: BlockSizes | None = None) -> dict[str, tuple[int, int]]:
    """Return the (queries, keys) of a block of each kernel, forward, dq and dkv: as given, but no larger than the tokens.

    **Raises:** `ValueError` for a head_dim above 128, sizes that are no multiples of 64, or 128 where two warpgroups share
    them, or that take more than the shared memory.
    """
    if head_dim > 128:
        raise ValueError(f"`flash_gpu` needs a head_dim of at most 128, got {head_dim}. Pass implementation=None.")
    sizes, found = block_sizes or _DEFAULT, {}
    for kernel in ("forward", "dq", "dkv"):
        given, shared = getattr(sizes, kernel), _ROWS * _WORKERS
        units = (_ROWS, shared) if kernel == "dkv" else (shared, _ROWS)
        if any(size % unit for size, unit in zip(given, units, strict=True)):
            raise ValueError(
                "`flash_gpu` needs blocks of queries and keys in multiples of "
                f"{units[0]} and {units[1]} for {kernel}, got {given}."
            )
        q, kv = (min(size, round_up(n, unit)) for size, n, unit in zip(given, (queries, keys), units, strict=True))
        needed = smem_bytes(kernel, (q, kv), head_dim)
        if needed > SMEM:
            raise ValueError(
                f"`flash_gpu` with blocks of {q} queries and {kv} keys takes {needed:,} bytes of shared memory ({kernel}), "
                f"of {SMEM:,} that Hopper has. Choose smaller block sizes."
            )
        found[kernel] = q, kv
    return found


def smem_bytes(kernel: str, block: tuple[int, int], head_dim: int) -> int:
    """Return the bytes of shared memory that a kernel (forward, dq or dkv) takes at a block of (queries, keys).

    What the two warpgroups own, a ring of what is streamed, float32 a row of log-sum-exp (and of the backward pass's other
    sums), and 3 KiB for barriers, reductions and alignment.
    """
    own, streamed = reversed(block) if kernel == "dkv" else block
    matrices = 2 * round_up(head_dim, _ROWS) * (own * (1 if kernel == "forward" else 2) + 2 * _SLOTS * streamed)
    rows = 4 * {"forward": own, "dq": 2 * own, "dkv": 2 * _SLOTS * streamed}[kernel]
    return matrices + rows + 3 * 2**10


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(call: _Call, q: Array, k: Array, v: Array, length: Array | None) -> Array:
    return _forward(call, q, k, v, length, residual=False)[0]


def _flash_fwd(call: _Call, q: Array, k: Array, v: Array, length: Array | None) -> tuple[Array, tuple]:
    mixed, residual = _forward(call, q, k, v, length, residual=True)
    return mixed, (q, k, v, length, mixed, residual)


def _flash_bwd(call: _Call, kept: tuple, grad: Array) -> tuple:
    q, k, v, length, mixed, residual = kept
    delta = (mixed.astype(jnp.float32) * grad.astype(jnp.float32)).sum(-1).T
    dq = _run(call, "dq", _dq, [q, grad, residual, delta], [[k], [v]], length, [q])
    return *dq, *_run(call, "dkv", _dkv, [k, v], [[q, residual], [grad, delta]], length, [k, v]), None


_flash.defvjp(_flash_fwd, _flash_bwd)


def _forward(call: _Call, q: Array, k: Array, v: Array, length: Array | None, *, residual: bool) -> tuple[Array, ...]:
    """Return the mixed values and, if asked for, log2 of the sum of 2^logit of each query: [heads, queries]."""
    rows = jax.ShapeDtypeStruct((q.shape[1], len(q)), jnp.float32)
    return _run(call, "forward", _mix, [q], [[k], [v]], length, [q, rows] if residual else [q])


def _run(
    call: _Call,
    name: str,
    work: Callable,
    own: list[Array],
    streams: list[list[Array]],
    length: Array | None,
    results: list[Any],
) -> tuple[Array, ...]:
    """Run the named kernel, a program for each head and block of what is owned; vmap makes a further axis of programs.

    Arrays are matrices, [tokens, heads, head_dim], or rows, [heads, tokens]. Of each of `own` a worker has a block to itself;
    streams come by groups, whose arrays arrive together. Results have the shapes of `results`.
    """
    (tokens, heads, _), (mine, _) = own[0].shape, call.sides(name)
    operands, tree = jax.tree.flatten((own, streams, length))
    # Of the last block TMA would store the tokens that there are, the interpreter none.
    whole = round_up(tokens, mine)
    shapes = [(whole, *x.shape[1:]) if x.ndim == 3 else (heads, whole) for x in results]

    def program(*refs: Any) -> None:
        own, streams, length = jax.tree.unflatten(tree, refs[: len(operands)])
        written, scratch = refs[len(operands) : -4], refs[-4:]
        _program(call, name, work, own, streams, length, written, *scratch)

    found = plgpu.kernel(
        program,
        out_type=[jax.ShapeDtypeStruct(shape, x.dtype) for shape, x in zip(shapes, results, strict=True)],
        scratch_types=_scratch(call, name, own, streams, results),
        grid=(heads, whole // mine),
        grid_names=(_HEAD, _BLOCK),
        num_threads=_WORKERS + 1,
        thread_name=_WORKER,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=call.interpret,
        kernel_name=f"flash_{name}",
    )(*operands)
    return tuple(x[:tokens] if x.ndim == 3 else x[:, :tokens] for x in found)


def _scratch(call: _Call, name: str, own: list[Array], streams: list[list[Array]], results: list[Any]) -> list:
    """Return what a program has in shared memory, as `_program` takes it."""
    mine, theirs = call.sides(name)

    def buffer(copies: int, tokens: int, x: Any) -> Any:
        if x.ndim == 2:
            return plgpu.SMEM((copies, tokens), x.dtype)
        # As wgmma reads matrices: in rows of 128 bytes, eight by eight.
        transforms = plgpu.TilingTransform((8, 128 // x.dtype.itemsize)), plgpu.SwizzleTransform(128)
        return plgpu.SMEM((copies, tokens, x.shape[-1]), x.dtype, transforms=transforms)

    def ring(group: list[Array]) -> tuple:
        arrived = plgpu.Barrier(num_arrivals=len(group), num_barriers=_SLOTS)
        freed = plgpu.Barrier(num_arrivals=_WORKERS, num_barriers=_SLOTS)
        return [buffer(_SLOTS, theirs, x) for x in group], arrived, freed

    return [
        # Results leave by the buffers of what was owned, and those that are more by their own.
        [buffer(_WORKERS, mine // _WORKERS, x) for x in (*own, *results[len(own) :])],
        [ring(group) for group in streams],
        plgpu.Barrier(num_arrivals=len(own), num_barriers=_WORKERS),
        plgpu.Barrier(num_arrivals=_WORKERS),
    ]


def _program(call, name, work, own, streams, length, results, buffers, rings, loaded, turns) -> None:
    head, index, worker = (lax.axis_index(axis) for axis in (_HEAD, _BLOCK, _WORKER))
    mine, theirs = call.sides(name)
    seen = call.keys if length is None else length[0]
    steps: Any = pl.cdiv(streams[0][0].shape[0] if name == "dkv" else seen, theirs if length is None else jnp.int32(theirs))
    if name == "dkv" and length is not None:  # nothing comes for keys that are padding
        steps = jnp.where(index * mine < seen, steps, 0)
    rings = [_Ring(*ring) for ring in rings]

    def part(ref: Any, start: Any, tokens: int) -> Any:
        return ref.at[pl.ds(start, tokens), head] if len(ref.shape) == 3 else ref.at[head, pl.ds(start, tokens)]

    @pl.when(worker < _WORKERS)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
        rows = mine // _WORKERS
        first = index * mine + worker * rows
        blocks = [x.at[worker] for x in buffers]
        for ref, x in zip(own, blocks, strict=False):
            plgpu.copy_gmem_to_smem(part(ref, first, rows), x, loaded.at[worker])
        plgpu.barrier_wait(loaded.at[worker])
        found = work(_Worker(call, worker, blocks, rings, turns, first, seen, steps))
        for x, result in zip(blocks, found, strict=False):
            x[...] = result.astype(x.dtype)
        plgpu.commit_smem()
        for x, ref in zip(blocks, results, strict=False):
            plgpu.copy_smem_to_gmem(x, part(ref, first, rows))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(worker == _WORKERS)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")

        # A slot is filled as soon as it is free, and none is left before all are.
        @pl.loop(0, steps + _SLOTS)
        def _(step: Any) -> None:
            for ring, group in zip(rings, streams, strict=True):
                pl.when(step >= _SLOTS)(partial(ring.await_free, step))
                pl.when(step < steps)(lambda: ring.fill(step, [part(ref, step * theirs, theirs) for ref in group]))  # noqa: B023


@dataclass(frozen=True)
class _Ring:
    """Buffers of what arrives together, each with slots for the next steps, and barriers: a slot has arrived, or is free."""

    buffers: list
    arrived: Any
    freed: Any

    def fill(self, step: Any, parts: list) -> None:
        for part, x in zip(parts, self.buffers, strict=True):
            plgpu.copy_gmem_to_smem(part, x.at[_slot(step)], self.arrived.at[_slot(step)])

    def wait(self, step: Any) -> list:
        plgpu.barrier_wait(self.arrived.at[_slot(step)])
        return [x.at[_slot(step)] for x in self.buffers]

    def free(self, step: Any) -> None:
        plgpu.barrier_arrive(self.freed.at[_slot(step)])

    def await_free(self, step: Any) -> None:
        plgpu.barrier_wait(self.freed.at[_slot(step)])


@dataclass(frozen=True)
class _Worker:
    """A warpgroup that multiplies: its buffers, the rings, and what it takes of them.

    `first` is the token that its rows begin with; `seen` the keys that are no padding; `steps` the blocks that come.
    """

    call: _Call
    index: Any
    own: list
    rings: list[_Ring]
    turns: Any
    first: Any
    seen: Any
    steps: Any

    def laid(self, x: Array, layout: Any) -> Array:
        """Lay an array out in registers, which the interpreter has none of."""
        return x if self.call.interpret else plgpu.layout_cast(x, layout)

    def zeros(self, shape: tuple[int, ...]) -> Array:
        return self.laid(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)

    def row(self, ref: Any, layout: Any) -> Array:
        return ref[...] if self.call.interpret else plgpu.load(ref, (), layout=layout)

    def numbered(self, shape: tuple[int, ...], axis: int) -> Array:
        return self.laid(lax.broadcasted_iota(jnp.int32, shape, axis), plgpu.Layout.WGMMA)

    def product(self, a: Any, b: Any, *, meanwhile: Callable[[], None] = lambda: None) -> Array:
        """Return a b^T of two matrices in shared memory."""
        if self.call.interpret:  # it multiplies neither transposed matrices nor registers
            meanwhile()
            return jnp.dot(a[...], b[...].T, preferred_element_type=jnp.float32)

        def multiply(total: Any) -> Array:
            plgpu.wgmma(total, a, b.transpose((1, 0)))
            meanwhile()
            return total[...]

        return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))

    def added(self, total: Array, a: Array, b: Any) -> Array:
        """Return total + a b of a matrix in registers and one in shared memory, whose dtype the first is rounded to."""
        a = a.astype(b.dtype)
        if self.call.interpret:
            return total + jnp.dot(a, b[...], preferred_element_type=jnp.float32)
        return pl.run_state(lambda total: plgpu.wgmma(total, a, b))(plgpu.ACC.init(total))

    def turn(self) -> None:
        """Let the other worker multiply, and wait until it is done."""
        plgpu.barrier_arrive(self.turns)
        plgpu.barrier_wait(self.turns)

    def over_keys(self, size: int, take: Callable, start: Any) -> Any:
        """Take every block of `size` keys, (masked, step, carry) -> carry; masked is the one that keys end in."""
        if isinstance(self.seen, int):
            full = self.seen // size
            carry = lax.fori_loop(0, full, partial(take, False), start)
            return carry if full == self.steps else lax.fori_loop(full, self.steps, partial(take, True), carry)
        whole = lax.div(self.seen, jnp.int32(size))
        return lax.fori_loop(whole, self.steps, partial(take, True), lax.fori_loop(0, whole, partial(take, False), start))


def _slot(step: Any) -> Any:
    return lax.rem(step, jnp.asarray(_SLOTS, step.dtype))


def _wide(row: Array, shape: tuple[int, ...], axis: int = 0) -> Array:
    """Repeat a value for each of a matrix's rows, or of its columns for `axis=1`."""
    return lax.broadcast_in_dim(row, shape, (axis,))


def _mix(at: _Worker) -> tuple[Array, ...]:
    call, (keys, values), q = at.call, at.rings, at.own[0]
    rows, size = q.shape[0], call.forward[1]

    def take(masked: bool, step: Any, carry: tuple) -> tuple:
        mixed, largest, total = carry
        logits = at.product(q, *keys.wait(step), meanwhile=at.turn)
        keys.free(step)
        scale = call.scale
        if masked:
            logits = jnp.where(step * size + at.numbered(logits.shape, 1) < at.seen, scale * logits, -jnp.inf)
            scale = 1.0
        now = jnp.maximum(largest, scale * logits.max(1))
        weights, kept = jnp.exp2(scale * logits - _wide(now, logits.shape)), jnp.exp2(largest - now)
        mixed, total = mixed * _wide(kept, mixed.shape), total * kept + weights.sum(1)
        # The tensor cores are not to wait for what can be done before.
        now, total, mixed, weights = lax.optimization_barrier((now, total, mixed, weights.astype(q.dtype)))
        at.turn()
        mixed = at.added(mixed, weights, *values.wait(step))
        values.free(step)
        return mixed, now, total

    # The second worker begins half a step after the first, and ends half a step after it.
    pl.when(at.index == 1)(at.turn)
    column = at.laid(jnp.zeros((rows,), jnp.float32), _PER_ROW)
    mixed, largest, total = at.over_keys(size, take, (at.zeros(q.shape), column - jnp.inf, column))
    pl.when(at.index == 0)(at.turn)
    # No key seen: no values, rather than 0 / 0.
    mixed = mixed * _wide(1 / jnp.where(total == 0, 1.0, total), mixed.shape)
    return mixed, largest + jnp.log(total) * math.log2(math.e)


def _dq(at: _Worker) -> tuple[Array, ...]:
    call, (keys, values), (q, grad, *sums) = at.call, at.rings, at.own
    size = call.dq[1]
    residual, delta = (at.row(x, _PER_ROW) for x in sums)

    def take(masked: bool, step: Any, total: Array) -> Array:
        (k,) = keys.wait(step)
        logits = at.product(q, k)
        weights = jnp.exp2(call.scale * logits - _wide(residual, logits.shape))
        towards = at.product(grad, *values.wait(step))
        values.free(step)
        slopes = weights * (towards - _wide(delta, towards.shape))
        if masked:
            slopes = jnp.where(step * size + at.numbered(slopes.shape, 1) < at.seen, slopes, 0.0)
        total = at.added(total, slopes, k)
        keys.free(step)
        return total

    return (at.over_keys(size, take, at.zeros(q.shape)) * (call.scale / math.log2(math.e)),)


def _dkv(at: _Worker) -> tuple[Array, ...]:
    """All is transposed here, [keys, queries]. Queries beyond the last are zeros and have gradients of zero: they add none."""
    (k, v), (queries, grads) = at.own, at.rings

    def take(step: Any, carry: tuple) -> tuple:
        dk, dv = carry
        q, residual = queries.wait(step)
        logits = at.product(k, q)
        weights = jnp.exp2(at.call.scale * logits - _wide(at.row(residual, _PER_COLUMN), logits.shape, 1))
        grad, delta = grads.wait(step)
        dv = at.added(dv, weights, grad)
        towards = at.product(v, grad)
        slopes = weights * (towards - _wide(at.row(delta, _PER_COLUMN), towards.shape, 1))
        grads.free(step)
        dk = at.added(dk, slopes, q)
        queries.free(step)
        return dk, dv

    dk, dv = lax.fori_loop(0, at.steps, take, (at.zeros(k.shape), at.zeros(k.shape)))
    real = at.first + at.numbered(k.shape, 0) < at.seen
    return jnp.where(real, dk * (at.call.scale / math.log2(math.e)), 0.0), jnp.where(real, dv, 0.0)
