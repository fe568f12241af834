"""Batches and states of training, placed on a mesh of devices."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import PyTree

from fluxjax.devices.run import ROWS
from fluxjax.generate.latents import image_tokens
from fluxjax.generate.text import TextStates
from fluxjax.nets.transformer import AbstractTransformer
from fluxjax.shapes import Array, Float, Int
from fluxjax.train.batch import TrainBatch
from fluxjax.train.step import TrainState


class StepRows(eqx.Module):
    """The rows of a step's batch on the devices of a mesh: every array has an axis of rows.

    - `place`: the row's number in the batch of the whole step. The rest as of `TrainBatch`.
    """

    latents: Float[Array, "... tokens channels"]
    text: TextStates
    weight: Float[Array, "..."]
    place: Int[Array, "..."]
    concat: Float[Array, "... tokens features"] | None = None
    reference_tokens: Float[Array, "... reference_tokens channels"] | None = None
    mask: Float[Array, "... tokens"] | None = None
    size: tuple[int, int] = eqx.field(static=True, kw_only=True)


class SharedInputs(eqx.Module):
    """What all rows of a batch share.

    - `empty`: the states of the empty caption, of one prompt.
    - `reference_ids`: the positions of the tokens of a reference.
    """

    empty: TextStates
    reference_ids: Float[Array, "reference_tokens axes"] | None = None


def place_batch(
    batch: TrainBatch, empty: TextStates, mesh: Mesh, *, accumulate: int = 1
) -> tuple[StepRows, SharedInputs]:
    """Return a batch on a mesh, its rows split over "data" and "fsdp".

    Rows of weight 0 are added until every device has the same number of rows in each micro-batch.

    **Arguments:** `batch`: the rows of this process, equally many in all of them. `empty`: the
    states of the empty caption, with a batch axis of 1. `accumulate`: micro-batches of a step.
    **Raises:** `ValueError` for a batch of no rows, or where data x fsdp is not a multiple of the
    number of processes.
    """
    count = len(batch.latents)
    if count == 0:
        raise ValueError("`place_batch(batch)` needs at least one row. Leave out empty batches.")
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    processes = jax.process_count()
    if parts % processes:
        raise ValueError(
            f"`place_batch` needs data x fsdp, here {parts}, to be a multiple of the {processes} "
            "processes, each of which reads its own rows. Choose other sizes of the mesh."
        )
    padding = -count % (accumulate * parts // processes)
    rows = _padded_rows(batch, padding)
    sharding = NamedSharding(mesh, ROWS)
    placed = jax.tree.map(lambda leaf: _from_process(sharding, leaf), rows)
    reference = batch.reference
    shared = SharedInputs(
        empty=jax.tree.map(lambda leaf: jnp.asarray(leaf)[0], empty),
        reference_ids=None if reference is None else jnp.asarray(reference.ids),
    )
    everywhere = NamedSharding(mesh, PartitionSpec())
    return placed, jax.device_put(shared, everywhere)


def _padded_rows(batch: TrainBatch, padding: int) -> StepRows:
    """Return the rows of a batch, and further ones of weight 0."""
    count = len(batch.latents)
    first = jax.process_index() * count
    reference = batch.reference
    rows = StepRows(
        latents=batch.latents,
        text=batch.text,
        weight=batch.weight,
        place=jnp.arange(first, first + count, dtype=jnp.int32),
        concat=batch.concat,
        reference_tokens=None if reference is None else reference.tokens,
        mask=batch.mask,
        size=batch.size,
    )
    rows = jax.tree.map(lambda leaf: _padded(np.asarray(leaf), padding), rows)
    is_filler = np.arange(count + padding) >= count
    weight = np.where(is_filler, 0, np.asarray(rows.weight)).astype(np.float32)
    return eqx.tree_at(lambda rows: rows.weight, rows, weight)


def _padded(rows: np.ndarray, padding: int) -> np.ndarray:
    """Return rows with copies of the last one behind them.

    Copies, because what is computed of them has to be finite: their weights of 0 would turn
    infinity and NaN into NaN.
    """
    if not padding:
        return rows
    copies = np.repeat(rows[-1:], padding, axis=0)
    return np.concatenate([rows, copies])


def _from_process(sharding: NamedSharding, rows: np.ndarray) -> Array:
    """Return an array on the mesh, of which this process has its own rows only."""
    if jax.process_count() == 1:
        return jax.device_put(rows, sharding)
    return jax.make_array_from_process_local_data(sharding, rows)


def create_state(
    weights: Mapping[str, Array],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    placed: Mapping[str, PartitionSpec],
    *,
    has_ema: bool,
) -> TrainState:
    """Return the state before the first step, on a mesh.

    The optimizer's state and the average are float32, whatever the dtype of the weights.

    **Arguments:** `weights`: in the order of files. `placed`: how each is split over the mesh.
    """
    shapes = state_shapes(weights, optimizer, mesh, placed, has_ema=has_ema)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    on_mesh = {}
    for name, leaf in weights.items():
        on_mesh[name] = jax.device_put(leaf, shardings.model[name])
    create = partial(_first_state, optimizer=optimizer, has_ema=has_ema)
    return jax.jit(create, out_shardings=shardings)(on_mesh)


def state_shapes(
    weights: Mapping[str, PyTree],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    placed: Mapping[str, PartitionSpec],
    *,
    has_ema: bool,
) -> TrainState:
    """Return shapes, dtypes and shardings of a state: what has a weight's shape is split as it is.

    **Arguments:** `weights`: arrays, or their shapes. The others as for `create_state`.
    """
    create = partial(_first_state, optimizer=optimizer, has_ema=has_ema)
    state = jax.eval_shape(create, dict(weights))

    def place(path: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = PartitionSpec()
        for entry in reversed(path):
            name = getattr(entry, "key", "")
            if name in placed and weights[name].shape == leaf.shape:
                spec = placed[name]
                break
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, state)


def batch_shapes(
    network: AbstractTransformer,
    size: tuple[int, int],
    txt_tokens: int,
    mesh: Mesh,
    *,
    rows: int,
    features: int,
    reference: bool = False,
) -> tuple[StepRows, SharedInputs]:
    """Return shapes and shardings of a batch, as `place_batch` returns one.

    **Arguments:** `network`: of whose config they are. `size`: of the images. `rows`: of the step,
    a multiple of what the mesh and the micro-batches divide. `features`: appended to each token.
    `reference`: whether each image has a reference of its size.
    """
    config = network.config
    tokens = image_tokens(*size)
    by_row = NamedSharding(mesh, ROWS)
    whole = NamedSharding(mesh, PartitionSpec())

    def shape(*sizes: int, dtype: DTypeLike = jnp.float32, sharding: NamedSharding = by_row):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    def text(*axes: int, sharding: NamedSharding) -> TextStates:
        """Return the shapes of texts: with a pooled vector, or with a length in its place."""
        txt = shape(*axes, txt_tokens, config.context, sharding=sharding)
        pooled = getattr(config, "pooled", None)
        if pooled is None:
            length = shape(*axes, dtype=jnp.int32, sharding=sharding)
            return TextStates(txt, None, length)
        return TextStates(txt, shape(*axes, pooled, sharding=sharding), None)

    rows_shapes = {
        "latents": shape(rows, tokens, config.out_channels),
        "text": text(rows, sharding=by_row),
        "weight": shape(rows),
        "place": shape(rows, dtype=jnp.int32),
        "concat": shape(rows, tokens, features) if features else None,
        "reference_tokens": None,
        "mask": None,
        "size": size,
    }
    shared_shapes = {
        "empty": text(sharding=whole),
        "reference_ids": None,
    }
    if reference:
        rows_shapes["reference_tokens"] = shape(rows, tokens, config.out_channels)
        shared_shapes["reference_ids"] = shape(tokens, len(config.rope_axes), sharding=whole)
    return _with_fields(StepRows, rows_shapes), _with_fields(SharedInputs, shared_shapes)


def _with_fields(kind: type, values: Mapping[str, Any]) -> Any:
    """Return a module whose fields hold shapes, which its own checks would refuse.

    **Arguments:** `kind`: the class. `values`: of all of its fields, by name.
    """
    made: Any = object.__new__(kind)
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made


def _first_state(
    weights: dict[str, Array], *, optimizer: optax.GradientTransformation, has_ema: bool
) -> TrainState:
    """Return the state before the first step.

    **Arguments:** `weights`: of any dtype, of which the state has copies: it is donated to every
    step, and the same array must not be donated twice.
    """
    wide = {name: leaf.astype(jnp.float32) for name, leaf in weights.items()}
    return TrainState(
        jax.tree.map(jnp.array, weights),
        jax.tree.map(jnp.array, wide) if has_ema else None,
        optimizer.init(wide),
        jnp.zeros((), jnp.int32),
    )
