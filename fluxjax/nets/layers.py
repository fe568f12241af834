"""The layers that the networks share. A weight's storage is one abstract type, `Weight`."""

import math
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from fluxjax.kernels.blocks import default_device
from fluxjax.numeric import wide_dtype
from fluxjax.shapes import Array, Float, Ids, PRNGKeyArray

Carry = TypeVar("Carry")
Block = TypeVar("Block")
Result = TypeVar("Result")


class Weight(eqx.Module):
    """The matrix of a linear layer, [out, in], whatever its storage; stacked with its blocks' in front."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix, or of the stack."""

    @abstractmethod
    def matmul(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch out"]:
        """Return x W^T, accumulated in float32, or float64 for that, in the dtype that `written` says."""

    @property
    def spread(self) -> bool:
        """Whether its product needs what lies on other devices."""
        return False

    def fetch(self) -> "Weight":
        """Return the weight with all that its product needs at hand: itself, unless it is `spread`."""
        return self


_MANY_ROWS = 128


class Dense(Weight):
    """A weight stored as itself."""

    value: Float[Array, "*depth out features"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def matmul(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch out"]:
        contract_last = (((x.ndim - 1,), (1,)), ((), ()))
        return jax.lax.dot_general(x, self.value.astype(x.dtype), contract_last, preferred_element_type=written(x))


def written(x: Float[Array, "*batch features"]) -> jnp.dtype:
    """Return the dtype that a product of these rows writes: float32, or float64 for float64; on GPUs, of many rows of bfloat16,
    theirs.

    A GPU's matmul writes to memory what it returns, and does not take in the rounding of all its readers: in float32 that
    is 396 MB for 198 of a single block's first one in dev at 1024x1024. A convolution would take its operands so, too. A bias
    is added before the rounding where XLA puts both into one call, as cuBLAS's and cuDNN's.
    """
    many = x.dtype == jnp.bfloat16 and x.ndim > 1 and x.size // x.shape[-1] >= _MANY_ROWS
    return x.dtype if many and default_device().platform == "gpu" else wide_dtype(x.dtype)


def held(x: Array) -> Array:
    """Return x, on TPUs as an array of its own for all its readers: of an int8 product's XLA wrote float32 beside bfloat16, for
    those that go on in it."""
    return jax.lax.optimization_barrier(x) if default_device().platform == "tpu" else x


class Adapted(Weight):
    """A weight with a low-rank matrix added, up @ down, both kept apart from it. Source: Hu et al. 2021, LoRA, eq. 3."""

    base: Weight
    down: Float[Array, "*depth rank features"]
    up: Float[Array, "*depth out rank"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def matmul(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch out"]:
        return self.base.matmul(x) + Dense(self.up).matmul(Dense(self.down).matmul(x).astype(x.dtype))

    @property
    def spread(self) -> bool:
        return self.base.spread

    def fetch(self) -> Weight:
        return Adapted(self.base.fetch(), self.down, self.up)


class Linear(eqx.Module):
    """x W^T + b over the last axis, in the dtype of x."""

    weight: Weight
    bias: Float[Array, " out"] | None

    def __init__(self, features: int, out: int, *, bias: bool = True, scale: float = 1.0, key: PRNGKeyArray):
        """Draw the weight with standard deviation scale / sqrt(features), the bias as zeros."""
        self.weight = Dense(jax.random.normal(key, (out, features)) * (scale / math.sqrt(features)))
        self.bias = jnp.zeros(out) if bias else None

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch out"]:
        y = self.weight.matmul(x)
        if self.bias is not None:
            y = y + self.bias.astype(y.dtype)
        return y.astype(x.dtype)


def check_ids(call: str, ids: Array, vocabulary: int) -> None:
    """Check token ids; of traced ones, only that there are some.

    **Raises:** `ValueError` for no ids, or an id outside of the vocabulary.
    """
    if len(ids) == 0:
        raise ValueError(f"`{call}(ids)` needs at least one token. Make the ids with `tokenize`.")
    if isinstance(ids, jax.core.Tracer):
        return
    known = np.asarray(ids)
    wrong = known[(known < 0) | (known >= vocabulary)]
    if wrong.size:
        raise ValueError(
            f"`{call}(ids)` takes ids of its vocabulary, 0 to {vocabulary - 1}, got {wrong[0]}. Make them with the model's own "
            "tokenizers."
        )


class Embedding(eqx.Module):
    """A table of vectors, looked up by id; an id outside of the table gives NaN."""

    weight: Float[Array, "entries width"]

    def __init__(self, entries: int, width: int, *, key: PRNGKeyArray):
        self.weight = jax.random.normal(key, (entries, width))

    def __call__(self, ids: Array, dtype: DTypeLike | None = None) -> Float[Array, "*ids width"]:
        # By default negative ids count from the end.
        inside = jnp.where(ids < 0, len(self.weight), ids)
        return jnp.take(self.weight, inside, axis=0, mode="fill").astype(self.weight.dtype if dtype is None else dtype)


class RmsNorm(eqx.Module):
    """x / rms(x) * scale over the last axis, computed in float32 at least. Source: Zhang & Sennrich 2019, eq. 4."""

    scale: Float[Array, " features"]
    eps: float = eqx.field(static=True)

    def __init__(self, features: int, *, eps: float = 1e-6):
        self.scale, self.eps = jnp.ones(features), eps

    def __call__(self, x: Float[Array, "*batch features"], dtype: DTypeLike | None = None) -> Float[Array, "*batch features"]:
        """Normalize; the result is in `dtype`, by default that of `x`."""
        wide = x.astype(wide_dtype(x.dtype))
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * inverse * self.scale.astype(wide.dtype)).astype(x.dtype if dtype is None else dtype)


class LayerNorm(eqx.Module):
    """Standardize the last axis, then scale and shift it, computed in float32 at least. Source: Ba et al. 2016, eq. 4."""

    scale: Float[Array, " features"]
    bias: Float[Array, " features"]
    eps: float = eqx.field(static=True)

    def __init__(self, features: int, *, eps: float):
        self.scale, self.bias, self.eps = jnp.ones(features), jnp.zeros(features), eps

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        y = standardize(x, self.eps)
        y = y * self.scale.astype(y.dtype) + self.bias.astype(y.dtype)
        return y.astype(x.dtype)


def standardize(x: Float[Array, "*batch features"], eps: float = 1e-6) -> Float[Array, "*batch features"]:
    """Return the last axis with mean 0 and variance 1, in float32 at least: a LayerNorm without affine."""
    wide = x.astype(wide_dtype(x.dtype))
    centered = wide - jnp.mean(wide, axis=-1, keepdims=True)
    return centered * jax.lax.rsqrt(jnp.mean(jnp.square(centered), axis=-1, keepdims=True) + eps)


def modulate(
    x: Float[Array, "tokens features"], shift: Float[Array, " features"], scale: Float[Array, " features"]
) -> Float[Array, "tokens features"]:
    """Return standardize(x) * (1 + scale) + shift in the dtype of x. Source: Peebles & Xie 2022, adaLN."""
    y = standardize(x)
    y = y * (1 + scale.astype(y.dtype)) + shift.astype(y.dtype)
    return y.astype(x.dtype)


def gelu(x: Array) -> Array:
    """GELU in its tanh form. Source: Hendrycks & Gimpel 2016."""
    return jax.nn.gelu(x, approximate=True)


def sinusoid(t: Float[Array, "*batch"], width: int, *, base: float = 10_000.0) -> Float[Array, "*batch width"]:
    """Embed scalars as `width` / 2 cosines then sines of geometric frequencies, in float32 at least.

    **Source:** Vaswani et al. 2017, section 3.5, with the cosines first, as FLUX has it.
    """
    wide = t.astype(wide_dtype(t.dtype))
    frequencies = jnp.exp(-math.log(base) * jnp.arange(width // 2, dtype=wide.dtype) / (width // 2))
    angles = wide[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Rotation(NamedTuple):
    """The cosine and sine of each token's angles."""

    cos: Float[Array, "tokens pairs"]
    sin: Float[Array, "tokens pairs"]


def rope(ids: Ids, axes: tuple[int, ...], theta: float) -> Rotation:
    """Return the rotation of each feature pair: `axes[i]` features turn with id column i. In float32 at least.

    **Source:** Su et al. 2021, eq. 34, an axis each.
    """
    columns = ids.astype(wide_dtype(ids.dtype))
    frequencies = [theta ** (-jnp.arange(0, dim, 2, dtype=columns.dtype) / dim) for dim in axes]
    angles = jnp.concatenate([columns[:, i, None] * f for i, f in enumerate(frequencies)], axis=-1)
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Float[Array, "tokens heads head_dim"], rotation: Rotation) -> Float[Array, "tokens heads head_dim"]:
    """Rotate adjacent feature pairs (RoPE), computed in float32 at least."""
    wide = wide_dtype(x.dtype)
    even, odd = x[..., 0::2].astype(wide), x[..., 1::2].astype(wide)
    cos, sin = rotation.cos[:, None].astype(wide), rotation.sin[:, None].astype(wide)
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def stack(make: Callable[[PRNGKeyArray], Block], depth: int, *, key: PRNGKeyArray) -> Block:
    """Return `depth` blocks as one whose arrays have a leading depth axis."""
    return eqx.filter_vmap(make)(jax.random.split(key, depth))


class Apart(eqx.Module):
    """Blocks that are not stacked: each is compiled by itself, and no loop slices its weights."""

    blocks: tuple[Any, ...]


def parts_of(blocks: Any, part: Callable[[Any], Any]) -> Any:
    """Return a part of every block, stacked or apart as they are."""
    return Apart(tuple(map(part, blocks.blocks))) if isinstance(blocks, Apart) else part(blocks)


def scan_blocks(
    blocks: Block,
    carry: Carry,
    call: Callable[..., Carry],
    *,
    rows: tuple[Any, ...] = (),
    start: int = 0,
    remat: bool = False,
) -> Carry:
    """Thread `carry` through stacked blocks by call(block, carry, *row), tracing the block once.

    `rows`: pytrees of arrays with one row a block. `start`: the first block; where it is not 0, a gradient takes a sum over the
    whole stack a block. `remat`: a gradient keeps each block's input alone and runs the block again. Source: Chen et al. 2016.
    """
    return _scan(blocks, carry, lambda *inputs: (call(*inputs), None), rows, start, remat)[0]


def map_blocks(blocks: Block, call: Callable[[Block], Result], *, remat: bool = False) -> Result:
    """Return call(block) of each of stacked blocks, stacked. `remat`: as for `scan_blocks`."""
    return _scan(blocks, None, lambda block, _: (None, call(block)), (), 0, remat)[1]


def _scan(blocks: Any, carry: Carry, call: Callable[..., tuple], rows: tuple, start: int, remat: bool) -> tuple[Carry, Any]:
    """Scan call(block, carry, *row) -> (carry, result) over the blocks."""
    if isinstance(blocks, Apart):
        return _loop(blocks, carry, call, rows, start, remat)
    arrays, static = eqx.partition(blocks, eqx.is_array)
    if not remat and any(weight.spread for weight in _weights(blocks)):
        return _scan_ahead(blocks, carry, call, rows, start)

    numbers = jnp.arange(start, depth_of(blocks))

    def body(carry: Carry, turn: Any) -> tuple[Carry, Any]:
        number, row = turn
        # A slice of the stack would be a copy of it; rows by number are read where they lie.
        one, *rest = take((arrays, *rows), number) if start else row
        here = jax.tree.map(partial(_sliced, number), arrays, one)
        return call(eqx.combine(here, static), carry, *rest)

    # Inside a scan nothing can be merged with the second run, so the barriers against that would only cost.
    step = jax.checkpoint(body, prevent_cse=False) if remat else body
    return jax.lax.scan(step, carry, (numbers, None if start else (arrays, *rows)))


def _sliced(number: Array, stack: Array, row: Array) -> Array:
    """Return a row of a stack, as it is computed best.

    XLA:CPU slices 16-bit numbers as float32, and makes that of the whole stack before the loop: three times the memory. It
    can't, of a stack that seems to be another in each turn; gradients go by the row.
    """
    if stack.dtype.itemsize != 2 or default_device().platform != "cpu":
        return row
    stack, number = jax.lax.optimization_barrier((jax.lax.stop_gradient(stack), number))
    return _in_place_of(row, stack[number])


@jax.custom_jvp
def _in_place_of(row: Array, same: Array) -> Array:
    return same


@_in_place_of.defjvp
def _in_place_of_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return _in_place_of(*primals), tangents[0]


def _loop(blocks: Apart, carry: Carry, call: Callable[..., tuple], rows: tuple, start: int, remat: bool) -> tuple[Carry, Any]:
    """`_scan` of blocks that are apart."""
    results = []
    call = eqx.filter_checkpoint(call) if remat else call
    for number, block in list(enumerate(blocks.blocks))[start:]:
        carry, result = call(block, carry, *take(rows, number))
        results.append(result)
    return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *results) if results else None


def _scan_ahead(blocks: Any, carry: Carry, call: Callable[..., tuple], rows: tuple, start: int) -> tuple[Carry, Any]:
    """`_scan`, with each next block's weights fetched meanwhile, so that the transfer and the work overlap.

    The last turn fetches the first block again, for nothing: the loop's body is one for all.
    """
    depth = depth_of(blocks)

    def fetched(number: Any) -> Any:
        fetch = lambda node: node.fetch() if isinstance(node, Weight) else node  # noqa: E731
        block = jax.tree.map(fetch, take(blocks, number), is_leaf=lambda node: isinstance(node, Weight))
        return eqx.partition(block, eqx.is_array)

    ready, static = fetched(start)

    def body(state: tuple[Carry, Any], turn: tuple[Array, tuple]) -> tuple[tuple[Carry, Any], Any]:
        (carry, ready), (number, row) = state, turn
        soon, _ = fetched((number + 1) % depth)
        carry, result = call(eqx.combine(ready, static), carry, *row)
        return (carry, soon), result

    left = jax.tree.map(lambda leaf: leaf[start:], rows)
    (carry, _), results = jax.lax.scan(body, (carry, ready), (jnp.arange(start, depth), left))
    return carry, results


def _weights(blocks: Any) -> list[Weight]:
    leaves = jax.tree.leaves(blocks, is_leaf=lambda node: isinstance(node, Weight))
    return [leaf for leaf in leaves if isinstance(leaf, Weight)]


def depth_of(blocks: Any) -> int:
    """Return how many blocks are stacked."""
    return jax.tree.leaves(eqx.filter(blocks, eqx.is_array))[0].shape[0]


def take(stacked: Any, index: Any) -> Any:
    """Return the block of this number, of stacked ones or ones that are apart."""
    if isinstance(stacked, Apart):
        return stacked.blocks[index]
    return jax.tree.map(lambda x: x[index] if eqx.is_array(x) else x, stacked)
