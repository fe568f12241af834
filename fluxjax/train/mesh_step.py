"""One optimizer step on a mesh: micro-batches, gradients reduced once, the update and the average.

Inside of `jax.shard_map` each device differentiates the loss of its own rows with respect to its
own parts of the weights. What several devices hold copies of, or have parts of the sum of, is added
up once for a whole step, after the last micro-batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import PyTree

from fluxjax.devices.local import local
from fluxjax.devices.mesh import AXES
from fluxjax.devices.run import ROWS
from fluxjax.devices.specs import specs
from fluxjax.devices.tokens import TokenParallelFlux
from fluxjax.generate.conditioning import ReferenceTokens
from fluxjax.lora.stochastic_rounding import round_stochastically
from fluxjax.nets.stack import leaf_names
from fluxjax.nets.transformer import AbstractTransformer
from fluxjax.shapes import Array, Float, PRNGKeyArray, Scalar
from fluxjax.train.named_leaves import WeightArrays, replace_leaves, select_leaves
from fluxjax.train.objective import (
    Evaluation,
    LossSettings,
    TrainExample,
    draw,
    example_loss,
)
from fluxjax.train.parts import TrainedPart
from fluxjax.train.place import SharedInputs, StepRows
from fluxjax.train.step import TrainState, average, decay_at

Specs = Mapping[str, PartitionSpec]
"""How arrays are split over a mesh, by name."""


class StepMetrics(NamedTuple):
    """What is known of a step: its loss, and the norm of the gradient before it is clipped."""

    loss: Scalar
    gradient_norm: Scalar


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """How a step is taken.

    - `accumulate`: the micro-batches that a step's rows are divided into, one after another.
    - `ema_decay`: of the average of the weights; None for no average.
    - `stochastic_rounding`: whether weights below float32 are rounded up or down at random
      after an update, so that small updates add up; otherwise they are rounded to nearest,
      which loses them.

    **Raises:** `ValueError` for fewer than 1 micro-batch, or a decay that is not in [0, 1).
    """

    accumulate: int = 1
    ema_decay: float | None = None
    stochastic_rounding: bool = False

    def __post_init__(self):
        if self.accumulate < 1:
            raise ValueError(
                f"`StepSettings(accumulate)` needs at least 1, got {self.accumulate}. "
                "Pass 1 for the whole batch at once."
            )
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(
                f"`StepSettings(ema_decay)` is in [0, 1), got {self.ema_decay}. "
                "Pass one as 0.999, or None for no average."
            )


class TrainStep(eqx.Module):
    """A training step on a mesh: (state, frozen, rows, shared, key) -> (state, metrics).

    Call it inside of `jax.jit`. `part`: what is trained. `optimizer`: of optax; it gets weights and
    gradients in float32. `mesh`: of all devices, also of one.
    """

    part: TrainedPart
    optimizer: optax.GradientTransformation = eqx.field(static=True)
    loss: LossSettings = eqx.field(static=True)
    evaluation: Evaluation = eqx.field(static=True)
    settings: StepSettings = eqx.field(static=True)
    mesh: Mesh = eqx.field(static=True)

    def __call__(
        self,
        state: TrainState,
        frozen: PyTree,
        rows: StepRows,
        shared: SharedInputs,
        key: PRNGKeyArray,
    ) -> tuple[TrainState, StepMetrics]:
        """Return the state after a step, and its metrics.

        **Arguments:** `frozen`: from `TrainedPart`, placed by `shard`. `rows`, `shared`: from
        `place_batch`. `key`: of the whole training; the number of the step is folded into it.
        """
        draw_key, round_key = jax.random.split(jax.random.fold_in(key, state.step))
        value, gradients = self.gradients(state.model, frozen, rows, shared, draw_key)
        norm = optax.tree.norm(gradients)
        wide = _to_float32(state.model)
        with jax.numpy_dtype_promotion("standard"):  # optax adds whole numbers to floats
            updates, optimizer_state = self.optimizer.update(gradients, state.optimizer, wide)
            updated = optax.apply_updates(wide, updates)
        model = self._rounded(updated, state.model, round_key)
        ema = None
        if state.ema is not None and self.settings.ema_decay is not None:
            decay = decay_at(state.step, self.settings.ema_decay)
            ema = average(state.ema, updated, decay)
        after = TrainState(model, ema, optimizer_state, state.step + 1)
        return after, StepMetrics(value, norm)

    def gradients(
        self,
        weights: WeightArrays,
        frozen: PyTree,
        rows: StepRows,
        shared: SharedInputs,
        key: PRNGKeyArray,
    ) -> tuple[Scalar, WeightArrays]:
        """Return the loss of a batch and its gradients in float32.

        The loss is the mean of the examples' losses by their weights, over the whole batch.
        """
        tensor = self.mesh.shape["tensor"]
        network = self.part.join(weights, frozen, tensor)
        names = self.part.names(network)
        total = jnp.sum(rows.weight)
        scale = 1 / jnp.where(total > 0, total, 1)
        value, of_network = self._sharded_gradients(network, names, rows, (shared, key, scale))
        return value, self.part.gradients(of_network, weights, frozen, tensor)

    def _sharded_gradients(
        self,
        network: AbstractTransformer,
        names: list[str],
        rows: StepRows,
        rest: tuple[SharedInputs, PRNGKeyArray, Scalar],
    ) -> tuple[Scalar, WeightArrays]:
        """Return the loss and the gradients of leaves of a network, computed by `shard_map`.

        **Arguments:** `network`: joined, on the mesh. `names`: of the leaves. `rest`: what is the
        same on all devices: what the rows share, the key of the draws, and 1 over the sum of the
        weights of all rows.
        **Returns:** the loss of the whole batch; gradients in float32, split as the leaves are.
        """
        network_specs = specs(network, self.mesh)
        named = named_specs(network_specs)
        arrays, static = eqx.partition((network, rows, rest), eqx.is_array)
        row_specs = jax.tree.map(lambda _: ROWS, arrays[1])
        rest_specs = jax.tree.map(lambda _: PartitionSpec(), arrays[2])
        gradient_specs = {name: named[name] for name in names}

        def body(arrays: PyTree) -> tuple[Scalar, WeightArrays]:
            network, rows, rest = eqx.combine(arrays, static)
            value, gradients = self._local_gradients(network, network_specs, names, rows, rest)
            return jax.lax.psum(value, AXES), reduce_gradients(gradients, gradient_specs)

        # `check_vma` would refuse constants as carries of loops; without it a sum over devices is
        # its own transpose, which is what each device's own part of the loss needs.
        run = jax.shard_map(
            body,
            mesh=self.mesh,
            in_specs=((network_specs, row_specs, rest_specs),),
            out_specs=(PartitionSpec(), gradient_specs),
            check_vma=False,
        )
        return run(arrays)

    def _local_gradients(
        self,
        network: AbstractTransformer,
        network_specs: PyTree,
        names: list[str],
        rows: StepRows,
        rest: tuple[SharedInputs, PRNGKeyArray, Scalar],
    ) -> tuple[Scalar, WeightArrays]:
        """Return this device's part of the loss, and its gradients, summed over micro-batches.

        **Arguments:** `network`: this device's parts of the arrays. `network_specs`: how the whole
        arrays are split. `names`, `rest`: as for `_sharded_gradients`. `rows`: of this device.
        """
        weights = select_leaves(network, names)

        def micro_loss(weights: WeightArrays, rows: StepRows) -> Scalar:
            placed = local(replace_leaves(network, weights), network_specs)
            if self.mesh.shape["context"] > 1:
                placed = TokenParallelFlux(placed)
            return self._rows_loss(placed, rows, *rest)

        differentiate = jax.value_and_grad(micro_loss)
        count = self.settings.accumulate
        if count == 1:
            value, gradients = differentiate(weights, rows)
            return value, _to_float32(gradients)

        def add(sums: PyTree, rows: StepRows) -> tuple[PyTree, None]:
            value, gradients = differentiate(weights, rows)
            return jax.tree.map(jnp.add, sums, (value, _to_float32(gradients))), None

        def divide(leaf: Array) -> Array:
            return leaf.reshape(count, -1, *leaf.shape[1:])

        zeros = {name: jnp.zeros(leaf.shape, jnp.float32) for name, leaf in weights.items()}
        return jax.lax.scan(add, (jnp.float32(0), zeros), jax.tree.map(divide, rows))[0]

    def _rows_loss(
        self,
        network: AbstractTransformer | TokenParallelFlux,
        rows: StepRows,
        shared: SharedInputs,
        key: PRNGKeyArray,
        scale: Scalar,
    ) -> Scalar:
        """Return the part of the batch's loss that is of some rows, and of this device.

        The sum of the parts of all devices is the loss, also where several of them compute the same
        rows: each takes its share.
        """

        def weighted(row: StepRows) -> Scalar:
            example = row_example(row, shared)
            draws = draw(example, self.loss, key)
            loss = example_loss(network, example, draws, self.loss, self.evaluation)
            return row.weight * loss

        # All devices along these axes compute the loss of the same rows.
        copies = self.mesh.shape["tensor"] * self.mesh.shape["context"]
        return scale / copies * jnp.sum(jax.vmap(weighted)(rows))

    def _rounded(
        self, updated: WeightArrays, before: WeightArrays, key: PRNGKeyArray
    ) -> WeightArrays:
        """Return updated weights in the dtypes of those before.

        **Arguments:** `updated`: in float32. `key`: of what stochastic rounding draws, which does
        not depend on the mesh.
        """
        rounded = {}
        for number, (name, value) in enumerate(updated.items()):
            nearest = value.astype(before[name].dtype)
            if self.settings.stochastic_rounding and nearest.dtype != jnp.float32:
                own_key = jax.random.fold_in(key, number)
                rounded[name] = round_stochastically(value, nearest, own_key)
            else:
                rounded[name] = nearest
        return rounded


def row_example(row: StepRows, shared: SharedInputs) -> TrainExample:
    """Return one row of a batch as an example, with what all rows share.

    **Arguments:** `row`: arrays without an axis of rows, as `jax.vmap` gives them. `shared`: from
    `place_batch`.
    """
    reference = None
    if row.reference_tokens is not None and shared.reference_ids is not None:
        reference = ReferenceTokens(row.reference_tokens, shared.reference_ids)
    return TrainExample(
        row.latents,
        row.text,
        row.place,
        shared.empty,
        concat=row.concat,
        reference=reference,
        mask=row.mask,
        size=row.size,
    )


def reduce_gradients(gradients: WeightArrays, placed: Specs) -> WeightArrays:
    """Return the sums of gradients over the axes of the mesh that do not split them.

    Along an axis that splits a weight, each device has the gradient of its own part. Along any
    other, devices have the gradients of their own rows, heads or tokens.
    """
    reduced = {}
    for name, gradient in gradients.items():
        split = set(jax.tree.leaves(tuple(placed[name])))
        axes = tuple(axis for axis in AXES if axis not in split)
        reduced[name] = jax.lax.psum(gradient, axes) if axes else gradient
    return reduced


def named_specs(network_specs: PyTree) -> dict[str, PartitionSpec]:
    """Return the specs of a network's leaves by name."""

    def is_spec(node: Any) -> bool:
        return isinstance(node, PartitionSpec)

    values = jax.tree.leaves(network_specs, is_leaf=is_spec)
    names = leaf_names(jax.tree.map(lambda _: 0, network_specs, is_leaf=is_spec))
    return dict(zip(names, values, strict=True))


def _to_float32(weights: WeightArrays) -> dict[str, Float[Array, "..."]]:
    return {name: leaf.astype(jnp.float32) for name, leaf in weights.items()}
